"""What a training run leaves for people to read: <out>/report/report.md, curves.png, samples.png.

Enters: facts about the run, its History and some samples. Leaves: three files. Names of files, categories and
data sets are others' and are escaped: none can become markup, a web link, or another row of a table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from jobs.lake.storage import Storage
from jobs.train.curves import curves_png
from jobs.train.metrics import EvalMetrics, History
from jobs.train.samples import Sample, samples_png
from maskrcnn_core.config import MaskRCNNConfig

_MAX_CHARS = 500  # of one value in the text
# What means something inside a line; the colon, so that no URL becomes a link.
_MARKUP = re.compile(r"[\\`*_\[\]#~!$|:@]|(?<=www)\.", re.IGNORECASE)
_ENTITIES = {ord("<"): "&lt;", ord(">"): "&gt;", ord("&"): "&amp;"}
_FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class DataFacts:
    """One data set that went in.

    role: what it was for: a training set's name, or "evaluation"; uri: with the version that was read;
    fingerprint: of its contents; problems: what was left out, by kind.
    """

    role: str
    uri: str
    fingerprint: str
    num_images: int
    problems: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFacts:
    """A run.

    status: "done", or why it ended; settings: recipe, model, code version, hardware, as they are to be shown;
    samples_from: role of the data set that the samples are of.
    """

    name: str
    status: str
    settings: Mapping[str, str]
    data: Sequence[DataFacts]
    samples_from: str


def write_report(
    out_uri: str,
    storage: Storage,
    facts: RunFacts,
    history: History,
    samples: Sequence[Sample],
    config: MaskRCNNConfig,
) -> str:
    """Make or replace the three files; returns the URI of report.md, which is written last.

    Raises:
        StorageError: the store refused.
    """
    folder = f"{storage.normalize(out_uri)}/report"
    storage.write_bytes(f"{folder}/curves.png", curves_png(history))
    storage.write_bytes(f"{folder}/samples.png", samples_png(samples, config))
    storage.write_bytes(f"{folder}/report.md", report_text(facts, history).encode())
    return f"{folder}/report.md"


def report_text(facts: RunFacts, history: History) -> str:
    """Markdown, as GitHub and CommonMark read it."""
    return "\n".join(
        [
            f"# Training run {escape(facts.name)}",
            "",
            f"Ended: {escape(facts.status)}.",
            "",
            *_table(("setting", "value"), facts.settings.items()),
            "",
            "## Data",
            "",
            *_data_section(facts.data),
            "",
            "## Result",
            "",
            *_result_section(history.evaluations),
            "",
            "## Course",
            "",
            *_course_section(history),
            "",
            "![loss, AP, learning rate, gradient, images per second, waiting for data](curves.png)",
            "",
            "## Samples",
            "",
            f"Of {escape(facts.samples_from)}:",
            "",
            "![ground truth beside predictions](samples.png)",
            "",
        ]
    )


def escape(text: str) -> str:
    """Text as it is, in one line of Markdown, also in a table: nothing in it is markup."""
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    if len(printable) > _MAX_CHARS:
        printable = f"{printable[: _MAX_CHARS - 1]}…"
    return _MARKUP.sub(r"\\\g<0>", printable).translate(_ENTITIES)


def _data_section(data: Sequence[DataFacts]) -> Iterator[str]:
    yield from _table(
        ("for", "data", "fingerprint", "images"),
        ((d.role, d.uri, d.fingerprint, f"{d.num_images:,}") for d in data),
    )
    problems = [(d.role, kind, f"{count:,}") for d in data for kind, count in d.problems.items() if count]
    yield ""
    if problems:
        yield "Left out:"
        yield ""
        yield from _table(("of", "because", "how many"), problems)
    else:
        yield "Nothing was left out."


def _result_section(evaluations: Sequence[EvalMetrics]) -> Iterator[str]:
    if not evaluations:
        yield "AP was not measured."
        return
    last = evaluations[-1]
    best = max(evaluations, key=lambda m: m.segm.get("AP", -1.0))
    rows = [
        (
            which,
            f"{metrics.step:,}",
            what,
            *(_percent(figures.get(name, -1.0)) for name in _FIGURES),
        )
        for which, metrics in (("best", best), ("last", last))
        for what, figures in (("masks", metrics.segm), ("boxes", metrics.bbox))
    ]
    yield f"COCO's AP in percent, over {last.num_images:,} held-out images; best is by AP of masks."
    yield ""
    yield from _table(("", "step", "of", *_FIGURES), rows)
    if last.unreadable:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in last.unreadable.items())
        yield ""
        yield f"Images that could not be read count as images without detections: {escape(kinds)}."
    if last.per_category:
        yield ""
        yield f"By category, at step {last.step:,}:"
        yield ""
        yield from _table(
            ("category", "mask AP", "box AP"),
            (
                (name, _percent(figures["segm_AP"]), _percent(figures["bbox_AP"]))
                for name, figures in last.per_category.items()
            ),
        )


def _course_section(history: History) -> Iterator[str]:
    steps = history.steps
    if not steps:
        yield "No step was taken."
        return
    num_workers = sorted({m.num_workers for m in steps})
    shown = str(num_workers[0]) if len(num_workers) == 1 else f"{num_workers[0]} to {num_workers[-1]}"
    yield from _table(
        ("", ""),
        (
            ("steps", f"{steps[-1].step:,}"),
            ("workers", shown),
            ("loss, at the end", f"{steps[-1].loss:.4f}"),
            ("images/s, median", f"{median(_measured(m.images_per_s for m in steps)):.1f}"),
            ("time waiting for data, mean", f"{fmean(_measured(m.data_wait_share for m in steps)):.2%}"),
            ("images that could not be read", f"{sum(m.num_unreadable for m in steps):,}"),
            ("memory of worker 0, most", f"{max(m.memory_bytes for m in steps) / 2**30:.1f} GiB"),
        ),
    )


def _measured(values: Iterable[float]) -> list[float]:
    """Those that are finite; where none is, a NaN, to be shown as such."""
    return [value for value in values if math.isfinite(value)] or [math.nan]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"| {' | '.join('---' for _ in header)} |"
    for row in rows:
        yield f"| {' | '.join(map(escape, row))} |"


def _percent(value: float) -> str:
    return "–" if value < 0 else f"{100 * value:.1f}"
