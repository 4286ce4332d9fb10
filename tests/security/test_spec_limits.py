"""A spec may be a stranger's: its size is bounded before anything is made of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from schemas.errors import UsageError
from schemas.spec_file import (
    MAX_SPEC_DEPTH,
    MAX_SPEC_TEXT,
    MAX_SPEC_VALUES,
    MAX_SPEC_VARIABLE_BYTES,
    read_spec_file,
)
from schemas.spec_loader import load_spec
from schemas.specs import InferSpec


def laughs(rounds: int) -> str:
    """A billion laughs: each line is ten times the one before."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, rounds)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#" * (2**20 + 1), "is larger than 1 MiB"),
        (laughs(9), "aliases (*name) are not taken"),
        ("a: " + "[" * 100_000, "it is nested too deeply"),
        ("a: " + "{b: " * MAX_SPEC_DEPTH, "it is nested too deeply"),
        ("a:\n" + "- x\n" * 200_000, f"it has more than {MAX_SPEC_VALUES} values"),
        ("\n".join(f"k{n}: 1" for n in range(60_000)), f"it has more than {MAX_SPEC_VALUES} values"),
        (
            "include: '" + "*a" * 100_000 + "'",
            f"a value has 200000 characters, at most {MAX_SPEC_TEXT} are taken",
        ),
        ("n: " + ":".join(["59"] * 300_000), "a value has 899999 characters"),  # YAML's base 60
        ("? " + "k" * 20_000 + "\n: 1", "a value has 20000 characters"),
    ],
)
def test_what_is_larger_than_any_spec_is_refused_at_once(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(UsageError) as caught:
        read_spec_file(str(tmp_path / "job.yaml"))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.process_time() - started < 10


def test_a_spec_at_the_limits_is_read(tmp_path: Path) -> None:
    deep = "{b: " * (MAX_SPEC_DEPTH - 2) + "1" + "}" * (MAX_SPEC_DEPTH - 2)
    (tmp_path / "job.yaml").write_text(f"a: {deep}\nc: {'x' * MAX_SPEC_TEXT}\n")
    assert len(read_spec_file(str(tmp_path / "job.yaml"))["c"]) == MAX_SPEC_TEXT


class TestVariables:
    def test_a_spec_is_read_from_the_variable_that_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(
            "MASKLAKE_SPEC", "source: {uri: s3://b/i}\nmodel: {uri: demo}\nlake: {uri: s3://b/l}\n"
        )
        spec = load_spec(InferSpec, "env:MASKLAKE_SPEC", ["pool.batch_size=3"])
        assert (spec.lake.uri, spec.pool.batch_size) == ("s3://b/l", 3)

    def test_an_empty_variable_is_an_empty_spec(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MASKLAKE_SPEC", "")
        assert read_spec_file("env:MASKLAKE_SPEC") == {}

    def test_what_is_wrong_is_said_with_the_variable_s_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MASKLAKE_SPEC", "pool: {size: 1}")
        with pytest.raises(UsageError, match=r"^env:MASKLAKE_SPEC: .*pool\.size is not a known key"):
            load_spec(InferSpec, "env:MASKLAKE_SPEC")
        monkeypatch.setenv("MASKLAKE_SPEC", "pool: {")
        with pytest.raises(UsageError, match=r"^env:MASKLAKE_SPEC, line 1, column 8"):
            load_spec(InferSpec, "env:MASKLAKE_SPEC")

    def test_a_variable_that_is_not_set_or_too_large_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UsageError, match="the environment has no MASKLAKE_SPEC; set it"):
            read_spec_file("env:MASKLAKE_SPEC")
        monkeypatch.setenv("MASKLAKE_SPEC", "#" * (MAX_SPEC_VARIABLE_BYTES + 1))
        with pytest.raises(UsageError, match=f"holds {MAX_SPEC_VARIABLE_BYTES + 1} bytes, at most"):
            read_spec_file("env:MASKLAKE_SPEC")

    @pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HOME", "", "MASKLAKE_SPEC "])
    def test_no_other_variable_is_read_as_a_spec(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2: %hunter2")
        with pytest.raises(UsageError, match="names no variable of a spec") as caught:
            read_spec_file(f"env:{name}")
        assert "hunter2" not in str(caught.value)
