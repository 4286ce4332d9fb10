"""The images' recipes, cluster/images/: read, for they cannot be built where the tests run."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "cluster/images"
Instruction = tuple[str, str]


def instructions(kind: str) -> list[Instruction]:
    """Name and rest of each, lines joined, comments gone."""
    text = (IMAGES / f"Dockerfile.{kind}").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [
        (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()
    ]


def all_of(kind: str, name: str) -> list[str]:
    return [rest for found, rest in instructions(kind) if found == name]


pytestmark = pytest.mark.parametrize("kind", ["cpu", "gpu"])


def test_the_base_is_pinned_and_has_the_python_of_the_constraints(kind: str) -> None:
    (argument,) = all_of(kind, "ARG")
    assert all_of(kind, "FROM") == ["${BASE}"]
    pinned = re.fullmatch(r"BASE=python:(\d+\.\d+)\.\d+-slim-[a-z]+", argument)
    assert pinned is not None
    assert f"Python {pinned[1]}" in (ROOT / "constraints.txt").read_text().splitlines()[0]


def test_the_container_is_not_roots(kind: str) -> None:
    *_, last = instructions(kind)
    assert last == ("USER", "1000:0")
    (environment,) = all_of(kind, "ENV")
    # Ray's launcher reads it from there, and would mount the token into /root otherwise.
    assert "HOME=/home/masklake" in shlex.split(environment)


def test_nothing_is_fetched_or_kept_that_should_not_be(kind: str) -> None:
    assert all_of(kind, "ADD") == []
    for command in all_of(kind, "RUN"):
        assert not re.search(r"curl|wget http|https?://", command)
        if "apt-get" in command:
            assert "--no-install-recommends" in command
            assert command.endswith("rm -rf /var/lib/apt/lists/*")
        for install in re.findall(r"pip install[^&]*", command):
            assert "--no-cache-dir" in install
            assert "-c /build/constraints.txt" in install


def test_there_are_no_credentials_in_it(kind: str) -> None:
    secret = re.compile(r"(?i)password|passwd|secret|token|credential|api_?key|access_?key|://[^/ ]*@")
    for name in ("ARG", "ENV", "COPY", "LABEL"):
        assert not [rest for rest in all_of(kind, name) if secret.search(rest)]
    (pip,) = (rest for rest in all_of(kind, "RUN") if "pip install" in rest)
    assert pip.startswith("--mount=type=secret,id=pip.conf,target=/etc/pip.conf ")


def test_what_it_copies_exists_and_is_let_in(kind: str) -> None:
    rules = (IMAGES / f"Dockerfile.{kind}.dockerignore").read_text().splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = {source for rest in all_of(kind, "COPY") for source in rest.split()[:-1]}
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)


def test_it_copies_every_package_and_all_that_the_build_reads(kind: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = {source for rest in all_of(kind, "COPY") for source in rest.split()[:-1]}
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    assert packages <= copied
    assert {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"} <= copied
    (pip,) = (rest for rest in all_of(kind, "RUN") if "pip install" in rest)
    extras = re.search(r'"/build\[(\w+)\]"', pip)
    assert extras is not None
    assert extras[1] in project["project"]["optional-dependencies"]
