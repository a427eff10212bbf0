"""Fewer and shared blocks for devices with little memory: deletes the blocks of a language model that jointly trained gates close, lets
neighbours among the rest use one block's weights, and repairs the result by a little training against the dense model.

Use it when depth must go: delete blocks for latency, share them for memory alone. Not without text to train on, nor where the result must
stay close to the dense model: at the same size quantised weights lose less. FoldGPT, arXiv 2407.00928. The ranking to compare with is
ShortGPT's block influence, arXiv 2403.03853; for each block that uses shared weights an adapter of its own, which starts at what sharing
takes from it, is from arXiv 2410.20672.
Re-measure its claim: `blockwright reproduce foldgpt`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, rms_norm

from blockwright.blocks import layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.lora import LoraLinear
from blockwright.blocks.parameters import Place
from blockwright.blocks.run import Facts, Run, stage
from blockwright.blocks.stream import Block, batches
from blockwright.blocks.tuning import (
    Feed,
    add_lora,
    block_vectors,
    chain,
    kept_for_backward,
    kl_of_tokens,
    mean_of_real,
    merge,
    next_token_loss,
)
from blockwright.errors import BlockwrightError
from blockwright.options import Count, Positive, Rate, Share

CARD = {
    "slug": "foldgpt",
    "room": "compress",
    "kind": "stage",
    "arxiv": "2407.00928",
    "title": "FoldGPT: Simple and Effective Large Language Model Compression Scheme",
    "summary": "deletes the blocks that jointly trained gates close, shares weights among neighbours, repairs by distillation",
    "saves": "memory and time by the blocks deleted; memory, not time, by those that share weights",
    "needs": ["calibration", "gradients"],
    "accepts": ["dense"],
    "leaves": "dense",
    "writes": "a plain model with fewer layers; with shared weights our own layout, or `export: unrolled`",
    "claim": {
        "figure": "better than earlier depth compression at equal size",
        "against": "block removal such as ShortGPT",
        "where": "abstract",
    },
}

CHECKED = 16  # calibration windows on which the gates' choice is compared with that of block influence
BETAS = (0.9, 0.99)  # Adam's, for the gates: their gradients shrink as they polarise, and the second moment has to follow
SHARP = 300.0  # by which u is multiplied in the end: gates whose u differ by 0.02 are open and closed


@stage
def foldgpt(
    run: Run,
    *,
    remove: Share = 0.1,
    group_size: Positive = 1,
    parent: Literal["first", "importance", "mean"] = "first",
    protect: list[int] = [0],
    ranking: Literal["gates", "influence"] = "gates",
    gate_steps: Count = 40,
    gate_lr: Rate = 0.1,
    cure_steps: Count = 0,
    cure_lr: Rate = 1e-4,
    norm_lr: Rate = 1e-3,
    r: Positive = 8,
    lora_alpha: Positive = 16,
    lora_init: Literal["svd", "zeros"] = "svd",
    shared_lora: bool = False,
    kl_weight: float = 1.0,
    temperature: Rate = 1.0,
    tail_weight: float = 1.0,
    tail_layers: Count = 2,
    batch_size: Positive = 2,
    max_seq_length: Positive = 128,
    gradient_checkpointing: bool = False,
) -> None:
    """Delete `remove` of the blocks, share weights inside groups of `group_size` of the rest, and train `cure_steps` steps to repair.

    The whole model is resident in fp32 while gates train, and twice while it is cured. A tenth of the blocks can often go without curing;
    deleting more, and any sharing, wants `cure_steps`.

    remove : share of the blocks to delete; their number is rounded to the nearest, halves up.
    group_size : this many consecutive blocks use one block's linear weights, stored once; 1 shares nothing. Norms stay each block's own.
        A group holds blocks of one attention type and no protected block; the last one may be smaller.
    parent : whose weights a group uses: its first block's, its most important block's, or the mean of them all, from which factors that
        start at the differences have the least to make up.
    protect : blocks, by number (-1 is the last), that are neither deleted nor shared.
    ranking : what decides which blocks go: gates trained together, or block influence (1 - cosine of a block's input and output; the
        baseline). The gates' choice is taken where the model without those blocks predicts calibration text no worse than by influence:
        few steps of training can mislead.
    gate_steps : training steps of the gates, for which every weight is frozen; use 200 to 500 where a GPU is at hand. With 0 all gates
        tie, and block influence decides.
    gate_lr : Adam's learning rate for the gates, in units of log m^2.
    cure_steps : training steps of norms and LoRA factors after deleting and sharing, such as 300 to 1000; 0: none.
    cure_lr : AdamW's learning rate for LoRA factors; it falls linearly to 0.
    norm_lr : the same for norms.
    r : rank of the LoRA factors, on every linear. Those of blocks that share nothing are merged into the weights in the end.
    lora_alpha : LoRA's scale is lora_alpha / r.
    lora_init : where a block's factors beside a shared weight start: at the best approximation of rank r of what the block's own weight
        has beyond it, by singular values, so that sharing gives up only the rest; or at zero.
    shared_lora : one pair of factors for each shared weight, which starts at zero and is merged in the end, instead of one for each block
        that is kept beside it.
    kl_weight : weight of KL(dense || this model) beside the cross entropy.
    temperature : divides both sides' logits in that KL, which is multiplied by its square.
    tail_weight : weight of the mean squared difference of normalised hidden states after the last blocks.
    tail_layers : how many last blocks that compares, counted from the end on both sides.
    batch_size : windows in a training step.
    max_seq_length : tokens of a window used in a training step: a random run of them or, in padded windows, those from the first real one.
    gradient_checkpointing : keep only block inputs for the backward pass and compute the rest again; the same result in less memory.

    Raises BlockwrightError before anything is computed for options out of range, a model that is not dense, and too few free blocks; later
    for blocks of different shapes in one group, and losses that are not finite.
    """
    _check_model(run.model)
    positive = {"group_size": group_size, "r": r, "lora_alpha": lora_alpha, "batch_size": batch_size, "temperature": temperature}
    _check_positive(positive | {"gate_lr": gate_lr, "cure_lr": cure_lr, "norm_lr": norm_lr})
    for name, weight in {"kl_weight": kl_weight, "tail_weight": tail_weight}.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise BlockwrightError(f"foldgpt: {name}={weight}", allowed="0 or more", do="Try 1")
    words = {"parent": (parent, ("first", "importance", "mean")), "ranking": (ranking, ("gates", "influence"))}
    _check_words(words | {"lora_init": (lora_init, ("svd", "zeros"))})
    feed = Feed(run, batch_size, max_seq_length)
    total = layers.num_blocks(run.model.config)
    guarded = _guarded(protect, total)
    free = [i for i in range(total) if i not in guarded]
    num_removed = _num_removed(remove, total, len(free))
    if cure_steps and tail_layers > total - num_removed:
        raise BlockwrightError(
            f"foldgpt: tail_layers={tail_layers}", allowed=f"up to the {total - num_removed} blocks that stay", do="Try 2"
        )

    score = [(1.0, 0.0)] * total  # of each block: its gate, and what it does to its input where gates tie
    if num_removed or parent == "importance":
        score = [(1.0, -s) for s in influence(run)]
    if num_removed and ranking == "gates" and gate_steps:
        gates = train_gates(
            run, feed, free=free, num_removed=num_removed, steps=gate_steps, lr=gate_lr, checkpointing=gradient_checkpointing
        )
        by_gates = [(g, does) for g, (_, does) in zip(gates, score, strict=True)]
        ours, theirs = (sorted(_lowest(free, s, num_removed)) for s in (by_gates, score))
        if ours == theirs or loss_without(run, feed, ours) <= loss_without(run, feed, theirs):
            score = by_gates
    gone = _lowest(free, score, num_removed)
    keep = [i for i in range(total) if i not in gone]
    unshared = run.model = run.model.with_layers(keep)
    groups = share(run, group_size=group_size, parent=parent, guarded={keep.index(i) for i in guarded}, score=[score[i] for i in keep])
    if not cure_steps:
        return

    student = cure(
        run,
        feed,
        unshared=unshared if lora_init == "svd" and not shared_lora else None,
        steps=cure_steps,
        lr=cure_lr,
        norm_lr=norm_lr,
        r=r,
        lora_alpha=lora_alpha,
        shared_lora=shared_lora,
        kl_weight=kl_weight,
        temperature=temperature,
        tail_weight=tail_weight,
        tail_layers=tail_layers,
        checkpointing=gradient_checkpointing,
    )
    apart = set() if shared_lora else {i for g in groups if len(g) > 1 for i in g}  # blocks that keep their factors beside the weights
    run.blocks(partial(_take, student=student, apart=apart), write=True)
    run.model = _with_adapters(run, student, apart)


def plan(*, block_parameters: int, tokens: int, **options: Any) -> dict[str, Any]:
    """What a run costs: fp32 copies of a block in memory, passes over the calibration text, bits of a stored weight (None: unchanged).

    layers : share of the blocks that is stored in the end, adapters included.
    resident : fp32 copies of the whole chain in memory, activations included.
    """
    step = options["batch_size"] * options["max_seq_length"]
    again = 1 if options["gradient_checkpointing"] else 0
    gating = (2 + again) * options["gate_steps"] if options["ranking"] == "gates" else 0  # forward, and backward to activations alone
    curing = (4 + again) * options["cure_steps"]  # the teacher's forward too
    saved = kept_for_backward(block_parameters, step, checkpointing=options["gradient_checkpointing"])
    models = 2 if options["cure_steps"] else 1
    stored = 1 / options["group_size"]
    if options["group_size"] > 1 and options["cure_steps"] and not options["shared_lora"]:
        stored += 19 * math.sqrt(block_parameters / 12) * options["r"] / block_parameters  # its linears' inputs and outputs: 19 widths
    return {
        "copies": 2,
        "passes": 1 + (gating + curing) * step / max(tokens, 1),
        "bits": None,
        "layers": (1 - options["remove"]) * stored,
        "resident": models + saved,
    }


# ranking


def influence(run: Run) -> list[float]:
    """For each block, the mean over real tokens of the cosine between its input and its output, in [-1, 1].

    1 minus it is ShortGPT's block influence (arXiv 2403.03853): the higher the cosine, the less the block does.
    """

    def visit(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator) -> Facts:
        assert x is not None and y is not None
        cosine = cosine_similarity(x, y, dim=-1)
        real = torch.ones_like(cosine) if run.mask is None else run.mask.to(cosine)
        return {"similarity": float((cosine * real).sum(dtype=torch.float64) / real.sum())}

    return [facts["similarity"] for facts in run.blocks(visit, inputs="dense", target=True)]


def gate(u: Float[Tensor, " F"], num_open: int | float) -> Float[Tensor, " F"]:
    """G(m) = m^2 / (m^2 + eps), a smoothed L0 norm, where m^2 = exp(u), and eps > 0 such that the gates sum to num_open, 0 < num_open < F.

    Differentiable, through eps too: what one gate gains the others lose. eps is found by bisection of its logarithm in fp64.
    """
    x = u.detach().double()
    low, high = x.min() - 40, x.max() + 40
    for _ in range(64):
        middle = (low + high) / 2
        over = torch.sigmoid(x - middle).sum() > num_open
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    slope = torch.sigmoid(x - low) * torch.sigmoid(low - x)
    share = slope / slope.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.sigmoid(u - low.to(u) - (share.to(u) * (u - u.detach())).sum())


@contextmanager
def gated(blocks: nn.ModuleList, gates: Callable[[], Float[Tensor, " L"]]) -> Iterator[None]:
    """Inside, block i hands on x + g_i (block_i(x) - x) with g = gates(): itself at 1, deleted at 0."""

    def hook(i: int) -> Callable[..., Any]:
        def blend(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            x, g = inputs[0], gates()[i]
            if isinstance(output, tuple):
                return (x + g * (output[0] - x), *output[1:])
            return x + g * (output - x)

        return blend

    handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train_gates(
    run: Run, feed: Feed, *, free: list[int], num_removed: int, steps: int, lr: float, checkpointing: bool = False
) -> list[float]:
    """The gate G of each block after training; those of blocks not in `free` are 1. No weight changes.

    The loss is the cross entropy of the gated model. At first all gates are nearly open, where its gradient tells what a block is worth to
    a model that works; over the first half of the steps the budget closes in: sum G = L - num_removed, held at every step (see `gate`), so
    that no penalty has to be balanced against the loss. Over the second half u is multiplied by a number that grows from 1 to SHARP: the
    gates part into open and closed, and those at the border are weighed against each other while the rest stand as they will.
    Source: arXiv 2407.00928 names gates trained together, a polarising optimisation and a constraint; the formulas are a reading of it.
    """
    model = run.model.build(device=run.device, dtype=torch.float32)
    blocks = chain(model, checkpointing=checkpointing)
    u = nn.Parameter(torch.zeros(len(free), device=run.device))
    at, num_open = torch.tensor(free, device=run.device), len(free) - num_removed
    g_L = torch.ones(len(blocks), device=run.device)
    text_loss = feed.loss(model)

    def loss(i: int, rng: torch.Generator) -> Tensor:
        nonlocal g_L
        first, second = min(1.0, 2 * (i + 1) / steps), max(0.0, 2 * (i + 1) / steps - 1)  # shares of the two halves that are done
        g_F = gate(SHARP**second * u, len(free) - first * num_removed)
        g_L = torch.ones(len(blocks), device=run.device).index_copy(0, at, g_F)
        return text_loss(i, rng)

    with gated(blocks, lambda: g_L):
        run.curves["gates: loss"] = run.train(loss, torch.optim.Adam([u], lr=lr, betas=BETAS), steps=steps)
    return torch.ones(len(blocks), device=run.device).index_copy(0, at, gate(SHARP * u.detach(), num_open)).tolist()


@torch.no_grad()
def loss_without(run: Run, feed: Feed, gone: list[int]) -> float:
    """Cross entropy of the model with these blocks deleted, in nats a token, on the first CHECKED calibration windows."""
    keep = [i for i in range(layers.num_blocks(run.model.config)) if i not in gone]
    model = run.model.with_layers(keep).build(device=run.device, dtype=torch.float32)
    ids, mask = feed.ids[:CHECKED].to(run.device), None if feed.mask is None else feed.mask[:CHECKED].to(run.device)
    losses = []
    for rows in batches(len(ids), feed.size):
        real = None if mask is None else mask[rows]
        losses.append(next_token_loss(model(ids[rows], attention_mask=real, use_cache=False).logits, ids[rows], real).item())
    return sum(losses) / len(losses)


def _lowest(free: list[int], score: list[tuple[float, float]], count: int) -> list[int]:
    return sorted(free, key=lambda i: score[i])[:count]


# sharing


def share(run: Run, *, group_size: int, parent: str, guarded: set[int], score: list[tuple[float, float]]) -> list[list[int]]:
    """Let the blocks of each group use one block's linear weights, by place: they are stored once. Norms stay each block's own.

    Returns the groups. score : of each block; with parent="importance" a group uses the block of the highest.
    Raises BlockwrightError for blocks of different shapes in a group.
    """
    groups = cut_into_groups(_types(run.model), group_size, guarded)
    before = run.model
    heads = {max(g, key=lambda i: score[i]) if parent == "importance" else g[0]: g for g in groups}
    own = _own_tensors(before)
    run.model = before.with_shared({child: head for head, g in heads.items() for child in g if child != head}, lambda name: name in own)
    if parent == "mean" and group_size > 1:
        run.blocks(partial(_take_mean, before=before, groups=heads, own=own), write=True)
    return groups


def cut_into_groups(types: list[str], size: int, guarded: set[int]) -> list[list[int]]:
    """Consecutive blocks in groups of at most `size`; a new type starts a new group, and a guarded block is alone in its."""
    groups: list[list[int]] = []
    for i, kind in enumerate(types):
        last = groups[-1] if groups else []
        if last and len(last) < size and types[last[0]] == kind and not guarded & {last[0], i}:
            last.append(i)
        else:
            groups.append([i])
    return groups


def _take_mean(
    block: Block,
    x: Tensor | None,
    y: Tensor | None,
    rng: torch.Generator,
    *,
    before: Blueprint,
    groups: dict[int, list[int]],
    own: set[str],
) -> None:
    path = block.name.rpartition(".")[0]
    members = groups.get(block.index, [])
    for name, p in block.module.named_parameters() if len(members) > 1 else ():
        if name not in own:
            names = [f"{path}.{i}.{name}" for i in members]
            p.copy_(torch.stack([before.tensors.read([n])[n].to(p) for n in names]).mean(0))


# curing


def cure(
    run: Run,
    feed: Feed,
    *,
    unshared: Blueprint | None,
    steps: int,
    lr: float,
    norm_lr: float,
    r: int,
    lora_alpha: int,
    shared_lora: bool,
    kl_weight: float,
    temperature: float,
    tail_weight: float,
    tail_layers: int,
    checkpointing: bool = False,
) -> nn.Module:
    """The model as it stands, resident, with trained norms and LoRA factors; the teacher is the model as it entered the stage.

    unshared : the model before its blocks shared weights, where the factors start; None: they start at zero.
    """
    teacher = run.entered.build(device=run.device, dtype=torch.float32)
    student = run.model.build(device=run.device, dtype=torch.float32)
    factors = add_lora(run, student, r=r, lora_alpha=lora_alpha, shared=shared_lora)
    if unshared is not None:
        start_at_difference(student, unshared)
    norms = [p.requires_grad_() for p in block_vectors(student).values()]
    watched = (chain(teacher), chain(student, checkpointing=checkpointing))

    def loss(i: int, rng: torch.Generator) -> Tensor:
        ids, mask = feed.draw(rng)
        with torch.no_grad(), tail(watched[0], tail_layers) as wanted:
            target = teacher(ids, attention_mask=mask, use_cache=False).logits
        with tail(watched[1], tail_layers) as hidden:
            logits = student(ids, attention_mask=mask, use_cache=False).logits
        kl = distillation(logits, target, mask, temperature=temperature)
        drift = sum((tail_distance(h, t, mask) for h, t in zip(hidden, wanted, strict=True)), torch.zeros((), device=ids.device))
        return next_token_loss(logits, ids, mask) + kl_weight * kl + tail_weight * drift

    optimizer = torch.optim.AdamW([{"params": factors, "lr": lr}, {"params": norms, "lr": norm_lr}], weight_decay=0.0)

    def before(i: int) -> None:
        for group, rate in zip(optimizer.param_groups, (lr, norm_lr), strict=True):
            group["lr"] = rate * (1 - i / steps)

    run.curves["curing: loss"] = run.train(loss, optimizer, steps=steps, before=before)
    return student


@torch.no_grad()
def start_at_difference(model: nn.Module, unshared: Blueprint) -> None:
    """Let each pair of LoRA factors be the best approximation of rank r of what the linear's weight in `unshared` has beyond its base.

    Both factors take the roots of the singular values (arXiv 2410.20672). A pair whose base is that weight already stays as it is. By the
    eigenvectors of the smaller Gram matrix, in fp64.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LoraLinear):
            continue
        own = unshared.tensors.read([f"{name}.weight"])[f"{name}.weight"]
        change_NK = (own.to(module.lora_A) - module.base.weight).double()
        if not change_NK.any():
            continue
        change_NK = change_NK.T if module.transposed else change_NK
        wide = change_NK.shape[0] < change_NK.shape[1]
        tall = change_NK.T if wide else change_NK
        right = torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -module.r :]
        left = tall @ right  # its columns are as long as the singular values
        root = left.norm(dim=0).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        b, a = left / root, right * root
        a, b = (b, a) if wide else (a, b)
        scale = (module.r / module.lora_alpha) ** 0.5
        module.lora_A[: len(root)] = scale * a.T
        module.lora_B[:, : len(root)] = scale * b


def distillation(
    logits: Float[Tensor, "b T V"], target: Float[Tensor, "b T W"], mask: Int[Tensor, "b T"] | None, *, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """KL(target || logits) at a temperature, times its square; the mean over real tokens, in nats.

    Raises BlockwrightError where the two have vocabularies of different sizes.
    """
    if logits.shape != target.shape:
        raise BlockwrightError(
            f"foldgpt: the student's logits are {tuple(logits.shape)}, the teacher's {tuple(target.shape)}",
            allowed="one vocabulary for both",
            do="Distil from a model with the same tokenizer",
        )
    return temperature**2 * mean_of_real(kl_of_tokens(target.float() / temperature, logits.float() / temperature), mask)


@contextmanager
def tail(blocks: nn.ModuleList, count: int) -> Iterator[list[Tensor]]:
    """Inside, the outputs of the last `count` blocks go into the list, the earliest first."""
    seen: list[Tensor] = []
    last = list(blocks)[len(blocks) - count :]
    handles = [b.register_forward_hook(lambda m, x, out: seen.append(out[0] if isinstance(out, tuple) else out)) for b in last]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tail_distance(h: Float[Tensor, "b T d"], target: Float[Tensor, "b T d"], mask: Int[Tensor, "b T"] | None) -> Float[Tensor, ""]:
    """The mean squared difference of hidden states scaled to root mean square 1, over real tokens and channels."""
    size = h.shape[-1:]
    return mean_of_real((rms_norm(h, size) - rms_norm(target, size)).square().mean(-1), mask)


def _take(block: Block, x: Tensor | None, y: Tensor | None, rng: torch.Generator, *, student: nn.Module, apart: set[int]) -> None:
    """The student's norms and, in blocks that share nothing with others, its factors merged into the linears."""
    if block.index not in apart:
        merge(block, student)
    for name, norm in block_vectors(student).items():
        if name.startswith(block.name + "."):
            block.module.get_parameter(name.removeprefix(block.name + ".")).copy_(norm.detach())


def _with_adapters(run: Run, student: nn.Module, apart: set[int]) -> Blueprint:
    """The model with the student's LoRA factors around the linears of the blocks `apart`, whose own tensors stay in their places."""
    model, forms = run.model, dict(run.model.forms)
    removed, added, memory = [], {}, {}
    for i, block in enumerate(chain(student)):
        for inner, module in block.named_modules() if i in apart else ():
            if isinstance(module, LoraLinear):
                name = f"{layers.chain_path(student)}.{i}.{inner}"
                forms[name] = model.forms.get(name, {}) | module.form()  # a size of its own stays
                dtype = model.tensors.facts(f"{name}.weight").dtype
                for old in [f"{name}.{n}" for n, _ in module.base.named_parameters()]:
                    removed.append(old)
                    added[f"{name}.base{old.removeprefix(name)}"] = model.tensors[old]
                for key, value in {"lora_A": module.lora_A.detach(), "lora_B": module.lora_B.detach()}.items():
                    layers.check_finite(value, f"{name}.{key}")
                    place = added[f"{name}.{key}"] = Place(None, f"{run.stage}:{name}.{key}")
                    memory[place.name] = value.to(dtype, copy=True)
    return model.edited(tensors=model.tensors.replaced(removed, added, memory), forms=forms)


# the parts of a model, the options


def _own_tensors(model: Blueprint) -> set[str]:
    """Names inside a block of the vectors that belong to no linear, and of buffers: each block keeps its own."""
    skeleton = model.skeleton()
    path = layers.chain_path(skeleton)
    names = {name.removeprefix(path + ".").partition(".")[2] for name in block_vectors(skeleton)}
    return names | {name.removeprefix(path + ".").partition(".")[2] for name, _ in skeleton.named_buffers() if name.startswith(path + ".")}


def _types(model: Blueprint) -> list[str]:
    """The attention type of each block, where the config tells them apart."""
    types = getattr(model.config, "layer_types", None) or ["block"] * layers.num_blocks(model.config)
    return [str(t) for t in types]


def _check_model(model: Blueprint) -> None:
    adapter = next((f"the model carries an adapter ({n})" for n in model.tensors if ".lora_A." in n or ".base_layer." in n), None)
    form = next((f"{name} is {f['form'].replace('_', ' ')}" for name, f in model.forms.items() if f["form"] != "linear"), None)
    if adapter or form:
        raise BlockwrightError(
            f"foldgpt: {adapter or form}",
            allowed="a dense model",
            do="Merge its adapter first (merge_and_unload), or put foldgpt before the other stages",
        )


def _check_positive(options: dict[str, float | int]) -> None:
    for name, value in options.items():
        if not (math.isfinite(value) and value > 0):
            raise BlockwrightError(f"foldgpt: {name}={value}", allowed="a positive number", do="Leave it out for the default")


def _check_words(options: dict[str, tuple[str, tuple[str, ...]]]) -> None:
    for name, (value, known) in options.items():
        if value not in known:
            raise BlockwrightError(f"foldgpt: {name}={value!r}", allowed=", ".join(known))


def _guarded(protect: list[int], total: int) -> set[int]:
    """Numbers of protected blocks, counted from the start."""
    for i in protect:
        if not -total <= i < total:
            raise BlockwrightError(f"foldgpt: protect={protect}", allowed=f"block numbers from {-total} to {total - 1}", do="Try [0]")
    return {i % total for i in protect}


def _num_removed(remove: float, total: int, free: int) -> int:
    """remove * total, to the nearest number of blocks, halves up."""
    if not 0 <= remove < 1:
        raise BlockwrightError(f"foldgpt: remove={remove}", allowed="0 <= remove < 1", do="Try remove=0.1")
    count = math.floor(remove * total + 0.5)
    if count and count >= free:
        raise BlockwrightError(
            f"foldgpt: remove={remove} deletes {count} of {total} blocks, of which {free} are not protected",
            allowed=f"fewer than {free} blocks",
            do="Delete less, or protect fewer blocks",
        )
    return count
