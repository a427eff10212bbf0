"""Small parents of several architectures, one that has learned something, and what tests do with them."""

import copy
from functools import cache

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from blockwright.blocks import layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.run import Run
from blockwright.blocks.stream import Stream
from blockwright.blocks.subblocks import Option, find_subblocks, variant
from blockwright.search.puzzle import distil

V = 60
SIZES = dict(vocab_size=V, hidden_size=32, num_hidden_layers=3, bos_token_id=None, eos_token_id=None, pad_token_id=None)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4)),
    "qwen2, tied": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True)
    ),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=96, num_attention_heads=4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_inner=96, bos_token_id=None, eos_token_id=None)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=96, num_attention_heads=4, word_embed_proj_dim=32)),
    "gpt-neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=96, attention_types=[[["global", "local"], 1]],
            window_size=4, bos_token_id=None, eos_token_id=None,
        )
    ),
}  # fmt: skip
ATTENTION, FFN = Option("attention", "parent"), Option("ffn", "parent")
every_model = pytest.mark.parametrize("name", MODELS)
grouped = pytest.mark.parametrize("name", ["llama", "qwen2, tied"])


@cache
def model_of(name):
    """A random model whose biases and norms are random too."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 1:
            p.add_(0.1 * torch.randn(p.shape))
        elif p.shape[0] != V:
            p.mul_(3)
    return model


@cache
def ids(n=6, length=12, seed=1):
    return torch.randint(0, V, (n, length), generator=torch.Generator().manual_seed(seed))


def chain_of(model):
    return model.get_submodule(layers.chain_path(model))


def parts_of(model):
    return [find_subblocks(block, str(i), by="test") for i, block in enumerate(chain_of(model))]


def options_of(parts):
    """One option of each kind that the block can have."""
    found = [Option("attention", "none"), Option("ffn", "none"), Option("ffn", "width", 40), ATTENTION, FFN]
    if parts.attention.kv_heads:
        found += [Option("attention", "heads", 2), Option("attention", "heads", 1), Option("attention", "linear")]
    return found + ([Option("ffn", "linear")] if "." in parts.ffn.out else [])


def with_options(model, picks):
    """A copy of the model whose block i has the options picks[i]."""
    model = copy.deepcopy(model)
    for block, parts, options in zip(chain_of(model), parts_of(model), picks, strict=True):
        made = {name: m for option in options for name, m in variant(block, parts, option).items()}
        for name, module in made.items():
            layers.swap(block, name, module)
    return model


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def block_of(model, index, tokens=None):
    """A resident block, its inputs and its outputs in the model."""
    blueprint = Blueprint.of_module(model)
    stream = Stream(blueprint, ids() if tokens is None else tokens)
    x = stream.embedded
    for i in range(index):
        x = stream.block(blueprint, i).outputs(x)
    block = stream.block(blueprint, index)
    return block, x, block.outputs(x)


def kl_by_hand(parent, child, real=None):
    p, q = (torch.softmax(t.double(), -1) for t in (parent, child))
    each = (p * (p / q).log()).sum(-1)
    return float(each.mean() if real is None else each[real.bool()].mean())


@cache
def trained():
    """A small Llama that has learned a language in which two tokens decide the next, nine times in ten; and windows of it."""
    rng = torch.Generator().manual_seed(0)
    table = torch.randint(0, 12, (12, 12), generator=rng)
    tokens = torch.randint(0, 12, (96, 24), generator=rng)
    noise = torch.rand(96, 24, generator=rng) < 0.1
    for t in range(2, 24):
        tokens[:, t] = torch.where(noise[:, t], tokens[:, t], table[tokens[:, t - 1], tokens[:, t - 2]])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        bos_token_id=None, eos_token_id=None, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        rows = tokens[torch.randint(0, 96, (32,), generator=rng)]
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False), tokens


def run_of(model, tokens, **options):
    run = Run(Blueprint.of_module(model), calibration=tokens, **options)
    run.begin("puzzle")
    return run


LEARN = dict(mask=None, steps=0, lr=1e-3, batch_size=4)


def learn_of(**options):
    return lambda *args, **named: distil(*args, **named, **(LEARN | options))
