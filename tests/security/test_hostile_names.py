"""Names from a lake or a source are text to a terminal, never orders to it.

What a report's Markdown makes of them: tests/train/test_report.py, tests/relabel/test_diff_report.py; tables
on a terminal: tests/relabel/test_query.py; errors: tests/schemas/test_errors.py.
"""

from __future__ import annotations

import json

import pytest

from jobs.infer.progress import JsonWatcher as InferJsonWatcher
from jobs.infer.progress import TerminalWatcher as InferWatcher
from jobs.train.watcher import LinesWatcher as TrainJsonWatcher
from jobs.train.watcher import TerminalWatcher as TrainWatcher

HOSTILE = "a\x1b[2Jb\x9b31mc [red]d[/red] \x07e\x1b]0;title\x07"


@pytest.mark.parametrize("watcher", [InferWatcher, TrainWatcher])
def test_a_note_is_text(
    watcher: type[InferWatcher | TrainWatcher], capsys: pytest.CaptureFixture[str]
) -> None:
    watcher().note(HOSTILE)
    shown = capsys.readouterr().err
    assert "[red]d[/red]" in shown
    assert all(character.isprintable() for character in shown.rstrip("\n"))


@pytest.mark.parametrize("watcher", [InferJsonWatcher, TrainJsonWatcher])
def test_a_note_in_json_is_printable_and_reads_back(
    watcher: type[InferJsonWatcher | TrainJsonWatcher], capsys: pytest.CaptureFixture[str]
) -> None:
    watcher().note(HOSTILE)
    shown = capsys.readouterr().err
    assert all(character.isprintable() for character in shown.rstrip("\n"))
    assert json.loads(shown)["note"] == HOSTILE
