"""The claim of foldgpt, arXiv 2407.00928: gates choose the blocks to delete better than block influence; sharing beats deletion."""

import itertools
import statistics
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from blockwright import meter, zoo
from blockwright.blocks import layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.run import Run
from blockwright.claims.runner import Claim, Measured, Plot
from blockwright.claims.small_model import texts, trained
from blockwright.compress.foldgpt import foldgpt

PAPER = "learned gates, shared blocks and a short cure beat earlier depth compression at equal size"
UNIT = "ratio of perplexities"


def claim(*, seed: int = 0, device: str = "cpu") -> Claim:
    """On a CPU an 8-block model trained here, folded in four ways; on a GPU SmolLM2, 30 blocks made 24 that share the weights of 13."""
    if device == "cpu":
        return _small(seed)
    windows = partial(zoo.windows, length=512, tokenizer=zoo.tokenizer())
    calibration = windows("python-source", "calibration", num=1024).to(device)
    near, far = (windows(text, "evaluation", num=32).to(device) for text in ("python-source", "pydoc"))
    return _large(zoo.smollm2().to(device), calibration, near, far, gate_steps=100, cure_steps=150, batch_size=16, new_tokens=32, seed=seed)


# CPU


def _small(seed: int, *, num: int = 64, steps: int = 300, gate_steps: int = 100, cure_steps: int = 60) -> Claim:
    train, calibration, _, evaluation = texts(num)
    model = trained(train, layers=8, steps=steps, seed=seed)
    dense = Blueprint.of_module(model)

    def value(blueprint: Blueprint) -> float:
        return meter.perplexity(blueprint.build(), evaluation, batch=64)

    choose = partial(_chosen, model, calibration, seed=seed, gate_steps=gate_steps, batch_size=8)
    kept = {"gates": choose(2), "influence": choose(2, ranking="influence")}
    found = {"dense": value(dense)} | {name: value(dense.with_layers(keep)) for name, keep in kept.items()}
    found["random, mean of 8"] = statistics.fmean(value(dense.with_layers(keep)) for keep in _drawn(8, 2, 8, seed))

    all_pairs = [[0, *rest] for rest in itertools.combinations(range(1, 8), 5)]  # what stays
    best = min(all_pairs, key=lambda keep: meter.perplexity(dense.with_layers(keep).build(), evaluation[:num], batch=64))
    bound = found["the best of all 21 pairs"] = value(dense.with_layers(best))

    cure = partial(_folded, model, calibration, seed=seed, cure_steps=cure_steps, norm_lr=1e-2, r=16, lora_alpha=32, batch_size=4)
    six = partial(cure, kept["gates"], group_size=3, parent="mean", cure_lr=3e-3)
    shared = six()
    cured = {
        "dense": value(cure(list(range(8)), cure_lr=3e-3)),
        "shared": value(shared),
        "shared, no tail": value(six(tail_weight=0.0)),
        "deleted": value(cure(choose(4), cure_lr=1e-2)),
    }
    size = _stack(shared) / _stack(dense)
    first = _part("2 of 8 blocks deleted: gates over block influence", found["gates"] / found["influence"], 0.95)
    return Claim(
        **first,
        paper=PAPER,
        parts=[
            Measured(**_part("2 of 8 blocks deleted: gates over random blocks", found["gates"] / found["random, mean of 8"], 0.5)),
            Measured(**_part("shared and cured: with over without tail distillation", cured["shared"] / cured["shared, no tail"], 0.99)),
            Measured(**_part("cured: 6 blocks that share, over 4 plain ones of that size", cured["shared"] / cured["deleted"], 1.0)),
        ],
        rows=[
            *({"model": name, "deleted": _shown(kept.get(name), 8), "cured": False, "perplexity": v} for name, v in found.items()),
            *({"model": name, "deleted": "", "cured": True, "perplexity": v} for name, v in cured.items()),
        ],
        plot=Plot(
            kind="bar",
            title="8 blocks made fewer",
            x="",
            y="perplexity of a byte",
            series={"not cured": list(found.items()), "cured": list(cured.items())},
        ),
        notes=[
            f"Llama of 8 blocks, width 128, trained here for {steps} steps on bytes of the Python language reference; disjoint evaluation",
            f"The best of all 21 pairs of blocks, by evaluation: {bound / found['influence']:.3f} of block influence, "
            f"{bound / found['random, mean of 8']:.3f} of random blocks; less cannot be reached, for in so small a model no block is idle",
            f"Sharing: 6 blocks, chosen by gates, on the weights of 3, with adapters of rank 16: {size:.1%} of the stack; 4 blocks: 50.0%",
            f"All are cured for {cure_steps} steps of 4 x 128 bytes with LoRA of that rank, merged where nothing is shared",
            "Rates, of 3e-3 and 1e-2 the better on text kept for that: 3e-3 for the blocks that share, 1e-2 for the 4 blocks",
        ],
    )


# GPU


def _large(
    model: Any,
    calibration: Int[Tensor, "n T"],
    near: Int[Tensor, "a T"],
    far: Int[Tensor, "b T"],
    *,
    gate_steps: int,
    cure_steps: int,
    batch_size: int,
    new_tokens: int,
    seed: int,
) -> Claim:
    """A fifth of the blocks gone, the rest in pairs on one block's weights, cured; near is text of the calibration's kind, far is not."""
    dense, device, length = Blueprint.of_module(model), model.device, calibration.shape[1]
    total = layers.num_blocks(dense.config)
    gone = round(0.2 * total)
    with _tf32():
        options = {"seed": seed, "batch_size": batch_size, "max_seq_length": length}
        choose: Any = partial(_chosen, model, calibration, gate_steps=gate_steps, **options)
        kept = {"gates": choose(gone), "influence": choose(gone, ranking="influence")}
        cure: Any = partial(_folded, model, calibration, cure_steps=cure_steps, cure_lr=1e-3, norm_lr=1e-3, r=7, lora_alpha=14, **options)
        tied: dict[str, Any] = {"group_size": 2, "parent": "mean"}
        made = {
            "dense": dense,
            "deleted, by gates": dense.with_layers(kept["gates"]),
            "deleted, by influence": dense.with_layers(kept["influence"]),
            "shared": _folded(model, calibration, kept["gates"], **tied, seed=seed),
            "shared, cured": cure(kept["gates"], **tied),
            "dense, cured": cure(list(range(total))),
        }
        size = {name: _stack(blueprint) / _stack(dense) for name, blueprint in made.items()}
        rows: list[dict[str, Any]] = []
        for name, blueprint in made.items():
            built = blueprint.build(device=device)
            values = {kind: meter.perplexity(built, ids, batch=16) for kind, ids in (("near", near), ("far", far))}
            deleted = _shown(kept.get(name.removeprefix("deleted, by ")), total)
            rows.append({"model": name, "deleted": deleted, "share of the block stack": size[name], **values})
    perplexity = {row["model"]: row["near"] for row in rows}

    decode = {
        name: partial(_decode, made[name].build(device=device, dtype=torch.bfloat16).to(device), near[:1, :16], new_tokens)
        for name in ("dense", "deleted, by gates", "shared", "shared, cured")
    }
    faster = meter.ratio(decode["dense"], decode["deleted, by gates"], repeats=5)
    slower = meter.ratio(decode["shared"], decode["deleted, by gates"], repeats=5)
    adapted = meter.ratio(decode["shared, cured"], decode["deleted, by gates"], repeats=5)
    return Claim(
        **_part(
            f"{gone} of {total} blocks deleted, the rest in pairs, cured, over dense",
            perplexity["shared, cured"] / perplexity["dense"],
            2.0,
        ),
        paper=PAPER,
        parts=[
            Measured(
                **_part(
                    f"{gone} of {total} blocks deleted, not cured: gates over block influence",
                    perplexity["deleted, by gates"] / perplexity["deleted, by influence"],
                    0.95,
                )
            ),
            Measured(**_part("share of the block stack's parameters, adapters included", size["shared, cured"], 0.45) | {"unit": "share"}),
            Measured(
                name="deleted: decoding speed over dense",
                measured=faster.median,
                target=1.2,
                unit="times",
                better="higher",
                baseline=1.0,
                spread=(faster.low, faster.high),
            ),
            Measured(
                name="shared, without adapters: time of a token over deleted alone",
                measured=slower.median,
                target=1.03,
                unit="times",
                better="lower",
                baseline=1.0,
                spread=(slower.low, slower.high),
            ),
        ],
        rows=rows,
        plot=Plot(
            kind="bar",
            title=f"{total} blocks made fewer",
            x="",
            y="perplexity, text of the calibration's kind",
            series={"": list(perplexity.items())},
            log=True,
        ),
        notes=[
            f"Gates: {gate_steps} steps; cure: {cure_steps} steps; both of {batch_size} x {length} tokens; disjoint evaluation",
            f"Over the dense model cured alike: {perplexity['shared, cured'] / perplexity['dense, cured']:.2f}",
            f"With its adapters apart, the cured model takes {adapted.median:.2f} times as long for a token as the deleted one",
        ],
    )


@torch.no_grad()
def _decode(model: Any, ids: Int[Tensor, "1 T"], new_tokens: int) -> None:
    model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)


class _tf32:
    """Matrix products on TF32 units inside: three times as fast, for all sides alike."""

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")

    def __exit__(self, *exc: object) -> None:
        torch.set_float32_matmul_precision(self.before)


# both


def _chosen(model: Any, calibration: Int[Tensor, "n T"], count: int, *, seed: int, **options: Any) -> list[int]:
    """The blocks that stay when `count` go."""
    run = Run(Blueprint.of_module(model), calibration=calibration, seed=seed, device=model.device)
    foldgpt(run, remove=count / layers.num_blocks(model.config), **options)
    return list(run.model.origin)


def _folded(model: Any, calibration: Int[Tensor, "n T"], keep: list[int], *, seed: int, **options: Any) -> Blueprint:
    """The blocks `keep`, shared and cured as the options say; the teacher is the whole model."""
    run = Run(Blueprint.of_module(model), calibration=calibration, seed=seed, device=model.device)
    run.model = run.model.with_layers(keep)
    foldgpt(run, remove=0.0, **options)
    return run.model


def _drawn(num_blocks: int, count: int, num: int, seed: int) -> list[list[int]]:
    """What stays of the blocks when `count`, none of them the first, are drawn at random; `num` draws."""
    rng = torch.Generator().manual_seed(seed)
    draws = [set((1 + torch.randperm(num_blocks - 1, generator=rng)[:count]).tolist()) for _ in range(num)]
    return [[i for i in range(num_blocks) if i not in gone] for gone in draws]


def _stack(blueprint: Blueprint) -> int:
    """Parameters of the chain of blocks, a shared one counted once."""
    chain: nn.Module = blueprint.build().get_submodule(layers.chain_path(blueprint.skeleton()))
    return sum(p.numel() for p in chain.parameters())


def _part(name: str, measured: float, target: float) -> dict[str, Any]:
    return {"name": name, "measured": measured, "target": target, "unit": UNIT, "better": "lower", "baseline": 1.0}


def _shown(keep: list[int] | None, total: int) -> str:
    """The numbers of the blocks that went."""
    return "" if keep is None else " ".join(str(i) for i in range(total) if i not in keep)
