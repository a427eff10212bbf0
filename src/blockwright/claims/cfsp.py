"""The claim of CFSP, arXiv 2409.13199: importance of blocks and of channels cuts feed-forward layers better than earlier scores, for speed.

On a CPU all of it is measured on SmolLM2; on a GPU the time of large layers, at widths that are multiples of 64 and at one that is not.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from blockwright import meter, zoo
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.run import Facts, Run
from blockwright.claims.runner import Claim, Measured, Plot
from blockwright.compress import cfsp as method

PAPER = "better than earlier structured pruning at 20 to 50 % of the feed-forward channels; about 1.5 times as fast at 50 %"
SHARES = (0.2, 0.3)  # of the channels that are cut
CALIBRATIONS = 3  # disjoint texts
STEPS, BATCH, LENGTH = 20, 2, 64  # of the recovery
RANK = 2  # scarce: that is where it matters how ranks are shared out


def claim(*, seed: int = 0, device: str = "cpu") -> Claim:
    """SmolLM2-135M cut in several ways on the same text, recovered, and timed; on cuda, the time of large layers cut in half."""
    return _time_of_large_layers(seed) if device == "cuda" else _perplexities(seed)


# CPU


def _perplexities(seed: int) -> Claim:
    model, tokenizer = zoo.smollm2(off_grid=True), zoo.tokenizer()
    texts = zoo.windows("pydoc", "calibration", num=32 * CALIBRATIONS, length=256, tokenizer=tokenizer).chunk(CALIBRATIONS)
    evaluation = zoo.windows("pydoc", "evaluation", num=6, length=256, tokenizer=tokenizer)
    dense = Blueprint.of_module(model)
    heard = [method.measure(Run(dense, calibration=ids, seed=seed), method.find_ffns(dense)) for ids in texts]
    rows: list[dict[str, Any]] = [{"cut": 0.0, "by": "dense", "calibration": None, "perplexity": meter.perplexity(model, evaluation)}]

    def perplexity(made: nn.Module, **row: Any) -> float:
        size = sum(p.numel() for p in made.parameters()) / sum(p.numel() for p in model.parameters())
        rows.append(row | {"perplexity": meter.perplexity(made, evaluation), "share of parameters": size})
        return rows[-1]["perplexity"]

    def cut(share: float, by: str, text: int = 0, score: Any = method.channel_scores, **options: Any) -> float:
        made = _cut(model, texts[text], heard[text], score, sparsity=share, **options)
        return perplexity(made, cut=share, by=by, calibration=text)

    even: dict[str, Any] = {"block_importance": "constant"}
    magnitude = {p: cut(p, "magnitude, even", score=lambda out, into, norm, **_: out.norm(dim=0), **even) for p in SHARES}
    wanda = {p: [cut(p, "Wanda, even (Wanda-SP)", **even)] for p in SHARES}
    ours = {p: [cut(p, "Wanda, by block (our default)")] for p in SHARES}
    for text in range(1, CALIBRATIONS):
        wanda[0.3].append(cut(0.3, "Wanda, even (Wanda-SP)", text, **even))
        ours[0.3].append(cut(0.3, "Wanda, by block (our default)", text))
    paper = cut(0.3, "the paper's score, by block", channel_importance="three_w_one_wa")
    paper_even = cut(0.3, "the paper's score, even", channel_importance="three_w_one_wa", **even)

    recover: dict[str, Any] = {"recovery_steps": STEPS, "recovery_lr": 1e-3, "r": RANK, "batch_size": BATCH, "max_seq_length": LENGTH}
    recovered = {}
    for ranks in ("importance", "uniform"):
        made = _cut(model, torch.cat(texts), heard[0], method.channel_scores, sparsity=0.3, seed=seed, ranks=ranks, **recover)
        recovered[ranks] = perplexity(made, cut=0.3, by=f"our default, recovered, ranks: {ranks}", calibration=0)

    by_block = [a / b for a, b in zip(ours[0.3], wanda[0.3], strict=True)]
    prefill, decode = (_faster(model, tokens, seed) for tokens in (256, 1))
    ratio: dict[str, Any] = {"unit": "ratio of perplexities", "better": "lower", "baseline": 1.0}
    return Claim(
        paper=PAPER,
        name=f"30 % cut: shares by block over even shares, mean of {CALIBRATIONS} texts",
        measured=statistics.fmean(by_block),
        target=0.98,
        spread=(min(by_block), max(by_block)),
        **ratio,
        parts=[
            *_over("Wanda-SP", ours, {p: values[0] for p, values in wanda.items()}, 1.0),
            *_over("magnitude", ours, magnitude, 0.9),
            Measured(
                name="30 % cut, the paper's score: shares by block over even shares", measured=paper / paper_even, target=0.98, **ratio
            ),
            Measured(
                name="recovery: ranks by block over even ranks",
                measured=recovered["importance"] / recovered["uniform"],
                target=1.0,
                **ratio,
            ),
            Measured(
                name="half the channels: speed of a feed-forward layer, 256 tokens",
                measured=prefill.median,
                target=1.7,
                unit="times",
                better="higher",
                baseline=1.0,
                spread=(prefill.low, prefill.high),
            ),
        ],
        rows=rows,
        plot=Plot(
            kind="bar",
            title="SmolLM2-135M with fewer feed-forward channels",
            x="",
            y="perplexity",
            series={
                "Wanda-SP": [(f"{p:.0%}", wanda[p][0]) for p in SHARES],
                "by block": [(f"{p:.0%}", ours[p][0]) for p in SHARES],
                "by block, recovered": [("30%", recovered["importance"])],
            },
        ),
        notes=[
            "32 x 256 tokens of calibration, 6 x 256 of evaluation, disjoint",
            "The paper's own score ranks channels by activation norm alone, whatever the weights; by block, at 30 %, it is at "
            f"{paper / wanda[0.3][0]:.3f} of Wanda-SP, so Wanda's score is our default",
            "Magnitude removes the few channels of small weights that carry massive activations, and with them the model",
            f"Recovery: {STEPS} steps of {BATCH} x {LENGTH} tokens from all {CALIBRATIONS} texts, rank {RANK}, take {ours[0.3][0]:.2f} to "
            f"{recovered['importance']:.2f}; with rank 4 the two ways of sharing it out do not differ",
            f"One token at a time half the channels are {decode.median:.2f} times as fast",
        ],
    )


def _over(rival: str, ours: dict[float, list[float]], theirs: dict[float, float], target: float) -> list[Measured]:
    return [
        Measured(
            name=f"{p:.0%} cut: over {rival}",
            measured=ours[p][0] / theirs[p],
            target=target,
            unit="ratio of perplexities",
            better="lower",
            baseline=1.0,
        )
        for p in SHARES
    ]


def _cut(
    model: nn.Module,
    calibration: Int[Tensor, "n T"],
    heard: Sequence[Facts],
    score: Callable[..., Tensor],
    *,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """The model cut by these options and this score of channels; what its blocks do was heard before."""
    even = options.get("block_importance") == "constant"
    facts = [f | ({"importance": 1.0} if even else {}) for f in heard]
    with mock.patch.object(method, "measure", lambda *_: facts), mock.patch.object(method, "channel_scores", score):
        stage: Any = method.cfsp
        made: nn.Module = stage(model, calibration=calibration, seed=seed, **options)
    return made


@torch.no_grad()
def _faster(model: Any, tokens: int, seed: int) -> meter.Spread:
    """How many times as fast the middle block's feed-forward layer is with half its channels."""
    ffn = model.model.layers[len(model.model.layers) // 2].mlp
    half = _narrower(ffn, ffn.down_proj.in_features // 2)
    x = torch.randn(1, tokens, ffn.down_proj.out_features, generator=torch.Generator().manual_seed(seed))
    return meter.ratio(lambda: ffn(x), lambda: half(x), repeats=15)


def _narrower(ffn: Any, width: int) -> Any:
    """A gated feed-forward layer with its first channels only."""
    made = copy.deepcopy(ffn)
    keep = torch.arange(width, device=ffn.down_proj.weight.device)
    made.gate_proj, made.up_proj = (method.narrower(linear, rows=keep) for linear in (ffn.gate_proj, ffn.up_proj))
    made.down_proj = method.narrower(ffn.down_proj, columns=keep)
    return made


# GPU


def _time_of_large_layers(
    seed: int, *, device: str = "cuda", width: int = 4096, channels: int = 14336, tokens: int = 2048, repeats: int = 15
) -> Claim:
    """A feed-forward layer and a whole block of an 8B Llama in bf16, with half their channels, at `tokens` tokens and at one."""
    rng = torch.Generator(device).manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=channels, num_attention_heads=32, num_key_value_heads=8, attn_implementation="sdpa"
    )
    with torch.device(device):
        block = LlamaDecoderLayer(config, 0).to(torch.bfloat16).eval().requires_grad_(False)
        rotary = LlamaRotaryEmbedding(config)

    def run(ffn: nn.Module, x: Float[Tensor, "1 T d"]) -> None:
        ffn(x)

    @torch.no_grad()
    def run_block(ffn: nn.Module, x: Float[Tensor, "1 T d"]) -> None:
        block.mlp = ffn
        block(x, position_embeddings=rotary(x, torch.arange(x.shape[1], device=device)[None]))

    dense, half = block.mlp, channels // 2
    layers = {f"{w} channels": _narrower(dense, w) for w in (half, half - 64, half - 1)}
    rows: list[dict[str, Any]] = []

    def faster(what: Callable[..., None], name: str, count: int) -> meter.Spread:
        x = torch.randn(1, count, width, device=device, generator=rng).to(torch.bfloat16)
        spread = meter.ratio(partial(what, dense, x), partial(what, layers[name], x), repeats=repeats)
        rows.append({"of": "block" if what is run_block else "feed-forward", "cut to": name, "tokens": count, "times": spread.median})
        return spread

    found = [faster(run, name, count) for count in (tokens, 1) for name in layers]
    whole = [faster(run_block, f"{half} channels", count) for count in (tokens, 1)]
    return Claim(
        paper=PAPER,
        name=f"half the channels: speed of a feed-forward layer, {tokens} tokens",
        measured=found[0].median,
        target=1.85,
        unit="times",
        better="higher",
        baseline=1.0,
        spread=(found[0].low, found[0].high),
        parts=[
            Measured(
                name=f"half the channels: speed of a block, {tokens} tokens",
                measured=whole[0].median,
                target=1.4,
                unit="times",
                better="higher",
                baseline=1.0,
                spread=(whole[0].low, whole[0].high),
            ),
            Measured(
                name=f"control: one channel fewer, {half - 1}: speed of a feed-forward layer",
                measured=found[2].median,
                target=1.0,
                unit="times",
                better="lower",
                baseline=1.0,
                spread=(found[2].low, found[2].high),
            ),
        ],
        rows=rows,
        plot=Plot(
            kind="bar",
            title="Half the channels, or one fewer",
            x="",
            y="times as fast as uncut",
            series={
                f"{count} tokens": [(r["cut to"], r["times"]) for r in rows if r["of"] == "feed-forward" and r["tokens"] == count]
                for count in (tokens, 1)
            },
        ),
        notes=[
            f"bf16, width {width}, {channels} channels; random weights",
            "Widths that are no multiple of 64 miss the fast matrix kernels",
        ],
    )
