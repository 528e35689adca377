"""Synthetic office tasks: instructions with reference answers, for a model that writes; made of sentences free of any licence.

Each client is an office of its own kind: a clinic that turns notes into a letter, a shop that writes catalogue lines, a registry that
files in JSON. Kinds differ in the length of their texts, in the form of their answers and in the shorthand that they use. The answer
follows from the text, so what is learnt is the kind's form and shorthand. The sentences are in `office_tasks.json`.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple, TypeAlias

from fedloom.core.errors import Refused
from fedloom.core.seeds import rng
from fedloom.data.examples import Examples, Split

Word: TypeAlias = str | Sequence[str]
"""What a word in braces may be: the same in text and answer, or one for each."""

ASIDES = 3
"""Sentences beside the matter in one text, at most, where the kind does not say another number."""


class Kind(NamedTuple):
    """The phrases of one kind of task; a word in braces is filled in.

    Fields:
        requests: what the office asks for.
        contexts: forms of the text that the request is about.
        answers: forms of the answer.
        slots: for each word in braces what it may be.
        asides: sentences beside the matter, for {asides} of a context.
        most_asides: how many of them one text has at most.
    """

    requests: Sequence[str]
    contexts: Sequence[str]
    answers: Sequence[str]
    slots: Mapping[str, Sequence[Word]]
    asides: Sequence[str] = ()
    most_asides: int = ASIDES


@functools.cache
def office_kinds() -> Mapping[str, Kind]:
    """Return the kinds of `office_tasks.json` by name, in the file's order: the draws depend on it."""
    text = (resources.files("fedloom.data") / "office_tasks.json").read_text(encoding="utf-8")
    content: Mapping[str, Any] = json.loads(text)
    common = {"name": content["names"], "place": content["places"]}
    return {name: Kind(**{**kind, "slots": {**common, **kind["slots"]}}) for name, kind in content["kinds"].items()}


class OfficeTask(NamedTuple):
    """One instruction: the request, the text that it is about, and the reference answer."""

    request: str
    context: str
    answer: str


@dataclass(frozen=True)
class OfficeTasks:
    """A `Source` of synthetic instructions with answers; the kind of task is the label.

    Fields:
        clients: offices; beyond the number of kinds there are several of one kind.
        per_client: training tasks of each office.
        test: test tasks over all, balanced over kinds.
    """

    clients: int = 6
    per_client: int = 60
    test: int = 60

    def __post_init__(self) -> None:
        for field in ("clients", "per_client", "test"):
            if (count := getattr(self, field)) < 1:
                raise Refused(f"data.{field}", count, "choose a whole number of at least 1")

    def load(self, seed: int) -> Split:
        """Return the tasks of `seed`; no test task has the text of a training task."""
        kinds = min(self.clients, len(office_kinds()))
        train, seen = list[tuple[int, OfficeTask]](), set[str]()
        for client in range(self.clients):
            draw = rng(seed, "office tasks", client)
            train += [(client, _draw_task(draw, client % kinds)) for _ in range(self.per_client)]
        seen = {task.context for _, task in train}
        test = []
        for index in range(self.test):
            draw = rng(seed, "office tasks", "test", index)
            while (task := _draw_task(draw, index % kinds)).context in seen:
                pass
            test.append((index % kinds, task))
        return Split(_examples(train), _examples(test))


def _draw_task(draw: random.Random, kind: int) -> OfficeTask:
    """Draw a task of this kind."""
    phrases = [*office_kinds().values()][kind]
    words = {slot: draw.choice(choices) for slot, choices in phrases.slots.items()}
    asides = draw.sample(phrases.asides, draw.randint(0, min(phrases.most_asides, len(phrases.asides))))
    common = {"order": str(draw.randrange(10_000, 99_999)), "asides": " ".join(asides)}
    written, wanted = ({slot: _form(word, at) for slot, word in words.items()} | common for at in (0, 1))
    context = " ".join(draw.choice(phrases.contexts).format(**written).split())
    answer = draw.choice(phrases.answers).format(**wanted)
    return OfficeTask(draw.choice(phrases.requests), _with_capitals(context), answer)


def _form(word: Word, at: int) -> str:
    return word if isinstance(word, str) else word[at]


def _with_capitals(text: str) -> str:
    """The text with a capital where a sentence begins."""
    return re.sub(r"(^|[.?!] )(\w)", lambda match: match[1] + match[2].upper(), text)


def _office(client: int) -> str:
    """The kind, numbered from the second office of that kind on."""
    kinds = [*office_kinds()]
    earlier, kind = divmod(client, len(kinds))
    return kinds[kind] + (f"-{earlier + 1}" if earlier else "")


def _examples(rows: Sequence[tuple[int, OfficeTask]]) -> Examples:
    kinds, tasks = [*office_kinds()], [task for _, task in rows]
    return Examples(
        texts=tuple(task.request for task in tasks),
        pairs=tuple(task.context for task in tasks),
        labels=tuple(client % len(kinds) for client, _ in rows),
        names=tuple(kinds),
        clients=tuple(_office(client) for client, _ in rows),
        answers=tuple(task.answer for task in tasks),
    )
