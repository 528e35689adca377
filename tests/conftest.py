"""Tiny models and one finished run of them, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest


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
