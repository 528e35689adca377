"""Requests with reference answers, to fine-tune a model that writes text: instructions, questions, conversations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.data.examples import Examples, Split, Turn, check_shares, limited, set_aside
from fedloom.data.file_formats import Given, Raw, by_number, column, gather, label_values, read

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Instructions:
    """Instructions in a file that `Table` could read, in Python rows, or given by a function that returns rows.

    A row has a request in the column `instruction`, in `context` what it is about, if there is such a column, and in `answer` the
    reference answer. Or `messages` names a column of conversations, each a list of {"role", "content"}: the last message of the
    assistant is the answer, the user's before it the request, and what came before those is kept.
    `client` names the column that says whose a row is, `kind` the one that says what kind of task it is, for partitions by label.

    Test rows are those of `test`; or those with "test" in the column `split`, of which those with "train" are trained on and all
    others left alone; or else a share `test_share` of each kind. `limit` keeps that many random training examples. Rows without an
    answer are left out; how many they were is in the notes of the run.
    """

    path: str | Path | Given
    test: str | Path | Given | None = None
    _: KW_ONLY
    instruction: str = "instruction"
    context: str | None = None
    answer: str = "answer"
    messages: str | None = None
    client: str | None = None
    kind: str | None = None
    split: str | None = None
    test_share: float = 0.2
    limit: int | None = None

    def __post_init__(self) -> None:
        check_shares(self.test_share, self.limit)
        if self.split is not None and self.test is not None:
            raise Refused("data.split", self.split, "data.test gives the test rows already; leave out one of the two")

    def load(self, seed: int) -> Split:
        """Read, tell training from test, and leave out what has no answer. Raises Refused."""
        train, test, notes = self._rows()
        raws = {"rows": train} if test is None else {"training rows": train, "test rows": test}
        kinds = {which: self._kinds(raw) for which, raw in raws.items()}
        names = tuple(sorted({kind for own in kinds.values() for kind in own}, key=by_number))
        parts = []
        for which, raw in raws.items():
            every = self._examples(raw, kinds[which], names, raw is test)
            answered = every.take(i for i, answer in enumerate(every.answers or ()) if answer.strip())
            if not len(answered):
                raise Refused("data.answer", self.answer, f"none of the {len(every)} {which} has an answer")
            if missing := len(every) - len(answered):
                notes.append(f"{missing} of {len(every)} {which} have no answer and are left out.")
            parts.append(answered)
        if test is None:
            return replace(set_aside(parts[0], self.test_share, self.limit, seed), notes=tuple(notes))
        return Split(limited(parts[0], self.limit, seed), parts[1], tuple(notes))

    def _rows(self) -> tuple[Raw, Raw | None, list[str]]:
        """Training rows, test rows if they are told apart already, and a note on the rows that are neither."""
        every = _found(self.path, "the rows")
        if self.test is not None:
            return every, _found(self.test, "the test rows"), []
        if self.split is None:
            return every, None, []
        said = label_values(every, "split", self.split)
        for part in ("train", "test"):
            if part not in said:
                remedy = f'no row of {every.where} says "{part}" there, but {", ".join(sorted(set(said)))}'
                raise Refused("data.split", self.split, remedy)
        train, test = (_where(every, said, part) for part in ("train", "test"))
        others = [value for value in said if value not in ("train", "test")]
        note = f"{len(others)} rows are neither trained nor tested on (split: {', '.join(sorted(set(others)))})."
        return train, test, [note] if others else []

    def _kinds(self, raw: Raw) -> list[str]:
        """What kind of task each row is: all of one kind, if no column says it."""
        size = len(column(raw, "messages" if self.messages else "instruction", self.messages or self.instruction))
        return [""] * size if self.kind is None else label_values(raw, "kind", self.kind)

    def _examples(self, raw: Raw, kinds: list[str], names: tuple[str, ...], test: bool) -> Examples:
        """All rows, with an answer or without. Test rows may lack the column of clients."""
        unnamed = self.client is None or (test and self.client not in raw.columns)
        spoken = [] if self.messages is None else [*_conversations(raw, self.messages)]
        return Examples(
            texts=tuple(request for _, request, _ in spoken)
            if self.messages
            else _texts(raw, "instruction", self.instruction),
            pairs=None if self.messages or self.context is None else _texts(raw, "context", self.context, empty=True),
            labels=tuple(names.index(kind) for kind in kinds),
            names=names,
            clients=None if unnamed else tuple(map(str, column(raw, "client", self.client or ""))),
            answers=tuple(answer for _, _, answer in spoken)
            if self.messages
            else _texts(raw, "answer", self.answer, empty=True),
            before=tuple(before for before, _, _ in spoken) if self.messages else None,
        )


def _found(given: str | Path | Given, where: str) -> Raw:
    return read(Path(given), None) if isinstance(given, str | Path) else gather(given, where)


def _where(raw: Raw, said: list[str], value: str) -> Raw:
    """The rows for which this was said."""
    chosen = [i for i, other in enumerate(said) if other == value]
    return Raw({name: [cells[i] for i in chosen] for name, cells in raw.columns.items()}, f"{raw.where} ({value})")


def _texts(raw: Raw, field: str, name: str, empty: bool = False) -> tuple[str, ...]:
    """A column of texts; with `empty` they may be missing or empty. Raises Refused."""
    if not empty or name not in raw.columns:
        column(raw, field, name)
    texts = []
    for number, value in enumerate(raw.columns[name], 1):
        text = "" if value is None or value != value else value
        if not isinstance(text, str):
            raise Refused(f"data.{field}", name, f"row {number} of {raw.where} holds {value!r:.60}, not text")
        if not empty and not text.strip():
            raise Refused(
                f"data.{field}", name, f"the text in row {number} of {raw.where} is empty; fill or drop the row"
            )
        texts.append(text if text.strip() else "")
    return tuple(texts)


def _conversations(raw: Raw, name: str) -> Iterable[tuple[tuple[Turn, ...], str, str]]:
    """What was said before, the request, and the answer (empty: nobody answered) of each row. Raises Refused."""
    for number, value in enumerate(column(raw, "messages", name), 1):
        where = f"row {number} of {raw.where}"
        turns = _turns(value, name, where)
        last = max((place for place, turn in enumerate(turns) if turn.role == "assistant"), default=len(turns))
        asked, answer = turns[:last], turns[last].content if last < len(turns) else ""
        if not asked or asked[-1].role != "user":
            raise Refused("data.messages", name, f"in {where} no message of the user comes before the last answer")
        yield asked[:-1], asked[-1].content, answer


def _turns(value: object, name: str, where: str) -> tuple[Turn, ...]:
    """The messages of one row. Raises Refused."""
    if not isinstance(value, list | tuple) or not all(isinstance(message, Mapping) for message in value):
        raise Refused("data.messages", name, f"{where} holds {value!r:.60}; give a list of messages")
    turns = []
    for message in value:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            remedy = (
                f'{where} has the message {dict(message)!r:.60}; give "role" ({", ".join(ROLES)}) and "content", a text'
            )
            raise Refused("data.messages", name, remedy)
        turns.append(Turn(role, content))
    return tuple(turns)
