"""The tests are tested: each plausible bug, put into a copy of the package, must make a law fail.

`make test` tries every eighth, `make mutants` all.
"""

from __future__ import annotations

import compileall
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedloom
from tests.support.mutants import MUTANTS, Mutant
from tests.support.warm_pytest import WarmPytest

PACKAGE = Path(fedloom.__file__).parent
TRIED = [pytest.param(one, marks=[pytest.mark.mutants] * (k % 40 > 0), id=one.bug) for k, one in enumerate(MUTANTS)]


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmPytest]:
    with WarmPytest() as process:
        yield process


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled copy of the package, whose copies compile only what was changed in them."""
    folder = tmp_path_factory.mktemp("pristine") / "fedloom"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert compileall.compile_dir(folder, quiet=1)
    return folder


def test_each_mutant_changes_one_place() -> None:
    package = "\f".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    assert {one.bug: count for one in MUTANTS if (count := package.count(one.old)) != 1} == {}


@pytest.mark.slow
@pytest.mark.mutants
def test_the_copy_as_it_is_passes(warm: WarmPytest, pristine: Path) -> None:
    ran = warm.run(pristine.parent, sorted({mutant.test for mutant in MUTANTS}))
    assert ran.code == 0, ran.output


@pytest.mark.slow
@pytest.mark.parametrize("mutant", TRIED)
def test_a_mutant_does_not_survive(mutant: Mutant, warm: WarmPytest, pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path / "fedloom")
    mutant.apply(tmp_path / "fedloom")
    ran = warm.run(tmp_path, [mutant.test])
    assert ran.code == 1, ran.output
    assert "FAILED" in ran.output
    assert "ERROR" not in ran.output
