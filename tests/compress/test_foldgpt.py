"""foldgpt: gates against deletion by hand and brute force, sharing against autograd, files against transformers, and its refusals."""

import copy
import itertools
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language import TOKENS as V
from language import text
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from blockwright.blocks.layers import Blueprint
from blockwright.blocks.lora import LoraLinear
from blockwright.blocks.run import Run
from blockwright.compress import foldgpt as method
from blockwright.compress.dsnot import dsnot
from blockwright.compress.finequant import finequant
from blockwright.compress.flexround import flexround
from blockwright.compress.foldgpt import foldgpt
from blockwright.errors import BlockwrightError
from blockwright.recipes import export


def llama(num_layers=6, **changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    sizes |= dict(bos_token_id=None, eos_token_id=None)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=num_layers, **{**sizes, **changes})).eval()


@cache
def trained():
    """A 6-block Llama that has learned the language."""
    model = llama().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rng = torch.Generator().manual_seed(1)
    for _ in range(120):
        rows = text()[torch.randint(0, 64, (16,), generator=rng)]
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
    return model.eval()


def without(model, gone):
    """The model with some blocks deleted by hand."""
    smaller = copy.deepcopy(model)
    smaller.model.layers = nn.ModuleList(b for i, b in enumerate(smaller.model.layers) if i not in gone)
    smaller.config.num_hidden_layers = len(smaller.model.layers)
    for i, block in enumerate(smaller.model.layers):
        block.self_attn.layer_idx = i
    return smaller


@torch.no_grad()
def loss_of(model, ids):
    logits = model(ids, use_cache=False).logits[:, :-1]
    return -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).mean().item()


def logits_of(model, ids=None):
    with torch.no_grad():
        return model(text()[:4] if ids is None else ids, use_cache=False).logits


def folded(model, stages, journal=None, mask=None):
    """The blueprint after some stages with their options."""
    run = Run(Blueprint.of_module(model), calibration=text(), mask=mask, journal=journal)
    for number, (fn, options) in enumerate(stages):
        run.begin(f"{number}-{fn.__name__}")
        fn(run, **options)
    return run.model


def storages(model, end="q_proj.weight"):
    """Of each block, with an adapter around the linear or without."""
    return [p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False) if name.replace(".base.", ".").endswith(end)]


SHARED = dict(remove=1 / 6, group_size=2, gate_steps=10, batch_size=4)
CURED = dict(SHARED, cure_steps=4, cure_lr=1e-2, r=2)
LORA = dict(remove=0.0, gate_steps=0, r=2, cure_steps=3, cure_lr=1e-2)


# gates


@pytest.mark.parametrize("i", [0, 3, 5])
def test_open_gates_are_the_model_and_a_closed_one_is_a_deleted_block(i):
    model, g = trained(), torch.ones(6)
    with method.gated(model.model.layers, lambda: g):
        assert (logits_of(model) - logits_of(without(model, []))).abs().max() <= 1e-5
        g = torch.ones(6).index_fill(0, torch.tensor(i), 0.0)
        assert (logits_of(model) - logits_of(without(model, [i]))).abs().max() <= 1e-5
    assert torch.equal(logits_of(model), logits_of(without(model, [])))  # the hooks are gone


@settings(deadline=None, max_examples=25)
@given(u=st.lists(st.floats(-6, 6), min_size=2, max_size=7), num_open=st.integers(1, 6))
def test_the_gates_follow_their_formula_and_the_budget(u, num_open):
    num_open = min(num_open, len(u) - 1)
    gates = method.gate(torch.tensor(u, dtype=torch.float64), num_open).tolist()
    assert sum(gates) == pytest.approx(num_open, abs=1e-9)
    [eps] = {round(math.exp(v) * (1 - g) / g, 9) for v, g in zip(u[:1], gates, strict=False)}
    assert gates == pytest.approx([math.exp(v) / (math.exp(v) + eps) for v in u], rel=1e-5, abs=1e-7)


def test_the_gradient_of_the_gates_goes_through_the_budget():
    u = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    weights = torch.arange(5, dtype=torch.float64)
    [got] = torch.autograd.grad((method.gate(u, 3) * weights).sum(), [u])
    for i in range(5):
        step = torch.zeros(5, dtype=torch.float64).index_fill(0, torch.tensor(i), 1e-4)
        change = ((method.gate(u.detach() + step, 3) - method.gate(u.detach() - step, 3)) * weights).sum() / 2e-4
        assert got[i].item() == pytest.approx(change.item(), abs=1e-7)


def gates_of(model, num_removed, free, ids=None, steps=100, **options):
    run = Run(Blueprint.of_module(model), calibration=text() if ids is None else ids)
    feed = method.Feed(run, 8, 24)
    return method.train_gates(run, feed, free=free, num_removed=num_removed, steps=steps, **{"lr": 0.1, **options})


@pytest.mark.parametrize("num_removed", [1, 2, 3])
def test_gates_polarise_meet_the_budget_and_change_no_weight(num_removed, monkeypatch):
    built = []
    build = Blueprint.build
    monkeypatch.setattr(Blueprint, "build", lambda self, **kw: built.append(build(self, **kw)) or built[-1])
    gates = gates_of(trained(), num_removed, [1, 2, 3, 4, 5])
    assert gates[0] == 1.0
    assert sum(g <= 0.1 or g >= 0.9 for g in gates) >= 0.9 * 6
    assert abs(sum(gates) / 6 - (6 - num_removed) / 6) <= 0.02
    [resident] = built
    for (name, p), q in zip(resident.named_parameters(), trained().parameters(), strict=True):
        assert torch.equal(p, q) and p.grad is None, name


@pytest.mark.parametrize("ranking", ["gates", "influence"])
def test_planted_identity_blocks_are_the_ones_that_go(ranking):
    model = copy.deepcopy(trained())
    for at in (2, 5):
        idle = copy.deepcopy(model.model.layers[at])
        nn.init.zeros_(idle.self_attn.o_proj.weight)
        nn.init.zeros_(idle.mlp.down_proj.weight)
        model.model.layers.insert(at, idle)
    model.config.num_hidden_layers = 8
    small = folded(model, [(foldgpt, dict(remove=2 / 8, gate_steps=60, batch_size=8, ranking=ranking))])
    assert small.origin == (0, 1, 3, 4, 6, 7)
    assert (logits_of(small.build()) - logits_of(trained())).abs().max() <= 1e-4


def coupled():
    """Four blocks by hand: 0 and 2 both write the next token of tokens 2 to 11, and one is enough; 1 and 3 that of token 0, of token 1.

    Tokens stand in channels 0 to 11, predictions in 12 to 23; token t is followed by 5 t + 3 modulo 12.
    """
    model = llama(4, tie_word_embeddings=False)
    for p in model.parameters():
        nn.init.zeros_(p)
    nn.init.ones_(model.model.norm.weight)
    for t in range(V):
        model.model.embed_tokens.weight.data[t, t] = 1.0
        model.lm_head.weight.data[t, 12 + t] = 2.0
    for block, tokens, strength in zip(model.model.layers, (range(2, V), [0], range(2, V), [1]), (0.4, 0.3, 0.6, 0.3), strict=True):
        nn.init.ones_(block.post_attention_layernorm.weight)
        for t in tokens:
            block.mlp.gate_proj.weight.data[t, t] = block.mlp.up_proj.weight.data[t, t] = 1.0
            block.mlp.down_proj.weight.data[12 + (5 * t + 3) % V, t] = strength
    ids = torch.randint(0, V, (32, 1), generator=torch.Generator().manual_seed(2))
    ids = [ids]
    for _ in range(11):
        ids.append((5 * ids[-1] + 3) % V)
    return model, torch.cat(ids, 1)


def test_coupled_blocks_that_one_at_a_time_scores_would_both_delete():
    model, ids = coupled()
    alone = sorted(range(4), key=lambda i: loss_of(without(model, [i]), ids))[:2]
    assert sorted(alone) == [0, 2]
    losses = {gone: loss_of(without(model, gone), ids) for gone in itertools.combinations(range(4), 2)}
    assert losses[0, 2] > 4 * min(losses.values())
    gates = gates_of(model, 2, [0, 1, 2, 3], ids)
    gone = tuple(sorted(sorted(range(4), key=lambda i: gates[i])[:2]))
    assert losses[gone] <= 1.15 * min(losses.values()) < losses[1, 3] / 1.5  # one of the pair, and one of the others


def test_among_all_subsets_the_gates_choose_one_of_the_best_tenth():
    losses = {gone: loss_of(without(trained(), gone), text()) for gone in itertools.combinations(range(6), 3)}
    small = folded(trained(), [(foldgpt, dict(remove=0.5, protect=[], gate_steps=100, batch_size=16))])
    gone = tuple(i for i in range(6) if i not in small.origin)
    assert sorted(losses.values()).index(losses[gone]) < len(losses) / 10


def test_influence_is_the_mean_cosine_of_inputs_and_outputs():
    model, mask = trained(), torch.ones_like(text())
    mask[::2, 20:] = 0
    run = Run(Blueprint.of_module(model), calibration=text(), mask=mask)
    got = method.influence(run)
    hidden = []
    handles = [b.register_forward_hook(lambda m, x, y: hidden.append((x[0], y))) for b in model.model.layers]
    with torch.no_grad():
        model(text(), attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    for value, (x, y) in zip(got, hidden, strict=True):
        pairs = [(x[s, t], y[s, t]) for s in range(64) for t in range(24) if mask[s, t]]
        want = sum(float(a @ b / (a.norm() * b.norm())) for a, b in pairs) / len(pairs)
        assert value == pytest.approx(want, abs=1e-5)
    ranked = sorted(range(1, 6), key=lambda i: -got[i])
    for steps, ranking in ((30, "influence"), (0, "gates")):  # without steps all gates tie
        small = folded(model, [(foldgpt, dict(remove=2 / 6, ranking=ranking, gate_steps=steps))], mask=mask)
        assert set(range(6)) - set(small.origin) == set(ranked[:2])


@settings(deadline=None, max_examples=30)
@given(total=st.integers(2, 40), remove=st.floats(0, 0.99), free=st.integers(1, 40))
def test_the_number_of_deleted_blocks_is_the_nearest(total, remove, free):
    near = min(range(total + 1), key=lambda n: (abs(n - remove * total), -n))
    if near and near >= free:
        with pytest.raises(BlockwrightError, match=f"deletes {near} of {total} blocks"):
            method._num_removed(remove, total, free)
    else:
        assert method._num_removed(remove, total, free) == near


# sharing


@settings(deadline=None, max_examples=50)
@given(
    types=st.lists(st.sampled_from(["full", "sliding"]), min_size=1, max_size=12),
    size=st.integers(1, 4),
    guarded=st.sets(st.integers(0, 11), max_size=3),
)
def test_groups_are_consecutive_of_one_type_and_spare_protected_blocks(types, size, guarded):
    groups = method.cut_into_groups(types, size, guarded)
    assert [i for g in groups for i in g] == list(range(len(types)))
    for a, b in itertools.pairwise([*groups, []]):
        assert len(a) <= size and len({types[i] for i in a}) == 1 and (len(a) == 1 or not guarded & set(a))
        if b and len(a) < size:  # a group is short only where it must be
            assert types[a[0]] != types[b[0]] or guarded & {*a, b[0]}


@pytest.mark.parametrize("parent", ["first", "importance", "mean"])
def test_a_group_has_one_storage_and_each_block_its_norms(parent):
    small = foldgpt(trained(), calibration=text(), **dict(SHARED, remove=0.0, parent=parent))
    groups = [[0], [1, 2], [3, 4], [5]]
    with torch.no_grad():
        scores = [-s for s in method.influence(Run(Blueprint.of_module(trained()), calibration=text()))]
    for end in ("q_proj.weight", "o_proj.weight", "down_proj.weight"):
        found = storages(small, end)
        assert len(set(found)) == len(groups) and all(found[g[0]] == found[g[-1]] for g in groups)
        dense = [p for name, p in trained().named_parameters() if name.endswith(end)]
        now = [p for name, p in small.named_parameters(remove_duplicate=False) if name.endswith(end)]
        for group in groups:
            source = max(group, key=lambda i: scores[i]) if parent == "importance" else group[0]
            want = torch.stack([dense[i] for i in group]).mean(0) if parent == "mean" else dense[source]
            assert torch.allclose(now[group[-1]], want, atol=1e-7)
    assert len(set(storages(small, "input_layernorm.weight"))) == 6
    for block, old in zip(small.model.layers, trained().model.layers, strict=True):
        assert torch.equal(block.input_layernorm.weight, old.input_layernorm.weight)
        assert torch.equal(block.post_attention_layernorm.weight, old.post_attention_layernorm.weight)


def test_the_gradient_of_a_shared_weight_is_the_sum_over_its_blocks():
    small = foldgpt(trained(), calibration=text(), **SHARED)
    loose = copy.deepcopy(small)
    for block in loose.model.layers:  # the same function with a copy for every block
        block.self_attn.q_proj.weight = nn.Parameter(block.self_attn.q_proj.weight.detach().clone())
    for model in (small, loose):
        model.requires_grad_()
        model(text()[:4], labels=text()[:4]).loss.backward()
    shared = {}
    for a, b in zip(small.model.layers, loose.model.layers, strict=True):
        shared.setdefault(id(a.self_attn.q_proj.weight), (a.self_attn.q_proj.weight.grad, []))[1].append(b.self_attn.q_proj.weight.grad)
    assert len(shared) < 5
    for got, parts in shared.values():
        assert torch.allclose(got, torch.stack(parts).sum(0), atol=1e-6)


@pytest.mark.parametrize("options", [SHARED, CURED], ids=["shared", "cured"])
def test_generation_with_a_cache_equals_the_whole_forward_token_by_token(options):
    small = foldgpt(trained(), calibration=text(), **options)
    assert small.config.num_hidden_layers == len(small.model.layers) == 5
    ids = text()[:2, :5]
    fast = small.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)
    for _ in range(32):
        ids = torch.cat([ids, logits_of(small, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(fast, ids)


# curing


def test_distillation_from_oneself_is_zero_and_so_is_its_gradient():
    logits = torch.randn(2, 5, 9, requires_grad=True)
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for temperature in (1.0, 2.0):
        loss = method.distillation(logits, logits.detach(), mask, temperature=temperature)
        loss = loss + method.tail_distance(hidden, hidden.detach(), mask)
        grads = torch.autograd.grad(loss, [logits, hidden])
        assert abs(loss.item()) <= 1e-6 and all(g.abs().max() <= 1e-6 for g in grads)


def test_losses_by_hand():
    rng = torch.Generator().manual_seed(3)
    s, t, ids = torch.randn(2, 3, 4, generator=rng), torch.randn(2, 3, 4, generator=rng), torch.tensor([[0, 3, 1], [2, 2, 0]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    real = [(b, i) for b in range(2) for i in range(3) if mask[b, i]]

    def chances(row, temperature):
        powers = [math.exp(v / temperature) for v in row.tolist()]
        return [p / sum(powers) for p in powers]

    kl = 0.0
    for b, i in real:
        p, q = chances(s[b, i], 2.0), chances(t[b, i], 2.0)
        kl += sum(y * math.log(y / x) for x, y in zip(p, q, strict=True))
    assert method.distillation(s, t, mask, temperature=2.0).item() == pytest.approx(4 * kl / len(real), rel=1e-5)
    nll = [-math.log(chances(s[b, i], 1.0)[ids[b, i + 1]]) for b, i in ((0, 0), (1, 1))]
    assert method.next_token_loss(s, ids, mask).item() == pytest.approx(sum(nll) / 2, rel=1e-5)
    drift = 0.0
    for b, i in real:
        x, y = s[b, i].tolist(), t[b, i].tolist()
        rx, ry = (math.sqrt(sum(v * v for v in z) / 4) for z in (x, y))
        drift += sum((a / rx - c / ry) ** 2 for a, c in zip(x, y, strict=True)) / 4
    assert method.tail_distance(s, t, mask).item() == pytest.approx(drift / len(real), rel=1e-5)


def test_tails_are_the_last_blocks_on_both_sides():
    blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    with method.tail(blocks, 2) as seen:
        outputs = [block(torch.ones(1, 2)) for block in blocks]
    assert len(seen) == 2 and seen[0] is outputs[2] and seen[1] is outputs[3]
    with method.tail(blocks, 0) as seen:
        blocks[3](torch.ones(1, 2))
    assert seen == []


def test_curing_brings_a_folded_model_back_towards_the_dense_one():
    options = dict(remove=1 / 6, group_size=2, gate_steps=40, batch_size=8, r=4)
    hurt = foldgpt(trained(), calibration=text(), **options)
    cured = foldgpt(trained(), calibration=text(), **options, cure_steps=40, cure_lr=1e-2)
    shared = foldgpt(trained(), calibration=text(), **options, cure_steps=40, cure_lr=1e-2, shared_lora=True)
    dense, a, b, c = (loss_of(m, text()) for m in (trained(), hurt, cured, shared))
    assert a - dense > 0.2 and b - dense < 0.5 * (a - dense) and c - dense < 0.6 * (a - dense)
    lora = [m for m in cured.modules() if isinstance(m, LoraLinear)]
    assert (
        len(lora) == 4 * 7 and len({m.lora_A.data_ptr() for m in lora}) == 4 * 7
    )  # each block its own, but the first, which shares nothing
    assert not any(isinstance(m, LoraLinear) for m in shared.modules())
    assert len(set(storages(shared))) == len(set(storages(hurt))) == len(set(storages(cured, "q_proj.weight"))) == 3


@pytest.mark.parametrize("shared", [False, True])
def test_factors_are_private_or_shared_like_the_weights(shared):
    run = Run(Blueprint.of_module(trained()), calibration=text())
    student = foldgpt(trained(), calibration=text(), **dict(SHARED, remove=0.0))  # 6 blocks, 4 of them stored
    factors = method.add_lora(run, student, r=2, lora_alpha=4, shared=shared)
    assert len(factors) == 2 * 7 * (4 if shared else 6) and len({id(p) for p in factors}) == len(factors)
    lora = [m for m in student.modules() if isinstance(m, LoraLinear)]
    for a, b in itertools.combinations(lora, 2):
        assert (a.lora_A is b.lora_A) == (a.lora_B is b.lora_B) == (shared and a.base.weight is b.base.weight)


@pytest.mark.parametrize("parent", ["first", "mean"])
def test_factors_start_at_the_best_approximation_of_what_sharing_takes(parent, monkeypatch):
    started = []
    start = method.start_at_difference
    monkeypatch.setattr(method, "start_at_difference", lambda model, own: (start(model, own), started.append(copy.deepcopy(model))))
    options = dict(CURED, r=3, lora_alpha=12, parent=parent)
    foldgpt(trained(), calibration=text(), **options)
    bare = foldgpt(trained(), calibration=text(), **dict(options, cure_steps=0))
    keep = folded(trained(), [(foldgpt, dict(options, cure_steps=0))]).origin
    [student] = started
    seen = 0
    for i, old in enumerate(keep):
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
            own, base = (m.get_submodule(f"model.layers.{j}.{name}").weight for m, j in ((trained(), old), (bare, i)))
            lora = student.get_submodule(f"model.layers.{i}.{name}")
            left = torch.linalg.svdvals(own - lora.plain_weight())
            values = torch.linalg.svdvals(own - base)
            if values[0] == 0:  # the weight is the block's own
                assert not lora.lora_B.any() and lora.lora_A.abs().min() > 0
                continue
            seen += 1
            assert torch.allclose(left[:-3], values[3:], atol=1e-5) and left[-3:].max() < 1e-5  # Eckart and Young
            assert torch.linalg.matrix_norm(lora.plain_weight() - base, 2).item() == pytest.approx(values[0].item(), rel=1e-4)
            assert torch.allclose(lora.lora_A.square().sum(1), lora.lora_B.square().sum(0), atol=1e-5)  # the two share the size alike
    assert seen == 4 * (2 if parent == "first" else 4)


def test_a_rank_that_suffices_gives_back_the_blocks_before_any_training():
    options = dict(SHARED, r=32, lora_alpha=8, cure_steps=1, cure_lr=1e-30, norm_lr=1e-30)
    deleted = foldgpt(trained(), calibration=text(), **dict(SHARED, group_size=1))
    shared = foldgpt(trained(), calibration=text(), **options)
    assert (logits_of(shared) - logits_of(deleted)).abs().max() <= 1e-4
    for changes in (dict(lora_init="zeros"), dict(shared_lora=True)):  # these start at the shared weights
        other = foldgpt(trained(), calibration=text(), **options, **changes)
        bare = foldgpt(trained(), calibration=text(), **SHARED)
        assert (logits_of(other) - logits_of(bare)).abs().max() <= 1e-4 < (logits_of(bare) - logits_of(deleted)).abs().max()


def test_conv1d_factors_start_at_the_difference_too():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=4, n_head=2, n_positions=24)).eval()
    for p in model.parameters():
        nn.init.normal_(p, 0.0, 0.1)
    options = dict(remove=0.0, group_size=2, protect=[], r=32, cure_steps=1, cure_lr=1e-30, norm_lr=1e-30)
    shared = foldgpt(model, calibration=text(), **options)
    for mine, whole in zip(shared.transformer.h, model.transformer.h, strict=True):
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            assert torch.allclose(mine.get_submodule(name).plain_weight(), whole.get_submodule(name).weight, atol=1e-5), name


def test_the_teacher_is_the_dense_model_and_the_rates_fall_to_nothing(monkeypatch):
    built, rates, build, step = [], [], Blueprint.build, torch.optim.AdamW.step
    monkeypatch.setattr(Blueprint, "build", lambda self, **kw: built.append(self) or build(self, **kw))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append([g["lr"] for g in self.param_groups]) or step(self))
    run = Run(Blueprint.of_module(trained()), calibration=text())
    foldgpt(run, **CURED, ranking="influence", norm_lr=1e-3)
    teacher, student = built
    assert teacher is run.entered and len(teacher.tensors) > 0 and student.origin == run.model.origin != ()
    assert rates == [pytest.approx([1e-2 * left, 1e-3 * left]) for left in (1.0, 0.75, 0.5, 0.25)]


def test_each_loss_of_the_cure_counts():
    def cured(**options):
        return logits_of(foldgpt(trained(), calibration=text(), **{**CURED, **options}))

    base = cured()
    for name, value in {
        "kl_weight": 0.0, "tail_weight": 0.0, "tail_layers": 1, "temperature": 2.0, "norm_lr": 1e-5, "cure_lr": 1e-3, "lora_alpha": 32,
        "r": 3, "cure_steps": 5, "batch_size": 3, "max_seq_length": 12,
    }.items():  # fmt: skip
        assert (cured(**{name: value}) - base).abs().max() > 1e-4, name


def test_without_sharing_the_factors_are_merged_and_without_training_nothing_changes():
    cured = foldgpt(trained(), calibration=text(), **LORA)
    assert cured.state_dict().keys() == trained().state_dict().keys()
    assert not torch.equal(cured.model.layers[2].mlp.up_proj.weight, trained().model.layers[2].mlp.up_proj.weight)
    assert not torch.equal(cured.model.layers[2].input_layernorm.weight, trained().model.layers[2].input_layernorm.weight)
    assert torch.equal(cured.model.embed_tokens.weight, trained().model.embed_tokens.weight)
    same = foldgpt(trained(), calibration=text(), remove=0.0)
    assert all(torch.equal(p, q) for p, q in zip(same.parameters(), trained().parameters(), strict=True))


def test_recomputing_activations_changes_nothing():
    a, b = (foldgpt(trained(), calibration=text(), **CURED, gradient_checkpointing=on) for on in (False, True))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_the_padding_makes_no_difference(side):
    mask = torch.ones_like(text())
    mask[1::2, slice(0, 9) if side == "left" else slice(15, 24)] = 0
    other = torch.where(mask.bool(), text(), (text() + 5) % V)
    options = dict(CURED, max_seq_length=16)
    a, b = (foldgpt(trained(), calibration=ids, mask=mask, **options) for ids in (text(), other))
    whole = foldgpt(trained(), calibration=text(), **options)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), whole.parameters(), strict=True))


def test_batches_are_runs_of_the_windows():
    ids = torch.arange(60).view(5, 12)
    feed = method.Feed(Run(Blueprint.of_module(llama(1)), calibration=ids), 40, 7)
    got, mask = feed.draw(torch.Generator().manual_seed(0))
    assert got.shape == (40, 7) and mask is None
    assert (got.diff(dim=1) == 1).all() and (got[:, 0] // 12 == got[:, -1] // 12).all()
    assert {int(v) % 12 for v in got[:, 0]} == set(range(6)) and {int(v) // 12 for v in got[:, 0]} == set(range(5))


def test_batches_of_padded_windows_start_at_the_first_real_token():
    ids, mask = torch.arange(36).view(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[0, :4] = mask[1, 9:] = mask[2, :8] = 0
    feed = method.Feed(Run(Blueprint.of_module(llama(1)), calibration=ids, mask=mask), 40, 7)
    got, real = feed.draw(torch.Generator().manual_seed(0))
    assert {int(v) for v in got[:, 0]} == {4, 12, 24 + 5}  # the third has room for its last 7 tokens only
    assert torch.equal(real, mask.flatten()[got])


def test_the_plan_counts_what_is_stored():
    options = dict(remove=0.25, group_size=2, gate_steps=40, ranking="gates", cure_steps=60, r=8, batch_size=2, max_seq_length=128)
    options |= dict(gradient_checkpointing=False, shared_lora=False)
    block = 4 * 128 * 128 + 3 * 128 * 352 + 2 * 128

    def layers(**changes):
        return method.plan(block_parameters=block, tokens=1000, **{**options, **changes})["layers"]

    factors = 8 * (4 * (128 + 128) + 3 * (128 + 352))
    assert layers() == pytest.approx(0.75 * (1 / 2 + factors / block), rel=0.01)
    assert layers(shared_lora=True) == layers(cure_steps=0) == 0.75 / 2 and layers(group_size=1) == 0.75


# other models, other dtypes


def test_bf16_is_kept_and_the_tie_too():
    small = foldgpt(copy.deepcopy(trained()).bfloat16(), calibration=text(), **CURED)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert math.isfinite(loss_of(small, text()))


def test_conv1d_and_biases():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=4, n_head=2, n_positions=24)).eval()
    for p in model.parameters():
        nn.init.normal_(p, 0.0, 0.1)
    blueprint = folded(model, [(foldgpt, dict(CURED, remove=0.25, protect=[], cure_lr=1e-2))])
    small = blueprint.build()
    assert len(set(storages(small, "c_attn.weight"))) == 2 and len(set(storages(small, "c_attn.bias"))) == 2
    assert len(set(storages(small, "ln_1.bias"))) == 3
    merged = copy.deepcopy(small)
    for name, module in small.named_modules():
        if isinstance(module, LoraLinear):
            plain = copy.deepcopy(module.base)
            plain.weight = nn.Parameter(module.plain_weight())
            merged.set_submodule(name, plain)
    assert (logits_of(merged) - logits_of(small)).abs().max() <= 1e-5


def test_other_vectors_of_a_block_stay_its_own_and_are_cured():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )
    model = Qwen3ForCausalLM(config).eval()
    small = foldgpt(model, calibration=text(), **dict(CURED, remove=0.25, protect=[]))
    assert len(set(storages(small, "q_norm.weight"))) == 3 and len(set(storages(small, "q_proj.weight"))) == 2
    assert not torch.equal(small.model.layers[0].self_attn.q_norm.weight, model.model.layers[0].self_attn.q_norm.weight)


# files, later stages, journals


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.mark.parametrize("options", [dict(remove=2 / 6, gate_steps=5), SHARED, CURED], ids=["deleted", "shared", "cured"])
def test_written_and_read_the_logits_are_the_same_and_each_block_is_stored_once(options, tmp_path, source):
    blueprint = folded(trained(), [(foldgpt, options)])
    out = tmp_path / "out"
    out.mkdir()
    layout = export.write(blueprint, out, source=source, dtype=torch.float32)
    assert layout == ("standard" if "group_size" not in options else "blockwright")
    again = export.read(out)
    assert torch.equal(logits_of(again.build()), logits_of(blueprint.build())) and again.origin == blueprint.origin
    model = blueprint.build()
    unique = sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert 4 * unique <= size <= 4 * unique + 200 * len(list(model.parameters())) and size - 4 * unique < 0.15 * size
    if layout == "standard":
        opens_in_transformers(out, logits_of(model))


def opens_in_transformers(folder, logits, atol=1e-5):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert (logits_of(model.eval()) - logits).abs().max() <= atol


@pytest.mark.parametrize("layout", ["unrolled", "dense"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_unrolled_it_opens_in_plain_transformers(layout, packed, tmp_path, source):
    blueprint = folded(trained(), [(foldgpt, CURED)] + [(finequant, {"bits": 4, "group_size": 16})] * packed)
    assert any(f["form"] == "packed" for f in blueprint.forms.values()) == packed
    out = tmp_path / "out"
    out.mkdir()
    assert export.write(blueprint, out, source=source, layout=layout, dtype=torch.float32) == "standard"
    opens_in_transformers(out, logits_of(blueprint.build()))
    forms = export.read(out).forms  # only the first block, which shares nothing, can stay packed
    assert len(forms) == (7 if packed and layout == "unrolled" else 0) and all(n.startswith("model.layers.0.") for n in forms)


def test_unrolled_conv1d_keeps_its_biases(tmp_path, source):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=4, n_head=2, n_positions=24)).eval()
    for p in model.parameters():
        nn.init.normal_(p, 0.0, 0.1)
    blueprint = folded(model, [(foldgpt, dict(CURED, remove=0.25))])
    out = tmp_path / "out"
    out.mkdir()
    export.write(blueprint, out, source=source, layout="unrolled", dtype=torch.float32)
    opens_in_transformers(out, logits_of(blueprint.build()), atol=1e-4)


def test_standard_is_refused_by_name(tmp_path, source):
    with pytest.raises(BlockwrightError, match="lora"):
        export.write(folded(trained(), [(foldgpt, CURED)]), tmp_path, source=source, layout="standard")


@pytest.mark.parametrize(
    "later",
    [(finequant, {"bits": 8, "group_size": 16}), (dsnot, {"sparsity": 0.25}), (flexround, {"bits": 8, "iters": 2})],
    ids=lambda s: s[0].__name__,
)
@pytest.mark.parametrize("options", [SHARED, CURED], ids=["shared", "cured"])
def test_a_later_stage_treats_a_shared_weight_once_and_all_blocks_see_it(later, options, tmp_path, source):
    before = folded(trained(), [(foldgpt, options)])
    after = folded(trained(), [(foldgpt, options), later])
    places = {}
    for name, place in after.tensors.items():
        if "o_proj.weight" in name.replace(".base.", ".") and ".layers." in name:
            places.setdefault(name.rpartition(".")[2], []).append(place)
    assert places and all(len(found) == 5 and len(set(found)) == 3 for found in places.values())
    a, b = before.build(), after.build()
    for i, (old, new) in enumerate(zip(a.model.layers, b.model.layers, strict=True)):
        lora = ".base" if options is CURED and i else ""
        old, new = (x.get_submodule(f"self_attn.o_proj{lora}") for x in (old, new))
        weight = new.weight if isinstance(new, nn.Linear) else new.plain_weight()
        assert not torch.equal(weight, old.weight)
        near = (weight - old.weight).abs().max() <= 0.05 * old.weight.abs().max()
        assert near or float((weight == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    for name in after.tensors:
        if "lora_" in name:
            assert torch.equal(after.tensors.read([name])[name], before.tensors.read([name])[name])
    out = tmp_path / "out"
    out.mkdir()
    assert export.write(after, out, source=source, dtype=torch.float32) == "blockwright"
    assert torch.equal(logits_of(export.read(out).build()), logits_of(b))


class Killed(Exception):
    """The process is gone."""


@pytest.mark.parametrize("options", [CURED, dict(CURED, shared_lora=True, parent="mean")], ids=["private", "merged"])
def test_a_killed_run_goes_on_with_the_same_bits(options, tmp_path, monkeypatch):
    options = dict(options, gate_steps=25, cure_steps=25)
    whole = folded(trained(), [(foldgpt, options)], journal=tmp_path / "a").build()
    calls = []
    draw = method.Feed.draw

    def dies(self, rng):
        calls.append(1)
        if len(calls) in (23, 23 + 5 + 22):  # in the gates' training; then, after 5 more steps of it, in the cure's
            raise Killed
        return draw(self, rng)

    monkeypatch.setattr(method.Feed, "draw", dies)
    for _ in range(2):
        with pytest.raises(Killed):
            folded(trained(), [(foldgpt, options)], journal=tmp_path / "b")
    again = folded(trained(), [(foldgpt, options)], journal=tmp_path / "b").build()
    assert len(calls) == 22 + 1 + 5 + 21 + 1 + 5  # steps are journalled in twenties: 20 of 22, 20 of 21
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


# what is refused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(remove=0.84), "deletes 5 of 6 blocks, of which 5 are not protected. Allowed: fewer than 5"),
        (dict(remove=1.0), "remove=1.0. Allowed: 0 <= remove < 1"),
        (dict(remove=-0.1), "remove=-0.1"),
        (dict(group_size=0), "group_size=0. Allowed: a positive number"),
        (dict(group_size=-2), "group_size=-2"),
        (dict(r=0), "r=0"),
        (dict(gate_lr=0.0), "gate_lr=0.0"),
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(max_seq_length=1), "max_seq_length=1. Allowed: 2 or more"),
        (dict(protect=[0, 6]), r"protect=\[0, 6\]. Allowed: block numbers from -6 to 5"),
        (dict(protect=[-7]), r"protect=\[-7\]"),
        (dict(remove=0.5, tail_layers=4, cure_steps=1), "tail_layers=4. Allowed: up to the 3 blocks that stay"),
        (dict(tail_weight=-1.0), "tail_weight=-1.0"),
        (dict(kl_weight=float("inf")), "kl_weight=inf"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_any_work(options, told, monkeypatch):
    monkeypatch.setattr(Blueprint, "build", None)
    with pytest.raises(BlockwrightError, match=told):
        foldgpt(trained(), calibration=text(), **options)


def test_a_word_that_is_no_choice_is_refused():
    with pytest.raises(BlockwrightError, match="parent='last'. Allowed: first, importance, mean"):
        method._check_words({"parent": ("last", ("first", "importance", "mean"))})


def test_a_protected_block_stays(monkeypatch):
    monkeypatch.setattr(method, "train_gates", lambda *a, **kw: [0.0, 0.9, 0.1, 0.8, 0.7, 0.0])
    monkeypatch.setattr(method, "loss_without", lambda *a: 1.0)  # no choice is better than the gates'
    assert folded(trained(), [(foldgpt, dict(remove=2 / 6, protect=[0, -1]))]).origin == (0, 1, 3, 5)
    assert folded(trained(), [(foldgpt, dict(remove=2 / 6, protect=[]))]).origin == (1, 2, 3, 4)


def test_blocks_of_two_shapes_in_a_group_are_refused_with_their_shapes():
    blueprint = Blueprint.of_module(trained())
    name = "model.layers.2.mlp.up_proj.weight"
    short = torch.zeros(48, 32)
    mixed = blueprint.edited(tensors=blueprint.tensors.replaced([name], {name: method.Place(None, "short")}, {"short": short}))
    run = Run(mixed, calibration=text())
    with pytest.raises(BlockwrightError, match=r"blocks 1 and 2 cannot share: mlp.up_proj.weight is \(64, 32\) and \(48, 32\)"):
        method.share(run, group_size=2, parent="first", guarded={0}, score=[(1.0, 0.0)] * 6)


def test_two_vocabularies_are_refused():
    with pytest.raises(BlockwrightError, match=r"student's logits are \(1, 2, 5\), the teacher's \(1, 2, 6\)"):
        method.distillation(torch.zeros(1, 2, 5), torch.zeros(1, 2, 6), None)


class PeftModel(nn.Module):
    """As peft wraps a model."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model


def test_a_model_with_an_adapter_is_refused():
    with pytest.raises(BlockwrightError, match="PeftModel"):
        foldgpt(PeftModel(trained()), calibration=text())
    inside = copy.deepcopy(trained())
    inside.model.layers[1].self_attn.q_proj.lora_A = nn.ModuleDict({"default": nn.Linear(32, 2)})
    with pytest.raises(BlockwrightError, match=r"carries an adapter \(model.layers.1.self_attn.q_proj.lora_A.default"):
        foldgpt(inside, calibration=text())
    with pytest.raises(BlockwrightError, match=r"q_proj is lora. Allowed: a dense model"):
        foldgpt(foldgpt(trained(), calibration=text(), **CURED), calibration=text())


def test_the_better_of_both_choices_is_taken(monkeypatch):
    losses = {gone: loss_of(without(trained(), gone), text()[:16]) for gone in itertools.combinations(range(1, 6), 2)}
    by = {name: folded(trained(), [(foldgpt, dict(remove=1 / 3, ranking=name, gate_steps=1))]).origin for name in ("gates", "influence")}
    worst = max(losses, key=lambda gone: losses[gone])
    misled = [0.0 if i in worst else 1.0 for i in range(6)]
    monkeypatch.setattr(method, "train_gates", lambda *args, **options: misled)
    assert folded(trained(), [(foldgpt, dict(remove=1 / 3))]).origin == by["influence"]
    best = min(losses, key=lambda gone: losses[gone])
    misled[:] = [0.0 if i in best else 1.0 for i in range(6)]
    assert folded(trained(), [(foldgpt, dict(remove=1 / 3))]).origin == tuple(i for i in range(6) if i not in best)


def test_the_loss_without_blocks_is_that_of_the_smaller_model():
    run = Run(Blueprint.of_module(trained()), calibration=text())
    for gone in ((), (2,), (1, 4)):
        ours = method.loss_without(run, method.Feed(run, 5, 8), list(gone))
        windows = [loss_of(without(trained(), gone), text()[i : min(i + 5, 16)]) for i in range(0, 16, 5)]
        assert ours == pytest.approx(sum(windows) / len(windows), rel=1e-5)
