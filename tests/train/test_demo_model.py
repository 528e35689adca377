"""The demo's models are taken from packages, and only if their weights are the known ones."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom.core.errors import Refused
from fedloom.train import demo_model
from fedloom.train.demo_model import MINILM, SMOLLM2, ModelPackage

PACKAGES = pytest.mark.parametrize("package", [MINILM, SMOLLM2], ids=lambda package: package.name)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[ModelPackage, dict[str, bytes]], Path]:
    """Puts a distribution of a package's name, with these files, where Python looks for packages."""

    def install(package: ModelPackage, files: dict[str, bytes]) -> Path:
        about = tmp_path / f"{package.name.replace('-', '_')}-{package.version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n")
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        (about / "RECORD").write_text("".join(f"{name},,\n" for name in files))
        monkeypatch.setattr("sys.path", [str(tmp_path)])
        return tmp_path

    return install


def refused(package: ModelPackage) -> Refused:
    with pytest.raises(Refused) as caught:
        package.find_weights()
    assert caught.value.field == "model"
    return caught.value


@PACKAGES
def test_an_absent_package_is_refused_with_the_command_that_installs_it(
    package: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.files(package.name)
    assert package.install in refused(package).remedy


@PACKAGES
def test_other_weights_are_refused_with_both_hashes(
    package: ModelPackage, installed: Callable[[ModelPackage, dict[str, bytes]], Path]
) -> None:
    installed(package, {f"model/{package.weights}": b"not the weights"})
    remedy = refused(package).remedy
    assert hashlib.sha256(b"not the weights").hexdigest() in remedy
    assert package.sha256 in remedy


@PACKAGES
def test_a_package_without_weights_is_refused(
    package: ModelPackage, installed: Callable[[ModelPackage, dict[str, bytes]], Path]
) -> None:
    installed(package, {"model/__init__.py": b"raise SystemExit('never imported')"})
    assert f"no {package.weights}" in refused(package).remedy


def test_the_folder_of_the_known_weights_is_given_without_running_the_package(
    installed: Callable[[ModelPackage, dict[str, bytes]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"gt/__init__.py": b"raise SystemExit('never imported')", "gt/m/model.safetensors": b"weights"}
    place = installed(MINILM, files)
    known = replace(MINILM, sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(demo_model, "MINILM", known)
    assert demo_model.minilm() == place / "gt" / "m"


def test_a_language_model_without_the_reader_of_its_format_is_refused_and_nothing_is_written(
    installed: Callable[[ModelPackage, dict[str, bytes]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(SMOLLM2, {"llm/weights.gguf": b"weights"})
    monkeypatch.setattr(demo_model, "SMOLLM2", replace(SMOLLM2, sha256=hashlib.sha256(b"weights").hexdigest()))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(Refused, match="pip install gguf"):
        demo_model.smollm2(tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_folder_that_was_written_is_used_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f"smollm2-135m-instruct-{SMOLLM2.sha256[:8]}"
    folder.mkdir()
    monkeypatch.setattr("sys.path", [])
    assert demo_model.smollm2(tmp_path) == folder


@pytest.mark.slow
def test_the_written_folder_is_an_ordinary_model_that_answers() -> None:
    """The first call writes 540 MB into the cache of the user; where the package lacks, nothing can be tried."""
    try:
        folder = demo_model.smollm2()
    except Refused as error:
        pytest.skip(str(error))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")
    asked = [{"role": "user", "content": "What is the capital of France? One word."}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, ids["input_ids"].shape[1] :])
    assert [*folder.parent.glob(".draft-*")] == []
