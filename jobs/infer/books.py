"""The driver's books of a run: which units came, what is committed, which shards are complete.

Enters: finished units, in any order, some perhaps twice. Leaves: commits, and the shards of which every image
is in the table by now. Decides over a Committer and a way to save the shard index that it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jobs.infer.units import UnitReport
from jobs.lake import failpoints
from jobs.lake.commit import Committer
from jobs.lake.fragments import Fragment
from jobs.lake.shard_index import ShardIndex


@dataclass
class _ShardProgress:
    """Units of a shard: taken so far, and how many there are once its last row has come."""

    num_taken: int = 0
    num_units: int | None = None
    version: str | None = None
    num_images: int = 0

    @property
    def is_complete(self) -> bool:
        return self.version is not None and self.num_units == self.num_taken


class Books:
    """Takes what the pipeline finished, commits it, remembers what is complete.

    Args:
        save_index: called after a commit with every complete shard of the run, where there are new ones.
    """

    def __init__(self, committer: Committer, save_index: Callable[[ShardIndex], None]) -> None:
        self._committer = committer
        self._save_index = save_index
        self._open: dict[str, _ShardProgress] = {}
        self._complete: dict[tuple[str, str], int] = {}

    def take(self, report: UnitReport, fragment: Fragment | None) -> bool:
        """Note a unit, or the row without images that closes a shard.

        Returns:
            False where the unit came before: its second fragment stays an orphan, nothing is counted.
        """
        shard = self._open.setdefault(report.shard, _ShardProgress())
        if fragment is not None:
            if not self._committer.add(fragment):
                return False
            failpoints.reach("unit_finished")
            shard.num_taken += 1
        elif report.shard_num_units is not None:
            shard.num_units, shard.version = report.shard_num_units, report.shard_version
            shard.num_images = report.shard_num_images or 0
        return True

    def commit(self) -> int | None:
        """Make what was taken visible, then remember the shards of which that was the last.

        Returns:
            The table's version, None where nothing was waiting.

        Raises:
            MasklakeError: as Committer.commit; no shard is remembered then.
        """
        version = self._committer.commit()
        complete = [name for name, shard in self._open.items() if shard.is_complete]
        for name in complete:
            shard = self._open.pop(name)
            self._complete[name, shard.version or ""] = shard.num_images
        if complete:
            self._save_index(self._complete)
        return version
