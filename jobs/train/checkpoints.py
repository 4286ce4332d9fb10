"""The checkpoints of a run: <out>/checkpoints/step-<8 digits>.safetensors, the newest whole one counts.

Enters: snapshots of a run. Leaves: the newest that can be read. An object is put whole or not at all, and its
digest is looked at when it is read, so a driver or a disk that died while writing costs one interval.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from contextlib import suppress

from torch import Tensor

from jobs.lake.storage import MissingObjectError, ObjectInfo, Storage
from jobs.train.state import Progress, TrainingStateError, dump_state, parse_state

_NAME = re.compile(r"/step-(\d{8})\.safetensors$")
_logger = logging.getLogger(__name__)


class Checkpoints:
    """Of one run. One process writes, any may read.

    Args:
        keep: the newest so many stay.

    Attributes:
        whole_step: of the newest that was read or written here as a whole; None: none was.
    """

    def __init__(self, storage: Storage, out_uri: str, keep: int) -> None:
        self._storage = storage
        self._folder = f"{out_uri}/checkpoints"
        self._keep = keep
        self.whole_step: int | None = None
        self._writing: threading.Thread | None = None
        self._error: Exception | None = None

    def newest(self, step: int | None = None) -> tuple[dict[str, Tensor], Progress] | None:
        """The newest whole one, or that of one step; None where there is none.

        Damaged ones are passed over, with a warning.
        """
        for info in reversed(self._list()):
            if step is not None and _step_of(info) != step:
                continue
            try:
                found = parse_state(self._storage.read_bytes(info), info.uri)
                self.whole_step = _step_of(info)
                return found
            except TrainingStateError as error:
                _logger.warning("%s; the one before it is taken", error)
            except MissingObjectError:
                continue  # another process has just removed it
        return None

    def uri_of(self, step: int) -> str:
        """Where the one of a step is, or would be."""
        return f"{self._folder}/step-{step:08d}.safetensors"

    def save(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Write one; remove the oldest, and those of later steps, which the run passed over as damaged."""
        self._storage.write_bytes(self.uri_of(progress.step), dump_state(tensors, progress))
        self.whole_step = progress.step
        steps = {info.uri: _step_of(info) for info in self._list()}
        kept = sorted(step for step in steps.values() if step <= progress.step)[-self._keep :]
        for old, step in steps.items():
            if step not in kept:
                self._storage.delete(old)

    def save_behind(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """The same, beside the training; waits for the one before.

        Raises:
            StorageError: the one before could not be written.
        """
        self.wait()
        self._writing = threading.Thread(target=self._try_to_save, args=(tensors, progress), daemon=True)
        self._writing.start()

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and self._writing.is_alive()

    def wait(self) -> None:
        """Until what is being written is written.

        Raises:
            StorageError: it could not be.
        """
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _try_to_save(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        try:
            self.save(tensors, progress)
        except Exception as error:  # handed to the thread that trains
            self._error = error

    def _list(self) -> list[ObjectInfo]:
        """By step, the oldest first."""
        found: list[ObjectInfo] = []
        with suppress(MissingObjectError):  # on a disk there is no folder before the first
            found.extend(info for info in self._storage.list(self._folder) if _NAME.search(info.uri))
        return sorted(found, key=_step_of)


def _step_of(info: ObjectInfo) -> int:
    match = _NAME.search(info.uri)
    assert match is not None
    return int(match[1])
