"""What the libraries say is told: collected as it is, once, without what is expected, and nothing is left changed."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from transformers.utils import logging as transformers_logging

from fedloom.train.library_messages import LIBRARIES, LONGEST, collect_messages, log_messages, notes_of

TRANSFORMERS = transformers_logging.get_logger("transformers.models.bert.modeling_bert")


def notes(*messages: str) -> tuple[str, ...]:
    """The notes of messages, each said twice by a library's logger, which says it once."""
    with collect_messages() as found:
        for message in messages * 2:
            TRANSFORMERS.warning_once(message)
    return notes_of(found)


def test_unknown_messages_are_notes_in_their_order_and_each_once() -> None:
    expected = ("transformers says: the second sun rises", "transformers says: the first sun sets")
    assert notes("the second sun rises", "the first sun sets") == expected


def test_a_second_run_in_a_process_has_the_notes_of_the_first() -> None:
    assert notes("said once a process") == notes("said once a process") != ()


def test_expected_messages_and_advice_for_programmers_are_no_notes() -> None:
    with collect_messages() as found:
        TRANSFORMERS.warning("BertForSequenceClassification LOAD REPORT from: here")
        TRANSFORMERS.warning("The following generation flags are not valid and may be ignored: ['top_p'].")
        warnings.warn("will be removed", FutureWarning, stacklevel=1)
        TRANSFORMERS.info("nothing of note")
    assert len(found) == 2
    assert notes_of(found) == ()


def test_a_note_is_one_line_without_paths_and_addresses() -> None:
    (note,) = notes("cannot read /home/ann/models/tiny/config.json\n  at 0x7f00 of the\x1b[1m hub https://hf.co/a/b")
    assert note == "transformers says: cannot read config.json at 0x.. of the hub https://hf.co/a/b"
    assert len(notes("long " * 200)[0]) == LONGEST


def test_warnings_of_python_and_torch_are_collected_by_library() -> None:
    with collect_messages() as found:
        torch.searchsorted(torch.arange(3), torch.arange(6).reshape(2, 3).T)
        warnings.warn("from the test itself", UserWarning, stacklevel=1)
    assert notes_of(found)[0].startswith("torch says: torch.searchsorted(): input value tensor is non-contiguous")
    assert "internally" not in notes_of(found)[0]
    assert "a library says: from the test itself" in found


def test_nothing_reaches_the_terminal_inside_and_all_is_as_before_outside(capfd: pytest.CaptureFixture[str]) -> None:
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(list(one.handlers), one.level, one.propagate) for one in loggers]
    bars, always = transformers_logging.is_progress_bar_enabled(), torch.is_warn_always_enabled()
    found: list[str] = []

    def fail() -> None:
        with collect_messages() as messages:
            assert not transformers_logging.is_progress_bar_enabled()
            TRANSFORMERS.warning("heard inside")
            logging.getLogger("peft.tuners").warning("heard, too")
            found.extend(messages)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert found == ["transformers says: heard inside", "peft says: heard, too"]
    assert capfd.readouterr() == ("", "")
    assert [(list(one.handlers), one.level, one.propagate) for one in loggers] == before
    assert (transformers_logging.is_progress_bar_enabled(), torch.is_warn_always_enabled()) == (bars, always)


def test_what_is_said_too_late_for_a_note_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with log_messages():
        TRANSFORMERS.warning("unheard of")
        TRANSFORMERS.warning("LOAD REPORT")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("fedloom.libraries", "transformers says: unheard of")
    ]
