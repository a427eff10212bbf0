"""A model as one GGUF file, for llama.cpp and Ollama: our codes as they are where a GGUF type has our grid, else the nearest type.

Block types hold 32 inputs of one output with an fp16 step d (and an fp16 minimum m): Q4_0 d(q - 8), Q5_0 d(q - 16), Q8_0 dq, Q4_1 and Q5_1
dq + m. The loss of each tensor is measured on the bytes as written, decoded by the `gguf` package; it is kept in the file (`blockwright.*`)
and in export.json beside it.
"""

import copy
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from jaxtyping import Float16, Float32, Shaped, UInt8
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig

from blockwright import __version__
from blockwright.blocks import layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.offset_packed import OffsetLinear
from blockwright.blocks.packed import PackedEmbedding, PackedLinear
from blockwright.compress import dgq
from blockwright.errors import BlockwrightError
from blockwright.recipes.whole import whole

FILE = "model.gguf"
FORMAT = 1
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> GGUF's name
ROPES = {
    "llama": ("default", "linear", "llama3"),
    "qwen2": ("default", "linear"),
    "qwen3": ("default", "linear"),
}  # what llama.cpp computes
BLOCK = 32
TOLERANCE = 0.01  # the relative error up to which a type keeps a matrix; Q8_0 costs about 0.005

GRIDS = {  # (symmetric, bits) -> the type whose grid holds ours, and what is added to a code there
    **{(True, bits): (Kind.Q4_0, 8) for bits in (2, 3, 4)},
    (True, 5): (Kind.Q5_0, 16),
    **{(True, bits): (Kind.Q8_0, 0) for bits in (6, 7, 8)},
    **{(False, bits): (Kind.Q4_1, 2 ** (bits - 1)) for bits in (2, 3, 4)},
    (False, 5): (Kind.Q5_1, 16),
}
DENSE = {torch.bfloat16: Kind.BF16, torch.float16: Kind.F16}  # what a matrix of this dtype is written as; others: F32

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {  # how text is cut before merging -> GGUF's name for it, and whether a cut that is a token is then taken whole, without merging
    ("bytes, GPT-2's words",): ("gpt-2", False),
    ("digits", "bytes, GPT-2's words"): ("smollm", False),
    (rf"{WORDS}|\p{{N}}{{1,3}}|{REST}", "bytes"): ("llama-bpe", True),
    (rf"{WORDS}|\p{{N}}|{REST}", "bytes"): ("qwen2", False),
}


class Encoded(NamedTuple):
    """A tensor as GGUF stores it: of block types and BF16 the bytes, else the numbers, a row an output; and its relative error."""

    kind: Kind
    rows: Shaped[np.ndarray, "..."]
    loss: float


def write(model: Blueprint, folder: Path, *, source: Path, stages: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Write model.gguf, export.json and the licence into the empty folder `folder`. Returns what export.json holds.

    source : the folder that tokenizer, licence and name are taken from. stages : what was done to the model, for the file's metadata.
    Returns {format, file, bytes, architecture, tensors: {GGUF name: {of, type, bytes, loss}}, loss: {worst, tensor, mean}, warnings}.
        A loss is ||written - ours|| / ||ours||, 0 where every weight is exact; `mean` is over the matrices.
    Raises BlockwrightError for an architecture, a RoPE scaling or a tokenizer that GGUF or its readers do not know.
    Memory: one tensor at a time; while it works, the disk holds the tensors twice.
    """
    check(model.config)
    model = whole(model)
    _check_sizes(model)
    model = dgq.weight_only(model)
    writer = gguf.GGUFWriter(folder / FILE, ARCHITECTURES[model.config.model_type])
    writer.add_type("model")
    writer.add_name(source.absolute().name)
    warnings = [*_add_config(writer, model.config), *_add_tokenizer(writer, source, model.config.vocab_size)]
    tensors: dict[str, dict[str, Any]] = {}
    losses: dict[str, float] = {}  # of matrices
    sizes: Counter[Kind] = Counter()
    with tempfile.TemporaryFile(dir=folder) as waiting, closing(writer):  # types and losses come first in the file, and are known last
        writer.temp_file = waiting  # type: ignore[assignment]
        for of, name, encoded in _tensors(model):
            writer.add_tensor_info(name, encoded.rows.shape, encoded.rows.dtype, encoded.rows.nbytes, raw_dtype=encoded.kind)
            waiting.write(np.ascontiguousarray(encoded.rows).data)  # numpy's own tofile does not say why it fails
            writer.write_padding(waiting, encoded.rows.nbytes)
            tensors[name] = {"of": of, "type": encoded.kind.name, "bytes": encoded.rows.nbytes, "loss": encoded.loss}
            if encoded.rows.ndim == 2:
                losses[name] = encoded.loss
                sizes[encoded.kind] += encoded.rows.nbytes
        worst = max(losses, key=lambda name: losses[name])
        mean = sum(losses.values()) / len(losses)
        most = sizes.most_common(1)[0][0]
        writer.add_file_type(gguf.LlamaFileType.ALL_F32 if most == Kind.F32 else gguf.LlamaFileType[f"MOSTLY_{most.name}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_string("blockwright.version", __version__)
        writer.add_string("blockwright.stages", json.dumps(stages or []))
        writer.add_float32("blockwright.loss.worst", losses[worst])
        writer.add_float32("blockwright.loss.mean", mean)
        writer.add_string("blockwright.loss.tensors", json.dumps({name: loss for name, loss in losses.items() if loss}))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    report = {
        "format": FORMAT,
        "file": FILE,
        "bytes": (folder / FILE).stat().st_size,
        "architecture": writer.arch,
        "tensors": tensors,
        "loss": {"worst": losses[worst], "tensor": worst, "mean": mean},
        "warnings": warnings,
    }
    (folder / "export.json").write_text(json.dumps(report, indent=1) + "\n")
    for path in source.iterdir():
        if path.name.startswith(("LICENSE", "NOTICE")) and path.is_file():
            shutil.copyfile(path, folder / path.name)
    return report


def check(config: PreTrainedConfig) -> None:
    """Raise BlockwrightError where GGUF, or what reads it, has no place for a model of this config."""
    kind, rope = config.model_type, config.to_dict().get("rope_parameters") or {}
    if kind not in ARCHITECTURES:
        raise BlockwrightError(f"gguf: architecture {kind!r}", allowed=", ".join(ARCHITECTURES), do="Use --to dense or standard")
    scaling, known = rope.get("rope_type", "default"), ROPES[ARCHITECTURES[kind]]
    if scaling not in known:
        raise BlockwrightError(f"gguf: RoPE scaling {scaling!r} of {kind}", allowed=", ".join(known), do="Use --to dense or standard")
    for key, allowed in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if getattr(config, key, allowed) != allowed:
            raise BlockwrightError(f"gguf: {key}={getattr(config, key)!r}", allowed=repr(allowed), do="Use --to dense or standard")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise BlockwrightError(f"gguf: partial_rotary_factor={rope['partial_rotary_factor']}", allowed="1", do="Use --to dense or standard")


def _check_sizes(model: Blueprint) -> None:
    resized = next((name for name, form in model.forms.items() if "size" in form), None)
    if resized:
        n, k = model.forms[resized]["size"]
        raise BlockwrightError(
            f"gguf: {resized} is {n} x {k}, a size of its own", allowed="the sizes of config.json", do="Use --to blockwright"
        )


def on_grid(module: PackedLinear | PackedEmbedding) -> tuple[Kind, UInt8[np.ndarray, "N B"]] | None:
    """The module's own codes as blocks, or None where no type has its grid or a block would reach over two groups.

    Exact where d = scale and m = -(zero + 2**(bits-1)) * scale are fp16 numbers.
    """
    k = module.shape[1]
    one_group = module.weight_scale.shape[1] == 1
    if (module.symmetric, module.bits) not in GRIDS or k % BLOCK or not (one_group or module.group_size % BLOCK == 0):
        return None
    kind, shift = GRIDS[module.symmetric, module.bits]
    group_of_block = np.arange(0, k, BLOCK) // (k if one_group else module.group_size)
    codes, scale, zero = module.codes(), module.weight_scale.float(), module.zero()
    unsigned = (codes.to(torch.int16) + shift).to(torch.uint8).numpy()  # Q8_0: two's complement, as int8
    d = scale.half().numpy()[:, group_of_block]
    m = None if zero is None else (-(zero.float() + shift) * scale).half().numpy()[:, group_of_block]
    return kind, blocks(kind, unsigned, d, m)


def on_offset_grid(module: OffsetLinear) -> tuple[Kind, UInt8[np.ndarray, "N B"]] | None:
    """The module's own codes as blocks of Q4_1 or Q5_1, or None as in `on_grid`. Exact where steps and offsets are fp16 numbers."""
    k, one_group = module.in_features, module.weight_step.shape[1] == 1
    if module.bits > 5 or k % BLOCK or not (one_group or module.group_size % BLOCK == 0):
        return None
    kind = Kind.Q5_1 if module.bits == 5 else Kind.Q4_1
    group_of_block = np.arange(0, k, BLOCK) // (k if one_group else module.group_size)
    unsigned = (module.codes().to(torch.int16) + 2 ** (module.bits - 1)).to(torch.uint8).numpy()
    d, m = (t.half().numpy()[:, group_of_block] for t in (module.weight_step, module.weight_offset))
    return kind, blocks(kind, unsigned, d, m)


def blocks(
    kind: Kind, codes: UInt8[np.ndarray, "N K"], d: Float16[np.ndarray, "N b"], m: Float16[np.ndarray, "N b"] | None
) -> UInt8[np.ndarray, "N B"]:
    """Blocks of 32 codes as ggml lays them out: d, m, the fifth bits of all codes, then a code a byte or codes j and j + 16 in one byte."""
    q = codes.reshape(len(codes), -1, BLOCK)
    parts: list[np.ndarray] = [d[..., None].view(np.uint8)]
    if m is not None:
        parts.append(m[..., None].view(np.uint8))
    if kind in (Kind.Q5_0, Kind.Q5_1):
        parts.append(np.packbits(q >> 4, axis=-1, bitorder="little"))
    parts.append(q if kind == Kind.Q8_0 else (q[..., :16] & 15) | (q[..., 16:] << 4))
    return np.concatenate(parts, axis=-1).reshape(len(codes), -1)


def _tensors(model: Blueprint) -> Iterator[tuple[str, str, Encoded]]:
    """Every tensor to write: its name here, its name there, and its bytes. Shared blocks as copies; a tied head not at all."""
    config, built = model.config, model.skeleton()
    architecture = ARCHITECTURES[config.model_type]
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    head, table = ({p for n, p in model.tensors.items() if n.startswith(owner)} for owner in ("lm_head.", "model.embed_tokens."))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if architecture == "llama" else {}
    for name, _ in layers.skeleton(config).named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        if owner == "lm_head" and head == table:
            continue
        encoded = _encoded(model, built, owner, last)
        if owner.endswith(tuple(heads)):
            encoded = encoded._replace(rows=_pairs_together(encoded.rows, heads[owner[-6:]]))
        yield name, f"{names.get_name(owner)}.{last}", encoded
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope", "rope_freqs.weight", _dense(_rope_factors(config, built))


def _encoded(model: Blueprint, built: nn.Module, owner: str, last: str) -> Encoded:
    if last == "weight" and owner in model.forms:
        module = copy.deepcopy(built.get_submodule(owner))  # on meta; dropped again when it has been written
        layers.fill(module, model.tensors, owner + ".")
        return _nearest(module)
    places = (f"{owner}.{last}", f"{owner}.base.{last}", f"{owner}.U.{last}")  # a bias may lie under an adapter, or a low-rank pair
    name = next(n for n in places if n in model.tensors)
    value = model.tensors.read([name])[name]
    layers.check_finite(value, name)
    return _dense(value)


def _nearest(module: Any) -> Encoded:
    """The weights of a module with a form, in the first type that keeps them: own grid, Q8_0, F16, BF16."""
    weight = module.plain_weight()
    ours = weight.numpy()

    def candidates() -> Iterator[tuple[Kind, Shaped[np.ndarray, "N B"]]]:
        own = on_grid(module) if isinstance(module, (PackedLinear, PackedEmbedding)) else None
        own = on_offset_grid(module) if isinstance(module, OffsetLinear) else own
        if own is not None:
            yield own
        if ours.shape[1] % BLOCK == 0:
            yield Kind.Q8_0, gguf.quants.quantize(ours, Kind.Q8_0)
        yield Kind.F16, _numbers(weight, Kind.F16)
        yield Kind.BF16, _numbers(weight, Kind.BF16)

    with np.errstate(over="ignore", invalid="ignore"):  # a step too large for fp16 becomes infinite, and so does its loss
        for kind, rows in candidates():
            loss = _loss(kind, rows, ours)
            if loss <= TOLERANCE:
                break
    return Encoded(kind, rows, loss)


def _dense(value: Tensor) -> Encoded:
    kind = Kind.F32 if value.dim() == 1 else DENSE.get(value.dtype, Kind.F32)
    rows = _numbers(value, kind)
    return Encoded(kind, rows, _loss(kind, rows, value.float().numpy()))


def _numbers(value: Tensor, kind: Kind) -> Shaped[np.ndarray, "..."]:
    if kind == Kind.BF16:  # numpy has no such dtype: bytes
        return value.bfloat16().contiguous().view(torch.uint8).numpy()
    return (value.half() if kind == Kind.F16 else value.float()).contiguous().numpy()


def _loss(kind: Kind, rows: Shaped[np.ndarray, "..."], ours: Float32[np.ndarray, "..."]) -> float:
    """||written - ours|| / ||ours||, of what an independent reader makes of the bytes."""
    written = gguf.quants.dequantize(rows, kind)
    if np.array_equal(written, ours):
        return 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.linalg.norm((written - ours).ravel()) / np.linalg.norm(ours.ravel()))


def _pairs_together(rows: Shaped[np.ndarray, "N ..."], heads: int) -> Shaped[np.ndarray, "N ..."]:
    """Rows of q or k in llama's order: RoPE turns rows 2i and 2i + 1 of a head together there, i and i + d/2 in transformers."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _rope_factors(config: PreTrainedConfig, built: nn.Module) -> Tensor:
    """What llama.cpp divides the plain frequencies by, one a pair of rows, to get this model's."""
    dim = _head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return (plain / built.get_submodule("model.rotary_emb").inv_freq.double()).float()  # type: ignore[operator,union-attr]


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_config(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> list[str]:
    """The model's sizes. Returns warnings."""
    warnings, head_dim, length = [], _head_dim(config), config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    slides = window and "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if slides and window < length:
        warnings.append(f"GGUF has no sliding window for {config.model_type}: the context is cut to the window, {window} tokens")
        length = window
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config.model_type == "qwen3" and head_dim != 128:
        warnings.append(f"head_dim is {head_dim}: llama.cpp reads that, transformers' own GGUF reader only reads a qwen3 with 128")
    scaling = config.rope_parameters["rope_type"]
    if scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    if scaling != "default":
        warnings.append(f"RoPE scaling {scaling!r} is in the file; llama.cpp follows it, transformers' own GGUF reader does not")
    return warnings


def _add_tokenizer(writer: gguf.GGUFWriter, source: Path, vocab_size: int) -> list[str]:
    """Byte-level BPE as GGUF's "gpt2". Returns warnings. Raises BlockwrightError for any other tokenizer."""
    spec, tokenizer = _read_tokenizer(source)
    model, (cuts, space) = spec["model"], _cuts(spec)
    vocabulary = model["vocab"] | {t["content"]: t["id"] for t in spec["added_tokens"]}
    if max(vocabulary.values()) >= vocab_size:
        raise BlockwrightError(
            f"{source}: the tokenizer knows id {max(vocabulary.values())}, the model {vocab_size} tokens",
            do="Use the tokenizer and the weights of one model",
        )
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [gguf.TokenType.UNUSED] * vocab_size
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for t in spec["added_tokens"]:
        types[t["id"]] = gguf.TokenType.CONTROL if t["special"] else gguf.TokenType.USER_DEFINED
    pre, whole = CUTS.get(cuts, ("default", False))
    warnings = []
    if pre == "default":
        warnings.append(f"tokenizer: GGUF has no name for its way to cut text ({' | '.join(cuts)}); readers will cut as they please")
    elif bool(model.get("ignore_merges")) != whole:
        warnings.append(f"tokenizer: readers of {pre!r} {'take' if whole else 'do not take'} a known word whole, without merging")
    if spec["normalizer"] is not None:
        warnings.append("tokenizer: NFC normalisation is not in the file; text that is not NFC gets other ids there")
    if space:
        warnings.append("tokenizer: the space put before a text is in the file, but readers of byte-level BPE leave it out")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain, framed = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    before, after = framed != plain and framed[0] == bos, framed != plain and framed[-1] == eos
    if framed != [bos] * before + plain + [eos] * after:
        warnings.append("tokenizer: it puts more around a text than a first and a last token, which GGUF cannot say")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(after)
    writer.add_add_space_prefix(space)
    for name, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            writer.add_uint32(f"tokenizer.ggml.{theirs}_token_id", number)
    if template := tokenizer.chat_template:
        writer.add_chat_template(template if isinstance(template, str) else [{"name": n, "template": t} for n, t in template.items()])
    return warnings


def _read_tokenizer(source: Path) -> tuple[dict[str, Any], Any]:
    """The content of tokenizer.json, and the tokenizer as transformers opens it."""
    path = source / "tokenizer.json"
    if not path.is_file():
        raise BlockwrightError(f"{source}: no tokenizer.json", do="Add the model's tokenizer; a GGUF file holds it")
    try:
        spec = json.loads(Tokenizer.from_file(str(path)).to_str())  # in today's form, also where the file is older
        return spec, AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds for a damaged file
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise BlockwrightError(f"{source}: unreadable tokenizer ({line})", do="Copy the tokenizer's files again") from None


def _cuts(spec: dict[str, Any]) -> tuple[tuple[str, ...], bool]:
    """How a byte-level BPE (the content of tokenizer.json) cuts text, a key of CUTS where it is known; and whether it puts a space first.

    Raises BlockwrightError for any other tokenizer.
    """
    model, normalizer, before = spec["model"], spec["normalizer"], spec["pre_tokenizer"] or {"type": "none"}
    steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    affixes = any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    other = (
        f"{model['type']}" if model["type"] != "BPE"
        else "BPE with byte fallback, as sentencepiece makes it," if model.get("byte_fallback")
        else "BPE with marks at the ends of words" if affixes
        else f"BPE behind {steps[-1]['type']}" if steps[-1]["type"] != "ByteLevel"
        else f"BPE on text changed by {normalizer['type']}" if normalizer is not None and normalizer["type"] != "NFC"
        else None
    )  # fmt: skip
    if other:
        raise BlockwrightError(
            f"gguf: tokenizer {other} cannot be written", allowed="byte-level BPE, as GPT-2, Llama 3 and Qwen use", do="Use --to dense"
        )
    cuts = []
    for step in steps:
        if step["type"] == "Digits" and step["individual_digits"]:
            cuts.append("digits")
        elif step["type"] == "ByteLevel":
            cuts.append("bytes, GPT-2's words" if step["use_regex"] else "bytes")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            cuts.append(step["pattern"].get("Regex", "a fixed text"))
        else:
            cuts.append(step["type"])
    return tuple(cuts), bool(steps[-1]["add_prefix_space"])
