from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from jobs.infer.rows import Failure, Lineage, label_rows
from jobs.infer.units import UnitReport, images_of, read_row, table_from_bytes, table_to_bytes
from jobs.lake.shards import content_hash
from jobs.lake.sources import SourceImage
from maskrcnn_core.predictor import Detections
from schemas.labels import LABEL_SCHEMA, ErrorKind

LINEAGE = Lineage("file:///images", "tiny-0123456789ab", "run-1", datetime(2026, 1, 1, tzinfo=UTC))
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def image(name: str, data: bytes | None = b"encoded") -> SourceImage:
    kind, error = (None, None) if data is not None else (ErrorKind.MISSING, "it is gone")
    return SourceImage(name, "shard.tar", data, kind, error)


def detections(num: int) -> Detections:
    return Detections(
        height=30,
        width=40,
        boxes=np.arange(4 * num, dtype=np.float32).reshape(num, 4),
        scores=np.linspace(0.9, 0.5, num, dtype=np.float32),
        category_ids=np.arange(num, dtype=np.int32),
        rles=[b"rle%d" % i for i in range(num)],
        areas=np.full(num, 7, dtype=np.int32),
    )


def test_rows_say_what_was_found_nothing_found_and_why_not() -> None:
    images = [image("a"), image("b"), image("c", None)]
    outcomes: list[Detections | Failure] = [
        detections(2),
        detections(0),
        Failure(ErrorKind.MISSING, "it is gone"),
    ]
    rows = label_rows(images, outcomes, LINEAGE, NOW)
    assert rows.schema.equals(LABEL_SCHEMA)
    rows.validate(full=True)
    found, empty, failed = rows.to_pylist()
    assert [found["status"], empty["status"], failed["status"]] == ["ok", "ok", "failed"]
    assert found["content_hash"] == content_hash(b"encoded")
    assert (found["width"], found["height"], found["num_detections"]) == (40, 30, 2)
    assert found["max_score"] == np.float32(0.9)
    assert found["detections"][1] == {
        "category_id": 1,
        "score": 0.5,
        "box": {"x0": 4.0, "y0": 5.0, "x1": 6.0, "y1": 7.0},
        "area": 7,
        "rle": b"rle1",
    }
    assert (empty["detections"], empty["num_detections"], empty["max_score"]) == ([], 0, None)
    assert (failed["detections"], failed["num_detections"], failed["width"]) == (None, None, None)
    assert (failed["error_kind"], failed["error"]) == ("missing", "it is gone")


def test_no_image_gives_a_table_without_rows() -> None:
    rows = label_rows([], [], LINEAGE, NOW)
    assert rows.num_rows == 0
    assert rows.schema.equals(LABEL_SCHEMA)


def test_images_travel_through_a_unit_row_unchanged() -> None:
    sent = [image("a"), image("b", b""), image("c", None)]
    row = read_row("unit", UnitReport("shard.tar", num_images=3), sent)
    assert row.num_rows == 1
    assert list(images_of(row)) == sent
    assert list(images_of(pa.concat_tables([row]))) == sent
    assert list(images_of(read_row("end", UnitReport("shard.tar"), []))) == []


def test_tables_and_reports_survive_their_journey() -> None:
    rows = label_rows([image("a")], [detections(3)], LINEAGE, NOW)
    assert table_from_bytes(table_to_bytes(rows)).equals(rows)
    report = UnitReport("shard.tar", num_images=3, failed={"empty": 1}, shard_version="v1")
    assert UnitReport.from_json(report.to_json()) == report
