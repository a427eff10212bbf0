"""The two subblocks of a transformer block, attention and feed-forward, found by structure, and cheaper ones made from their weights.

A cheaper subblock is a mapping of names below the block to the modules that stand there instead, `swapped` in and out. Every one of them is
made without training: key and value heads averaged, channels kept, two linears multiplied, or nothing left.
"""

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blockwright.blocks import layers
from blockwright.blocks.feed_forward import Ffn, find_ffn, halves, narrower
from blockwright.blocks.stream import Block
from blockwright.blocks.variants import LinearAttention, LinearFfn, NoAttention, NoFfn, Skip, slot
from blockwright.errors import BlockwrightError

SEPARATE = tuple((("q_proj", "k_proj", "v_proj"), out) for out in ("o_proj", "out_proj", "dense"))
FUSED = ((("query_key_value",), "dense"), (("c_attn",), "c_proj"), (("qkv_proj",), "o_proj"), (("Wqkv",), "out_proj"))
GRANULARITY = 128  # a tile of matrix units
STEPS = 8  # at least so many multiples of it in a feed-forward layer, where it is left to us
NORMS = (  # of the attention and of the feed-forward layer, each before its own
    ("input_layernorm", "post_attention_layernorm"),
    ("ln_1", "ln_2"),
    ("self_attn_layer_norm", "final_layer_norm"),
)


class Attention(NamedTuple):
    """The attention of a block: its name below the block, and those of its linears in and out.

    kv_width : outputs of the keys, heads times width of one. kv_heads : their number, where it can be less, else None and `why`.
    """

    name: str
    into: tuple[str, ...]
    out: str
    kv_width: int
    kv_heads: int | None
    why: str = ""


class Subblocks(NamedTuple):
    """Attention and feed-forward layer of a block, and the norms before them, None where one cannot be told apart."""

    attention: Attention
    ffn: Ffn
    attention_norm: str | None
    ffn_norm: str | None


class Option(NamedTuple):
    """What a subblock may be. part : attention or ffn. kind : parent, heads (of keys and values), width (channels), linear, none."""

    part: str
    kind: str
    size: int = 0

    def __str__(self) -> str:
        return f"{self.part}: {self.kind}" + (f" {self.size}" if self.size else "")


class Library:
    """The options of each subblock, the parent's first. slots : attention and feed-forward layer of block 0, of block 1, ...

    left : why some options are not offered. every : all options, the parents' included. by : who asks, for errors.
    heads : numbers of key and value heads, divisors of the parent's; None: its half, the half of that and so on, and 1. widths : shares of
    the parent's channels; granularity : multiples of which they become, None: GRANULARITY or what fits STEPS times. linear, no_op : whether
    to offer those. blocks : that may change, None: all. Raises BlockwrightError for values out of range, and heads that do not divide.
    """

    def __init__(
        self,
        parts: Sequence[Subblocks],
        *,
        by: str,
        heads: Sequence[int] | None = None,
        widths: Sequence[float] = (),
        granularity: int | None = None,
        linear: bool = True,
        no_op: bool = True,
        blocks: Sequence[int] | None = None,
    ) -> None:
        free = _checked_blocks(by, blocks, len(parts))
        if not all(0 < share < 1 for share in widths):
            raise BlockwrightError(f"{by}: widths={list(widths)}", allowed="shares above 0 and below 1", do="Try [0.75, 0.5, 0.25]")
        self.slots: list[tuple[Option, ...]] = []
        self.left: list[str] = []
        for i, (attention, ffn, _, _) in enumerate(parts):
            offered = [Option("attention", "parent")]
            for count in _head_counts(by, attention.kv_heads, heads, attention.why, i):
                offered.append(Option("attention", "heads", count))
            if linear and attention.kv_heads is not None:
                offered.append(Option("attention", "linear"))
            if attention.kv_heads is None:
                self.left.append(f"fewer heads and linear attention: in block {i} {attention.why}")
            channels = [Option("ffn", "parent"), *(Option("ffn", "width", w) for w in _channels(widths, ffn.size, granularity))]
            if linear and "." in ffn.out:
                channels.append(Option("ffn", "linear"))
            if no_op:
                offered.append(Option("attention", "none"))
                channels.append(Option("ffn", "none"))
            self.slots += [tuple(options if i in free else options[:1]) for options in (offered, channels)]
        self.every = list(dict.fromkeys(option for options in self.slots for option in options))

    def named(self, picks: Sequence[int]) -> list[tuple[Option, Option]]:
        """For each block its attention and its feed-forward layer."""
        chosen = [options[i] for options, i in zip(self.slots, picks, strict=True)]
        return list(zip(chosen[::2], chosen[1::2], strict=True))


def _head_counts(by: str, have: int | None, wanted: Sequence[int] | None, why: str, block: int) -> list[int]:
    if wanted is None:
        halves = [have >> k for k in range(1, have.bit_length()) if have % (1 << k) == 0] if have else []
        return halves + ([1] if have and have > 1 and 1 not in halves else [])
    if not wanted:
        return []
    if have is None:
        raise BlockwrightError(
            f"{by}: heads={list(wanted)}: in block {block} {why}", allowed="null, which leaves such attention", do="Leave heads out"
        )
    for count in wanted:
        if count < 1 or count >= have or have % count:
            allowed = ", ".join(str(n) for n in range(1, have) if have % n == 0) or "none, as there is one head"
            raise BlockwrightError(f"{by}: heads={list(wanted)}: {count} of {have} key and value heads in block {block}", allowed=allowed)
    return list(dict.fromkeys(wanted))


def _channels(shares: Sequence[float], size: int, granularity: int | None) -> list[int]:
    step = granularity or min(GRANULARITY, 2 ** max(0, (size // STEPS).bit_length() - 1))
    found = [max(1, math.floor(share * size / step + 0.5)) * step for share in shares]
    return list(dict.fromkeys(width for width in found if width < size))


def _checked_blocks(by: str, blocks: Sequence[int] | None, count: int) -> set[int]:
    if blocks is None:
        return set(range(count))
    if not blocks or len(set(blocks)) < len(blocks) or not all(0 <= i < count for i in blocks):
        raise BlockwrightError(
            f"{by}: blocks={list(blocks)}", allowed=f"one or more of 0 to {count - 1}, each once", do="Leave it out for all"
        )
    return set(blocks)


def find_subblocks(block: nn.Module, name: str, *, by: str) -> Subblocks:
    """The subblocks of a block, by the names of their linears. name, by : the block and who asks, for errors.

    Raises BlockwrightError for experts, a block without one attention and one feed-forward layer, and subblocks that add the residual.
    """
    modules = dict(block.named_modules())
    found = [
        (n, into, out)
        for n, m in modules.items()
        for into, out in (*SEPARATE, *FUSED)
        if {*into, out} <= {c for c, _ in m.named_children()}
    ]
    linears = ", ".join(n for n, m in modules.items() if layers.is_linear(m))
    if len(found) != 1:
        raise BlockwrightError(
            f"{by}: block {name} has {len(found) or 'no'} attention of a known form; its linears are {linears}",
            allowed="one attention of q_proj, k_proj, v_proj or a fused one, and one feed-forward layer",
            do="Use another method",
        )
    ffn = find_ffn(block, name, by=by)
    [(inner, into, out)] = found
    for part in (inner, ffn.out.rpartition(".")[0]):
        if part and "residual" in inspect.signature(type(modules[part]).forward).parameters:
            raise BlockwrightError(f"{by}: {name}.{part} adds the residual itself", allowed="blocks that add it", do="Use another method")
    first, last = next(
        ((a, b) for a, b in NORMS if a in block._modules and b in block._modules and not _more_norms(block, {a, b})), (None, None)
    )
    return Subblocks(_attention(modules, inner, into, out), ffn, first, last)


def variant(block: nn.Module, parts: Subblocks, option: Option, mean_abs: Float[Tensor, " I"] | None = None) -> dict[str, nn.Module]:
    """The modules of a subblock as `option` wants it, made from the block's weights, by name below the block: all of them new.

    mean_abs : mean |x| of each channel, which with the way out says what a channel contributes; None keeps the first ones.
    """
    norm = parts.attention_norm if option.part == "attention" else parts.ffn_norm
    made = _attention_as(block, parts.attention, option) if option.part == "attention" else _ffn_as(block, parts.ffn, option, mean_abs)
    if norm is not None:
        made[norm] = Skip() if option.kind == "none" else copy.deepcopy(block.get_submodule(norm))
    return made


@contextmanager
def swapped(block: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, these modules stand in the block."""
    before = {name: block.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            layers.swap(block, name, module)
        yield
    finally:
        for name, module in before.items():
            layers.swap(block, name, module)


def put(block: Block, modules: Mapping[str, nn.Module]) -> None:
    """Put the modules into the block: weights where the shapes are the block's own, else the module with its form."""
    for name, new in modules.items():
        old = block.module.get_submodule(name)
        if type(old) is type(new) and {n: t.shape for n, t in old.state_dict().items()} == {
            n: t.shape for n, t in new.state_dict().items()
        }:
            old.load_state_dict(new.state_dict())
        else:
            block.swap(f"{block.name}.{name}", new)


def contributions(mean_abs: Float[Tensor, " I"], out_DI: Float[Tensor, "D I"]) -> Float[Tensor, " I"]:
    """C_k = mean |x_k| ||W_out[:, k]||: the mean over tokens of how far the output moves when channel k is silenced, exactly."""
    return mean_abs.to(out_DI) * out_DI.norm(dim=0)


def mean_abs(block: Block, parts: Subblocks, x: Float[Tensor, "n T d"], mask: Int[Tensor, "n T"] | None = None) -> Float[Tensor, " I"]:
    """The mean over real tokens of |activation| of each feed-forward channel, in fp64, where x is the input of the block."""
    total, seen = torch.zeros(parts.ffn.size, dtype=torch.float64), 0
    real = torch.ones(x.shape[:2]) if mask is None else mask.float().cpu()

    def hear(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal seen
        values = args[0].detach().reshape(-1, parts.ffn.size).abs().double().cpu()
        total.add_(values.T @ real.flatten()[seen : seen + len(values)].double())
        seen += len(values)

    handle = block.module.get_submodule(parts.ffn.out).register_forward_pre_hook(hear)
    block.outputs(x)
    handle.remove()
    return total / real.sum()


def mean_heads(rows: Float[Tensor, "N *K"], heads: int, to: int) -> Float[Tensor, "M *K"]:
    """The outputs of `heads` heads as those of `to` heads, each the mean of a run of them. `to` divides `heads`."""
    each = rows.shape[0] // heads
    return rows.reshape(to, heads // to, each, *rows.shape[1:]).mean(1).reshape(to * each, *rows.shape[1:])


def _more_norms(block: nn.Module, known: set[str]) -> bool:
    """Whether other norms stand beside these two: then which of them comes before what is not known by name."""
    return any(("norm" in n or n.startswith("ln_")) and n not in known for n, _ in block.named_children())


def _attention(modules: Mapping[str, nn.Module], inner: str, into: tuple[str, ...], out: str) -> Attention:
    module = modules[inner]
    names = tuple(f"{inner}.{n}" for n in into)
    q_width = layers.size(modules[f"{inner}.{out}"])[1]
    outputs = [layers.size(modules[n])[0] for n in names]
    kv_width = outputs[1] if len(names) == 3 else (outputs[0] - q_width) // 2
    head_dim, heads, why = getattr(module, "head_dim", None), None, ""
    if len(names) != 3:
        why = f"{names[0]} holds queries, keys and values in one"
    elif not (isinstance(head_dim, int) and hasattr(module, "num_key_value_groups")):
        why = f"{type(module).__name__} has a key head for each query head by its code"
    else:
        heads = kv_width // head_dim
    outer = inner.partition(".")[0]  # what the block calls, where the attention proper is wrapped (GPT-Neo)
    return Attention(outer, names, f"{inner}.{out}", kv_width, heads, why)


def _attention_as(block: nn.Module, attention: Attention, option: Option) -> dict[str, nn.Module]:
    linears = {name: block.get_submodule(name) for name in (*attention.into, attention.out)}
    if option.kind == "none":
        return {attention.name: NoAttention(slot(block.get_submodule(attention.name)))}
    made = {name: copy.deepcopy(linear) for name, linear in linears.items()}
    if option.kind == "parent":
        return made
    heads, (_, k, v) = attention.kv_heads, attention.into
    if option.kind == "heads":
        assert heads is not None
        for name in (k, v):
            bias = _bias(linears[name])
            weight = mean_heads(layers.matrix(linears[name]), heads, option.size)
            made[name] = like(linears[name], weight, None if bias is None else mean_heads(bias, heads, option.size))
        return made
    value, out = linears[v], linears[attention.out]
    head_dim = block.get_submodule(attention.out.rpartition(".")[0]).head_dim
    repeats = layers.size(out)[1] // attention.kv_width

    def to_queries(rows: Tensor) -> Tensor:  # the value head of each query head
        return rows.unflatten(0, (-1, head_dim)).repeat_interleave(repeats, 0).flatten(0, 1)

    weight, bias = _product(out, to_queries(layers.matrix(value)), None if _bias(value) is None else to_queries(_bias(value)))
    new = LinearAttention(len(weight), bias=bias is not None, layer_idx=slot(block.get_submodule(attention.name)))
    _fill(new.linear, weight, bias)
    return {attention.name: new}


def _ffn_as(block: nn.Module, ffn: Ffn, option: Option, mean_abs: Tensor | None) -> dict[str, nn.Module]:
    linears = {name: block.get_submodule(name) for name in (*ffn.into, ffn.out)}
    owner = ffn.out.rpartition(".")[0]
    if option.kind == "none":
        return {owner: NoFfn()} if owner else {**{name: Skip() for name in ffn.into}, ffn.out: NoFfn()}
    if option.kind == "parent":
        return {name: copy.deepcopy(linear) for name, linear in linears.items()}
    out = layers.matrix(linears[ffn.out])
    if option.kind == "width":
        keep = torch.arange(option.size, device=out.device)
        if mean_abs is not None:
            keep = contributions(mean_abs, out).sort(descending=True, stable=True).indices[: option.size].sort().values
        made = {
            name: narrower(linears[name], rows=torch.cat([keep + half * ffn.size for half in range(halves(name))])) for name in ffn.into
        }
        return {**made, ffn.out: narrower(linears[ffn.out], columns=keep)}
    up = linears[ffn.into[-1]]  # where gate and up are one matrix, the second half
    bias = _bias(up)
    weight, bias = _product(linears[ffn.out], layers.matrix(up)[-ffn.size :], None if bias is None else bias[-ffn.size :])
    new = LinearFfn(len(weight), bias=bias is not None)
    _fill(new.linear, weight, bias)
    return {owner: new}


def _bias(linear: nn.Module) -> Tensor | None:
    bias = getattr(linear, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def _product(out: nn.Module, into: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of x -> out(into x + bias)."""
    matrix, last = layers.matrix(out), _bias(out)
    parts = [t for t in (None if bias is None else matrix @ bias, last) if t is not None]
    return matrix @ into, sum(parts[1:], parts[0]) if parts else None


def _fill(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=False)


def like(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A linear of the same kind with these weights, outputs x inputs."""
    new = layers.resized(linear, *weight.shape)
    new.weight = nn.Parameter((weight.T if isinstance(linear, Conv1D) else weight).contiguous(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return new
