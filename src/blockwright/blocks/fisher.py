"""What a change of a linear's weights adds to KL(dense || changed), estimated from one pass backwards: half of sum F dW^2.

F is the diagonal of the Fisher information, the mean over tokens of the squared gradient of -log p(y), y drawn from the model's own
predictions p. It is exact to second order where the errors of two weights are not correlated, as those of rounding are.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from blockwright.blocks import layers
from blockwright.blocks.run import Facts
from blockwright.blocks.stream import Block
from blockwright.blocks.treatments import Treatment, treated


class Fisher:
    """Hears a block, as `Run.backward` asks, and tells what each treatment of each linear adds to the loss, in nats a token.

    offered : full name of a linear -> its treatments. tokens : real ones in the calibration text.
    facts : estimates, name -> treatment -> nats; "x2:<name>", the mean square of each of its inputs.
    """

    def __init__(self, block: Block, offered: Mapping[str, Sequence[Treatment]], tokens: int) -> None:
        self.offered, self.tokens = offered, tokens
        self.linears = {n: m for n, m in block.linears().items() if n in offered}
        self.information = {n: torch.zeros(layers.size(m), device=layers.matrix(m).device) for n, m in self.linears.items()}
        self.squares = {n: torch.zeros(layers.size(m)[1], device=layers.matrix(m).device) for n, m in self.linears.items()}

    def hear(self, name: str, x: Float[Tensor, "t K"], gradient: Float[Tensor, "t N"]) -> None:
        if name in self.linears:
            squares = x.square()
            self.information[name].addmm_(gradient.square().T, squares)
            self.squares[name] += squares.sum(0)

    @torch.no_grad()
    def facts(self) -> Facts:
        found: Facts = {"estimates": {}}
        for name, linear in self.linears.items():
            w, f, x2 = layers.matrix(linear).float(), self.information[name], self.squares[name] / self.tokens
            found["estimates"][name] = {
                str(t): 0.0 if t.kind == "dense" else float(0.5 / self.tokens * (f * (treated(w, t, x2) - w).square()).sum())
                for t in self.offered[name]
            }
            found[f"x2:{name}"] = x2
        return found
