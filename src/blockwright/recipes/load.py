"""`bw.load`: open a folder that blockwright wrote, or a plain model folder, with the fastest kernels this device has."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from blockwright.blocks import folders
from blockwright.blocks.layers import Blueprint
from blockwright.compress import dgq, finequant, lpvit
from blockwright.recipes import export


def load(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16, fast: bool = True, check: bool = True
) -> PreTrainedModel:
    """The model of a folder, in eval mode, ready to generate.

    dtype : of everything that is not packed. fast : packed linears run on the fastest kernel of the device (else: dequantise, multiply).
    check : compare every file with the folder's manifest first.
    Raises BlockwrightError when a file is missing, damaged, changed since it was written, or of a newer format.
    """
    folder = Path(folder)
    folders.settle(folder)
    blueprint = open_folder(folder, check=check)
    model = blueprint.build(device=device, dtype=dtype)
    if fast and blueprint.forms:
        lpvit.accelerate(finequant.accelerate(dgq.accelerate(model)))
    return model


def open_folder(folder: Path, *, check: bool = True) -> Blueprint:
    """The blueprint of a folder: one of ours (with `check`, compared with its manifest) or a plain dense one."""
    if (folder / "blockwright.json").is_file():
        if check:
            folders.verify(folder)
        return export.read(folder)
    return Blueprint.of_folder(folder)
