"""Commits on top of what is in the table, jobs/lake/commit_on_top.py: others come first, replies are lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from jobs.lake import commit_on_top as module
from jobs.lake.commit_on_top import commit_on_top
from schemas.errors import CommitConflictError, CommitStateUnknownError, StorageError


@dataclass
class Log:
    """A table's log, and what of it was looked at. Each call fails as `may_fail` says."""

    commits: list[dict[str, Any]] = field(default_factory=list)
    may_fail: Callable[[str], bool] = lambda _: False
    version: int = 0
    uri: str = "s3://b/lake/labels"

    def refresh(self) -> None:
        if self.may_fail("look"):
            raise OSError("no answer")
        self.version = len(self.commits)

    reopen = refresh

    def ask(self, what: str, call: Callable[[Any], Any]) -> Any:
        if self.may_fail("search"):
            raise OSError("no answer")
        return call(self)

    def history(self, limit: int) -> list[dict[str, Any]]:
        newest = [{"version": number + 1, **commit} for number, commit in enumerate(self.commits)]
        return newest[::-1][:limit]

    def put(self, commit_id: str) -> None:
        """As the version after the one that was looked at."""
        if self.may_fail("send"):
            raise OSError("no answer")
        if self.version != len(self.commits):
            raise OSError("another came first")
        self.commits.append({"commit_id": commit_id, "on_top_of": self.version})
        if self.may_fail("reply"):
            raise OSError("no answer")


def settle(log: Log, choose: Callable[[], int | None]) -> tuple[int, int] | None:
    return commit_on_top(
        log,  # type: ignore[arg-type]  # as much of a table as it needs
        choose,
        lambda choice, commit_id: log.put(commit_id),
        what="a promotion",
        if_unknown="Look at `masklake history`.",
        sleep=lambda seconds: None,
    )


@pytest.mark.parametrize("seed", range(30))
def test_whatever_fails_it_is_there_once_and_the_right_thing_is_said(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_ATTEMPTS", 4)
    chance = random.Random(seed)
    for _ in range(20):
        play(chance, how_often=chance.choice([0.0, 0.2, 0.5, 0.8]))


def play(chance: random.Random, how_often: float) -> None:
    log = Log(may_fail=lambda what: chance.random() < how_often)

    def choose() -> int:
        seen = log.version
        if chance.random() < how_often:
            log.commits.append({"run_id": "another's"})
        return seen

    try:
        settled = settle(log, choose)
    except CommitStateUnknownError:
        assert how_often
        settled = None
    except StorageError:
        assert how_often
        assert not [commit for commit in log.commits if "commit_id" in commit]
        settled = None
    made = [(number, commit) for number, commit in enumerate(log.commits, 1) if "commit_id" in commit]
    assert len(made) <= 1
    if settled is not None:
        ((number, commit),) = made
        assert settled == (number, commit["on_top_of"]) == (number, number - 1)


@pytest.mark.parametrize("fails", ["look", "send"])
def test_a_store_that_refuses_leaves_the_table_as_it_was(fails: str) -> None:
    with pytest.raises(StorageError, match=r"after 20 attempts: no answer\. The table is as it was"):
        settle(Log(may_fail=lambda what: what == fails), lambda: 1)


def test_a_store_that_is_gone_after_a_commit_was_sent_is_told_apart() -> None:
    log = Log()
    log.may_fail = lambda what: bool(log.commits) and what in ("look", "reply")
    with pytest.raises(CommitStateUnknownError, match=r"could not be read since: no answer\. Look at"):
        settle(log, lambda: 1)


def test_nothing_to_commit_is_no_commit() -> None:
    log = Log()
    assert settle(log, lambda: None) is None
    assert log.commits == []


def test_a_decision_that_no_longer_holds_ends_it_at_once() -> None:
    tries: list[int] = []

    def choose() -> int:
        tries.append(1)
        raise CommitConflictError("ana made another current")

    with pytest.raises(CommitConflictError, match="ana made"):
        settle(Log(), choose)
    assert tries == [1]
