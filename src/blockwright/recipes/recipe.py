"""A recipe: what to do with which model, checked completely before torch is imported or anything is touched."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator
from pydantic_core import ErrorDetails

from blockwright import registry
from blockwright.errors import BlockwrightError
from blockwright.options import Positive

MAX_BYTES = 2**20  # a recipe is a page of text
PROMPTS = ["What is a Python decorator?", "Explain what a list comprehension does.", "Write a haiku about the sea."]


WHERE = ("targets", "ignore", "overrides")  # options that say where a stage works; the others say how


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Text(_Strict):
    """Windows of a text: the zoo's name or a file, cut into `num` windows of `length` tokens."""

    text: str = Field(default="pydoc", description="a text of the zoo, or a UTF-8 file")
    num: Positive = Field(default=64, description="windows")
    length: int = Field(default=256, ge=2, le=1_000_000, description="tokens in a window")


class Measure(_Strict):
    """What to measure before and after."""

    quality: bool = Field(default=True, description="perplexity, KL and top-1 agreement with the dense model")
    blocks: bool = Field(default=True, description="the error that each block adds")
    use: bool = Field(default=True, description="decoding speed, peak memory and sample generations, each model in a process of its own")
    prompts: list[str] = Field(default=PROMPTS, description="what the samples continue")
    new_tokens: Positive = Field(default=48, description="tokens in a sample")


class Stage(_Strict):
    """One stage with its options, defaults filled in."""

    name: str
    options: dict[str, Any]


class Recipe(_Strict):
    """One main job."""

    model: str = Field(description="a model folder, a name of the zoo, or the id of a hub model")
    stages: list[Stage] = Field(description="what to do, in order")
    out: Path = Field(description="the folder to write")
    calibration: Text = Field(default=Text(), description="text that stages learn from")
    evaluation: Text = Field(
        default=Text(num=16), description="text that quality is measured on; shares no run of 20 words with calibration"
    )
    embedding: Literal[4, 5, 6, 8] | None = Field(
        default=None, description="bits of the embedding (our own layout); null leaves it as it is"
    )
    export: Literal["auto", "standard", "blockwright", "unrolled", "dense"] = Field(default="auto", description="layout of the files")
    dtype: Literal["bf16", "fp16", "fp32"] = Field(default="bf16", description="dtype of what is not quantised")
    measure: Measure = Field(default=Measure(), description="what to measure")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="of every random number")
    threads: Positive | None = Field(default=None, description="CPU threads; part of what a resumed run must repeat")
    memory: str | None = Field(default=None, description='refuse to start above this, e.g. "8GB"; null: what the machine has free')
    source_text: str = Field(default="", description="the recipe as written, for the report")

    @field_validator("memory", mode="before")
    @classmethod
    def _has_a_unit(cls, value: Any) -> Any:
        if value is not None and not re.fullmatch(r"\d+(\.\d+)?\s*[KMG]i?B", str(value).strip(), re.IGNORECASE):
            raise ValueError('a number with KB, MB, GB, KiB, MiB or GiB, e.g. "8GB"')
        return value


def load_recipe(source: str | Path | Mapping[str, Any], *, out: Path | None = None) -> Recipe:
    """A recipe from a YAML file or a mapping, with `out`, where given, in place of its own. Relative paths start from the working folder.

    Raises BlockwrightError, one line, for anything that is wrong: unknown keys and stages (with the nearest known name), values out of
    range, stages in a senseless order, an output folder that would overwrite the model, YAML with duplicate keys, tabs, anchors or tags.
    """
    if isinstance(source, Mapping):
        data, text, where = dict(source), yaml.safe_dump(_plain(source), sort_keys=False), "recipe"
    else:
        path = Path(source)
        text, where = _read_text(path), path.name
        data = _read_yaml(text, path)
    if "stages" in data:
        if not isinstance(data["stages"], list):
            raise BlockwrightError(f"{where}: stages is {_shown(data['stages'])}", allowed="a list of stage names with their options")
        data["stages"] = [_stage(entry, where) for entry in data["stages"]]
    data["source_text"] = text
    if out is not None:
        data["out"] = out
    recipe: Recipe = checked(Recipe, data, where)
    check_order(recipe.stages)
    check_layout(recipe)
    check_paths(recipe)
    return recipe


def checked(model: type[BaseModel], data: Any, where: str) -> Any:
    """`data` as `model`. Raises BlockwrightError for the first thing that is wrong, in our words."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _told(model, error.errors()[0], where) from None


def option_model(method: registry.Method) -> type[BaseModel]:
    """A pydantic model of a method's options: types, ranges, defaults, help; its JSON schema is `model_json_schema()`."""
    names = registry.option_namespace()
    fields: dict[str, Any] = {}
    for o in method.options:
        try:
            kind = eval(o.annotation, dict(names))  # noqa: S307 (the source of an installed method)
        except (NameError, AttributeError, TypeError) as error:
            raise BlockwrightError(
                f"{method.slug}: option {o.name} has the type {o.annotation} ({error})",
                allowed="builtins, Literal, Any, Annotated and the types of blockwright.options",
            ) from None
        fields[o.name] = (kind, Field(... if o.required else o.default, description=o.help))
    model: type[BaseModel] = create_model(method.name, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
    return model


def check_order(stages: list[Stage]) -> None:
    """Raise BlockwrightError where a stage cannot work on what the one before it leaves."""
    left, by = "dense", "the model"
    for stage in stages:
        card = registry.method(stage.name).card
        if left not in card["accepts"]:
            needs = " or ".join(card["accepts"])
            raise BlockwrightError(
                f"{stage.name} after {by}: {stage.name} needs {needs} weights, and {by} leaves {left} ones",
                do=f"Put {stage.name} before {by}" if stage.name != by else "Use it once; `overrides` sets options for some layers",
            )
        left, by = card["leaves"], stage.name


def check_layout(recipe: Recipe) -> None:
    """Raise BlockwrightError where a stage always leaves what the layout asked for cannot hold: its card says which can (`layouts`)."""
    for stage in recipe.stages:
        card = registry.method(stage.name).card
        possible = ("auto", "blockwright", *card.get("layouts", (recipe.export,)))
        if recipe.export not in possible:
            raise BlockwrightError(
                f"export={recipe.export} after {stage.name}: it writes {card['writes']}", allowed=", ".join(possible), do="Use one of these"
            )


def check_paths(recipe: Recipe) -> None:
    """Raise BlockwrightError where writing the output would change the model that is read."""
    model, out = Path(recipe.model), recipe.out.absolute().resolve()
    if model.exists():
        source = model.absolute().resolve()
        if out == source or out in source.parents or source in out.parents:
            relation = "is" if out == source else "lies inside" if source in out.parents else "holds"
            raise BlockwrightError(
                f"out {recipe.out}: {relation} the model folder {model}",
                allowed="a folder apart from the model, which is never changed",
                do="Name another output folder",
            )


def _stage(entry: Any, where: str) -> Stage:
    if isinstance(entry, Stage):
        return entry
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise BlockwrightError(
            f"{where}: stage {_shown(entry)}", allowed="a name, or one name with its options", do="Start each stage with `- name:`"
        )
    [(name, options)] = entry.items()
    method = registry.method(str(name))
    if method.card["kind"] != "stage":
        raise BlockwrightError(
            f"{where}: {name} is of kind {method.card['kind']}", allowed="methods of kind stage", do="See `blockwright list`"
        )
    model = option_model(method)
    options = {} if options is None else options
    place = f"{where}: {method.slug}"
    filled = checked(model, options, place).model_dump()
    for option in WHERE:
        for pattern in filled.get(option) or ():
            _check_pattern(pattern, f"{place}.{option}")
    for pattern, values in (filled.get("overrides") or {}).items():  # the same options, for some layers
        _check_override(model, filled, values, f"{place}.overrides[{pattern!r}]")
    return Stage(name=method.slug, options=filled)


def _check_override(model: type[BaseModel], options: dict[str, Any], values: dict[str, Any], place: str) -> None:
    for name in values:
        if name in WHERE:
            raise BlockwrightError(
                f"{place}: {name} says where, not how", allowed=", ".join(n for n in model.model_fields if n not in WHERE)
            )
    checked(model, options | values, place)


def _check_pattern(pattern: str, place: str) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise BlockwrightError(f"{place}: {pattern!r} is no regular expression ({error})", do="Mend it, or name the layer") from None


def _told(model: type[BaseModel], error: ErrorDetails, where: str) -> BlockwrightError:
    path = ".".join(repr(p).strip("'") for p in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, error["loc"][:-1])
        near = registry.nearest(str(error["loc"][-1]), known)
        return BlockwrightError(f"{where}: unknown option {path}", allowed=", ".join(known), do=near)
    if error["type"] == "missing":
        text = model.model_fields[path].description if path in model.model_fields else ""
        return BlockwrightError(f"{where}: {path} is missing", do=f"Give `{path}:` ({text})")
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ").replace("Input", "value")
    message = message[0].lower() + message[1:]
    field = model.model_fields.get(str(error["loc"][0])) if error["loc"] else None
    meaning = f"{path}: {field.description}" if field is not None and field.description else None
    return BlockwrightError(
        f"{where}: {path}={_shown(error['input'])}" if path else f"{where}: {_shown(error['input'])}", allowed=message, do=meaning
    )


def _shown(value: Any) -> str:
    """A value for an error message: short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a deep nest
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return [name for name in model.model_fields if name != "source_text"]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BlockwrightError(f"{path}: {path.stat().st_size} bytes", allowed=f"a recipe of at most {MAX_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise BlockwrightError(f"recipe {path}: is a folder", do="Name a YAML file; see examples/") from None
    except FileNotFoundError:
        raise BlockwrightError(f"recipe {path}: no such file", do="See examples/ for recipes to start from") from None
    except UnicodeDecodeError as error:
        raise BlockwrightError(f"recipe {path}: not UTF-8 (byte {error.start})", do="Save it as UTF-8 text") from None
    except OSError as error:
        raise BlockwrightError(f"recipe {path}: cannot be read ({error.strerror})") from None


class _Loader(yaml.SafeLoader):
    """Plain YAML only: no tags, no anchors, no duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed", problem_mark=event.start_mark)
        if getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(problem=f"the tag {event.tag} is not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(text: str, path: Path) -> dict[str, Any]:
    for number, line in enumerate(text.splitlines(), 1):
        if "\t" in line[: len(line) - len(line.lstrip())]:
            raise BlockwrightError(f"{path} line {number}: indented with a tab", allowed="spaces", do="Replace the tab by spaces")
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 (a subclass of SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise BlockwrightError(f"{path}{where}: {problem}", do="See examples/ for the form") from None
    if not isinstance(data, dict):
        raise BlockwrightError(f"{path}: not a mapping", allowed="model, stages, out, ...", do="See examples/ for the form")
    return {str(k): v for k, v in data.items()}
