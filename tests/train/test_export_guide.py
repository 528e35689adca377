"""The code and the commands of docs/export.md, carried out as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedloom import IID, Instructions, Limits, prepare
from fedloom.cli.main import app
from fedloom.train.export import open_run, save_adapter, truncate_adapter
from tests.support.roundtrip import BAR
from tests.support.tiny_models import tiny_encoder, tiny_generator, toy_answers
from tests.support.tiny_runs import tiny_run

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
CONVERTER = "LLAMA_CPP"
"""Environment variable with the folder of llama.cpp's source."""


def blocks(section: str, language: str) -> list[str]:
    """The blocks of code under a heading of the page."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the base models and the runs that the page speaks of; the tests are in it."""
    folder, before = tmp_path_factory.mktemp("guide"), Path.cwd()
    os.chdir(folder)
    prepare(tiny_run(tiny_encoder(Path("model")), limits=Limits(versions=2))).execute(Path("runs/mine"), report=False)
    data = Instructions(toy_answers(80))
    writes = tiny_run(tiny_generator(Path("writer")), data=data, partition=IID(2), limits=Limits(versions=2))
    prepare(writes).execute(Path("runs/writer"), report=False)
    yield folder
    os.chdir(before)


def run(code: str) -> dict[str, Any]:
    """The names that a block of Python leaves."""
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_page_has_code_for_each_program() -> None:
    found = {section: len(blocks(section, "(?:python|sh)")) for section in re.findall(r"^## (.*)", PAGE, re.MULTILINE)}
    assert found == {"PEFT and transformers": 3, "ONNX": 2, "llama.cpp": 1, "vLLM": 1}


@pytest.mark.slow
def test_peft_and_transformers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier, writer, moved = blocks("PEFT and transformers", "python")
    run(classifier)
    assert re.search(r"'label': '(pet|colour)'", capsys.readouterr().out)
    run(writer)
    assert "my cat is here" in capsys.readouterr().out
    base, adapter, _ = open_run(place / "runs" / "mine")
    inputs = base.tokenizer(["my cat is here"], return_tensors="pt")
    base.put(adapter)
    with torch.no_grad():
        given = run(moved)["model"].eval()(**inputs).logits
        assert torch.allclose(given, base.model.eval()(**inputs).logits, atol=BAR)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_onnx_computes_the_same(place: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    (command,), (code,) = blocks("ONNX", "sh"), blocks("ONNX", "python")
    assert CliRunner().invoke(app, shlex.split(command)[1:]).exit_code == 0
    names = run(code)
    base, adapter, _ = open_run(place / "runs" / "mine")
    base.put(adapter)
    for texts in (["the dog was near my cat now", "red", "a bird is here"], ["white"]):
        given = names["session"].run(["logits"], dict(names["tokenizer"](texts, padding=True, return_tensors="np")))[0]
        with torch.no_grad():
            wanted = base.model.eval()(**base.tokenizer(texts, padding=True, return_tensors="pt")).logits
        assert np.abs(given - wanted.numpy()).max() <= BAR


@pytest.mark.slow
@pytest.mark.skipif(CONVERTER not in os.environ, reason=f"{CONVERTER} names no folder with llama.cpp's source")
def test_llama_cpp_reads_the_adapter(place: Path) -> None:
    """At two ranks: scaling * B A of each layer as in the adapter. A classifier ends with the reason that the page gives."""
    from gguf import GGUFReader

    command = shlex.split(blocks("llama.cpp", "sh")[0].splitlines()[-1])
    script = Path(os.environ[CONVERTER]) / Path(command[1]).name
    base, adapter, names = open_run(place / "runs" / "writer")
    for rank in (4, 2):
        cut = truncate_adapter(adapter, rank)
        folder = save_adapter(base, cut, names, place / f"rank-{rank}")
        words = [str(folder) if word == "runs/writer/adapter" else word for word in command[2:]]
        words = ["writer" if word == "BASE" else word for word in words]
        subprocess.run([sys.executable, str(script), *words], check=True)
        read = GGUFReader("adapter.gguf")
        tensors = {one.name: torch.tensor(np.array(one.data)) for one in read.tensors}
        scaling = read.fields["adapter.lora.alpha"].contents() / rank
        name, factor = next((name, one) for name, one in cut.factors.items() if name.endswith("0.self_attn.v_proj"))
        product = scaling * tensors["blk.0.attn_v.weight.lora_b"] @ tensors["blk.0.attn_v.weight.lora_a"]
        assert torch.allclose(product, factor.up @ factor.down, atol=1e-3), name
    words = [{"BASE": "model", "runs/writer/adapter": "runs/mine/adapter"}.get(word, word) for word in command[2:]]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
    assert "Not a lora_A or lora_B tensor" in done.stderr
