"""Logs that are compressed while they are written, and can be cut and read like plain ones.

A packed log is a row of gzip members (RFC 1952), so any tool for gzip reads it. It may be cut wherever a member ends, and goes on
there with a new one. Each flush writes out all that the compressor holds: what a killed process leaves can be read to its last flush,
though the last member is torn.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from gzip import GzipFile
from io import BufferedIOBase, RawIOBase
from typing import Any, BinaryIO, TextIO

MAGIC = b"\x1f\x8b"
"""Bytes with which a packed log begins, and no text does."""
LEVEL = 3
"""Level of compression: 6 takes half as long again for a seventh less."""
PIECE = 2**16
"""Bytes that are unpacked at once, whatever they were packed into."""
_GZIP_WINDOW = 31  # of zlib: the largest window, with the heads of gzip


class PackedFile(BufferedIOBase):
    """The binary side of a packed log that is written; `TextIOWrapper` makes a text of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.member: GzipFile | None = None

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.file.name

    def writable(self) -> bool:
        """Tell that it can be written."""
        return True

    def write(self, data: Any) -> int:
        """Compress some bytes; a first one begins a new member."""
        if self.member is None:
            self.member = GzipFile("", "wb", LEVEL, self.file, mtime=0)
        return self.member.write(data)

    def flush(self) -> None:
        """Write all that was compressed so far, so that it can be read."""
        if not self.file.closed:
            (self.member or self.file).flush()

    def end_member(self) -> None:
        """Bring the log to a place where it can be cut."""
        if self.member is not None:
            self.member.close()  # which leaves the file open
            self.member = None
        self.file.flush()

    def fileno(self) -> int:
        """Return the descriptor of the file."""
        return self.file.fileno()

    def close(self) -> None:
        """End the last member, and close the file."""
        if not self.closed:
            try:
                self.end_member()
            finally:
                self.member = None
                self.file.close()
                super().close()


class UnpackedFile(RawIOBase):
    """The text of a packed log that is read, up to where it is torn. Raises zlib.error where it is damaged."""

    def __init__(self, file: BinaryIO, size: int | None = None) -> None:
        self._pieces, self._piece = _unpacked(file, size), b""

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; returns how many bytes of it."""
        while not self._piece and (more := next(self._pieces, None)) is not None:
            self._piece = more
        count = min(len(buffer), len(self._piece))
        buffer[:count], self._piece = self._piece[:count], self._piece[count:]
        return count


def _unpacked(file: BinaryIO, size: int | None) -> Iterator[bytes]:
    """Yield what the next `size` bytes of a file (None: all) unpack to."""
    unpacker = member_unpacker()
    while piece := file.read(PIECE if size is None else min(PIECE, size)):
        size = None if size is None else size - len(piece)
        while piece:
            yield unpacker.decompress(piece, PIECE)
            piece = unpacker.unconsumed_tail
            if unpacker.eof:
                piece, unpacker = unpacker.unused_data, member_unpacker()
    yield unpacker.flush()


def member_unpacker() -> zlib._Decompress:
    """Return what unpacks one member of a packed log."""
    return zlib.decompressobj(_GZIP_WINDOW)


def log_size(log: TextIO) -> int:
    """Return the bytes of an open log so far, which can be cut or read from there."""
    log.flush()
    packed = getattr(log, "buffer", None)
    if isinstance(packed, PackedFile):
        packed.end_member()
    return os.fstat(log.fileno()).st_size
