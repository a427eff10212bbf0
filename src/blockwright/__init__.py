"""Efficient deep learning, block by block: bring a model, leave with a cheaper one that still does its job.

    import blockwright as bw
    smaller = bw.finequant(model, bits=4)          # any stage, on a transformers model in memory
    report = bw.run("recipe.yaml")                 # the main job: stages, measurement, report
    model = bw.load("folder")                      # what the main job wrote, on fast kernels
    bw.export("folder", "out", to="gguf")          # the same for llama.cpp and Ollama

Importing blockwright imports neither torch nor transformers.
"""

from typing import Any

from blockwright.errors import BlockwrightError

__version__ = "0.1.0"
__all__ = ["BlockwrightError", "__version__", "export", "load", "run"]


def run(recipe: Any, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Do what a recipe (a YAML file or a mapping) says, and return the report. See `blockwright.recipes.execute`."""
    from blockwright.recipes.execute import execute
    from blockwright.recipes.recipe import load_recipe

    return execute(load_recipe(recipe), resume=resume, overwrite=overwrite)


def load(folder: Any, **options: Any) -> Any:
    """Open a folder that blockwright wrote, on the fastest kernels here. See `blockwright.recipes.load`."""
    from blockwright.recipes.load import load as load_folder

    return load_folder(folder, **options)


def export(folder: Any, out: Any, *, to: str, overwrite: bool = False) -> dict[str, Any]:
    """Write the model of a folder into another one, in another form: gguf, standard, ... See `blockwright.recipes.convert`."""
    from blockwright.recipes.convert import convert

    return convert(folder, out, to=to, overwrite=overwrite)


def __getattr__(name: str) -> Any:
    """Every built method by its name: `bw.finequant` is `blockwright.compress.finequant.finequant`."""
    import importlib

    found = importlib.import_module("blockwright.registry").methods().get(name.replace("_", "-"))
    if found is None:
        raise AttributeError(f"module 'blockwright' has no attribute {name!r}")
    return found.load()


def __dir__() -> list[str]:
    import importlib

    return [*__all__, *(m.name for m in importlib.import_module("blockwright.registry").methods().values())]
