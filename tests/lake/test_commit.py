"""Commits, jobs/lake/commit.py: in memory under faults by the hundred, and on a real Delta log."""

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction

from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.fragments import Fragment, write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from schemas.errors import CommitConflictError, CommitStateUnknownError, MasklakeError, StorageError
from tests.lake.memory_log import MODEL, Log, MemoryStore, StoppedError, StoreFaultError, Version, fragment

APP = app_id("s3://photos", MODEL)


def committer(
    store: MemoryStore | DeltaStore,
    *,
    clock: Callable[[], float] = lambda: 0.0,
    kind: type[Committer] = Committer,
) -> Committer:
    return kind(store, APP, {"run_id": "run-1"}, 60, 100, clock, sleep=lambda seconds: None)


# One committer


def test_a_batch_becomes_visible_as_one_version() -> None:
    log = Log()
    ours = committer(MemoryStore(log))
    ours.add(fragment("u1"))
    ours.add(fragment("u2", "u3", num_failed=4))
    assert (ours.num_pending, log.versions) == (30, [])
    assert ours.commit() == 0
    assert [f.path for f in log.versions[0].fragments] == ["u1.parquet", "u2.parquet"]
    assert (ours.num_pending, ours.committed_version) == (0, 0)
    assert (ours.num_committed_ok, ours.num_committed_failed) == (26, 4)


def test_nothing_to_commit_commits_nothing() -> None:
    log = Log()
    assert committer(MemoryStore(log)).commit() is None
    assert log.versions == []


def test_the_app_transaction_counts_on_from_the_last_run() -> None:
    log = Log()
    for unit in ("u1", "u2", "u3"):
        ours = committer(MemoryStore(log))
        ours.add(fragment(unit))
        ours.commit()
    assert [version.transaction for version in log.versions] == [1, 2, 3]


def test_a_unit_is_committed_once_whichever_attempt_made_it() -> None:
    log = Log()
    ours = committer(MemoryStore(log))
    assert ours.add(fragment("u1", path="first"))
    assert not ours.add(fragment("u1", path="second"))
    ours.commit()
    assert not ours.add(fragment("u1", path="third"))
    assert ours.commit() is None
    assert [f.path for f in log.versions[0].fragments] == ["first"]


def test_a_fragment_with_old_and_new_units_is_refused() -> None:
    ours = committer(MemoryStore(Log()))
    ours.add(fragment("u1"))
    with pytest.raises(MasklakeError, match="holds unit u1 a second time"):
        ours.add(fragment("u2", "u1"))
    assert ours.num_pending == 10


def test_a_commit_is_due_after_a_time_or_a_number_of_images() -> None:
    now = 1000.0
    ours = committer(MemoryStore(Log()), clock=lambda: now)
    now = 2000.0
    assert not ours.due()  # nothing waits
    ours.add(fragment("u0"))
    assert ours.due()
    ours.commit()
    ours.add(fragment("u1"))
    assert not ours.due()
    now = 2059.0
    assert not ours.due()
    now = 2060.0
    assert ours.due()
    ours.commit()
    ours.add(fragment(*(f"v{i}" for i in range(9))))
    assert not ours.due()
    ours.add(fragment("v9"))
    assert ours.due()


def test_a_second_driver_is_told_and_stays_out() -> None:
    log = Log()
    first, second = committer(MemoryStore(log)), committer(MemoryStore(log))
    first.add(fragment("u1", path="first"))
    second.add(fragment("u1", path="second"))
    first.commit()
    for _ in range(2):
        with pytest.raises(CommitConflictError, match="commit is number 1, this run's last was 0"):
            second.commit()
    assert [f.path for v in log.versions for f in v.fragments] == ["first"]


def test_other_app_transactions_are_no_conflict() -> None:
    log = Log()
    ours = committer(MemoryStore(log))
    ours.add(fragment("u1"))
    log.versions.append(Version("infer:another", 7, "c", ()))
    assert ours.commit() == 1


class StoreThat(MemoryStore):
    """Fails as told: "refresh" and "append" before they do anything, "reply" after the put."""

    def __init__(self, log: Log, *failing: str) -> None:
        super().__init__(log)
        self.failing = set(failing)

    def refresh(self) -> None:
        if "refresh" in self.failing:
            raise StoreFaultError("<xml>cannot read</xml>")
        super().refresh()

    def append(
        self,
        fragments: Sequence[Fragment],
        app_id: str,
        transaction: int,
        metadata: Mapping[str, str | int],
    ) -> None:
        if "append" in self.failing:
            raise StoreFaultError("the disk is full\n at byte 7")
        super().append(fragments, app_id, transaction, metadata)
        if "reply" in self.failing:
            raise StoreFaultError("reset by peer")


def test_a_lost_reply_is_recognised_and_not_sent_again() -> None:
    log = Log()
    ours = committer(StoreThat(log, "reply"))
    ours.add(fragment("u1"))
    assert ours.commit() == 0
    assert log.units() == ["u1"]


def test_a_store_that_refuses_is_a_storage_error_and_the_batch_waits() -> None:
    log = Log()
    store = StoreThat(log, "append")
    ours = committer(store)
    ours.add(fragment("u1"))
    with pytest.raises(
        StorageError, match="10 images is not in the label table after 6 attempts: the disk is full"
    ):
        ours.commit()
    assert ours.num_pending == 10
    store.failing.clear()
    ours.add(fragment("u2"))
    assert ours.commit() == 1  # the batch that was tried goes by itself, as it was
    assert [len(version.fragments) for version in log.versions] == [1, 1]
    assert sorted(log.units()) == ["u1", "u2"]


def test_a_table_that_cannot_be_read_after_the_commit_was_sent_is_unknown_not_failed() -> None:
    log = Log()

    class DiesAfterSending(StoreThat):
        def append(
            self,
            fragments: Sequence[Fragment],
            app_id: str,
            transaction: int,
            metadata: Mapping[str, str | int],
        ) -> None:
            self.failing.add("refresh")
            super().append(fragments, app_id, transaction, metadata)

    store = DiesAfterSending(log, "reply")
    ours = committer(store)
    ours.add(fragment("u1"))
    for _ in range(2):  # still unknown the second time
        with pytest.raises(CommitStateUnknownError, match="could not be read since"):
            ours.commit()
    store.failing.clear()
    assert ours.commit() == 0
    assert log.units() == ["u1"]


def test_a_table_that_cannot_be_read_before_anything_was_sent_is_a_storage_error() -> None:
    ours = committer(StoreThat(Log(), "refresh"))
    ours.add(fragment("u1"))
    with pytest.raises(StorageError):
        ours.commit()


def test_a_store_that_stays_away_is_not_asked_for_ever() -> None:
    now_s = 0.0

    class Away(MemoryStore):
        def refresh(self) -> None:
            nonlocal now_s
            now_s += 90.0  # as long as its client goes on by itself
            raise StoreFaultError("busy")

    ours = committer(Away(Log()), clock=lambda: now_s)
    ours.add(fragment("u1"))
    with pytest.raises(StorageError, match="busy"):
        ours.commit()
    assert now_s == 180.0
    assert ours.num_pending == 10


# Hundreds of schedules


class Driver:
    """A run: plans what the table does not have, makes fragments, commits; starts again when it must."""

    def __init__(
        self, name: str, log: Log, units: list[str], rng: random.Random, kind: type[Committer]
    ) -> None:
        self.name = name
        self.acknowledged: set[str] = set()
        self._log = log
        self._units = units
        self._rng = rng
        self._kind = kind
        self.others: list[Driver] = []
        self.faults = 0.15
        self._busy = False
        self._restart()

    def _restart(self) -> None:
        store = MemoryStore(self._log, self._rng, self.faults, self._let_others_act)
        self._committer = committer(store, kind=self._kind)
        done = set(self._log.units())  # the plan is of the version that the store shows
        self._todo = [unit for unit in self._units if unit not in done]
        self._rng.shuffle(self._todo)
        self._attempt = f"{self.name}-{self._rng.random()}"
        self._added: set[str] = set()

    def _let_others_act(self) -> None:
        if self.others and self._rng.random() < 0.2:
            self._rng.choice(self.others).act()

    def act(self) -> None:
        """One step, unless this driver is in the middle of one."""
        if self._busy:
            return
        self._busy = True
        try:
            action = self._rng.random()
            if action < 0.05:
                self._restart()  # killed
            elif action < 0.6 and self._todo:
                self._add([self._todo.pop() for _ in range(min(self._rng.randint(1, 3), len(self._todo)))])
            elif action < 0.7 and self._added:
                self._committer.add(
                    fragment(self._rng.choice(sorted(self._added)), path=f"again-{self._attempt}")
                )
            else:
                self.commit()
        finally:
            self._busy = False

    def _add(self, units: list[str]) -> None:
        self._committer.add(fragment(*units, path=f"{units[0]}-{self._attempt}"))
        self._added.update(units)

    def commit(self) -> None:
        try:
            self._committer.commit()
            self.acknowledged |= self._added
        except CommitConflictError:
            self._restart()
        except (MasklakeError, StoppedError):  # killed, or stopped and asked to commit once more
            if self._rng.random() < 0.5:
                self._restart()

    def finish(self) -> None:
        """Nothing fails any more: run the same command again until there is nothing to do."""
        self.faults = 0.0
        self.others = []
        self._restart()
        while self._todo:
            self._add([self._todo.pop()])
            self.commit()
        self.commit()


def run_schedule(seed: int, kind: type[Committer] = Committer) -> None:
    rng = random.Random(seed)
    log = Log()
    units = [f"u{i}" for i in range(rng.randint(0, 12))]
    drivers = [Driver(f"driver{i}", log, units, rng, kind) for i in range(rng.randint(1, 3))]
    for driver in drivers:
        driver.others = [other for other in drivers if other is not driver]
    for _ in range(60):
        rng.choice(drivers).act()
        acknowledged = {unit for driver in drivers for unit in driver.acknowledged}
        assert acknowledged <= set(log.units()), f"seed {seed}: acknowledged, not in the table"
    drivers[0].finish()
    assert sorted(log.units()) == sorted(units), f"seed {seed}: each unit once, none lost"
    numbers = [version.transaction for version in log.versions]
    assert numbers == list(range(1, len(numbers) + 1)), (
        f"seed {seed}: the app transaction skipped or repeated"
    )


@pytest.mark.parametrize("block", range(10))
def test_whatever_fails_each_unit_is_in_the_table_once(block: int) -> None:
    for seed in range(100 * block, 100 * (block + 1)):
        run_schedule(seed)


class TrustsNumbers(Committer):
    """Takes the number it wanted to give for a sign that it gave it."""

    def _look_for(self, batch):  # type: ignore[no-untyped-def]
        self._store.refresh()
        number = self._store.last_transaction(self._app_id)
        return 0 if number == self._transaction + 1 else super()._look_for(batch)


class NoFence(Committer):
    """Goes on from whatever number the table shows."""

    def _look_for(self, batch):  # type: ignore[no-untyped-def]
        self._store.refresh()
        self._transaction = self._store.last_transaction(self._app_id) or 0
        return super()._look_for(batch)


@pytest.mark.parametrize("kind", [TrustsNumbers, NoFence])
def test_the_schedules_catch_a_committer_that_trusts_numbers_or_has_no_fence(kind: type[Committer]) -> None:
    failures = 0
    for seed in range(100):
        try:
            run_schedule(seed, kind)
        except AssertionError:
            failures += 1
    assert failures > 10


# A real Delta log


@pytest.fixture
def table(lake: str, storage: Storage) -> LabelsTable:
    return LabelsTable.open_or_create(lake, storage)


@pytest.fixture
def labelled(lake: str, storage: Storage, make_rows: Callable[..., pa.Table]) -> Callable[[str], Fragment]:
    """A fragment on disk with one image, which is its unit as well."""
    return lambda image_id: write_fragment(make_rows([image_id], MODEL), [image_id], lake, MODEL, storage)


def images(table: LabelsTable) -> list[str]:
    table.reopen()
    return sorted(str(image_id) for image_id in table.dataset().to_table()["image_id"].to_pylist())


def test_a_commit_says_who_made_it_and_what_is_in_it(
    table: LabelsTable, labelled: Callable[[str], Fragment]
) -> None:
    ours = Committer(
        DeltaStore(table), APP, {"run_id": "run-1", "model_id": MODEL, "spec_hash": "abc"}, 60, 100
    )
    ours.add(labelled("a"))
    ours.add(labelled("b"))
    assert ours.commit() == 1
    (entry,) = table.delta.history(1)
    said = {
        name: entry[name]
        for name in ("run_id", "model_id", "spec_hash", "num_images", "num_ok", "num_failed")
    }
    assert said == {
        "run_id": "run-1",
        "model_id": MODEL,
        "spec_hash": "abc",
        "num_images": 2,
        "num_ok": 2,
        "num_failed": 0,
    }
    assert table.delta.transaction_version(APP) == 1
    assert images(table) == ["a", "b"]


def test_many_commits_in_a_row_outlive_a_checkpoint(
    table: LabelsTable, lake: str, storage: Storage, labelled: Callable[[str], Fragment]
) -> None:
    ours = committer(DeltaStore(table))
    for i in range(6):
        ours.add(labelled(f"{i}"))
        assert ours.commit() == i + 1
        if i == 3:
            table.delta.create_checkpoint()
    assert images(table) == [f"{i}" for i in range(6)]
    again = committer(DeltaStore(LabelsTable.open(lake, storage)))
    again.add(labelled("6"))
    assert again.commit() == 7


def test_delta_takes_an_old_number_again_so_we_look_ourselves(
    table: LabelsTable, lake: str, storage: Storage, labelled: Callable[[str], Fragment]
) -> None:
    """If this fails, delta-rs has learnt to check; ours may then go."""
    store = DeltaStore(table)
    for number in (5, 5, 2):
        store.append([labelled(f"image-{number}")], APP, number, {"commit_id": "c"})
        store.refresh()
    assert (table.version, table.delta.transaction_version(APP)) == (3, 2)

    late = committer(DeltaStore(LabelsTable.open(lake, storage)))
    early = committer(store)
    early.add(labelled("early"))
    early.commit()
    late.add(labelled("late"))
    with pytest.raises(CommitConflictError):
        late.commit()


def test_a_driver_that_comes_in_between_looking_and_committing_is_a_conflict(
    table: LabelsTable, lake: str, storage: Storage, labelled: Callable[[str], Fragment]
) -> None:
    other = committer(DeltaStore(LabelsTable.open(lake, storage)))

    class Interrupted(DeltaStore):
        def append(
            self,
            fragments: Sequence[Fragment],
            app_id: str,
            transaction: int,
            metadata: Mapping[str, str | int],
        ) -> None:
            other.add(labelled("theirs"))
            other.commit()
            super().append(fragments, app_id, transaction, metadata)

    ours = committer(Interrupted(table))
    ours.add(labelled("ours"))
    with pytest.raises(CommitConflictError):
        ours.commit()
    assert images(table) == ["theirs"]


def test_another_models_commit_in_between_is_no_conflict(
    table: LabelsTable, lake: str, storage: Storage, labelled: Callable[[str], Fragment]
) -> None:
    class Interrupted(DeltaStore):
        def append(
            self,
            fragments: Sequence[Fragment],
            app_id: str,
            transaction: int,
            metadata: Mapping[str, str | int],
        ) -> None:
            other = DeltaTable(f"{lake.removeprefix('file://')}/labels")
            number = CommitProperties(app_transactions=[Transaction("infer:another", 1)])
            other.create_write_transaction(
                [], "append", other.schema(), partition_by=["model_id"], commit_properties=number
            )
            super().append(fragments, app_id, transaction, metadata)

    ours = committer(Interrupted(table))
    ours.add(labelled("ours"))
    assert ours.commit() == 2
    assert images(table) == ["ours"]


class LosesReplies(DeltaStore):
    """The first commit goes through and raises; afterwards all is well."""

    lost = False

    def append(
        self,
        fragments: Sequence[Fragment],
        app_id: str,
        transaction: int,
        metadata: Mapping[str, str | int],
    ) -> None:
        super().append(fragments, app_id, transaction, metadata)
        if not self.lost:
            self.lost = True
            raise OSError("the connection was reset")


def test_a_lost_reply_is_recognised_in_the_log(
    table: LabelsTable, labelled: Callable[[str], Fragment]
) -> None:
    ours = committer(LosesReplies(table))
    ours.add(labelled("a"))
    assert ours.commit() == 1
    ours.add(labelled("b"))
    assert ours.commit() == 2
    assert images(table) == ["a", "b"]


@pytest.mark.parametrize("lands_first", [False, True])
def test_a_commit_that_hangs_is_sent_again_and_only_one_of_the_two_stands(
    lands_first: bool,
    table: LabelsTable,
    labelled: Callable[[str], Fragment],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.lake.labels_table.LOG_LIMIT_S", 0.5)
    write = DeltaTable.create_write_transaction
    wakes, ended = threading.Event(), threading.Event()
    outcomes: list[str] = []

    def late(delta: DeltaTable, *args: Any, **kwargs: Any) -> None:
        wakes.wait(10)
        try:
            write(delta, *args, **kwargs)
            outcomes.append("committed")
        except Exception as error:
            outcomes.append(str(error))
        ended.set()

    def hanging_once(delta: DeltaTable, *args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(DeltaTable, "create_write_transaction", again)
        late(delta, *args, **kwargs)

    def again(delta: DeltaTable, *args: Any, **kwargs: Any) -> None:
        if lands_first:  # after our look and before this second try
            wakes.set()
            assert ended.wait(10)
        write(delta, *args, **kwargs)

    monkeypatch.setattr(DeltaTable, "create_write_transaction", hanging_once)
    ours = committer(DeltaStore(table))
    ours.add(labelled("a"))
    assert ours.commit() == 1
    wakes.set()
    assert ended.wait(10)
    assert (outcomes == ["committed"]) == lands_first
    ours.add(labelled("b"))
    assert ours.commit() == 2
    assert images(table) == ["a", "b"]


@pytest.mark.parametrize("step", ["refresh", "last_transaction", "find_commit", "append"])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_a_commit_that_was_interrupted_anywhere_can_be_asked_for_again(
    step: str, nth: int, after: bool, table: LabelsTable, labelled: Callable[[str], Fragment]
) -> None:
    store = DeltaStore(table)
    ours = committer(store)
    method = getattr(store, step)
    calls = 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and not after:
            raise KeyboardInterrupt
        result = method(*args)
        if calls == nth:
            raise KeyboardInterrupt
        return result

    setattr(store, step, interrupted)
    ours.add(labelled("a"))
    with suppress(KeyboardInterrupt):  # `append` is called once only
        ours.commit()
    setattr(store, step, method)
    ours.add(labelled("b"))
    ours.commit()
    assert images(table) == ["a", "b"]
    assert ours.num_committed_ok == 2


def test_two_drivers_on_s3_and_a_lost_reply(
    s3_lake: tuple[str, Storage], make_rows: Callable[..., pa.Table]
) -> None:
    lake, storage = s3_lake
    table = LabelsTable.open_or_create(lake, storage)
    second = committer(DeltaStore(LabelsTable.open(lake, storage)))
    first = committer(LosesReplies(table))
    first.add(write_fragment(make_rows(["a"], MODEL), ["u1"], lake, MODEL, storage))
    second.add(write_fragment(make_rows(["a"], MODEL), ["u1"], lake, MODEL, storage))
    assert first.commit() == 1
    with pytest.raises(CommitConflictError):
        second.commit()
    assert images(table) == ["a"]


def test_app_ids_differ_by_source_and_model() -> None:
    ids = {app_id("a", "b"), app_id("ab", ""), app_id("", "ab"), app_id("a", "c"), app_id("c", "b")}
    assert len(ids) == 5
    assert all(i.startswith("infer:") for i in ids)
