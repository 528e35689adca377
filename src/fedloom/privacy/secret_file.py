"""Secrets that last: 32 random bytes in a private folder, made at first use, with a digest that tells a lost or an exchanged one.

Both files are the owner's alone (0600 in a folder of 0700). Where the whole folder is lost nothing tells so, and a new secret is
made: the folder belongs into a backup.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.core.files import atomic_write, open_regular, private_folder


@dataclass(frozen=True, slots=True)
class SecretFile:
    """A kind of secret.

    Fields:
        name: name of its file; the digest's is the same, with `.sha256`.
        purpose: what it is for, which keeps digests of one secret for two purposes apart.
        if_lost: what to do where it is lost and no copy is left, for the message.
    """

    name: str
    purpose: str
    if_lost: str

    def read(self, folder: Path) -> bytes:
        """Return the secret in this folder; it is made at first use.

        Raises:
            Refused: it was there and is lost, another one or no plain file lies in its place, or others may read it.
        """
        path = private_folder(folder) / self.name
        text, committed = _read(path), _read(self._digest_path(folder))
        if text is None and committed is None:
            return self.renew(folder)
        if text is None:
            raise Refused("secret", str(path), f"it was there and is lost; put it back from a copy, or {self.if_lost}")
        try:
            secret = bytes.fromhex(text)
        except ValueError:
            secret = b""
        if len(secret) != 32:
            raise Refused("secret", str(path), f"it is damaged; put it back from a copy, or {self.if_lost}")
        if committed is None:  # the process ended between the two files
            _write(self._digest_path(folder), self._digest(secret))
        elif committed != self._digest(secret):
            what = "it is not the one that was here; put that back from a copy, or"
            raise Refused("secret", str(path), f"{what} {self.if_lost}")
        return secret

    def renew(self, folder: Path) -> bytes:
        """Write a new secret, then its digest: a process that ends in between leaves nothing that looks like another secret."""
        secret = secrets.token_bytes(32)
        _write(folder / self.name, secret.hex())
        _write(self._digest_path(folder), self._digest(secret))
        return secret

    def _digest_path(self, folder: Path) -> Path:
        return folder / f"{self.name}.sha256"

    def _digest(self, secret: bytes) -> str:
        return hashlib.sha256(f"fedloom {self.purpose}\0".encode() + secret).hexdigest()


def _read(path: Path) -> str | None:
    """Return the text of a file of the owner's; None if there is none."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return None
    with file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise Refused("secret", str(path), f"others on this machine may read it; chmod 600 {path}")
        return file.read(200).decode("ascii", "replace").strip()


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as draft:  # whose mode follows from that of the folder
        draft.write_text(text + "\n", encoding="ascii")


SERVER_NOISE = SecretFile(
    "noise.key",
    "server noise",
    "begin a new run in another folder: what was released cannot be told from what is released anew",
)
"""The secret of a server's noise."""
