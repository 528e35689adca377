"""The sha256 of an adapter: how traces, manifests and messages name one without its numbers."""

from __future__ import annotations

import hashlib
from weakref import WeakKeyDictionary

import torch

from fedloom.core.lora import Adapter, named_tensors

_DIGESTS: WeakKeyDictionary[Adapter, str] = WeakKeyDictionary()


def fingerprint(adapter: Adapter) -> str:
    """The sha256 over names, shapes, types and bytes of all tensors, in order of name. It is taken once of each adapter."""
    digest = _DIGESTS.get(adapter)
    if digest is None:
        digest = _DIGESTS[adapter] = _digest(adapter)
    return digest


def _digest(adapter: Adapter) -> str:
    digest, flat = hashlib.sha256(), adapter.flat
    if flat is not None and flat.buffer.dtype == torch.float32:
        numbers = flat.buffer.numpy(force=True).data.cast("B")
        for head, first, last in flat.layout.hashed:
            digest.update(head)
            digest.update(numbers[first:last])
        return digest.hexdigest()
    for name, tensor in sorted(named_tensors(adapter).items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.dtype != torch.float32:
            tensor = tensor.reshape(-1).view(torch.uint8)  # numpy knows no bfloat16
        digest.update(tensor.contiguous().numpy(force=True).data)
    return digest.hexdigest()
