"""What a recipe names is found, opened and checked, before any work."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from blockwright import registry, zoo
from blockwright.blocks import folders, layers
from blockwright.blocks.layers import Blueprint
from blockwright.errors import BlockwrightError
from blockwright.recipes.recipe import Recipe, Stage, Text

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]


@dataclasses.dataclass(frozen=True)
class Job:
    """A recipe with everything it names found, opened and checked."""

    recipe: Recipe
    source: Path  # the dense model's folder
    dense: Blueprint
    calibration: Tensor | None  # ids [n, T]
    evaluation: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of what is written and not quantised."""
        return DTYPES[self.recipe.dtype]

    @property
    def work(self) -> Path:
        """The journal, beside the output."""
        out = self.recipe.out.absolute()
        return out.with_name(f".{out.name}.work")


def prepare(recipe: Recipe) -> Job:
    """Find and open what a recipe names. Raises BlockwrightError for everything that is wrong with it."""
    source = find_model(recipe.model)
    _check_language_model(layers.read_config(source))
    dense = Blueprint.of_folder(source)
    if recipe.embedding is not None:
        _check_embedding(dense)
    tokenizer = _tokenizer(source)
    evaluation, heard = _ids(recipe.evaluation, "evaluation", dense, tokenizer)
    calibration = None
    if any(_learns(stage) for stage in recipe.stages):
        calibration, learned = _ids(recipe.calibration, "calibration", dense, tokenizer)
        run = zoo.shared_run(learned, heard)
        if run is not None:
            raise BlockwrightError(
                f"calibration and evaluation text share a run of {zoo.RUN} words: {run[:80]!r}...",
                allowed="texts that share no such run",
                do="Evaluate on another text: what was learned from the text it is measured on proves nothing",
            )
    return Job(recipe, source, dense, calibration, evaluation)


def find_model(name: str) -> Path:
    """The folder of a zoo model, of a path, or of a hub id ("owner/name", downloaded only because it was named)."""
    if name in zoo.MODELS:
        return zoo.model_folder(name)
    path = Path(name)
    owner, slash, rest = name.partition("/")
    allowed = f"a model folder, a hub id, or one of {', '.join(zoo.MODELS)}"
    if not path.exists() and slash and owner not in ("", ".", "..", "~") and "/" not in rest and rest:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, allow_patterns=HUB_FILES))
        except Exception as error:  # the hub's client raises a dozen kinds
            raise BlockwrightError(
                f"model {name!r}: no such folder, and not to be had from the hub ({type(error).__name__})",
                allowed=allowed,
                do="Check the name",
            ) from None
    if not path.exists():
        raise BlockwrightError(
            f"model {name!r}: no such folder", allowed=allowed, do=registry.nearest(name, zoo.MODELS) or "Check the path"
        )
    layers.read_config(path)  # says what is wrong with an empty folder
    return path


def check_output(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise BlockwrightError where the output folder may not be written."""
    folders.settle(out)
    if out.exists() and not out.is_dir():
        raise BlockwrightError(f"out {out}: is a file", do="Name a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        done = (out / "blockwright.json").exists() and resume
        raise BlockwrightError(
            f"out {out}: {'this run is finished already' if done else 'not empty'}",
            allowed="a new or empty folder",
            do="Use --overwrite to replace it, or name another folder",
        )


def _learns(stage: Stage) -> bool:
    """Whether a stage needs the calibration text: always, or by an option that its card names in `text_for`."""
    card = registry.method(stage.name).card
    return "calibration" in card["needs"] or any(stage.options[name] for name in card.get("text_for", ()))


def _check_language_model(config: PreTrainedConfig) -> None:
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise BlockwrightError(
            f"architecture {config.model_type!r}: no language model",
            allowed="decoders that AutoModelForCausalLM builds (Llama, Qwen, Mistral, Gemma, GPT-2 and the like)",
            do="See CONTRIBUTING.md on supporting an architecture",
        )


def _check_embedding(model: Blueprint) -> None:
    embedding = model.skeleton().get_input_embeddings()
    if type(embedding) is not torch.nn.Embedding:
        raise BlockwrightError(
            f"embedding: {type(embedding).__name__} cannot be quantised",
            allowed="a plain nn.Embedding",
            do="Leave `embedding` out of the recipe",
        )


def _tokenizer(source: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a missing or damaged tokenizer
        raise BlockwrightError(
            f"model {source}: its tokenizer is missing or damaged ({type(error).__name__})",
            allowed="a folder with tokenizer.json, or what this version of transformers reads",
            do="Copy the tokenizer's files into the folder",
        ) from None


def _ids(text: Text, purpose: str, model: Blueprint, tokenizer: Any) -> tuple[Tensor, str]:
    """Windows of a text as ids [num, length], and the words that they hold."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and text.length > limit:
        raise BlockwrightError(f"{purpose}: length={text.length}", allowed=f"up to {limit}, the positions that the model has")
    part: Any = purpose if text.text in zoo.TEXTS else "all"
    try:
        ids = zoo.windows(zoo.text(text.text, part), num=text.num, length=text.length, tokenizer=tokenizer)
    except BlockwrightError as error:
        raise BlockwrightError(f"{purpose} {error.what}", allowed=error.allowed, do=error.do) from None
    if int(ids.max()) >= model.config.vocab_size:
        raise BlockwrightError(
            f"{purpose} text: the tokenizer gives id {int(ids.max())}, and the model has {model.config.vocab_size} tokens",
            do="Use the tokenizer and the model of one folder",
        )
    return ids, str(tokenizer.decode(ids.flatten()))
