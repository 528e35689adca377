"""Requests with reference answers, to fine-tune a model that writes text: instructions, questions, conversations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from fedloom.core.errors import Refused
from fedloom.core.settings_view import as_written
from fedloom.data.cells import (
    by_number,
    check_columns,
    column_identities,
    column_texts,
    drop_missing,
)
from fedloom.data.delimited import FileFormat
from fedloom.data.examples import Examples, Split, Turn, check_row_options, limited, lost_clients, set_aside
from fedloom.data.file_formats import read_tables
from fedloom.data.raw_table import TESTING, TRAINING, RawTable, RowSource, held_rows, row_count, strip_blanks

REQUESTS = ("instruction", "prompt", "question", "request", "query")
CONTEXTS = ("input", "context")
ANSWERS = ("answer", "output", "response", "completion")
CONVERSATIONS = ("messages", "conversations", "conversation")
"""Names that columns often have, as in the layouts of Alpaca, Dolly, OpenAI and ShareGPT."""

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
}
"""What speakers are called in data, with their role."""

TOOLS = frozenset({"tool", "function", "function_call", "observation", "ipython", "environment"})
"""Speakers that are no persons."""


@dataclass(frozen=True)
class Instructions(FileFormat):
    """Requests with reference answers in a file that `Table` could read, in anything in Python that `Rows` could, or from a function.

    Rows without an answer are left out; their number is in the notes of the run. Where `instruction` or `answer` is not given and
    there is no such column, the only one with a usual name is taken (Alpaca's `input` and `output`, a column of conversations). The
    notes say which.

    Fields, besides those of `FileFormat`:
        path: file or rows of the training examples, or of all.
        test: file or rows of the test examples (default: the split "test" of the data, else see `split`).
        instruction: column of the request.
        context: column of a text that the request is about (default: none).
        answer: column of the reference answer.
        messages: column of conversations, in the place of the three before (default: none). Each is a list of {"role", "content"} or
            {"from", "value"}. All messages of the assistant are trained on; the last one is the answer that is written and scored.
        roles: other names of speakers in conversations, each with its role "user", "assistant" or "system" (default: the usual ones,
            such as "human" and "gpt").
        client: column of the client that a row came from (default: none).
        kind: column of the kind of task, for partitions by label (default: all of one kind).
        split: column that says "train" or "test"; rows with another word are ignored (default: `test_share` decides).
        test_share: share of each kind that is set aside to test on, where neither `test` nor `split` says which.
        limit: number of random training examples to keep (default: all).
        missing: what happens to rows that lack a request, client or kind, or have an unreadable conversation: "refuse" or "drop".
    """

    path: str | Path | RowSource
    test: str | Path | RowSource | None = None
    _: KW_ONLY
    instruction: str = REQUESTS[0]
    context: str | None = None
    answer: str = ANSWERS[0]
    messages: str | None = None
    roles: Mapping[str, str] | None = None
    client: str | None = None
    kind: str | None = None
    split: str | None = None
    test_share: float = 0.2
    limit: int | None = None
    missing: Literal["refuse", "drop"] = "refuse"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("path", "test"):
            object.__setattr__(self, name, held_rows(getattr(self, name)))
        check_row_options(self.test_share, self.limit, self.missing)
        if self.split is not None and self.test is not None:
            raise Refused("data.split", self.split, "data.test gives the test rows already; leave out one of the two")
        for speaker, role in (self.roles or {}).items():
            if role not in ("system", "user", "assistant"):
                raise Refused("data.roles", f"{speaker}: {role}", "a role is system, user or assistant")

    def __repr__(self) -> str:
        """Return it without the data."""
        return as_written(self)

    def load(self, seed: int) -> Split:
        """Read the rows, separate training from test rows, and leave out those without an answer. Raises Refused."""
        train, test = self._tables()
        layout, notes = self._found_columns(train)
        raws = {"rows": train} if test is None else {"training rows": train, "test rows": test}
        read = {which: layout._answered(raw, which, raw is test) for which, raw in raws.items()}
        names = tuple(sorted({kind for part in read.values() for kind in part.kinds}, key=by_number))
        parts = [part.examples(names) for part in read.values()]
        notes += [note for part in read.values() for note in part.notes]
        if test is None:
            split = set_aside(parts[0], self.test_share, self.limit, seed)
            return replace(split, notes=tuple(dict.fromkeys([*notes, *split.notes])))
        learn = limited(parts[0], self.limit, seed)
        return Split(learn, parts[1], tuple(dict.fromkeys([*notes, *lost_clients(parts[0], learn)])))

    def _tables(self) -> tuple[RawTable, RawTable | None]:
        """Return training rows, and test rows if the data separate them, with a note on the rows that are neither."""
        train, test = read_tables(self.path, self, "the rows")
        if self.test is not None:
            given = read_tables(self.test, self, "the test rows")
            return train, given.test or given.train
        if self.split is None:
            return train, test
        check_columns(train, {"split": [self.split]})
        words = column_identities(train, "split", self.split).values
        for part in (TRAINING, TESTING):
            if part not in words:
                raise Refused("data.split", self.split, f'no row of {train.where} says "{part}" there')
        parts = {part: [i for i, word in enumerate(words) if word == part] for part in (TRAINING, TESTING)}
        others = len(words) - sum(map(len, parts.values()))
        note = f"{others} rows are neither trained nor tested on ({self.split} says neither train nor test)."
        learn, check = (train.select(rows)._replace(where=f"{train.where} ({part})") for part, rows in parts.items())
        return learn._replace(notes=(*train.notes, *([note] if others else []))), check

    def _found_columns(self, raw: RawTable) -> tuple[Instructions, list[str]]:
        """Return this with columns of usual names where its own are not given and not there, and a note on them."""
        have, given = set(raw.columns), {self.instruction, self.context, self.answer}
        if self.messages or {self.instruction, self.answer} <= have:
            return self, []
        columns = conversation_columns(raw)
        if given == {REQUESTS[0], None, ANSWERS[0]} and columns:
            if len(columns) > 1:
                remedy = f"the columns {', '.join(columns)} hold conversations; say which with --set data.messages={columns[0]}"
                raise Refused("data.messages", None, remedy)
            return replace(self, messages=columns[0]), [_column_note({"messages": columns[0]})]
        found = dict[str, str]()
        for field, usual in (("instruction", REQUESTS), ("answer", ANSWERS)):
            likely = [name for name in usual if name in have and name not in given]
            if getattr(self, field) == usual[0] not in have and len(likely) == 1:
                found[field] = likely[0]
        contexts = [name for name in CONTEXTS if name in have]
        if found and self.context is None and len(contexts) == 1 and self.instruction in {REQUESTS[0], *found.values()}:
            found["context"] = contexts[0]
        return (replace(self, **found), [_column_note(found)]) if found else (self, [])  # type: ignore[arg-type]

    def _answered(self, raw: RawTable, which: str, test: bool) -> _Answered:
        """Read the rows that have a request and an answer. Test rows may lack the column of clients. Raises Refused."""
        unnamed = self.client is None or (test and self.client not in raw.columns)
        columns = {
            ("messages" if self.messages else "instruction"): [self.messages or self.instruction],
            **({} if unnamed or self.client is None else {"client": [self.client]}),
            **({} if self.kind is None else {"kind": [self.kind]}),
        }
        texts = (
            {} if self.messages else {"answer": [self.answer], **({"context": [self.context]} if self.context else {})}
        )
        check_columns(raw, columns | texts)
        raw, size = drop_missing(raw, columns, self.missing), row_count(raw)
        if self.messages:
            raw, rows = _conversations(raw, self.messages, self.roles or {}, self.missing)
        else:
            contexts = column_texts(raw, "context", [self.context]) if self.context else ("",) * row_count(raw)
            requests, answers = (column_texts(raw, f, [getattr(self, f)]) for f in ("instruction", "answer"))
            rows = [_Row((), *parts) for parts in zip(requests, contexts, answers, strict=True)]
        kept = [i for i, row in enumerate(rows) if row.answer]
        if not kept:
            field = "messages" if self.messages else "answer"
            lack = "an answer to a request" if self.messages else "an answer"
            raise Refused(f"data.{field}", getattr(self, field), f"none of the {size} {which} has {lack}")
        notes = [*raw.notes]
        if silent := len(rows) - len(kept):
            notes.append(f"{silent} of {size} {which} have no answer and are left out.")
        raw = raw.select(kept)
        kinds = None if self.kind is None else column_identities(raw, "kind", self.kind)
        clients = None if unnamed or self.client is None else column_identities(raw, "client", self.client)
        notes += [note for found in (kinds, clients) if found for note in found.notes]
        return _Answered(
            rows=[rows[i] for i in kept],
            kinds=[""] * len(kept) if kinds is None else kinds.values,
            clients=None if clients is None else tuple(clients.values),
            context=self.context is not None and not self.messages,
            conversations=self.messages is not None,
            notes=notes,
        )


class _Row(NamedTuple):
    """The messages before a request, the request, its context, and the answer ("": there is none)."""

    before: tuple[Turn, ...]
    request: str
    context: str
    answer: str


class _Answered(NamedTuple):
    """Rows with an answer, their kinds and clients, whether they have a column of contexts or are conversations, and notes."""

    rows: list[_Row]
    kinds: list[str]
    clients: tuple[str, ...] | None
    context: bool
    conversations: bool
    notes: list[str]

    def examples(self, names: tuple[str, ...]) -> Examples:
        """Make examples of all rows; `names` are the kinds of the whole run."""
        return Examples(
            texts=tuple(row.request for row in self.rows),
            pairs=tuple(row.context for row in self.rows) if self.context else None,
            labels=tuple(names.index(kind) for kind in self.kinds),
            names=names,
            clients=self.clients,
            answers=tuple(row.answer for row in self.rows),
            before=tuple(row.before for row in self.rows) if self.conversations else None,
        )


def _column_note(found: Mapping[str, str]) -> str:
    read = ", ".join(f"`{name}` as the {field}" for field, name in found.items())
    return f"Columns by their usual names: {read}; choose others with {', '.join(f'data.{field}' for field in found)}."


# Conversations ----------------------------------------------------------------------------------------------------------


def conversation_columns(raw: RawTable) -> list[str]:
    """Return the columns that hold conversations: those of a usual name, or any, where none is named like a request or an answer."""
    columns = {name: keys for name, cells in raw.columns.items() if (keys := _message_keys(cells))}
    if usual := [name for name in columns if name in CONVERSATIONS]:
        return usual
    asked = not set(raw.columns).isdisjoint((*REQUESTS, *ANSWERS))
    return [] if asked else [name for name, keys in columns.items() if keys & {"role", "from"}]


def _conversations(raw: RawTable, name: str, roles: Mapping[str, str], missing: str) -> tuple[RawTable, list[_Row]]:
    """Read the conversations of a column; rows that cannot be read are left out if `missing` is "drop". Raises Refused."""
    found, wrong, changes = list[tuple[int, _Row]](), dict[str, list[int]](), Counter[str]()
    for index, value in enumerate(raw.columns[name]):
        try:
            turns = _turns(value, {**ROLES, **{speaker.lower(): role for speaker, role in roles.items()}})
        except ValueError as error:
            wrong.setdefault(str(error), []).append(index)
        else:
            row, changed = _divided(turns)
            found.append((index, row))
            changes.update(changed)
    notes, size = [*raw.notes], row_count(raw)
    for reason, indices in wrong.items():
        if missing != "drop" or not found:
            remedy = "mend them, or leave such rows out with --set data.missing=drop"
            raise Refused("data.messages", name, f"{raw.rows(indices)} of {raw.where}: {reason}; {remedy}")
        notes.append(
            f"{len(indices)} of {size} conversations of {raw.where} are left out: {reason} ({raw.rows(indices)})."
        )
    notes += [f"{count} of {size} conversations of {raw.where} {what}." for what, count in sorted(changes.items())]
    return raw.select(index for index, _ in found)._replace(notes=tuple(notes)), [row for _, row in found]


def _divided(turns: Sequence[Turn]) -> tuple[_Row, set[str]]:
    """Divide the messages of a conversation in what comes before the last answer, and that answer; also return what was changed.

    Chat templates want a user's message before each answer, and none that is empty.
    """
    changed, joined = set[str](), list[Turn]()
    for turn in turns:
        if not strip_blanks(turn.content):
            changed.add("have empty messages, which are left out")
        elif joined and joined[-1].role == turn.role:
            changed.add("have messages of one speaker in a row, which are joined by an empty line")
            joined[-1] = Turn(turn.role, f"{joined[-1].content}\n\n{turn.content}")
        else:
            joined.append(turn)
    asked = next((place for place, turn in enumerate(joined) if turn.role == "user"), len(joined))
    if any(turn.role == "assistant" for turn in joined[:asked]):
        changed.add("begin with an answer to nothing, which is left out")
    joined = [turn for place, turn in enumerate(joined) if place > asked or turn.role != "assistant"]
    ends = [place for place, turn in enumerate(joined) if turn.role == "assistant" and joined[place - 1].role == "user"]
    if not ends:
        return _Row((), "", "", ""), set()  # it is counted as one without an answer
    if ends[-1] + 1 < len(joined):
        changed.add("go on after the last answer; what nobody answers is left out")
    before, request, answer = joined[: ends[-1] - 1], joined[ends[-1] - 1], joined[ends[-1]]
    return _Row(tuple(before), request.content, "", answer.content), changed


def _turns(value: object, roles: Mapping[str, str]) -> list[Turn]:
    """Read the messages of a conversation. Raises ValueError with a reason that repeats nothing of them."""
    return [_turn(message, roles) for message in _messages(value)]


def _messages(value: object) -> Iterator[Mapping[str, object]]:
    """Yield the messages of a cell: a list, the same as JSON text, or a list for each key, as `datasets` may store them."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if isinstance(value, Mapping) and all(isinstance(column, list | tuple) for column in value.values()):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list | tuple) or not all(isinstance(message, Mapping) for message in value):
        raise ValueError("not a list of messages, each with a role and a content")
    yield from value


def _turn(message: Mapping[str, object], roles: Mapping[str, str]) -> Turn:
    """Read a message. Raises ValueError with a reason that repeats nothing of it."""
    speaker = next((message[key] for key in ("role", "from") if message.get(key) is not None), None)
    content = next((message[key] for key in ("content", "value") if message.get(key) is not None), None)
    if not isinstance(speaker, str):
        raise ValueError('a message without "role" or "from"')
    if speaker.lower() in TOOLS - roles.keys() or message.get("tool_calls") or message.get("function_call"):
        raise ValueError("tools are called, which is not trained on")
    if speaker.lower() not in roles:
        raise ValueError(
            "a speaker who is not known; say the role of each, as in --set \"data.roles={'patient': 'user'}\""
        )
    return Turn(roles[speaker.lower()], _content(content))


def _content(content: object) -> str:
    """Return the text of a message, which may come in parts. Raises ValueError where it has anything else."""
    if isinstance(content, str) or content is None:
        return content or ""
    if not isinstance(content, list | tuple):
        raise ValueError('a message without a text as "content" or "value"')
    texts = [
        part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None for part in content
    ]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a message has parts that are no text, such as images: only text is trained on")
    return "".join(map(str, texts))


def _message_keys(cells: Sequence[object]) -> set[str]:
    """Return the keys of the messages in the first cell that holds anything; none where it is no conversation."""
    first = next((cell for cell in cells if cell), None)
    try:
        return {str(key) for message in _messages(first) for key in message}
    except ValueError:
        return set()
