"""Tiny models and one finished run of them, made once a session; where child processes find the source; empty pictures."""

from __future__ import annotations

import gc
import os
from html import escape
from pathlib import Path

import pytest

import fedloom
from fedloom.report import style

PATHS = [Path(fedloom.__file__).parents[1], Path(__file__).parents[1]]
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, PATHS), *filter(None, [os.environ.get("PYTHONPATH")])])


gc.disable()  # until all tests are collected: imports make a million objects that all stay
DRAW = style._svg


def frame(figure: object, alt: str) -> str:
    """An empty picture with the alternative text: to draw the pictures of a page takes more than a second."""
    return f'<svg viewBox="0 0 1 1" role="img" aria-label="{escape(alt)}"></svg>'


def pytest_collection_finish() -> None:
    """What was imported stays to the end, so the collector need not look at it again."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Pictures are drawn for the tests of the report, and for all others they are empty frames."""
    style._svg = DRAW if "report" in item.path.parts else frame


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT without a head, and its tokenizer."""
    from tests.support.tiny_models import tiny_encoder

    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama without a head, and its tokenizer, which has no token to pad with."""
    from tests.support.tiny_models import tiny_decoder

    return tiny_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="session")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama that writes text, its head tied to its embedding, and its tokenizer."""
    from tests.support.tiny_models import tiny_generator

    return tiny_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="session")
def finished(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three rounds at ranks 2, 4 and 8; tests must not write into it."""
    from fedloom.runs.prepare import prepare
    from tests.support.tiny_models import tiny_run

    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(style, "_svg", DRAW)
        prepare(tiny_run(encoder, name="finished", seed=5)).execute(out)
    return out
