"""What a run did, as kept in <lake>/runs/<run_id>/summary.json and printed by --json."""

from __future__ import annotations

import json
import platform
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from jobs.infer.units import UnitReport

_VERSIONED = ("masklake", "ray", "torch", "torchvision", "pyarrow", "deltalake")


@dataclass
class Summary:
    """Counts are of this run; seconds of a stage are summed over its workers."""

    run_id: str
    model_id: str
    source: str
    lake: str
    status: str = "running"  # done | limited | nothing_to_do | interrupted | failed
    images: int = 0
    ok: int = 0
    failed: int = 0
    unchanged: int = 0  # read because their object is another, and found to be what they were
    failed_by_kind: dict[str, int] = field(default_factory=dict)
    images_by_node: dict[str, int] = field(default_factory=dict)
    detections: int = 0
    encoded_bytes: int = 0
    shards: int = 0
    unread_shards: dict[str, str] = field(default_factory=dict)  # name -> why
    committed_images: int = 0
    committed_version: int | None = None
    commits: int = 0
    merged_files: int = 0  # small ones, into larger ones, at the end of the run
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    actors: int = 0
    precision: str = ""
    device: str = ""
    error: str | None = None

    def add(self, report: UnitReport) -> None:
        """Count a finished unit."""
        self.images += report.num_images
        self.failed += report.num_failed
        self.ok = self.images - self.failed
        self.unchanged += len(report.unchanged)
        self.failed_by_kind = dict(Counter(self.failed_by_kind) + Counter(report.failed))
        if report.num_images:
            self.images_by_node[report.node] = self.images_by_node.get(report.node, 0) + report.num_images
        self.detections += report.num_detections
        self.encoded_bytes += report.encoded_bytes
        for stage in ("read", "decode", "label", "write"):
            spent = self.stage_seconds.get(stage, 0.0) + getattr(report, f"{stage}_s")
            self.stage_seconds[stage] = spent
        if report.shard_error is not None:
            self.unread_shards[report.shard] = report.shard_error

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with rates and versions; a rate is null where its stage took no time."""
        rates = {
            f"{stage}_images_per_s": round(self.images / seconds, 3) if seconds > 0 else None
            for stage, seconds in self.stage_seconds.items()
        }
        return {
            **asdict(self),
            "seconds": round(self.seconds, 3),
            "stage_seconds": {stage: round(spent, 3) for stage, spent in self.stage_seconds.items()},
            "images_per_s": round(self.images / self.seconds, 3) if self.seconds > 0 else None,
            "stage_rates": rates,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in _VERSIONED},
        }

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self.to_dict())
