"""The beginning of a run: its data sets, its first weights as checkpoint of step 0, its record.

Enters: a spec, an empty <out>. Leaves: all that workers need to go on from the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import yaml

from jobs.lake.storage import Storage
from jobs.train.checkpoints import Checkpoints
from jobs.train.data_files import find_categories, make_data_file
from jobs.train.optimizer import AveragedWeights, make_optimizer
from jobs.train.recipe import Recipe
from jobs.train.run_record import RunRecord, new_run_id, spec_hash, write_record
from jobs.train.start import start_model
from jobs.train.state import Progress, snapshot
from maskrcnn_core.config import MaskRCNNConfig
from schemas.train_spec import TrainSpec


def begin(
    spec: TrainSpec, recipe: Recipe, out_uri: str, storage: Storage, note: Callable[[str], None]
) -> RunRecord:
    """Make data and first weights, and last the record, which says that they are whole.

    Args:
        note: told what goes on, for people.

    Raises:
        UsageError: data or model cannot be trained on.
        StorageError: they cannot be reached.
    """
    categories = find_categories(spec.data, spec.model, storage, spec.lake_uri)
    start = start_model(spec.model, categories, spec.recipe.seed, storage, spec.lake_uri)
    categories = start.model.config.categories
    for told in (*start.notes, *_told_of_sizes(recipe, start.model.config)):
        note(told)
    make = partial(make_data_file, categories=categories, storage=storage, strict=spec.strict, note=note)
    sets = tuple(make(name, data, uri=f"{out_uri}/data/{name}.arrow") for name, data in spec.data.items())
    evaluation = None
    if spec.evaluate.data is not None:
        # Not among the sets to learn from, one of which may be called so.
        evaluation = make("evaluation", spec.evaluate.data, uri=f"{out_uri}/evaluation.arrow")
    record = RunRecord(
        new_run_id(),
        spec_hash(spec),
        start.name,
        start.model.config.to_dict(),
        start.origin,
        sets,
        evaluation,
    )
    average = AveragedWeights(start.model, recipe.ema_decay) if recipe.ema_decay else None
    first = snapshot(start.model, average, make_optimizer(start.model, recipe))
    Checkpoints(storage, out_uri, spec.checkpoint.keep).save(first, Progress())
    plain = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)
    storage.write_bytes(f"{out_uri}/spec.yaml", plain.encode())
    write_record(out_uri, record, storage)
    return record


def _told_of_sizes(recipe: Recipe, config: MaskRCNNConfig) -> Iterator[str]:
    """A line where the model would label at another scale than it was trained at. Jitter has nearly all."""
    low, high = min(recipe.shorter_sides), max(recipe.shorter_sides)
    if recipe.canvas_px is None and not low <= config.min_size_px <= high:
        sides = f"{low} to {high}" if low < high else str(low)
        yield (
            f"images are trained on at shorter sides of {sides} px (recipe.shorter_sides), and "
            f"evaluated and labelled at {config.min_size_px} (model.min_size_px): set one of them, so that "
            "they meet"
        )
