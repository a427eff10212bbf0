"""The feed-forward layer of a block: where it is, by the names that transformers gives its linears, and cutting channels out of it."""

from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blockwright.blocks import layers
from blockwright.errors import BlockwrightError

PATTERNS = (  # linears into the intermediate channels and the one out of them, as transformers names them
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
)


class Ffn(NamedTuple):
    """The feed-forward layer of a block: names below the block of its linears into the channels and out of them, and its channels.

    shared : an earlier block holds its tensors too.
    """

    into: tuple[str, ...]
    out: str
    size: int
    shared: bool = False


def find_ffn(block: nn.Module, name: str, *, by: str) -> Ffn:
    """The one feed-forward layer of a block, found by the names of its linears (PATTERNS). name, by : the block and who asks, for errors.

    Raises BlockwrightError naming what is in the way: experts, norms between the linears, other modules than dense linears.
    """
    modules = dict(block.named_modules())
    experts = next((n for n in modules if n.rpartition(".")[2] == "experts"), None)
    if experts:
        raise refusal(by, f"block {name} has {experts}")
    found = [(n, m, pattern) for n, m in modules.items() if (pattern := _pattern(m))]
    if len(found) != 1:
        linears = ", ".join(n for n, m in modules.items() if layers.is_linear(m))
        raise refusal(by, f"block {name} has {len(found) or 'no'} feed-forward layers of a known form; its linears are {linears}")
    [(owner, module, (into, out))] = found
    prefix = f"{owner}." if owner else ""
    for child in (*into, out):
        kind = type(module.get_submodule(child))
        if kind not in (nn.Linear, Conv1D):
            raise refusal(by, f"{name}.{prefix}{child} is a {kind.__name__}")
    norm = next((n for n, _ in module.named_children() if "norm" in n), None) if owner else None
    if norm:  # of all channels: what is left of them would be scaled otherwise
        raise refusal(by, f"{name}.{prefix}{norm} stands between the linears")
    size = layers.size(module.get_submodule(out))[1]
    for child in into:
        rows, wanted = layers.size(module.get_submodule(child))[0], size * halves(child)
        if rows != wanted:
            raise refusal(by, f"{name}.{prefix}{child} has {rows} outputs, not {wanted}")
    return Ffn(tuple(prefix + child for child in into), prefix + out, size)


def _pattern(module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    children = {n for n, _ in module.named_children()}
    return next(((into, out) for into, out in PATTERNS if {*into, out} <= children), None)


def halves(name: str) -> int:
    """How many outputs of a linear belong to a channel: two where gate and up are one matrix, the gates first."""
    return 2 if name.endswith("gate_up_proj") else 1


def refusal(by: str, what: str) -> BlockwrightError:
    """The error of a feed-forward layer that method `by` cannot treat."""
    known = "; ".join(f"{', '.join(into)}, {out}" for into, out in PATTERNS)
    return BlockwrightError(f"{by}: {what}", allowed=f"one feed-forward layer of dense linears a block: {known}", do="Use another method")


def narrower(linear: nn.Module, *, rows: Int[Tensor, " n"] | None = None, columns: Int[Tensor, " k"] | None = None) -> nn.Module:
    """An nn.Linear or Conv1D with only these outputs or inputs of another."""
    weight, bias = layers.matrix(linear), linear.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]  # type: ignore[index]
    if columns is not None:
        weight = weight[:, columns]
    n, k = weight.shape
    new = layers.resized(linear, n, k)
    new.weight = nn.Parameter((weight.T if isinstance(linear, Conv1D) else weight).contiguous(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)  # type: ignore[operator,union-attr]
    return new
