"""cfsp: scores and allocation against plain Python, surgery against a dense model with silenced channels, files, recovery, refusals."""

import copy
import itertools
import json
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language import text
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    BitNetForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import blockwright as bw
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.lora import LoraLinear
from blockwright.blocks.run import Run
from blockwright.compress import cfsp as method
from blockwright.compress.cfsp import cfsp
from blockwright.compress.dsnot import dsnot
from blockwright.compress.finequant import finequant
from blockwright.compress.flexround import flexround
from blockwright.compress.foldgpt import foldgpt
from blockwright.errors import BlockwrightError
from blockwright.recipes import export

V = 60
SIZES = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=None
)
CHANNELS = 96

# each: the model, its chain of blocks, linears into the channels, and out of them
MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=CHANNELS)),
              "model.layers", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    "llama, biases": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=CHANNELS, mlp_bias=True, tie_word_embeddings=True)),
              "model.layers", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, intermediate_size=CHANNELS)),
              "model.layers", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    "phi3": (lambda: Phi3ForCausalLM(Phi3Config(**SIZES, num_key_value_heads=2, intermediate_size=CHANNELS)),
              "model.layers", ("mlp.gate_up_proj",), "mlp.down_proj"),
    "neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=CHANNELS)),
             "gpt_neox.layers", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=32, n_inner=CHANNELS)),
             "transformer.h", ("mlp.c_fc",), "mlp.c_proj"),
    "opt": (lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=CHANNELS, word_embed_proj_dim=32, max_position_embeddings=64)),
            "model.decoder.layers", ("fc1",), "fc2"),
}  # fmt: skip


@cache
def model_of(name):
    torch.manual_seed(len(name))
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias") or "mlp" in n or "fc" in n:
                p.normal_(0, 0.3)  # biases are zero at first
    return model


def ids(n=5, length=16, seed=5):
    return torch.randint(0, V, (n, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, tokens=None):
    return model(ids(3, 11, seed=9) if tokens is None else tokens, use_cache=False).logits


def weight(model, name):
    """Outputs x inputs."""
    linear = model.get_submodule(name)
    return (linear.weight if isinstance(linear, nn.Linear) else linear.weight.T).detach()


def heard(model, path, out, tokens, mask=None):
    """For each block: its input and output [n, T, d], and the input of `out` [tokens, I], from one pass of the whole model."""
    found = [{} for _ in model.get_submodule(path)]
    handles = []
    for i, block in enumerate(model.get_submodule(path)):

        def at_block(m, args, kwargs, output, i=i):
            found[i]["x"] = args[0] if args else kwargs["hidden_states"]
            found[i]["y"] = output[0] if isinstance(output, tuple) else output

        handles.append(block.register_forward_hook(at_block, with_kwargs=True))
        hook = lambda m, args, i=i: found[i].__setitem__("channels", args[0].reshape(-1, args[0].shape[-1]))  # noqa: E731
        handles.append(block.get_submodule(out).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(tokens, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return found


def staged(model, stages, journal=None, mask=None, tokens=None):
    """The blueprint after some stages with their options."""
    run = Run(Blueprint.of_module(model), calibration=ids() if tokens is None else tokens, mask=mask, journal=journal)
    for number, (fn, options) in enumerate(stages):
        run.begin(f"{number}-{fn.__name__}")
        fn(run, **options)
    return run.model


# surgery


@pytest.mark.parametrize("channel_importance", ["wanda", "row", "three_w_one_wa"])
@pytest.mark.parametrize("name", MODELS)
def test_the_pruned_model_is_the_dense_one_with_its_least_channels_silenced(name, channel_importance):
    _, path, into, out = MODELS[name]
    model = model_of(name)
    pruned = cfsp(model, calibration=ids(), sparsity=0.4, granularity=8, a=0.2, channel_importance=channel_importance)
    silenced, widths = copy.deepcopy(model), []
    for i, facts in enumerate(heard(model, path, out, ids())):
        norm = facts["channels"].double().square().sum(0).sqrt().tolist()
        down = weight(model, f"{path}.{i}.{out}").tolist()
        ups = [half for n in into for half in weight(model, f"{path}.{i}.{n}").chunk(2 if n.endswith("gate_up_proj") else 1)]
        score = by_hand(down, [u.tolist() for u in ups], norm, channel_importance)
        width = weight(pruned, f"{path}.{i}.{out}").shape[1]
        widths.append(width)
        gone = sorted(range(CHANNELS), key=lambda k: (-score[k], k))[width:]
        linear = silenced.get_submodule(f"{path}.{i}.{out}")
        with torch.no_grad():
            (linear.weight if isinstance(linear, nn.Linear) else linear.weight.T)[:, gone] = 0
        keep = [k for k in range(CHANNELS) if k not in gone]  # ascending
        assert torch.equal(weight(pruned, f"{path}.{i}.{out}"), weight(model, f"{path}.{i}.{out}")[:, keep])
        if len(into) == 2:
            assert torch.equal(weight(pruned, f"{path}.{i}.{into[0]}"), weight(model, f"{path}.{i}.{into[0]}")[keep])
    assert sum(widths) == round(0.6 * 3 * CHANNELS / 8) * 8 and all(w % 8 == 0 for w in widths) and max(widths) < CHANNELS
    assert (logits_of(pruned) - logits_of(silenced)).abs().max() <= 1e-5
    assert (logits_of(pruned) - logits_of(model)).abs().max() > 1e-3
    removed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in pruned.parameters())
    rows = sum(weight(model, f"{path}.0.{n}").shape[0] // CHANNELS for n in into)
    biases = sum(rows for n in into[:1] if model.get_submodule(f"{path}.0.{n}").bias is not None)
    assert removed == sum(CHANNELS - w for w in widths) * (32 * (rows + 1) + biases)  # sliced, not masked
    treated = tuple(f".{n}.{t}" for n in (*into, out) for t in ("weight", "bias"))
    for key, value in pruned.state_dict().items():
        if not key.endswith(treated):
            assert torch.equal(value, model.state_dict()[key]), key


def by_hand(down, ups, norm, how, b=1.0, c=1.0):
    """The score of each channel, in Python numbers. down: [D][I]; ups: matrices [I][D]."""
    d, width = len(down), len(norm)
    if how == "wanda":
        return [sum(abs(down[r][k]) for r in range(d)) / d * norm[k] for k in range(width)]
    grids = [[[abs(down[r][k]) * norm[k] ** b for k in range(width)] for r in range(d)]]
    grids += [[[abs(up[k][r]) for k in range(width)] for r in range(d)] for up in ups]
    score = [0.0] * width
    for grid in grids:
        for k in range(width):
            for r in range(d):
                whole = sum(row[k] for row in grid) if how == "three_w_one_wa" else sum(grid[r])
                score[k] += (grid[r][k] / whole if whole else 0.0) / d
    return [s * n**c for s, n in zip(score, norm, strict=True)]


@settings(deadline=None, max_examples=30)
@given(
    d=st.integers(1, 6),
    width=st.integers(1, 9),
    gated=st.booleans(),
    how=st.sampled_from(["three_w_one_wa", "row", "wanda"]),
    b=st.sampled_from([0.0, 1.0, 2.0]),
    c=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 999),
)
def test_scores_follow_their_formula(d, width, gated, how, b, c, seed):
    rng = torch.Generator().manual_seed(seed)
    down, norm = torch.randn(d, width, generator=rng), torch.rand(width, generator=rng, dtype=torch.float64)
    ups = [torch.randn(width, d, generator=rng) for _ in range(2 if gated else 1)]
    down[:, 0] = 0  # a channel that goes nowhere
    norm[-1] = 0  # and one that is never on
    got = method.channel_scores(down, ups, norm, method=how, b=b, c=c)
    want = by_hand(down.tolist(), [u.tolist() for u in ups], norm.tolist(), how, b, c)
    assert got.tolist() == pytest.approx(want, rel=1e-9, abs=1e-300)


def test_the_papers_score_ranks_by_the_norm_alone_and_the_others_do_not():
    rng = torch.Generator().manual_seed(1)
    down, norm = torch.randn(16, 40, generator=rng) * torch.rand(40, generator=rng), torch.rand(40, generator=rng, dtype=torch.float64)
    ups = [torch.randn(40, 16, generator=rng) for _ in range(2)]
    order = norm.argsort()
    scores = {how: method.channel_scores(down, ups, norm, method=how, c=0.7) for how in ("three_w_one_wa", "row", "wanda")}
    assert torch.equal(scores["three_w_one_wa"].argsort(), order)
    assert torch.allclose(scores["three_w_one_wa"], 3 / 16 * norm**0.7, rtol=1e-12)
    assert not torch.equal(scores["row"].argsort(), order) and not torch.equal(scores["wanda"].argsort(), order)


def test_the_highest_are_taken_in_order_and_the_first_of_equal_ones():
    assert method.highest(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]
    assert method.highest(torch.zeros(100), 7).tolist() == list(range(7))


# importance of blocks


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_importance_and_norms_are_those_of_the_dense_model(name):
    _, path, _, out = MODELS[name]
    model = model_of(name)
    run = Run(Blueprint.of_module(model), calibration=ids(), batch=2)
    ffns = method.find_ffns(run.model)
    for metric in ("angular", "cosine", "mse", "mae", "constant"):
        facts = method.measure(run, ffns, metric)
        for mine, theirs in zip(facts, heard(model, path, out, ids()), strict=True):
            x, y = theirs["x"].double(), theirs["y"].double()
            cosine = nn.functional.cosine_similarity(x, y, dim=-1).clamp(-1, 1)
            want = {
                "angular": (cosine.arccos() / math.pi).sum() / 80,
                "cosine": 1 - cosine.mean(),
                "mse": ((x - y) ** 2).mean(),
                "mae": (x - y).abs().mean(),
                "constant": torch.tensor(1.0),
            }[metric]
            assert mine["importance"] == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
            assert torch.allclose(mine["norm"], theirs["channels"].double().square().sum(0).sqrt(), rtol=1e-5)


def test_a_block_that_does_nothing_counts_nothing_and_one_that_turns_its_input_a_half_turn():
    x = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(0))
    assert method.importance(x, x) == 0.0 and method.importance(x, 3 * x) < 1e-6
    assert method.importance(x, -x) * 28 == pytest.approx(28, abs=1e-5)
    zeros = torch.zeros_like(x)
    assert method.importance(x, zeros) == method.importance(zeros, x) == method.importance(zeros, zeros) == 0.5
    nudged = x.clone()
    nudged[..., 0] += 1e-3 * x.norm(dim=-1)  # an angle whose cosine is 1 - 5e-7
    want = torch.atan2(1e-3 * (1 - (x[..., 0] / x.norm(dim=-1)) ** 2).sqrt(), 1 + 1e-3 * x[..., 0] / x.norm(dim=-1)).mean() / math.pi
    assert method.importance(x, nudged) == pytest.approx(want.item(), rel=1e-3)
    model = copy.deepcopy(model_of("llama"))
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    run = Run(Blueprint.of_module(model), calibration=ids())
    found = [f["importance"] for f in method.measure(run, method.find_ffns(run.model))]
    assert found[1] == 0.0 and found[0] > 0.1 and found[2] > 0.1


def test_each_sample_goes_through_each_block_once(monkeypatch):
    rows = []
    module = type(model_of("llama").model.layers[0])
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda self, x, *args, **kwargs: rows.append(len(x)) or forward(self, x, *args, **kwargs))
    cfsp(model_of("llama"), calibration=ids(11))
    assert sum(rows) == 3 * 11 + 1  # and one sample once through the first, to see what blocks return


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_the_padding_makes_no_difference(name, side):
    mask = torch.ones_like(ids())
    mask[1::2, slice(0, 6) if side == "left" else slice(11, 16)] = 0
    other = torch.where(mask.bool(), ids(), (ids() + 5) % V)
    options = dict(sparsity=0.4, granularity=1, recovery_steps=2)
    a, b = (cfsp(model_of(name), calibration=tokens, mask=mask, **options) for tokens in (ids(), other))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    run = Run(Blueprint.of_module(model_of(name)), calibration=ids(), mask=mask, batch=2)
    _, path, _, out = MODELS[name]
    real = mask.bool()
    for mine, theirs in zip(method.measure(run, method.find_ffns(run.model)), heard(model_of(name), path, out, ids(), mask), strict=True):
        x, y = (theirs[key].double()[real] for key in "xy")
        want = (nn.functional.cosine_similarity(x, y, dim=-1).clamp(-1, 1).arccos() / math.pi).mean()
        assert mine["importance"] == pytest.approx(want.item(), rel=1e-5)
        assert torch.allclose(mine["norm"], theirs["channels"].double()[real.flatten()].square().sum(0).sqrt(), rtol=1e-5)


# allocation


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_weights_of_blocks_follow_the_official_scale():
    tokens = 128 * 1024  # the official code: sums over this many tokens, times 1e-4
    mean = [0.3, 0.1, 0.08, 0.2]
    sums = [tokens * v for v in mean]
    for a in (1.0, 0.0, 2.5):
        want = [sigmoid(a * (s - sum(sums) / 4) / 1e4) for s in sums]
        assert method.coarse_weights(mean, a) == pytest.approx(want, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    units=st.lists(st.integers(1, 20), min_size=12, max_size=12),
    sparsity=st.floats(0.01, 0.95),
)
def test_shares_average_exactly_what_is_to_stay_and_none_is_whole(values, units, sparsity):
    sizes = [128 * n for n in units[: len(values)]]
    u = [sigmoid(13.1072 * (v - sum(values) / len(values))) for v in values]
    shares = method.keep_shares(u, sizes, sparsity)
    assert sum(k * n for k, n in zip(shares, sizes, strict=True)) == pytest.approx((1 - sparsity) * sum(sizes), rel=1e-9)
    assert min(shares) > 0 and max(shares) < 1
    order = sorted(range(len(u)), key=lambda i: u[i])
    assert all(shares[i] <= shares[j] + 1e-12 for i, j in itertools.pairwise(order))
    if len(set(values)) == 1:
        assert shares == pytest.approx([1 - sparsity] * len(shares))


def test_shares_by_hand():
    assert method.keep_shares([0.4, 0.6], [100, 100], 0.5) == pytest.approx([0.4, 0.6])
    # 0.9 / 0.5 * 0.8 > 1: deviations of 0.4 are shrunk to 0.5 * (1 / 0.8 - 1) / 1.05 = 0.11905, so that keep is 0.8 (1 + 0.2381)
    assert method.keep_shares([0.1, 0.9], [100, 100], 0.2) == pytest.approx([0.8 - 0.2 / 1.05, 0.8 + 0.2 / 1.05])
    assert method.keep_shares([0.1, 0.9], [300, 100], 0.5) == pytest.approx([0.5 - 0.5 / 3 / 1.05, 0.5 + 0.5 / 1.05])  # 200 of 400
    assert method.keep_shares([0.1, 0.9], [100, 100], 0.0) == [1.0, 1.0]


@settings(deadline=None, max_examples=60)
@given(
    u=st.lists(st.floats(0.05, 0.95), min_size=1, max_size=10),
    units=st.lists(st.integers(4, 20), min_size=10, max_size=10),
    spare=st.integers(0, 127),
    sparsity=st.floats(0.0, 0.6),
)
def test_widths_are_multiples_with_the_exact_total(u, units, spare, sparsity):
    sizes = [128 * n + spare for n in units[: len(u)]]
    widths = method.allocate(u, sizes, sparsity=sparsity, granularity=128)
    if not sparsity:
        assert widths == sizes
        return
    wanted = (1 - sparsity) * sum(sizes)
    most = sum(n // 128 * 128 for n in sizes)
    assert all(w % 128 == 0 and 0 <= w <= n for w, n in zip(widths, sizes, strict=True))
    assert abs(sum(widths) - min(wanted, most)) <= 64 + 1e-6
    even = method.allocate([0.5] * len(u), [1280] * len(u), sparsity=0.3, granularity=128)
    assert max(even) - min(even) <= 128
    shares = method.keep_shares(u, sizes, sparsity)
    if sum(widths) < most:
        assert all(abs(w - k * n) < 256 or n // 128 * 128 < k * n for w, k, n in zip(widths, shares, sizes, strict=True))


def test_a_block_that_does_more_keeps_more():
    model = copy.deepcopy(model_of("llama"))
    with torch.no_grad():
        for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            linear.weight *= 0.3
    widths = [b.mlp.down_proj.in_features for b in cfsp(model, calibration=ids(), sparsity=0.5, granularity=8, a=0.2).model.layers]
    assert widths[2] < min(widths[:2]) and sum(widths) == 144
    strong = [b.mlp.down_proj.in_features for b in cfsp(model, calibration=ids(), sparsity=0.5, granularity=8, a=0.4).model.layers]
    assert strong[2] < widths[2] and sum(strong) == 144
    for options in ({"a": 0.0}, {"block_importance": "constant"}):
        assert [
            b.mlp.down_proj.in_features for b in cfsp(model, calibration=ids(), sparsity=0.5, granularity=8, **options).model.layers
        ] == [48] * 3


def test_the_granularity_fits_the_model_where_none_is_given():
    found = {size: method._fitting_granularity(size) for size in (1, 7, 8, 96, 127, 352, 1023, 1024, 11008)}
    assert found == {1: 1, 7: 1, 8: 1, 96: 8, 127: 8, 352: 32, 1023: 64, 1024: 128, 11008: 128}
    pruned = cfsp(model_of("llama"), calibration=ids(), sparsity=0.3)  # 3 * 96 * 0.7 = 201.6
    assert sum(b.mlp.down_proj.in_features for b in pruned.model.layers) == 200


def test_nothing_is_cut_at_sparsity_0():
    same = cfsp(model_of("llama"), calibration=ids(), sparsity=0.0, granularity=64)  # of which 96 is no multiple
    assert all(torch.equal(p, q) for p, q in zip(same.parameters(), model_of("llama").parameters(), strict=True))
    assert staged(model_of("llama"), [(cfsp, dict(sparsity=0.0))]).forms == {}


def test_cut_twice_is_cut_from_what_is_left():
    twice = staged(model_of("phi3"), [(cfsp, dict(sparsity=0.5, a=0.2)), (cfsp, dict(sparsity=0.5, granularity=4, a=0.2))])
    found = [b.mlp.down_proj.in_features for b in twice.build().model.layers]
    assert sum(found) == 72 and [b.mlp.gate_up_proj.out_features for b in twice.build().model.layers] == [2 * w for w in found]


# with other stages, in files

CUT = dict(sparsity=0.4, granularity=16, a=0.2)


def written(blueprint, folder, **options):
    for name in ("source", "out"):
        (folder / name).mkdir()
    return export.write(blueprint, folder / "out", source=folder / "source", dtype=torch.float32, **options), folder / "out"


@pytest.mark.parametrize("name", MODELS)
def test_written_and_read_the_logits_are_the_same(name, tmp_path):
    blueprint = staged(model_of(name), [(cfsp, CUT)])
    layout, out = written(blueprint, tmp_path)
    assert layout == "blockwright"
    again = export.read(out).build()
    assert torch.equal(logits_of(again), logits_of(blueprint.build()))
    widths = {again.get_submodule(f"{MODELS[name][1]}.{i}.{MODELS[name][3]}").weight.numel() for i in range(3)}
    assert len(widths) > 1  # of their own in different blocks


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_to_one_width_it_opens_in_plain_transformers(name, packed, tmp_path):
    blueprint = staged(model_of(name), [(cfsp, CUT)] + [(finequant, {"bits": 8, "group_size": 16})] * packed)
    layout, out = written(blueprint, tmp_path, layout="dense")
    assert layout == "standard"
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert (logits_of(model.eval()) - logits_of(blueprint.build())).abs().max() <= 1e-5
    own = [blueprint.build().get_submodule(f"{MODELS[name][1]}.{i}.{MODELS[name][3]}") for i in range(3)]
    widest = max(m.in_features if hasattr(m, "in_features") else m.weight.shape[0] for m in own)
    saved = json.loads((out / "config.json").read_text())
    assert widest in [saved.get(key) for key in ("intermediate_size", "ffn_dim", "n_inner")] and widest < CHANNELS
    assert export.predicted_bytes(blueprint, torch.float32, "dense") == sum(4 * p.numel() for p in model.parameters())


def test_a_block_that_keeps_all_its_channels_sets_the_width(tmp_path):
    blueprint = staged(model_of("llama"), [(cfsp, dict(sparsity=0.05, granularity=8))])
    widths = [b.mlp.down_proj.in_features for b in blueprint.build().model.layers]
    assert max(widths) == CHANNELS > min(widths)
    layout, out = written(blueprint, tmp_path, layout="dense")
    assert layout == "standard" and json.loads((out / "config.json").read_text())["intermediate_size"] == CHANNELS
    assert (logits_of(AutoModelForCausalLM.from_pretrained(out).eval()) - logits_of(blueprint.build())).abs().max() <= 1e-5


def test_the_standard_layout_is_refused_by_name(tmp_path):
    with pytest.raises(BlockwrightError, match=r"gate_proj is \d+ x 32, and config.json has no place for a size of its own"):
        written(staged(model_of("llama"), [(cfsp, CUT)]), tmp_path, layout="standard")


@pytest.mark.parametrize(
    "later",
    [(flexround, {"bits": 8, "group_size": 16, "iters": 2}), (finequant, {"bits": 8, "group_size": 16}), (dsnot, {"sparsity": 0.25})],
    ids=lambda s: s[0].__name__,
)
def test_a_later_stage_treats_what_is_left(later, tmp_path):
    cut = staged(model_of("llama"), [(cfsp, CUT)]).build()
    blueprint = staged(model_of("llama"), [(cfsp, CUT), later])
    model = blueprint.build()
    for old, new in zip(cut.model.layers, model.model.layers, strict=True):
        down = new.mlp.down_proj
        assert down.in_features == old.mlp.down_proj.in_features < CHANNELS
        plain = down.weight if isinstance(down, nn.Linear) else down.plain_weight()
        near = (plain - old.mlp.down_proj.weight).abs().max() <= 0.02 * old.mlp.down_proj.weight.abs().max()
        assert near or float((plain == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    _, out = written(blueprint, tmp_path)
    assert torch.equal(logits_of(export.read(out).build()), logits_of(model))


def test_the_main_job_cuts_rounds_and_packs(small_job, tmp_path):
    small_job(tmp_path)
    texts = {
        name: {"text": str(tmp_path / f"{file}.txt"), "num": 4, "length": 24}
        for name, file in (("calibration", "learn"), ("evaluation", "judge"))
    }
    job = {
        "model": str(tmp_path / "model"),
        "stages": [
            {"cfsp": {"sparsity": 0.5, "granularity": 32, "recovery_steps": 2}},
            {"flexround": {"bits": 4, "group_size": 32, "iters": 2}},
        ],
        "out": str(tmp_path / "out"),
        "measure": {"use": False},
        "dtype": "fp32",
        **texts,
    }
    report = bw.run(job)
    opened = bw.load(tmp_path / "out", dtype=torch.float32)
    widths = [b.mlp.down_proj.in_features for b in opened.model.layers]
    assert sum(widths) in (128, 160) and all(w % 32 == 0 for w in widths)  # 144 is half of 3 * 96
    assert [f["form"] for f in export.read(tmp_path / "out").forms.values()] == ["packed"] * 21
    tokens = torch.arange(40).view(2, 20)
    assert torch.equal(logits_of(opened, tokens), logits_of(export.read(tmp_path / "out").build(dtype=torch.float32), tokens))
    assert [s["name"] for s in report["stages"]] == ["cfsp", "flexround"] and len(report["stages"][0]["curves"]["recovery: loss"]) == 2
    bw.export(tmp_path / "out", tmp_path / "plain", to="dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    assert (logits_of(plain, tokens) - logits_of(opened, tokens)).abs().max() <= 1e-4


def test_blocks_that_share_weights_are_cut_once(tmp_path):
    shared = (foldgpt, dict(remove=0.0, group_size=2, protect=[0]))
    before = staged(model_of("llama, biases"), [shared])
    after = staged(model_of("llama, biases"), [shared, (cfsp, dict(CUT, recovery_steps=2))])
    model = after.build()
    first, second, third = (b.mlp for b in model.model.layers)
    assert second.down_proj.weight is third.down_proj.weight and second.up_proj.bias is third.up_proj.bias
    assert first.down_proj.in_features + second.down_proj.in_features in (112, 128)  # of 192 stored channels 115.2 stay
    assert not torch.equal(second.up_proj.weight, before.build().model.layers[1].mlp.up_proj.weight[: second.up_proj.out_features])
    _, out = written(after, tmp_path)
    assert torch.equal(logits_of(export.read(out).build()), logits_of(model))


def test_bf16_is_kept_and_the_tie_too():
    small = cfsp(copy.deepcopy(model_of("llama, biases")).bfloat16(), calibration=ids(), **CUT, recovery_steps=2)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16} and small.lm_head.weight is small.model.embed_tokens.weight


# recovery


@cache
def trained():
    """A small Llama that has learned the language."""
    torch.manual_seed(0)
    sizes = dict(SIZES, vocab_size=12, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=CHANNELS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rng = torch.Generator().manual_seed(1)
    for _ in range(120):
        rows = text()[torch.randint(0, 64, (16,), generator=rng)]
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def loss_of(model):
    chances = model(text(), use_cache=False).logits[:, :-1].log_softmax(-1)
    return -chances.gather(-1, text()[:, 1:, None]).mean().item()


RECOVERED = dict(sparsity=0.6, recovery_steps=3, recovery_lr=1e-2, r=3, batch_size=4)


def test_recovery_wins_back_a_part_of_what_pruning_lost():
    hurt = cfsp(trained(), calibration=text(), sparsity=0.8)
    better = cfsp(trained(), calibration=text(), **dict(RECOVERED, sparsity=0.8, recovery_steps=40, batch_size=16))
    dense, a, b = (loss_of(m) for m in (trained(), hurt, better))
    assert a - dense > 0.1 and b - dense < 0.5 * (a - dense)
    assert [p.shape for p in better.parameters()] == [p.shape for p in hurt.parameters()]
    assert not any(isinstance(m, LoraLinear) for m in better.modules())
    for name, p in better.named_parameters():
        same = torch.equal(p, hurt.get_parameter(name))
        assert same == (".layers." not in name or "norm" in name), name  # every linear of the blocks, and nothing else


def test_what_was_trained_is_what_is_merged(monkeypatch):
    found, recover = [], method.recover
    monkeypatch.setattr(method, "recover", lambda *a, **kw: found.append(recover(*a, **kw)) or found[0])
    merged = cfsp(trained(), calibration=text(), **RECOVERED)
    [tuned] = found
    assert (logits_of(tuned, text()) - logits_of(merged, text())).abs().max() <= 1e-4
    lora = [m for m in tuned.modules() if isinstance(m, LoraLinear)]
    assert len(lora) == 21 and all(m.lora_alpha == 2 * m.r == 2 * len(m.lora_A) for m in lora)
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == {n for n, _ in tuned.named_parameters() if ".lora_" in n}


def test_ranks_follow_the_importance_of_blocks_and_add_up(monkeypatch):
    found = []
    monkeypatch.setattr(method, "add_lora", lambda run, model, *, r, **kw: found.append(list(r)) or [nn.Parameter(torch.zeros(1))])
    monkeypatch.setattr(method, "coarse_weights", lambda values, a: [0.1, 0.3, 0.6])
    monkeypatch.setattr(Run, "train", lambda *a, **kw: [])
    monkeypatch.setattr(method, "_take_merged", lambda *a, **kw: None)
    for options in ({"r": 10}, {"r": 10, "ranks": "uniform"}, {"r": 1}):
        cfsp(trained(), calibration=text(), recovery_steps=1, **options)
    assert found == [[3, 9, 18], [10, 10, 10], [1, 1, 1]]


def test_the_rate_falls_along_a_cosine(monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    cfsp(trained(), calibration=text(), **dict(RECOVERED, recovery_steps=4))
    assert rates == pytest.approx([1e-2 * v for v in (1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4)])


def test_each_option_of_the_recovery_counts():
    def recovered(**options):
        return logits_of(cfsp(trained(), calibration=text(), **{**RECOVERED, **options}), text())

    base = recovered()
    for name, value in {
        "recovery_steps": 4, "recovery_lr": 1e-3, "r": 2, "ranks": "uniform", "batch_size": 3, "max_seq_length": 12, "a": 4.0,
    }.items():  # fmt: skip
        assert (recovered(**{name: value}) - base).abs().max() > 1e-4, name
    assert torch.equal(recovered(gradient_checkpointing=True), base)


class Killed(Exception):
    """The process is gone."""


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    stages = [(cfsp, dict(RECOVERED, recovery_steps=25))]
    whole = staged(trained(), stages, journal=tmp_path / "a", tokens=text()).build()
    draw, importance, calls = method.Feed.draw, method.importance, []

    def dies(of, at):
        def call(*args):
            calls.append(1)
            if len(calls) == at:
                raise Killed
            return of(*args)

        return call

    monkeypatch.setattr(method, "importance", dies(importance, 2))  # after the first block
    with pytest.raises(Killed):
        staged(trained(), stages, journal=tmp_path / "b", tokens=text())
    monkeypatch.setattr(method, "importance", importance)
    monkeypatch.setattr(method.Feed, "draw", dies(draw, 2 + 23))
    with pytest.raises(Killed):
        staged(trained(), stages, journal=tmp_path / "b", tokens=text())
    again = staged(trained(), stages, journal=tmp_path / "b", tokens=text()).build()
    assert len(calls) == 2 + 23 + 5  # steps are journalled in twenties
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


# what is refused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(sparsity=1.0), "sparsity=1.0. Allowed: 0 <= sparsity < 1"),
        (dict(sparsity=-0.1), "sparsity=-0.1"),
        (dict(sparsity=float("nan")), "sparsity=nan"),
        (dict(granularity=0), "granularity=0"),
        (dict(sparsity=0.97, granularity=8), r"block \d would keep 0 channels. Allowed: at least granularity=8"),
        (dict(granularity=128), "block 0 would keep 0 channels"),
        (dict(a=-1.0), "a=-1.0"),
        (dict(b=float("nan")), "b=nan"),
        (dict(c=float("inf")), "c=inf"),
        (dict(block_importance="angle"), "block_importance='angle'. Allowed: angular, cosine, mse, mae, constant"),
        (dict(channel_importance="paper"), "channel_importance='paper'. Allowed: wanda, row, three_w_one_wa"),
        (dict(ranks="all"), "ranks='all'. Allowed: importance, uniform"),
        (dict(recovery_steps=-1), "recovery_steps=-1"),
        (dict(recovery_lr=0.0), "recovery_lr=0.0"),
        (dict(r=0), "r=0"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(recovery_steps=1, max_seq_length=1), "max_seq_length=1. Allowed: 2 or more"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_any_work(options, told, monkeypatch):
    monkeypatch.setattr(method, "measure", None)
    with pytest.raises(BlockwrightError, match=told):
        method.cfsp.__wrapped__.__wrapped__(Run(Blueprint.of_module(model_of("llama")), calibration=ids()), **options)


def test_a_block_that_the_allocation_leaves_empty_is_named():
    model = copy.deepcopy(model_of("llama"))
    with torch.no_grad():
        for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            linear.weight.zero_()
    with pytest.raises(BlockwrightError, match="sparsity=0.6: block 1 would keep 0 channels"):
        cfsp(model, calibration=ids(), sparsity=0.6, granularity=32, a=5.0)


def experts():
    sizes = dict(SIZES, num_key_value_heads=2, intermediate_size=48)
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2, num_experts_per_tok=1))


def normed():
    return BitNetForCausalLM(BitNetConfig(**SIZES, num_key_value_heads=2, intermediate_size=48))


def two():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48))
    model.model.layers[1].second = copy.deepcopy(model.model.layers[1].mlp)
    return model


def nameless():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48))
    model.model.layers[1].mlp = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    return model


def adapted():
    return foldgpt(trained(), calibration=text(), remove=0.0, group_size=3, protect=[], cure_steps=1, tail_layers=1)


def packed():
    return finequant(model_of("llama"), bits=8, group_size=16)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (experts, r"block model.layers.0 has mlp.experts"),
        (normed, r"model.layers.0.mlp.ffn_sub_norm stands between"),
        (adapted, r"model.layers.0.mlp.gate_proj is a LoraLinear"),
        (packed, r"model.layers.0.mlp.gate_proj is a PackedLinear"),
    ],
)
def test_other_feed_forward_layers_are_refused_by_name(make, told):
    with pytest.raises(BlockwrightError, match=told + r".*Allowed: one feed-forward layer.*gate_proj, up_proj, down_proj"):
        cfsp(make(), calibration=ids() % 12)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (two, "block b.1 has 2 feed-forward layers"),
        (nameless, "block b.1 has no feed-forward layers of a known form; its linears are self_attn.q_proj"),
    ],
)
def test_a_block_with_two_or_without_one_is_refused_with_what_it_has(make, told):
    with pytest.raises(BlockwrightError, match=told):
        method.find_ffn(make().model.layers[1], "b.1")


def test_a_fused_matrix_that_is_not_two_halves_is_refused():
    block = model_of("phi3").model.layers[0]
    odd = copy.deepcopy(block)
    odd.mlp.gate_up_proj = nn.Linear(32, 3 * CHANNELS)
    with pytest.raises(BlockwrightError, match="b.0.mlp.gate_up_proj has 288 outputs, not 192"):
        method.find_ffn(odd, "b.0")


def test_a_half_shared_feed_forward_layer_is_refused():
    blueprint = Blueprint.of_module(model_of("llama"))
    name = "model.layers.{}.mlp.down_proj.weight"
    tensors = blueprint.tensors.replaced([name.format(2)], {name.format(2): blueprint.tensors[name.format(0)]}, {})
    with pytest.raises(BlockwrightError, match="block model.layers.2 shares mlp.down_proj with an earlier block, and not the rest"):
        method.find_ffns(blueprint.edited(tensors=tensors))


def test_activations_that_are_not_finite_are_told_by_name():
    model = copy.deepcopy(model_of("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e38)
        model.model.layers[1].mlp.gate_proj.weight.fill_(1e38)
    with pytest.raises(BlockwrightError, match=r"output of block model\.layers\.1.*(nan|inf)"):
        cfsp(model, calibration=ids())


def test_the_plan_grows_with_recovery_and_shrinks_with_sparsity():
    options = dict(sparsity=0.3, recovery_steps=0, batch_size=2, max_seq_length=128, gradient_checkpointing=False)
    without = method.plan(block_parameters=10**6, tokens=8192, **options)
    with_it = method.plan(block_parameters=10**6, tokens=8192, **dict(options, recovery_steps=64))
    assert without["passes"] == 1 and with_it["passes"] == 1 + 3 * 64 * 256 / 8192
    assert without["resident"] == 0 and with_it["resident"] > 1 and without["layers"] == pytest.approx(0.8)
