"""Messages of transformers, peft, tokenizers and torch while they work: collected, and made into notes.

Their warnings are often the only sign that a checkpoint is not what it seems. Inside `collect_messages` they go into a list and not
to the terminal; `notes_of` leaves out those that this package answers itself, and makes a sentence of each of the others.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from fedloom.core.text import without_colours

LOG = logging.getLogger("fedloom.libraries")
LIBRARIES = (
    "transformers",
    "peft",
    "tokenizers",
    "torch",
    "safetensors",
    "huggingface_hub",
    "accelerate",
    "bitsandbytes",
)
INSIDE_TORCH = "(Triggered internally at"
LONGEST = 400
"""Characters of a message that are told."""

EXPECTED = re.compile(
    "|".join(
        (
            r"LOAD REPORT|Some weights of|You should probably TRAIN",  # asked of the weights: `pretrained.check_weights`
            r"You passed `num_labels=",  # `checkpoint.adopt_head`
            r"fan_in_fan_out is set to",  # PEFT sets what is right for a Conv1D
            r"rank_pattern keys|alpha_pattern keys",  # PEFT's own patterns for experts
            r"tie_word_embeddings=True|tied_target_modules",  # `checkpoint.untie_adapted`
            r"generation flags|`(do_sample|temperature|top_p|top_k|num_beams)` is set",  # answers are written greedily
            r"Setting `pad_token_id` to",  # `pretrained.load_tokenizer`
            r"recommend passing in an `attention_mask`|attention mask is not set|attention mask and the pad token",
            r"sequence length is longer than the specified maximum|no maximum length is provided",  # `text_checks.check_texts`
            r"`use_cache=True` is incompatible",  # training has no use for it
            r"Already found a `peft_config`|already multiple adapters",  # one slot for each rank
            r"unauthenticated requests",  # advice on the hub's speed
        )
    )
)
"""Messages that ask nothing of the user: each says what this package decides, checks or asks for itself."""

FOR_PROGRAMMERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
"""Warnings that are meant for those who call a library, not for those who use the program."""


@contextmanager
def collect_messages(again: bool = True) -> Iterator[list[str]]:
    """Collect what the libraries say inside the block, each as "library says: message"; the terminal shows none of it, nor bars.

    The list is complete at the end of the block. With `again`, what transformers says once a process is collected each time: the
    notes of a run do not depend on the runs before it.
    """
    found: list[str] = []
    bars, always = transformers_logging.is_progress_bar_enabled(), torch.is_warn_always_enabled()
    if again and hasattr(transformers_logging.warning_once, "cache_clear"):
        transformers_logging.warning_once.cache_clear()
    with ExitStack() as block:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        if bars:
            block.callback(transformers_logging.enable_progress_bar)
        torch.set_warn_always(True)
        block.callback(torch.set_warn_always, always)
        for name in LIBRARIES:
            block.enter_context(_redirected(logging.getLogger(name), found))
        heard = block.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        yield found
        said = [one for one in heard if not issubclass(one.category, FOR_PROGRAMMERS)]
        found += [f"{_library(one.filename, str(one.message))} says: {one.message}" for one in said]


@contextmanager
def log_messages() -> Iterator[None]:
    """Inside the block collect what the libraries say, and log it where it is not expected: there it is too late for a note."""
    with collect_messages(again=False) as messages:
        yield
    for note in notes_of(messages):
        LOG.warning("%s", note)


def notes_of(messages: Iterable[str]) -> tuple[str, ...]:
    """Return the messages that are not expected, each once, on one line and without paths of this machine."""
    return tuple(dict.fromkeys(_sentence(message) for message in messages if not EXPECTED.search(message)))


class _Collector(logging.Handler):
    """Handler that puts messages of a library into a list."""

    def __init__(self, library: str, found: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.library, self.found = library, found

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(f"{self.library} says: {record.getMessage()}")


@contextmanager
def _redirected(logger: logging.Logger, found: list[str]) -> Iterator[None]:
    """Send the warnings of a logger and its children into the list instead of where they go."""
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [_Collector(logger.name, found)], False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])


def _library(file: str, message: str) -> str:
    """Return the library that a warning is of, by its file; torch's core gives that of its caller."""
    if INSIDE_TORCH in message:
        return "torch"
    return next((name for name in LIBRARIES if f"/{name}/" in file.replace("\\", "/")), "a library")


def _sentence(message: Any) -> str:
    """Return a message on one line, paths by their last part, cut where it is long."""
    text = without_colours(str(message)).partition(INSIDE_TORCH)[0]
    text = re.sub(r"(?<![\w/:.])/(?:[^\s/'\"`]+/)+([^\s/'\"`]+)", r"\1", text)
    text = " ".join(re.sub(r"\b0x[0-9a-fA-F]+\b", "0x..", text).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
