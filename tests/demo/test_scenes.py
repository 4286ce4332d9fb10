import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from jobs.demo.lake import write_scene_lake
from jobs.demo.scenes import MIN_VISIBLE, SCENE_CATEGORIES, SCENE_SIDE_PX, TRAIN_SEED, render_scene


def test_a_seed_decides_every_pixel() -> None:
    first, second = render_scene(7), render_scene(7)
    assert np.array_equal(first.image, second.image)
    assert not np.array_equal(first.image, render_scene(8).image)


@pytest.mark.parametrize("seed", range(20))
def test_masks_are_visible_disjoint_and_on_the_canvas(seed: int) -> None:
    scene = render_scene(seed)
    assert scene.image.shape == (SCENE_SIDE_PX, SCENE_SIDE_PX, 3)
    assert scene.image.dtype == np.uint8
    assert 1 <= len(scene.instances) <= 6
    covered = np.sum([instance.mask for instance in scene.instances], axis=0)
    assert covered.max() == 1
    assert all(instance.mask.any() for instance in scene.instances)
    assert {i.category_id for i in scene.instances} <= {category_id for category_id, _ in SCENE_CATEGORIES}


def test_every_category_is_drawn_and_often_occluded() -> None:
    scenes = [render_scene(seed) for seed in range(60)]
    drawn = {instance.category_id for scene in scenes for instance in scene.instances}
    assert drawn == {category_id for category_id, _ in SCENE_CATEGORIES}
    assert 0 < MIN_VISIBLE < 1


def test_the_lake_holds_every_scene_with_its_exact_masks(tmp_path: Path) -> None:
    write_scene_lake(tmp_path, range(5), num_shards=2)
    truth = json.loads((tmp_path / "annotations.json").read_text())
    images = {}
    for shard in sorted((tmp_path / "images").iterdir()):
        with tarfile.open(shard) as tar:
            for member in tar:
                data = tar.extractfile(member)
                assert data is not None
                images[member.name] = np.asarray(Image.open(io.BytesIO(data.read())))
    assert len(images) == len(truth["images"]) == 5
    for entry in truth["images"]:
        scene = render_scene(entry["id"])
        assert np.array_equal(images[entry["file_name"]], scene.image)
        annotations = [a for a in truth["annotations"] if a["image_id"] == entry["id"]]
        for annotation, instance in zip(annotations, scene.instances, strict=True):
            decoded = coco_mask.decode(annotation["segmentation"])
            assert np.array_equal(decoded.astype(bool), instance.mask)
            assert annotation["area"] == instance.mask.sum()


def test_no_scene_of_the_demo_is_among_those_to_train_on() -> None:
    assert TRAIN_SEED > 100_000  # the most scenes that `masklake demo` renders
