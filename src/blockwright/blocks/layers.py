"""A model as a chain of blocks: find the chain and its linears by structure, swap modules, rebuild a model from its blueprint.

A `Blueprint` is a model without its weights in memory: the config, the place of every tensor, and the `forms` of modules that are no
longer what the architecture's own code would build (a packed linear, a linear with an adapter, a narrower linear). Structural changes
(drop, share) are edits of the blueprint; files are never touched.
"""

import copy
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from blockwright.blocks.block_sparse import BlockSparseLinear
from blockwright.blocks.dual_grained import DualGrainedLinear
from blockwright.blocks.linear import is_linear as is_linear
from blockwright.blocks.linear import size as size
from blockwright.blocks.lora import LoraLinear
from blockwright.blocks.low_rank import LowRankLinear
from blockwright.blocks.offset_packed import OffsetLinear
from blockwright.blocks.packed import PackedEmbedding, PackedLinear
from blockwright.blocks.parameters import Place, Tensors
from blockwright.blocks.variants import LinearAttention, LinearFfn, NoAttention, NoFfn, Skip
from blockwright.errors import BlockwrightError

Form = dict[str, Any]  # JSON: {"form": "packed", "bits": 4, ...}: how to rebuild a module without its weights

# The modules that may stand where the architecture built another: each has form() and from_form(module it replaces, form).
# Of any form, "size": [N, K] tells that the linear it replaces is not of the architecture's size; {"form": "linear", "size"} is that alone.
FORMS: dict[str, Any] = {
    "packed": PackedLinear,
    "packed_embedding": PackedEmbedding,
    "lora": LoraLinear,
    "low_rank": LowRankLinear,
    "dual_grained": DualGrainedLinear,
    "offset_packed": OffsetLinear,
    "block_sparse": BlockSparseLinear,
    "no_attention": NoAttention,
    "linear_attention": LinearAttention,
    "no_ffn": NoFfn,
    "linear_ffn": LinearFfn,
    "skip": Skip,
}

# Linears that are not only called, by architecture and end of name: the model uses their weights itself, so nothing else can stand there.
FIXED = {
    "mamba": ("dt_proj",),
    "falcon_mamba": ("dt_proj",),
    "jamba": ("dt_proj",),
    "longcat_flash": ("classifier",),
    "rwkv": ("attention.output", "feed_forward.value"),
}

# Ends of the names of tensors that keep their dtype, whatever that of the model they are read or written with.
AS_STORED = ("weight_step", "weight_offset")


@dataclass(frozen=True)
class Blueprint:
    """A model as config, tensors by place, and forms by module name. Immutable: edits give a new one."""

    config: PreTrainedConfig
    tensors: Tensors
    forms: Mapping[str, Form] = field(default_factory=dict)
    origin: tuple[int, ...] = ()  # for each block, which block of the dense model it was

    @classmethod
    def of_folder(cls, folder: Path) -> "Blueprint":
        """A dense model folder as transformers writes it. Raises BlockwrightError where config and weights disagree."""
        config = read_config(folder)
        if getattr(config, "quantization_config", None):
            raise BlockwrightError(
                f"{folder}: already quantised", allowed="a dense model folder", do="Start from the model it was made from"
            )
        tensors = Tensors.of_folder(folder)
        depth = getattr(config, _depth_key(config), None)
        if isinstance(depth, int) and depth > len(tensors):  # before a skeleton of that depth is built
            raise BlockwrightError(
                f"model {folder}: config.json asks for {depth} blocks, and the weights hold {len(tensors)} tensors",
                do="Use the config.json and the weights of one model",
            )
        blueprint = cls(config, _match(skeleton(config), tensors, folder))
        return blueprint

    @classmethod
    def of_module(cls, model: nn.Module) -> "Blueprint":
        """A transformers model in memory. Its tensors are referred to, not copied."""
        if not isinstance(model, PreTrainedModel):
            raise BlockwrightError(
                f"model: {type(model).__name__}", allowed="a transformers PreTrainedModel", do="Load it with AutoModelForCausalLM"
            )
        forms = {name: m.form() for name, m in model.named_modules() if isinstance(m, tuple(FORMS.values()))}  # type: ignore[attr-defined]
        state = {**dict(model.named_parameters(remove_duplicate=False)), **_persistent_buffers(model)}
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        here = dict(model.named_modules())
        for name, built in skeleton(config).named_modules():
            now = here.get(name)
            if now is not None and is_linear(built) and (is_linear(now) or name in forms) and size(now) != size(built):
                forms[name] = forms.get(name, {"form": "linear"}) | {"size": list(size(now))}
        return cls(config, Tensors.of_memory(state), forms)

    def skeleton(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model with every weight on meta and its own forms in place; buffers that no file holds (rotary tables) are real.

        dtype : that the model will compute in (None: the config's); some buffers, such as Gemma's embedding scale, are rounded to it.
        """
        model = skeleton(self.config, dtype)
        for name, form in self.forms.items():
            place(model, name, form)
        return model

    def block(self, name: str, dtype: torch.dtype | None = None) -> nn.Module:
        """One block of the skeleton, by its dotted name."""
        block = copy.deepcopy(_template(type(self.config), self.config.to_json_string(), dtype).get_submodule(name))  # type: ignore[arg-type]
        for full, form in self.forms.items():
            if full.startswith(name + "."):
                place(block, full.removeprefix(name + "."), form)
        return block

    def build(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The whole model in memory, in eval mode. dtype: of floating-point tensors; None keeps each as stored."""
        model = self.skeleton(dtype)
        fill(model, self.tensors, device=device, dtype=dtype)
        return cast(PreTrainedModel, model.eval())

    def edited(self, **changes: Any) -> "Blueprint":
        return replace(self, **changes)

    def with_layers(self, keep: list[int]) -> "Blueprint":
        """Only the blocks `keep` (old indices, in the new order), renumbered; per-layer lists of the config follow."""
        path = chain_path(self.skeleton())
        total = num_blocks(self.config)
        config = copy.deepcopy(self.config)
        for key, value in config.to_dict().items():
            if isinstance(value, list) and len(value) == total and "layer" in key:
                setattr(config, key, [value[i] for i in keep])
        setattr(config, _depth_key(config), len(keep))
        old_of_new = {f"{path}.{new}.": f"{path}.{old}." for new, old in enumerate(keep)}

        def rename(names: Iterable[str]) -> dict[str, str]:
            names = list(names)
            outside = {n: n for n in names if not n.startswith(path + ".")}
            inside = {
                new_prefix + n[len(old_prefix) :]: n
                for new_prefix, old_prefix in old_of_new.items()
                for n in names
                if n.startswith(old_prefix)
            }
            return outside | inside

        forms = {new: self.forms[old] for new, old in rename(self.forms).items()}
        origin = self.origin or tuple(range(total))
        return Blueprint(config, self.tensors.renamed(rename(self.tensors)), forms, tuple(origin[i] for i in keep))

    def with_shared(self, parent_of: Mapping[int, int], own: Callable[[str], bool]) -> "Blueprint":
        """Block `child` takes the tensors of block `parent_of[child]`, by place; names for which `own(name)` holds stay its own.

        Raises BlockwrightError when two blocks do not hold tensors of the same names and shapes.
        """
        path = chain_path(self.skeleton())
        places, forms = dict(self.tensors.places), dict(self.forms)
        for child, parent in parent_of.items():
            mine, theirs = f"{path}.{child}.", f"{path}.{parent}."
            shape = {n[len(mine) :]: self.tensors.facts(n).shape for n in self.tensors if n.startswith(mine)}
            other = {n[len(theirs) :]: self.tensors.facts(n).shape for n in self.tensors if n.startswith(theirs)}
            if shape != other:
                odd = sorted(k for k in shape.keys() | other.keys() if shape.get(k) != other.get(k))[0]
                raise BlockwrightError(
                    f"blocks {parent} and {child} cannot share: {odd} is {other.get(odd)} and {shape.get(odd)}",
                    allowed="blocks of one shape in a group",
                    do="Use a smaller group, or protect one of the two blocks",
                )
            for name in shape:
                if not own(name):
                    places[mine + name] = places[theirs + name]
            for name, form in self.forms.items():
                if name.startswith(theirs):
                    forms[mine + name[len(theirs) :]] = form
        tensors = self.tensors.replaced(list(self.tensors), places, self.tensors.memory)
        return self.edited(tensors=tensors, forms=forms)


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a model folder. Runs no code of the folder. Raises BlockwrightError when it is missing, empty or unknown."""
    if not folder.is_dir() or not any(folder.iterdir()):
        state = "does not exist" if not folder.exists() else "is empty" if folder.is_dir() else "is no folder"
        raise BlockwrightError(
            f"model {folder}: {state}", allowed="a model folder with config.json and safetensors weights", do="Check the path"
        )
    if not (folder / "config.json").is_file():
        raise BlockwrightError(f"model {folder}: no config.json", do="Name a model folder as save_pretrained writes it")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a bad or unknown config
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise BlockwrightError(
            f"model {folder}: unsupported config ({line})",
            allowed="a decoder that this version of transformers has the code for",
            do="Update transformers, or see CONTRIBUTING.md on supporting an architecture",
        ) from None
    return config


def skeleton(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a config with all that a file holds on meta and the other buffers real: costs no memory and no initialisation."""
    return copy.deepcopy(_template(type(config), config.to_json_string(), dtype))  # type: ignore[arg-type]


@lru_cache(maxsize=8)
def _template(config_class: type[PreTrainedConfig], config_json: str, dtype: torch.dtype | None) -> PreTrainedModel:
    try:
        config = config_class.from_dict(json.loads(config_json))
        with _parameters_on_meta():
            model = _maker(config)(config, dtype=dtype or config.dtype or torch.float32).eval().requires_grad_(False)
    except BlockwrightError:
        raise
    except Exception as error:  # sizes that do not fit together, or into this machine: whatever the architecture's code raises
        line = next(iter(str(error).splitlines()), "")
        raise BlockwrightError(
            f"architecture {config_class.model_type!r}: config.json's model cannot be built ({type(error).__name__}: {line})",
            do="Use the config.json and the weights of one model",
        ) from None
    for full, module in model.named_modules():
        if full.endswith(FIXED.get(config.model_type, ())):
            module.fixed = True  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to("meta")
    return cast(PreTrainedModel, model)


def _maker(config: PreTrainedConfig) -> Callable[..., PreTrainedModel]:
    """What builds the model of a config: the class of transformers that it names, else the causal language model or base model."""
    names = config.architectures
    named: Any = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if isinstance(named, type) and issubclass(named, PreTrainedModel) and named.config_class is type(config):  # type: ignore[attr-defined]
        return cast(Callable[..., PreTrainedModel], named._from_config)  # type: ignore[attr-defined]
    for auto in (AutoModelForCausalLM, AutoModel):
        if type(config) in auto._model_mapping:
            return cast(Callable[..., PreTrainedModel], auto.from_config)
    raise BlockwrightError(
        f"architecture {config.model_type!r}: unsupported",
        allowed="any model that AutoModelForCausalLM or AutoModel builds",
        do="See CONTRIBUTING.md on supporting an architecture",
    )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter registered inside goes to meta at once; buffers are computed as usual."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def chain_path(model: nn.Module) -> str:
    """The dotted name of the chain of blocks: the ModuleList of like modules that holds the most parameters.

    Raises BlockwrightError for a model without one.
    """

    def weight(m: nn.Module) -> int:
        return sum(p.numel() for p in m.parameters())

    best = max(
        ((weight(m), -name.count("."), name) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)),
        default=None,
    )
    if best is None:
        raise BlockwrightError(
            f"{type(model).__name__}: no chain of blocks found",
            allowed="a model whose layers are an nn.ModuleList",
            do="See CONTRIBUTING.md on supporting an architecture",
        )
    return best[2]


def num_blocks(config: PreTrainedConfig) -> int:
    return int(getattr(config, _depth_key(config)))


def _depth_key(config: PreTrainedConfig) -> str:
    return next((k for k in ("num_hidden_layers", "n_layer", "num_layers") if k in config.to_dict()), "num_hidden_layers")


def matrix(linear: nn.Module) -> Tensor:
    """The weight of a dense linear as outputs x inputs: a view, without gradients."""
    weight = cast(Tensor, linear.weight)
    return (weight.T if isinstance(linear, Conv1D) else weight).detach()


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Full dotted name -> dense linear of the chain of blocks, in the order of the module tree."""
    path = chain_path(model) + "."
    return {n: m for n, m in model.named_modules() if n.startswith(path) and is_linear(m)}


def targeted(linears: Mapping[str, nn.Module], targets: Iterable[str], ignore: Iterable[str]) -> dict[str, nn.Module]:
    """Those that `targets` names and `ignore` does not; a transformers Conv1D counts as the target "Linear".

    Raises BlockwrightError for one that is fixed.
    """
    targets, ignore = list(targets), list(ignore)
    wanted = [*targets, "Conv1D"] if "Linear" in targets else targets
    chosen = {n: m for n, m in linears.items() if selected(n, m, wanted, ignore)}
    for name in (n for n, m in chosen.items() if fixed(m)):
        ends = next(ends for ends in FIXED.values() if name.endswith(ends))
        raise BlockwrightError(
            f"{name}: the model uses its weight without calling it, so it cannot be treated",
            allowed="linears that are only called",
            do=f"Leave it as it is: `ignore: [{', '.join(ends)}]`",
        )
    return chosen


def fixed(linear: nn.Module) -> bool:
    """Whether this linear of a skeleton must stay as it is, since the model uses its weight without calling it (see FIXED)."""
    return getattr(linear, "fixed", False)


def selected(name: str, module: nn.Module, targets: Iterable[str], ignore: Iterable[str]) -> bool:
    """Whether `targets` names this module and `ignore` does not: a class name, a dotted name, its end, or `re:<regex>`."""

    def named(pattern: str) -> bool:
        if pattern.startswith("re:"):
            return re.search(pattern[3:], name) is not None
        return pattern in (name, type(module).__name__) or name.endswith("." + pattern) or name.startswith(pattern + ".")

    return any(map(named, targets)) and not any(map(named, ignore))


def swap(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module `name` stands."""
    parent, _, last = name.rpartition(".")
    owner = root.get_submodule(parent)
    if isinstance(owner, (nn.ModuleList, nn.Sequential)):
        owner[int(last)] = new
        return
    old = getattr(owner, last)
    setattr(owner, last, new)
    if last == "k_proj" and is_linear(old) and is_linear(new) and hasattr(owner, "num_key_value_groups"):
        owner.num_key_value_groups = owner.num_key_value_groups * size(old)[0] // size(new)[0]  # query heads that read one key head


def place(root: nn.Module, name: str, form: Form) -> None:
    """Put what `form` describes, without its tensors, where the module `name` stands."""
    replaced = root.get_submodule(name)
    if "size" in form:
        replaced = resized(replaced, *form["size"])
        swap(root, name, replaced)
    if form["form"] != "linear":
        swap(root, name, FORMS[form["form"]].from_form(replaced, form))


def resized(linear: nn.Module, n: int, k: int) -> nn.Module:
    """A linear of the same kind on meta, with N outputs and K inputs."""
    bias = linear.bias is not None
    with torch.device("meta"):
        new = Conv1D(n, k) if isinstance(linear, Conv1D) else nn.Linear(k, n, bias=bias)
    return new.eval().requires_grad_(False)


def fill(
    module: nn.Module, tensors: Tensors, prefix: str = "", device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> None:
    """Give every meta tensor of `module` its value, read by name (`prefix` + its name). Shared places give shared tensors.

    Raises BlockwrightError naming the tensor that is not finite.
    """
    wanted = {prefix + name: name for name, t in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()] if t.is_meta}
    for missing in sorted(wanted.keys() - tensors.keys()):
        raise BlockwrightError(f"tensor {missing}: not in the model's files", do="Copy the model folder again, whole")
    filled: dict[Place, nn.Parameter] = {}
    names = list(wanted)
    for start in range(0, len(names), 16):  # a few at a time: what is read and what is kept may differ in dtype
        values = tensors.read(names[start : start + 16])
        for full, value in values.items():
            place = tensors[full]
            if place not in filled:
                filled[place] = nn.Parameter(_ready(full, value, device, dtype), requires_grad=False)
            owner, _, last = wanted[full].rpartition(".")
            holder = module.get_submodule(owner)
            if last in holder._parameters:
                holder._parameters[last] = filled[place]
            else:
                holder._buffers[last] = filled[place].data
    for name, part in module.named_modules():
        if isinstance(part, (DualGrainedLinear, BlockSparseLinear)):
            part.check((prefix + name).rstrip("."))


def _ready(name: str, value: Tensor, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
    check_finite(value, name)
    narrower = dtype is not None and dtype.itemsize < value.dtype.itemsize
    kept = name.endswith(AS_STORED) or (name.endswith("weight_scale") and narrower)
    if dtype is not None and value.is_floating_point() and not kept:
        value = value.to(dtype)
    return value.to(device)


def check_finite(value: Tensor, what: str) -> None:
    """Raise BlockwrightError naming `what` when a value is NaN or infinite."""
    if value.is_floating_point() and value.numel() and not bool(torch.isfinite(value.abs().max())):
        bad = (~torch.isfinite(value)).nonzero()[0].tolist()
        raise BlockwrightError(
            f"{what}: {value[tuple(bad)].item()} at {bad}",
            allowed="finite values",
            do="Repair or download the model again; nothing was written",
        )


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    return {name: b for name, b in model.named_buffers(remove_duplicate=False) if name in state}


def _match(model: PreTrainedModel, tensors: Tensors, folder: Path) -> Tensors:
    """The tensors under the model's own names. Raises BlockwrightError where config.json and the weights disagree."""
    expected = dict(model.named_parameters(remove_duplicate=False)) | _persistent_buffers(model)
    tensors = _under_module_names(model, tensors, expected.keys())
    prefix = model.base_model_prefix + "."
    names = {name: next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in tensors), None) for name in expected}
    source: dict[int, str] = {}  # tied weights: one parameter under two names, stored under the first
    for name, found in names.items():
        if found is not None:
            source.setdefault(id(expected[name]), found)
    for name, found in names.items():
        stored = source.get(id(expected[name]))
        if stored is None:
            _refuse_parts(model, name, tensors, folder)
            raise BlockwrightError(
                f"model {folder}: config.json asks for tensor {name} {tuple(expected[name].shape)}, which the weights lack",
                do="Use the config.json and the weights of one model",
            )
        if found is not None and tensors.facts(found).shape != tuple(expected[name].shape):
            raise BlockwrightError(
                f"model {folder}: {found} is {tensors.facts(found).shape} in the weights and {tuple(expected[name].shape)} by config.json",
                do="Use the config.json and the weights of one model",
            )
        if found is not None and found != stored and not torch.equal(*tensors.read([found, stored]).values()):
            raise BlockwrightError(
                f"model {folder}: config.json ties {name} to {stored}, and the weights hold two different tensors",
                do='Set "tie_word_embeddings": false in config.json if they are meant to differ',
            )
    known = {n for n in names.values() if n is not None}
    layer = re.compile(rf"({re.escape(prefix)})?{re.escape(chain_path(model).removeprefix(prefix))}\.\d+\.")
    for extra in sorted(tensors.keys() - known):
        if layer.match(extra) and not extra.endswith((".attn.bias", ".masked_bias", ".rotary_emb.inv_freq")):
            raise BlockwrightError(
                f"model {folder}: the weights hold {extra}, which config.json does not know",
                do="Use the config.json and the weights of one model",
            )
    return tensors.renamed({name: source[id(parameter)] for name, parameter in expected.items()})


def _refuse_parts(model: PreTrainedModel, name: str, tensors: Tensors, folder: Path) -> None:
    """Raise BlockwrightError where the files hold this tensor in parts that transformers joins on loading, as those of most experts do."""
    for joined in (c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)):
        parts = next((n for s in joined.source_patterns for n in sorted(tensors) if fnmatch(n, f"*{s}")), None)
        if parts and any(pattern.strip(".^$") in name for pattern in joined.target_patterns):
            raise BlockwrightError(
                f"model {folder}: {name} lies in parts in its files ({parts}, ...), which only transformers joins",
                allowed="files that hold every tensor whole",
                do="Open it with transformers and call stages on the model in memory, in Python",
            )


def _under_module_names(model: PreTrainedModel, tensors: Tensors, expected: Collection[str]) -> Tensors:
    """The tensors under the names that transformers gives them on loading: files of some architectures name them otherwise (GPT-NeoX)."""
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    new_names = {n: n for n in tensors if n in expected}
    for n in sorted(tensors.keys() - new_names.keys()):
        new_names.setdefault(rename_source_key(n, renamings, [])[0], n)
    return tensors.renamed(new_names)


def check_against_skeleton(model: Blueprint, folder: Path) -> None:
    """Raise BlockwrightError where the tensors of a folder are not those that its config and forms ask for."""
    skeleton = model.skeleton()
    expected = dict(skeleton.named_parameters(remove_duplicate=False)) | _persistent_buffers(skeleton)
    for name, t in expected.items():
        if name not in model.tensors or model.tensors.facts(name).shape != tuple(t.shape):
            found = model.tensors.facts(name).shape if name in model.tensors else "missing"
            raise BlockwrightError(f"{folder}: tensor {name} is {found}, expected {tuple(t.shape)}", do="Write or copy the folder again")
