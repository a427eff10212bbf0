"""The claim of lpvit, arXiv 2407.02068: at equal multiplications, curves say how much each layer can lose: against the strongest way to
share a budget, one list of the tiles of all layers ranked by distortion, and against weaker ones.

On a GPU products of the shapes of DeiT-B and of a large language model, and a whole DeiT-B of random weights, are timed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from blockwright import meter
from blockwright.blocks.block_sparse import BlockSparseLinear, multiplications
from blockwright.claims.runner import Claim, Measured, Plot
from blockwright.compress import lpvit as method
from blockwright.errors import BlockwrightError

INSTALL = "pip install 'blockwright[vision]'"
PAPER = "DeiT-B runs up to 3.93x faster on dedicated hardware and 1.79x on GPUs at little loss of accuracy"
FIRST, SEEDS, TRAINED, CALIBRATION, EPOCHS, BATCH, RATE = 3, 3, 1297, 500, 20, 64, 2e-3  # seeds below FIRST chose the options of all sides
TILE = [8, 8]
SIDES: dict[str, dict[str, Any]] = {
    "curves": {},
    "curves, one mean gradient": {"fisher": "mean"},
    "global, distortion": {"allocation": "global", "ranking": "distortion"},
    "global, |weight gradient|": {"allocation": "global"},
    "global, |weight|": {"allocation": "global", "ranking": "l1"},
    "uniform, |weight gradient|": {"allocation": "uniform"},
    "uniform, |weight|": {"allocation": "uniform", "ranking": "l1"},
}
STRONGEST = "global, distortion"
SHARES = {"50 %": 0.5, "30 %": 0.7}  # of the multiplications that stay, and that go
RIVALS = [  # side, share of multiplications, points of accuracy that curves must be above it
    (STRONGEST, "50 %", 0.0),
    ("global, |weight gradient|", "30 %", 0.0),
    ("global, |weight gradient|", "50 %", 0.0),
    ("global, |weight|", "30 %", 0.0),
    ("uniform, |weight|", "30 %", 3.0),
]
PRODUCTS = [  # outputs, inputs, rows, tile, sparsity, least speed against dense
    (3072, 768, 12608, 64, 0.75, 1.3),
    (14336, 4096, 4096, 64, 0.75, 1.5),
    (3072, 768, 12608, 64, 0.5, 1.0),
    (3072, 768, 12608, 32, 0.75, 0.9),
]
CALLS = 20  # of a product, timed together


def claim(*, seed: int = 0, device: str = "cpu") -> Claim:
    """Small transformers on handwritten digits, pruned in several ways at equal multiplications; on cuda, speed of products and DeiT-B."""
    return _speed(seed) if device == "cuda" else _accuracy(seed)


def _accuracy(seed: int) -> Claim:
    with _one_thread():
        found = [_one_seed(seed + FIRST + i) for i in range(SEEDS)]

    def mean(key: str) -> float:
        return sum(f[key] for f in found) / len(found)

    def above(rival: str, share: str) -> dict[str, Any]:
        """How many points `curves` lies above another side: mean, lowest and highest over seeds."""
        gains = [f[f"curves, {share}"] - f[f"{rival}, {share}"] for f in found]
        return {"measured": sum(gains) / len(gains), "spread": (min(gains), max(gains)), "unit": "points of accuracy", "better": "higher"}

    def moved(share: str) -> dict[str, Any]:
        """The mean square change of the logits by `curves`, as a share of that by the strongest rival."""
        ratios = [f[f"moved by curves, {share}"] / f[f"moved by {STRONGEST}, {share}"] for f in found]
        unit = f"of that by {STRONGEST}"
        return {"measured": sum(ratios) / len(ratios), "spread": (min(ratios), max(ratios)), "unit": unit, "better": "lower"}

    lost = [f["dense"] - f["tuned, 50 %"] for f in found]
    rows = [{"pruned by": "dense", **{f"accuracy at {share}": mean("dense") for share in SHARES}}]
    for side in [*SIDES, "at random"]:
        row: dict[str, Any] = {"pruned by": side, **{f"accuracy at {share}": mean(f"{side}, {share}") for share in SHARES}}
        rows.append(row | ({} if side == "at random" else {f"logits moved at {s}": mean(f"moved by {side}, {s}") for s in SHARES}))
    rows.append({"pruned by": "curves, 5 epochs", "accuracy at 50 %": mean("tuned, 50 %")})
    return Claim(
        paper=PAPER,
        name=f"above {STRONGEST}, the strongest rival, at 30 %",
        target=0.0,
        baseline=0.0,
        **above(STRONGEST, "30 %"),
        parts=[
            *(Measured(name=f"above {side} at {share}", target=target, **above(side, share)) for side, share, target in RIVALS),
            *(Measured(name=f"squared change of the logits at {share}", target=1.0, baseline=1.0, **moved(share)) for share in SHARES),
            Measured(
                name="lost at 50 % after 5 epochs",
                measured=sum(lost) / len(lost),
                target=1.0,
                unit="points of accuracy",
                better="lower",
                spread=(min(lost), max(lost)),
            ),
            Measured(
                name="control: random tiles, above chance by",
                measured=mean("at random, 30 %") - 10,
                target=20.0,
                unit="points of accuracy",
                better="lower",
            ),
        ],
        rows=rows,
        plot=Plot(
            kind="bar",
            title="Which tiles to keep: accuracy before fine-tuning",
            x="",
            y="accuracy, %",
            series={
                share: [(side.replace(", ", "\n"), mean(f"{side}, {share}")) for side in SIDES if side != "curves, one mean gradient"]
                for share in SHARES
            },
        ),
        notes=[
            f"{SEEDS} transformers (4 blocks, width 64, 17 tokens), each trained {EPOCHS} epochs on {TRAINED} of scikit-learn's digits, "
            "and judged on the other 500",
            f"Options of all sides (ranking, gradients, no power term) were chosen on seeds 0 to {FIRST - 1}; these are others",
            "Uniform shares, and |weight| without gradients, collapse; the rival that counts is one list of all tiles by distortion",
            f"Tiles of 8 x 8; gradients of {CALIBRATION} training digits; no side exceeds the budget, and the least that one uses is "
            f"{mean('least, 50 %'):.2%} and {mean('least, 30 %'):.2%} of the linears'",
            "Fine-tuning: 5 epochs on the calibration digits, with labels and the dense model's outputs; no augmentation",
            "Multiplications are those of the linears and the patch embedding; attention scores, never pruned, come on top",
        ],
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """So small a model is no faster with more threads, and far slower where other work keeps the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: images [1797, 1, 8, 8] in [-1, 1], and classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise BlockwrightError("claim lpvit: scikit-learn, which holds the digits, is not installed", do=f"Run: {INSTALL}") from None
    images, classes = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(classes)


def _one_seed(seed: int) -> dict[str, float]:
    """Accuracy, %, of the dense model and of every side, by its name and the share of multiplications."""
    images, classes = digits()
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    learn, judge = shuffled[:TRAINED], shuffled[TRAINED:]
    model = _trained(images[learn], classes[learn], seed)
    some, named = images[learn[:CALIBRATION]], classes[learn[:CALIBRATION]]
    stage: Any = method.lpvit
    prune: Any = partial(stage, model, calibration=some, seed=seed, block_size=TILE)

    @torch.no_grad()
    def accuracy(judged: nn.Module) -> float:
        return 100 * float((judged(images[judge]).logits.argmax(-1) == classes[judge]).float().mean())

    @torch.no_grad()
    def moved(judged: nn.Module) -> float:
        return float((judged(images[judge]).logits - model(images[judge]).logits).square().mean())

    found = {"dense": accuracy(model)}
    with _gradients_once():
        for share, amount in SHARES.items():
            pruned = {side: prune(amount=amount, **options) for side, options in SIDES.items()}
            found |= {f"{side}, {share}": accuracy(made) for side, made in pruned.items()}
            found |= {f"moved by {side}, {share}": moved(made) for side, made in pruned.items()}
            found[f"least, {share}"] = min(_share(made, some[:1]) for made in pruned.values())
            found[f"at random, {share}"] = accuracy(_at_random(pruned["uniform, |weight|"], model, seed))
        found["tuned, 50 %"] = accuracy(prune(amount=0.5, epochs=5, labels=named.tolist()))
    return found


@contextmanager
def _gradients_once() -> Iterator[None]:
    """Inside, the gradients of one model on the same data are computed once for all sides."""
    compute = method.statistics
    known: dict[str, list[method.TileSums]] = {}

    def once(*arguments: Any, fisher: Any, batch_size: int) -> list[method.TileSums]:
        if fisher not in known:
            known[fisher] = compute(*arguments, fisher=fisher, batch_size=batch_size)
        return known[fisher]

    with mock.patch.object(method, "statistics", once):
        yield


def _trained(images: Tensor, classes: Tensor, seed: int) -> PreTrainedModel:
    """A small vision transformer that has learned these images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ViTConfig(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=8, patch_size=2, num_channels=1,
            num_labels=10,
        )  # fmt: skip
        model = ViTForImageClassification(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
        steps = EPOCHS * -(-len(images) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(images)).split(BATCH):
                optimizer.zero_grad()
                cross_entropy(model(images[rows]).logits, classes[rows]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def _share(model: nn.Module, sample: Tensor) -> float:
    """Share of the multiplications of the pruned linears that is left."""
    counts = multiplications(model, sample).values()
    return sum(kept for kept, _ in counts) / sum(whole for _, whole in counts)


def _at_random(pruned: Any, dense: nn.Module, seed: int) -> nn.Module:
    """As many tiles of each linear as `pruned` keeps, taken at random from the dense model: what a ranking that knows nothing gives."""
    rng = torch.Generator().manual_seed(seed)
    for name, module in [(n, m) for n, m in pruned.named_modules() if isinstance(m, BlockSparseLinear)]:
        mask = module.mask()
        drawn = mask.flatten()[torch.randperm(mask.numel(), generator=rng)].view_as(mask)
        other = BlockSparseLinear.of(dense.get_submodule(name), drawn, module.tile)
        module.values, module.col, module.crow = other.values, other.col, other.crow
    return pruned


# on a GPU


def _speed(seed: int) -> Claim:
    rows = [products(n, k, m, tile, share, seed=seed) for n, k, m, tile, share, _ in PRODUCTS]
    targets = [least for *_, least in PRODUCTS]
    whole = whole_model(seed)
    parts = [
        Measured(name=str(row["product"]), measured=row["against dense"], target=least, unit="times dense", better="higher", baseline=1.0)
        for row, least in list(zip(rows, targets, strict=True))[1:]
    ]
    parts.append(
        Measured(
            name="least against torch's BSR",
            measured=min(row["against BSR"] for row in rows),
            target=1.2,
            unit="times torch BSR",
            better="higher",
            baseline=1.0,
        )
    )
    parts.append(
        Measured(
            name="error of bf16 against fp64",
            measured=max(row["error"] for row in rows),
            target=0.02,
            unit="of the largest",
            better="lower",
        )
    )
    parts.append(Measured(name="DeiT-B, 75 %", measured=whole["speed"], target=1.25, unit="times images/s", better="higher", baseline=1.0))
    if "energy" in whole:
        parts.append(
            Measured(name="DeiT-B, energy an image", measured=whole["energy"], target=0.8, unit="of dense", better="lower", baseline=1.0)
        )
    return Claim(
        paper=PAPER,
        name=str(rows[0]["product"]),
        measured=rows[0]["against dense"],
        target=targets[0],
        unit="times dense",
        better="higher",
        baseline=1.0,
        parts=parts,
        rows=rows,
        notes=[
            f"bf16, random tiles; median of 7 times {CALLS} calls, replayed as a CUDA graph (torch's BSR: called one by one)",
            "DeiT-B: transformers' ViT of that shape, random weights, batch 64, 64 x 64 tiles, 75 % of them pruned at random",
            "" if "energy" in whole else "Energy was not measured: pynvml is not installed",
        ],
    )


def products(
    n: int, k: int, m: int, tile: int, sparsity: float, *, seed: int = 0, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """One product by the kernel, dense and by torch's BSR: seconds, how many times faster, and the error against fp64."""
    from blockwright.compress import lpvit_triton

    rng = torch.Generator(device).manual_seed(seed)
    sparse, dense = _random(n, k, tile, sparsity, rng, device, dtype)
    x = torch.randn(m, k, device=device, dtype=dtype, generator=rng)
    bsr = dense.to_sparse_bsr((tile, tile))
    with torch.no_grad():
        want = x[:512].double() @ dense.double().T
        error = float((lpvit_triton.product(x[:512], sparse).double() - want).abs().max() / want.abs().max())
        seconds = {
            "kernel": _seconds(lambda: lpvit_triton.product(x, sparse), device),
            "dense": _seconds(lambda: linear(x, dense), device),
            "BSR": _seconds(lambda: linear(x, bsr), device, graph=False),
        }
    return {
        "product": f"{k} -> {n}, {m} rows, {tile} x {tile}, {sparsity:.0%} pruned",
        **{f"{name}, us": 1e6 * s for name, s in seconds.items()},
        "against dense": seconds["dense"] / seconds["kernel"],
        "against BSR": seconds["BSR"] / seconds["kernel"],
        "error": error,
    }


def _random(
    n: int, k: int, tile: int, sparsity: float, rng: torch.Generator, device: str, dtype: torch.dtype
) -> tuple[BlockSparseLinear, Tensor]:
    """A random linear of which this share of tiles is pruned at random, and its dense weight."""
    dense = nn.Linear(k, n, bias=False, device=device, dtype=dtype)
    dense.weight.data.normal_(generator=rng)
    grid = (-(-n // tile), -(-k // tile))
    places = torch.randperm(grid[0] * grid[1], generator=rng, device=device)
    keep = (places >= round(sparsity * len(places))).view(grid)
    sparse = BlockSparseLinear.of(dense, keep, (tile, tile))
    return sparse, sparse.dense().contiguous()


def _seconds(fn: Callable[[], Any], device: str, *, graph: bool = True) -> float:
    """Seconds of one call, from CALLS of them; as a CUDA graph, so that starting them does not count."""
    if device == "cuda" and graph:
        return meter.graph_microseconds([fn], number=CALLS) / 1e6
    calls = CALLS if device == "cuda" else 1
    return meter.time(lambda: [fn() for _ in range(calls)]).median / calls


def whole_model(seed: int, *, config: ViTConfig | None = None, batch: int = 64, device: str = "cuda") -> dict[str, float]:
    """How many times more images a second a model does with 75 % of its 64 x 64 tiles pruned, and its energy an image against dense."""
    config = ViTConfig() if config is None else config  # the default is the shape of DeiT-B
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dense, sparse = (ViTForImageClassification(config).to(device, dtype).eval().requires_grad_(False) for _ in range(2))
    rng = torch.Generator(device).manual_seed(seed)
    chain = sparse.vit.layers
    for name, module in [(n, m) for n, m in chain.named_modules() if isinstance(m, nn.Linear)]:
        made, _ = _random(module.out_features, module.in_features, 64, 0.75, rng, device, dtype)
        made.bias = module.bias
        parent, _, last = name.rpartition(".")
        setattr(chain.get_submodule(parent), last, made)
    method.accelerate(sparse)
    side = config.image_size
    x = torch.randn(batch, config.num_channels, side, side, device=device, dtype=dtype)
    runs: Sequence[Callable[[], Any]] = (partial(dense, x), partial(sparse, x))
    with torch.no_grad():
        seconds = [_seconds(run, device) for run in runs]
        found = {"speed": seconds[0] / seconds[1]}
        joules = [_joules(run) for run in runs] if device == "cuda" else [None]
    if all(j is not None for j in joules):
        found["energy"] = joules[1] / joules[0]  # type: ignore[operator]
    return found


def _joules(fn: Callable[[], Any], least: float = 5.0) -> float | None:
    """Energy of the GPU a call, from its own counter over `least` seconds; None without pynvml."""
    try:
        import pynvml
    except ImportError:
        return None
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    captured = torch.cuda.CUDAGraph()
    fn()
    with torch.cuda.graph(captured):
        fn()
    torch.cuda.synchronize()
    start, before, calls = time.perf_counter(), pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), 0
    while time.perf_counter() - start < least:
        for _ in range(CALLS):
            captured.replay()
        torch.cuda.synchronize()
        calls += CALLS
    return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1000 / calls
