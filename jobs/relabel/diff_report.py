"""What a diff leaves for people to read: diff.md, diff.json, and pictures of the images that differ most.

Enters: a LabelDiff, the source of its images, the table. Leaves: files in a folder. Names of categories,
models and images are others' and are escaped: none can become markup, a web link, or another row of a table.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset as pads
from PIL import Image

from jobs.lake.labels_table import LabelsTable
from jobs.lake.sources import ShardReader, list_shards
from jobs.lake.storage import Storage
from jobs.relabel.diff import MOVED_BELOW, LabelDiff
from jobs.relabel.diff_words import OBJECT_HEAD, image_lines, object_rows, why
from jobs.relabel.gate import RuleResult
from jobs.report.overlay import draw_detections
from jobs.train.report import escape
from maskrcnn_core.images import DecodeError, decode_image
from schemas.errors import MasklakeError
from schemas.specs import SourceSpec

pc: Any = pyarrow.compute  # whose stubs know no arrays of unknown type
_MAX_CATEGORIES = 100
_MAX_RENAMED = 20
_GAP_PX = 8

Labels = Mapping[str, Mapping[str, Any]]  # image_id -> shard, detections


def write_diff_report(
    out_uri: str,
    storage: Storage,
    diff: LabelDiff,
    table: LabelsTable,
    source: SourceSpec,
    results: Sequence[RuleResult] = (),
    aps: tuple[float, float] | None = None,
) -> str:
    """Make or replace the files; returns the URI of diff.md, which is written last.

    Args:
        table: the one that the diff was made from.
        source: where the images are; without them the report says why and has no pictures.
        results: of a gate. aps: mask AP of the old and of the new labels.

    Raises:
        StorageError: the store refused a file of the report.
    """
    folder = storage.normalize(out_uri)
    pictures: dict[str, str] = {}
    trouble = None
    try:
        for number, (image_id, picture) in enumerate(_pictures(diff, table, source, storage), 1):
            name = f"worst-{number:02d}.png"
            storage.write_bytes(f"{folder}/{name}", picture)
            pictures[image_id] = name
    except MasklakeError as error:
        trouble = str(error)
    facts = diff.to_dict() | {"ap": None if aps is None else list(aps), "rules": [vars(r) for r in results]}
    storage.write_bytes(f"{folder}/diff.json", json.dumps(facts, indent=1).encode())
    text = report_text(diff, results, aps, pictures, trouble)
    storage.write_bytes(f"{folder}/diff.md", text.encode())
    return f"{folder}/diff.md"


def report_text(
    diff: LabelDiff,
    results: Sequence[RuleResult] = (),
    aps: tuple[float, float] | None = None,
    pictures: Mapping[str, str] | None = None,
    trouble: str | None = None,
) -> str:
    """Markdown, as GitHub and CommonMark read it.

    Args:
        pictures: image_id -> file beside the report. trouble: why there are not all of them.
    """
    overlap = "masks" if diff.masks else "boxes"
    lines = [
        f"# Labels of {escape(diff.new_model_id)} beside those of {escape(diff.old_model_id)}",
        "",
        f"Source {escape(diff.source)}, table version {diff.version}. Objects are detections with a score of "
        f"{diff.min_score:g} or more; two are the same where the IoU of their boxes is {diff.match_iou:g} or "
        f"more. IoUs below are those of {overlap}.",
        "",
        *_table(("images", ""), ((words, f"{number:,}") for words, number in image_lines(diff))),
        "",
    ]
    if aps is not None:
        lines += [f"Mask AP: {aps[0]:.3f} old, {aps[1]:.3f} new.", ""]
    if results:
        rules = ((result.rule, "passed" if result.passed else "FAILED", result.text) for result in results)
        lines += ["## Gate", "", *_table(("rule", "", ""), rules), ""]
    rows = list(object_rows(diff))
    lines += ["## Objects", "", *_table(OBJECT_HEAD, rows[: _MAX_CATEGORIES + 1]), ""]
    if len(rows) > _MAX_CATEGORIES + 1:
        lines += [f"And {len(rows) - _MAX_CATEGORIES - 1:,} categories more, in diff.json.", ""]
    lines += [f"Moved: the IoU is below {MOVED_BELOW:g}.", ""]
    if renamed := _renamed(diff):
        lines += ["## Relabelled", "", *_table(("old", "new", "objects"), renamed), ""]
    sizes = zip(("small", "medium", "large"), diff.total.old_sizes, diff.total.new_sizes, strict=True)
    size_rows = ((name, f"{old:,}", f"{new:,}") for name, old, new in sizes)
    lines += ["## Sizes", "", *_table(("objects", "old", "new"), size_rows), ""]
    lines += ["## Images that differ most", "", *_worst(diff, pictures or {}, trouble)]
    return "\n".join(lines) + "\n"


def _renamed(diff: LabelDiff) -> list[tuple[str, str, str]]:
    pairs = [
        (number, old, new)
        for old, counts in diff.categories.items()
        for new, number in counts.relabelled_to.items()
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    return [(diff.name(old), diff.name(new), f"{number:,}") for number, old, new in pairs[:_MAX_RENAMED]]


def _worst(diff: LabelDiff, pictures: Mapping[str, str], trouble: str | None) -> Iterator[str]:
    if not diff.worst:
        yield "None differs."
    if trouble is not None:
        yield from (f"The images could not be drawn: {escape(trouble)}", "")
    elif diff.worst:
        yield from ("In the pictures the old labels are on the left.", "")
    for number, change in enumerate(diff.worst, 1):
        yield f"{number}. {escape(change.image_id)} – {why(change)}"
        yield ""
        if change.image_id in pictures:
            yield from (f"   ![old and new labels]({pictures[change.image_id]})", "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(map(escape, head))} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    for row in rows:
        yield f"| {' | '.join(map(escape, row))} |"


def _pictures(
    diff: LabelDiff, table: LabelsTable, source: SourceSpec, storage: Storage
) -> Iterator[tuple[str, bytes]]:
    """PNG of each of the worst images, as far as the source has it; in the order of the source."""
    ids = [change.image_id for change in diff.worst]
    if not ids:
        return
    old, new = (
        _labels(table, diff.source, model_id, ids) for model_id in (diff.old_model_id, diff.new_model_id)
    )
    storage.check_reachable(source.uri, "source")
    shards = {row["shard"] for row in (*old.values(), *new.values())}
    left = {image_id for image_id in ids if image_id in old and image_id in new}
    for shard in list_shards(source, storage):
        if not left:
            return
        if shard.name not in shards:
            continue
        for image in ShardReader(shard, source, storage, _AllBut(left)):
            if image.image_id not in left or image.data is None:
                continue
            left.discard(image.image_id)
            try:
                pixels = decode_image(image.data)
            except DecodeError:  # labelled once, damaged since
                continue
            pair = [
                draw_detections(pixels, labels[image.image_id]["detections"], diff.names, diff.min_score)
                for labels in (old, new)
            ]
            yield image.image_id, _beside(*pair)


class _AllBut:
    """Holds every image_id but a few; what a reader is to skip."""

    def __init__(self, few: set[str]) -> None:
        self._few = frozenset(few)

    def __contains__(self, image_id: object) -> bool:
        return image_id not in self._few


def _labels(table: LabelsTable, source: str, model_id: str, ids: Sequence[str]) -> Labels:
    """The newest rows of some images."""
    wanted = (pads.field("source") == pads.scalar(source)) & pads.field("image_id").isin(list(ids))
    columns = ["image_id", "shard", "labeled_at", "detections"]
    rows: pa.Table = table.dataset(model_id).to_table(columns=columns, filter=wanted)
    newest_last = rows.take(pc.sort_indices(rows["labeled_at"]))
    return {row["image_id"]: row for row in newest_last.to_pylist() if row["detections"] is not None}


def _beside(left: Image.Image, right: Image.Image) -> bytes:
    sheet = Image.new("RGB", (left.width + _GAP_PX + right.width, left.height), (32, 32, 32))
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + _GAP_PX, 0))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return data.getvalue()
