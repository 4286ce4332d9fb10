"""Training sets: sorted, read at random, the same for the same data, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs.train.coco_json import CocoJson, read_categories
from jobs.train.image_locations import ImageReader
from jobs.train.training_set import TrainingSet, build
from maskrcnn_core.images import decode_image
from schemas.errors import UsageError
from schemas.specs import SourceSpec
from tests.lake.tars import make_tar
from tests.train.coco_files import (
    annotation,
    image,
    make_set,
    picture,
    storage,
    write_files,
    write_json,
)


def test_images_are_sorted_by_name_and_found_again_at_random(tmp_path: Path) -> None:
    """More images than a record batch holds, annotations in no order."""
    images = [image(n, f"{n:03d}.png", width=30 + n % 7) for n in range(300)]
    annotations = [annotation(n, bbox=[2, 3, 1 + k, 9]) for k in range(3) for n in range(299, -1, -2)]
    write_files(tmp_path / "images", {i["file_name"]: b"" for i in images})
    made = make_set(tmp_path, images[::-1], annotations)
    assert len(made) == 300
    assert [made.name(k) for k in (0, 255, 256, 299)] == ["000.png", "255.png", "256.png", "299.png"]
    assert made.sizes[:8].tolist() == [[20, 30 + n % 7] for n in range(8)]
    for k in (299, 0, 257, 256, 255, 1):
        known = made.annotations(k)
        assert (known.height, known.width) == tuple(made.sizes[k])
        assert known.boxes[:, 2].tolist() == ([3, 4, 5] if k % 2 else [])
        assert made.location(k).info.uri.endswith(f"/{k:03d}.png")
    with pytest.raises(IndexError):
        made.annotations(300)


def test_an_opened_set_knows_what_it_was_made_of(tmp_path: Path) -> None:
    made = make_set(tmp_path, [image(1)], [annotation(1), annotation(1, category_id=99)])
    again = TrainingSet(made.path)
    assert again.fingerprint == made.fingerprint
    assert again.problems == {"unknown_category": 1}
    assert again.description == {
        "coco": f"file://{tmp_path}/instances.json",
        "images": f"file://{tmp_path}/images",
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".building")] == []


def test_the_fingerprint_is_that_of_the_annotations_wherever_and_in_whatever_order(tmp_path: Path) -> None:
    images = [image(1), image(2)]
    first = make_set(tmp_path / "a", images, [annotation(1), annotation(2, category_id=7)])
    moved = make_set(tmp_path / "b", images[::-1], [annotation(2, category_id=7), annotation(1)])
    other = make_set(tmp_path / "c", images, [annotation(1), annotation(2, bbox=[2, 3, 10, 10.5])])
    assert first.fingerprint == moved.fingerprint != other.fingerprint


def test_images_without_annotations_stay_unless_they_are_to_be_dropped(tmp_path: Path) -> None:
    images = [image(1), image(2)]
    assert len(make_set(tmp_path, images, [annotation(2)])) == 2
    dropped = make_set(tmp_path, images, [annotation(2)], drop_empty=True)
    assert [dropped.name(k) for k in range(len(dropped))] == ["2.png"]


def test_a_set_of_nothing_is_refused_saying_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"1 images with no instance; left out: unknown_category \(1\)"):
        make_set(tmp_path, [image(1)], [annotation(1, category_id=99)])


def test_a_file_that_is_no_training_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.arrow"
    with pytest.raises(UsageError, match="is not a training set"):
        TrainingSet(path)
    path.write_bytes(b"ARROW1")
    with pytest.raises(UsageError, match="is not a training set"):
        TrainingSet(path)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("a", pa.int32())])) as writer:
        writer.write_batch(pa.RecordBatch.from_pydict({"a": pa.array([1], pa.int32())}))
    with pytest.raises(UsageError, match="is not a training set"):
        TrainingSet(path)


def test_images_are_found_in_shards_by_name_where_names_are_unique(tmp_path: Path) -> None:
    shards = {
        "one.tar": make_tar({"a/1.png": picture(1), "a/2.png": picture(2)}),
        "two.tar": make_tar({"b/2.png": picture(2), "b/3.png": picture(3)}),
    }
    write_files(tmp_path / "images", shards)
    images = [image(1, "1.png"), image(2, "2.png"), image(3, "somewhere/3.png"), image(4, "else/3.png")]
    made = make_set(tmp_path, images[:3], [annotation(1), annotation(3)])
    assert made.problems == {"ambiguous_image": 1}
    assert [made.name(k) for k in range(2)] == ["1.png", "somewhere/3.png"]
    pixels = decode_image(ImageReader(storage()).read(made.location(1)))
    assert (pixels == decode_image(picture(3))).all()
    # Neither of two images of one name is given another's file.
    made = make_set(tmp_path, images, [annotation(1)])
    assert made.problems == {"ambiguous_image": 3}


@pytest.mark.parametrize(
    ("annotations", "images", "num_images", "num_instances", "num_ignored"),
    [
        pytest.param(
            "facades/annotations/instances_train.json",
            "facades/train",
            407,
            12_625,
            0,
            marks=pytest.mark.slow,
        ),
        ("coco_photos/annotations/instances_train2017.json", "coco_photos/train2017", 54, 388, 5),
        ("coco_photos/annotations/instances_val2017.json", "coco_photos", 45, 405, 6),
    ],
)
def test_real_instances_are_taken_whole(
    tmp_path: Path,
    shared_data: Path,
    annotations: str,
    images: str,
    num_images: int,
    num_instances: int,
    num_ignored: int,
) -> None:
    path, pictures = shared_data / annotations, shared_data / images
    truth = json.loads(path.read_text())
    records = CocoJson(str(path), SourceSpec(uri=str(pictures)), storage())
    made = build(tmp_path / "set.arrow", records, read_categories(str(path), storage()), storage())
    assert made.problems == {}
    assert len(made) == num_images == len(truth["images"])
    known = [made.annotations(k) for k in range(len(made))]
    assert sum(len(one.rles) for one in known) == num_instances
    assert sum(int(one.ignored.sum()) for one in known) == num_ignored
    assert decode_image(ImageReader(storage()).read(made.location(3))).shape[:2] == tuple(made.sizes[3])


@pytest.mark.slow
def test_a_build_takes_little_memory_whatever_the_size_of_the_json(tmp_path: Path) -> None:
    """200,000 annotations in no order, in a process of its own; what its imports take is not counted."""
    num_images = 20_000
    write_files(tmp_path / "images", {f"{n:05d}.png": b"" for n in range(num_images)})
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = [np.stack((7 + 5 * np.cos(angles), 8 + 5 * np.sin(angles)), axis=1).ravel().tolist()]
    annotations = [annotation(n * 7919 % num_images, id=n, segmentation=circle) for n in range(200_000)]
    path = write_json(tmp_path, [image(n, f"{n:05d}.png") for n in range(num_images)], annotations)
    assert path.stat().st_size > 120e6
    script = f"""
import resource
from pathlib import Path
from jobs.train.coco_json import CocoJson
from jobs.train.training_set import build
from schemas.specs import SourceSpec
from tests.train.coco_files import CATEGORIES, storage
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
records = CocoJson({str(path)!r}, SourceSpec(uri={str(tmp_path / "images")!r}), storage())
made = build(Path({str(tmp_path / "set.arrow")!r}), records, CATEGORIES, storage(), memory_bytes=256 << 20)
print(len(made), sum(made.problems.values()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stderr
    images, problems, growth_kib = map(int, done.stdout.split())
    assert (images, problems) == (num_images, 0)
    assert growth_kib < 600 << 10
