import io

import numpy as np
from PIL import Image

from jobs.train.curves import curves_png, shown_categories, thinned
from jobs.train.metrics import EvalMetrics, History, StepMetrics


def history(num_steps: int, categories: tuple[str, ...] = ()) -> History:
    steps = tuple(
        StepMetrics(n, {"loss_mask": 1 / n, "loss_box_reg": 0.5}, 0.01, 12.5, 0.02, 1 << 30, 1 + n % 2, 1.5)
        for n in range(1, num_steps + 1)
    )
    by_category = {name: {"bbox_AP": 0.5, "segm_AP": 0.25} for name in categories}
    return History(steps, (EvalMetrics(num_steps, {"AP": 0.5}, {"AP": 0.25, "AP50": -1.0}, by_category, 9),))


def size_of(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        assert picture.format == "PNG"
        return picture.size


def test_a_curve_of_few_steps_is_shown_as_it_is() -> None:
    at, means, low, high = thinned(np.arange(4.0), np.array([3.0, 1.0, 4.0, 1.0]), max_points=4)
    assert at.tolist() == [0, 1, 2, 3]
    assert means.tolist() == low.tolist() == high.tolist() == [3, 1, 4, 1]


def test_a_long_curve_shows_mean_and_range_of_neighbours_and_a_shorter_run_last() -> None:
    values = np.array([1.0, 3.0, 5.0, 7.0, 9.0])
    at, means, low, high = thinned(np.arange(1.0, 6.0), values, max_points=3)
    assert at.tolist() == [1.5, 3.5, 5.0]
    assert means.tolist() == [2.0, 6.0, 9.0]
    assert low.tolist() == [1.0, 5.0, 9.0]
    assert high.tolist() == [3.0, 7.0, 9.0]


def test_what_is_not_finite_is_left_out_and_nothing_stays_nothing() -> None:
    at, means, *_ = thinned(np.arange(3.0), np.array([np.nan, 2.0, np.inf]))
    assert (at.tolist(), means.tolist()) == ([1.0], [2.0])
    for part in thinned(np.zeros(0), np.zeros(0)):
        assert part.tolist() == []
    assert len(thinned(np.arange(100_000.0), np.ones(100_000))[0]) == 500


def test_a_run_without_any_metrics_has_a_picture_and_one_with_categories_a_taller_one() -> None:
    plain = size_of(curves_png(History((), ())))
    tall = size_of(curves_png(history(600, ("a $x^", "b\n\x07", "c" * 200))))
    assert tall[0] == plain[0] > 800
    assert tall[1] > plain[1]


def test_categories_are_in_order_of_mask_ap_and_of_many_the_ends_are_shown() -> None:
    figures = {f"c{i}": {"segm_AP": i / 100, "bbox_AP": 0.5} for i in range(30)}
    measured = EvalMetrics(1, {}, {}, {"none": {"segm_AP": -1.0, "bbox_AP": -1.0}, **figures})
    names = [name for name, _, _ in shown_categories([measured])]
    assert names == [f"c{i}" for i in (*range(29, 19, -1), *range(9, -1, -1))]
    few = EvalMetrics(1, {}, {}, dict(list(figures.items())[:2]))
    assert shown_categories([measured, few]) == [("c1", 0.01, 0.5), ("c0", 0.0, 0.5)]
    assert shown_categories([]) == shown_categories([EvalMetrics(1, {}, {})]) == []
