"""Aliases of the lake's models: a name such as `champion` that moves from version to version.

Enters: an alias, a registered version, who moves it and why. Leaves: the version it means now, and every move
there was.

    <lake>/models/aliases/<alias>/<n>.json      the n-th move, from 1 on; made once, never changed

The move with the largest number counts, so that one conditional put moves an alias, whole, and history stays.
Of two movers at once each gets a number, and the larger one counts.
"""

from __future__ import annotations

import getpass
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Final

from jobs.lake.registry import ModelRegistry, ModelVersion
from jobs.lake.storage import MissingObjectError, ObjectInfo, Storage
from schemas.errors import StorageError, UsageError

PREFIX: Final = "alias:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_FORMAT: Final = "masklake-alias-1"
_MAX_TRIES = 1000  # each lost to another mover


@dataclass(frozen=True)
class AliasMove:
    """One move, as its file says.

    number: from 1 on, the order of an alias's moves; model: NAME@N; at: UTC, ISO 8601, of the mover's clock.
    """

    alias: str
    number: int
    model: str
    by: str
    why: str
    at: str


class Aliases:
    """The aliases of one lake."""

    def __init__(
        self, lake_uri: str, storage: Storage, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._lake_uri = storage.normalize(lake_uri)
        self._folder = f"{self._lake_uri}/models/aliases"
        self._storage = storage
        self._clock = clock

    def move(self, alias: str, version: ModelVersion, by: str, why: str) -> AliasMove:
        """Let an alias mean a version from now on; the first move makes it.

        Args:
            version: of this lake's registry, which probed the store for conditional puts.

        Raises:
            UsageError: the alias cannot be used, or `by` or `why` is more than a line of text.
            StorageError: the store refused; the alias was not moved.
        """
        _check_name(alias)
        _check_line("by", by)
        _check_line("why", why)
        last = max((number for number, _ in self._files(alias)), default=0)
        for number in range(last + 1, last + 1 + _MAX_TRIES):
            at = self._clock().isoformat(timespec="seconds")
            move = AliasMove(alias, number, str(version), by, why, at)
            data = json.dumps({"format": _FORMAT, **asdict(move)}, indent=1).encode()
            if self._storage.create_exclusive(f"{self._folder}/{alias}/{number}.json", data):
                return move
        raise StorageError(
            f"{self._folder}/{alias}: {_MAX_TRIES} moves in a row were made by others first; try again."
        )

    def newest(self, alias: str) -> AliasMove:
        """What an alias means now.

        Raises:
            UsageError: there is no such alias; the message says which there are.
            StorageError: the move's file is damaged.
        """
        _check_name(alias)
        files = self._files(alias)
        if not files:
            raise UsageError(
                f"there is no alias {alias!r} in the lake {self._lake_uri}: its aliases are "
                f"{', '.join(self.names()) or 'none so far'}; `masklake model alias` makes one."
            )
        return self._parse(alias, *files[-1])

    def history(self, alias: str) -> list[AliasMove]:
        """Every move of an alias, the newest first; none of an alias that is not there.

        Raises:
            UsageError: there can be no such alias.
            StorageError: a move's file is damaged.
        """
        _check_name(alias)
        return [self._parse(alias, number, info) for number, info in reversed(self._files(alias))]

    def names(self) -> list[str]:
        """The aliases that there are, in alphabetical order."""
        found = set()
        for info in self._list(self._folder):
            alias, _, file = info.uri[len(self._folder) + 1 :].partition("/")
            if _NAME.fullmatch(alias) and _NUMBER.fullmatch(file.removesuffix(".json")):
                found.add(alias)
        return sorted(found)

    def _parse(self, alias: str, number: int, info: ObjectInfo) -> AliasMove:
        damage = f"{info.uri} is damaged or of a newer version"
        try:
            values = json.loads(self._storage.read_bytes(info))
            if values.pop("format") != _FORMAT:
                raise ValueError("another format")
            move = AliasMove(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StorageError(f"{damage}: {error}") from error
        if (move.alias, move.number) != (alias, number) or not isinstance(move.model, str):
            raise StorageError(f"{damage}: it says move {move.number} of {move.alias!r} to {move.model!r}")
        return move

    def _files(self, alias: str) -> list[tuple[int, ObjectInfo]]:
        """Moves and their files, by number; what else lies there is left alone."""
        folder = f"{self._folder}/{alias}"
        found = []
        for info in self._list(folder):
            stem = info.uri[len(folder) + 1 :].removesuffix(".json")
            if _NUMBER.fullmatch(stem):
                found.append((int(stem), info))
        return sorted(found, key=lambda item: item[0])

    def _list(self, folder: str) -> list[ObjectInfo]:
        try:
            return list(self._storage.list(folder, "*.json"))
        except MissingObjectError:  # a disk has no folder yet
            return []


def open_version(reference: str, storage: Storage, lake_uri: str) -> ModelVersion:
    """The registered version that `NAME@N` or `alias:NAME` names in a lake.

    Raises:
        UsageError: it is neither, or there is none; the message says which ones there are.
        StorageError: a file of the registry is damaged, or the store refused.
    """
    if reference.startswith(PREFIX):
        reference = Aliases(lake_uri, storage).newest(reference.removeprefix(PREFIX)).model
    return ModelRegistry(lake_uri, storage).open(reference)


def login() -> str:
    """Who runs this process: what `by` is where nobody says."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user need not have a name
        return f"uid {os.getuid()}"


def _check_name(alias: str) -> None:
    if not _NAME.fullmatch(alias):
        raise UsageError(
            f"alias {alias!r}: wanted at most 100 letters, digits, '.', '_' and '-', the first a letter or "
            f"digit."
        )


def _check_line(what: str, text: str) -> None:
    if not text.isprintable():
        raise UsageError(f"{what} {text!r}: wanted one line without control characters.")
