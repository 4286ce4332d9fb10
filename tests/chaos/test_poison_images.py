"""Images that kill, hang or bloat the process that touches them, in a whole job on a Ray of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from jobs.lake.failpoints import VARIABLE as FAILPOINTS
from jobs.lake.storage import Storage
from tests.chaos.harness import CREDENTIALS, ROOT, Ended, Job, make_images, make_source, write_source
from tests.chaos.judge import judge, read_table

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

# A minute for a decoder that hangs is long in a test. Workers inherit the failpoints, as Ray starts here.
_MAIN = """
from functools import partial
import jobs.infer.run
from jobs.cli import main
jobs.infer.run.Replica = partial(jobs.infer.run.Replica, decode_timeout_s=8.0)
main()
"""


def run(job: Job, failpoints: str, timeout_s: float = 800.0) -> Ended:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    env |= {**CREDENTIALS, FAILPOINTS: failpoints, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    env |= {"RAY_worker_niceness": "0"}  # actors start anew five times, and a test has time to lose
    with subprocess.Popen(
        [sys.executable, "-c", _MAIN, *job.argv()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        text=True,
        start_new_session=True,
    ) as driver:
        try:
            stdout, stderr = driver.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(driver.pid, signal.SIGKILL)
            stdout, stderr = driver.communicate()
            raise TimeoutError(f"the job hung: {stderr}") from None
    return Ended(driver.pid, driver.returncode, stdout, stderr)


def decoders_of(failpoints: str) -> list[int]:
    """Decoder processes that were started with these failpoints."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_decoder = b"jobs.infer.decode_child" in (path / "cmdline").read_bytes()
            if is_decoder and failpoints.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def test_a_job_finds_the_images_that_kill_its_processes_and_labels_all_others(
    tmp_path: Path, disk: Storage
) -> None:
    images = make_images(10)
    names = list(images)
    expected = {
        names[1]: ("decode_image", "kill", "crashed"),
        names[3]: ("label_image", "kill", "crashed"),
        names[4]: ("decode_image", "hang", "timeout"),
        names[6]: ("decode_image", "memory", "too_large"),
        names[8]: ("label_image", "kill", "crashed"),
    }
    failpoints = ",".join(f"{where}={name}:{how}" for name, (where, how, _) in expected.items())
    source = write_source(tmp_path / "images", make_source("files", images))
    job = Job(source, str(tmp_path / "lake"), max_images=8, settings=("failures.budget=100%",))

    ended = run(job, failpoints)

    assert ended.status == 0, ended.stderr
    table = read_table(job.lake, disk)
    problems = judge(table, list(images.values()))
    assert [problem for problem in problems if " is failed: " not in problem] == []
    assert {row["image_id"]: row["error_kind"] for row in table.rows} == {
        name: expected[name][2] if name in expected else None for name in names
    }
    assert ended.summary["failed_by_kind"] == {"crashed": 3, "timeout": 1, "too_large": 1}
    deadline = time.monotonic() + 20
    while decoders_of(failpoints) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert decoders_of(failpoints) == []
