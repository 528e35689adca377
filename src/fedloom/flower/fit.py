"""Whether a task was made for the base model that is here."""

from __future__ import annotations

from fedloom.lora import Adapter
from fedloom.types import Start


def misfit(first: Adapter, start: Start) -> str:
    """Why a start is one of another base model than that of `first`, the adapter that is drawn here; "" if it is not.

    Layers and dense tensors are compared by name and size, whatever their rank.
    """
    here = _sizes(first)
    for adapter in (start.train, start.fold):
        for name, size in _sizes(adapter).items() if adapter else ():
            if here.get(name) != size:
                has = f"the copy here has {here[name]}" if name in here else "the copy here has no such layer"
                return f"the server's has {name} of {size}, {has}: it is another model"
    return ""


def _sizes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    layers = {name: (factor.up.shape[0], factor.down.shape[1]) for name, factor in adapter.factors.items()}
    return layers | {f"dense:{name}": tuple(tensor.shape) for name, tensor in adapter.dense.items()}
