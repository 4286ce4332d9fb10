"""`masklake model …` as a user types it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.cli import main


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.status == 0, self.err
        return json.loads(self.out.splitlines()[-1])


Masklake = Callable[..., Result]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def masklake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Masklake:
    """The console script, in this process, with a wide terminal."""
    monkeypatch.setenv("COLUMNS", "250")

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["masklake", "model", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        code = left.value.code
        return Result(code if isinstance(code, int) else 0, out, err)

    return run


def assert_refused(result: Result, *words: str, status: int = 2) -> None:
    assert result.status == status, result.err
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("masklake: ")
    for word in words:
        assert word in lines[0]
