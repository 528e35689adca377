"""What a release promises can be read from its files: versions agree, packages have hashes, actions cannot be moved."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def pins(path: Path) -> dict[str, tuple[str, int]]:
    """The version and the number of hashes of each package in a file of pip's."""
    lines = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    found = [re.match(r"([\w.-]+)==([^ ;]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(found)
    return {one[1].lower().replace("_", "-"): (one[2], one.string.count("--hash=sha256:")) for one in found if one}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_package_of_the_image_has_a_hash_and_the_version_of_the_constraints(project: dict[str, Any]) -> None:
    locked = pins(ROOT / "examples/deploy/requirements.txt") | pins(ROOT / "examples/deploy/requirements-build.txt")
    assert [name for name, (_, hashes) in locked.items() if not hashes] == []
    known = pins(ROOT / "constraints.txt")
    assert {name: version for name, (version, _) in locked.items() if name in known} == {
        name: known[name][0] for name in locked if name in known
    }
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["deploy"], *extras["privacy"]]:
        wanted = Requirement(text)
        assert Version(locked[wanted.name.lower()][0]) in wanted.specifier, text


def test_torch_is_new_enough_to_load_weights_safely(project: dict[str, Any]) -> None:
    (torch,) = [Requirement(text) for text in project["dependencies"] if Requirement(text).name == "torch"]
    assert "2.5.1" not in torch.specifier  # CVE-2025-32434: weights_only loading ran code


def test_the_citation_names_this_version(project: dict[str, Any]) -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_pinned_and_may_do_little(path: Path) -> None:
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert flow["permissions"] == {"contents": "read"}
    steps = [step for job in flow["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", one) for one in used)
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in (step["run"] for step in steps if "run" in step):
        target = command.removeprefix("make ")
        assert (ROOT / command).is_file() or f"\n{target}:" in make, command


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_a_form_for_issues_can_be_read(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert "blank_issues_enabled" in form or all(entry["attributes"].get("label") for entry in form["body"][1:])
