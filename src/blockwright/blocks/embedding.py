"""The embedding of a model as packed rows, and its head with it where the two are tied."""

from blockwright.blocks.layers import Blueprint
from blockwright.blocks.packed import PackedEmbedding
from blockwright.blocks.parameters import Place

GROUP = 64  # inputs that share a scale


def pack_embedding(model: Blueprint, bits: int, group_size: int = GROUP) -> Blueprint:
    """The model with its embedding packed, and its head too where the two are tied (on the same tensors)."""
    skeleton = model.skeleton()
    name = next(n for n, m in skeleton.named_modules() if m is skeleton.get_input_embeddings())
    head = next((n for n, m in skeleton.named_modules() if m is skeleton.get_output_embeddings()), None)
    packed = PackedEmbedding.of(model.tensors.read([f"{name}.weight"])[f"{name}.weight"], bits=bits, group_size=group_size)
    memory = {f"packed:{name}.{key}": t for key, t in packed.state_dict().items()}
    owners = [name]
    forms = dict(model.forms) | {name: packed.form()}
    if head is not None and model.tensors.places.get(f"{head}.weight") == model.tensors[f"{name}.weight"]:
        owners.append(head)
        forms[head] = packed.form() | {"form": "packed"}
    added = {f"{owner}.{key}": Place(None, f"packed:{name}.{key}") for owner in owners for key in packed.state_dict()}
    return model.edited(tensors=model.tensors.replaced([f"{o}.weight" for o in owners], added, memory), forms=forms)
