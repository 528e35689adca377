"""Instructions with reference answers: what comes out of rows, files and conversations, and a sentence for all that is no answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedloom.core.errors import Refused
from fedloom.data.examples import Turn
from fedloom.data.instructions import Instructions
from fedloom.data.partition import ByClient, LabelDirichlet

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
ROWS: list[dict[str, Any]] = [
    {
        "instruction": f"Add one to {i}.",
        "context": f"The number is {i}." if i % 3 else "",
        "answer": str(i + 1),
        "kind": "odd" if i % 2 else "even",
        "who": i % 4,
        "part": ("train", "train", "dev", "test")[i % 4],
    }
    for i in range(40)
]
COLUMNS: dict[str, Any] = {"context": "context", "kind": "kind", "client": "who"}


def _talk(*messages: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


TALKS = [
    _talk(("user", f"Say {i}."), ("assistant", f"{i}."), ("user", "Again."), ("assistant", f"{i}, again."))
    for i in range(10)
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_files_and_rows_give_the_same_split(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("jsonl"):
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    split = Instructions(path, **COLUMNS).load(3)
    assert split == Instructions(ROWS, **COLUMNS).load(3) == Instructions(lambda: iter(ROWS), **COLUMNS).load(3)
    assert split.train.names == ("even", "odd")
    assert (len(split.train), len(split.test), split.notes) == (32, 8, ())
    known = {row["instruction"]: row for row in ROWS}
    some = split.train
    assert some.pairs is not None
    assert some.answers is not None
    assert some.clients is not None
    for text, pair, label, answer, client in zip(
        some.texts, some.pairs, some.labels, some.answers, some.clients, strict=True
    ):
        row = known[text]
        wanted = (row["context"], row["kind"], row["answer"], str(row["who"]))
        assert (pair, some.names[label], answer, client) == wanted


def test_a_column_can_say_what_is_tested_on() -> None:
    split = Instructions(ROWS, split="part").load(0)
    assert split.train.texts == tuple(row["instruction"] for row in ROWS if row["part"] == "train")
    assert split.test.texts == tuple(row["instruction"] for row in ROWS if row["part"] == "test")
    assert split.notes == ("10 rows are neither trained nor tested on (part says neither train nor test).",)
    assert split.train.pairs is None


def test_test_rows_may_lack_the_clients_and_have_kinds_of_their_own() -> None:
    test = [{"instruction": "Sing.", "answer": "La", "kind": "art"}]
    split = Instructions(ROWS, test, client="who", kind="kind", limit=5).load(0)
    assert (split.test.clients, split.test.labels, len(split.train)) == (None, (0,), 5)
    assert split.train.names == split.test.names == ("art", "even", "odd")


def test_rows_without_an_answer_are_left_out_and_told() -> None:
    silent: list[dict[str, Any]] = [
        {"instruction": f"{i}?", "answer": answer} for i, answer in enumerate(("", " \n", None))
    ]
    split = Instructions([*ROWS, *silent], test=[*silent, *ROWS[:4]]).load(0)
    assert (len(split.train), len(split.test)) == (40, 4)
    assert split.notes == (
        "3 of 43 training rows have no answer and are left out.",
        "3 of 7 test rows have no answer and are left out.",
    )
    assert Instructions([*ROWS, *silent]).load(0).notes == ("3 of 43 rows have no answer and are left out.",)


def test_a_conversation_ends_with_the_last_answer() -> None:
    spoken = _talk(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"))
    split = Instructions(TALKS, test=[spoken, _talk(("user", "Anybody?"))], messages="messages").load(0)
    assert split.train.before is not None
    assert split.train.before[2] == (Turn("user", "Say 2."), Turn("assistant", "2."))
    assert (split.train.texts[2], split.train.answers and split.train.answers[2]) == ("Again.", "2, again.")
    assert (split.test.texts, split.test.answers, split.test.before) == (
        ("Hi",),
        ("Hello",),
        ((Turn("system", "Be brief."),),),
    )
    assert split.notes == (
        "1 of 2 conversations of the test rows go on after the last answer; what nobody answers is left out.",
        "1 of 2 test rows have no answer and are left out.",
    )


SHAREGPT: list[dict[str, Any]] = [
    {
        "conversations": [
            {"from": "gpt" if number % 2 else "human", "value": message["content"]}
            for number, message in enumerate(talk["messages"])
        ]
    }
    for talk in TALKS
]
LAYOUTS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "roles": (TALKS, {}),
    "sharegpt": (SHAREGPT, {"messages": "conversations"}),
    "sharegpt, found": (SHAREGPT, {}),
    "as JSON text": ([{"messages": json.dumps(talk["messages"])} for talk in TALKS], {}),
    "in parts": (
        [
            {"messages": [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in talk["messages"]]}
            for talk in TALKS
        ],
        {},
    ),
    "a list for each key": (
        [{"messages": {key: [one[key] for one in talk["messages"]] for key in ("role", "content")}} for talk in TALKS],
        {},
    ),
    "own names": (
        [
            {"messages": [{**one, "role": {"user": "Patient"}.get(one["role"], "nurse")} for one in talk["messages"]]}
            for talk in TALKS
        ],
        {"roles": {"patient": "user", "nurse": "assistant"}},
    ),
    "with messages of nobody": (
        [
            _talk(
                ("assistant", "Welcome."), *((one["role"], one["content"]) for one in talk["messages"]), ("user", " ")
            )
            for talk in TALKS
        ],
        {},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_conversations_are_the_same_in_every_layout(name: str) -> None:
    rows, more = LAYOUTS[name]
    split, wanted = Instructions(rows, **more).load(1), Instructions(TALKS, messages="messages").load(1)
    assert (split.train, split.test) == (wanted.train, wanted.test)
    found = "conversations" if "conversations" in rows[0] else "messages"
    assert (
        f"Columns by their usual names: `{found}` as the messages; choose others with data.messages." in split.notes
    ) == ("messages" not in more)


@pytest.mark.parametrize(
    ("renamed", "found"),
    [
        ({"context": "input", "answer": "output"}, "`output` as the answer, `input` as the context"),
        (
            {"instruction": "question", "answer": "response"},
            "`question` as the instruction, `response` as the answer, `context`",
        ),
        ({"instruction": "prompt", "answer": "completion"}, "`prompt` as the instruction, `completion` as the answer"),
    ],
)
def test_columns_with_usual_names_are_found_and_noted(renamed: dict[str, str], found: str) -> None:
    rows = [{renamed.get(name, name): value for name, value in row.items()} for row in ROWS]
    split, wanted = Instructions(rows).load(0), Instructions(ROWS, context="context").load(0)
    assert (split.train, split.test) == (wanted.train, wanted.test)
    assert found in split.notes[0]


def test_a_choice_between_columns_is_left_to_the_user() -> None:
    several = [{"instruction": "a", "output": "b", "response": "c"}]
    with pytest.raises(Refused, match=r"data\.answer = 'answer'.*the columns are instruction, output, response"):
        Instructions(several).load(0)


def test_messages_are_mended_for_chat_templates_and_counted() -> None:
    odd = [
        _talk(("system", "Be brief."), ("user", "Hi"), ("user", "there"), ("assistant", "Hello"), ("assistant", "you")),
        _talk(("user", "Hi"), ("assistant", ""), ("user", "Who?"), ("assistant", "Me")),
        _talk(("assistant", "Good day"), ("user", "Hi"), ("assistant", "Hello")),
        _talk(("system", "Be brief.")),
        _talk(("assistant", "Good day")),
        _talk(),
    ]
    split = Instructions(TALKS, test=odd, messages="messages").load(0)
    assert split.test.texts == ("Hi\n\nthere", "Hi\n\nWho?", "Hi")
    assert split.test.answers == ("Hello\n\nyou", "Me", "Hello")
    assert split.test.before == ((Turn("system", "Be brief."),), (), ())
    assert split.notes == (
        "1 of 6 conversations of the test rows begin with an answer to nothing, which is left out.",
        "1 of 6 conversations of the test rows have empty messages, which are left out.",
        "2 of 6 conversations of the test rows have messages of one speaker in a row, which are joined by an empty line.",
        "3 of 6 test rows have no answer and are left out.",
    )


SECRET = "0123-secret"
UNREADABLE: dict[str, Any] = {
    "not a list of messages": SECRET,
    "tools are called": [{"role": "user", "content": SECRET}, {"role": "tool", "content": SECRET}],
    "tools are called, which": [{"role": "assistant", "content": None, "tool_calls": [{"name": SECRET}]}],
    "a speaker who is not known": [{"role": SECRET, "content": "Hi"}],
    "a message without": [{"content": SECRET}],
    "parts that are no text, such as images": [{"role": "user", "content": [{"type": "image", "url": SECRET}]}],
}


@pytest.mark.parametrize("reason", UNREADABLE)
def test_conversations_that_cannot_be_read_are_refused_or_dropped_without_a_word_of_them(reason: str) -> None:
    rows = [*TALKS, {"messages": UNREADABLE[reason]}, {"messages": None}]
    with pytest.raises(Refused, match=r"data\.messages.*row 12\).*data\.missing=drop") as missing:
        Instructions(rows, messages="messages").load(0)
    with pytest.raises(Refused, match=rf"data\.messages.*row 11 of the rows: .*{reason}.*data\.missing=drop") as unread:
        Instructions(rows[:-1], messages="messages").load(0)
    split = Instructions(rows, messages="messages", missing="drop").load(0)
    assert len(split.train) + len(split.test) == 10
    assert "1 of 12 rows of the rows lack a value" in split.notes[0]
    assert reason in split.notes[1]
    assert SECRET not in " ".join([str(missing.value), str(unread.value), *split.notes])


def test_rows_without_a_request_are_refused_or_dropped() -> None:
    rows = [*ROWS, {"instruction": " ", "answer": "a"}, {"answer": "a"}]
    with pytest.raises(Refused, match=r"data\.instruction.*rows 41 and 42.*data\.missing=drop"):
        Instructions(rows).load(0)
    assert Instructions(rows, missing="drop").load(0).train == Instructions(ROWS).load(0).train


def test_conversations_come_from_files_and_are_taken_with_their_turns(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(TALKS), tmp_path / "talks.parquet")
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, TALKS)))
    rows = Instructions(TALKS, messages="messages").load(1)
    assert Instructions(tmp_path / "talks.parquet", messages="messages").load(1) == rows
    assert Instructions(tmp_path / "talks.jsonl", messages="messages").load(1) == rows
    assert rows.train.before is not None
    assert rows.train.take([3, 1]).before == (rows.train.before[3], rows.train.before[1])


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        (ROWS, {"instruction": "question"}, r"data\.instruction = 'question'.*the columns are instruction, context"),
        (ROWS, {"answer": "output"}, r"data\.answer = 'output'.*no such column"),
        (ROWS, {"context": "input"}, r"data\.context = 'input'.*no such column"),
        (ROWS, {"messages": "chat"}, r"data\.messages = 'chat'.*no such column"),
        (ROWS, {"messages": "answer"}, r"data\.messages.*rows 1, 2, 3.*of the rows: not a list of messages"),
        (
            [{"instruction": "a", "answer": ["b"]}],
            {},
            r"data\.answer.*row 1 of the rows: a value of type list, not text",
        ),
        (ROWS, {"split": "kind"}, r'data\.split.*no row of the rows says "train" there$'),
        ([{"instruction": "a", "answer": None}], {}, r"data\.answer.*none of the 1 rows has an answer"),
        ([_talk(("assistant", "Hi"))], {"messages": "messages"}, r"data\.messages.*none of the 1 rows has an answer"),
        ([], {}, r"data\.path.*there are no rows"),
    ],
)
def test_what_cannot_be_read_is_refused(rows: list[dict[str, Any]], more: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=f"(?s){said}"):
        Instructions(rows, **more).load(0)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(Refused, match=r"data\.test_share"):
        Instructions(ROWS, test_share=1.0)
    with pytest.raises(Refused, match=r"data\.limit"):
        Instructions(ROWS, limit=0)
    with pytest.raises(Refused, match=r"data\.split"):
        Instructions(ROWS, ROWS, split="part")
    with pytest.raises(Refused, match=r"data\.roles.*doctor: expert"):
        Instructions(ROWS, roles={"doctor": "expert"})
    with pytest.raises(Refused, match=r"data\.missing"):
        Instructions(ROWS, missing="ignore")  # type: ignore[arg-type]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_public_data_sets_can_be_read_and_divided() -> None:
    dolly = Instructions(
        SHARED / "dolly/clients.jsonl.gz", context="context", answer="response", client="client", kind="category"
    )
    train = dolly.load(0).train
    assert len(ByClient().split(train, 0)) == 9
    assert len(LabelDirichlet(8, 0.3).split(train, 0)) == 8
    gsm = Instructions(SHARED / "gsm8k/train.jsonl.gz", instruction="question").load(0).train
    assert all("####" in answer for answer in gsm.answers or ())


def test_conversations_are_found_under_any_name_or_the_user_says_where() -> None:
    talks = [row["messages"] for row in TALKS]
    split = Instructions([{"dialog": talk, "tags": [{"name": "x"}]} for talk in talks]).load(0)
    assert split.train == Instructions(TALKS).load(0).train
    assert "`dialog` as the messages" in split.notes[0]
    for names in (("messages", "conversations"), ("chosen", "rejected")):
        both = [dict.fromkeys(names, talk) for talk in talks]
        with pytest.raises(
            Refused, match=rf"the columns {', '.join(names)} hold conversations.*--set data\.messages={names[0]}"
        ):
            Instructions(both).load(0)
        assert Instructions(both, messages=names[0]).load(0).train == split.train
    with pytest.raises(Refused, match="none of the 3 rows has an answer to a request"):
        Instructions([_talk(("user", " "), ("assistant", "A"))] * 3).load(0)
