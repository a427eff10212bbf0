"""A model block by block against the living model under hooks, and running statistics against all activations at once."""

import copy
import weakref
from pathlib import Path

import pytest
import tiny
import torch
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.blocks import layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.packed import PackedLinear
from blockwright.blocks.stream import Gram, Moments, Stat, Stream, batches
from blockwright.errors import BlockwrightError

N, T = 5, 9
NAMES = ["llama", "gpt2", "neox", "opt", "qwen2", "gemma2", "gemma3", "gpt-neo", "falcon", "bert"]


def padded(kind):
    """Padding masks: 1 for real tokens. Some samples of each have no padding."""
    mask = torch.ones(N, T, dtype=torch.int64)
    if kind == "right":
        mask[1, 6:] = mask[3, 2:] = 0
    elif kind == "left":
        mask[1, :3] = mask[3, :7] = 0
    elif kind == "first":
        mask[0, :4] = 0
    elif kind == "all":
        mask[:, :2] = 0
    return None if kind is None else mask


@torch.no_grad()
def living(model, x, mask=None):
    """What each block of the whole model gives, what each linear is given, and the logits."""
    outputs, inputs = [], {}
    path = layers.chain_path(model)
    handles = [
        b.register_forward_hook(lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for b in model.get_submodule(path)
    ]
    handles += [
        m.register_forward_pre_hook(lambda m, a, n=n: inputs.__setitem__(n, a[0].reshape(-1, a[0].shape[-1])))
        for n, m in model.named_modules()
        if layers.is_linear(m) and n.startswith(path)
    ]
    logits = tiny.logits(model, x, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return outputs, inputs, logits


def close(got, want):
    return bool((got - want).abs().max() <= 1e-6 * want.abs().max())


# block by block


@pytest.mark.parametrize("name", NAMES)
def test_block_by_block_is_the_whole_model_bit_for_bit(name):
    model, x = tiny.model(name), tiny.ids(N, T)
    outputs, _, logits = living(model, x)
    blueprint = Blueprint.of_module(model)
    stream = Stream(blueprint, x, batch=N)
    hidden = stream.embedded
    for i, want in enumerate(outputs):
        hidden = stream.block(blueprint, i).outputs(hidden)
        assert torch.equal(hidden, want)
    assert torch.equal(stream.final_hidden(blueprint), hidden) and i + 1 == stream.num_blocks
    assert close(torch.cat([part for _, part in stream.logits(blueprint, hidden)]), logits)


@pytest.mark.parametrize("kind", ["right", "left", "first", "all", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_padded_samples_are_the_whole_models(name, kind):
    model, x, mask = tiny.model(name), tiny.ids(N, T), padded(kind)
    outputs, _, logits = living(model, x, mask)
    blueprint = Blueprint.of_module(model)
    stream = Stream(blueprint, x, mask=mask, batch=2)  # 2 + 2 + 1 samples
    hidden, real = stream.embedded, mask.bool()
    for i, want in enumerate(outputs):
        hidden = stream.block(blueprint, i).outputs(hidden)
        assert close(hidden[real], want[real])
    rows, parts = zip(*stream.logits(blueprint, hidden), strict=True)
    assert [r for s in rows for r in range(s.start, s.stop)] == list(range(N))
    assert close(torch.cat(parts)[real], logits[real])


def test_padding_matters_to_these_tests():
    model, x, mask = tiny.model("llama"), tiny.ids(N, T), padded("left")
    assert not close(living(model, x, mask)[2][mask.bool()], living(model, x)[2][mask.bool()])


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2"])
def test_each_block_gets_its_own_arguments(name):
    model, x = tiny.model(name), tiny.ids(N, T)
    blueprint = Blueprint.of_module(model)
    stream = Stream(blueprint, x)
    right = stream.final_hidden(blueprint)
    stream.arguments = [stream.arguments[1]] * 3
    assert not torch.allclose(stream.final_hidden(blueprint), right, atol=1e-2)


@pytest.mark.parametrize("kind", [None, "left"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_the_batch_size_does_not_matter(name, kind):
    blueprint = Blueprint.of_module(tiny.model(name))
    real = slice(None) if kind is None else padded(kind).bool()
    want = Stream(blueprint, tiny.ids(N, T), mask=padded(kind), batch=N).final_hidden(blueprint)
    for batch in (1, 2, 3, 64):
        stream = Stream(blueprint, tiny.ids(N, T), mask=padded(kind), batch=batch)
        assert close(stream.final_hidden(blueprint)[real], want[real])


@pytest.mark.parametrize("kind", [None, "left", "all"])
def test_some_samples_alone_are_as_among_all(kind):
    blueprint = Blueprint.of_module(tiny.model("gemma3"))
    stream = Stream(blueprint, tiny.ids(N, T), mask=padded(kind))
    block = stream.block(blueprint, 1)
    whole = block.outputs(stream.embedded)
    real = torch.ones(N, T, dtype=torch.bool) if kind is None else padded(kind).bool()
    for rows in (slice(1, 4), slice(3, 4), slice(None), [3], [4, 1, 3], [0, 0]):
        got = block(stream.embedded[rows], rows)
        assert close(got[real[rows]], whole[rows][real[rows]])


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_samples(length):
    model, x = tiny.model("llama"), tiny.ids(3, length)
    mask = torch.ones_like(x)
    blueprint = Blueprint.of_module(model)
    for m in (None, mask):
        assert close(Stream(blueprint, x, mask=m, batch=2).final_hidden(blueprint), living(model, x)[0][-1])


def test_a_bf16_folder_is_computed_in_fp32(tmp_path):
    tiny.model("gemma3").to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = t.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    blueprint = Blueprint.of_folder(tmp_path)
    stream = Stream(blueprint, tiny.ids(N, T), batch=N)
    assert torch.equal(stream.final_hidden(blueprint), living(theirs, tiny.ids(N, T))[0][-1])
    assert {p.dtype for p in stream.block(blueprint, 0).module.parameters()} == {torch.float32}
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_gradients_flow_through_a_block_as_in_the_living_one():
    model, x = tiny.model("llama"), tiny.ids(N, T)
    blueprint = Blueprint.of_module(model)
    stream = Stream(blueprint, x, batch=N)
    block = stream.block(blueprint, 0)
    weight = block.module.mlp.up_proj.weight.requires_grad_()
    block(stream.embedded).square().mean().backward()
    theirs = model.model.layers[0].mlp.up_proj.weight
    outputs = []
    model.model.layers[0].register_forward_hook(lambda m, a, out: outputs.append(out))
    model(x, use_cache=False)
    outputs[0].square().mean().backward()
    assert close(weight.grad, theirs.grad)


def test_nothing_that_is_streamed_changes_the_model():
    model, x = tiny.model("gpt2"), tiny.ids(N, T)
    before, seen = copy.deepcopy(model.state_dict()), x.clone()
    blueprint = Blueprint.of_module(model)
    stream = Stream(blueprint, x)
    block = stream.block(blueprint, 0)
    block.observe(stream.embedded, Gram)
    for p in block.module.parameters():
        p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(x, seen)
    assert not torch.equal(stream.block(blueprint, 0).outputs(stream.embedded), block.outputs(stream.embedded))


def test_one_block_is_resident_at_a_time(monkeypatch):
    blueprint, alive, most = Blueprint.of_module(tiny.model("llama")), [], []
    load = Stream.block

    def counted(self, *args):
        most.append(sum(r() is not None for r in alive))
        block = load(self, *args)
        alive.extend(weakref.ref(p) for p in block.module.parameters())
        return block

    monkeypatch.setattr(Stream, "block", counted)
    stream = Stream(blueprint, tiny.ids(N, T))
    hidden = stream.final_hidden(blueprint)
    list(stream.logits(blueprint, hidden))
    assert len(most) >= 3 and set(most) == {0}  # when a block is loaded, no parameter of another one lives
    assert not any(r() for r in alive)


# refusals


def test_what_cannot_be_streamed_is_refused():
    blueprint = Blueprint.of_module(tiny.model("llama"))
    for empty in (torch.zeros(0, 4, dtype=torch.int64), torch.zeros(4, 0, dtype=torch.int64)):
        with pytest.raises(BlockwrightError, match="calibration: no samples. Allowed: token ids"):
            Stream(blueprint, empty)
    block = Stream(blueprint, None).block(blueprint, 1)
    with pytest.raises(BlockwrightError, match=r"block model\.layers\.1: loaded without inputs. Ask for inputs='treated' or 'dense'"):
        block(torch.zeros(1, T, 24))


def test_arguments_with_several_rows_a_sample_are_refused_by_name():
    config = t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)
    model = Blueprint.of_module(t.AutoModelForCausalLM.from_config(config))
    with pytest.raises(BlockwrightError, match="bloom: its blocks take alibi with 4 rows for each sample"):
        Stream(model, torch.zeros(2, 8, dtype=torch.int64))
    assert Stream(model, torch.zeros(1, 8, dtype=torch.int64)).num_blocks == 2


def test_values_that_are_not_finite_are_named():
    model = tiny.model("llama")
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e38)
    blueprint = Blueprint.of_module(model)
    stream = Stream(blueprint, tiny.ids(N, T))
    with pytest.raises(BlockwrightError, match=r"output of block model\.layers\.1: -?(inf|nan) at \[\d, \d, \d+\]"):
        stream.final_hidden(blueprint)
    block = stream.block(blueprint, 0)
    with pytest.raises(BlockwrightError, match=r"output of block model\.layers\.0: nan"):
        block.observe(torch.full((N, T, 24), float("nan")), Gram)
    assert not any(m._forward_pre_hooks for m in block.module.modules())  # the watchers are gone also after an error
    model.model.embed_tokens.weight.data[0, 0] = float("nan")
    with pytest.raises(BlockwrightError, match=r"model\.embed_tokens\.weight: nan at \[0, 0\]"):
        Stream(blueprint, tiny.ids(N, T))


def test_a_statistic_that_is_not_finite_names_its_linear():
    class Broken(Moments):
        def summary(self):
            return torch.tensor([1.0, float("inf")])

    blueprint = Blueprint.of_module(tiny.model("llama"))
    stream = Stream(blueprint, tiny.ids(N, T))
    with pytest.raises(BlockwrightError, match=r"calibration inputs of model\.layers\.2\.mlp\.up_proj: inf"):
        stream.block(blueprint, 2).observe(stream.embedded, Broken, ["model.layers.2.mlp.up_proj"])


# linears of a block


def test_linears_are_named_in_full_and_chosen_by_targets():
    block = Stream(blueprint := Blueprint.of_module(tiny.model("llama")), None).block(blueprint, 2)
    path = "model.layers.2."
    names = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert list(block.linears()) == [path + n for n in names]
    assert list(block.linears(["mlp"])) == [] and list(block.linears(["down_proj", "re:q_proj$"])) == [
        path + n for n in (names[0], names[6])
    ]
    assert list(block.linears(ignore=["re:mlp", path + names[1]])) == [path + n for n in (names[0], names[2], names[3])]
    gpt2 = Stream(blueprint := Blueprint.of_module(tiny.model("gpt2")), None).block(blueprint, 0)
    assert [layers.size(m)[1] for m in gpt2.linears().values()] == [24, 24, 24, 96]  # Conv1D counts as Linear
    assert list(gpt2.linears(["c_fc"])) == ["transformer.h.0.mlp.c_fc"]


def test_shared_linears_belong_to_the_first_block_that_holds_them():
    blueprint = Blueprint.of_module(tiny.model("llama")).with_shared({2: 0}, lambda n: "norm" in n or "up_proj" in n)
    stream = Stream(blueprint, None)
    assert [len(stream.block(blueprint, i).linears()) for i in range(3)] == [7, 7, 1]
    assert list(stream.block(blueprint, 2).linears()) == ["model.layers.2.mlp.up_proj"]


def test_a_swapped_module_is_recorded_with_its_form():
    block = Stream(blueprint := Blueprint.of_module(tiny.model("llama")), None).block(blueprint, 1)
    name = "model.layers.1.mlp.up_proj"
    codes, scale = torch.ones(40, 24, dtype=torch.int8), torch.ones(40, 1)
    new = PackedLinear.of(block.linears()[name], codes, scale, bits=4, group_size=-1)
    block.swap(name, new)
    assert block.module.mlp.up_proj is new and block.forms == {name: new.form()} and name not in block.linears()


# statistics


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_statistics_are_those_of_all_activations_at_once(name, batch):
    model, x = tiny.model(name), tiny.ids(N, T)
    outputs, inputs, _ = living(model, x)
    blueprint = Blueprint.of_module(model)
    block = Stream(blueprint, x, batch=batch).block(blueprint, 1)
    moments, grams = block.observe(outputs[0], Moments), block.observe(outputs[0], Gram)
    assert moments.keys() == grams.keys() == block.linears().keys()
    for linear, seen in inputs.items():
        if linear in moments:
            x64, m, g = seen.double(), moments[linear], grams[linear]
            assert m.count == g.count == N * T
            assert torch.allclose(m.mean, x64.mean(0), rtol=1e-5, atol=1e-6)
            assert torch.allclose(m.var, x64.var(0, unbiased=False), rtol=1e-5, atol=1e-6)
            assert torch.allclose(m.norm, x64.square().sum(0).sqrt(), rtol=1e-5) and torch.equal(m.summary(), m.norm)
            assert close(g.sum.double(), x64.T @ x64) and torch.equal(g.summary(), g.sum.diagonal())
    some = block.observe(outputs[0], Gram, list(grams)[1:3])
    assert list(some) == list(grams)[1:3] and all(torch.equal(some[n].sum, grams[n].sum) for n in some)


@pytest.mark.parametrize("kind", ["right", "left", "first", "all", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_statistics_leave_padding_out(name, kind):
    model, x, mask = tiny.model(name), tiny.ids(N, T), padded(kind)
    outputs, inputs, _ = living(model, x, mask)
    blueprint, real = Blueprint.of_module(model), mask.bool()
    block = Stream(blueprint, x, mask=mask, batch=2).block(blueprint, 1)  # 2 + 2 + 1 samples
    moments, grams = block.observe(outputs[0], Moments), block.observe(outputs[0], Gram)
    for linear in moments:
        seen, m, g = inputs[linear].double()[real.flatten()], moments[linear], grams[linear]
        assert m.count == g.count == int(mask.sum())
        assert torch.allclose(m.mean, seen.mean(0), rtol=1e-5, atol=1e-6)
        assert torch.allclose(m.var, seen.var(0, unbiased=False), rtol=1e-5, atol=1e-6)
        assert close(g.sum.double(), seen.T @ seen)


def test_a_sample_that_is_all_padding_is_heard_by_nothing():
    model, x, mask = tiny.model("llama"), tiny.ids(N, T), padded("right")
    mask[4] = 0
    blueprint = Blueprint.of_module(model)
    block = Stream(blueprint, x, mask=mask).block(blueprint, 0)
    seen = block.observe(Stream(blueprint, x).embedded, Moments)
    assert all(m.count == int(mask.sum()) and bool(torch.isfinite(m.mean).all()) for m in seen.values())


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    shift=st.sampled_from([0.0, 1.0, -1e6]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_moments_of_uneven_pieces_are_those_of_the_whole(sizes, shift, scale, seed):
    x = (torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift).float()
    moments, gram = Moments(3), Gram(3)
    for piece in x.split(sizes):
        moments.add(piece)
        gram.add(piece)
    x64 = x.double()
    assert moments.count == gram.count == len(x)
    assert torch.allclose(moments.mean, x64.mean(0), rtol=1e-12, atol=1e-12 * scale)
    assert torch.allclose(moments.var, x64.var(0, unbiased=False), rtol=1e-6, atol=1e-12 * scale**2)  # no cancellation at -1e6
    assert torch.allclose(moments.norm, x64.square().sum(0).sqrt(), rtol=1e-12)
    assert torch.allclose(gram.sum.double(), x64.T @ x64, rtol=1e-5, atol=1e-6 * float(x64.square().sum()))
    assert isinstance(moments, Stat) and isinstance(gram, Stat)


@given(n=st.integers(0, 40), size=st.integers(1, 45))
def test_batches_cut_the_samples_once_each(n, size):
    cut = list(batches(n, size))
    assert [i for s in cut for i in range(s.start, s.stop)] == list(range(n)) and all(0 < s.stop - s.start <= size for s in cut)
    assert all(s.stop - s.start == size for s in cut[:-1])


def test_a_stub_stands_for_its_block():
    """Models ask their blocks for attributes (Gemma: which attention a layer uses) while the stubs stand in."""
    blueprint = Blueprint.of_module(tiny.model("gemma2"))
    stream = Stream(blueprint, None)
    model = stream._around(blueprint, whole=True)
    stub = model.get_submodule("model.layers.0")
    assert stub.self_attn.layer_idx == 0 and not list(stub.parameters())
    assert not any(p.is_meta for p in model.parameters())
    with pytest.raises(AttributeError):
        stub.no_such_thing  # noqa: B018
