import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from jobs.infer.label import Labeler, Replica
from jobs.infer.rows import Lineage
from jobs.infer.units import UnitReport, read_row, table_from_bytes
from jobs.lake.sources import SourceImage
from maskrcnn_core.checkpoint import dump_checkpoint
from maskrcnn_core.config import lite
from maskrcnn_core.model import build_model
from maskrcnn_core.predictor import Predictor
from schemas.labels import ErrorKind


@pytest.fixture(scope="module")
def labeler() -> Labeler:
    config = lite(((1, "a"),)).replace(min_size_px=64, max_size_px=96, score_threshold=0.2, rpn_post_nms=20)
    checkpoint = dump_checkpoint(build_model(config, seed=0), "tiny")
    replica = Replica({}, "cpu", "fp32", batch_size=2, threads=1)
    return Labeler(checkpoint, replica, Lineage("source", "tiny-1", "run"), node="here")


def jpeg(seed: int) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


def images(num: int) -> list[SourceImage]:
    return [SourceImage(f"i{n}", "shard", jpeg(n), None, None) for n in range(num)]


def test_a_unit_comes_back_as_rows_in_order_with_its_figures(labeler: Labeler) -> None:
    sent = [*images(5), SourceImage("gone", "shard", None, ErrorKind.MISSING, "not there")]
    out = labeler(read_row("u", UnitReport("shard", num_images=6), sent))
    rows = table_from_bytes(out["rows"][0].as_buffer())
    assert rows["image_id"].to_pylist() == [i.image_id for i in sent]
    assert rows["status"].to_pylist() == ["ok"] * 5 + ["failed"]
    report = UnitReport.from_json(out["report"][0].as_py())
    assert report.failed == {"missing": 1}
    assert report.num_detections == sum(n or 0 for n in rows["num_detections"].to_pylist())
    assert report.node == "here"
    assert report.label_s > 0


def test_an_image_that_breaks_the_network_fails_alone(
    labeler: Labeler, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Callable[..., object] = Predictor.predict
    bad = jpeg(1)

    def predict(self: Predictor, pixels: list[np.ndarray]) -> object:
        decoded = np.asarray(Image.open(io.BytesIO(bad)))
        if any(np.array_equal(p, decoded) for p in pixels):
            raise RuntimeError("out of memory\nsecond line")
        return whole(self, pixels)

    monkeypatch.setattr(Predictor, "predict", predict)
    out = labeler(read_row("u", UnitReport("shard", num_images=4), images(4)))
    rows = table_from_bytes(out["rows"][0].as_buffer()).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "failed", "ok", "ok"]
    assert rows[1]["error_kind"] == "internal"
    assert rows[1]["error"] == "the network failed on this 64x48 image: out of memory"


def test_a_unit_without_images_passes_through(labeler: Labeler) -> None:
    out = labeler(read_row("end", UnitReport("shard", shard_num_images=9), []))
    assert table_from_bytes(out["rows"][0].as_buffer()).num_rows == 0
    assert UnitReport.from_json(out["report"][0].as_py()).shard_num_images == 9
