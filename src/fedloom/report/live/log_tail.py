"""Reading a log while a run writes it: plain or compressed, with a last line that is still unfinished."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fedloom.core.errors import Refused
from fedloom.core.files import open_regular
from fedloom.core.packed_log import MAGIC, member_unpacker

LONGEST_SHOWN = 2**23
"""Bytes of a line that is still read; a longer one is left out."""
MARK = 64
"""Bytes before the place of reading that are compared, to notice a log that was cut and written again."""


class LogReplaced(Exception):
    """The log is no longer the one that was read: a run that goes on has cut it, or it is another file."""


@dataclass(slots=True)
class LogTail:
    """A log that is read piece by piece as it grows.

    Fields:
        path: the log, which need not exist yet.
        most: bytes of a plain log to begin with, its last ones (None: all; a compressed log is read from its beginning).
        offset: bytes of the file that were read.
        size: bytes of the file when it was last looked at.
        omitted: lines that were left out because they are too long.
    """

    path: Path
    most: int | None = None
    offset: int = 0
    size: int = 0
    omitted: int = 0
    _mark: bytes = b""
    _packed: bytes = b""
    _unpacker: zlib._Decompress | None = None
    _rest: bytearray = field(default_factory=bytearray)
    _skips: bool = False

    def read(self, length: int) -> list[bytes]:
        """Return the lines that ended in the next `length` bytes, without their ends; none where there is nothing new.

        Raises:
            LogReplaced: it is not the log that was read so far.
            Refused: it cannot be opened, see `open_regular`, or is compressed and damaged.
        """
        try:
            with open_regular(self.path) as file:
                self.size = os.fstat(file.fileno()).st_size
                piece = b"" if self._packed else self._next(file, length)
        except FileNotFoundError as error:
            if self.offset:
                raise LogReplaced from error
            return []
        return self._lines(self._unpack(piece, length) if self._unpacker else piece)

    @property
    def behind(self) -> int:
        """Bytes of the file that are not read yet."""
        return max(0, self.size - self.offset) + len(self._packed)

    def _next(self, file: BinaryIO, length: int) -> bytes:
        """The next bytes of the file."""
        if not self.offset:
            self._begin(file)
        file.seek(self.offset - len(self._mark))
        if self.size < self.offset or file.read(len(self._mark)) != self._mark:
            raise LogReplaced
        piece = file.read(length)
        self._mark = (self._mark + piece)[-MARK:]
        self.offset += len(piece)
        return piece

    def _begin(self, file: BinaryIO) -> None:
        """Find where to begin: of a long plain log among its last bytes, behind the line that the first of them is in."""
        if file.read(len(MAGIC)) == MAGIC:
            self._unpacker = member_unpacker()
        elif self.most is not None and self.size > self.most:
            self.offset, self._skips = self.size - self.most, True

    def _unpack(self, piece: bytes, length: int) -> bytes:
        """At most `length` bytes of what this piece of a compressed log and those before it hold."""
        assert self._unpacker is not None
        self._packed += piece
        try:
            text = self._unpacker.decompress(self._packed, length)
        except zlib.error as error:
            raise Refused("file", str(self.path), "it is compressed and damaged; put back a copy of it") from error
        self._packed = self._unpacker.unconsumed_tail
        if self._unpacker.eof:
            self._packed, self._unpacker = self._unpacker.unused_data, member_unpacker()
        return text

    def _lines(self, text: bytes) -> list[bytes]:
        *ended, rest = text.split(b"\n")
        if ended:
            ended[0] = bytes(self._rest) + ended[0]
            self._rest.clear()
            if self._skips:
                del ended[0]
                self._skips = False
        self._rest += rest
        if len(self._rest) > LONGEST_SHOWN:
            self._rest.clear()
            self.omitted += not self._skips
            self._skips = True
        return [line for line in ended if line.strip()]
