"""Small random models of many architectures, no two tensors alike, for the tests of this folder."""

import torch
import transformers as t

COMMON = dict(vocab_size=37, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, max_position_embeddings=64)
NO_SPECIAL = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
GQA = dict(num_key_value_heads=2, **NO_SPECIAL)
GEMMA = dict(head_dim=8, sliding_window=4, query_pre_attn_scalar=8, **GQA)
GPT = dict(vocab_size=37, n_embd=24, n_layer=3, n_head=4, n_positions=64, **NO_SPECIAL)
STATE = dict(vocab_size=37, hidden_size=24, num_hidden_layers=3, state_size=4, time_step_rank=8, **NO_SPECIAL)

CONFIGS = {
    "llama": lambda: t.LlamaConfig(**COMMON, **GQA),
    "llama-tied": lambda: t.LlamaConfig(**COMMON, **GQA, tie_word_embeddings=True),
    "gpt2": lambda: t.GPT2Config(**GPT),
    "neox": lambda: t.GPTNeoXConfig(**COMMON, **NO_SPECIAL),
    "opt": lambda: t.OPTConfig(
        **{k: v for k, v in COMMON.items() if k != "intermediate_size"}, ffn_dim=40, word_embed_proj_dim=24, **NO_SPECIAL
    ),
    "qwen2": lambda: t.Qwen2Config(**COMMON, **GQA, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "gemma2": lambda: t.Gemma2Config(**COMMON, **GEMMA),
    "gemma3": lambda: t.Gemma3TextConfig(
        **COMMON, **GEMMA, layer_types=["sliding_attention", "full_attention", "sliding_attention"], rope_local_base_freq=100.0
    ),
    "deepseek": lambda: t.DeepseekV3Config(
        **COMMON, **NO_SPECIAL, moe_intermediate_size=8, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, v_head_dim=4, qk_nope_head_dim=4, first_k_dense_replace=1,
    ),
    "gpt-neo": lambda: t.GPTNeoConfig(
        vocab_size=37, hidden_size=24, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=4,
        max_position_embeddings=64, intermediate_size=40, **NO_SPECIAL,
    ),
    "falcon": lambda: t.FalconConfig(vocab_size=37, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, **NO_SPECIAL),
    "mamba": lambda: t.MambaConfig(**STATE),
    "falcon-mamba": lambda: t.FalconMambaConfig(**STATE),
    "jamba": lambda: t.JambaConfig(
        **{k: v for k, v in COMMON.items() if k != "max_position_embeddings"}, **GQA, attn_layer_period=2, attn_layer_offset=1,
        num_experts=2, mamba_d_state=4, mamba_dt_rank=8, use_mamba_kernels=False,
    ),
    "rwkv": lambda: t.RwkvConfig(
        vocab_size=37, hidden_size=24, num_hidden_layers=7, intermediate_size=40, context_length=64, rescale_every=2, **NO_SPECIAL
    ),
    "bert": lambda: t.BertConfig(**COMMON),
    "vit": lambda: t.ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, image_size=8, patch_size=4
    ),
}  # fmt: skip


@torch.no_grad()
def randomised(model, seed=0):
    """Every parameter and stored buffer random and large enough that each one matters."""
    g = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=g)
            tensor.copy_(0.25 * noise if tensor.dim() > 1 else 1 + 0.2 * noise)
    return model.eval()


def model(name, seed=0, cls=t.AutoModelForCausalLM, **changes):
    """A random model of one of CONFIGS."""
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    return randomised(cls.from_config(config) if hasattr(cls, "from_config") else cls(config), seed)


def ids(n=2, length=9, seed=0):
    return torch.randint(0, 37, (n, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, x, **kwargs):
    if x.is_floating_point():
        return model(x, **kwargs)[0]
    return model(x, **kwargs, **({"use_cache": False} if model.config.model_type != "bert" else {}))[0]
