"""What a diff leaves for people, jobs/relabel/diff_report.py."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from jobs.relabel.diff import diff_models
from jobs.relabel.diff_report import report_text, write_diff_report
from jobs.relabel.gate import judge
from schemas.gate_spec import GateSpec
from schemas.specs import SourceSpec
from tests.relabel.two_models import HEIGHT, NEW, OLD, WIDTH, add_rows, found, label_rows

BOX = (4, 4, 40, 40)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three grey images: a.png, b.png, c.png."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abc":
        Image.new("RGB", (WIDTH, HEIGHT), (90, 90, 90)).save(folder / f"{name}.png")
    return folder


def test_the_worst_images_are_drawn_old_beside_new(
    table: LabelsTable, storage: Storage, photos: Path, tmp_path: Path
) -> None:
    source = f"file://{photos}"
    old = {"a.png": [found(1, BOX)], "b.png": [found(1, BOX)], "c.png": [found(1, BOX)]}
    new = old | {"b.png": [], "gone.png": []}
    older = label_rows({"b.png": []}, OLD, source=source, at_s=-9)
    add_rows(table, storage, older)
    add_rows(
        table,
        storage,
        label_rows(old | {"gone.png": [found(1, BOX), found(1, (41, 41, 59, 59))]}, OLD, source=source),
        label_rows(new, NEW, source=source),
    )
    diff = diff_models(table, storage, source, OLD, NEW, num_threads=1)
    results = judge(diff, GateSpec(max_lost=0.1))
    out = tmp_path / "out"
    path = write_diff_report(str(out), storage, diff, table, SourceSpec(uri=source), results, (0.4, 0.3))
    assert path == f"file://{out}/diff.md"
    assert sorted(file.name for file in out.iterdir()) == ["diff.json", "diff.md", "worst-01.png"]

    text = (out / "diff.md").read_text()
    assert "1. gone.png – 2 objects became 0: 2 lost" in text
    assert "2. b.png – 1 object became 0: 1 lost\n\n   ![old and new labels](worst-01.png)" in text
    assert "| max\\_lost | FAILED |" in text
    assert "Mask AP: 0.400 old, 0.300 new." in text
    assert "| all | 5 | 2 | 60.0% | 0.0% | 0.0% | 0.0% | 1.000 |" in text

    facts = json.loads((out / "diff.json").read_text())
    assert (facts["total"]["lost"], facts["ap"], facts["rules"][0]["passed"]) == (3, [0.4, 0.3], False)
    with Image.open(out / "worst-01.png") as picture:
        pixels = np.asarray(picture).astype(int)
    half = (pixels.shape[1] - 8) // 2
    assert np.ptp(pixels[:, :half], axis=(0, 1)).max() > 100  # the old object
    assert np.ptp(pixels[:, -half:], axis=(0, 1)).max() == 0  # nothing


def test_without_its_images_the_report_says_why(table: LabelsTable, storage: Storage, tmp_path: Path) -> None:
    source = f"file://{tmp_path}/nowhere"
    add_rows(
        table,
        storage,
        label_rows({"a.png": [found(1, BOX)]}, OLD, source=source),
        label_rows({"a.png": []}, NEW, source=source),
    )
    diff = diff_models(table, storage, source, OLD, NEW, num_threads=1)
    out = tmp_path / "out"
    write_diff_report(str(out), storage, diff, table, SourceSpec(uri=source))
    text = (out / "diff.md").read_text()
    assert "The images could not be drawn: source " in text
    assert "1. a.png – 1 object became 0: 1 lost" in text


def test_names_are_text_and_never_markup(table: LabelsTable, storage: Storage) -> None:
    image_id = "a|b](http://evil.example) <img src=x>`\n# c"
    old_name, new_name = "lite|*x*-000000000000", "<b>lite-111111111111"
    add_rows(
        table,
        storage,
        label_rows({image_id: [found(1, BOX)]}, old_name),
        label_rows({image_id: []}, new_name),
    )
    diff = diff_models(table, storage, "s3://photos/2026", old_name, new_name, num_threads=1)
    text = report_text(diff)
    assert "a\\|b\\](http\\://evil.example) &lt;img src=x&gt;\\` \\# c" in text
    assert "&lt;b&gt;lite-111111111111" in text
    assert "lite\\|\\*x\\*" in text


def test_models_that_agree_have_no_worst_image(table: LabelsTable, storage: Storage) -> None:
    images = {"a.png": [found(1, BOX)]}
    add_rows(table, storage, label_rows(images, OLD), label_rows(images, NEW))
    diff = diff_models(table, storage, "s3://photos/2026", OLD, NEW, num_threads=1)
    assert report_text(diff).endswith("## Images that differ most\n\nNone differs.\n")
