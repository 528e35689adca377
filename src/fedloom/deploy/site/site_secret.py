"""The secret of a site: 32 random bytes in its state folder, from which it draws what a server must not know.

Which rows are held out, which rows share a batch and what dropout drops follow from it (`core.seeds.keyed_seed`). So a server that
knows every setting of a run can neither foretell a batch nor choose one.

A digest of the secret lies beside it. Where the secret is gone or another one, rows that were held out would be trained on without
anybody knowing: the site stops until its owner puts the old one back or begins a new split.
"""

from __future__ import annotations

from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.core.files import lock, open_regular, private_folder
from fedloom.privacy.secret_file import SecretFile

SECRET = "secret"
COMMITMENT = "secret.sha256"
"""File with the digest of the secret: it tells a lost or exchanged secret, and cannot be turned back into it."""
NEW_SPLIT = "begin a new split with `fedloom site new-split --config site.toml`: rows held out so far may be trained on from then on"
SITE_SECRET = SecretFile(SECRET, "site secret", NEW_SPLIT)


def read_secret(folder: Path) -> bytes:
    """Return the secret of the site with this state folder; it is made at first use.

    Raises:
        Refused: it was there and is lost, another one or no plain file lies in its place, or others may read it.
    """
    return SITE_SECRET.read(folder)


def begin_new_split(folder: Path) -> None:
    """Give the site a new secret, and with it another division of its rows; rows held out so far may be trained on.

    Raises Refused while a worker of the site is running, which would go on with the old one.
    """
    with open_regular(private_folder(folder) / "worker.lock", "ab") as held:
        if not lock(held):
            raise Refused("folder", str(folder), "the worker of this site is running; stop it first")
        SITE_SECRET.renew(folder)
