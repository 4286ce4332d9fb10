"""A diff in words and rows, for a terminal and for the report.

Enters: a LabelDiff. Leaves: text as it is; names in it are others', and whoever shows them escapes them.
"""

from __future__ import annotations

from collections.abc import Iterator

from jobs.relabel.diff import CategoryDiff, LabelDiff
from jobs.relabel.tally import ImageChange

OBJECT_HEAD = (
    "category",
    "old",
    "new",
    "lost",
    "added",
    "relabelled",
    "moved",
    "mean IoU",
    "score, mean (5–95%)",
)


def image_lines(diff: LabelDiff) -> list[tuple[str, int]]:
    """What became of the images, those of which there are none left out."""
    images = diff.images
    lines = [
        ("compared", images.compared),
        ("of these with nothing lost, added or relabelled", images.unchanged),
        ("with other bytes under the new model", images.content_changed),
        ("labelled by the old model only", images.only_old),
        ("labelled by the new model only", images.only_new),
        ("failed under the old model", images.failed_old),
        ("failed under the new model", images.failed_new),
        ("failed under both", images.failed_both),
    ]
    return [line for line in lines if line[1] or line[0] == "compared"]


def object_rows(diff: LabelDiff) -> Iterator[tuple[str, ...]]:
    """Rows below OBJECT_HEAD: all objects, then each category, those with most differences first."""
    yield _object_row("all", diff.total)
    found = diff.categories.items()
    for category_id, counts in sorted(found, key=lambda item: (-_differences(item[1]), item[0])):
        yield _object_row(diff.name(category_id), counts)


def why(change: ImageChange) -> str:
    """In words, what is different in an image."""
    parts = [
        f"{number:,} {what}"
        for number, what in (
            (change.lost, "lost"),
            (change.added, "added"),
            (change.relabelled, "relabelled"),
        )
        if number
    ]
    overlap = "" if change.mean_iou is None else f", mean IoU {change.mean_iou:.2f}"
    noun = "object" if change.old == 1 else "objects"
    return f"{change.old:,} {noun} became {change.new:,}: {', '.join(parts) or 'moved'}{overlap}"


def _differences(counts: CategoryDiff) -> int:
    return counts.lost + counts.added + counts.relabelled + counts.moved


def _object_row(name: str, counts: CategoryDiff) -> tuple[str, ...]:
    shift = counts.score_shift
    return (
        name,
        f"{counts.old:,}",
        f"{counts.new:,}",
        _percent(counts.lost, counts.old),
        _percent(counts.added, counts.new),
        _percent(counts.relabelled, counts.old),
        _percent(counts.moved, counts.kept - counts.unreadable),
        "–" if counts.mean_iou is None else f"{counts.mean_iou:.3f}",
        "–" if shift is None else f"{shift.mean:+.3f} ({shift.p05:+.2f} to {shift.p95:+.2f})",
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "–"
