"""Requests with reference answers, to fine-tune a model that writes text: instructions, questions, conversations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.data.examples import Examples, Split, Turn, check_shares, limited, set_aside
from fedloom.data.file_formats import (
    RawTable,
    RowSource,
    by_number,
    complete_column,
    gather_rows,
    label_values,
    read_table_file,
)

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Instructions:
    """Requests with reference answers in a file that `Table` could read, in Python rows, or from a function that returns rows.

    Rows without an answer are left out; how many they were is in the notes of the run.

    Fields:
        path: file or rows of the training examples, or of all.
        test: file or rows of the test examples (default: see `split`).
        instruction: column of the request.
        context: column of a text that the request is about (default: none).
        answer: column of the reference answer.
        messages: column of conversations, in the place of the three before (default: none). Each is a list of {"role", "content"}:
            the last message of the assistant is the answer, the user's before it the request, and earlier ones are kept.
        client: column of the client that a row came from (default: none).
        kind: column of the kind of task, for partitions by label (default: all of one kind).
        split: column that says "train" or "test"; rows with another word are left alone (default: `test_share` decides).
        test_share: share of each kind that is set aside to test on, where neither `test` nor `split` says which.
        limit: number of random training examples to keep (default: all).
    """

    path: str | Path | RowSource
    test: str | Path | RowSource | None = None
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
        """Read the rows, separate training from test rows, and leave out those without an answer. Raises Refused."""
        train, test, notes = self._rows()
        raws = {"rows": train} if test is None else {"training rows": train, "test rows": test}
        kinds = {which: self._kinds(raw) for which, raw in raws.items()}
        names = tuple(sorted({kind for values in kinds.values() for kind in values}, key=by_number))
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

    def _rows(self) -> tuple[RawTable, RawTable | None, list[str]]:
        """Return training rows, test rows if the data separate them, and a note on the rows that are neither."""
        every = _raw_table(self.path, "the rows")
        if self.test is not None:
            return every, _raw_table(self.test, "the test rows"), []
        if self.split is None:
            return every, None, []
        words = label_values(every, "split", self.split)
        for part in ("train", "test"):
            if part not in words:
                remedy = f'no row of {every.where} says "{part}" there, but {", ".join(sorted(set(words)))}'
                raise Refused("data.split", self.split, remedy)
        train, test = (_rows_of_part(every, words, part) for part in ("train", "test"))
        others = [value for value in words if value not in ("train", "test")]
        note = f"{len(others)} rows are neither trained nor tested on (split: {', '.join(sorted(set(others)))})."
        return train, test, [note] if others else []

    def _kinds(self, raw: RawTable) -> list[str]:
        """Kind of task of each row: all of one kind, if no column says it."""
        size = len(
            complete_column(raw, "messages" if self.messages else "instruction", self.messages or self.instruction)
        )
        return [""] * size if self.kind is None else label_values(raw, "kind", self.kind)

    def _examples(self, raw: RawTable, kinds: list[str], names: tuple[str, ...], test: bool) -> Examples:
        """Make examples of all rows, with an answer or without. Test rows may lack the column of clients."""
        unnamed = self.client is None or (test and self.client not in raw.columns)
        spoken = [] if self.messages is None else [*_conversations(raw, self.messages)]
        return Examples(
            texts=tuple(request for _, request, _ in spoken)
            if self.messages
            else _texts(raw, "instruction", self.instruction),
            pairs=None if self.messages or self.context is None else _texts(raw, "context", self.context, empty=True),
            labels=tuple(names.index(kind) for kind in kinds),
            names=names,
            clients=None if unnamed else tuple(map(str, complete_column(raw, "client", self.client or ""))),
            answers=tuple(answer for _, _, answer in spoken)
            if self.messages
            else _texts(raw, "answer", self.answer, empty=True),
            before=tuple(before for before, _, _ in spoken) if self.messages else None,
        )


def _raw_table(given: str | Path | RowSource, where: str) -> RawTable:
    return read_table_file(Path(given), None) if isinstance(given, str | Path) else gather_rows(given, where)


def _rows_of_part(raw: RawTable, words: list[str], value: str) -> RawTable:
    """Rows whose word in the column `split` is `value`."""
    chosen = [i for i, other in enumerate(words) if other == value]
    return RawTable({name: [cells[i] for i in chosen] for name, cells in raw.columns.items()}, f"{raw.where} ({value})")


def _texts(raw: RawTable, field: str, name: str, empty: bool = False) -> tuple[str, ...]:
    """Read a column of texts; with `empty` they may be missing or empty. Raises Refused."""
    if not empty or name not in raw.columns:
        complete_column(raw, field, name)
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


def _conversations(raw: RawTable, name: str) -> Iterable[tuple[tuple[Turn, ...], str, str]]:
    """Yield the earlier messages, the request, and the answer (empty: there is none) of each row. Raises Refused."""
    for number, value in enumerate(complete_column(raw, "messages", name), 1):
        where = f"row {number} of {raw.where}"
        turns = _turns(value, name, where)
        last = max((place for place, turn in enumerate(turns) if turn.role == "assistant"), default=len(turns))
        before, answer = turns[:last], turns[last].content if last < len(turns) else ""
        if not before or before[-1].role != "user":
            raise Refused("data.messages", name, f"in {where} no message of the user comes before the last answer")
        yield before[:-1], before[-1].content, answer


def _turns(value: object, name: str, where: str) -> tuple[Turn, ...]:
    """Read the messages of one row. Raises Refused."""
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
