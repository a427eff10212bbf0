"""Dense linears as torch and transformers hold them: what they are, and their sizes. A leaf: the forms that stand for them build on it."""

from torch import nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """A dense matrix multiplication: nn.Linear or transformers' Conv1D (the same, stored transposed)."""
    return isinstance(module, (nn.Linear, Conv1D))


def size(linear: nn.Module) -> tuple[int, int]:
    """Outputs N and inputs K of a linear, dense or of one of the forms."""
    if is_linear(linear):
        n, k = linear.weight.shape  # type: ignore[union-attr,misc]
        return (k, n) if isinstance(linear, Conv1D) else (n, k)
    return int(linear.out_features), int(linear.in_features)  # type: ignore[arg-type]
