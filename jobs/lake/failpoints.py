"""Failpoints: places where a test lets a process die, hang or run out of memory, as chance would.

MASKLAKE_FAILPOINTS names them: "commit_put#2" kills the process the second time it gets there,
"label_image=a.jpg:hang" hangs it at that image. Several are separated by commas. Unset, which is how it is
outside tests, a failpoint does nothing.

    unit_finished     the driver has a unit's fragment, written and not committed
    commit_send       a commit is about to be sent
    commit_put        its put went through, and nothing was done with the answer yet
    commit_done       it is in the books
    rewrite_send      a version that replaces small files by a large one is about to be sent
    rewrite_put       its put went through
    retire_send       a version without the files of retired models is about to be sent
    retire_put        its put went through
    current_send      a promotion or rollback is about to be sent
    current_put       its put went through
    gate_compared     two models were compared, and the gate did not judge yet
    decode_image      an image is about to be decoded, in the process that decodes; detail: image_id
    label_image       a decoded image is about to go through the network, in the actor; detail: image_id
"""

import os
import re
import signal
import threading
import time
from collections import Counter
from typing import Final

VARIABLE: Final = "MASKLAKE_FAILPOINTS"
_ENTRY = re.compile(
    r"(?P<name>[a-z_]+)(=(?P<detail>[^#:,]*))?(#(?P<nth>\d+))?(:(?P<action>kill|hang|memory))?"
)
_reached: Counter[str] = Counter()
_lock = threading.Lock()


def reach(name: str, detail: str = "") -> None:
    """Do what MASKLAKE_FAILPOINTS wants to happen here; counted by name in each process."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    with _lock:
        _reached[name] += 1
    for entry in wanted.split(","):
        match = _ENTRY.fullmatch(entry.strip())
        if match is None:
            raise ValueError(f"{VARIABLE}: {entry!r} is no failpoint, wanted NAME[=DETAIL][#NTH][:ACTION]")
        at_detail = match["detail"] in (None, detail)
        at_count = match["nth"] is None or int(match["nth"]) == _reached[name]
        if match["name"] == name and at_detail and at_count:
            _act(match["action"] or "kill")


def _act(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    hoard = []
    while True:  # until somebody ends this process, or the machine refuses more memory
        if action == "memory":
            hoard.append(bytes(64 << 20))
        else:
            time.sleep(1)
