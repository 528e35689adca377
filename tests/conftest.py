"""Tiny models and one finished run of them, made once a session; where child processes find the source; quick pictures."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

import pytest

import fedloom
from fedloom.report import style

PATHS = [Path(fedloom.__file__).parents[1], Path(__file__).parents[1]]
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, PATHS), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(autouse=True)
def quick_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the report's own tests a picture is its alternative text in an empty frame: to draw a page takes two seconds."""
    if "report" not in request.path.parts:
        frame = '<svg viewBox="0 0 1 1" role="img" aria-label="{}"></svg>'
        monkeypatch.setattr(style, "_svg", lambda figure, alt: frame.format(escape(alt)))


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
    prepare(tiny_run(encoder, name="finished", seed=5)).execute(out)
    return out
