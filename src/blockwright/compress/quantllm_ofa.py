"""Trains one supernet in which every block can run at 2, 3 or 4 bits, so that a model for any memory budget is taken out without training.

Use it when one model goes to many devices, at 2 to 4 bits, and there is text and time to train small adapters once. Not for a single budget
at 4 bits, where GPTQ or a learned rounding alone loses little, and not without text. What is taken out has no adapters left: they are
absorbed, exactly, into the offset of each group.

LLM-QFA (One QuantLLM for ALL), arXiv 2405.20202; the adapters are QA-LoRA's, arXiv 2309.14717. Re-measure its claim:
`blockwright reproduce quantllm-ofa`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from blockwright.blocks import layers, tiles
from blockwright.blocks.configurations import MORE, draw, search, survey
from blockwright.blocks.gptq import gptq
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.offset_packed import OffsetLinear, from_offset
from blockwright.blocks.parameters import Place
from blockwright.blocks.run import Facts, Run, stage
from blockwright.blocks.stream import Block, Gram
from blockwright.blocks.tuning import Feed, chain, cosine, kept_for_backward
from blockwright.compress.quantllm_ofa_supernet import DTYPES, Costs, Made, Supernet, loss_of, super_linear
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
        linears[name] = super_linear(model.get_submodule(name), tensors, made)
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
