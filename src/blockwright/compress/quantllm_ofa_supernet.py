"""The supernet of LLM-QFA, arXiv 2405.20202: linears that run at several widths, an adapter for each; what sub-models take; its file."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int, Int8
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blockwright.blocks import folders, layers, parameters, tiles
from blockwright.blocks.configurations import Choice, search, survey
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.offset_packed import OffsetLinear, from_offset
from blockwright.blocks.parameters import Place
from blockwright.blocks.run import Run
from blockwright.blocks.stream import Block, batches
from blockwright.blocks.tuning import kl_of_tokens, mean_of_real, next_token_loss
from blockwright.errors import BlockwrightError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORMAT = 1  # of a supernet's file
RANK = 16  # of the adapters where none is given and a linear has as many groups


class Width(nn.Module):
    """A linear rounded to one width, and the adapter that belongs to it.

    q : codes, int8 [N, K] in -2**(bits-1)..2**(bits-1) - 1. alpha : steps [N, G]. beta : the weight of the lowest code, fp32 [N, G].
    lora_A [r, G], lora_B [N, r] : learn; on the sum of each group of inputs.
    """

    q: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, q: Int8[Tensor, "N K"], alpha: Float[Tensor, "N G"], beta: Float[Tensor, "N G"], *, bits: int, rank: int) -> None:
        super().__init__()
        self.bits = bits
        for name, value in (("q", q), ("alpha", alpha), ("beta", beta)):
            self.register_buffer(name, value)
        (n, groups), device = beta.shape, beta.device
        self.lora_A = nn.Parameter(torch.zeros(rank, groups, device=device))
        self.lora_B = nn.Parameter(torch.zeros(n, rank, device=device))

    def start(self, rng: torch.Generator) -> None:
        """A uniform in +-1/sqrt(G), B zero, so that the adapter changes nothing yet."""
        bound = self.lora_A.shape[1] ** -0.5
        a = torch.empty(self.lora_A.shape, device=rng.device).uniform_(-bound, bound, generator=rng)
        self.lora_A.data.copy_(a)
        self.lora_B.data.zero_()


class SuperLinear(nn.Module):
    """A linear at several widths, as children b2, b3, ...; `active` says which one runs.

    y = x (alpha q + beta)^T + lora_alpha / r (pool(x) A^T) B^T + bias, where pool sums each group of inputs. So the adapter is the same for
    all inputs of a group, and `merged` adds it to beta: no approximation.
    """

    def __init__(
        self, in_features: int, *, grids: Iterable[Width], group_size: int, lora_alpha: int, bias: Tensor | None, transposed: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.group_size, self.lora_alpha, self.transposed = in_features, group_size, lora_alpha, transposed
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        for grid in grids:
            self.add_module(f"b{grid.bits}", grid)
            self.out_features, self.active = grid.beta.shape[0], grid.bits

    def width(self, bits: int) -> Width:
        """What belongs to this width."""
        return cast(Width, self.get_submodule(f"b{bits}"))

    def forward(self, x: Float[Tensor, "*b K"]) -> Float[Tensor, "*b N"]:
        w = self.width(self.active)
        weight = from_offset(w.q, w.alpha, w.beta, bits=w.bits, group_size=self.group_size)
        low = nn.functional.linear(self._pool(x), w.lora_A.to(x.dtype))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = nn.functional.linear(x, weight.to(x.dtype), bias)
        return y + self._scaling(w) * nn.functional.linear(low, w.lora_B.to(x.dtype))

    @torch.no_grad()
    def merged(self, bits: int) -> Float[Tensor, "N G"]:
        """The offsets with the adapter in them, fp32."""
        w = self.width(bits)
        return w.beta + self._scaling(w) * (w.lora_B.float() @ w.lora_A.float())

    def extracted(self, bits: int) -> OffsetLinear:
        """The linear at this width alone, without adapter."""
        w = self.width(bits)
        return OffsetLinear.of(self, w.q, w.alpha, self.merged(bits), bits=bits, group_size=self.group_size)

    def _scaling(self, w: Width) -> float:
        return self.lora_alpha / w.lora_A.shape[0]

    def _pool(self, x: Float[Tensor, "*b K"]) -> Float[Tensor, "*b G"]:
        return tiles.grouped(x.reshape(-1, self.in_features), self.group_size).sum(-1).view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Made:
    """How a supernet is made: what its file says and a stage that uses the file must say too. Options as in `quantllm_ofa`.

    widths : ascending.
    """

    widths: Choice = (2, 3, 4)
    unit: str = "block"
    group_size: int = 32
    scale_dtype: str = "fp16"
    r: int | None = None
    lora_alpha: int = 16

    def rank(self, in_features: int) -> int:
        """Of the adapters of a linear."""
        return self.r or min(RANK, tiles.num_groups(in_features, self.group_size))

    def options(self) -> dict[str, Any]:
        """JSON, by the names of the options."""
        about = asdict(self)
        return {"choices": list(about.pop("widths")), **about}


class Costs:
    """What configurations take: for each unit and width bits of codes and bytes of all; `rest`, the plain tensors of the model."""

    def __init__(
        self, code_bits: list[list[int]], nbytes: list[list[int]], weights: list[int], widths: Choice, rest: list[tuple[int, int]]
    ):
        self.code_bits, self.nbytes, self.weights, self.widths, self._rest = code_bits, nbytes, weights, widths, rest

    @classmethod
    def of(cls, model: Blueprint, linears: Mapping[str, tuple[int, int]], made: Made) -> "Costs":
        """Of the sub-models of a model with these linears (outputs, inputs), whatever form these have in it by now."""
        itemsize = DTYPES[made.scale_dtype].itemsize

        def linear_bytes(n: int, k: int, b: int) -> int:
            return 4 * n * -(-k * b // 32) + 2 * itemsize * n * tiles.num_groups(k, made.group_size)

        units = [[linears[name] for name in unit] for unit in units_of(linears, made.unit, layers.chain_path(model.skeleton()))]
        own = {f"{name}.{end}" for name in linears for end in ("weight", "weight_packed", "weight_step", "weight_offset")}
        once = {place: name for name, place in model.tensors.items() if name not in own}.values()
        facts = [model.tensors.facts(name) for name in once]
        return cls(
            [[b * sum(n * k for n, k in unit) for b in made.widths] for unit in units],
            [[sum(linear_bytes(n, k, b) for n, k in unit) for b in made.widths] for unit in units],
            [sum(n * k for n, k in unit) for unit in units],
            made.widths,
            [(torch.Size(f.shape).numel(), 0 if f.dtype.is_floating_point else f.dtype.itemsize) for f in facts],
        )

    def total(self, choice: Choice, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of all tensors of the sub-model, those that are not quantised in `dtype`."""
        return self.rest(dtype) + self._sum(self.nbytes, choice)

    def rest(self, dtype: torch.dtype) -> int:
        """Bytes of what is not quantised."""
        return sum(count * (itemsize or dtype.itemsize) for count, itemsize in self._rest)

    def mean_bits(self, choice: Choice) -> float:
        """The mean width of the codes."""
        return self._sum(self.code_bits, choice) / sum(self.weights)

    def stored_bits(self, choice: Choice) -> float:
        """Bits that a quantised weight takes, its share of steps and offsets too."""
        return 8 * self._sum(self.nbytes, choice) / sum(self.weights)

    def budget(self, bits: float | None, size: int | None, dtype: torch.dtype = torch.bfloat16) -> tuple[list[list[int]], int]:
        """Sizes of the widths of each unit, and their limit: bits of codes, or bytes. One of the two is None.

        Raises BlockwrightError where even the smallest sub-model exceeds it.
        """
        least: Choice = tuple([self.widths[0]] * len(self.weights))
        needs = f"the smallest sub-model needs {self.total(least, dtype)} bytes, {self.mean_bits(least):g} bits a code"
        if size is not None:
            sizes, limit, asked = self.nbytes, size - self.rest(dtype), f"size={size}"
        else:
            assert bits is not None
            sizes, limit, asked = self.code_bits, math.floor(bits * sum(self.weights) * (1 + 1e-12)), f"bits={bits}"
        if sum(min(s) for s in sizes) > limit:
            raise BlockwrightError(f"quantllm-ofa: {asked}: {needs}", do="Raise the budget, or give smaller choices or a larger group_size")
        return sizes, limit

    def _sum(self, table: list[list[int]], choice: Choice) -> int:
        return sum(row[self.widths.index(b)] for row, b in zip(table, choice, strict=True))


class Supernet:
    """A model in which every treated linear is a `SuperLinear`. One training, any number of sub-models:

        run = Run(Blueprint.of_module(model), calibration=ids)
        net = quantised(run, Made())
        train(run, net, Feed(run, 4, 256), steps=600, teacher=model)
        smaller = [net.extract(net.find(other_ids, bits=b, teacher=model)).build() for b in (2.25, 2.5, 3.0)]

    model : resident, in eval mode; trained in place. linears : full name -> SuperLinear. units : the linears that share a width.
    blueprint : the model around them.
    """

    def __init__(self, blueprint: Blueprint, model: nn.Module, linears: Mapping[str, SuperLinear], made: Made) -> None:
        self.blueprint, self.model, self.linears, self.made = blueprint, model, dict(linears), made
        for name, linear in self.linears.items():
            layers.swap(model, name, linear)
        self.units = units_of(self.linears, made.unit, layers.chain_path(model))
        self.costs = Costs.of(blueprint, {name: layers.size(m) for name, m in self.linears.items()}, made)

    def adapters(self, *widths: int) -> list[nn.Parameter]:
        """What learns, of these widths; of all where none is given."""
        return [p for m in self.linears.values() for b in widths or self.made.widths for p in (m.width(b).lora_A, m.width(b).lora_B)]

    def activate(self, choice: Choice) -> None:
        """Let each unit run at its width from now on."""
        for unit, bits in zip(self.units, choice, strict=True):
            for name in unit:
                self.linears[name].active = bits

    def scorer(
        self, ids: Int[Tensor, "n T"], mask: Int[Tensor, "n T"] | None = None, *, teacher: nn.Module | None = None, batch: int = 8
    ) -> Callable[[Choice], float]:
        """A function that gives the mean loss of a configuration on this text, as in `train`, in nats a token."""
        device = next(self.model.parameters()).device

        @torch.no_grad()
        def score(choice: Choice) -> float:
            self.activate(choice)
            total, count = 0.0, 0
            for rows in batches(len(ids), batch):
                part, some = ids[rows].to(device), None if mask is None else mask[rows].to(device)
                real = torch.ones_like(part) if some is None else some
                tokens = int((real if teacher is not None else real[:, 1:] * real[:, :-1]).sum())
                total, count = total + tokens * float(loss_of(self.model, teacher, part, some)), count + tokens
            return total / max(count, 1)

        return score

    def find(
        self,
        ids: Int[Tensor, "n T"],
        *,
        bits: float | None = None,
        size: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        teacher: nn.Module | None = None,
        seen: dict[Choice, float] | None = None,
        samples: int = 100,
        solver: Literal["ilp", "samples"] = "ilp",
        seed: int = 0,
    ) -> Choice:
        """The best configuration found on this text under a budget of mean code bits, or of bytes with plain tensors in `dtype`.

        teacher : as in `train`; what scores are made with. seen : scores that are known; is added to, so that the next budget costs less.
        Raises BlockwrightError where neither or both budgets are given, or even the smallest sub-model exceeds it.
        """
        if (bits is None) == (size is None):
            raise BlockwrightError(f"quantllm-ofa: bits={bits}, size={size}", allowed="one of the two")
        sizes, limit = self.costs.budget(bits, size, dtype)
        rng, score = torch.Generator().manual_seed(seed), self.scorer(ids, teacher=teacher)
        seen = {} if seen is None else seen
        if not seen:
            seen |= survey(score, len(self.units), self.made.widths, rng, num=samples)
        return search(score, seen, sizes, limit, self.made.widths, rng, solver=solver)

    def write(self, run: Run, choice: Choice) -> None:
        """Put the sub-model of a configuration into a run."""
        width = {name: bits for unit, bits in zip(self.units, choice, strict=True) for name in unit}

        def take(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> None:
            for name, linear in self.linears.items():
                if name.startswith(block.name + "."):
                    block.swap(name, linear.extracted(width[name]))

        run.blocks(take, write=True)

    def extract(self, choice: Choice) -> Blueprint:
        """The sub-model of a configuration: `.build()` gives it in memory. The supernet stays as it is."""
        run = Run(self.blueprint, device=next(self.model.parameters()).device)
        self.write(run, choice)
        return run.model

    def save(self, file: str | Path) -> None:
        """Keep the supernet in a safetensors file: `<linear>.b2.q` (packed), `.alpha`, `.beta`, `.lora_A`, `.lora_B`. Old or new, whole."""
        path = Path(file)
        tensors = {}
        for name, linear in self.linears.items():
            for b in self.made.widths:
                for key, value in linear.width(b).state_dict().items():
                    stored = tiles.pack(value, b) if key == "q" else value
                    tensors[f"{name}.b{b}.{key}"] = stored.cpu().clone(memory_format=torch.contiguous_format)
        about = {"supernet": json.dumps({"format": FORMAT, **self.made.options()})}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            folders.replace_file(path, lambda scratch: save_file(tensors, scratch, metadata=about))
        except OSError as error:
            raise folders.told(path.parent, error) from error

    @classmethod
    def load(
        cls, file: str | Path, blueprint: Blueprint, *, made: Made | None = None, names: Sequence[str] | None = None, device: Any = "cpu"
    ) -> "Supernet":
        """The supernet of a file, around the dense model that it was made from.

        made, names : options and linears that it must have; None: whatever it has.
        Raises BlockwrightError for other options or linears, a file that is damaged, and a model of other sizes.
        """
        path = Path(file)
        theirs = _read_options(path)
        for option, value in made.options().items() if made is not None else ():
            if theirs.options()[option] != value:
                raise BlockwrightError(
                    f"{path}: a supernet with {option}={theirs.options()[option]}, and the stage has {option}={value}",
                    do=f"Use {option}: {theirs.options()[option]}, or train another supernet",
                )
        facts = parameters.header(path)
        inside = sorted({name.rsplit(".", 2)[0] for name in facts})
        linears = {n: layers.size(m) for n, m in layers.block_linears(blueprint.skeleton()).items()}
        wanted = inside if names is None else names
        odd = sorted(set(inside) ^ set(wanted)) or [name for name in inside if name not in linears]
        if odd:
            raise BlockwrightError(
                f"{path}: its linears are not the model's: {odd[0]}", do="Use the model and options that it was made with"
            )
        model = blueprint.build(device=device, dtype=torch.float32)
        stored = parameters.Tensors({name: Place(path, name) for name in facts})
        made_of = {}
        for name in (name for name in linears if name in set(inside)):
            tensors = {}
            for key, (dtype, shape) in _expected(linears[name], theirs).items():
                full = f"{name}.{key}"
                if full not in facts or facts[full] != (dtype, shape):
                    raise BlockwrightError(f"{path}: {full} is not a {dtype} {list(shape)}", do="Use the model that it was made from")
                tensors[key] = stored.read([full])[full].to(device)
                layers.check_finite(tensors[key], f"{path}: {full}")
            made_of[name] = super_linear(model.get_submodule(name), tensors, theirs)
        return cls(blueprint, model, made_of, theirs)


def units_of(linears: Iterable[str], unit: str, path: str) -> list[tuple[str, ...]]:
    """Full names of the linears of each unit; path: of the chain of blocks."""
    found: dict[str, list[str]] = {}
    for name in linears:
        key = name if unit == "linear" else name.removeprefix(path + ".").partition(".")[0]
        found.setdefault(key, []).append(name)
    return [tuple(names) for names in found.values()]


def loss_of(model: nn.Module, teacher: nn.Module | None, ids: Int[Tensor, "b T"], mask: Int[Tensor, "b T"] | None) -> Float[Tensor, ""]:
    """Mean KL divergence of the next-token distribution from the teacher's, or without one the loss of the next token; in nats, in fp32."""
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    if teacher is None:
        return next_token_loss(logits, ids, mask)
    with torch.no_grad():
        wanted = teacher(ids, attention_mask=mask, use_cache=False).logits
    return mean_of_real(kl_of_tokens(wanted, logits), mask)


def super_linear(replaced: nn.Module, tensors: Mapping[str, Tensor], made: Made) -> SuperLinear:
    """From `b2.q` (packed), `b2.alpha`, ... ; adapters, where there are any, are taken."""
    k = layers.size(replaced)[1]
    grids = []
    for b in made.widths:
        q = tiles.unpack(tensors[f"b{b}.q"], b, k)
        grid = Width(q, tensors[f"b{b}.alpha"], tensors[f"b{b}.beta"], bits=b, rank=made.rank(k))
        for key in ("lora_A", "lora_B"):
            if f"b{b}.{key}" in tensors:
                getattr(grid, key).data.copy_(tensors[f"b{b}.{key}"])
        grids.append(grid.requires_grad_(False))
    bias = replaced.bias if isinstance(replaced.bias, Tensor) else None
    transposed = isinstance(replaced, Conv1D) or bool(getattr(replaced, "transposed", False))
    return SuperLinear(k, grids=grids, group_size=made.group_size, lora_alpha=made.lora_alpha, bias=bias, transposed=transposed)


def _expected(size: tuple[int, int], made: Made) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of the tensors of a linear in a file."""
    n, k = size
    groups, rank, step = tiles.num_groups(k, made.group_size), made.rank(k), DTYPES[made.scale_dtype]
    return {
        f"b{b}.{key}": facts
        for b in made.widths
        for key, facts in {
            "q": (torch.int32, (n, -(-k * b // 32))),
            "alpha": (step, (n, groups)),
            "beta": (torch.float32, (n, groups)),
            "lora_A": (torch.float32, (rank, groups)),
            "lora_B": (torch.float32, (n, rank)),
        }.items()
    }


def _read_options(path: Path) -> Made:
    try:
        about = json.loads(parameters.metadata(path)["supernet"])
        version = int(about["format"])
        widths, unit, scale_dtype = tuple(int(b) for b in about["choices"]), str(about["unit"]), str(about["scale_dtype"])
        made = Made(
            widths, unit, int(about["group_size"]), scale_dtype, None if about["r"] is None else int(about["r"]), int(about["lora_alpha"])
        )
        good = unit in ("block", "linear") and scale_dtype in DTYPES and list(widths) == sorted(set(widths)) and made.group_size >= -1
        good = good and bool(widths) and all(2 <= b <= 8 for b in widths) and made.group_size != 0 and (made.r is None or made.r > 0)
    except (KeyError, ValueError, TypeError, ArithmeticError, RecursionError):
        good, version = False, FORMAT
    if version > FORMAT:
        raise BlockwrightError(f"{path}: format {version}", allowed=f"up to {FORMAT}", do="Use a newer blockwright")
    if not good:
        raise BlockwrightError(f"{path}: not the file of a supernet", do="Name one that keep_supernet or Supernet.save wrote")
    return made
