"""fedloom: federated LoRA fine-tuning in which every client brings what it can, and nobody waits for the slowest.

The public names are those of `__init__.pyi`, and all aggregators and schedules. They are imported when first used, so that the
command line starts quickly.
"""

from importlib.metadata import version
from typing import Any

from fedloom.runs.public_names import all_names, public_name

__version__ = version("fedloom")


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives; `__all__` is computed when it is first asked for."""
    return all_names() if name == "__all__" else public_name(name)


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return [*all_names(), *(name for name in globals() if name.startswith("__"))]
