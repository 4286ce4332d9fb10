"""The matrix of versions: its lower bounds, and that docs/versions.md says what is declared."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from tests.versions import ROOT, ROWS, SELECTION, lower_bounds, main, user_requirements

PAGE = (ROOT / "docs" / "versions.md").read_text()


@pytest.fixture
def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_a_requirement_is_pinned_to_its_lower_bound() -> None:
    wanted = ["ray[default,data]>=2.60,<2.61", "deltalake<2,>=1.6.6", "PyYAML>=6.0.2"]
    assert lower_bounds(wanted) == ["ray==2.60", "deltalake==1.6.6", "pyyaml==6.0.2"]


@pytest.mark.parametrize("text", ["torch", "torch==2.15.0", "torch<3"])
def test_a_requirement_without_a_lower_bound_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        lower_bounds([text])


def test_every_dependency_of_ours_has_one(project: dict[str, Any]) -> None:
    requirements = user_requirements(project)
    assert len(lower_bounds(requirements)) == len(requirements) > len(project["dependencies"])


def test_what_a_row_runs_is_there() -> None:
    for part in SELECTION:
        path, _, name = part.partition("::")
        assert (ROOT / path).exists(), part
        assert not name or f"def {name}(" in (ROOT / path).read_text(), part


def test_an_unknown_row_is_refused_by_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lowest-2.7"]) == 2
    assert capsys.readouterr().err.startswith("no row lowest-2.7, wanted of: lowest-3.11 newest-3.11")


def test_the_page_says_the_declared_ranges(project: dict[str, Any]) -> None:
    """Its first table has a line `| name | range | … |` for each library that is named there."""
    declared = {}
    for text in project["dependencies"]:
        name, bounds = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?(.+)", text).groups()  # type: ignore[union-attr]
        declared[name] = bounds
    said = dict(re.findall(r"^\| ([\w-]+) \| `([<>=][^`]*)` \|", PAGE, re.MULTILINE))
    assert said.pop("python") == project["requires-python"]
    assert len(said) >= 8
    assert said == {name: declared[name] for name in said}


def test_the_page_has_every_row(project: dict[str, Any]) -> None:
    for row in ROWS:
        assert re.search(rf"^\| {row.versions} \| {re.escape(row.python)}\.\d+ \|", PAGE, re.MULTILINE), row
