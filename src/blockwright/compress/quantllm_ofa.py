"""Trains one supernet in which every block can run at 2, 3 or 4 bits, so that a model for any memory budget is taken out without training.

Use it when one model goes to many devices, at 2 to 4 bits, and there is text and time to train small adapters once. Not for a single budget
at 4 bits, where GPTQ or a learned rounding alone loses little, and not without text. What is taken out has no adapters left: they are
absorbed, exactly, into the offset of each group.

LLM-QFA (One QuantLLM for ALL), arXiv 2405.20202; the adapters are QA-LoRA's, arXiv 2309.14717. Re-measure its claim:
`blockwright reproduce quantllm-ofa`.
"""

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
from blockwright.blocks.configurations import MORE, Choice, draw, search, survey
from blockwright.blocks.gptq import gptq
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.offset_packed import OffsetLinear, from_offset
from blockwright.blocks.parameters import Place
from blockwright.blocks.run import Facts, Run, stage
from blockwright.blocks.stream import Block, Gram, batches
from blockwright.blocks.tuning import Feed, chain, cosine, kept_for_backward, kl_of_tokens, mean_of_real, next_token_loss
from blockwright.errors import BlockwrightError
from blockwright.options import Count, GroupSize, Positive, Rate, Share, Targets

CARD = {
    "slug": "quantllm-ofa",
    "room": "compress",
    "kind": "stage",
    "arxiv": "2405.20202",
    "title": "One QuantLLM for ALL: Fine-tuning Quantized LLMs Once for Efficient Deployments",
    "summary": "one supernet of 2-, 3- and 4-bit blocks, trained once; a sub-model for any budget is taken out of it",
    "saves": "weight bytes, 3.2x (4 bits) to 5.3x (2 bits, groups of 32), and a training for every budget but the first",
    "needs": ["calibration", "gradients"],
    "accepts": ["dense"],
    "leaves": "offset-packed",
    "writes": "our own layout with real-valued offsets; GGUF Q4_1 holds it exactly, `export: standard` with integer zero points",
    "claim": {
        "figure": "as good as QA-LoRA tuned for each budget (72.4/68.0/61.7 at 4/3/2 bits, common sense, 5-shot), with one training",
        "against": "QA-LoRA for each budget; GPTQ",
        "where": "abstract and main table, LLaMA-2 7B",
    },
}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORMAT = 1  # of a supernet's file
RANK = 16  # of the adapters where none is given and a linear has as many groups
PERIOD = 0.8  # of the steps, where none is given: the paper's 8,000 of 10,000
RIDGE = 0.1  # of the fit of the offsets


@stage
def quantllm_ofa(
    run: Run,
    *,
    bits: float = 3.0,
    size: Positive | None = None,
    choices: list[int] = [2, 3, 4],
    unit: Literal["block", "linear"] = "block",
    group_size: GroupSize = 32,
    scale_dtype: Literal["fp16", "bf16", "fp32"] = "fp16",
    steps: Count = 600,
    period: Positive | None = None,
    loss: Literal["teacher", "text"] = "teacher",
    lr: Rate = 3e-4,
    r: Positive | None = None,
    lora_alpha: Positive = 16,
    batch_size: Positive = 4,
    max_seq_length: Positive = 256,
    gradient_checkpointing: bool = False,
    validation: Share = 0.2,
    samples: Positive = 100,
    solver: Literal["ilp", "samples"] = "ilp",
    supernet: str | None = None,
    keep_supernet: str | None = None,
    targets: Targets = ["Linear"],
    ignore: Targets = [],
) -> None:
    """Train the supernet of the targeted linears and leave its best sub-model under a budget: each unit at a width of its own.

    Every linear is rounded by GPTQ at each width, w = alpha * code + beta by groups of inputs, with the offsets beta that fit the inputs
    best, and gets an adapter for each width that sees the sum of each group. In a step one configuration runs, drawn so that its mean width
    sweeps from the largest to the smallest and back; the adapters of other widths stay untouched. Then configurations are scored on text
    kept from training. Embeddings, head and norms are not touched. Resident: the model in fp32, twice with a teacher, a byte a weight for
    each width, and activations.

    For more than one budget: `keep_supernet` here and `supernet` in the next recipes, or `Supernet` in Python.

    bits : the mean width of codes that the sub-model may have, weighted by weights. Scale and offset of a group come on top:
        32 / group_size bits with 16-bit ones.
    size : instead, bytes that all tensors of the model may take, numbers that are not quantised with 2 bytes each.
    choices : widths to choose from, 2 to 8 bits each.
    unit : what has a width of its own: a block or a single linear.
    group_size : inputs that share a step, an offset and an input of the adapter; the last group may be shorter. -1: the whole row.
    scale_dtype : dtype of stored steps and offsets.
    steps : training steps; 0: none, GPTQ at mixed widths with fitted offsets.
    period : steps of a whole sweep of the mean width, 2 or more; null: 0.8 of the steps.
    loss : to train and to score with. teacher: the KL divergence from the dense model's next-token distribution (our default: adapters of
        different widths then move towards one and the same model), for which that stays in memory too; text, the paper's: the next token's.
    lr : AdamW's learning rate for adapters of 2 bits; those of b bits learn at 3 / (2^b - 1) of it, as the step of a grid shrinks. It falls
        to 0 along a cosine. (Ours; the paper's is one constant rate.)
    r : rank of the adapters, at most the number of groups; null: 16, or the number of groups where that is less.
    lora_alpha : adapters count lora_alpha / r.
    batch_size : windows in a training step.
    max_seq_length : tokens of a window used in a training step.
    gradient_checkpointing : keep only block inputs for the backward pass and compute the rest again; the same result in less memory.
    validation : share of the calibration windows kept from training, by which configurations are scored.
    samples : configurations to score before the search.
    solver : samples, the paper's: the best of 50 more in a space narrowed by the scores; ilp (our default): then the best proposals of an
        additive model of the scores, solved exactly.
    supernet : file of a supernet to use: nothing is trained, and the options that made it must be the same.
    keep_supernet : file to keep the trained supernet in.
    targets : linears to treat: a class name, a dotted name or its end, or "re:<regex>".
    ignore : linears to leave dense, in the same form.

    Raises BlockwrightError before anything is computed for options out of range, a budget below the smallest sub-model, a rank above the
    number of groups, and a model that is not dense, shares weights between linears or has none to treat; for a file of a supernet that is
    of other options or damaged; later for values that are not finite, by name.
    Source: arXiv 2405.20202. Ours: the law of the widths given their mean (of the largest entropy), the fit of the offsets, the teacher,
    the rates and the solver.
    """
    _check(bits=bits, choices=choices, steps=steps, period=period, loss=loss, lr=lr, validation=validation)
    widths = tuple(sorted(set(choices)))
    made = Made(widths, unit, group_size, scale_dtype, r, lora_alpha)
    names = treated(run.model, targets, ignore)
    _check_rank(made, names)
    costs = Costs.of(run.model, names, made)
    costs.budget(None if size is not None else bits, size)
    feed, held_out = _split(run, batch_size, max_seq_length, validation)
    teacher = run.entered.build(device=run.device, dtype=torch.float32) if loss == "teacher" else None
    if supernet is not None:
        net = Supernet.load(supernet, run.model, made=made, names=list(names), device=run.device)
    else:
        net = quantised(run, made, targets, ignore)
        train(run, net, feed, steps=steps, period=period, teacher=teacher, lr=lr, checkpointing=gradient_checkpointing)
    if keep_supernet is not None:
        net.save(keep_supernet)

    score = net.scorer(*held_out, teacher=teacher, batch=run.batch)
    rng = torch.Generator().manual_seed(run.generator("search").initial_seed())
    seen = survey(score, len(net.units), widths, rng, num=samples, progress=run.progress)
    sizes, limit = costs.budget(None if size is not None else bits, size)
    found = search(score, seen, sizes, limit, widths, rng, solver=solver)
    run.progress(
        f"{run.stage}: {net.costs.mean_bits(found):.3f} bits a code, {net.costs.stored_bits(found):.3f} with scales and offsets, widths "
        + " ".join(map(str, found)),
        1,
        1,
    )
    net.write(run, found)


def plan(*, block_parameters: int, tokens: int, **options: Any) -> dict[str, Any]:
    """What a run costs: fp32 copies of a block in memory, passes over the calibration text, bits of a stored weight.

    resident : fp32 copies of the whole chain in memory, activations included. With `size`, bits are those of the largest width.
    Raises BlockwrightError for options out of range.
    """
    _check(**{name: options[name] for name in ("bits", "choices", "steps", "period", "loss", "lr", "validation")})
    group, step = options["group_size"], options["batch_size"] * options["max_seq_length"]
    steps = 0 if options["supernet"] is not None else options["steps"]
    taught = int(options["loss"] == "teacher")
    again = int(options["gradient_checkpointing"]) + taught
    saved = kept_for_backward(block_parameters, step, checkpointing=options["gradient_checkpointing"])
    scored = (1 + taught) * (options["samples"] + MORE) * options["validation"]
    code = max(options["choices"]) if options["size"] is not None else min(options["bits"], max(options["choices"]))
    return {
        "copies": 8,
        "passes": 2 + (2 + again) * steps * step / max(tokens, 1) + scored,
        "bits": code + (16 * DTYPES[options["scale_dtype"]].itemsize / group if group > 0 else 0),
        "resident": 1 + taught + len(set(options["choices"])) / 4 + (saved if steps else 0),
    }


# widths of the units, and how they are drawn


def mean_width(step: int, widths: Sequence[int], period: int) -> float:
    """The mean width that a training step aims at: a triangular wave from the largest width to the smallest, at period / 2, and back."""
    low, high = widths[0], widths[-1]
    return low + (high - low) * abs(2 * (step % period) / period - 1)


# the supernet


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
            made_of[name] = _super_linear(model.get_submodule(name), tensors, theirs)
        return cls(blueprint, model, made_of, theirs)


def units_of(linears: Iterable[str], unit: str, path: str) -> list[tuple[str, ...]]:
    """Full names of the linears of each unit; path: of the chain of blocks."""
    found: dict[str, list[str]] = {}
    for name in linears:
        key = name if unit == "linear" else name.removeprefix(path + ".").partition(".")[0]
        found.setdefault(key, []).append(name)
    return [tuple(names) for names in found.values()]


# making it


def quantised(run: Run, made: Made, targets: Targets = ["Linear"], ignore: Targets = []) -> Supernet:
    """The supernet of a run's model, rounded by GPTQ and not trained. The run's model is left at the largest width.

    One pass: in each block all widths are rounded by the Gram matrix of the inputs, which come from the blocks before at the largest width.
    """

    def visit(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> Facts:
        assert x is not None
        linears = block.linears(targets, ignore)
        seen = block.observe(x, Gram, linears) if linears else {}
        facts: Facts = {}
        for name, linear in linears.items():
            for bits in made.widths:
                w, gram = layers.matrix(linear).float(), seen[name].sum
                codes, alpha, beta = rounded(w, gram, bits=bits, made=made)
                beta = fitted(w, gram, codes, alpha, beta, bits=bits, group_size=made.group_size)
                key = f"{name}.b{bits}"
                facts |= {f"{key}.q": tiles.pack(codes, bits), f"{key}.alpha": alpha, f"{key}.beta": beta}
            block.swap(name, OffsetLinear.of(linear, codes, alpha, beta, bits=bits, group_size=made.group_size))  # the largest width
        return facts

    facts = {key: value for found in run.blocks(visit, inputs="treated", write=True) for key, value in found.items()}
    model = run.model.build(device=run.device, dtype=torch.float32)
    names = list(dict.fromkeys(key.rsplit(".", 2)[0] for key in facts))
    linears = {}
    for name in names:
        tensors = {key.removeprefix(name + "."): value.to(run.device) for key, value in facts.items() if key.rsplit(".", 2)[0] == name}
        linears[name] = _super_linear(model.get_submodule(name), tensors, made)
        for bits in made.widths:
            linears[name].width(bits).start(run.generator("adapter", name, bits))
    return Supernet(run.model, model, linears, made)


def rounded(
    w_NK: Float[Tensor, "N K"], gram_KK: Float[Tensor, "K K"], *, bits: int, made: Made
) -> tuple[Int8[Tensor, "N K"], Float[Tensor, "N G"], Float[Tensor, "N G"]]:
    """Codes by GPTQ, inputs in their order, on a min/max grid; steps, in the dtype to store; and offsets, the weight of the lowest code."""
    alpha, zero = tiles.asymmetric_grid(w_NK, bits=bits, group_size=made.group_size, dtype=DTYPES[made.scale_dtype])
    codes = gptq(w_NK, gram_KK, alpha, zero, bits=bits, group_size=made.group_size, reorder=False)
    return codes, alpha, -alpha.float() * (zero.float() + 2 ** (bits - 1))


def fitted(
    w_NK: Float[Tensor, "N K"],
    gram_KK: Float[Tensor, "K K"],
    codes_NK: Int8[Tensor, "N K"],
    alpha_NG: Float[Tensor, "N G"],
    beta_NG: Float[Tensor, "N G"],
    *,
    bits: int,
    group_size: int,
) -> Float[Tensor, "N G"]:
    """The offsets with the least error of the outputs for these codes and steps: where the adapters start, as they learn offsets too.

    Least squares on the sums of the groups of inputs, in fp64; how far offsets move is damped by RIDGE of the mean square of such a sum.
    """

    def pooled(t: Float[Tensor, "M K"]) -> Float[Tensor, "M G"]:
        return tiles.grouped(t, group_size).sum(-1)

    error = (w_NK - from_offset(codes_NK, alpha_NG, beta_NG, bits=bits, group_size=group_size)).double()
    of_group = pooled(gram_KK.double())
    among_groups = pooled(of_group.T.contiguous())
    mean = among_groups.diagonal().mean()
    if mean == 0:  # inputs that were always 0
        return beta_NG
    among_groups.diagonal().add_(RIDGE * mean)
    return beta_NG + torch.linalg.solve(among_groups, (error @ of_group).T).T.float()


def train(
    run: Run,
    net: Supernet,
    feed: Feed,
    *,
    steps: int,
    period: int | None = None,
    lr: float = 3e-4,
    teacher: nn.Module | None = None,
    checkpointing: bool = False,
) -> None:
    """Train the adapters of a supernet, one configuration a step. The same seed draws the same configurations on all ranks of a job.

    teacher : the model whose next-token distributions are learned; None: the text itself.
    """
    # Adam's steps do not shrink with the gradient, and what an adapter has to mend shrinks with the step of its grid
    rate = {b: lr * 3 / (2**b - 1) for b in net.made.widths}
    groups = [{"params": [p.requires_grad_() for p in net.adapters(b)], "lr": rate[b]} for b in net.made.widths]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    chain(net.model, checkpointing=checkpointing)
    whole, widths = period or max(2, round(PERIOD * steps)), net.made.widths

    def loss(i: int, rng: torch.Generator) -> Tensor:
        net.activate(draw(rng, len(net.units), widths, mean_width(i, widths, whole)))
        return loss_of(net.model, teacher, *feed.draw(rng))

    def before(i: int) -> None:
        for group, peak in zip(optimizer.param_groups, rate.values(), strict=True):
            group["lr"] = peak * cosine(i, steps)

    if steps:
        run.curves["supernet: loss"] = run.train(loss, optimizer, steps=steps, before=before)
    for p in net.adapters():
        p.requires_grad_(False)
        p.grad = None


def loss_of(model: nn.Module, teacher: nn.Module | None, ids: Int[Tensor, "b T"], mask: Int[Tensor, "b T"] | None) -> Float[Tensor, ""]:
    """Mean KL divergence of the next-token distribution from the teacher's, or without one the loss of the next token; in nats, in fp32."""
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    if teacher is None:
        return next_token_loss(logits, ids, mask)
    with torch.no_grad():
        wanted = teacher(ids, attention_mask=mask, use_cache=False).logits
    return mean_of_real(kl_of_tokens(wanted, logits), mask)


def _super_linear(replaced: nn.Module, tensors: Mapping[str, Tensor], made: Made) -> SuperLinear:
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


# options


def treated(model: Blueprint, targets: Targets, ignore: Targets) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the targeted linears of the chain. Raises BlockwrightError for a model that cannot be treated, and for none."""
    form = next(((name, f["form"]) for name, f in model.forms.items() if f["form"] != "linear"), None)
    if form:
        raise BlockwrightError(
            f"quantllm-ofa: {form[0]} is {form[1].replace('_', ' ')}", allowed="a dense model", do="Put quantllm-ofa before that stage"
        )
    skeleton = model.skeleton()
    if skeleton.get_output_embeddings() is None:
        raise BlockwrightError(f"quantllm-ofa: {type(skeleton).__name__} predicts no next token", allowed="a causal language model")
    linears = layers.block_linears(skeleton)
    names = {name: layers.size(m) for name, m in layers.targeted(linears, targets, ignore).items()}
    path = layers.chain_path(skeleton) + "."
    stacked = [(n, p) for n, p in skeleton.named_parameters() if n.startswith(path) and p.dim() > 2]
    if stacked:
        name, p = stacked[0]
        raise BlockwrightError(
            f"quantllm-ofa: {name} {list(p.shape)} is a stack of matrices", allowed="blocks whose matrices are linears (nn.Linear, Conv1D)"
        )
    if not names:
        raise BlockwrightError(
            f"quantllm-ofa: targets={targets} with ignore={ignore} name no linear",
            allowed="a class name, a dotted name or its end, or re:<regex>",
            do=f"The last linear is {list(linears)[-1]}" if linears else "This model has no dense linear in its blocks",
        )
    first: dict[Place, str] = {}
    for name in names:
        other = first.setdefault(model.tensors[f"{name}.weight"], name)
        if other != name:
            raise BlockwrightError(
                f"quantllm-ofa: {other} and {name} are one tensor, which cannot have two widths",
                do="Use a model whose blocks share nothing, or ignore these linears",
            )
    return names


def _split(run: Run, batch_size: int, length: int, share: float) -> tuple[Feed, tuple[Tensor, Tensor | None]]:
    """Training batches, and the windows that they never hold: the last of the calibration text."""
    feed = Feed(run, batch_size, length)
    held = max(1, round(share * len(feed.ids)))
    if len(feed.ids) <= held:
        raise BlockwrightError(
            f"quantllm-ofa: validation={share} of {len(feed.ids)} windows",
            allowed="text for training and for validation",
            do="Give more text",
        )
    kept = feed.ids[-held:], None if feed.mask is None else feed.mask[-held:]
    feed.ids, feed.mask = feed.ids[:-held], None if feed.mask is None else feed.mask[:-held]
    return feed, kept


def _check_rank(made: Made, sizes: Mapping[str, tuple[int, int]]) -> None:
    for name, (_, k) in sizes.items():
        groups = tiles.num_groups(k, made.group_size)
        if made.r is not None and made.r > groups:
            raise BlockwrightError(
                f"quantllm-ofa: r={made.r} for {name}, whose {k} inputs make {groups} groups",
                allowed=f"up to {groups}",
                do="Lower r or group_size; null takes what fits",
            )


def _check(*, bits: float, choices: Sequence[int], steps: int, period: int | None, loss: str, lr: float, validation: float) -> None:
    if loss not in ("teacher", "text"):
        raise BlockwrightError(f"quantllm-ofa: loss={loss!r}", allowed="teacher, text")
    if not choices or any(not 2 <= b <= 8 for b in choices):
        raise BlockwrightError(f"quantllm-ofa: choices={list(choices)}", allowed="one or more widths of 2 to 8 bits", do="Try [2, 3, 4]")
    if not bits > 0:
        raise BlockwrightError(f"quantllm-ofa: bits={bits}", allowed="a mean width above 0", do="Try bits=3.0")
    if period is not None and period < 2:
        raise BlockwrightError(f"quantllm-ofa: period={period}", allowed="2 or more steps", do="Leave it null: 0.8 of the steps")
    if steps < 0:
        raise BlockwrightError(f"quantllm-ofa: steps={steps}", allowed="0 or more", do="Try steps=600")
    if not 0 < lr < math.inf:
        raise BlockwrightError(f"quantllm-ofa: lr={lr}", allowed="a positive number", do="Try lr=0.0003")
    if not 0 <= validation < 1:
        raise BlockwrightError(f"quantllm-ofa: validation={validation}", allowed="0 <= validation < 1", do="Try validation=0.2")
