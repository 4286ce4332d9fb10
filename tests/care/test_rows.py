"""What can be wrong with a row, jobs/care/rows.py."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from jobs.care.rows import detection_faults, flat_faults

MakeRows = Callable[..., pa.Table]


def faults(rows: pa.Table) -> dict[str, list[int]]:
    """Kinds of faults that rows have, and which rows."""
    found = [*flat_faults(rows), *detection_faults(rows)]
    return {kind: places.tolist() for kind, places in found if len(places)}


def test_sound_rows_have_no_faults(make_rows: MakeRows) -> None:
    rows = make_rows(list("abcd"), failed={"b": "corrupt"}, removed=["c"])
    assert faults(rows) == faults(rows.slice(0, 0)) == faults(rows.slice(1, 2)) == {}
    assert faults(pa.concat_tables([rows, rows])) == {}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"status": "done"}, "status is none of"),
        ({"detections": None}, "ok without detections"),
        ({"width": None}, "ok without width"),
        ({"content_hash": None}, "ok without content_hash"),
        ({"num_detections": 3}, "num_detections is not their number"),
        ({"error_kind": "io"}, "error_kind though not failed"),
        ({"max_score": None}, "max_score is null"),
        ({"max_score": 0.5}, "max_score is not the best score"),
        ({"height": 7}, "a mask of another size"),
        ({"score": 0.25, "max_score": 0.25}, "not best score first"),
        ({"score": float("nan")}, "a score outside 0 to 1"),
        ({"box": {"x0": 2.0, "y0": 1.0, "x1": 8.5, "y1": 3.0}}, "not inside its image"),
        ({"box": {"x0": 4.0, "y0": 1.0, "x1": 2.0, "y1": 3.0}}, "not inside its image"),
        ({"area": 5}, "an area that is not its mask's"),
        ({"rle": b"no rle"}, "a mask that does not decode"),
    ],
)
def test_a_row_that_cannot_be_is_found(changes: dict[str, Any], problem: str, make_rows: MakeRows) -> None:
    rows = pa.concat_tables([make_rows(["x"]), make_rows(["a", "b"], changes=changes)])
    kinds = {kind: places for kind, places in faults(rows).items() if problem in kind}
    assert [set(places) for places in kinds.values()] == [{1}]


def test_a_failed_row_says_why_and_has_no_labels(make_rows: MakeRows) -> None:
    changes = {"error_kind": "bad luck", "error": None, "num_detections": 0}
    assert faults(make_rows(["a", "b"], failed={"a": "io"}, changes=changes)) == {
        "failed without error": [0],
        "num_detections though not ok": [0],
        "unknown error_kind": [0],
    }
