"""The secret of a site: 32 random bytes in its state folder, from which it draws what a server must not know.

Which rows are held out, which rows share a batch and what dropout drops follow from it (`core.seeds.keyed_seed`). So a server that
knows every setting of a run can neither foretell a batch nor choose one.

A digest of the secret lies beside it. Where the secret is gone or another one, rows that were held out would be trained on without
anybody knowing: the site stops until its owner puts the old one back or begins a new split. Both files are the owner's alone (0600 in
a folder of 0700). Where the whole folder is lost nothing tells so, and a new split begins by itself: it belongs into a backup.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.core.files import atomic_write, lock, open_regular, private_folder

SECRET = "secret"
COMMITMENT = "secret.sha256"
"""File with the digest of the secret: it tells a lost or exchanged secret, and cannot be turned back into it."""
NEW_SPLIT = "begin a new split with `fedloom site new-split --config site.toml`: rows held out so far may be trained on from then on"


def read_secret(folder: Path) -> bytes:
    """Return the secret of the site with this state folder; it is made at first use.

    Raises:
        Refused: it was there and is lost, another one or no plain file lies in its place, or others may read it.
    """
    path = private_folder(folder) / SECRET
    text, committed = _read(path), _read(folder / COMMITMENT)
    if text is None and committed is None:
        return _begin(folder)
    if text is None:
        raise Refused("secret", str(path), f"it was there and is lost; put it back from a copy, or {NEW_SPLIT}")
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != 32:
        raise Refused("secret", str(path), f"it is damaged; put it back from a copy, or {NEW_SPLIT}")
    if committed is None:  # the process ended between the two files
        _write(folder / COMMITMENT, _commitment(secret))
    elif committed != _commitment(secret):
        raise Refused("secret", str(path), f"it is not the one of this site; put that back from a copy, or {NEW_SPLIT}")
    return secret


def begin_new_split(folder: Path) -> None:
    """Give the site a new secret, and with it another division of its rows; rows held out so far may be trained on.

    Raises Refused while a worker of the site is running, which would go on with the old one.
    """
    with open_regular(private_folder(folder) / "worker.lock", "ab") as held:
        if not lock(held):
            raise Refused("folder", str(folder), "the worker of this site is running; stop it first")
        _begin(folder)


def _begin(folder: Path) -> bytes:
    """Write a new secret, then its digest: a process that ends in between leaves nothing that would be taken for another secret."""
    secret = secrets.token_bytes(32)
    _write(folder / SECRET, secret.hex())
    _write(folder / COMMITMENT, _commitment(secret))
    return secret


def _commitment(secret: bytes) -> str:
    return hashlib.sha256(b"fedloom site secret\0" + secret).hexdigest()


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
