"""A table on a terminal, jobs/terminal_table.py."""

from __future__ import annotations

import pytest

from jobs.terminal_table import print_table


@pytest.fixture(autouse=True)
def _forty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_numbers_end_below_each_other_and_text_begins_there(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("person", "1,200", "7"), ("cat", "3", "12")]
    print_table(("category", "old", "new"), rows, numbers=True)
    assert lines(capsys) == ["category    old  new", "person    1,200    7", "cat           3   12"]
    print_table(("category", "old", "new"), rows)
    assert lines(capsys) == ["category  old    new", "person    1,200  7", "cat       3      12"]


def test_facts_have_no_head(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(None, [("name", "small-1"), ("", "second line")])
    assert lines(capsys) == ["name  small-1", "      second line"]


def test_a_table_without_rows_is_its_head(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("alias", "model"), [])
    assert lines(capsys) == ["alias  model"]
    print_table(None, [])
    assert lines(capsys) in ([], [""])


def test_nothing_is_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("mask",), [("y" * 99,)])
    assert "".join(lines(capsys)).count("y") == 99


def test_what_would_command_a_terminal_is_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("[red]x", "name\x07"), [("\x1b[2J[bold]", "a\nb")])
    assert lines(capsys) == ["[red]x      name\ufffd", "\ufffd[2J[bold]  a\ufffdb"]
