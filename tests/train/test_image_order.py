"""The order of images: every epoch sees each image once, and sets take their turns by weight."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from jobs.train.image_order import Draw, ImageOrder, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1024, 1025])
def test_a_permutation_takes_every_place_once(size: int) -> None:
    assert sorted(permuted(place, size, "key") for place in range(size)) == list(range(size))


def test_the_permutations_of_a_small_set_are_all_about_as_frequent() -> None:
    seen = Counter(tuple(permuted(place, 4, str(key)) for place in range(4)) for key in range(4800))
    assert len(seen) == 24
    assert min(seen.values()) > 140  # 200 on average, with a standard deviation of 14
    assert max(seen.values()) < 260


def test_neighbours_of_a_large_set_are_drawn_far_apart() -> None:
    size = 1_000_003
    places = [permuted(place, size, "7") for place in range(3000)]
    assert abs(sum(places) / len(places) / size - 0.5) < 0.03
    steps = [abs(a - b) / size for a, b in pairwise(places)]
    assert abs(sum(steps) / len(steps) - 1 / 3) < 0.03  # what two independent draws differ by


def test_each_epoch_of_a_set_is_another_permutation_of_it() -> None:
    order = ImageOrder([37], [1.0], seed=5)
    epochs = [[order.at(37 * epoch + place).index for place in range(37)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_an_order_is_the_same_from_any_position_and_another_for_another_seed() -> None:
    first = [ImageOrder([50, 9], [2, 1], seed=1).at(position) for position in range(500, 560)]
    order = ImageOrder([50, 9], [2, 1], seed=1)
    assert [order.at(position) for position in reversed(range(500, 560))] == first[::-1]
    assert [ImageOrder([50, 9], [2, 1], seed=2).at(position) for position in range(500, 560)] != first


def test_sets_get_their_share_of_positions_whatever_their_sizes() -> None:
    order = ImageOrder([10, 1000, 3], [1.0, 2.0, 5.0], seed=0)
    draws = [order.at(position) for position in range(8192)]
    counts = Counter(draw.set_index for draw in draws)
    assert all(abs(counts[k] - share) <= 2 for k, share in enumerate((1024, 2048, 5120)))
    # Nor does a set come at the same place of each batch.
    assert len({tuple(draw.set_index for draw in draws[k : k + 8]) for k in range(0, 8192, 8)}) > 200


def test_each_set_of_a_mixture_is_gone_through_epoch_by_epoch() -> None:
    order = ImageOrder([10, 7], [0.3, 0.7], seed=3)
    draws = [order.at(position) for position in range(1024)]
    for set_index, size in ((0, 10), (1, 7)):
        # Turns are shuffled in blocks of 1024 positions, so of a whole block only the last epoch is cut off.
        counts = Counter(draw.index for draw in draws if draw.set_index == set_index)
        assert sorted(counts) == list(range(size))
        assert max(counts.values()) - min(counts.values()) <= 1


def test_positions_after_years_of_training_are_found_at_once() -> None:
    draw = ImageOrder([10**9, 5], [1, 1], seed=0).at(10**15)
    assert isinstance(draw, Draw)


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [([], []), ([0], [1.0]), ([3], [0.0]), ([3], [-1.0]), ([3, 4], [1.0]), ([3], [float("nan")])],
)
def test_an_order_of_nothing_is_refused(sizes: list[int], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        ImageOrder(sizes, weights, seed=0)
