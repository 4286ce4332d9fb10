"""What must come of nights of `masklake relabel`, by the rules and nothing of the product's.

Enters: a source as a test changes it, which model is wanted, how many images a night may label. Leaves: whose
labels of which content must be current after each night, and what it had to do, in order.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from tests.chaos.judge import Row

UNIT = 2  # images
Images = dict[str, bytes]


@dataclass(frozen=True)
class Step:
    """One image is labelled. unit: those of one unit have one time."""

    model: str
    key: str
    content: bytes
    unit: int


@dataclass
class Oracle:
    """Told of the source and of each night.

    labelled: of each model, image_id -> content that it labelled; units: and in which unit, counted through
    all nights. steps: of the last night. refused: models that the gate refuses.
    """

    budget: int
    refused: frozenset[str] = frozenset()
    labelled: dict[str, Images] = field(default_factory=dict)
    units: dict[str, dict[str, int]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    current: str | None = None
    rolled_back: str | None = None
    num_units: int = 0

    def foretell(self, target: str) -> tuple[Self, str]:
        """What an undisturbed night would leave behind, and its status."""
        after = copy.deepcopy(self)
        return after, after.night(target)

    def night(self, target: str) -> str:
        """One undisturbed night; gives its status."""
        self.steps = []
        was_current = self.current
        models = [was_current, target] if was_current not in (None, target) else [target]
        if target == self.rolled_back:
            models.remove(target)
        for model in models:
            assert model is not None
            if self.label(model, target, self.budget - len(self.steps)):
                self.current = was_current or target  # the only model that has labels
                return "limited"
        if was_current == target:
            return "up_to_date"
        if target == self.rolled_back:
            return "rolled back"
        if was_current is not None and target in self.refused:
            return "refused"
        self.promoted(target)
        return "promoted"

    def promoted(self, target: str) -> None:
        self.current, self.rolled_back = target, None

    def roll_back(self, to: str) -> None:
        self.current, self.rolled_back = to, self.current

    def killed(self, would: Self, rows: Sequence[Row]) -> None:
        """A night was killed: take over what it committed, which must be the beginning of what it had to do.

        Args:
            would: what an undisturbed night would have left behind.
            rows: of the table's files, those that this night wrote.
        """
        removed = [row for row in rows if row["status"] == "removed"]
        found = Counter(
            (row["model_id"].rpartition("-")[0], row["image_id"], row["content_hash"])
            for row in rows
            if row["status"] != "removed"
        )
        begun = would.steps[: found.total()]
        assert found == Counter((step.model, step.key, digest(step.content)) for step in begun)
        for step in begun:
            self.labelled.setdefault(step.model, {})[step.key] = step.content
            self.units.setdefault(step.model, {})[step.key] = step.unit
        self.num_units = would.num_units
        there = self.images()
        for row in removed:
            assert row["image_id"] not in there
            del self.labelled[row["model_id"].rpartition("-")[0]][row["image_id"]]

    def images(self) -> Images:
        """All of the source."""
        raise NotImplementedError

    def label(self, model: str, target: str, left: int) -> bool:
        """One model over the source; whether that ended the night."""
        raise NotImplementedError

    def must_be_current(self) -> list[tuple[str, str, bytes]]:
        """(image_id, whose labels, of which content), in order."""
        assert self.current is not None
        return sorted((key, self.current, digest(data)) for key, data in self.labelled[self.current].items())

    def _label_unit(self, model: str, images: Mapping[str, bytes]) -> None:
        self.num_units += 1
        self.labelled[model].update(images)
        self.units.setdefault(model, {}).update(dict.fromkeys(images, self.num_units))
        self.steps += [Step(model, key, data, self.num_units) for key, data in images.items()]


@dataclass
class FilesOracle(Oracle):
    """Of images that are objects of their own."""

    source: Images = field(default_factory=dict)

    def images(self) -> Images:
        return self.source

    def label(self, model: str, target: str, left: int) -> bool:
        done = self.labelled.setdefault(model, {})
        for key in [key for key in done if key not in self.source]:
            del done[key]
        is_next = model == target != self.current
        others = self.labelled.get(self.current or "", {}) if is_next else {}
        units = self.units.get(self.current or "", {})
        to_do = [key for key, data in self.source.items() if done.get(key) != data]

        def rank(key: str) -> tuple[int, int, str]:
            """New, changed, stale; of the stale ones those that were labelled last."""
            is_stale = key not in done and others.get(key) == self.source[key]
            is_changed = key in done or (key in others and not is_stale)
            return (3, -units[key], key) if is_stale else (1 if is_changed else 0, 0, key)

        for unit in _units(sorted(to_do, key=rank)[:left]):
            self._label_unit(model, {key: self.source[key] for key in unit})
        return bool(to_do) and left <= len(to_do)


@dataclass
class ShardOracle(Oracle):
    """Of images in tar or Parquet shards, which are wanted in order of their names.

    shards: name -> image_id -> content, in order. closed: of each model, shards as it read them to their end.
    """

    shards: dict[str, Images] = field(default_factory=dict)
    closed: dict[str, dict[str, Images]] = field(default_factory=dict)

    def images(self) -> Images:
        return {key: data for images in self.shards.values() for key, data in images.items()}

    def label(self, model: str, target: str, left: int) -> bool:
        """Units of one shard, until the budget is used up; what a shard lost is known at its end."""
        done, closed = self.labelled.setdefault(model, {}), self.closed.setdefault(model, {})
        for key in [key for key in done if key.partition("/")[0] not in self.shards]:
            del done[key]
        most = len(self.steps) + left
        for name, images in sorted(self.shards.items()):
            if closed.get(name) == images:
                continue
            if len(self.steps) >= most:
                return True
            for unit in _units([key for key, data in images.items() if done.get(key) != data]):
                self._label_unit(model, {key: images[key] for key in unit})
                if len(self.steps) >= most:
                    return True
            closed[name] = dict(images)
            for key in [key for key in done if key.startswith(f"{name}/") and key not in images]:
                del done[key]
        return False


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _units(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    return (keys[start : start + UNIT] for start in range(0, len(keys), UNIT))
