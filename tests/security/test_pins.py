"""What is installed is what was tested: every package that ours need has one version in constraints.txt."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# Both install the package itself anew, and nothing of theirs runs in a job.
NOT_PINNED = {"pip", "setuptools"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", line)
            assert match, f"constraints.txt: {line!r} is not one version of a package"
            found[canonicalize_name(match[1])] = match[2]
    return found


def needed(requirements: list[str]) -> set[str]:
    """All packages that these need here, with those that they need, and so on."""
    found: set[str] = set()
    left = [Requirement(text) for text in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        extras = frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found.add(name)
        try:
            inner = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:
            continue  # an extra that is not installed here; what it is called must still have a version
        for one in inner:
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                left.append(one)
    return found


@pytest.mark.parametrize("extra", [None, "dev", "gcs", "onnx"])
def test_everything_that_is_needed_has_one_version(extra: str | None) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    closure = needed(requirements)
    assert len(closure) >= len(requirements)
    assert closure - set(pins()) - NOT_PINNED == set()


def test_every_version_is_exact() -> None:
    assert not [version for version in pins().values() if "*" in version]
