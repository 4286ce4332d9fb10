"""A server of drivers: forks, for each line on stdin, a process that runs the command line without Ray.

Enters: JSON lines {argv, env, stdout, stderr}. Leaves: JSON lines {pid} when a driver was started and
{pid, status} when it ended, status as os.waitpid gives it. Importing the network takes seconds, a fork does
not, so dozens of drivers can be killed in a minute. A driver is the product's own, with its own lease, table
and signals; only the stages run one after another in its process instead of in Ray's workers.

What a test may ask for in a driver's environment, besides MASKLAKE_FAILPOINTS:

    MASKLAKE_CHAOS_JOURNAL   file that gets a JSON line {pid, images} before a unit is labelled
    MASKLAKE_CHAOS_STOP      failpoint's name#nth: the driver stops itself there (SIGSTOP)
    MASKLAKE_CHAOS_TTL_S     time to live of its lease
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import selectors
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Generator
from typing import Any

import pyarrow as pa

import jobs.cli
import jobs.infer.run
import jobs.relabel.run
import maskrcnn_core.ops.cpu.nms
import maskrcnn_core.ops.cpu.resize
import maskrcnn_core.ops.cpu.roi_align  # noqa: F401
from jobs.infer.label import Labeler
from jobs.infer.pipeline import FinishedUnit, Pipeline
from jobs.infer.units import images_of
from jobs.lake import failpoints
from tests.straight_pipeline import WITHOUT_RAY, run_straight

_PR_SET_PDEATHSIG = 1


def serve() -> dict[str, Any] | None:
    """Start drivers until stdin ends. Returns in each driver too: with what it was asked for."""
    started: dict[int, int] = {}  # a driver's pidfd -> its pid
    lines = b""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd != 0:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    pid, status = os.waitpid(started.pop(key.fd), 0)
                    _say({"pid": pid, "status": status})
                    continue
                chunk = os.read(0, 1 << 20)
                if not chunk:
                    return None
                *wanted, lines = (lines + chunk).split(b"\n")
                for line in wanted:
                    pid = os.fork()
                    if pid == 0:
                        for pidfd in started:
                            os.close(pidfd)
                        return dict(json.loads(line))
                    pidfd = os.pidfd_open(pid)
                    started[pidfd] = pid
                    selector.register(pidfd, selectors.EVENT_READ)
                    _say({"pid": pid})


def become(wanted: dict[str, Any]) -> None:
    """Turn this fork into the driver that was asked for: a session, output files, environment of its own."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing is left when the tests end
    for fd, path in ((0, os.devnull), (1, wanted["stdout"]), (2, wanted["stderr"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, fd)
        os.close(opened)
    os.environ.update(wanted["env"])
    tempfile.tempdir = None  # TMPDIR may be among them
    sys.argv = ["masklake", *wanted["argv"]]


def patch() -> None:
    """Stages in this process, and what the environment asks for."""
    vars(jobs.infer.run).update(WITHOUT_RAY, run_pipeline=_run_straight)
    vars(jobs.relabel.run).update({name: WITHOUT_RAY[name] for name in ("connect", "shutdown")})
    if ttl_s := os.environ.get("MASKLAKE_CHAOS_TTL_S"):
        jobs.infer.run.LEASE_TTL_S = float(ttl_s)
    if stop := os.environ.get("MASKLAKE_CHAOS_STOP"):
        _stop_at(stop)


def _run_straight(pipeline: Pipeline) -> Generator[FinishedUnit, None, None]:
    return run_straight(pipeline, Labeler(pipeline.checkpoint, pipeline.replica, pipeline.lineage), _note)


def _note(row: pa.Table) -> None:
    if journal := os.environ.get("MASKLAKE_CHAOS_JOURNAL"):
        images = [image.image_id for image in images_of(row)]
        line = json.dumps({"pid": os.getpid(), "images": images}) + "\n"
        descriptor = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(descriptor, line.encode())
        os.close(descriptor)


def _stop_at(place: str) -> None:
    wanted, _, nth = place.partition("#")
    reached: Counter[str] = Counter()
    reach = failpoints.reach

    def reach_or_stop(name: str, detail: str = "") -> None:
        reached[name] += 1
        if name == wanted and reached[name] == int(nth):
            os.kill(os.getpid(), signal.SIGSTOP)
        reach(name, detail)

    failpoints.reach = reach_or_stop


def _say(answer: dict[str, int]) -> None:
    print(json.dumps(answer), flush=True)


def drive() -> int:
    """Be the driver; gives its exit status."""
    try:
        jobs.cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    gc.freeze()  # not collected anew in each fork, nor its memory copied
    request = serve()
    exit_status = 0
    if request is not None:  # a driver
        become(request)
        patch()
        exit_status = drive()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status)  # taking the interpreter apart would take as long as a run
