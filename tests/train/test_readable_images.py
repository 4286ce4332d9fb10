"""Whether the images of a set can be read, jobs/train/readable_images.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.train.image_locations import ImageReader
from jobs.train.readable_images import check_images
from jobs.train.training_set import TrainingSet
from schemas.errors import UsageError
from tests.train.coco_files import annotation, image, make_set, picture, storage, write_files


def set_of(folder: Path, contents: list[bytes]) -> TrainingSet:
    write_files(folder / "images", {f"{n:02d}.png": content for n, content in enumerate(contents)})
    images = [image(n, f"{n:02d}.png") for n in range(len(contents))]
    return make_set(folder, images, [annotation(0)])


def check(data: TrainingSet, *, strict: bool = False) -> None:
    check_images("people", data, ImageReader(storage()), strict=strict)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"no picture", "unsupported"), (picture(0, 10, 10), "another_size .it has 10×10 pixels, its annotati")],
)
def test_a_set_of_which_no_image_can_be_read_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    data = set_of(tmp_path, [content] * 40)
    with pytest.raises(UsageError, match=f"people: 16 of 16 images that were tried .* 00.png: {problem}"):
        check(data)


def test_one_bad_image_is_refused_if_strict_only(tmp_path: Path) -> None:
    data = set_of(tmp_path, [picture(n) for n in range(5)] + [b"no picture"])
    check(data)
    with pytest.raises(UsageError, match=r"1 of 6 images that were tried cannot be read, first 05\.png"):
        check(data, strict=True)
