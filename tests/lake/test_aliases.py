import json
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import pytest

from jobs.lake.aliases import Aliases, AliasMove, open_version
from jobs.lake.registry import ModelRegistry, ModelVersion
from jobs.lake.storage import Storage
from schemas.errors import StorageError, UsageError

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


def version(name: str, number: int) -> ModelVersion:
    return ModelVersion(name, number, "1a" * 32, "2b" * 32, 7, NOON.isoformat())


@pytest.fixture(params=["file", "memory"])
def lake_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{tmp_path}/lake" if request.param == "file" else f"memory://bucket-{uuid.uuid4().hex}/lake"


@pytest.fixture
def minutes() -> Callable[[], datetime]:
    """A clock that goes on by a minute whenever it is read."""
    passed: Iterator[int] = count()
    return lambda: NOON + timedelta(minutes=next(passed))


@pytest.fixture
def aliases(lake_uri: str, storage: Storage, minutes: Callable[[], datetime]) -> Aliases:
    return Aliases(lake_uri, storage, minutes)


@pytest.fixture
def on_disk(tmp_path: Path, storage: Storage) -> Aliases:
    return Aliases(str(tmp_path), storage)


def test_an_empty_lake_has_no_aliases(aliases: Aliases) -> None:
    assert aliases.names() == []
    assert aliases.history("champion") == []
    with pytest.raises(UsageError, match=r"no alias 'champion' .*: its aliases are none so far"):
        aliases.newest("champion")


def test_an_alias_means_what_it_was_moved_to_last_and_keeps_its_history(aliases: Aliases) -> None:
    first = aliases.move("champion", version("facades", 1), "ada", "the first")
    second = aliases.move("champion", version("facades", 2), "grace", "")
    third = aliases.move("champion", version("facades", 1), "ada", "2 loses doors")
    assert first == AliasMove("champion", 1, "facades@1", "ada", "the first", "2026-11-23T12:00:00+00:00")
    assert third == AliasMove("champion", 3, "facades@1", "ada", "2 loses doors", "2026-11-23T12:02:00+00:00")
    assert aliases.newest("champion") == third
    assert aliases.history("champion") == [third, second, first]


def test_aliases_do_not_touch_each_other(aliases: Aliases) -> None:
    aliases.move("champion", version("facades", 1), "ada", "")
    aliases.move("champion-2", version("facades", 2), "ada", "")
    assert aliases.names() == ["champion", "champion-2"]
    assert aliases.newest("champion").model == "facades@1"
    with pytest.raises(UsageError, match=r"its aliases are champion, champion-2;"):
        aliases.newest("champ")


def test_the_eleventh_move_counts_more_than_the_second(aliases: Aliases) -> None:
    for number in range(1, 12):
        aliases.move("champion", version("facades", number), "ada", "")
    assert aliases.newest("champion").model == "facades@11"
    assert [move.number for move in aliases.history("champion")] == list(range(11, 0, -1))


def test_of_movers_at_once_every_move_is_kept_in_an_order(on_disk: Aliases) -> None:
    with ThreadPoolExecutor(8) as pool:
        moves = list(
            pool.map(lambda n: on_disk.move("champion", version("facades", n), "ada", ""), range(1, 17))
        )
    assert sorted(move.number for move in moves) == list(range(1, 17))
    assert on_disk.history("champion") == sorted(moves, key=lambda move: -move.number)
    assert on_disk.newest("champion") == max(moves, key=lambda move: move.number)


def test_a_number_that_another_mover_took_first_is_left_to_it(
    on_disk: Aliases, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = on_disk.move("champion", version("facades", 1), "ada", "")
    monkeypatch.setattr(on_disk, "_files", lambda alias: [])  # as listed before the other came
    second = on_disk.move("champion", version("facades", 2), "grace", "")
    monkeypatch.undo()
    assert on_disk.history("champion") == [second, first]


@pytest.mark.parametrize("alias", ["", "a/b", "..", ".hidden", "_x", "näme", "a b", "a@1", "x" * 101])
def test_an_alias_that_cannot_be_used_is_refused(alias: str, on_disk: Aliases) -> None:
    with pytest.raises(UsageError, match="wanted at most 100 letters"):
        on_disk.move(alias, version("facades", 1), "ada", "")
    with pytest.raises(UsageError, match="wanted at most 100 letters"):
        on_disk.newest(alias)


@pytest.mark.parametrize(("by", "why"), [("a\x1b[2J", ""), ("ada", "two\nlines")])
def test_who_and_why_are_a_line_each(by: str, why: str, on_disk: Aliases) -> None:
    with pytest.raises(UsageError, match="wanted one line"):
        on_disk.move("champion", version("facades", 1), by, why)
    assert on_disk.names() == []


@pytest.mark.parametrize(
    "damage",
    [{"format": "masklake-alias-2"}, {"alias": "other"}, {"number": 2}, {"model": None}, {"surplus": 1}],
)
def test_a_damaged_move_is_an_error(damage: dict[str, object], on_disk: Aliases, tmp_path: Path) -> None:
    on_disk.move("champion", version("facades", 1), "ada", "")
    path = tmp_path / "models" / "aliases" / "champion" / "1.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | damage))
    with pytest.raises(StorageError, match=r"1\.json is damaged"):
        on_disk.newest("champion")


def test_a_move_cut_short_is_an_error_and_another_file_is_left_alone(
    on_disk: Aliases, tmp_path: Path
) -> None:
    move = on_disk.move("champion", version("facades", 1), "ada", "")
    folder = tmp_path / "models" / "aliases"
    (folder / "champion" / "notes.json").write_text("a user's own")
    (folder / "champion" / "02.json").write_text("a user's own")
    (folder / "README.json").write_text("a user's own")
    assert on_disk.history("champion") == [move]
    assert on_disk.names() == ["champion"]
    (folder / "champion" / "1.json").write_text("[]")
    with pytest.raises(StorageError, match="damaged"):
        on_disk.newest("champion")


def test_a_reference_is_a_version_or_an_alias_of_one(lake_uri: str, storage: Storage) -> None:
    registry = ModelRegistry(lake_uri, storage)
    one, two = registry.register("facades", b"1", "1a" * 32), registry.register("facades", b"2", "2b" * 32)
    Aliases(lake_uri, storage).move("champion", one, "ada", "")
    assert open_version("facades@2", storage, lake_uri) == two
    assert open_version("alias:champion", storage, lake_uri) == one
    Aliases(lake_uri, storage).move("champion", two, "ada", "")
    assert open_version("alias:champion", storage, lake_uri) == two


def test_a_reference_to_nothing_says_what_there_is(lake_uri: str, storage: Storage) -> None:
    one = ModelRegistry(lake_uri, storage).register("facades", b"1", "1a" * 32)
    aliases = Aliases(lake_uri, storage)
    aliases.move("champion", one, "ada", "")
    aliases.move("lost", version("facades", 7), "ada", "")
    with pytest.raises(UsageError, match=r"no alias 'challenger' .* its aliases are champion, lost;"):
        open_version("alias:challenger", storage, lake_uri)
    with pytest.raises(UsageError, match=r"facades@7 is not registered: facades has version 1"):
        open_version("alias:lost", storage, lake_uri)
    with pytest.raises(UsageError, match=r"wanted NAME@VERSION; facades has version 1"):
        open_version("facades", storage, lake_uri)
    with pytest.raises(UsageError, match="alias ''"):
        open_version("alias:", storage, lake_uri)
