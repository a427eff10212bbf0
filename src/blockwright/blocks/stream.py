"""A model block by block: one block resident at a time, its arguments recorded once, its inputs flowing from block to block.

`Stream` embeds the calibration tokens, records what the model passes to each block (masks, rotary tables, flags; Gemma-like models pass
different ones to different layers) by one pass over stubs, and loads blocks one at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from blockwright.blocks import layers
from blockwright.blocks.layers import Blueprint
from blockwright.errors import BlockwrightError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # what follows the hidden states: positional, by name
Hear = Callable[[str, Tensor, Tensor], None]  # a linear's name, its inputs, the gradient at its outputs


class Block:
    """One block of the chain, resident in fp32, with the arguments that its model passes it.

    index : position in the chain. name : dotted name in the model. module : its modules, without gradients, in eval mode.
    """

    def __init__(
        self,
        index: int,
        name: str,
        module: nn.Module,
        *,
        arguments: list[Arguments] | None,
        shared: frozenset[str],
        batch: int,
        resized: frozenset[str] = frozenset(),
        mask: Int[Tensor, "n T"] | None = None,
    ) -> None:
        self.index, self.name, self.module, self.shared, self.resized, self.batch = index, name, module, shared, resized, batch
        self.forms: dict[str, layers.Form] = {}  # full name -> form, of the modules swapped since loading
        self._arguments, self._mask = arguments, mask
        self._real: Tensor | None = None  # the mask of the samples that are in the block now

    def linears(self, targets: Iterable[str] = ("Linear",), ignore: Iterable[str] = ()) -> dict[str, nn.Module]:
        """Full dotted name -> dense linear, in the order of the module tree; shared ones only in the first block that holds them, and
        none that is fixed (layers.FIXED).

        A transformers Conv1D counts as "Linear".
        """
        found = {f"{self.name}.{n}": m for n, m in self.module.named_modules() if layers.is_linear(m) and not layers.fixed(m)}
        return layers.targeted({n: m for n, m in found.items() if n not in self.shared}, targets, ignore)

    def swap(self, name: str, new: nn.Module) -> None:
        """Put `new`, one of layers.FORMS or a dense linear of another size, where the module of this full name stands."""
        layers.swap(self.module, name.removeprefix(self.name + "."), new)
        dense = layers.is_linear(new)
        form = {"form": "linear"} if dense else new.form()  # type: ignore[operator]
        own_size = dense or name in self.resized or "size" in self.forms.get(name, {})
        self.forms[name] = form | ({"size": list(layers.size(new))} if own_size else {})

    def __call__(self, x: Float[Tensor, "b T d"], rows: slice | list[int] = slice(None)) -> Float[Tensor, "b T d"]:
        """The block's output for the samples `rows` of the calibration set, whose hidden states are x. Differentiable."""
        if self._arguments is None:
            raise BlockwrightError(f"block {self.name}: loaded without inputs", do="Ask for inputs='treated' or 'dense'")
        entries = self._arguments
        if len(entries) > 1:
            entries = entries[rows] if isinstance(rows, slice) else [entries[i] for i in rows]
        real = None if self._mask is None else self._mask[rows]
        if len({_absent(entry) for entry in entries}) > 1:  # transformers passes no mask for a sample without padding
            alone = [slice(i, i + 1) for i in range(len(entries))]
            return torch.cat([self._run(x[i], entries[i], None if real is None else real[i]) for i in alone])
        return self._run(x, entries, real)

    def _run(self, x: Float[Tensor, "b T d"], entries: list[Arguments], real: Int[Tensor, "b T"] | None) -> Float[Tensor, "b T d"]:
        args, kwargs = _merged(entries)
        self._real = real
        out = self.module(x, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def outputs(self, x: Float[Tensor, "n T d"]) -> Float[Tensor, "n T d"]:
        """The block's output for all samples, in mini-batches, without gradients. Raises BlockwrightError where it is not finite."""
        out = torch.empty_like(x)
        for rows in batches(len(x), self.batch):
            out[rows] = self(x[rows], rows)
        layers.check_finite(out, f"output of block {self.name}")
        return out

    def observe(self, x: Float[Tensor, "n T d"], make: "type[Stat]", linears: Iterable[str] | None = None) -> "dict[str, Any]":
        """Run all samples through the block and gather `make(in_features)` over the inputs of each named linear (default: all).

        Padding is left out, and samples that have some are added one by one; but linears that hear only some tokens, as experts do, count
        it: which tokens they hear is not known here. Raises BlockwrightError naming the linear whose inputs are not finite.
        """
        modules = {n: m for n, m in self.linears().items() if linears is None or n in set(linears)}
        stats = {n: make(layers.size(m)[1]) for n, m in modules.items()}

        def hook(stat: Stat) -> Any:
            def hear(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                tokens, real = args[0].detach().reshape(-1, args[0].shape[-1]), self._real
                if real is None or bool(real.all()) or len(tokens) != real.numel():
                    stat.add(tokens)
                    return
                for sample, there in zip(tokens.unflatten(0, real.shape), real.to(tokens.device, torch.bool), strict=True):
                    if bool(there.any()):
                        stat.add(sample[there])

            return hear

        handles = [m.register_forward_pre_hook(hook(stats[n])) for n, m in modules.items()]
        try:
            self.outputs(x)
        finally:
            for handle in handles:
                handle.remove()
        for name, stat in stats.items():
            layers.check_finite(stat.summary(), f"calibration inputs of {name}")
        return stats

    def differentiate(self, x: Float[Tensor, "n T d"], gradient: Float[Tensor, "n T d"], hear: "Hear") -> Float[Tensor, "n T d"]:
        """The gradient at the block's inputs x of a scalar whose gradient at its outputs is `gradient`, in mini-batches.

        hear : called for each mini-batch and linear with its full name, its inputs [t, K] and the gradient at its outputs [t, N]; without
        padding, as in `observe`.
        """
        out = torch.empty_like(x)
        modules = self.linears()
        heard: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(name: str) -> Any:
            return lambda module, args, y: heard.update({name: (args[0].detach(), y)})

        handles = [m.register_forward_hook(hook(n)) for n, m in modules.items()]
        try:
            for rows in batches(len(x), self.batch):
                heard.clear()
                with torch.enable_grad():
                    inputs = x[rows].requires_grad_()
                    y = self(inputs, rows)
                    found = torch.autograd.grad(
                        y, [inputs, *(o for _, o in heard.values())], gradient[rows], materialize_grads=True, allow_unused=True
                    )
                out[rows] = found[0]
                real = None if self._real is None else self._real.flatten().to(x.device, torch.bool)
                for (name, (seen, _)), g in zip(heard.items(), found[1:], strict=True):
                    tokens, gradients = (t.reshape(-1, t.shape[-1]) for t in (seen, g))
                    if real is not None and len(tokens) == len(real):
                        tokens, gradients = tokens[real], gradients[real]
                    hear(name, tokens, gradients)
        finally:
            for handle in handles:
                handle.remove()
        layers.check_finite(out, f"gradient at the inputs of block {self.name}")
        return out


class Stream:
    """The parts of a model around its chain of blocks, the recorded arguments, and blocks on demand.

    ids : token ids, [n, T] int64, or None when no inputs are needed. mask : 1 for real tokens, 0 for padding, [n, T]; None: no padding.
    batch : samples in one forward pass. Memory: the embedded samples (n T d fp32), and one block at a time.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        ids: Int[Tensor, "n T"] | None,
        *,
        mask: Int[Tensor, "n T"] | None = None,
        device: str | torch.device = "cpu",
        batch: int = 8,
    ) -> None:
        self.ids, self.mask, self.device, self.batch = ids, mask, device, batch
        self.path = layers.chain_path(blueprint.skeleton())
        self.num_blocks = layers.num_blocks(blueprint.config)
        self.arguments: list[list[Arguments]] | None = None
        if ids is not None:
            if not ids.numel():
                raise BlockwrightError("calibration: no samples", allowed="token ids [n, T] with n, T >= 1", do="Give more text")
            self.embedded, self.arguments = self._record(blueprint)

    def block(self, blueprint: Blueprint, index: int) -> Block:
        """Block `index` of a blueprint of this chain, read into fresh fp32 memory."""
        name = f"{self.path}.{index}"
        module = blueprint.block(name, torch.float32)
        layers.fill(module, blueprint.tensors, name + ".", device=self.device, dtype=torch.float32)
        arguments = self.arguments[index] if self.arguments is not None else None
        shared = frozenset(_held_by_earlier(blueprint, self.path, index, module))
        resized = frozenset(n for n, form in blueprint.forms.items() if "size" in form)
        return Block(index, name, module, arguments=arguments, shared=shared, resized=resized, batch=self.batch, mask=self.mask)

    def final_hidden(self, blueprint: Blueprint) -> Float[Tensor, "n T d"]:
        """The hidden states after the last block, for all samples."""
        x = self.embedded
        for i in range(self.num_blocks):
            x = self.block(blueprint, i).outputs(x)
        return x

    @torch.no_grad()
    def logits(self, blueprint: Blueprint, hidden: Float[Tensor, "n T d"]) -> Iterator[tuple[slice, Float[Tensor, "b T V"]]]:
        """What follows the chain (last norm, head) on the hidden states, in mini-batches: (rows, fp32 logits)."""
        model = self._around(blueprint, whole=True)
        for rows in batches(len(hidden), max(1, self.batch // 4)):
            for stub in self._stubs(model):
                stub.value, stub.wrapped = hidden[rows], self._wrapped
            yield rows, self._forward(model, rows).logits

    def surprise(self, blueprint: Blueprint, hidden: Float[Tensor, "n T d"], rng: torch.Generator) -> Float[Tensor, "n T d"]:
        """The gradient, at the hidden states after the last block, of the sum of -log p(y) over real tokens; y is drawn from p.

        The mean outer product of such gradients is the Fisher information: half of it is what a small change adds to KL(model || changed).
        """
        model = self._around(blueprint, whole=True)
        out = torch.empty_like(hidden)
        for rows in batches(len(hidden), max(1, self.batch // 4)):
            with torch.enable_grad():
                inputs = hidden[rows].requires_grad_()
                for stub in self._stubs(model):
                    stub.value, stub.wrapped = inputs, self._wrapped
                logits = self._forward(model, rows).logits.flatten(0, 1).float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=rng)[:, 0]
                nll = torch.nn.functional.cross_entropy(logits, drawn, reduction="none")
                if self.mask is not None:
                    nll = nll * self.mask[rows].to(nll).flatten()
                (out[rows],) = torch.autograd.grad(nll.sum(), inputs)
        layers.check_finite(out, "gradient at the last hidden states")
        return out

    @torch.no_grad()
    def _record(self, blueprint: Blueprint) -> tuple[Tensor, list[list[Arguments]]]:
        """Embedded samples, and the arguments of each block: one entry for all samples, or one a sample where they are padded."""
        model = self._around(blueprint, whole=False)
        stubs = self._stubs(model)
        self._wrapped = self._blocks_return_tuples(blueprint, model)
        embedded = []
        for rows in batches(self._num_samples(), self.batch):
            self._forward(model, rows)
            embedded.append(stubs[0].seen[0])
        recorded: list[list[Arguments]] = [[] for _ in stubs]
        for i in range(1 if self.mask is None else self._num_samples()):
            self._forward(model, slice(i, i + 1))
            for stub, arguments in zip(stubs, recorded, strict=True):
                arguments.append(stub.seen[1:])
        if self._num_samples() > 1:
            self._forward(model, slice(0, 2))
            _refuse_interleaved(blueprint.config.model_type, recorded[0][0], stubs[0].seen[1:])
        return torch.cat(embedded), recorded

    def _blocks_return_tuples(self, blueprint: Blueprint, model: nn.Module) -> bool:
        """Whether this architecture's blocks return (hidden states, ...): seen by running the first one. The stubs then do as they do."""
        first, stubs = self.block(blueprint, 0).module, self._stubs(model)

        def see(stub: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            wrapped = isinstance(first(*args, **kwargs), tuple)
            for s in stubs:
                s.wrapped = wrapped
            return (out,) if wrapped else out

        handle = stubs[0].register_forward_hook(see, with_kwargs=True)
        self._forward(model, slice(0, 1))
        handle.remove()
        return stubs[0].wrapped

    def _around(self, blueprint: Blueprint, *, whole: bool) -> nn.Module:
        """The model with stubs for its blocks and the rest in fp32: with its head (whole), or the base model alone."""
        model = blueprint.skeleton(torch.float32)
        chain = model.get_submodule(self.path)
        for i in range(self.num_blocks):
            layers.swap(model, f"{self.path}.{i}", _Stub(chain.get_submodule(str(i))))
        part = model if whole else model.base_model
        prefix = "" if part is model else model.base_model_prefix + "."
        layers.fill(part, blueprint.tensors, prefix, device=self.device, dtype=torch.float32)
        return part

    def _stubs(self, model: nn.Module) -> "list[_Stub]":
        return [m for m in model.modules() if isinstance(m, _Stub)]

    def _num_samples(self) -> int:
        return 0 if self.ids is None else len(self.ids)

    def _forward(self, model: nn.Module, rows: slice) -> Any:
        assert self.ids is not None
        mask = None if self.mask is None else self.mask[rows].to(self.device)
        return model(self.ids[rows].to(self.device), attention_mask=mask, use_cache=False)


def batches(n: int, size: int) -> Iterator[slice]:
    """0..n cut into slices of `size`, the last one shorter."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


@runtime_checkable
class Stat(Protocol):
    """A running statistic over the inputs of one linear."""

    def __init__(self, features: int) -> None: ...

    def add(self, x: Float[Tensor, "t K"]) -> None: ...

    def summary(self) -> Tensor: ...


class Moments:
    """Running mean, variance and Euclidean norm of each input channel, in fp64.

    After all `add`s: mean [K], var [K] (over all tokens, divided by their number), norm [K] (square root of the sum of squares).
    """

    def __init__(self, features: int) -> None:
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64)
        self._spread = torch.zeros(features, dtype=torch.float64)  # sum of squared deviations from the mean

    def add(self, x: Float[Tensor, "t K"]) -> None:
        """Chan, Golub and LeVeque's update: no cancellation when the mean is large."""
        x = x.double().cpu()
        count, mean = len(x), x.mean(0)
        total, delta = self.count + count, mean - self.mean
        self._spread += ((x - mean) ** 2).sum(0) + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @property
    def var(self) -> Tensor:
        return self._spread / self.count

    @property
    def norm(self) -> Tensor:
        return (self._spread + self.count * self.mean**2).sqrt()

    def summary(self) -> Tensor:
        return self.norm


class Gram:
    """Running x^T x over all tokens, [K, K] fp32: the Hessian of a linear's squared output error, up to a factor."""

    def __init__(self, features: int) -> None:
        self.count = 0
        self.sum = torch.zeros(features, features)

    def add(self, x: Float[Tensor, "t K"]) -> None:
        self.sum = self.sum.to(x.device).addmm_(x.T, x)
        self.count += len(x)

    def summary(self) -> Tensor:
        return self.sum.diagonal()


class _Stub(nn.Module):
    """Stands where a block stands: keeps what it was given and hands on `value`, or its input. Other attributes are the block's.

    wrapped : hands it on in a tuple, as the blocks of some architectures do (GPT-Neo, Falcon).
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: its weights stay unread
        self.value: Tensor | None = None
        self.wrapped = False
        self.seen: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        self.seen = (x, args, kwargs)
        out = x if self.value is None else self.value
        return (out,) if self.wrapped else out


def _merged(entries: list[Arguments]) -> Arguments:
    """The arguments of some samples: those of all where there is one entry (batch 1 broadcasts), else stacked along the batch."""
    if len(entries) == 1:
        return entries[0]
    args = tuple(_stacked([a[0][i] for a in entries]) for i in range(len(entries[0][0])))
    return args, {key: _stacked([a[1][key] for a in entries]) for key in entries[0][1]}


def _refuse_interleaved(kind: str, one: Arguments, two: Arguments) -> None:
    """Raise BlockwrightError for an argument that has several rows for each sample: what one sample got does not serve for more."""
    for name, value in one[1].items():
        other = two[1][name]
        if isinstance(value, Tensor) and value.dim() and value.shape[0] > 1 and other.shape[0] == 2 * value.shape[0]:
            raise BlockwrightError(
                f"{kind}: its blocks take {name} with {value.shape[0]} rows for each sample",
                allowed="arguments with one row a sample, or the same for all samples",
                do="Stages that need no calibration text work on it",
            )


def _absent(entry: Arguments) -> tuple[bool, ...]:
    return tuple(v is None for v in (*entry[0], *entry[1].values()))


T = TypeVar("T")


def _stacked(values: list[T]) -> T:
    first: Any = values[0]
    if isinstance(first, tuple):
        return tuple(_stacked(list(v)) for v in zip(*values, strict=True))  # type: ignore[arg-type,return-value]
    if isinstance(first, Tensor) and first.dim() and first.shape[0] == 1:
        return torch.cat(values)  # type: ignore[arg-type,return-value]
    return values[0]


def _held_by_earlier(blueprint: Blueprint, path: str, index: int, module: nn.Module) -> Iterator[str]:
    """Full names of this block's modules all of whose tensors, the bias aside, an earlier block holds too."""
    earlier = {
        place
        for name, place in blueprint.tensors.items()
        if name.startswith(path + ".") and int(name[len(path) + 1 :].split(".", 1)[0]) < index
    }
    for name, m in module.named_modules():
        full = f"{path}.{index}.{name}"
        own = [f"{full}.{t}" for t, _ in [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]]
        places = [blueprint.tensors[t] for t in own if t in blueprint.tensors and not t.endswith(".bias")]
        if places and all(place in earlier for place in places):
            yield full
