"""In which order images are seen: position -> set and image, from a seed alone.

Enters: sizes and weights of the sets. Leaves: for each position of an endless sequence, which image of which
set. Each epoch of a set is a permutation of it, another one each time, and sets take turns by their weights.
Any position is found at once and nothing is kept, so a run goes on from any step with any number of workers.

The permutation is a Feistel network over a power of four of numbers, walked on until it falls inside the set.
Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, sections 3 and 5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

_ROUNDS = 8  # 4 are indistinguishable from random for large sets, small ones want more
_WEIGHT_UNITS = 1 << 32
_BLOCK = 1024  # positions among which the sets' turns are shuffled
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Draw:
    """The image at a position: `index` of set number `set_index`."""

    set_index: int
    index: int


class ImageOrder:
    """An endless order of images.

    Args:
        sizes: images of each set.
        weights: share of positions that each set gets, up to a common factor.

    Raises:
        ValueError: no set, a set without images, or a weight that is not above 0.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if not sizes or len(sizes) != len(weights) or min(sizes) < 1:
            raise ValueError(
                f"sets of {list(sizes)} images with {len(weights)} weights; wanted one or more, none empty"
            )
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights are {list(weights)}; wanted numbers above 0")
        self._sizes = list(sizes)
        self._seed = seed
        # Of what the sets before it leave, the share that each takes; the last takes all.
        self._shares = [
            max(1, round(weight / sum(weights[k:]) * _WEIGHT_UNITS)) for k, weight in enumerate(weights)
        ]
        self._shares[-1] = _WEIGHT_UNITS

    def at(self, position: int) -> Draw:
        """The image at a position, counted from 0."""
        turn = position
        if len(self._sizes) > 1:
            block, offset = divmod(position, _BLOCK)
            turn = block * _BLOCK + permuted(offset, _BLOCK, f"{self._seed} turns {block}")
        # Of turns 0 ... t - 1 a set with share s has floor(t * s), so it gets turn t where that goes up.
        for set_index, share in enumerate(self._shares):
            before = turn * share // _WEIGHT_UNITS
            if (turn + 1) * share // _WEIGHT_UNITS > before:
                epoch, place = divmod(before, self._sizes[set_index])
                key = f"{self._seed} set {set_index} epoch {epoch}"
                return Draw(set_index, permuted(place, self._sizes[set_index], key))
            turn -= before
        raise AssertionError("the last set takes every turn that is left")


def permuted(place: int, size: int, key: str) -> int:
    """Where a permutation of 0 … size - 1, drawn by a key, takes a place."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    round_keys = [int.from_bytes(digest[8 * k : 8 * k + 8], "big") for k in range(_ROUNDS)]
    value = place
    while True:
        left, right = value >> half_bits, value & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        value = left << half_bits | right
        if value < size:
            return value


def _mixed(value: int) -> int:
    """64 bits to 64 bits, each depending on all.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, figure 16.
    """
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31
