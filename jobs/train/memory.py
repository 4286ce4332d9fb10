"""Training that takes more memory than there is: what says so, and what is said in its place.

Enters: torch's own error in a worker, or Ray's of a worker that is no more. Leaves: one line that names what
took the memory, and the settings that make it smaller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from jobs.train.recipe import Recipe
from maskrcnn_core.config import MaskRCNNConfig

_SHOWN_NAMES = 16
# Allocations that fail on a CPU are plain RuntimeErrors.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
# What ray 2.60 says of a process that its memory monitor ended, and of one that the kernel may have ended.
_ENDED_BY_RAY = "running low on memory"
_NODE_MEMORY = re.compile(r"\d\S* used / \d\S* limit")
_ENDED_BY_SOMEBODY = "killed by the OOM killer"


class TrainingMemoryError(MemoryError):
    """Something took more memory than there is; one worker may see it and the others not."""


@contextmanager
def telling_what_takes_memory(told: Callable[[], str]) -> Iterator[None]:
    """
    Args:
        told: what takes it, and which settings make it smaller; asked for when it is needed.

    Raises:
        TrainingMemoryError: in place of torch's own error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _is_out_of_memory(error):
            raise
        raise TrainingMemoryError(told()) from error


def step_memory(recipe: Recipe) -> str:
    """The settings that make a step smaller, as a remedy."""
    sides = "recipe.shorter_sides" if recipe.canvas_px is None else "recipe.canvas_px"
    return (
        f"raise recipe.accumulate (now {recipe.accumulate}) or scaling.num_workers, or lower "
        f"recipe.total_batch (now {recipe.total_batch}) or {sides}"
    )


def evaluation_memory(config: MaskRCNNConfig) -> str:
    """The settings that make an evaluation smaller, as a remedy."""
    return (
        f"lower model.min_size_px (now {config.min_size_px}) or model.max_size_px (now {config.max_size_px})"
    )


def death_for_memory(error: BaseException) -> str | None:
    """What ended a worker, where that was the memory of its machine, or may have been; None: neither.

    Args:
        error: Ray's, after it gave up.
    """
    text = str(error)
    if _ENDED_BY_RAY in text:
        found = _NODE_MEMORY.search(text)
        return f"Ray ended it because its node ran low on memory{f' ({found[0]})' if found else ''}"
    if _ENDED_BY_SOMEBODY in text:
        return "its process vanished, as one does that the kernel ends for want of memory"
    return None


def listed(names: Sequence[str]) -> str:
    """Names of images, the first few of many."""
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)
