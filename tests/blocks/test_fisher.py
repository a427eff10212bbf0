"""Gradients block by block against whole-model autograd, and the estimates against the Fisher information written out."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from blockwright.blocks import layers, tiles
from blockwright.blocks.fisher import Fisher
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.run import Run
from blockwright.blocks.treatments import DENSE, Treatment, grid
from blockwright.errors import BlockwrightError

T4, T2 = Treatment("quantise", 4, 16), Treatment("quantise", 2, 16)
SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=32)).eval()


def text(n=6, length=12):
    return torch.randint(0, 60, (n, length), generator=torch.Generator().manual_seed(1))


class Product:
    """The gradient of each weight, from what is heard."""

    def __init__(self, block):
        self.found = {}

    def hear(self, name, x, gradient):
        self.found[name] = self.found.get(name, 0) + gradient.T @ x

    def facts(self):
        return dict(self.found)


def surprised(model, ids, labels, mask=None):
    """The loss that `backward` differentiates, with these labels."""
    logits = model(ids, attention_mask=mask).logits
    nll = cross_entropy(logits.flatten(0, 1), labels, reduction="none")
    return (nll if mask is None else nll * mask.flatten()).sum()


def drawn(model, ids, generator, batch=2, mask=None):
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    rows = [logits[i : i + batch].flatten(0, 1).softmax(-1) for i in range(0, len(ids), batch)]
    return torch.cat([torch.multinomial(p, 1, generator=generator)[:, 0] for p in rows])


@pytest.mark.parametrize("make", [llama, gpt2])
def test_gradients_are_those_of_the_whole_model(make):
    model, ids = make(), text()
    run = Run(Blueprint.of_module(model), calibration=ids)
    found = run.backward(Product)
    surprised(model, ids, drawn(model, ids, run.generator(1, "labels"))).backward()
    names = [name for facts in found for name in facts]
    assert names == list(layers.block_linears(model))
    for facts in found:
        for name, gradient in facts.items():
            weight = model.get_submodule(name).weight.grad
            torch.testing.assert_close(gradient, weight.T if make is gpt2 else weight, atol=1e-6, rtol=1e-5)


def test_padding_is_left_out():
    model, ids, mask = llama(), text(), torch.ones(6, 12, dtype=torch.int64)
    mask[1, :5] = mask[4, 9:] = 0
    offered = {name: [DENSE, T4] for name in layers.block_linears(model)}
    runs = [Run(Blueprint.of_module(model), calibration=t, mask=mask) for t in (ids, torch.where(mask == 0, 59 - ids, ids))]
    a, b = (run.backward(lambda block: Fisher(block, offered, int(mask.sum()))) for run in runs)
    for one, two in zip(a, b, strict=True):
        assert one["estimates"] == two["estimates"] and all(torch.equal(one[k], two[k]) for k in one if k.startswith("x2:"))


def test_estimates_are_half_the_information_times_the_squared_error():
    model, ids = llama(), text(3, 8)
    run = Run(Blueprint.of_module(model), calibration=ids, batch=4)
    name = "model.layers.1.mlp.up_proj"
    [_, facts, _] = run.backward(lambda block: Fisher(block, {name: [DENSE, T4]}, ids.numel()))
    assert set(facts["estimates"]) == {name} and facts["estimates"][name][str(DENSE)] == 0.0
    linear = model.get_submodule(name)
    heard = {}
    linear.register_forward_hook(lambda m, args, y: heard.update(x=args[0].detach().flatten(0, 1), y=y))
    labels = drawn(model, ids, run.generator(1, "labels"), batch=1)
    [gradient] = torch.autograd.grad(surprised(model, ids, labels), heard["y"])
    g = gradient.flatten(0, 1)
    w = linear.weight.detach()
    x2 = heard["x"].square().mean(0)
    torch.testing.assert_close(facts[f"x2:{name}"], x2)
    codes, scale = grid(w, T4, x2)
    error = tiles.from_codes(codes, scale, group_size=16) - w
    total = 0.0
    for t in range(len(g)):  # the information of each weight, token by token
        total += 0.5 * float(((g[t][:, None] * heard["x"][t][None, :]) ** 2 * error**2).sum()) / len(g)
    assert facts["estimates"][name][str(T4)] == pytest.approx(total, rel=1e-4)


def test_a_run_that_was_killed_goes_on_with_the_same_bits(tmp_path):
    model, ids = llama(), text()
    whole = Run(Blueprint.of_module(model), calibration=ids).backward(Product)
    seen = []

    class Killed(Product):
        def __init__(self, block):
            super().__init__(block)
            seen.append(block.index)
            if len(seen) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(Blueprint.of_module(model), calibration=ids, journal=tmp_path).backward(Killed)
    resumed = Run(Blueprint.of_module(model), calibration=ids, journal=tmp_path).backward(Killed)
    assert seen == [2, 1, 1, 0]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(whole, resumed, strict=True) for k in a)


def test_text_is_asked_for_and_a_value_that_is_not_finite_is_told():
    with pytest.raises(BlockwrightError, match="needs calibration text"):
        Run(Blueprint.of_module(llama())).backward(Product)
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(BlockwrightError, match=r"layers\.1"):
        Run(Blueprint.of_module(model), calibration=text()).backward(Product)
