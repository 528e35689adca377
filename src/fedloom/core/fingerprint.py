"""(to be written)"""

from __future__ import annotations

import hashlib
from weakref import WeakKeyDictionary

import torch

from fedloom.core.lora import Adapter, tensors

_KNOWN: WeakKeyDictionary[Adapter, str] = WeakKeyDictionary()


def fingerprint(adapter: Adapter) -> str:
    """sha256 over names, shapes and bytes of all tensors, in order of name; taken once of each adapter, while it lives."""
    known = _KNOWN.get(adapter)
    if known is None:
        known = _KNOWN[adapter] = _digest(adapter)
    return known


def _digest(adapter: Adapter) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors(adapter).items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.dtype != torch.float32:
            tensor = tensor.reshape(-1).view(torch.uint8)  # numpy knows no bfloat16
        digest.update(tensor.contiguous().numpy(force=True).data)
    return digest.hexdigest()
