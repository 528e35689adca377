"""Values in one file: a safetensors file with a JSON text and the numbers of all tensors, each memory once. No pickle.

Checkpoints of runs and regions, the answers that `replay` needs and the journal of a site are such files. The file holds two
tensors of bytes, "numbers" and "text". The text is JSON as `fedloom.core.schema` writes it: `about` (sizes of logs, version,
time), `objects`, and `values` by name. Its metadata hold the number of the format and a sha256 over both tensors.

What is one object stays one object: adapters that a window, the tasks under way and their base models share are written once, into
`objects`, and shared again. Frozen values without tensors (a profile, a budget, a codec) stand in place. A tensor is described as
torch has it, by its memory, offset, shape and strides, since products round by these. So a run goes on to the bit.

Profiles of simulated clients follow from the run and stand in its manifest. A checkpoint names their clients and no more, since with
many idle clients it would hold little else.

A private run keeps exact answers only in files that are sealed with the secret of its server (`privacy.sealing`): such a file holds
one tensor of bytes, which are the encrypted bytes of the file that it would else be.

The sha256 finds damage (a torn write, a bad disk), not forgery. A forged file can make no other objects than the dataclasses that
the reader's types are made of, with fields of the declared kinds, and no tensor outside the numbers of the file: there is no code
in it and none runs. A run that goes on from it computes with what it says, as it does with a forged run file or table. Why this
and not `torch.save` and `torch.load(weights_only=True)`: decision 0028.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedloom.core.errors import UNREADABLE, Refused
from fedloom.core.files import atomic_write, opened_path
from fedloom.core.schema import Decoder, Encoder, Malformed, Writer, reachable_classes
from fedloom.core.text import parse_json
from fedloom.core.types import ClientId, Profile
from fedloom.privacy.sealing import seal, unseal

FORMAT = 3
HEADER = "fedloom"
SEALED = "sealed"
"""Name of the only tensor of a file that is encrypted."""
LARGEST_VIEW = 2**26
"""Numbers in a tensor that is larger than its memory, by a stride of 0."""
NOBODY: Mapping[ClientId, Profile] = MappingProxyType({})
_IS_DIGEST = re.compile("[0-9a-f]{64}").fullmatch


def write_checkpoint(
    path: Path,
    values: Mapping[str, object],
    about: Mapping[str, int | float | str] | None = None,
    secret: bytes = b"",
    profiles: Mapping[ClientId, Profile] = NOBODY,
) -> int:
    """Replace the file at `path` by these values, at once or not at all; returns its bytes. Memory: a copy of the tensors.

    With a secret it can be read with that only. `profiles` are those that its reader has: of these the client's name is written.
    Raises TypeError for an object that is no dataclass, table, row, tensor or scalar.
    """
    parts = _parts(values, about, secret, profiles)
    return _write_parts(path, parts, _digest(parts))


def write_by_digest(folder: Path, values: Mapping[str, object], about: Mapping[str, int], secret: bytes = b"") -> str:
    """Write these values into a file that is called by its digest, and return that.

    A power cut can damage it until `sync_path` was called for it and the folder.
    """
    parts = _parts(values, about, secret)
    digest = _digest(parts)
    _write_parts(path_by_digest(folder, digest), parts, digest, synced=False)
    return digest


def path_by_digest(folder: Path, digest: str) -> Path:
    """Return the path of the file that `write_by_digest` calls so. Raises Malformed for what is no digest."""
    if not _IS_DIGEST(digest):
        raise Malformed("a file is named that is none of this program's")
    return folder / f"{digest}.safetensors"


def _write_parts(path: Path, parts: dict[str, Tensor], digest: str, synced: bool = True) -> int:
    with atomic_write(path, synced) as draft:
        safetensors.torch.save_file(parts, draft, {HEADER: json.dumps([FORMAT, digest])})
        return draft.stat().st_size


def _parts(
    values: Mapping[str, object],
    about: Mapping[str, int | float | str] | None,
    secret: bytes,
    profiles: Mapping[ClientId, Profile] = NOBODY,
) -> dict[str, Tensor]:
    """The tensors of the file that holds these values."""
    packer = _Packer(profiles)
    text = packer.encoder.encode(values)
    text = f'{{"about":{Encoder().encode(about or {})},"objects":[{",".join(packer.objects)}],"values":{text}}}'
    parts = {"numbers": packer.numbers(), "text": torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)}
    if secret:  # sealed as a whole: a sha256 of what is in it would let a reader try guesses
        whole = seal(secret, SEALED, safetensors.torch.save(parts))
        parts = {SEALED: torch.frombuffer(bytearray(whole), dtype=torch.uint8)}
    return parts


@dataclass(frozen=True, slots=True)
class StoredValues:
    """A file that is whole: what it says about itself, and the values, not yet made.

    Fields:
        about: sizes and digests of logs, version and time, as they were handed to the writer.
        objects: JSON of what is shared, each after what it is made of.
        values: JSON of the values by name.
        numbers: the memories of all tensors, one after the other.
    """

    about: Mapping[str, Any]
    objects: list[Any]
    values: Mapping[str, Any]
    numbers: Tensor

    def read(
        self, hints: Mapping[str, Any], known: Iterable[type] = (), profiles: Mapping[ClientId, Profile] = NOBODY
    ) -> dict[str, Any]:
        """The values of these names and types, in memory of their own. Raises Malformed.

        `known` are classes for fields of a protocol type, beside those of fedloom: a user's own codec. `profiles` are those that were
        given when the file was written.
        """
        if type(self.values) is not dict or type(self.objects) is not list:
            raise Malformed("it is damaged (its parts)")
        if self.values.keys() != hints.keys():
            differ = ", ".join(sorted(self.values.keys() ^ hints.keys()))
            raise Malformed(f"it was written by another version of fedloom ({differ})")
        classes = [*reachable_classes(*hints.values()).values(), *known]
        decoder = Decoder(classes, reference=lambda data, objects: objects.at(data))
        objects = _Objects(self.numbers, profiles)
        try:
            for data in self.objects:
                is_tensor = isinstance(data, dict) and data.get("type") == "Tensor"
                objects.made.append(objects.tensor(data) if is_tensor else decoder.read_object(data, objects))
            return {name: decoder.read(hint, self.values[name], objects) for name, hint in hints.items()}
        except Malformed:
            raise
        except UNREADABLE as error:
            raise Malformed(f"it is damaged ({type(error).__name__})") from error


def read_checkpoint(path: Path, secret: bytes = b"", named: str = "") -> StoredValues:
    """The file, checked against its sha256, and against the digest by which it is `named` elsewhere.

    Raises Malformed if it is damaged, or of another format than this program reads, where its name is that of a link or of no
    regular file, and where it was written with another secret than this one, or with one and none is given.
    """
    try:
        with opened_path(path) as place, safe_open(place, "pt") as file:
            format_, digest = parse_json((file.metadata() or {}).get(HEADER, "[0, 0]"))
            if type(format_) is int and format_ not in (0, FORMAT):
                age = "a newer" if format_ > FORMAT else "an older"
                raise Malformed(f"{age} fedloom wrote it (format {format_}, this one reads {FORMAT})")
            if named not in ("", digest):
                raise Malformed("it is another file than was written under its name")
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        if format_ == FORMAT and parts.keys() == {SEALED} and _digest(parts) == digest:
            parts = _unsealed(parts[SEALED], secret)
        elif _digest(parts) != digest:
            raise Malformed("it is damaged")
        if format_ != FORMAT or parts.keys() != {"numbers", "text"}:
            raise Malformed("it is damaged")
        text = parse_json(bytes(parts["text"].numpy()))
        return StoredValues(text["about"], text["objects"], text["values"], parts["numbers"])
    except Malformed:
        raise
    except Refused as error:
        raise Malformed(error.remedy) from error
    except (*UNREADABLE, OSError, SafetensorError) as error:
        raise Malformed(f"it is damaged ({type(error).__name__})") from error


def _unsealed(sealed: Tensor, secret: bytes) -> dict[str, Tensor]:
    """The parts of a file that was written with a secret. Raises Malformed."""
    if not secret:
        raise Malformed("it holds exact answers of a private run, and is sealed; give the secret of its server's noise")
    return dict(safetensors.torch.load(unseal(secret, SEALED, bytes(sealed.numpy()))))


def _digest(parts: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name} {parts[name].dtype} {len(parts[name])}".encode())
        digest.update(parts[name].numpy().data)
    return digest.hexdigest()


@cache
def _stands_in_place(kind: Any) -> bool:
    """Whether objects of a class are values that nobody has to share: frozen, and without tensors."""
    return bool(kind.__dataclass_params__.frozen) and "Tensor" not in reachable_classes(kind)


@dataclass(slots=True)
class _Packer:
    """Objects in an order in which each stands after those that it is made of.

    Fields:
        profiles: profiles that are written by the name of their client.
        objects: their JSON.
        seen: number and object by its id; it also keeps the objects alive, and their ids.
        memories: number and storage by the address of a storage.
        encoder: writes the values, and numbers the objects that it meets.
    """

    profiles: Mapping[ClientId, Profile]
    objects: list[str] = field(default_factory=list)
    seen: dict[int, tuple[int, object]] = field(default_factory=dict)
    memories: dict[int, tuple[int, torch.UntypedStorage]] = field(default_factory=dict)
    encoder: Encoder = field(init=False)

    def __post_init__(self) -> None:
        self.encoder = Encoder({Tensor: self._reference}, dataclass=self._reference)
        if self.profiles:
            self.encoder[Profile] = partial(self._profile, in_full=self.encoder.record(Profile))

    def _reference(self, value: object) -> str:
        """Encode an object by its number, or in place."""
        kind: Any = type(value)
        if not isinstance(value, Tensor) and _stands_in_place(kind):
            self.encoder[kind] = self.encoder.record(kind)  # this class needs no further question
            return self.encoder[kind](value)
        if id(value) not in self.seen:
            text = self._tensor(value) if isinstance(value, Tensor) else self.encoder.record(kind)(value)
            self.objects.append(text)
            self.seen[id(value)] = len(self.objects) - 1, value
        return f'{{"is":{self.seen[id(value)][0]}}}'

    def _profile(self, profile: Profile, in_full: Writer) -> str:
        """Encode a profile by the name of its client, where the reader has it."""
        known = self.profiles.get(profile.client)
        if known is profile or known == profile:
            return f'{{"is":{self.encoder[str](profile.client)}}}'
        return in_full(profile)

    def _tensor(self, tensor: Tensor) -> str:
        memory = tensor.untyped_storage()
        number, _ = self.memories.setdefault(memory._cdata, (len(self.memories), memory))
        place = {"memory": number, "bytes": memory.nbytes(), "device": str(tensor.device)}
        place |= {"dtype": str(tensor.dtype).removeprefix("torch."), "offset": tensor.storage_offset()}
        view = {"shape": list(tensor.shape), "stride": list(tensor.stride())}
        return json.dumps({"type": "Tensor", **place, **view}, separators=(",", ":"))

    def numbers(self) -> Tensor:
        """All memories, one after the other."""
        flat = torch.empty(sum(memory.nbytes() for _, memory in self.memories.values()), dtype=torch.uint8)
        end = 0
        for _, memory in self.memories.values():
            flat[end : end + memory.nbytes()] = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)
            end += memory.nbytes()
        return flat


class _Objects:
    """The objects of a file that were made so far, the memories of their tensors, and the profiles that stand by a name."""

    def __init__(self, numbers: Tensor, profiles: Mapping[ClientId, Profile]) -> None:
        self.numbers, self.end, self.profiles = numbers, 0, profiles
        self.made, self.memories = list[object](), list[Tensor]()

    def at(self, data: Mapping[str, Any]) -> object:
        """The object that a reference means. Raises Malformed."""
        number = data.get("is")
        if type(number) is str and number in self.profiles:
            return self.profiles[number]
        if type(number) is not int or not 0 <= number < len(self.made):
            raise Malformed("a reference to nothing")
        return self.made[number]

    def tensor(self, data: Mapping[str, Any]) -> Tensor:
        """A view of a memory, which is taken from the numbers when it is first spoken of.

        Raises Malformed, or one of `UNREADABLE`. Its memory is inside the file's. A view with a stride of 0 can be larger, up to
        `LARGEST_VIEW`: what is computed with it has all its numbers.
        """
        if data["memory"] == len(self.memories):
            if not 0 <= data["bytes"] <= len(self.numbers) - self.end:
                raise Malformed("a tensor outside the numbers of the file")
            memory = self.numbers[self.end : self.end + data["bytes"]].to(data["device"], copy=True)
            self.end += data["bytes"]
            self.memories.append(memory)
        dtype = getattr(torch, data["dtype"])
        if not isinstance(dtype, torch.dtype) or data["memory"] < 0 or self.memories[data["memory"]].is_meta:
            raise Malformed("a tensor of no type or of no memory that there is")
        flat: Tensor = self.memories[data["memory"]].view(dtype)
        if math.prod(data["shape"]) > max(len(flat), LARGEST_VIEW):
            raise Malformed("a tensor that is much larger than its memory")
        return flat.as_strided(data["shape"], data["stride"], data["offset"])
