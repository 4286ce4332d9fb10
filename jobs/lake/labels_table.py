"""The label table: a Delta log over fragments, partitioned by model_id.

Enters: a lake's URI. Leaves: its labels as an Arrow dataset or a DuckDB relation, and what is done of a
source. Rows come in through commit.py only. Files are read by pyarrow, not by deltalake, whose
to_pyarrow_table() aborted processes at exit.
"""

import io
import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
from deltalake import CommitProperties, DeltaTable, Schema
from deltalake.exceptions import TableNotFoundError

from jobs.lake.done_images import KEY_COLUMNS, DoneImages, LabelFile, Range
from jobs.lake.fragments import PARTITION_COLUMN, labels_uri
from jobs.lake.newest_rows import create_newest_view, split_files
from jobs.lake.storage import CORRUPT_TRIES, CorruptObjectError, ObjectInfo, Storage
from jobs.lake.time_limit import HungCallError, within
from schemas.errors import SchemaMismatchError, StorageError, UsageError
from schemas.labels import (
    ADDED_COLUMNS,
    LABEL_SCHEMA,
    LABEL_SCHEMA_VERSION,
    ErrorKind,
    check_labels,
)

_VERSION_PROPERTY = "masklake.label_schema_version"
_PROPERTIES = {
    "delta.appendOnly": "true",
    # By default versions older than 30 days go at the next checkpoint; a training run may name one of them.
    "delta.enableExpiredLogCleanup": "false",
    # A commit replays the log since the last checkpoint, on S3 a request a version, and a checkpoint writes
    # down every file: about the square root of a job's commits costs least in all. deltalake's own is 100.
    "delta.checkpointInterval": "25",
    _VERSION_PROPERTY: str(LABEL_SCHEMA_VERSION),
}
_READABLE_VERSIONS = [str(version) for version in range(1, LABEL_SCHEMA_VERSION + 1)]
_RANGE_COLUMNS = ("image_id", "source", "shard", "status", "error_kind")
# A file's keys are some KiB beside megabytes of masks, which Storage's own buffer would fetch with them.
_READ_BUFFER_BYTES = 64 << 10
# deltalake repeats what is busy by itself, but not a reply that was cut short, which is soon known.
_OPEN_PAUSES_S = (0.2, 1.0)
_SOON_S = 30.0
# Longer than deltalake goes on with one request (stores.py); a log of 100,000 files opens in half a second.
LOG_LIMIT_S = 180.0
_CHECKED_PARQUET = pads.ParquetFileFormat(
    default_fragment_scan_options=pads.ParquetFragmentScanOptions(page_checksum_verification=True)
)
# None of them may be null, so a file's bounds hold for every row of it.
_GUARANTEED_COLUMNS = ("image_id", "source", "shard", "status")

AnswerT = TypeVar("AnswerT")


class LabelsTable:
    """One version of the label table; refresh() goes on to the newest."""

    def __init__(self, uri: str, storage: Storage, version: int | datetime | None = None) -> None:
        """Open the table at its own URI; see open(), which takes the lake's."""
        self.uri = uri
        self._storage = storage
        self._is_stuck = False
        self._delta = self._load(version)

    @classmethod
    def open(cls, lake_uri: str, storage: Storage, version: int | datetime | None = None) -> "LabelsTable":
        """Open the label table of a lake.

        Args:
            version: a number; or a time, with its zone: the version that was the newest then. As Delta has
                it, a version is of the time when its file of the log was written: a copied lake is younger.

        Raises:
            UsageError: there is none, or no such version.
            SchemaMismatchError: there is one, but not of this label schema.
        """
        return cls(labels_uri(storage.normalize(lake_uri)), storage, version)

    @classmethod
    def exists(cls, lake_uri: str, storage: Storage) -> bool:
        """Whether a lake has a label table, of whatever version."""
        uri = labels_uri(storage.normalize(lake_uri))
        location, options = _delta_uri(uri), storage.delta_options(uri)
        try:
            return within(
                LOG_LIMIT_S, "looking for the log", lambda: DeltaTable.is_deltatable(location, options)
            )
        except Exception as error:  # deltalake raises OSError, DeltaError or bare Exception as it comes
            raise StorageError(f"cannot look for a label table at {uri}: {first_line(error)}") from error

    @classmethod
    def open_or_create(cls, lake_uri: str, storage: Storage) -> "LabelsTable":
        """Open the label table of a lake to write to it: made empty if there is none, brought up to this
        label schema if it is of an earlier one. Several may try at once.
        """
        uri = labels_uri(storage.normalize(lake_uri))
        create = partial(
            DeltaTable.create,
            _delta_uri(uri),
            Schema.from_arrow(LABEL_SCHEMA),
            mode="ignore",
            partition_by=[PARTITION_COLUMN],
            description="masklake labels: one row per image and model",
            configuration=_PROPERTIES,
            storage_options=storage.delta_options(uri),
            # Tried again, the loser of a race would declare the winner's table anew, as version 1.
            commit_properties=CommitProperties(max_commit_retries=0),
            raise_if_key_not_exists=False,
        )
        try:
            within(LOG_LIMIT_S, "creating the log", create)
        except UsageError:
            raise
        except Exception as error:  # as above; and whoever loses a race to create it finds the winner's table
            try:
                return cls(uri, storage)
            except UsageError:
                message = f"cannot create the label table at {uri}: {first_line(error)}"
                raise StorageError(message) from error
        table = cls(uri, storage)
        table._upgrade()
        return table

    @property
    def delta(self) -> DeltaTable:
        """The log in memory; ask() it what it has to read. Its own readers of rows are not to be used."""
        return self._delta

    @property
    def version(self) -> int:
        return self._delta.version()

    def refresh(self) -> None:
        """Go on to the newest version, reading only what was added to the log."""
        if self._is_stuck:
            self.reopen()
        else:
            self.ask("reading the log", DeltaTable.update_incremental)

    def reopen(self) -> None:
        """Go on to the newest version, trusting nothing that is in memory."""
        self._delta = self._load(None)
        self._is_stuck = False

    def ask(self, what: str, call: Callable[[DeltaTable], AnswerT]) -> AnswerT:
        """Call something of the log that goes to storage.

        Raises:
            HungCallError: it did not come back. A commit may be in the log all the same, or get there yet,
                unless another takes its place; refresh() opens the table anew.
        """
        try:
            return within(LOG_LIMIT_S, f"{what} of {self.uri}", lambda: call(self._delta))
        except HungCallError:
            self._is_stuck = True
            raise

    def files(self, model_id: str | None = None) -> list[LabelFile]:
        """Every file of this version, or of one model in it."""
        actions = pa.table(self._delta.get_add_actions(flatten=True))
        if model_id is not None:
            actions = actions.filter(pc.equal(actions[f"partition.{PARTITION_COLUMN}"], pa.scalar(model_id)))
        return list(_label_files(actions))

    def paths(self) -> set[str]:
        """Paths of every file of this version, below the table; cheaper than files()."""
        actions = pa.table(self._delta.get_add_actions())
        return {_path_below(str(path)) for path in actions["path"].to_pylist()}

    def file_uris(self, model_id: str | None = None) -> list[str]:
        """Absolute URIs of the Parquet files, plain paths on a disk, for readers that know no Delta.

        The column model_id stands in the path only, the way Hive writes it.
        """
        root = self.uri.removeprefix("file://")
        return [f"{root}/{file.path}" for file in self.files(model_id)]

    def model_ids(self) -> list[str]:
        """The models that labelled something, in alphabetical order."""
        return sorted({file.model_id for file in self.files()})

    def newest_row_at(self) -> datetime | None:
        """When the newest row was made, to the millisecond that the log keeps of it; None: no row."""
        actions = pa.table(self._delta.get_add_actions(flatten=True))
        if "max.labeled_at" not in actions.column_names:
            return None
        newest: datetime | None = pc.max(actions["max.labeled_at"]).as_py()
        return newest if newest is None or newest.tzinfo else newest.replace(tzinfo=UTC)

    def choose_model(self, model_id: str | None) -> str:
        """The model that was asked for, or the only one there is.

        Raises:
            UsageError: it labelled nothing here, or none was named and there are several.
        """
        known = self.model_ids()
        if model_id is None and len(known) == 1:
            return known[0]
        if model_id is not None and model_id in known:
            return model_id
        problem = "name one of them" if model_id is None else f"{model_id} is not one of them"
        raise UsageError(
            f"the table at {self.uri} has labels of these models: {', '.join(known) or 'none'}; {problem}"
        )

    def dataset(self, model_id: str | None = None, version: int | None = None) -> pads.Dataset:
        """All rows, or those of one model, as LABEL_SCHEMA: every row ever written, not only the newest.

        Filters on image_id, source, shard, status and model_id open only the files that may match.
        """
        if version is not None and version != self.version:
            return LabelsTable(self.uri, self._storage, version).dataset(model_id)
        return self.dataset_of(self.files(model_id))

    def dataset_of(self, files: Sequence[LabelFile]) -> pads.Dataset:
        """The rows of some files of this version, as dataset() has them."""
        filesystem, root = self._arrow_filesystem(files)
        parquet = pads.ParquetFileFormat()
        fragments = [
            parquet.make_fragment(
                f"{root}/{file.path}",
                filesystem,
                partition_expression=_guarantee(file),
                file_size=file.size_bytes,
            )
            for file in files
        ]
        return pads.FileSystemDataset(fragments, LABEL_SCHEMA, parquet, filesystem)

    def to_current(self, model_id: str) -> duckdb.DuckDBPyRelation:
        """The newest row of each image under one model, `removed` left out; columns of LABEL_SCHEMA.

        Lazy: fetch what is wanted with .select(), .filter(), .to_arrow_table(), .fetchall().
        """
        connection = duckdb.connect()
        alone, others = split_files(self.files(model_id))
        create_newest_view(connection, "labels", self.dataset_of(alone), self.dataset_of(others))
        return connection.view("labels")

    def commit_info(self, version: int) -> dict[str, Any]:
        """What the commit that made a version says of itself, its metadata included; one small read.

        Raises:
            MissingObjectError: the log does not have it any more. CorruptObjectError: it cannot be read.
        """
        uri = f"{self.uri}/_delta_log/{version:020}.json"
        data = self._storage.read_bytes(self._storage.stat(uri))
        try:
            actions = [json.loads(line) for line in data.splitlines() if line.strip()]
            return dict(next(action["commitInfo"] for action in actions if "commitInfo" in action))
        except (ValueError, TypeError, StopIteration) as error:
            raise CorruptObjectError(f"{uri} is not a Delta commit: {first_line(error)}") from error

    def done_images(self, source: str, model_id: str, retry: Collection[ErrorKind] = ()) -> DoneImages:
        """What of a source is done under a model, as of this version."""
        files = self.files(model_id)
        read_keys = partial(_read_keys, *self._arrow_filesystem(files))
        return DoneImages(files, source, retry, read_keys)

    def _arrow_filesystem(self, files: Sequence[LabelFile]) -> tuple[pafs.FileSystem, str]:
        _, root = self._storage.filesystem(self.uri)
        if self.uri.startswith("file://"):
            return pafs.LocalFileSystem(), root
        sizes = {f"{root}/{file.path}": file.size_bytes for file in files}
        handler = _ObjectHandler(self._storage, self.uri, sizes)  # type: ignore[abstract]  # so say the stubs only
        return pafs.PyFileSystem(handler), root

    def _load(self, version: int | datetime | None) -> DeltaTable:
        """Refuses a table that is not ours, before a row is read from it or added to it."""
        delta, newest = self._open(version)
        if isinstance(version, datetime):
            self._check_moment(delta, version)
        elif version is not None and version > newest:
            raise UsageError(
                f"the label table at {self.uri} has no version {version}; its newest is {newest}"
            )
        metadata = delta.metadata()
        written = metadata.configuration.get(_VERSION_PROPERTY, str(LABEL_SCHEMA_VERSION))
        if written not in _READABLE_VERSIONS:
            raise SchemaMismatchError(
                f"the table at {self.uri} has label schema version {written}; this masklake reads "
                f"{' and '.join(_READABLE_VERSIONS)}. Use the masklake that wrote it, or another lake."
            )
        if metadata.partition_columns != [PARTITION_COLUMN]:
            raise SchemaMismatchError(
                f"the table at {self.uri} is partitioned by {metadata.partition_columns}, not by "
                f"[{PARTITION_COLUMN!r}]: it is not a label table. Give another lake."
            )
        check_labels(_arrow_schema(delta), f"the table at {self.uri}", int(written))
        return delta

    def _upgrade(self) -> None:
        """Add what tables of earlier versions lack. Files stay as they are: a column they lack is null.

        Two commits, one for the columns and one that says so. One that another run makes first fails here.
        """
        for _ in range(2):
            missing = [name for name in ADDED_COLUMNS if name not in _arrow_schema(self._delta).names]
            written = self._delta.metadata().configuration.get(_VERSION_PROPERTY)
            if not missing and written in (None, str(LABEL_SCHEMA_VERSION)):
                return
            fields = Schema.from_arrow(pa.schema([LABEL_SCHEMA.field(name) for name in missing])).fields
            version = {_VERSION_PROPERTY: str(LABEL_SCHEMA_VERSION)}
            try:
                if missing:
                    self.ask("adding columns", lambda delta: delta.alter.add_columns(fields))  # noqa: B023
                self.ask("saying so", lambda delta: delta.alter.set_table_properties(version, False))  # noqa: B023
            except Exception as error:  # as above; another run may have been first
                failure = error
            self.reopen()
        raise StorageError(
            f"the label table at {self.uri} could not be brought up to label schema version "
            f"{LABEL_SCHEMA_VERSION}: {first_line(failure)}. Nothing is lost; run the same command again."
        )

    def _check_moment(self, delta: DeltaTable, moment: datetime) -> None:
        """deltalake takes the first version for a time before it."""
        if delta.version() > 0:
            return
        info = within(LOG_LIMIT_S, f"reading the log of {self.uri}", lambda: delta.history(1)[0])
        made_at = datetime.fromtimestamp(info["timestamp"] / 1000, UTC)
        if moment < made_at:
            raise UsageError(
                f"the label table at {self.uri} has no version of {moment.isoformat()}; its first is of "
                f"{made_at.isoformat(timespec='seconds')}"
            )

    def _open(self, version: int | datetime | None) -> tuple[DeltaTable, int]:
        """The log at a version, where there is such a one, and the newest version."""
        options = self._storage.delta_options(self.uri)

        def load() -> tuple[DeltaTable, int]:
            delta = DeltaTable(_delta_uri(self.uri), storage_options=options)
            newest = delta.version()
            if isinstance(version, datetime) or (version is not None and version <= newest):
                delta.load_as_version(version)
            return delta, newest

        for pause_s in (*_OPEN_PAUSES_S, None):
            started_s = time.monotonic()
            try:
                return within(LOG_LIMIT_S, f"opening the log of {self.uri}", load)
            except TableNotFoundError as error:
                raise UsageError(f"there is no label table at {self.uri}; check the lake's URI") from error
            except Exception as error:  # deltalake raises OSError, DeltaError or bare Exception as it comes
                if pause_s is None or time.monotonic() - started_s > _SOON_S:
                    message = f"cannot open the label table at {self.uri}: {first_line(error)}"
                    raise StorageError(message) from error
            time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")


class _ObjectHandler(pafs.FSSpecHandler):
    """Opens objects through Storage, which repeats failed reads, and reads little more than Parquet asks for.

    Args:
        sizes: path -> bytes, as the log has them; saves a request for each file.
    """

    def __init__(self, storage: Storage, uri: str, sizes: Mapping[str, int]) -> None:
        filesystem, self._root = storage.filesystem(uri)
        super().__init__(filesystem)
        self._storage = storage
        self._uri = uri
        self._sizes = sizes

    def open_input_file(self, path: str) -> pa.NativeFile:
        info = ObjectInfo(self._uri + path.removeprefix(self._root), self._sizes[path], None, "")
        stream = self._storage.open_unverified(info)
        assert isinstance(stream, io.BufferedReader)
        return pa.PythonFile(io.BufferedReader(stream.detach(), _READ_BUFFER_BYTES), mode="r")


def first_line(error: Exception) -> str:
    """What a library's exception says, on one line, without the server's reply, which may quote a key."""
    return (
        " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split("<", 1)[0].split()) or type(error).__name__
    )


def _delta_uri(uri: str) -> str:
    """The URI as deltalake wants it; UsageError where deltalake would read another place than it writes."""
    scheme, _, path = uri.partition("://")
    if re.search(r"%[0-9a-fA-F]{2}|[#?\\]", path):
        raise UsageError(f"a lake cannot stand at {uri}: choose a path without #, ?, \\ and percent-escapes")
    return path if scheme == "file" else f"{scheme}://{quote(path)}"


def _arrow_schema(delta: DeltaTable) -> pa.Schema:
    """Delta has no fixed-size binary: content_hash is `binary` in the log and binary(16) in the files."""
    schema = pa.schema(delta.schema().to_arrow())  # type: ignore[arg-type]  # takes any Arrow C schema
    place = schema.get_field_index("content_hash")
    if place < 0 or schema.field(place).type != pa.binary():
        return schema
    return schema.set(place, schema.field(place).with_type(LABEL_SCHEMA.field("content_hash").type))


def _label_files(actions: pa.Table) -> Iterator[LabelFile]:
    def column(name: str) -> list[Any]:
        # Statistics that no file has do not make a column.
        return actions[name].to_pylist() if name in actions.column_names else [None] * actions.num_rows

    ranges = [
        [Range(low, high) for low, high in zip(column(f"min.{name}"), column(f"max.{name}"), strict=True)]
        for name in _RANGE_COLUMNS
    ]
    for path, model_id, size_bytes, num_rows, num_no_error, *bounds in zip(
        column("path"),
        column(f"partition.{PARTITION_COLUMN}"),
        column("size_bytes"),
        column("num_records"),
        column("null_count.error_kind"),
        *ranges,
        strict=True,
    ):
        known = num_rows is not None and num_no_error is not None
        yield LabelFile(
            _path_below(path),
            model_id,
            size_bytes,
            num_rows,
            num_rows - num_no_error if known else None,
            *bounds,
        )


def _path_below(path: str) -> str:
    """A file's path below the table. The log percent-encodes it, on top of what the partition's folder is.

    Raises:
        StorageError: it leads elsewhere. Delta's protocol allows that; none of our tables has such files.
    """
    plain = unquote(path)
    if "://" in plain or plain.startswith("/") or ".." in plain.split("/"):
        raise StorageError(f"the table's log names {plain!r}, which is outside of the table; mend the log")
    return plain


def _guarantee(file: LabelFile) -> pads.Expression:
    """What holds for every row of a file: the partition column gets its value here, scans pass files over."""
    expression = pads.field(PARTITION_COLUMN) == pads.scalar(file.model_id)
    ranges = (file.image_ids, file.sources, file.shards, file.statuses)
    for name, bounds in zip(_GUARANTEED_COLUMNS, ranges, strict=True):
        if bounds.low is not None:
            expression &= pads.field(name) >= pads.scalar(bounds.low)
        if bounds.high is not None:
            expression &= pads.field(name) <= pads.scalar(bounds.high)
    return expression


def _read_keys(filesystem: pafs.FileSystem, root: str, file: LabelFile) -> pa.Table:
    """The keys of one file, compared with what the log says of it; read again where they differ.

    A wrong key would make an image be labelled twice, or never. Page checksums cover the pages, the log's
    counts and bounds the footer, which has none.

    Raises:
        CorruptObjectError: it is damaged, and still is when read again.
    """
    problem = ""
    for _ in range(CORRUPT_TRIES):
        fragment = _CHECKED_PARQUET.make_fragment(
            f"{root}/{file.path}", filesystem, file_size=file.size_bytes
        )
        try:
            keys = fragment.to_table(columns=list(KEY_COLUMNS), schema=LABEL_SCHEMA)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            problem = first_line(error)
            continue
        if _agree(keys, file):
            return keys
        problem = "its rows are not those that the log says"
    raise CorruptObjectError(
        f"label file {root}/{file.path} is damaged: {problem}; `masklake lake doctor` says what else is"
    )


def _agree(keys: pa.Table, file: LabelFile) -> bool:
    """Whether the rows are as many as the Add action says, and within its bounds."""
    if file.num_rows not in (None, keys.num_rows):
        return False
    ranges = (file.image_ids, file.sources, file.shards, file.statuses)
    for name, bounds in zip(_GUARANTEED_COLUMNS, ranges, strict=True):
        values = keys[name]
        if values.null_count:
            return False
        low, high = (pc.min_max(values)[end].as_py() for end in ("min", "max"))
        if low is not None and ((bounds.low or low) > low or (bounds.high or high) < high):
            return False
    return True
