"""Objects as bytes for worker processes: tensors by value, or apart in one file that all processes map.

This is pickle: use it for processes that this one started, never across a boundary of trust.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Bytes to which tensors are aligned, as torch aligns its memory; some kernels round differently at another alignment."""


def pickle_object(thing: object) -> bytes:
    """Pickle `thing` with its tensors by value: a view costs what it shows, not the storage behind it; no handle is left open."""
    stream = io.BytesIO()
    _Pickler(stream).dump(thing)
    return stream.getvalue()


def unpickle_object(data: bytes, apart: Iterable[memoryview] = ()) -> Any:
    """Unpickle an object, its tensors in memory of their own or, where they were put `apart`, in that memory."""
    return pickle.loads(data, buffers=apart)


@dataclass(frozen=True, slots=True)
class SharedObject:
    """An object in a file without a name, which is gone with the last process that has it open, however that ends.

    Every process maps the file copy-on-write: memory holds one copy of the tensors, and a process that writes to one then has its
    own copy of the pages that it wrote to.

    Fields:
        file: the open file.
        spans: (first byte, bytes) of the pickle and of each tensor.
    """

    file: IO[bytes]
    spans: tuple[tuple[int, int], ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle for a child process that is being spawned: it inherits the descriptor."""
        return _from_descriptor, (DupFd(self.file.fileno()), self.spans)

    def views(self) -> list[memoryview]:
        """Map the pickle and the tensors; a page that is written to becomes private to this mapping."""
        mapped = memoryview(mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY))
        return [mapped[first : first + length] for first, length in self.spans]

    def get(self) -> Any:
        """Return the object, its tensors in the mapped memory."""
        head, *tensors = self.views()
        return unpickle_object(bytes(head), tensors)


def share_object(thing: object, folders: Iterable[Path]) -> SharedObject:
    """Put `thing` into a file in the first folder with room for it; its tensors on the CPU move there too.

    Raises OSError if there is room nowhere, pickle.PicklingError where a part has no pickle (a lambda).
    """
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    pickler = _Pickler(stream, buffers.append)
    pickler.dump(thing)
    parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
    spans, end = [], 0
    for part in parts:
        spans.append((end, len(part)))
        end += -(-len(part) // ALIGNMENT) * ALIGNMENT
    shared = SharedObject(_unnamed_file(end, folders), tuple(spans))
    for (first, _), part in zip(spans, parts, strict=True):
        shared.file.seek(first)
        shared.file.write(part)
    shared.file.truncate(end)
    shared.file.flush()
    for tensor, view in zip(pickler.tensors, shared.views()[1:], strict=True):
        if tensor.device.type == "cpu":
            tensor.data = _tensor_view(view, tensor.dtype, tuple(tensor.shape), _contiguous(tensor).stride())
    return shared


class _Pickler(pickle.Pickler):
    """Pickles tensors and parameters as the bytes they show, without gradients and hooks; `tensors` are those it met."""

    def __init__(self, stream: IO[bytes], apart: Callable[[pickle.PickleBuffer], object] | None = None) -> None:
        super().__init__(stream, protocol=5, buffer_callback=apart)
        self.tensors: list[Tensor] = []

    def dump(self, thing: Any) -> None:
        try:
            super().dump(thing)
        except (AttributeError, TypeError) as error:  # its other ways to say that a thing has no pickle
            raise pickle.PicklingError(str(error)) from error

    def reducer_override(self, thing: Any) -> Any:
        if type(thing) not in (Tensor, nn.Parameter) or thing.layout != torch.strided:
            return NotImplemented
        self.tensors.append(thing)
        plain = _contiguous(thing)
        flat = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)
        facts = (thing.dtype, tuple(plain.shape), plain.stride(), thing.device, type(thing), thing.requires_grad)
        raw: Any = flat.numpy()  # a buffer, which numpy's types do not say
        return _rebuild_tensor, (pickle.PickleBuffer(raw), *facts)


def _contiguous(tensor: Tensor) -> Tensor:
    """Copy to the CPU without gaps; the order of dimensions in memory stays, since the rounding of products depends on it."""
    here = tensor.detach().cpu()
    return here if here.is_contiguous() else here.clone()


def _rebuild_tensor(
    raw: bytearray | memoryview,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    device: torch.device,
    kind: type[Tensor],
    gradient: bool,
) -> Tensor:
    """Rebuild a tensor; bytes from the stream are copied to memory that torch aligns, bytes apart are used in place."""
    tensor = _tensor_view(raw, dtype, shape, stride)
    tensor = (tensor if isinstance(raw, memoryview) else tensor.clone()).to(device)
    return nn.Parameter(tensor, gradient) if kind is nn.Parameter else tensor.requires_grad_(gradient)


def _tensor_view(
    raw: bytearray | memoryview, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    if not raw:  # torch makes no tensor of an empty buffer
        return torch.empty_strided(shape, stride, dtype=dtype)
    return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).as_strided(shape, stride)


def _unnamed_file(size: int, folders: Iterable[Path]) -> IO[bytes]:
    """Open a file without a name in the first folder that has `size` bytes free."""
    for folder in folders:
        if folder.is_dir() and shutil.disk_usage(folder).free > size:
            return tempfile.TemporaryFile(dir=folder)
    raise OSError(f"{size / 1e6:,.0f} MB are needed")


def _from_descriptor(descriptor: Any, spans: tuple[tuple[int, int], ...]) -> SharedObject:
    return SharedObject(os.fdopen(descriptor.detach(), "rb"), spans)
