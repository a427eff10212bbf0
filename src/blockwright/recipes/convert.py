"""A model folder in another form: one GGUF file, or another layout of our own files. Checks what it is asked before torch is imported."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from blockwright.errors import BlockwrightError

FORMS = ("gguf", "standard", "unrolled", "w8a8", "dense", "blockwright")


def convert(folder: str | Path, out: str | Path, *, to: str, overwrite: bool = False) -> dict[str, Any]:
    """Write the model of `folder` (one that blockwright wrote, or a plain one) into the folder `out`, all of it or nothing.

    to : gguf (model.gguf for llama.cpp and Ollama), standard (plain transformers), unrolled (the same; shared blocks as copies, adapters
        merged), w8a8 (dual-grained linears in int8, for vLLM), dense (plain weights), blockwright (our own layout).
    overwrite : replace what `out` holds.
    Returns what was written: for gguf see `blockwright.recipes.gguf.write`, else {layout, bytes}.
    Raises BlockwrightError where the form cannot hold the model, `folder` is damaged, or `out` is in use.
    """
    folder, out = Path(folder), Path(out)
    if to not in FORMS:
        raise BlockwrightError(f"export: to={to!r}", allowed=", ".join(FORMS))
    if to == "gguf" and out.suffix == ".gguf":
        raise BlockwrightError(f"out {out}: a file", allowed="a folder", do=f"Name a folder, such as {out.stem}; model.gguf goes into it")
    source, target = folder.absolute().resolve(), out.absolute().resolve()
    if source == target or source in target.parents or target in source.parents:
        raise BlockwrightError(
            f"out {out}: is, holds or lies inside {folder}", allowed="a folder apart from the model, which is never changed"
        )

    from blockwright.blocks import folders
    from blockwright.recipes import export, w8a8
    from blockwright.recipes.load import open_folder
    from blockwright.recipes.prepare import check_output

    check_output(out, resume=False, overwrite=overwrite)
    folders.settle(folder)
    model = open_folder(folder)
    about = _about(folder)
    made: dict[str, Any] = {}

    def write(scratch: Path) -> None:
        if to == "gguf":
            from blockwright.recipes import gguf

            made.update(gguf.write(model, scratch, source=folder, stages=about.get("stages")))
        elif to == "w8a8":
            w8a8.write(model, scratch, source=folder, dtype=_dtype(model.config))
            made.update(layout="w8a8", bytes=sum(p.stat().st_size for p in scratch.glob("*.safetensors")))
        else:
            layout = export.write(model, scratch, source=folder, layout=to, dtype=_dtype(model.config), about=about)
            made.update(layout=layout, bytes=sum(p.stat().st_size for p in scratch.glob("*.safetensors")))

    folders.publish(out, write)
    return made


def summary(made: dict[str, Any], out: Path) -> list[str]:
    """What `convert` returned, in a few lines."""
    if "file" not in made:
        return [f"model    {out}  {made['bytes'] / 1e6:.1f} MB, layout {made['layout']}"]
    types = Counter(t["type"] for t in made["tensors"].values())
    loss = made["loss"]
    lost = (
        f"worst {loss['worst']:.2%} ({loss['tensor']}), mean {loss['mean']:.2%} of a matrix's norm"
        if loss["worst"]
        else "none: every weight is exact"
    )
    return [
        f"model    {out / made['file']}  {made['bytes'] / 1e6:.1f} MB ({', '.join(f'{n} {kind}' for kind, n in types.most_common())})",
        f"loss     {lost}",
        *(f"warning  {text}" for text in made["warnings"]),
    ]


def _dtype(config: Any) -> Any:
    """The dtype that a model's plain weights are stored in, by its config."""
    import torch

    return getattr(torch, str(config.dtype or "float32").removeprefix("torch."))


def _about(folder: Path) -> dict[str, Any]:
    """What blockwright.json tells of how the model was made; nothing for a plain folder."""
    path = folder / "blockwright.json"
    if not path.is_file():
        return {}
    return {k: v for k, v in json.loads(path.read_text()).items() if k not in ("format", "layout", "forms", "stored_as", "origin")}
