"""Training the blocks of a resident model end to end: batches of the calibration windows, the loss, LoRA on every linear, and merging it.

A method builds its model (`run.model.build`), marks what learns, and calls `run.train` with a loss made of these parts; afterwards a pass
over the blocks takes what was learned, `merge` for LoRA.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from blockwright.blocks import layers
from blockwright.blocks.lora import LoraLinear
from blockwright.blocks.run import Run
from blockwright.blocks.stream import Block
from blockwright.errors import BlockwrightError


class Feed:
    """Training batches from the calibration windows of a run.

    batch_size : windows in a batch. max_seq_length : tokens of each, or all where a window is shorter.
    Raises BlockwrightError without calibration text, and for runs of less than 2 tokens.
    """

    def __init__(self, run: Run, batch_size: int, max_seq_length: int) -> None:
        if run.calibration is None:
            raise BlockwrightError(f"{run.stage}: needs calibration text", do="Give `calibration:` in the recipe, or calibration=token_ids")
        if max_seq_length < 2:
            raise BlockwrightError(f"{run.stage}: max_seq_length={max_seq_length}", allowed="2 or more", do="Try 128")
        self.ids, self.mask, self.size, self.length = run.calibration, run.mask, batch_size, min(max_seq_length, run.calibration.shape[1])

    def draw(self, rng: torch.Generator) -> tuple[Int[Tensor, "b T"], Int[Tensor, "b T"] | None]:
        """Random windows, each cut to a run of `length` tokens, and their mask, on the generator's device.

        The run is a random one or, in padded windows, the one from the first real token.
        """
        spare = self.ids.shape[1] - self.length
        rows = torch.randint(len(self.ids), (self.size,), generator=rng, device=rng.device).cpu()
        start = torch.randint(spare + 1, (self.size,), generator=rng, device=rng.device).cpu()
        if self.mask is not None:
            start = self.mask[rows].argmax(1).cpu().clamp(max=spare)
        at = start[:, None] + torch.arange(self.length)
        ids = self.ids[rows[:, None], at].to(rng.device)
        return ids, None if self.mask is None else self.mask[rows[:, None], at].to(rng.device)

    def loss(self, model: nn.Module) -> Callable[[int, torch.Generator], Tensor]:
        """The next-token loss of a resident model on a new batch, as `run.train` calls it."""

        def loss(i: int, rng: torch.Generator) -> Tensor:
            ids, mask = self.draw(rng)
            return next_token_loss(model(ids, attention_mask=mask, use_cache=False).logits, ids, mask)

        return loss


def next_token_loss(logits: Float[Tensor, "b T V"], ids: Int[Tensor, "b T"], mask: Int[Tensor, "b T"] | None) -> Float[Tensor, ""]:
    """Mean cross entropy of the next token, in nats, where it and the one before it are real."""
    nll = cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return mean_of_real(nll, None if mask is None else mask[:, 1:] * mask[:, :-1])


def kl_of_tokens(parent: Float[Tensor, "*b V"], child: Float[Tensor, "*b V"]) -> Float[Tensor, "*b"]:
    """KL(parent || child) of each token's next one, in nats, computed in fp32 from logits."""
    log_p, log_q = parent.float().log_softmax(-1), child.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean_of_real(value: Float[Tensor, "b T"], mask: Int[Tensor, "b T"] | None) -> Float[Tensor, ""]:
    """The mean over real tokens; 0 where there are none."""
    return value.mean() if mask is None else (value * mask).sum() / mask.sum().clamp(min=1)


def cosine(i: int, steps: int) -> float:
    """What a learning rate is multiplied by in step i of `steps`: from 1 along a cosine towards 0."""
    return (1 + math.cos(math.pi * i / steps)) / 2


def chain(model: nn.Module, *, checkpointing: bool = False) -> nn.ModuleList:
    """The blocks of a resident model; with `checkpointing`, from now on they keep only their inputs for the backward pass."""
    blocks = model.get_submodule(layers.chain_path(model))
    assert isinstance(blocks, nn.ModuleList)
    if checkpointing:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return blocks


def block_vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Vectors of the blocks that belong to no linear, norms above all, by full name."""
    path = layers.chain_path(model) + "."
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if name.startswith(path) and not layers.is_linear(module):
            found |= {f"{name}.{n}": p for n, p in module.named_parameters(recurse=False) if p.dim() == 1}
    return found


def kept_for_backward(block_parameters: int, tokens: int, *, checkpointing: bool) -> float:
    """About how many floats a block keeps for the backward pass of a batch of `tokens`, in units of its parameters.

    34 times its width for each token, or its input alone with checkpointing; a block has about 12 width^2 parameters.
    """
    width = math.sqrt(block_parameters / 12)
    return (1 if checkpointing else 34) * width * tokens / block_parameters


def add_lora(
    run: Run, model: nn.Module, *, r: int | Sequence[int], lora_alpha: int | Sequence[int], shared: bool = False
) -> list[nn.Parameter]:
    """Put LoRA factors on every linear of every block of a resident model and return them; they alone ask for gradients.

    r, lora_alpha : one for all blocks, or one for each. shared : linears that share a weight share their factors.
    """
    blocks = chain(model)
    ranks, alphas = ([v] * len(blocks) if isinstance(v, int) else v for v in (r, lora_alpha))
    factors: dict[object, tuple[nn.Parameter, nn.Parameter]] = {}
    for i, block in enumerate(blocks):
        for name, linear in [(n, m) for n, m in block.named_modules() if layers.is_linear(m)]:
            adapter = LoraLinear(linear, r=ranks[i], lora_alpha=alphas[i])
            key = id(linear.weight) if shared else (i, name)
            if key not in factors:
                adapter.start(run.generator("lora", i, name))
                factors[key] = (adapter.lora_A.requires_grad_(), adapter.lora_B.requires_grad_())
            adapter.lora_A, adapter.lora_B = factors[key]
            layers.swap(block, name, adapter)
    return [p for pair in factors.values() for p in pair]


def merge(block: Block, model: nn.Module) -> None:
    """Give the linears of a block what `model` has there, LoRA merged; one that blocks share, in the first block that holds it."""
    tuned = model.get_submodule(block.name)
    for name, linear in block.linears().items():
        adapter = tuned.get_submodule(name.removeprefix(block.name + "."))
        linear.weight.data.copy_(adapter.plain_weight())  # type: ignore[union-attr,operator]
