"""What replacing one block does to a model, measured: the blocks before it are not run again, the parent's hidden states stand for them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from blockwright.blocks import layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.run import Run
from blockwright.blocks.stream import Stream, batches
from blockwright.blocks.subblocks import swapped
from blockwright.blocks.tuning import kl_of_tokens
from blockwright.errors import BlockwrightError

LOGITS = 2**23  # numbers of one mini-batch of logits


class Scorer:
    """The model as a run's stage found it, resident in fp32, and how far changes of it move its predictions.

    windows : calibration windows to measure on, the first ones. metric : kl, the mean over real tokens of KL(parent || child); or loss, by
    how much the mean next-token loss exceeds the parent's.
    """

    def __init__(self, run: Run, windows: int, metric: str = "kl") -> None:
        assert run.calibration is not None
        self.metric = metric
        self.model: Any = run.entered.build(device=run.device, dtype=torch.float32)
        self.ids = run.calibration[:windows].to(run.device)
        self.mask = None if run.mask is None else run.mask[:windows].to(run.device)
        self.blocks = self.model.get_submodule(layers.chain_path(self.model))
        self.vocab = int(self.model.config.vocab_size)
        self.wrapped, self.final = self._record()

    @torch.no_grad()
    def of_variants(self, index: int, x: Float[Tensor, "n T d"], variants: Sequence[Mapping[str, nn.Module]]) -> list[float]:
        """The score of each mapping of modules in the place of block `index`'s own. x : the block's inputs in the parent, at least those of
        the windows. Not finite where the child's logits are not."""
        sums = [0.0] * len(variants)
        for rows in self._batches():
            parent = self._logits(rows, len(self.blocks), self.final)
            for i, modules in enumerate(variants):
                with swapped(self.blocks[index], modules):
                    sums[i] += float(self._score(rows, parent, self._logits(rows, index, x)))
        return [value / self._count() for value in sums]

    @torch.no_grad()
    def of_model(self, child: Blueprint) -> float:
        """The score of a whole other model."""
        model: Any = child.build(device=self.ids.device, dtype=torch.float32)
        total = 0.0
        for rows in self._batches():
            ours = model(self.ids[rows], attention_mask=None if self.mask is None else self.mask[rows], use_cache=False).logits
            total += float(self._score(rows, self._logits(rows, len(self.blocks), self.final), ours))
        return total / self._count()

    def _score(self, rows: slice, parent: Float[Tensor, "b T V"], child: Float[Tensor, "b T V"]) -> Float[Tensor, ""]:
        mask = None if self.mask is None else self.mask[rows]
        if self.metric == "kl":
            value = kl_of_tokens(parent, child)
        else:
            targets = self.ids[rows, 1:, None]
            value = (parent.float().log_softmax(-1) - child.float().log_softmax(-1))[:, :-1].gather(-1, targets)[..., 0]
            mask = None if mask is None else mask[:, 1:] * mask[:, :-1]
        return (value if mask is None else value.masked_fill(mask == 0, 0.0)).sum(dtype=torch.float64)

    def _count(self) -> int:
        """Predictions that are compared."""
        mask = torch.ones_like(self.ids) if self.mask is None else self.mask
        count = int(mask.sum() if self.metric == "kl" else (mask[:, 1:] * mask[:, :-1]).sum())
        if not count:
            raise BlockwrightError("scores: no token to compare on", allowed="windows with real tokens", do="Give more text")
        return count

    def _batches(self) -> Iterator[slice]:
        return batches(len(self.ids), max(1, LOGITS // (self.ids.shape[1] * self.vocab)))

    def _logits(self, rows: slice, first: int, hidden: Float[Tensor, "n T d"]) -> Float[Tensor, "b T V"]:
        """The logits of these windows, where `hidden` is the input of block `first` and no block before it runs."""
        with ExitStack() as stack:
            for block in self.blocks[:first]:
                stack.enter_context(self._hands_on(block, hidden[rows]))
            mask = None if self.mask is None else self.mask[rows]
            out: Tensor = self.model(self.ids[rows], attention_mask=mask, use_cache=False).logits
        return out

    @contextmanager
    def _hands_on(self, block: nn.Module, value: Tensor) -> Iterator[None]:
        """Inside, the block gives this value, whatever it is given."""
        block.forward = lambda *args, **kwargs: (value,) if self.wrapped else value  # type: ignore[method-assign]
        try:
            yield
        finally:
            del block.forward

    @torch.no_grad()
    def _record(self) -> tuple[bool, Float[Tensor, "n T d"]]:
        """Whether blocks hand on tuples, and the hidden states after the last one."""
        seen: list[Any] = []
        handle = self.blocks[-1].register_forward_hook(lambda block, args, out: seen.append(out))
        for rows in self._batches():
            self.model(self.ids[rows], attention_mask=None if self.mask is None else self.mask[rows], use_cache=False)
        handle.remove()
        wrapped = isinstance(seen[0], tuple)
        return wrapped, torch.cat([out[0] if wrapped else out for out in seen])


@torch.no_grad()
def divergence(
    parent: Blueprint, child: Blueprint, ids: Int[Tensor, "n T"], mask: Int[Tensor, "n T"] | None = None, *, device: Any = "cpu"
) -> float:
    """KL(parent || child), the mean over real tokens in nats, of two whole models with one block resident at a time."""
    sides = [Stream(model, ids, mask=mask, device=device) for model in (parent, child)]
    hidden = [stream.final_hidden(model) for stream, model in zip(sides, (parent, child), strict=True)]
    total, count = 0.0, ids.numel() if mask is None else int(mask.sum())
    for (rows, theirs), (_, ours) in zip(sides[0].logits(parent, hidden[0]), sides[1].logits(child, hidden[1]), strict=True):
        value = kl_of_tokens(theirs, ours)
        total += float((value if mask is None else value.masked_fill(mask[rows].to(value.device) == 0, 0.0)).sum(dtype=torch.float64))
    return total / count
