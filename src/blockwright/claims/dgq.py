"""The claim of DGQ, arXiv 2310.04836: 4-bit weights that expand exactly to int8 lose hardly more than 4-bit weights with float scales.

On a CPU that is measured, on SmolLM2; on a GPU the kernels are timed against bf16, torch's int8 product and our own A16W4 kernel.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright import meter, zoo
from blockwright.blocks import dual_grained, tiles
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.run import Run
from blockwright.blocks.stream import Block, Gram
from blockwright.claims.runner import Claim, Measured, Plot, numbers
from blockwright.compress import dgq as method
from blockwright.compress import finequant

PAPER = "1.12x less memory and 3.24x speed over an A16W4 implementation, with better accuracy than A8W4 methods before it"
DEPTH = 12  # the blocks that are quantised, from the first; the rest stay dense
ABLATED = 4  # so many of them in ablations
GROUP = 64  # 576 and 1536 inputs are multiples of 64, not of 128
DOCUMENTATION, CODE, SOME = "documentation", "source code", "the first half of the documentation"
SPEED = "x speed of dense fp32"
Weights = Callable[[Tensor, Tensor], Tensor]  # (weights, Gram matrix of their inputs) -> the weights rounded and restored


def claim(*, seed: int = 0, device: str = "cpu") -> Claim:
    """On cpu: loss of SmolLM2 with its first blocks in A8W4 by several ways. On cuda: time of products."""
    return _quality(seed) if device == "cpu" else _speed(seed)


# quality: SmolLM2 off its own 4-bit grid


def _quality(seed: int) -> Claim:
    model, tokenizer = zoo.smollm2(off_grid=True), zoo.tokenizer()
    calibration = zoo.windows("pydoc", "calibration", num=16, length=256, tokenizer=tokenizer)
    texts = {
        DOCUMENTATION: zoo.windows("pydoc", "evaluation", num=16, length=256, tokenizer=tokenizer),
        CODE: zoo.windows("python-source", "evaluation", num=6, length=256, tokenizer=tokenizer),
    }
    texts[SOME] = texts[DOCUMENTATION][:8]
    dense = {name: meter.perplexity(model, ids) for name, ids in texts.items()}
    dense_blocks = list(model.model.layers)
    first, few = (zoo.first_blocks(model, depth)[0] for depth in (DEPTH, ABLATED))
    rows: list[dict[str, Any]] = []

    def gaps(form: str, blocks: Any, names: tuple[str, ...] = (DOCUMENTATION,)) -> dict[str, float]:
        """How far the perplexities are above the dense model's where these blocks stand in place of the first ones."""
        model.model.layers = nn.ModuleList([*blocks, *dense_blocks[len(blocks) :]])
        found = {name: meter.perplexity(model, texts[name]) - dense[name] for name in names}
        rows.append({"form": form, "blocks": len(blocks)} | {f"gap on {name}": gap for name, gap in found.items()})
        return found

    stage: Any = partial(method.dgq, calibration=calibration, group_size=GROUP, seed=seed)  # type: ignore[call-arg]
    treated = stage(first).model.layers
    kept = [m for m in treated.modules() if isinstance(m, dual_grained.DualGrainedLinear)]
    bits = sum(8 * b.numel() * b.element_size() for m in kept for b in m.buffers()) / sum(m.in_features * m.out_features for m in kept)
    speed = {threads: _decoding(treated[0], threads) for threads in (1, 2)}
    both = (DOCUMENTATION, CODE)
    ours = gaps("DGQ", treated, both)
    official = gaps("DGQ, official range", stage(first, act_range="min_of_max").model.layers)
    fine = gaps("phase 1 alone, A16W4", _rounded(first, calibration, _phase_one).model.layers, both)
    naive = gaps("round to nearest, A8W4", _naive(first, calibration).model.layers)
    ours_few = gaps("DGQ", treated[:ABLATED], (SOME,))  # later blocks change nothing in earlier ones
    rough = gaps("DGQ without smoothing", stage(few, smooth=False).model.layers, (SOME,))
    with mock.patch.object(method, "coarse_scale", _no_search):
        once = gaps("DGQ without phase 2", stage(few).model.layers, (SOME,))

    def part(name: str, measured: float, target: float, unit: str = "x perplexity gap to dense", *, better: Any = "lower") -> Measured:
        return Measured(name=name, measured=measured, target=target, unit=unit, better=better, baseline=1.0)

    headline = part("loss of A8W4 over that of phase 1 alone with 16-bit activations", ours[DOCUMENTATION] / fine[DOCUMENTATION], 1.25)
    return Claim(
        **numbers(headline),
        paper=PAPER,
        parts=[
            part("the same on source code, unlike the calibration text", ours[CODE] / fine[CODE], 1.25),
            part("the same with the official range of activations", official[DOCUMENTATION] / fine[DOCUMENTATION], 1.25),
            part("loss over that of A8W4 by rounding to nearest", ours[DOCUMENTATION] / naive[DOCUMENTATION], 0.7),
            part("without smoothing, over ours", rough[SOME] / ours_few[SOME], 1.0, better="higher"),
            part("without phase 2, over ours", once[SOME] / ours_few[SOME], 1.0, better="higher"),
            part("bits a weight over A16W4 with fp16 scales and zeros", bits / (4 + 32 / GROUP), 0.95, "x bits"),
            *(
                part(
                    f"a block's linears for one token, {threads} {'core' if threads == 1 else 'cores'}", times, 1.0, SPEED, better="higher"
                )
                for threads, times in speed.items()
            ),
        ],
        rows=rows,
        plot=Plot(
            kind="bar",
            title=f"SmolLM2, first {DEPTH} blocks in 4-bit weights",
            x="form",
            y="perplexity gap to dense",
            series={
                name: [(row["form"], row[f"gap on {name}"]) for row in rows if row["blocks"] == DEPTH and f"gap on {name}" in row]
                for name in both
            },
        ),
        notes=[
            f"SmolLM2-135M off its own 4-bit grid, all linears of its first {DEPTH} blocks in groups of {GROUP}; the rest stays dense",
            f"Without smoothing and without phase 2: the first {ABLATED} blocks, on half of the documentation, for all that is compared",
            "16 x 256 tokens of documentation for calibration and 16 x 256 for evaluation; 6 x 256 tokens of source code",
            "Phase 1 alone: 4-bit weights with the searched float scales, activations as they are",
            "Round to nearest: float group scales from minimum and maximum, one activation scale a linear from the largest input",
            f"Dense perplexities: {dense[DOCUMENTATION]:.2f} and {dense[CODE]:.2f}. DGQ stores {bits:.3f} bits a weight",
            "The targets on source code, of the ablations, of bits and of one token are our own",
        ],
    )


def _rounded(model: Any, calibration: Tensor, restored: Weights) -> Any:
    """The model with every linear of its blocks rounded, block by block, by inputs from the blocks rounded before."""

    def visit(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> None:
        assert x is not None
        linears = block.linears()
        same = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # linears that read what another one reads
        grams = block.observe(x, Gram, [n for n in linears if n.rpartition(".")[2] not in same])
        for name, linear in linears.items():
            parent, _, last = name.rpartition(".")
            linear.weight.data = restored(linear.weight.data, grams[f"{parent}.{same.get(last, last)}"].sum)  # type: ignore[union-attr,operator]

    run = Run(Blueprint.of_module(model), calibration=calibration)
    run.blocks(visit, inputs="treated", write=True)
    return run.model.build()


def _phase_one(w: Tensor, gram: Tensor) -> Tensor:
    scale, zero = method.fine_scales(w, gram, group_size=GROUP)
    scale = torch.where(scale > 0, scale, 1)
    return _to_grid(w, scale, (zero - 8).to(torch.int8))


def _to_grid(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return tiles.from_codes(tiles.to_codes(w, scale, zero, bits=4, group_size=GROUP), scale, zero, group_size=GROUP)


class _Naive(nn.Module):
    """A linear with weights rounded to nearest and inputs rounded to int8 by their largest number in the calibration text."""

    def __init__(self, linear: nn.Linear, largest: float) -> None:
        super().__init__()
        self.weight = _to_grid(linear.weight.data, *tiles.asymmetric_grid(linear.weight.data, bits=4, group_size=GROUP))
        self.step = largest / 127

    def forward(self, x: Tensor) -> Tensor:
        return F.linear((x / self.step).round().clamp(-127, 127) * self.step, self.weight)


def _naive(model: Any, calibration: Tensor) -> Any:
    """The model with A8W4 linears by rounding to nearest: nothing is searched, nothing smoothed."""
    model = copy.deepcopy(model)
    largest: dict[str, float] = {}

    def see(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            largest[name] = max(largest.get(name, 0.0), float(args[0].abs().max()))

        return hook

    linears = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}
    handles = [m.register_forward_pre_hook(see(n)) for n, m in linears.items()]
    with torch.no_grad():
        for ids in calibration.split(4):
            model.model(ids)
    for handle in handles:
        handle.remove()
    for name, linear in linears.items():
        model.model.layers.set_submodule(name, _Naive(linear, largest[name]))
    return model


def _no_search(w: Tensor, gram: Tensor, fine: Tensor, zero: Tensor, **options: Any) -> Tensor:
    """Channel scales from the largest weight: group scales are rounded once."""
    return w.abs().amax(1) / 127


@torch.no_grad()
def _decoding(block: nn.Module, threads: int) -> float:
    """How many times faster than dense fp32 the linears of a block run for one token."""
    kept = [m for m in block.modules() if isinstance(m, dual_grained.DualGrainedLinear)]
    dense = [nn.Linear(m.in_features, m.out_features, bias=False) for m in kept]
    inputs = [torch.randn(1, m.in_features) for m in kept]
    fast = [dual_grained.Int8Linear(m) for m in kept]

    def run(linears: list[Any]) -> None:
        for linear, x in zip(linears, inputs, strict=True):
            linear(x)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return meter.ratio(lambda: run(dense), lambda: run(fast), repeats=51, warmup=5).median
    finally:
        torch.set_num_threads(before)


# speed: weights in turn from more memory than the cache holds, launches in a CUDA graph

DEVICE = "cuda"
SHAPES = [(4096, 14336), (8192, 28672)]  # inputs, outputs
ROWS = (16, 32, 64, 256, 2048)


def _speed(seed: int) -> Claim:
    torch.manual_seed(seed)
    rows = [row for k, n in SHAPES for row in _products(k, n, ROWS)]

    def least(name: str, over: str, target: float, m: tuple[int, ...]) -> Measured:
        found = min(row[over] for row in rows if row["rows"] in m)
        return Measured(name=name, measured=found, target=target, unit=over.replace("_", " "), better="higher", baseline=1.0)

    first = least("16 to 64 rows, slowest of 2 shapes", "x_bf16", 2.2, (16, 32, 64))
    return Claim(
        **numbers(first),
        paper=PAPER,
        parts=[
            least("16 to 64 rows, slowest", "x_int_mm", 1.25, (16, 32, 64)),
            least("256 rows, slowest", "x_bf16", 1.0, (256,)),
            least("2048 rows, slowest", "x_int_mm", 0.9, (2048,)),
            least("256 and 2048 rows, slowest", "x_our_a16w4", 1.3, (256, 2048)),
        ],
        rows=rows,
        plot=Plot(
            kind="line",
            title="A8W4: time of bf16 over ours",
            x="rows",
            y="x bf16",
            series={f"{k} x {n}": [(r["rows"], r["x_bf16"]) for r in rows if (r["inputs"], r["outputs"]) == (k, n)] for k, n in SHAPES},
            target=1.0,
        ),
        notes=[
            f"groups of 128, bf16 activations; weights taken in turn from {meter.COLD_BYTES >> 20} MB and more, none of it in the cache",
            "ours rounds the activations, multiplies and scales; torch._int_mm is timed alone, on activations that are int8 already",
            "each product was first compared with fp64; the cut of a product is the fastest of a few",
        ],
    )


def _products(k: int, n: int, all_rows: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row for each number of rows of x: microseconds of ours, bf16, torch._int_mm and our A16W4 kernel."""
    from blockwright.compress import dgq_triton, finequant_triton

    w = torch.randn(n, k, device=DEVICE) / k**0.5
    weight = _random_grains(w)
    w8 = dual_grained.expand(weight.codes, weight.zero, weight.group_scale, group_size=128)
    restored = w8.double() * weight.channel_scale.double()[:, None]
    ours = meter.cold_copies(dgq_triton.prepare(weight, group_size=128), n * k // 2)
    dense, eight = meter.cold_copies(w.bfloat16(), 2 * n * k), meter.cold_copies(w8, n * k)
    codes, scale = finequant.quantize(w, group_size=128)
    wide = meter.cold_copies(finequant_triton.prepare(codes, scale, bits=4, group_size=128), n * k // 2)
    rows = []
    for m in all_rows:
        x = torch.randn(m, k, device=DEVICE).to(torch.bfloat16 if DEVICE == "cuda" else torch.float16)
        amax = x.abs().max().bfloat16().float()
        x8 = dual_grained.to_int8(x, amax)
        want = (x8.double() * (amax.double() / 127)) @ restored.T
        times: dict[Any, float] = {}
        microseconds = partial(meter.graph_microseconds, number=120 if m <= 64 else 24)
        for cut in _cuts(dgq_triton.Cut, m):
            try:
                got = dgq_triton.multiply(x, ours[0], amax, None, cut) if cut else _expand_first(x, ours[0], amax)
            except Exception as error:  # a cut that does not fit into this GPU's shared memory
                print(f"{m} x {k} x {n}, {cut}: {type(error).__name__}")
                continue
            wrong = float((got.double() - want).abs().max() / want.abs().max())
            assert wrong <= 1e-2, f"{cut}: off by {wrong}"
            product = partial(dgq_triton.multiply, x, amax=amax, cut=cut) if cut else partial(_expand_first, x, amax=amax)
            times[cut] = microseconds([partial(product, weight=each) for each in ours])
        best = min(times, key=lambda c: times[c])
        row = {
            "inputs": k,
            "outputs": n,
            "rows": m,
            "us": times[best],
            "bf16_us": microseconds([partial(F.linear, x, each.to(x.dtype)) for each in dense]),
            "int_mm_us": microseconds([partial(dual_grained.int8_product, x8, each) for each in eight]),
            "our_a16w4_us": microseconds([partial(finequant_triton.multiply, x, each) for each in wide]),
        }
        rows.append(row | {f"x_{name}": row[f"{name}_us"] / row["us"] for name in ("bf16", "int_mm", "our_a16w4")} | {"cut": str(best)})
        print(rows[-1], flush=True)
    return rows


def _random_grains(w: Tensor) -> dual_grained.DualGrained:
    """w on both grids without a search, which would take longer than all products."""
    fine, zero = tiles.asymmetric_grid(w, bits=4, group_size=128)
    scale = w.abs().amax(1) / 110
    group_scale = (fine / scale[:, None]).round().clamp(1, 127)
    most = torch.floor(127 / group_scale)
    codes = (w.view(len(w), -1, 128) / (scale[:, None] * group_scale)[..., None]).round()
    codes = codes.clamp(-most[..., None], most[..., None]) + zero[..., None]
    return dual_grained.DualGrained(codes.clamp(-8, 7).flatten(1).to(torch.int8), zero, group_scale.to(torch.int8), scale)


def _expand_first(x: Tensor, weight: Any, amax: Tensor) -> Tensor:
    from blockwright.compress import dgq_triton

    with mock.patch.dict(dgq_triton.TUNED, {(len(x), weight.n, weight.k): None}):
        return dgq_triton.multiply(x, weight, amax)


def _cuts(cut: Any, m: int) -> list[Any]:
    """The cuts that are tried for m rows; None: expand first."""
    if m <= 64:
        rows = 16 if m <= 16 else 32 if m <= 32 else 64
        return [cut(rows, n, split, 4, stages) for n in (64, 128) for split in (1, 2, 4, 8) for stages in (3, 5)]
    return [cut(128, 128, 1, 8, 3), cut(128, 128, 1, 8, 4), cut(64, 128, 1, 8, 4), cut(128, 64, 1, 4, 4), None]
