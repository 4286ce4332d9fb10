"""The curves of a training run in one picture: loss terms, AP, learning rate, gradient, speed, data wait.

Enters: a History. Leaves: a PNG.
Letters: P points of a curve.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.train.metrics import EvalMetrics, History, StepMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 500  # of a curve: about as many as the picture has pixels for
MAX_CATEGORIES = 20
_SHORT = 50  # points of a curve each of which is shown
_MAX_MARKS = 6  # changes of the number of workers that are marked
_WIDTH_IN, _ROW_IN, _BAR_IN = 13.0, 3.2, 0.28
_DPI = 110
# Okabe and Ito's, for the colour-blind; black is the sum of the terms.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")

Floats = NDArray[np.float64]


def curves_png(history: History) -> bytes:
    """Six panels over the steps; with AP by category, a seventh below. A panel without data says so.

    Curves of more than MAX_POINTS reports show the mean of neighbours, and their range.
    """
    # here, for it takes a second; no pyplot, which keeps figures for ever and is not for threads
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    categories = shown_categories(history.evaluations)
    heights = [3 * _ROW_IN] + ([1.0 + _BAR_IN * len(categories)] if categories else [])
    figure = Figure(figsize=(_WIDTH_IN, sum(heights)), dpi=_DPI, layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    panels = parts[0].subplots(3, 2).ravel()
    steps, evaluations = history.steps, history.evaluations
    _loss_panel(panels[0], steps)
    _ap_panel(panels[1], evaluations)
    _line_panel(panels[2], steps, "learning rate", lambda m: m.learning_rate)
    _line_panel(panels[3], steps, "gradient norm, before clipping", lambda m: m.grad_norm)
    _line_panel(panels[4], steps, "images/s, all workers", lambda m: m.images_per_s)
    _line_panel(panels[5], steps, "time spent waiting for data, %", lambda m: 100 * m.data_wait_share)
    _mark_workers(panels[4], steps)
    last_step = max([1, *(m.step for m in steps[-1:]), *(m.step for m in evaluations[-1:])])
    for panel in panels:
        panel.set_xlabel("step")
        panel.set_xlim(-0.02 * last_step, 1.02 * last_step)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.grid(alpha=0.3)
    if categories:
        _category_panel(parts[1].subplots(), categories, evaluations[-1])
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def thinned(
    steps: Floats, values: Floats, max_points: int = MAX_POINTS
) -> tuple[Floats, Floats, Floats, Floats]:
    """Steps, means, least and greatest values of P <= max_points runs of neighbours of equal length.

    Args:
        steps, values: of equal length, in order of steps; values that are not finite are left out.
    """
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    length = max(1, -(-len(values) // max_points))
    starts = np.arange(0, len(values), length)
    if not len(starts):
        return steps, values, values, values
    sizes = np.diff(np.append(starts, len(values)))
    return (
        np.add.reduceat(steps, starts) / sizes,
        np.add.reduceat(values, starts) / sizes,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
    )


def shown_categories(evaluations: Sequence[EvalMetrics]) -> list[tuple[str, float, float]]:
    """(name, mask AP, box AP) of the last evaluation, by falling mask AP; of many, the ends of the list."""
    figures = evaluations[-1].per_category if evaluations else {}
    ranked = sorted(
        ((name, v["segm_AP"], v["bbox_AP"]) for name, v in figures.items() if v["segm_AP"] >= 0),
        key=lambda category: -category[1],
    )
    if len(ranked) <= MAX_CATEGORIES:
        return ranked
    return ranked[: MAX_CATEGORIES // 2] + ranked[-MAX_CATEGORIES // 2 :]


def _loss_panel(panel: Axes, steps: Sequence[StepMetrics]) -> None:
    panel.set_ylabel("loss")
    names = list(steps[-1].losses) if steps else []
    curves: list[tuple[str, str, Callable[[StepMetrics], float]]] = [("sum", "black", lambda m: m.loss)]
    curves += [
        (_readable(name), _COLOURS[rank % len(_COLOURS)], _term(name)) for rank, name in enumerate(names)
    ]
    most = 0.0
    for label, colour, value_of in curves:
        at, means, low, high = _curve(steps, value_of)
        if not len(at):
            continue
        panel.plot(at, means, color=colour, label=label, linewidth=1.4, **_marker(at))
        if label == "sum":
            panel.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
            # the first steps are far above the rest, and would press a long curve flat
            most = float(np.percentile(high, 98) if len(at) > _SHORT else high.max()) * 1.1
    if most <= 0:
        _say_empty(panel, "no steps")
        return
    panel.set_ylim(0, most)
    panel.legend(fontsize="small", ncols=2)


def _ap_panel(panel: Axes, evaluations: Sequence[EvalMetrics]) -> None:
    panel.set_ylabel("AP on held-out images, %")
    best = 0.0
    for label, colour, style, figures, name in (
        ("mask AP", _COLOURS[0], "-", "segm", "AP"),
        ("mask AP50", _COLOURS[0], ":", "segm", "AP50"),
        ("box AP", _COLOURS[3], "-", "bbox", "AP"),
        ("box AP50", _COLOURS[3], ":", "bbox", "AP50"),
    ):
        measured = [
            (m.step, 100 * getattr(m, figures)[name])
            for m in evaluations
            if getattr(m, figures).get(name, -1.0) >= 0
        ]
        if measured:
            at, values = zip(*measured, strict=True)
            best = max(best, *values)
            panel.plot(at, values, style, color=colour, label=label, marker="o", markersize=3.5)
    if not panel.lines:
        _say_empty(panel, "no evaluation")
        return
    panel.set_ylim(0, min(102.0, max(1.0, best * 1.15)))
    panel.legend(fontsize="small", ncols=2)


def _line_panel(
    panel: Axes, steps: Sequence[StepMetrics], label: str, value_of: Callable[[StepMetrics], float]
) -> None:
    panel.set_ylabel(label)
    at, means, low, high = _curve(steps, value_of)
    if not len(at):
        _say_empty(panel, "no steps")
        return
    panel.plot(
        at,
        means,
        color=_COLOURS[0],
        linewidth=1.4,
        label="mean",
        **_marker(at),
    )
    if len(at) < len(steps):
        panel.fill_between(at, low, high, color=_COLOURS[0], alpha=0.15, linewidth=0, label="range")
        panel.legend(fontsize="small", ncols=2, loc="upper right")
    panel.set_ylim(0, max(1e-12, float(np.percentile(high, 99)) * 1.3))  # with room for the legend


def _mark_workers(panel: Axes, steps: Sequence[StepMetrics]) -> None:
    """A line where the number of workers changed, the last few times."""
    changes = [
        (b.step, a.num_workers, b.num_workers) for a, b in pairwise(steps) if a.num_workers != b.num_workers
    ]
    for step, before, after in changes[-_MAX_MARKS:]:
        panel.axvline(step, color="black", linestyle="--", linewidth=0.8)
        panel.annotate(
            f"{before} → {after} workers",
            (step, 0.04),
            xycoords=("data", "axes fraction"),
            xytext=(-3, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
            fontsize="x-small",
        )


def _category_panel(panel: Axes, categories: Sequence[tuple[str, float, float]], last: EvalMetrics) -> None:
    """Bars of AP by category, the best on top."""
    at = np.arange(len(categories))[::-1]
    for offset, label, colour, place in ((0.2, "mask AP", _COLOURS[0], 1), (-0.2, "box AP", _COLOURS[3], 2)):
        values = [100 * max(0.0, float(c[place])) for c in categories]
        panel.barh(at + offset, values, height=0.38, color=colour, label=label)
    panel.set_yticks(at, [_plain(name) for name, _, _ in categories])
    panel.set_ylim(-0.6, len(categories) - 0.4)
    panel.set_xlabel("AP, %")
    panel.set_axisbelow(True)
    panel.grid(axis="x", alpha=0.3)
    shown, measured = len(categories), sum(1 for v in last.per_category.values() if v["segm_AP"] >= 0)
    which = (
        f", the {shown // 2} best and the {shown - shown // 2} worst of {measured}"
        if shown < measured
        else ""
    )
    panel.set_title(f"AP by category at step {last.step:,}{which}", fontsize="medium")
    panel.legend(fontsize="small", loc="lower right")


def _curve(
    steps: Sequence[StepMetrics], value_of: Callable[[StepMetrics], float]
) -> tuple[Floats, Floats, Floats, Floats]:
    return thinned(
        np.array([m.step for m in steps], np.float64), np.array([value_of(m) for m in steps], np.float64)
    )


def _term(name: str) -> Callable[[StepMetrics], float]:
    return lambda metrics: metrics.losses.get(name, float("nan"))


def _marker(at: Floats) -> dict[str, Any]:
    """Points of a short curve are shown; one alone would be invisible otherwise."""
    return {"marker": ".", "markersize": 4} if len(at) <= _SHORT else {}


def _say_empty(panel: Axes, text: str) -> None:
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color="gray")


def _readable(name: str) -> str:
    return _plain(name.removeprefix("loss_").removesuffix("_reg").replace("_", " "))


def _plain(name: str) -> str:
    """One short printable line; matplotlib reads "$" as mathematics."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    text = text if len(text) <= 40 else f"{text[:39]}…"
    return text.replace("$", r"\$")
