"""A recipe: what to do with which model, checked completely before torch is imported or anything is touched."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from blockwright import registry
from blockwright.errors import BlockwrightError
from blockwright.options import Positive

MAX_BYTES = 2**20  # a recipe is a page of text
PROMPTS = ["What is a Python decorator?", "Explain what a list comprehension does.", "Write a haiku about the sea."]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Text(_Strict):
    """Windows of a text: the zoo's name or a file, cut into `num` windows of `length` tokens."""

    text: str = Field("pydoc", description="a text of the zoo, or a UTF-8 file")
    num: Positive = Field(64, description="windows")
    length: int = Field(256, ge=2, le=1_000_000, description="tokens in a window")


class Measure(_Strict):
    """What to measure before and after."""

    quality: bool = Field(True, description="perplexity, KL and top-1 agreement with the dense model")
    blocks: bool = Field(True, description="the error that each block adds")
    use: bool = Field(True, description="decoding speed, peak memory and sample generations, each model in a process of its own")
    prompts: list[str] = Field(PROMPTS, description="what the samples continue")
    new_tokens: Positive = Field(48, description="tokens in a sample")


class Stage(_Strict):
    """One stage with its options, defaults filled in."""

    name: str
    options: dict[str, Any]


class Recipe(_Strict):
    """One main job."""

    model: str = Field(description="a model folder, a name of the zoo, or the id of a hub model")
    stages: list[Stage] = Field(description="what to do, in order")
    out: Path = Field(description="the folder to write")
    calibration: Text = Field(Text(), description="text that stages learn from")
    evaluation: Text = Field(Text(num=16), description="text that quality is measured on; shares no run of 20 words with calibration")
    embedding: Literal[4, 5, 6, 8] | None = Field(None, description="bits of the embedding (our own layout); null leaves it as it is")
    export: Literal["auto", "standard", "blockwright", "unrolled", "dense"] = Field("auto", description="layout of the files")
    dtype: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="dtype of what is not quantised")
    measure: Measure = Field(Measure(), description="what to measure")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of every random number")
    threads: Positive | None = Field(None, description="CPU threads; part of what a resumed run must repeat")
    memory: str | None = Field(None, description='refuse to start above this, e.g. "8GB"; null: what the machine has free')
    source_text: str = Field("", description="the recipe as written, for the report")


def load_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe from a YAML file or a mapping. Relative paths are relative to the working folder.

    Raises BlockwrightError, one line, for anything that is wrong: unknown keys and stages (with the nearest known name), values out of
    range, stages in a senseless order, YAML with duplicate keys, tabs, anchors or tags.
    """
    if isinstance(source, Mapping):
        data, text, where = dict(source), yaml.safe_dump(_plain(source), sort_keys=False), "recipe"
    else:
        path = Path(source)
        text, where = _read_text(path), path.name
        data = _read_yaml(text, path)
    raw_stages = data.get("stages", [])
    if not isinstance(raw_stages, list):
        raise BlockwrightError(f"{where}: stages is {raw_stages!r}", allowed="a list of stage names with their options")
    data["stages"] = [_stage(entry, where) for entry in raw_stages]
    data["source_text"] = text
    recipe: Recipe = checked(Recipe, data, where)
    check_order(recipe.stages)
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
    fields: dict[str, Any] = {
        o.name: (eval(o.annotation, names), Field(... if o.required else o.default, description=o.help))  # noqa: S307 (our own source)
        for o in method.options
    }
    return create_model(method.name, __config__=ConfigDict(extra="forbid"), **fields)


def check_order(stages: list[Stage]) -> None:
    """Raise BlockwrightError where a stage cannot work on what the one before it leaves."""
    left, by = "dense", "the model"
    for stage in stages:
        card = registry.method(stage.name).card
        if left not in card["accepts"]:
            needs = " or ".join(card["accepts"])
            raise BlockwrightError(
                f"{stage.name} after {by}: {stage.name} needs {needs} weights, and {by} leaves {left} ones",
                do=f"Put {stage.name} before {by}",
            )
        left, by = card["leaves"], stage.name


def _stage(entry: Any, where: str) -> Stage:
    if isinstance(entry, Stage):
        return entry
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise BlockwrightError(f"{where}: stage {entry!r}", allowed="a name, or one name with its options", do="Start each stage with `- name:`")
    [(name, options)] = entry.items()
    method = registry.method(str(name))
    if method.card["kind"] != "stage":
        raise BlockwrightError(f"{where}: {name} is of kind {method.card['kind']}", allowed="methods of kind stage", do="See `blockwright list`")
    model = option_model(method)
    options = {} if options is None else options
    place = f"{where}: {method.slug}"
    filled = checked(model, options, place).model_dump()
    for pattern, values in (options.get("overrides") or {}).items():  # the same options, for some layers
        checked(model, values, f"{place} overrides[{pattern!r}]")
    return Stage(name=method.slug, options=filled)


def _told(model: type[BaseModel], error: ErrorDetails, where: str) -> BlockwrightError:
    path = ".".join(str(p) for p in error["loc"])
    value = repr(error["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    fields = model.model_fields
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, error["loc"][:-1])
        near = registry.nearest(str(error["loc"][-1]), known)
        return BlockwrightError(f"{where}: unknown option {path}", allowed=", ".join(known), do=near)
    if error["type"] == "missing":
        text = fields[path].description if path in fields else ""
        return BlockwrightError(f"{where}: {path} is missing", do=f"Give `{path}:` ({text})")
    message = error["msg"][0].lower() + error["msg"][1:]
    message = message.replace("input should be ", "").replace("input", "value")
    return BlockwrightError(f"{where}: {path}={value}" if path else f"{where}: {value}", allowed=message)


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
        raise BlockwrightError(f"{path}{where}: {getattr(error, 'problem', None) or 'not YAML'}", do="See examples/ for the form") from None
    if not isinstance(data, dict):
        raise BlockwrightError(f"{path}: not a mapping", allowed="model, stages, out, ...", do="See examples/ for the form")
    return {str(k): v for k, v in data.items()}
