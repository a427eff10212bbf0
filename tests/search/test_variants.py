"""Attention and feed-forward layers that do less: how they are made, what they do in a model and its cache, files, what they cost."""

import copy
import inspect

import pytest
import torch
from parents import (
    ATTENTION,
    FFN,
    block_of,
    chain_of,
    every_model,
    grouped,
    ids,
    learn_of,
    logits_of,
    model_of,
    parts_of,
    run_of,
    with_options,
)
from transformers import (
    AutoModelForCausalLM,
)
from transformers.cache_utils import DynamicCache

from blockwright.blocks import deployment, layers
from blockwright.blocks.deployment import Costs, Deployment, Times, kv_bytes, measure_times, time_of
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.replacement import Scorer
from blockwright.blocks.subblocks import Option, contributions, mean_abs, mean_heads, variant
from blockwright.errors import BlockwrightError
from blockwright.recipes import export, outcome
from blockwright.search.puzzle import Library, find_all, realise, weigh

# the variants, made without training


@every_model
def test_the_parents_options_in_every_slot_are_the_parent_bit_for_bit(name):
    model = model_of(name)
    child = with_options(model, [(ATTENTION, FFN)] * len(chain_of(model)))
    assert torch.equal(logits_of(child, ids()), logits_of(model, ids()))
    scorer = Scorer(run_of(model, ids()), 4)
    for i, parts in enumerate(parts_of(model)):
        _, x, _ = block_of(model, i)
        made = [variant(chain_of(model)[i], parts, option) for option in (ATTENTION, FFN)]
        assert all(abs(score) < 1e-7 for score in scorer.of_variants(i, x, [*made, {}]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "neox"])
def test_a_channels_contribution_is_how_far_the_output_moves_without_it(name):
    model = model_of(name)
    block, x, _ = block_of(model, 1)
    [parts] = [parts_of(model)[1]]
    out = block.module.get_submodule(parts.ffn.out)
    heard = []
    handle = out.register_forward_pre_hook(lambda m, args: heard.append(args[0].reshape(-1, parts.ffn.size).double()))
    block.outputs(x)
    handle.remove()
    inner = torch.cat(heard)
    w = layers.matrix(out).double()
    whole = inner @ w.T
    brute = []
    for k in range(parts.ffn.size):
        silenced = inner.clone()
        silenced[:, k] = 0
        brute.append((whole - silenced @ w.T).norm(dim=1).mean())
    brute = torch.stack(brute)
    found = mean_abs(block, parts, x)
    assert torch.allclose(found, inner.abs().mean(0), rtol=1e-10, atol=0)
    assert torch.allclose(contributions(found, w), brute, rtol=1e-10, atol=1e-10)

    keep = sorted(range(parts.ffn.size), key=lambda k: -brute[k].item())[:40]
    keep = torch.tensor(sorted(keep))
    made = variant(block.module, parts, Option("ffn", "width", 40), found)
    for linear in parts.ffn.into:  # the same channels in all matrices
        assert torch.equal(layers.matrix(made[linear]), layers.matrix(block.module.get_submodule(linear))[keep])
    assert torch.equal(layers.matrix(made[parts.ffn.out]), layers.matrix(out)[:, keep])


def test_heads_are_averaged_in_runs():
    rows = torch.arange(8.0).reshape(8, 1).repeat(1, 3)  # 4 heads of 2 outputs
    assert mean_heads(rows, 4, 2)[:, 0].tolist() == [1.0, 2.0, 5.0, 6.0]
    assert mean_heads(rows, 4, 1)[:, 0].tolist() == [3.0, 4.0]
    assert mean_heads(torch.tensor([1.0, 2, 3, 4]), 4, 2).tolist() == [1.5, 3.5]


@grouped
@pytest.mark.parametrize("heads", [2, 1])
def test_heads_that_are_copies_are_merged_without_loss(name, heads):
    model = copy.deepcopy(model_of(name))
    for block in chain_of(model):
        for linear in (block.self_attn.k_proj, block.self_attn.v_proj):
            for p in linear.parameters():
                own = p.data.unflatten(0, (heads, 4 // heads, 4))
                p.data = own[:, :1].expand_as(own).reshape(p.shape).contiguous()
    child = with_options(model, [(Option("attention", "heads", heads), FFN)] * 3)
    assert (logits_of(child, ids()) - logits_of(model, ids())).abs().max() < 1e-5 * logits_of(model, ids()).abs().max()
    other = with_options(model_of(name), [(Option("attention", "heads", heads), FFN)] * 3)
    assert (logits_of(other, ids()) - logits_of(model_of(name), ids())).abs().max() > 1e-3
    assert chain_of(child)[0].self_attn.num_key_value_groups == 8 // heads


@grouped
def test_linear_attention_is_the_parents_on_one_token(name):
    model = copy.deepcopy(model_of(name)).double()
    child = with_options(model, [(Option("attention", "linear"), FFN)] * 3)
    one, more = ids()[:, :1], ids()[:, :5]
    assert (logits_of(child, one) - logits_of(model, one)).abs().max() < 1e-10
    assert (logits_of(child, more) - logits_of(model, more)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_a_linear_feed_forward_layer_is_the_product_of_its_matrices(name):
    model = model_of(name)
    block, parts = chain_of(model)[0], parts_of(model)[0]
    [new] = [m for n, m in variant(block, parts, Option("ffn", "linear")).items() if n != parts.ffn_norm]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    up, down = block.get_submodule(parts.ffn.into[-1]), block.get_submodule(parts.ffn.out)
    assert torch.allclose(new(x), down(up(x)), rtol=1e-4, atol=1e-5)


# what the variants do in a model


@every_model
def test_a_model_without_some_or_any_attention_generates_with_a_cache_as_without(name):
    model = model_of(name)
    count = len(chain_of(model))
    key = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    gone = Option("attention", "none")
    for picks in ([gone, *[ATTENTION] * (count - 1)], [*[ATTENTION] * (count - 1), gone], [gone] * count):
        child = with_options(model, [(attention, FFN) for attention in picks])
        cache, outs = DynamicCache(config=child.config), []
        with torch.no_grad():
            for part in (ids()[:, :5], ids()[:, 5:6], ids()[:, 6:7], ids()[:, 7:]):
                outs.append(child(part, use_cache=True, **{key: cache}).logits)
        full = logits_of(child, ids())
        assert (torch.cat(outs, 1) - full).abs().max() < 1e-5 * full.abs().max().clamp(min=1)
        kept = [layer.keys.numel() > 0 for layer in cache.layers[:count]]
        assert kept == [option.kind == "parent" for option in picks] and cache.get_seq_length() == 12
        out = child.generate(ids()[:2], max_new_tokens=5, do_sample=False)
        want = ids()[:2]
        for _ in range(5):
            want = torch.cat([want, logits_of(child, want)[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(out, want)
        beams = child.generate(ids()[:2], max_new_tokens=4, num_beams=3, do_sample=False)
        assert torch.equal(beams, child.generate(ids()[:2], max_new_tokens=4, num_beams=3, do_sample=False, use_cache=False))


@grouped
def test_fewer_heads_and_linear_attention_keep_a_smaller_cache_and_none(name):
    child = with_options(model_of(name), [(Option("attention", k, s), FFN) for k, s in (("heads", 1), ("linear", 0), ("heads", 2))])
    cache = DynamicCache(config=child.config)
    key = "cache" if "cache" in inspect.signature(child.forward).parameters else "past_key_values"
    with torch.no_grad():
        first = child(ids()[:, :8], use_cache=True, **{key: cache}).logits
        second = child(ids()[:, 8:], use_cache=True, **{key: cache}).logits
    assert (torch.cat([first, second], 1) - logits_of(child, ids())).abs().max() < 1e-4
    assert [layer.keys.numel() // (6 * 12 * 4) for layer in cache.layers] == [1, 0, 2]


def silenced(model, picks, kept):
    """The parent with hooks and weights by which it computes what the child should: no cheaper, and by other code."""
    model = copy.deepcopy(model)
    for i, (block, (attention, ffn)) in enumerate(zip(chain_of(model), picks, strict=True)):
        if attention.kind == "none":
            block.self_attn.register_forward_hook(lambda m, args, out: (torch.zeros_like(out[0]), None))
        if attention.kind == "heads":
            for p in (*block.self_attn.k_proj.parameters(), *block.self_attn.v_proj.parameters()):
                heads = list(p.data.split(4))
                each = 4 // attention.size
                p.data = torch.cat([sum(heads[h // each * each : h // each * each + each]) / each for h in range(4)])
        if ffn.kind == "none":
            block.mlp.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
        if ffn.kind == "width":
            gone = [k for k in range(96) if k not in kept[i]]
            block.mlp.down_proj.weight.data[:, gone] = 0
    return model


PICKS = [
    (Option("attention", "heads", 2), Option("ffn", "width", 40)),
    (Option("attention", "none"), FFN),
    (Option("attention", "heads", 1), Option("ffn", "none")),
]


def child_of(model, picks, tokens=None, **options):
    """The model with these options as the method makes it, and the blueprint of that."""
    tokens = ids() if tokens is None else tokens
    run = run_of(model, tokens)
    parts = find_all(run.model)
    library = Library(parts, by="puzzle", widths=[0.4], granularity=8)
    learn = learn_of(**options)
    realise(run, parts, picks, weigh(run, parts, library, learn=learn, windows=2), learn=learn)
    return run.model


@grouped
def test_the_child_is_its_parent_with_silenced_parts(name):
    model = model_of(name)
    blueprint = child_of(model, PICKS)
    block, x, _ = block_of(model, 0)
    inner = []
    handle = block.module.mlp.down_proj.register_forward_pre_hook(lambda m, args: inner.append(args[0].reshape(-1, 96).double()))
    block.outputs(x)
    handle.remove()
    score = torch.cat(inner).abs().mean(0) * block.module.mlp.down_proj.weight.double().norm(dim=0)
    kept = {0: score.topk(40).indices.tolist()}
    child = blueprint.build()
    assert (logits_of(child, ids()) - logits_of(silenced(model, PICKS, kept), ids())).abs().max() < 1e-4
    assert child.model.layers[0].self_attn.k_proj.weight.shape == (8, 32) and child.model.layers[0].mlp.up_proj.weight.shape == (40, 32)
    again = Blueprint.of_module(child)
    assert dict(again.forms) == dict(blueprint.forms)


@grouped
@pytest.mark.parametrize("layout", ["dense", "blockwright", "auto"])
def test_a_child_without_linears_is_written_and_read_with_the_same_logits(name, layout, tmp_path):
    blueprint = child_of(model_of(name), PICKS)
    want = logits_of(blueprint.build(), ids())
    (tmp_path / "a").mkdir()
    written = export.write(blueprint, tmp_path / "a", source=tmp_path, layout=layout, dtype=torch.float32)
    assert written == ("standard" if layout == "dense" else "blockwright")
    assert torch.allclose(logits_of(export.read(tmp_path / "a").build(), ids()), want, atol=1e-5)
    if layout == "dense":
        opened, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.allclose(logits_of(opened, ids()), want, atol=1e-5)


@pytest.mark.parametrize("name", ["neox", "gpt2", "opt", "gpt-neo"])
def test_dense_files_of_other_architectures(name, tmp_path):
    model = model_of(name)
    picks = [(Option("attention", "none"), Option("ffn", "width", 40)), *[(ATTENTION, Option("ffn", "none"))] * (len(chain_of(model)) - 1)]
    blueprint = child_of(model, picks)
    want = logits_of(blueprint.build(), ids())
    export.write(blueprint, tmp_path, source=tmp_path, layout="dense", dtype=torch.float32)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits_of(opened, ids()), want, atol=1e-5)
    rest = [(ATTENTION, FFN)] * (len(picks) - 1)
    first = child_of(model, [(ATTENTION, picks[0][1]), *rest]).build()  # narrower in block 0 alone, the rest by hooks
    for block, parts, (attention, ffn) in zip(chain_of(first), parts_of(model), picks, strict=True):
        if attention.kind == "none":
            block.get_submodule(parts.attention.name).register_forward_hook(lambda m, args, out: (torch.zeros_like(out[0]), *out[1:]))
        if ffn.kind == "none":
            block.get_submodule(parts.ffn.out).register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    assert torch.allclose(logits_of(first, ids()), want, atol=1e-5)


def test_one_linear_for_a_subblock_is_kept_in_our_layout_and_refused_in_others(tmp_path):
    picks = [(Option("attention", "linear"), FFN), (ATTENTION, Option("ffn", "linear")), (ATTENTION, FFN)]
    blueprint = child_of(model_of("llama"), picks)
    want = logits_of(blueprint.build(), ids())
    for layout, told in (("dense", "self_attn is linear attention, which no weights of llama compute"), ("standard", "linear attention")):
        (tmp_path / layout).mkdir()
        with pytest.raises(BlockwrightError, match=told):
            export.write(blueprint, tmp_path / layout, source=tmp_path, layout=layout, dtype=torch.float32)
    (tmp_path / "own").mkdir()
    export.write(blueprint, tmp_path / "own", source=tmp_path, dtype=torch.float32)
    read = export.read(tmp_path / "own")
    assert torch.equal(logits_of(read.build(), ids()), want)
    table = outcome.block_table(Blueprint.of_module(model_of("llama")), read, {})
    assert table[0]["treatment"] == ["linear attention"] and table[1]["treatment"] == ["linear ffn"] and table[2]["treatment"] == ["kept"]
    for row, i in zip(table, range(3), strict=False):
        stored = sum(read.tensors.facts(n).nbytes for n in read.tensors if n.startswith(f"model.layers.{i}."))
        assert row["bytes_after"] == stored


# costs


def test_bytes_of_keys_and_values_of_llama_8b():
    layer = kv_bytes(8 * 128, Deployment(96, 8192, 0, "bf16"))
    assert 32 * layer == 98304 * 2**20 and 20 * layer == 61440 * 2**20
    assert kv_bytes(8 * 128, Deployment(96, 8000, 192, "fp32")) == 2 * layer


@every_model
def test_costs_are_those_of_the_models_that_are_built(name):
    model = model_of(name)
    blueprint = Blueprint.of_module(model)
    parts = find_all(blueprint)
    library = Library(parts, by="puzzle", widths=[0.5, 0.25], granularity=8)
    use = Deployment(3, 5, 4, "fp16")
    costs = Costs(blueprint, parts, library.slots, use)
    rng = torch.Generator().manual_seed(0)
    for _ in range(6):
        picks = [int(torch.randint(len(options), (1,), generator=rng)) for options in library.slots]
        child = with_options(model, library.named(picks))
        with torch.no_grad():
            cache = child(ids(3, 9), use_cache=True).past_key_values
        found = costs.of(picks)
        assert found.parameters == 2 * sum(p.numel() for p in child.parameters())
        assert found.kv == 2 * sum(t.numel() for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values))
        assert found.time == 0
    assert costs.of([0] * len(library.slots)) == costs.parent


def test_measured_times_add_up(tmp_path, monkeypatch):
    def seconds(model, use, **_):  # a machine on which each parameter takes a nanosecond
        return 1e-9 * sum(p.numel() for p in model.parameters())

    monkeypatch.setattr(deployment, "time_of", seconds)
    blueprint, use = Blueprint.of_module(model_of("llama")), Deployment(4, 16, 8, "fp32")
    parts = find_all(blueprint)
    library = Library(parts, by="puzzle", widths=[0.5], granularity=8)
    times = measure_times(blueprint, parts, library.every, use)
    assert set(times.options) == {str(o) for o in library.every} and times.around > 0
    assert times.options["attention: none"] == times.options["ffn: none"] == 0 < times.options["attention: parent"]
    costs = Costs(blueprint, parts, library.slots, use, times)
    assert costs.parent.time == pytest.approx(sum(p.numel() for p in blueprint.build().parameters()), rel=1e-6)
    times.save(tmp_path / "times.json")
    assert Times.load(tmp_path / "times.json", use, library.every) == times


def test_time_is_a_prefill_and_a_step_for_each_token(monkeypatch):
    model, lengths = model_of("llama"), []
    monkeypatch.setattr(deployment, "least", lambda fn, repeats, prepare=lambda: None: [fn(prepare()), 2.0][1])
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: lengths.append(tuple(args[0].shape)))
    assert time_of(model, Deployment(3, 10, 6, "fp32")) == 2.0 + 6 * 2.0
    assert lengths == [(3, 13), (3, 10), (3, 1)]
