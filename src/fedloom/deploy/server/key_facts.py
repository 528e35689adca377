"""What the operator of a server says of the holder of a key, beside the key: whether it is a region, how many examples count for it.

A site or region cannot change it. The file `sites/NAME.json` is written by `fedloom keys add`, and read when a client joins.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from logging import getLogger
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.core.files import read_json, write_json

LOG = getLogger("fedloom.deploy.server")


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """What is known of the holder of a key.

    Fields:
        region: whether it is a region, and not a site.
        examples: training examples that count for it, without a limit (None: what it says when it first joins, with one).
    """

    region: bool = False
    examples: int | None = None

    def __post_init__(self) -> None:
        if type(self.region) is not bool or not (self.examples is None or type(self.examples) is int):
            raise Refused("key", "facts", "a region or not, and a whole number of examples or none")
        if self.examples is not None and not 1 <= self.examples <= 10**12:
            raise Refused("--examples", self.examples, "a whole number of training examples from 1 to 1e12")


def no_facts(name: str) -> KeyFacts:
    """Return that nothing is known, whose key it is."""
    return KeyFacts()


def facts_file(folder: Path, name: str) -> Path:
    """Return the file beside the key of this name."""
    return folder / "sites" / f"{name}.json"


def write_facts(folder: Path, name: str, facts: KeyFacts) -> None:
    """Write down what is known of the holder of this name's key, in the place of what was."""
    path = facts_file(folder, name)
    if facts == KeyFacts():
        path.unlink(missing_ok=True)
    else:
        write_json(path, asdict(facts))


def read_facts(folder: Path, name: str) -> KeyFacts:
    """Return what is known of the holder of this name's key. A file that cannot be read says nothing: then it is a site."""
    path = facts_file(folder, name)
    try:
        return KeyFacts(**read_json(path)) if path.exists() else KeyFacts()
    except (OSError, ValueError, TypeError, Refused) as error:
        LOG.error("%s cannot be read (%s); `fedloom keys add` writes it anew", path, type(error).__name__)
        return KeyFacts()
