"""`fedloom chat`: messages from the terminal or a pipe, the conversation that the model sees, and what is refused."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom import Instructions, Limits, Training, prepare
from fedloom.cli import main
from fedloom.cli.chat import messages
from tests.support.tiny_models import toy_answers
from tests.support.tiny_runs import tiny_run

Chat = Callable[[Path, str], tuple[int | str | None, str, str]]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one", ["one"]),
        ("\n  \n", []),
        ("Write the headline.\\\n\\\nRain.\n", ["Write the headline.\n\nRain."]),
        ("one\n/quit\ntwo\n", ["one"]),
        ("one\\\n/quit\n", ["one\n/quit"]),
        ("one\\", ["one"]),
    ],
)
def test_a_message_is_a_line_or_several(typed: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert [*messages()] == expected


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    def call(folder: Path, typed: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.setattr(sys, "argv", ["fedloom", "chat", str(folder), "--tokens", "6"])
        with pytest.raises(SystemExit) as stop:
            main.main()
        return stop.value.code, *capsys.readouterr()

    return call


def test_a_model_that_chooses_labels_cannot_talk(finished: Path, chat: Chat) -> None:
    code, _, said = chat(finished, "hello\n")
    assert code == 2
    assert "use fedloom predict" in said


@pytest.mark.slow
def test_the_model_sees_the_conversation_so_far_until_another_one_begins(
    generator: Path, tmp_path: Path, chat: Chat
) -> None:
    data = Instructions(toy_answers(40), test_share=0.25)
    run = tiny_run(generator, data=data, limits=Limits(versions=1), training=Training(learning_rate=5e-2))
    result = prepare(run).execute(tmp_path / "run", report=False)
    first, second = toy_answers(2)[0]["instruction"], toy_answers(2)[1]["instruction"]
    (answer,) = result.generate([first], 6)
    talk = [("user", first), ("assistant", answer), ("user", second)]
    (later,) = result.generate([[{"role": role, "content": text} for role, text in talk]], 6)
    code, out, _ = chat(result.folder, f"{first}\n{second}\n/new\n{first}\n")
    assert code == 0
    _, _, answers = out.partition("\n")  # behind the hint
    assert [text.strip() for text in answers.split("\n\n")[:-1]] == [answer, later, answer]
