"""Makes small sources, starts and kills drivers, runs schedules of kills until the work is done.

Enters: a seed. Leaves: what happened, for the judge. A schedule is drawn from its seed alone, so one that
failed is played again by `make chaos SEED=<seed> SCHEDULES=1 ONLY=random_schedules`; a kill at a failpoint
then falls on the same spot, one at a time of the clock near it.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jobs.lake.failpoints import VARIABLE as FAILPOINTS

ROOT = Path(__file__).parents[2]
FORMS = ("files", "tar", "parquet")
# What holds up a driver for longer than this hangs.
DRIVER_TIMEOUT_S = 600.0

SEED = int(os.environ.get("MASKLAKE_CHAOS_SEED") or 1)
NUM_SCHEDULES = int(os.environ.get("MASKLAKE_CHAOS_SCHEDULES") or 60)


def make_images(num: int, seed: int = 0) -> dict[str, bytes]:
    """Small JPEGs of coloured blocks, all different, 64 to 128 px a side: name -> bytes."""
    images = {}
    for index in range(num):
        random_blocks = np.random.default_rng([seed, index])
        rows, columns = random_blocks.integers(4, 9, 2)
        blocks = random_blocks.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)).save(data, "JPEG")
        images[f"image-{index:04d}.jpg"] = data.getvalue()
    return images


def padded(jpeg: bytes, num_bytes: int) -> bytes:
    """The same picture in a file that is larger by about so much: comment segments after its first marker."""
    comment = b"\xff\xfe" + (60_000).to_bytes(2, "big") + bytes(59_998)
    return jpeg[:2] + comment * (num_bytes // len(comment)) + jpeg[2:]


def make_source(form: str, images: Mapping[str, bytes], num_shards: int = 2) -> dict[str, bytes]:
    """The objects of a source that holds the images: name -> bytes."""
    if form == "files":
        return dict(images)
    names = list(images)
    parts = [{name: images[name] for name in names[shard::num_shards]} for shard in range(num_shards)]
    if form == "tar":
        return {f"shard-{shard}.tar": _tar(part) for shard, part in enumerate(parts)}
    return {f"part-{shard}.parquet": _parquet(part) for shard, part in enumerate(parts)}


def _tar(images: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in images.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _parquet(images: Mapping[str, bytes]) -> bytes:
    rows = [{"bytes": data, "path": name} for name, data in images.items()]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": rows}), buffer, compression="none")
    return buffer.getvalue()


def write_source(folder: Path, objects: Mapping[str, bytes]) -> str:
    folder.mkdir(parents=True)
    for name, data in objects.items():
        (folder / name).write_bytes(data)
    return str(folder)


class Command(Protocol):
    """What a driver is asked to do."""

    def argv(self) -> list[str]: ...


@dataclass(frozen=True)
class Job:
    """A label job, small and with commits that come often."""

    source: str
    lake: str
    max_images: int = 2  # of a unit
    every_images: int = 6  # of a commit
    settings: tuple[str, ...] = ()

    def argv(self) -> list[str]:
        settings = [
            f"unit.max_images={self.max_images}",
            f"commit.every_images={self.every_images}",
            "model.min_size_px=64",
            "model.max_size_px=96",
            "model.max_detections=5",
            # One thread each: the drivers of a test, and the tests of a machine, share few cores.
            "pool.cpus_per_actor=1",
            *self.settings,
        ]
        uris = ["--source", self.source, "--model", "demo", "--lake", self.lake]
        return ["infer", *uris, "--json", *(word for setting in settings for word in ("--set", setting))]

    @property
    def most_repeated(self) -> int:
        """Images that one kill of a driver without Ray may waste: a commit interval and a unit in flight."""
        return self.every_images - 1 + self.max_images


@dataclass(frozen=True)
class Ended:
    """How a driver ended. status: as a shell has it, less than 0 for a signal."""

    pid: int
    status: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        """What --json printed."""
        summary: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return summary

    @property
    def last_line(self) -> str:
        return (self.stderr.splitlines() or [""])[-1]

    def check_clear_end(self, *statuses: int) -> None:
        """It gave up as a command should: with one of the statuses, one line that says why, no traceback."""
        assert self.status in statuses, f"status {self.status}, wanted {statuses}: {self.stderr}"
        assert "Traceback" not in self.stderr, self.stderr
        assert [line for line in self.stderr.splitlines() if line.startswith("masklake: ")] == [
            self.last_line
        ], self.stderr


class Driver:
    """A process of the fork server."""

    def __init__(self, drivers: Drivers, pid: int, stdout: Path, stderr: Path) -> None:
        self.pid = pid
        self._drivers = drivers
        self._stdout = stdout
        self._stderr = stderr

    def signal(self, number: int) -> bool:
        """False where it has ended."""
        return self._drivers.signal(self.pid, number)

    def wait(self, timeout_s: float = DRIVER_TIMEOUT_S) -> Ended:
        """Raises TimeoutError, after a SIGKILL, for a driver that hangs."""
        try:
            status = self._drivers.wait(self.pid, timeout_s)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            self._drivers.wait(self.pid, 10)
            raise TimeoutError(f"a driver hung: {self._stderr.read_text()}") from None
        return Ended(self.pid, status, self._stdout.read_text(), self._stderr.read_text())

    def wait_stopped(self, timeout_s: float = DRIVER_TIMEOUT_S) -> None:
        """Until it was stopped by SIGSTOP."""
        deadline = time.monotonic() + timeout_s
        while (state := process_state(self.pid)) != "T":
            assert state not in ("", "Z"), f"it ended before: {self.wait()}"
            assert time.monotonic() < deadline, "it does not stop"
            time.sleep(0.01)

    def children(self) -> list[int]:
        """Processes of its session that are alive."""
        return [pid for pid in processes() if pid != self.pid and _session(pid) == self.pid]


class Drivers:
    """Handle on straight_driver's server, in whose process group nothing else is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))},
            **CREDENTIALS,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.straight_driver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            cwd=folder,
            text=True,
        )
        self._changed = threading.Condition()
        self._started: list[int] = []
        self._ended = False
        self._statuses: dict[int, int] = {}
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def start(self, job: Command, env: Mapping[str, str] | None = None) -> Driver:
        assert self._server.stdin is not None
        self._count += 1
        stdout, stderr = (self._folder / f"driver-{self._count:04d}.{name}" for name in ("out", "err"))
        request = {"argv": job.argv(), "env": dict(env or {}), "stdout": str(stdout), "stderr": str(stderr)}
        with self._changed:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            self._changed.wait_for(lambda: self._started or self._ended, DRIVER_TIMEOUT_S)
            assert self._started, "the fork server does not answer"
            return Driver(self, self._started.pop(), stdout, stderr)

    def run(self, job: Command, env: Mapping[str, str] | None = None) -> Ended:
        return self.start(job, env).wait()

    def wait(self, pid: int, timeout_s: float) -> int:
        with self._changed:
            if not self._changed.wait_for(lambda: pid in self._statuses, timeout_s):
                raise TimeoutError
            return os.waitstatus_to_exitcode(self._statuses[pid])

    def signal(self, pid: int, number: int) -> bool:
        with self._changed:  # an ended driver's pid may be another's
            if pid in self._statuses:
                return False
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return False
            return True

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(30)
        self._reader.join()
        self._server.stdout.close()

    def _listen(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            said = json.loads(line)
            with self._changed:
                if "status" in said:
                    self._statuses[said["pid"]] = said["status"]
                else:
                    self._statuses.pop(said["pid"], None)  # a pid comes round again
                    self._started.append(said["pid"])
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "masklake-tests",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@dataclass(frozen=True)
class Kill:
    """One SIGKILL of a driver: at a failpoint, or so many seconds after its start."""

    failpoint: str | None
    after_s: float

    def __str__(self) -> str:
        return self.failpoint or f"{self.after_s:.2f}s"


@dataclass(frozen=True)
class Schedule:
    """A job and the kills of its drivers, one each."""

    seed: int
    form: str
    num_images: int
    max_images: int
    every_images: int
    kills: tuple[Kill, ...]

    @classmethod
    def draw(cls, seed: int, seconds: float) -> Schedule:
        """Args: seconds: what an undisturbed run of 24 images takes; kills fall into that time."""
        rng = random.Random(seed)
        num_images = rng.randint(12, 30)
        every_images = rng.choice([1, 4, 6, 10])

        def kill() -> Kill:
            name = rng.choice([None, None, "unit_finished", "commit_send", "commit_put", "commit_done"])
            nth = rng.randint(1, 6 if name == "unit_finished" else 3)
            after_s = rng.uniform(0, 0.9 * seconds * num_images / 24)
            return Kill(None if name is None else f"{name}#{nth}", after_s)

        return cls(
            seed,
            rng.choice(FORMS),
            num_images,
            rng.choice([1, 2, 3, 5]),
            every_images,
            tuple(kill() for _ in range(rng.randint(1, 4))),
        )


@dataclass
class Outcome:
    """What a schedule led to."""

    reruns: int = 0
    num_killed: int = 0
    repeated: int = 0  # labelled, killed before the commit, and labelled again
    problems: list[str] = field(default_factory=list)


def run_schedule(
    drivers: Drivers,
    job: Job,
    kills: tuple[Kill, ...],
    journal: Path,
    committed_ids: Callable[[], list[str]],
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Start a driver for each kill, then one that is left alone; compare what each did with the table.

    Args:
        committed_ids: reads the image ids of the table.
        env: of every driver.
    """
    outcome = Outcome()
    labelled: list[str] = []
    for kill in (*kills, None):
        committed = set(committed_ids())
        driver = drivers.start(
            job,
            {
                **(env or {}),
                "MASKLAKE_CHAOS_JOURNAL": str(journal),
                FAILPOINTS: kill.failpoint if kill and kill.failpoint else "",
            },
        )
        if kill is not None and kill.failpoint is None:
            time.sleep(kill.after_s)
            driver.signal(signal.SIGKILL)
        ended = driver.wait()
        outcome.num_killed += ended.status == -signal.SIGKILL
        outcome.reruns += kill is not None
        if ended.status not in (0, -signal.SIGKILL):
            outcome.problems.append(f"a driver ended with {ended.status}: {ended.stderr}")
        if left := _survivors(driver):
            outcome.problems.append(f"processes outlive their driver: {left}")
        mine = journal_of(journal, ended.pid)
        if again := committed & set(mine):
            outcome.problems.append(f"{len(again)} committed images were labelled again: {sorted(again)[:3]}")
        labelled += mine
        journal.unlink(missing_ok=True)  # the next driver may have the same pid
        wasted = len(set(mine) - set(committed_ids()))
        if wasted > job.most_repeated:
            outcome.problems.append(f"{kill} wasted {wasted} images, more than {job.most_repeated}")
    outcome.repeated = len(labelled) - len(set(labelled))
    return outcome


def _survivors(driver: Driver, timeout_s: float = 5.0) -> list[int]:
    """Its children, if they do not end by themselves soon after it."""
    deadline = time.monotonic() + timeout_s
    while (left := driver.children()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def journal_of(journal: Path, pid: int) -> list[str]:
    """The images that a driver went to label, in order."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    entries = [json.loads(line) for line in lines]
    return [image for entry in entries if entry["pid"] == pid for image in entry["images"]]


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def process_state(pid: int) -> str:
    """One letter as ps shows it, "" where there is no such process."""
    return (_stat(pid) or [""])[0]


def parent(pid: int) -> int:
    return int((_stat(pid) or ["", "0"])[1])


def _session(pid: int) -> int:
    """0 where there is no such process, or only what is left of it."""
    fields = _stat(pid)
    return 0 if not fields or fields[0] in "ZX" else int(fields[3])


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the third field on: state, parent, group, session, …"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
