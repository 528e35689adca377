"""The demo's model is taken from a package, and only if its weights are the known ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from fedloom.core.errors import Refused
from fedloom.train import demo_model


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, bytes]], Path]:
    """Puts a distribution of the package's name, with these files, where Python looks for packages."""

    def install(files: dict[str, bytes]) -> Path:
        about = tmp_path / f"{demo_model.PACKAGE.replace('-', '_')}-{demo_model.VERSION}.dist-info"
        about.mkdir()
        name, version = demo_model.PACKAGE, demo_model.VERSION
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        (about / "RECORD").write_text("".join(f"{name},,\n" for name in files))
        monkeypatch.setattr("sys.path", [str(tmp_path)])
        return tmp_path

    return install


def refused() -> Refused:
    with pytest.raises(Refused) as caught:
        demo_model.minilm()
    assert caught.value.field == "model"
    return caught.value


def test_an_absent_package_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.files(demo_model.PACKAGE)
    assert demo_model.INSTALL in refused().remedy


def test_other_weights_are_refused_with_both_hashes(installed: Callable[[dict[str, bytes]], Path]) -> None:
    installed({"gt/model/model.safetensors": b"not the weights"})
    remedy = refused().remedy
    assert hashlib.sha256(b"not the weights").hexdigest() in remedy
    assert demo_model.SHA256 in remedy


def test_a_package_without_weights_is_refused(installed: Callable[[dict[str, bytes]], Path]) -> None:
    installed({"gt/__init__.py": b"raise SystemExit('never imported')"})
    assert "no model.safetensors" in refused().remedy


def test_the_folder_of_the_known_weights_is_given_without_running_the_package(
    installed: Callable[[dict[str, bytes]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = installed({"gt/__init__.py": b"raise SystemExit('never imported')", "gt/m/model.safetensors": b"weights"})
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(b"weights").hexdigest())
    assert demo_model.minilm() == place / "gt" / "m"
