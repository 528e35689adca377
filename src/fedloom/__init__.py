"""fedloom: federated LoRA fine-tuning in which every client brings what it can, and nobody waits for the slowest.

The public names are those of `__init__.pyi`. They are imported when first used, so that the command line starts quickly.
"""

from importlib.metadata import version
from typing import Any

from fedloom.runs.public_names import HOMES, public_name

__version__ = version("fedloom")
__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    return public_name(name)
