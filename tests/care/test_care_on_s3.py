"""Doctor, compaction and vacuum over an S3 server."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pyarrow as pa
import pytest

from jobs.care.doctor import audit
from jobs.care.vacuum import vacuum
from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.compact import run_compaction
from jobs.lake.fragments import write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from schemas.specs import StorageSpec

ODD_MODEL = "my mödel/v1=a%20b+#?:&'-0123456789ab"


@pytest.fixture
def s3_lake() -> Iterator[tuple[str, Storage]]:
    """A lake in a bucket of moto's server, which runs in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "moto did not start"
            time.sleep(0.05)
        storage = Storage(StorageSpec(endpoint_url=f"http://127.0.0.1:{port}"))
        filesystem, _ = storage.filesystem("s3://care")
        filesystem.call_s3("create_bucket", Bucket="care")
        yield "s3://care/some/lake", storage
        server.terminate()


@pytest.mark.slow
def test_care_on_s3(s3_lake: tuple[str, Storage], make_rows: Callable[..., pa.Table]) -> None:
    lake, storage = s3_lake
    table = LabelsTable.open_or_create(lake, storage)
    committer = Committer(DeltaStore(table), app_id("tests", ""), {}, every_s=60, every_images=1)
    for image_id in "ab":
        rows = make_rows([image_id], model_id=ODD_MODEL)
        committer.add(write_fragment(rows, [f"unit-{image_id}"], lake, ODD_MODEL, storage))
        committer.commit()
    orphan = write_fragment(make_rows(["c"], model_id=ODD_MODEL), ["unit-c"], lake, ODD_MODEL, storage)
    assert run_compaction(table, lake, storage).num_old_files == 2

    found = audit(lake, storage)
    assert (found.problems, found.num_rows, found.num_masks_checked) == ([], 2, 4)
    assert [file.path for file in found.orphans] == [orphan.path]
    assert len(found.replaced) == 2
    assert all(0 <= file.age_s < 300 for file in [*found.orphans, *found.replaced])

    assert (vacuum(lake, storage).deleted, len(vacuum(lake, storage).kept)) == ([], 3)
    done = vacuum(lake, storage, clock=lambda: time.time() + 8 * 86400)
    assert (len(done.deleted), done.oldest_whole_version) == (3, 3)
    found = audit(lake, storage)
    assert (found.problems, found.num_rows, found.orphans, found.replaced) == ([], 2, [], [])
