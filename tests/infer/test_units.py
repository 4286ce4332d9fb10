"""What travels between the stages, jobs/infer/units.py."""

from __future__ import annotations

import pytest

from jobs.infer.units import UnitReport, images_of, read_row
from jobs.lake.sources import SourceImage
from schemas.labels import ErrorKind

GOOD = SourceImage("a", "shard", b"bytes", None, None)
EMPTY = SourceImage("b", "shard", b"", None, None)
UNREAD = SourceImage("c", "shard", None, ErrorKind.MISSING, "it is gone")


@pytest.mark.parametrize("images", [[], [UNREAD], [GOOD], [EMPTY, GOOD, UNREAD, EMPTY]])
def test_images_arrive_as_they_were_sent(images: list[SourceImage]) -> None:
    row = read_row("unit", UnitReport("shard"), images)
    row.validate(full=True)
    assert row.num_rows == 1
    assert list(images_of(row)) == images
