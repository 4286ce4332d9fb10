"""The lake's model registry: numbered versions under a name, each of which stays what it is.

Enters: a checkpoint's bytes and facts about them. Leaves: `name@version`, and the same bytes again.

    <lake>/models/<name>/<version>.json       what a version is, from 1 on; made once, never changed
    <lake>/models/blobs/<fingerprint>.safetensors   the weights; versions of equal weights share them

Two writers at once get two versions: a version is whoever's conditional put makes its file. The weights come
first, so that no version points at nothing. What is in a checkpoint is maskrcnn_core.checkpoint's to say;
here it is bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from jobs.lake.storage import CorruptObjectError, MissingObjectError, ObjectInfo, Storage
from schemas.errors import StorageError, UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_BLOBS: Final = "blobs"
_RESERVED: Final = (_BLOBS, "aliases", "ids")  # aliases.py, model_ids.py: folders beside the models'
_FORMAT: Final = "masklake-model-1"
_MAX_TRIES = 1000  # each lost to another writer's version


@dataclass(frozen=True)
class ModelVersion:
    """One version, as its file says.

    fingerprint: of weights and config, 64 hex digits; sha256, num_bytes: of the checkpoint's file;
    created_at: UTC, ISO 8601; facts: what the writer wanted to be known: metrics, data, recipe.
    """

    name: str
    version: int
    fingerprint: str
    sha256: str
    num_bytes: int
    created_at: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class ModelRegistry:
    """The models of one lake."""

    def __init__(
        self, lake_uri: str, storage: Storage, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._folder = f"{storage.normalize(lake_uri)}/models"
        self._storage = storage
        self._clock = clock

    def register(
        self, name: str, checkpoint: bytes, fingerprint: str, facts: Mapping[str, Any] | None = None
    ) -> ModelVersion:
        """Make the next version of `name`.

        A file with the same fingerprint may be there: then it is what the version means, though its name and
        provenance may be others. Equal weights so keep one model_id, and images are not labelled twice.

        Args:
            fingerprint: of the checkpoint, as maskrcnn_core.checkpoint computes it.
            facts: JSON-able.

        Raises:
            UsageError: the name cannot be used, or the store does not honour conditional puts.
            StorageError: the store refused; no version was made.
        """
        _check_name(name)
        if not _FINGERPRINT.fullmatch(fingerprint):
            raise ValueError(f"fingerprint {fingerprint!r}: wanted 64 hex digits.")
        last = max((number for number, _ in self._files(name)), default=0)
        if last == 0:  # a lake that only training has written to was not probed yet
            self._storage.probe_conditional_put(self._folder)
        stored = self._store_weights(checkpoint, fingerprint)
        for number in range(last + 1, last + 1 + _MAX_TRIES):
            version = ModelVersion(
                name,
                number,
                fingerprint,
                hashlib.sha256(stored).hexdigest(),
                len(stored),
                self._clock().isoformat(timespec="seconds"),
                dict(facts or {}),
            )
            data = json.dumps({"format": _FORMAT, **asdict(version)}, indent=1).encode()
            if self._storage.create_exclusive(self._version_uri(name, number), data):
                return version
        raise StorageError(
            f"{self._folder}/{name}: {_MAX_TRIES} versions in a row were made by others first; try again."
        )

    def names(self) -> list[str]:
        """Names that have a version, in alphabetical order."""
        parts = (info.uri[len(self._folder) + 1 :].split("/") for info in self._list(self._folder))
        return sorted({part[0] for part in parts if len(part) == 2 and part[0] not in _RESERVED})

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of a name, the oldest first; none of a name that is not there.

        Raises:
            UsageError: there can be no such name.
            StorageError: a version's file is damaged.
        """
        _check_name(name)
        return [self._parse(name, number, info) for number, info in self._files(name)]

    def open(self, reference: str) -> ModelVersion:
        """The version that `name@version` names.

        Raises:
            UsageError: it is not such a reference, or there is no such version; the message says which ones
                there are.
            StorageError: its file is damaged.
        """
        name, _, number = reference.partition("@")
        _check_name(name)
        if not _VERSION.fullmatch(number):
            raise UsageError(f"model {reference!r}: wanted NAME@VERSION; {self._what_there_is(name)}.")
        try:
            info = self._storage.stat(self._version_uri(name, int(number)))
        except MissingObjectError:
            raise UsageError(f"model {reference} is not registered: {self._what_there_is(name)}.") from None
        return self._parse(name, int(number), info)

    def read(self, version: ModelVersion) -> bytes:
        """The checkpoint's bytes, the very ones that were registered.

        Raises:
            CorruptObjectError: they are others now. MissingObjectError: they are gone.
        """
        uri = self.weights_uri(version)
        data = self._storage.read_bytes(self._storage.stat(uri))
        if hashlib.sha256(data).hexdigest() != version.sha256:
            raise CorruptObjectError(f"{uri} is not what {version} was registered with; restore it.")
        return data

    def weights_uri(self, version: ModelVersion) -> str:
        return self._weights_uri(version.fingerprint)

    def _store_weights(self, checkpoint: bytes, fingerprint: str) -> bytes:
        """The bytes that lie under the fingerprint: these, or those that were there first."""
        uri = self._weights_uri(fingerprint)
        if self._storage.create_exclusive(uri, checkpoint):
            return checkpoint
        return self._storage.read_bytes(self._storage.stat(uri))

    def _parse(self, name: str, number: int, info: ObjectInfo) -> ModelVersion:
        damage = f"{info.uri} is damaged or of a newer version"
        try:
            values = json.loads(self._storage.read_bytes(info))
            if values.pop("format") != _FORMAT:
                raise ValueError("another format")
            version = ModelVersion(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StorageError(f"{damage}: {error}") from error
        if (version.name, version.version) != (name, number) or not _FINGERPRINT.fullmatch(
            version.fingerprint
        ):
            raise StorageError(f"{damage}: it says {version} of {version.fingerprint!r}")
        return version

    def _what_there_is(self, name: str) -> str:
        numbers = [str(number) for number, _ in self._files(name)]
        if numbers:
            return f"{name} has version {', '.join(numbers[-10:])}"
        return f"the lake's models are {', '.join(self.names()) or 'none so far'}"

    def _files(self, name: str) -> list[tuple[int, ObjectInfo]]:
        """Versions and their files, by number; what else lies there is left alone."""
        folder = f"{self._folder}/{name}"
        found = []
        for info in self._list(folder):
            stem = info.uri[len(folder) + 1 :].removesuffix(".json")
            if info.uri.endswith(".json") and _VERSION.fullmatch(stem):
                found.append((int(stem), info))
        return sorted(found, key=lambda item: item[0])

    def _list(self, folder: str) -> list[ObjectInfo]:
        try:
            return list(self._storage.list(folder, "*.json"))
        except MissingObjectError:  # a disk has no folder yet
            return []

    def _version_uri(self, name: str, number: int) -> str:
        return f"{self._folder}/{name}/{number}.json"

    def _weights_uri(self, fingerprint: str) -> str:
        return f"{self._folder}/{_BLOBS}/{fingerprint}.safetensors"


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise UsageError(
            f"model name {name!r}: wanted at most 100 letters, digits, '.', '_' and '-', the first a letter "
            f"or digit, and none of {', '.join(_RESERVED)}."
        )
