"""What the tests of jobs/lake share."""

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.fragments import Fragment, write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from schemas.labels import LABEL_SCHEMA
from schemas.specs import StorageSpec


@pytest.fixture
def storage() -> Storage:
    return Storage(StorageSpec())


@pytest.fixture
def lake(tmp_path: Path) -> str:
    """URI of a lake on disk that does not exist yet: tmp_path / "lake"."""
    return f"file://{tmp_path}/lake"


@pytest.fixture(scope="session")
def label_server() -> Iterator[str]:
    """Endpoint of an S3 server in its own process: deltalake may hold the GIL while it waits for a reply."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "moto did not start"
                assert time.monotonic() < deadline, "moto does not answer"
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
        server.terminate()


@pytest.fixture
def s3_lake(label_server: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Storage]:
    """A lake in a bucket of its own, and the storage that reaches it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    storage = Storage(StorageSpec(endpoint_url=label_server, region="us-east-1"))
    bucket = f"lake-{uuid.uuid4().hex}"
    filesystem, _ = storage.filesystem(f"s3://{bucket}")
    filesystem.call_s3("create_bucket", Bucket=bucket)
    return f"s3://{bucket}/some/lake", storage


@pytest.fixture
def make_rows() -> Callable[..., pa.Table]:
    """Rows of LABEL_SCHEMA for given image ids, see make_label_rows."""
    return make_label_rows


@pytest.fixture
def add_labels() -> Callable[..., list[Fragment]]:
    """Write each table of rows as one fragment and commit them together; the table shows them afterwards."""

    def add(table: LabelsTable, storage: Storage, *tables: pa.Table) -> list[Fragment]:
        lake_uri = table.uri.removesuffix("/labels")
        committer = Committer(DeltaStore(table), app_id("tests", ""), {}, every_s=60, every_images=1)
        fragments = []
        for rows in tables:
            model_id = rows["model_id"][0].as_py()
            fragments.append(write_fragment(rows, [uuid.uuid4().hex], lake_uri, model_id, storage))
            committer.add(fragments[-1])
        assert committer.commit() == table.version
        return fragments

    return add


def make_label_rows(
    image_ids: Sequence[str],
    model_id: str,
    *,
    source: str = "s3://photos/2026",
    shard: str = "shard-000.tar",
    failed: Mapping[str, str] | None = None,
    removed: Sequence[str] = (),
    at_us: int = 1_700_000_000_000_000,
    run_id: str = "run-1",
    object_version: str | None = None,
) -> pa.Table:
    """Every ok row has two detections. `failed` maps image ids to error kinds."""
    labeled_at = datetime.fromtimestamp(at_us / 1e6, UTC).replace(microsecond=at_us % 1_000_000)
    rows = []
    for image_id in image_ids:
        kind = (failed or {}).get(image_id)
        ok = kind is None and image_id not in removed
        detections = [
            {
                "category_id": category_id,
                "score": score,
                "box": {"x0": 1.0, "y0": 2.0, "x1": 30.5, "y1": 40.25},
                "area": 700,
                "rle": f"rle of {image_id} {category_id}".encode(),
            }
            for category_id, score in ((3, 0.75), (1, 0.5))
        ]
        rows.append(
            {
                "image_id": image_id,
                "source": source,
                "shard": shard,
                "object_version": object_version,
                "content_hash": blake2b(image_id.encode(), digest_size=16).digest(),
                "width": 640 if ok else None,
                "height": 480 if ok else None,
                "status": "ok" if ok else "failed" if kind else "removed",
                "error_kind": kind,
                "error": f"{image_id} is {kind}" if kind else None,
                "model_id": model_id,
                "run_id": run_id,
                "labeled_at": labeled_at,
                "num_detections": 2 if ok else None,
                "max_score": 0.75 if ok else None,
                "detections": detections if ok else None,
            }
        )
    return pa.Table.from_pylist(rows, schema=LABEL_SCHEMA)
