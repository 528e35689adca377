"""A result as bytes: a safetensors file whose header carries a JSON manifest. No pickle, no code, checked on arrival."""

from __future__ import annotations

import json

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from fedloom.lora import Adapter, Factor
from fedloom.types import Result

FORMAT = 1
HEADER = "fedloom"
CONTROL = "control:"
"""Begins the names of the tensors of a control variate."""


class Malformed(ValueError):
    """Bytes that are no result; the text says why."""


class Manifest(BaseModel):
    """What goes beside the tensors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: StrictInt = Field(ge=FORMAT, le=FORMAT)
    task: StrictInt = Field(ge=1)
    client: str = Field(min_length=1, max_length=200)
    examples: StrictInt
    tokens: StrictInt
    steps: StrictInt
    metrics: dict[str, float] = Field(max_length=100)
    tensors: StrictInt


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors under flat names: `NAME.down`, `NAME.up`, and `dense:NAME`."""
    flat = {f"{name}.down": factor.down.contiguous() for name, factor in adapter.factors.items()}
    flat |= {f"{name}.up": factor.up.contiguous() for name, factor in adapter.factors.items()}
    return flat | {f"dense:{name}": tensor.contiguous() for name, tensor in adapter.dense.items()}


def adapter_of(flat: dict[str, Tensor]) -> Adapter:
    """The adapter of such tensors. Raises Malformed if a factor is not whole."""
    dense = {name.removeprefix("dense:"): tensor for name, tensor in flat.items() if name.startswith("dense:")}
    names = [name.removesuffix(".down") for name in flat if name.endswith(".down") and not name.startswith("dense:")]
    if len(flat) != len(dense) + 2 * len(names) or any(f"{name}.up" not in flat for name in names):
        raise Malformed("the tensors are not pairs of .down and .up, and dense: ones")
    factors = {name: Factor(flat[f"{name}.down"], flat[f"{name}.up"]) for name in names}
    for name, factor in factors.items():
        if factor.down.ndim != 2 or factor.up.ndim != 2 or factor.down.shape[0] != factor.up.shape[1]:
            raise Malformed(f"{name}: down {tuple(factor.down.shape)} and up {tuple(factor.up.shape)} do not multiply")
    return Adapter(factors, dense)


def encode(client: str, task: int, result: Result) -> bytes:
    """The result as bytes; the same result gives the same bytes."""
    flat = tensors(result.adapter)
    if result.control is not None:
        flat |= {f"{CONTROL}{name}": tensor for name, tensor in tensors(result.control).items()}
    manifest = Manifest(
        format=FORMAT,
        task=task,
        client=client,
        examples=result.examples,
        tokens=result.tokens,
        steps=result.steps,
        metrics=dict(result.metrics),
        tensors=len(flat),
    )
    return safetensors.torch.save(flat, {HEADER: manifest.model_dump_json()})


def decode(data: bytes, limit: int) -> tuple[str, int, Result]:
    """(client, task, result) of such bytes. Raises Malformed with the reason, whatever the bytes are."""
    if len(data) > limit:
        raise Malformed(f"{len(data)} bytes, above the limit of {limit}")
    try:
        flat = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][HEADER]
        manifest = Manifest.model_validate_json(header)
    except SafetensorError as error:
        raise Malformed(f"not a safetensors file: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise Malformed(f"manifest field {'.'.join(map(str, first['loc'])) or '?'}: {first['msg']}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise Malformed(f"no manifest in the file: {type(error).__name__}") from error
    if manifest.tensors != len(flat):
        raise Malformed(f"manifest speaks of {manifest.tensors} tensors, the file holds {len(flat)}")
    control = {name.removeprefix(CONTROL): flat.pop(name) for name in [*flat] if name.startswith(CONTROL)}
    result = Result(
        adapter_of(flat),
        manifest.examples,
        manifest.tokens,
        manifest.steps,
        manifest.metrics,
        adapter_of(control) if control else None,
    )
    return manifest.client, manifest.task, result
