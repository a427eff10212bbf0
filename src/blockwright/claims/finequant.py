"""The claim of FineQuant, arXiv 2308.09723: int4 weights decode up to 3.65x faster, and the group size keeps them from collapsing.

On a CPU the second half is measured, on SmolLM2; on a GPU the first, by the kernels against 16-bit products and torch's own int4 product.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright import meter, zoo
from blockwright.blocks import tiles
from blockwright.blocks.packed import PackedLinear
from blockwright.claims.runner import Claim, Measured, Plot, numbers
from blockwright.compress import finequant as fq

PAPER = "up to 3.65x throughput on the same number of GPUs with minimal loss (OPT-175B); a group size per matrix keeps int4 from collapsing"


def claim(*, seed: int = 0, device: str = "cpu") -> Claim:
    """On cpu: perplexity of SmolLM2 by group size, clean and with planted outliers. On cuda: time of products and of decoding."""
    return _quality(seed) if device == "cpu" else _speed(seed)


# quality: SmolLM2 off its own 4-bit grid, 16 windows of 256 tokens

PLANTINGS = 3  # of outliers


def _quality(seed: int) -> Claim:
    ids = zoo.windows("pydoc", "evaluation", num=16, length=256, tokenizer=zoo.tokenizer())
    model = zoo.smollm2(off_grid=True)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    clean = {n: m.weight.detach().clone() for n, m in linears.items()}
    rng = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []

    def measure(form: str, weights: dict[str, Tensor], kept: dict[str, Tensor] | None = None, planting: int = 0, **options: Any) -> Any:
        """Perplexity with `weights`, quantised where there are options; `kept` replaces weights that differ from it afterwards.

        planting : its number, 0 for none; where there is one, on half of the windows.
        """
        bits = 0
        for name, linear in linears.items():
            linear.weight.data, size = _restored(weights[name], **options) if options else (weights[name], 0)
            bits += size
            if kept is not None:
                linear.weight.data = torch.where(kept[name] == weights[name], linear.weight.data, kept[name])
        total = sum(w.numel() for w in weights.values())
        row = {"form": form, "planting": planting or None, "bits": bits / total if bits else 32.0}
        rows.append(row | {"perplexity": meter.perplexity(model, ids[: len(ids) // 2] if planting else ids, batch=8)})
        return rows[-1]

    dense = measure("dense", clean)
    channel, fixed, ours = (measure(f"int4 {g}", clean, bits=4, group_size=g) for g in (-1, 64, "adaptive"))
    eight = measure("int8 -1", clean, bits=8, group_size=-1)
    ratios = []  # adaptive over outliers stored apart, of each planting
    for i in range(1, PLANTINGS + 1):
        planted = _planted(clean, rng)
        ours_p = measure("int4 adaptive", planted, planting=i, bits=4, group_size="adaptive")
        apart_p = measure("int4 adaptive, outliers apart", clean, planted, planting=i, bits=4, group_size="adaptive")
        ratios.append(ours_p["perplexity"] / apart_p["perplexity"])
    dense_p = measure("dense", planted, planting=PLANTINGS)
    channel_p = measure("int4 -1", planted, planting=PLANTINGS, bits=4, group_size=-1)
    base = dense["perplexity"]
    gap = {r["form"]: r["perplexity"] - base for r in (channel, fixed, ours, eight)}
    collapse, kept, apart = (r["perplexity"] / dense_p["perplexity"] for r in (channel_p, ours_p, apart_p))
    return Claim(
        paper=PAPER,
        name="loss of adaptive int4 over that of int4 per channel",
        measured=gap["int4 adaptive"] / gap["int4 -1"],
        target=0.6,
        unit="of the perplexity gap to dense",
        better="lower",
        baseline=1.0,
        parts=[
            _part("adaptive, scales included", ours["bits"], 4.5, "bits a weight", baseline=4.25),
            _part("loss of adaptive over that of groups of 64", gap["int4 adaptive"] / gap["int4 64"], 1.0, "of the gap", baseline=1.0),
            _part("scale bytes of adaptive over groups of 64", (ours["bits"] - 4) / (fixed["bits"] - 4), 1.0, "of the bytes", baseline=1.0),
            _part("int8 per channel", 100 * gap["int8 -1"] / base, 0.5, "% above dense"),
            _part("with outliers, int4 per channel collapses", collapse, 2.0, "x dense", better="higher"),
            Measured(
                name="with outliers, adaptive",
                measured=statistics.geometric_mean(ratios),
                target=1.05,
                unit="x outliers stored apart",
                better="lower",
                baseline=collapse / apart,
                spread=(min(ratios), max(ratios)),
            ),
        ],
        rows=rows,
        plot=Plot(
            kind="bar",
            title="SmolLM2 with int4 weights, clean and with planted outliers",
            x="group size",
            y="perplexity",
            series={
                label: [(name, r["perplexity"]) for name, r in zip(("dense", "per channel", "adaptive"), some, strict=True)]
                for label, some in (("clean", (dense, channel, ours)), ("outliers", (dense_p, channel_p, ours_p)))
            },
            log=True,
        ),
        notes=[
            "SmolLM2-135M off its own 4-bit grid, 16 windows of 256 tokens of held-out text; the 210 linears of the blocks are quantised",
            "outliers: in each matrix, one weight of 5 % of the outputs is multiplied by 30; "
            f"mean over {PLANTINGS} plantings, 8 of the windows each",
            f"adaptive is {ours['perplexity'] / base:.3f} x dense without outliers, {kept:.3f} x with them: the planted model is more "
            f"sensitive to all rounding; where the outliers themselves cost nothing (stored apart) it is still {apart:.3f} x",
        ],
    )


def _part(name: str, measured: float, target: float, unit: str, *, better: Any = "lower", baseline: float | None = None) -> Measured:
    return Measured(name=name, measured=measured, target=target, unit=unit, better=better, baseline=baseline)


def _planted(weights: dict[str, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
    """In 5 % of the outputs of each matrix, one weight times 30."""
    out = {}
    for name, w in weights.items():
        rows = torch.randperm(len(w), generator=rng)[: max(1, len(w) // 20)]
        columns = torch.randint(0, w.shape[1], (len(rows),), generator=rng)
        out[name] = w.clone()
        out[name][rows, columns] *= 30
    return out


def _restored(w: Tensor, *, bits: int, group_size: Any) -> tuple[Tensor, int]:
    """A matrix quantised and made dense again, and the bits that it took."""
    size = fq.choose_group_size(w) if group_size == "adaptive" else group_size
    codes, scale = fq.quantize(w, bits=bits, group_size=size)
    return tiles.from_codes(codes, scale, group_size=size), bits * codes.numel() + 16 * scale.numel()


# speed: bf16 activations, weights in turn from more memory than the cache holds, launches in a CUDA graph

SHAPES = [(4096, 14336), (14336, 4096), (8192, 28672), (8192, 8192)]  # inputs, outputs
DECODING = [(4096, 6144), (4096, 4096), (4096, 28672)]  # with 14336 x 4096, the matrices of a layer
ROWS = (1, 4, 16, 64, 256, 2048)


def _speed(seed: int) -> Claim:
    from blockwright.compress import finequant_triton as kernels

    torch.manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for k, n in SHAPES:
        rows += [*_products(kernels, k, n, 4, ROWS), *_products(kernels, k, n, 8, (1, 16))]
    for k, n in DECODING:
        rows += _products(kernels, k, n, 4, (1, 16))
    decoding = [_decoding(batch) for batch in (1, 16)]

    def least(name: str, target: float, m: tuple[int, ...], shapes: list[tuple[int, int]], bits: int = 4, key: str = "speedup") -> Measured:
        found = [r[key] for r in rows if r["bits"] == bits and r["rows"] in m and (r["inputs"], r["outputs"]) in shapes]
        unit = "x bf16" if key == "speedup" else "x torch._weight_int4pack_mm"
        return _part(name, min(found), target, unit, better="higher", baseline=1.0)

    large, square = SHAPES[:3], [SHAPES[0], SHAPES[3]]
    first = least("int4 g64, 1 row, slowest of 3 shapes", 2.2, (1,), large)
    return Claim(
        **numbers(first),
        paper=PAPER,
        parts=[
            least("1 row, slowest of 3 shapes", 1.0, (1,), large, key="over_torch_int4"),
            least("16 rows, slowest of 3 shapes", 2.2, (16,), large),
            least("64 rows, slowest of 3 shapes", 1.7, (64,), large),
            least("256 rows, slowest of 3 shapes", 1.0, (256,), large),
            least("2048 rows, slowest of 3 shapes", 0.85, (2048,), large),
            least("int8, 1 and 16 rows, slowest of 3 shapes", 1.5, (1, 16), large, bits=8),
            least("1, 4, 16 rows of 4096 x 14336 and 8192 x 8192", 2.5, (1, 4, 16), square),
            least("any number of rows of these", 1.0, ROWS, square),
            *(
                _part(f"decoding, batch {d['batch']}", d["speedup"], 2.0, "x bf16 tokens/s", better="higher", baseline=1.0)
                for d in decoding
            ),
        ],
        rows=[*rows, *decoding],
        plot=Plot(
            kind="line",
            title="int4 weights, groups of 64: time of bf16 over ours",
            x="rows",
            y="x bf16",
            series={
                f"{k} x {n}": [(r["rows"], r["speedup"]) for r in rows if (r["inputs"], r["outputs"], r["bits"]) == (k, n, 4)]
                for k, n in SHAPES
            },
            target=1.0,
        ),
        notes=[
            f"{torch.cuda.get_device_name()}, bf16; weights taken in turn from {meter.COLD_BYTES >> 20} MB and more: none is in the cache",
            "each product was first compared with fp64; the cut of a product is the fastest of a few, the same for all its runs",
            "decoding: 24 layers (4096, 32 heads, 8 of keys and values, 14336), random weights, 256 tokens of context, one CUDA graph",
        ],
    )


def _products(kernels: Any, k: int, n: int, bits: int, all_rows: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row for each number of rows of x: microseconds of ours, of bf16 and (4 bits) of torch's int4 product."""
    w = torch.randn(n, k, device="cuda") / k**0.5
    codes, scale = fq.quantize(w, bits=bits, group_size=64)
    restored = tiles.from_codes(codes, scale, group_size=64)
    ours = meter.cold_copies(kernels.prepare(codes, scale, bits=bits, group_size=64), n * k * bits // 8)
    dense = meter.cold_copies(w.bfloat16(), 2 * n * k)
    peer = meter.cold_copies(_torch_int4(codes, scale), n * k // 2) if bits == 4 else []
    del w, codes
    rows = []
    for m in all_rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        want = x.double() @ restored.double().T
        times = {}
        microseconds = partial(meter.graph_microseconds, number=120 if m <= 64 else 24)
        for cut in _cuts(kernels, m):
            try:
                got = kernels.multiply(x, ours[0], None, cut)
            except Exception as error:  # a cut that does not fit into this GPU's shared memory
                print(f"{m} x {k} x {n}, {cut}: {type(error).__name__}")
                continue
            wrong = float((got.double() - want).abs().max() / want.abs().max())
            assert wrong <= 1e-2 and torch.equal(got, kernels.multiply(x, ours[0], None, cut)), f"{cut}: off by {wrong}"
            times[cut] = microseconds([partial(kernels.multiply, x, weight, None, cut) for weight in ours])
        best = min(times, key=lambda c: times[c])
        kernels.TUNED[next((r for r in kernels.ROWS if m <= r), m), n, k, bits] = best
        bf16 = microseconds([partial(F.linear, x, weight) for weight in dense])
        off = float((kernels.multiply(x, ours[0], None, best).double() - want).norm() / want.norm())
        row = {"bits": bits, "inputs": k, "outputs": n, "rows": m, "us": times[best], "bf16_us": bf16, "speedup": bf16 / times[best]}
        if peer:
            torch_us = microseconds([partial(torch._weight_int4pack_mm, x, words, 64, scales) for words, scales in peer])
            row |= {"torch_int4_us": torch_us, "over_torch_int4": torch_us / times[best]}
        rows.append(row | {"error": off, "cut": str(best)})
        print(rows[-1], {str(c): round(times[c], 1) for c in sorted(times, key=lambda c: times[c])[1:4]}, flush=True)
    return rows


def _cuts(kernels: Any, m: int) -> list[Any]:
    """The cuts that are tried for m rows."""
    cut = kernels.Cut
    if m <= 16:
        return [
            cut(16, n, split, 4, stages, sums)
            for n in (64, 128)
            for split in (1, 2, 4, 8)
            for stages, sums in ((4, True), (6, True), (6, False))
        ]
    if m <= 64:
        return [cut(64, n, split, warps, 4, False) for n, warps in ((64, 4), (128, 4), (128, 8)) for split in (1, 2, 4)]
    fused = [cut(128, 128, 1, 8, 3, False), cut(128, 128, 1, 8, 4, False), cut(128, 64, 1, 4, 4, False), cut(256, 128, 1, 8, 3, False)]
    fused += [cut(128, 128, 2, 8, 4, False), cut(256, 64, 1, 4, 3, False)]
    return [*fused, *(size << 20 for size in (12, 24, 48, 1024))]


def _torch_int4(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same weights as torch._weight_int4pack_mm takes them: w = (code + 8 - 8) * scale + 0."""
    unsigned = (codes + 8).to(torch.uint8)
    words = torch._convert_weight_to_int4pack(unsigned[:, ::2] << 4 | unsigned[:, 1::2], 8)
    return words, torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()


class _Layer(nn.Module):
    """One step of decoding in a Llama-shaped layer; `linear(k, n)` makes its four matrices."""

    def __init__(self, linear: Callable[[int, int], nn.Module], batch: int) -> None:
        super().__init__()
        self.qkv, self.out = linear(4096, 6144), linear(4096, 4096)
        self.up, self.down = linear(4096, 28672), linear(14336, 4096)
        self.keys, self.values = (torch.randn(batch, 8, 256, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(F.rms_norm(x, (4096,))).view(len(x), 48, 1, 128).split((32, 8, 8), dim=1)
        self.keys[:, :, -1:], self.values[:, :, -1:] = k, v
        x = x + self.out(F.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=True).reshape(len(x), 4096))
        gate, up = self.up(F.rms_norm(x, (4096,))).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


@torch.no_grad()
def _decoding(batch: int) -> dict[str, Any]:
    """Tokens a second of a stack of 24 layers, one token a step for each of `batch` sequences: int4 and bf16."""

    def dense(k: int, n: int) -> nn.Module:
        return nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)

    def int4(k: int, n: int) -> nn.Module:
        linear = dense(k, n)
        codes, scale = fq.quantize(linear.weight, group_size=64)
        return fq.accelerate(nn.Sequential(PackedLinear.of(linear, codes, scale, bits=4, group_size=64)))

    speed = {}
    for name, linear in (("int4", int4), ("bf16", dense)):
        torch.manual_seed(0)
        stack = nn.Sequential(*(_Layer(linear, batch) for _ in range(24)))
        x = torch.randn(batch, 4096, device="cuda", dtype=torch.bfloat16)
        assert bool(torch.isfinite(stack(x)).all())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stack(x)
        speed[name] = batch / meter.time(graph.replay, repeats=9, warmup=3).median
        del stack, graph
        torch.cuda.empty_cache()
    row = {"batch": batch, "tokens_per_second": speed["int4"], "bf16_tokens_per_second": speed["bf16"]}
    print(row, flush=True)
    return row | {"speedup": speed["int4"] / speed["bf16"]}
