"""The notebooks run from the first cell to the last, here with tiny models in the place of the pretrained ones."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest

import fedloom
from tests.support.tiny_models import tiny_generator

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = ("classify", "write", "compare")
SMALL = {
    "classify": "model, rounds, tickets = {encoder!r}, 2, 12",
    "write": "model, rounds, tasks, tested = {generator!r}, 2, 6, 6",
    "compare": "model, rounds, seeds = {encoder!r}, 1, range(2)",
}
"""What stands in the place of the cell with the parameters."""
SHOWN = {
    "classify": ("base_accuracy", "report.html", "adapter_model.safetensors"),
    "write": ("perplexity", "reference", "PeftModel"),
    "compare": ("instead_of", "ProductDelta", "Paired differences"),
}
"""What a reader finds in the outputs, or in the pages that were written."""


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> dict[str, str]:
    """What each notebook shows and writes as pages.

    All are run in one kernel, which is cleared between them: to import torch takes longer than they do.
    """
    from nbclient import NotebookClient

    books, here = {name: read(name) for name in NAMES}, tmp_path_factory.mktemp("notebooks")
    generator = tiny_generator(tmp_path_factory.mktemp("generator"), max_position_embeddings=512)
    for name, book in books.items():
        (parameters,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ()))
        parameters.source = "%reset -f\n" + SMALL[name].format(encoder=str(encoder), generator=str(generator))
    whole = read(NAMES[0])
    whole.cells = [cell for book in books.values() for cell in book.cells]
    path = os.pathsep.join([str(Path(fedloom.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython"))}
    NotebookClient(whole, timeout=600, resources={"metadata": {"path": str(here)}}).execute(env=os.environ | own)
    pages = {name: "".join(page.read_text() for page in here.rglob(f"{name}*/report.html")) for name in NAMES}
    cells = {name: [cell for cell in book.cells if cell.cell_type == "code"] for name, book in books.items()}
    return {name: pages[name] + "".join(str(cell.outputs) for cell in cells[name]) for name in NAMES}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_to_its_end(name: str, shown: dict[str, str]) -> None:
    assert [words for words in SHOWN[name] if words not in shown[name]] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_as_it_was_run(name: str) -> None:
    """From a fresh kernel, in order, without an error; and it names nothing of the machine that ran it."""
    book = read(name)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    text = (NOTEBOOKS / f"{name}.ipynb").read_text()
    assert len(text) < 200_000
    places = (str(NOTEBOOKS.parent), str(Path.home()), tempfile.gettempdir(), "/home/", "/Users/")
    assert not any(place in text for place in places)


def test_there_are_no_others() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {*NAMES}
