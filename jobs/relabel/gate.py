"""Whether new labels may count: the rules of a gate, held against a diff.

Enters: a LabelDiff, a GateSpec, AP of both models where the spec has ground truth. Leaves: a result for each
rule, or GateRefused, which names those that failed. The first labels of a source have none to be compared
with: of them only the rules that need one model are asked. A rule that cannot be evaluated never passes: it
fails where the labels are the reason, and is a UsageError where the spec is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import Storage
from jobs.relabel.diff import CategoryDiff, LabelDiff
from schemas.errors import GateRefused, UsageError
from schemas.gate_spec import CategoryRules, GateSpec


@dataclass(frozen=True)
class RuleResult:
    """One rule. value: None where it cannot be evaluated, which `text` explains and which is not passed.

    rule: as in the spec, `max_lost` or `categories.person.max_lost`; text: one line for people.
    """

    rule: str
    limit: float
    value: float | None
    passed: bool
    text: str


def measure_ap(annotations: str, table: LabelsTable, storage: Storage, source: str, model_id: str) -> float:
    """Mask AP of a model's labels of one source, below 0 where the ground truth has no object.

    Args:
        annotations: coco:URI of an instances JSON.
        table: at the version that the diff was made from.
        source: as the rows have it.

    Raises:
        UsageError: it is no such JSON, or the model has labels for none of its images.
        StorageError: the store refused, or a label file is damaged.
    """
    from jobs.evaluate.run import evaluate_labels  # brings torch along

    return evaluate_labels(table, annotations.removeprefix("coco:"), model_id, storage, source).segm["AP"]


def judge(
    diff: LabelDiff, spec: GateSpec, old_ap: float | None = None, new_ap: float | None = None
) -> list[RuleResult]:
    """Every rule that the spec sets; [] where it sets none.

    Args:
        diff: made with the spec's min_score, match_iou and compare_masks.
        old_ap, new_ap: of spec.annotations, as measure_ap gives them; None without any.

    Raises:
        UsageError: the spec names a category that neither model has found or knows, or asks for an AP that
            was not measured.
    """
    results = list(_judge_objects("", spec, diff.total, diff))
    for name, rules in spec.categories.items():
        of_category = diff.categories.get(_category_id(name, diff))
        results += _judge_objects(f"categories.{name}.", rules, of_category, diff)
    images = diff.images
    results += _judge_alone(
        spec, images.failed_new, images.compared + images.failed_new, "that the old model had", new_ap
    )
    if spec.max_ap_drop is not None:
        results.append(_judge_ap_drop(spec.max_ap_drop, old_ap, new_ap))
    return results


def judge_first(num_ok: int, num_failed: int, spec: GateSpec, ap: float | None = None) -> list[RuleResult]:
    """Of the rules that the spec sets those that need no older labels: max_failed and min_ap.

    Args:
        num_ok, num_failed: images of the source. ap: as new_ap of judge().

    Raises:
        UsageError: an AP is asked for and was not measured.
    """
    return list(_judge_alone(spec, num_failed, num_ok + num_failed, "of the source", ap))


def raise_if_refused(
    results: Sequence[RuleResult], source: str, old_model_id: str | None, new_model_id: str
) -> None:
    """Raise GateRefused naming each rule that failed. old_model_id: None: there was none to compare with."""
    failed = [result.text for result in results if not result.passed]
    if not failed:
        return
    against, state = "", "Nothing is promoted"
    if old_model_id is not None:
        against = f" against {old_model_id}"
        state = f"The table stays on {old_model_id}; `masklake diff` shows the images that differ most"
    raise GateRefused(
        f"the labels of {new_model_id} for {source} are not promoted, {len(failed)} of {len(results)} rules "
        f"failed{against}: {'; '.join(failed)}. {state}."
    )


def _category_id(name: str, diff: LabelDiff) -> int:
    """Of a rule's category: by its name, else by its number."""
    found = [category_id for category_id, its_name in diff.names.items() if its_name == name]
    if len(found) > 1:
        raise UsageError(
            f"gate.categories: {name!r} is the name of {', '.join(map(str, found))}; give a number."
        )
    if found:
        return found[0]
    if name.isdecimal() and (int(name) in diff.names or int(name) in diff.categories):
        return int(name)
    known = sorted({diff.name(category_id) for category_id in {*diff.names, *diff.categories}})
    raise UsageError(
        f"gate.categories: neither {diff.old_model_id} nor {diff.new_model_id} has a category {name!r}; "
        f"they have: {', '.join(known[:100]) or 'none'}."
    )


def _judge_objects(
    prefix: str, rules: CategoryRules, found: CategoryDiff | None, diff: LabelDiff
) -> Iterator[RuleResult]:
    for name, measure in _MEASURES.items():
        limit: float | None = getattr(rules, name)
        if limit is None:
            continue
        if diff.images.compared == 0:
            yield _not_evaluated(
                prefix + name, limit, "no image has labels of both models from the same bytes"
            )
        elif found is None or found.old == found.new == 0:
            yield _not_evaluated(prefix + name, limit, "neither model found an object")
        elif (value := measure(found)) is None:
            yield _not_evaluated(
                prefix + name, limit, _NOTHING.get(name, "the models have no object in common")
            )
        else:
            yield _evaluated(prefix + name, limit, value, _WORDS[name].format(**vars(found)))


def _judge_alone(
    spec: GateSpec, num_failed: int, num_images: int, which: str, ap: float | None
) -> Iterator[RuleResult]:
    if spec.max_failed is not None:
        words = f"{num_failed:,} of {num_images:,} images {which}"
        yield _evaluated("max_failed", spec.max_failed, _share(num_failed, num_images), words)
    if spec.min_ap is not None:
        yield _judge_ap(spec.min_ap, ap)


def _judge_ap(limit: float, new_ap: float | None) -> RuleResult:
    if new_ap is None:
        raise UsageError("gate.min_ap: AP was not measured; set gate.annotations.")
    if new_ap < 0:
        return _not_evaluated("min_ap", limit, "the ground truth has no object")
    return _evaluated("min_ap", limit, new_ap, "mask AP")


def _judge_ap_drop(limit: float, old_ap: float | None, new_ap: float | None) -> RuleResult:
    if old_ap is None or new_ap is None:
        raise UsageError("gate.max_ap_drop: AP of both models was not measured; set gate.annotations.")
    if min(old_ap, new_ap) < 0:
        return _not_evaluated("max_ap_drop", limit, "the ground truth has no object")
    return _evaluated("max_ap_drop", limit, old_ap - new_ap, f"mask AP was {old_ap:.3f} and is {new_ap:.3f}")


def _evaluated(rule: str, limit: float, value: float, words: str) -> RuleResult:
    is_minimum = rule.rpartition(".")[2].startswith("min_")
    passed = value >= limit if is_minimum else value <= limit
    bound = "at least" if is_minimum else "at most"
    text = f"{rule} is {_show(rule, value)}, wanted {bound} {_show(rule, limit)} ({words})"
    return RuleResult(rule, limit, value, passed, text)


def _not_evaluated(rule: str, limit: float, why: str) -> RuleResult:
    return RuleResult(rule, limit, None, False, f"{rule} cannot be evaluated: {why}")


def _show(rule: str, value: float) -> str:
    """Four digits, so that what failed does not look like its limit."""
    return f"{100 * value:.4g}%" if rule.rpartition(".")[2] in _SHARES else f"{value:.4g}"


def _share(part: int, whole: int) -> float:
    """Of nothing, nothing is lost."""
    return part / whole if whole else 0.0


_MEASURES: Mapping[str, Callable[[CategoryDiff], float | None]] = {
    "max_lost": lambda found: _share(found.lost, found.old),
    "max_added": lambda found: _share(found.added, found.new),
    "max_relabelled": lambda found: _share(found.relabelled, found.old),
    "max_score_drop": lambda found: None if found.score_shift is None else -found.score_shift.mean,
    "max_count_drift": lambda found: abs(found.new - found.old) / found.old if found.old else None,
    "min_mean_iou": lambda found: found.mean_iou,
}
_WORDS = {
    "max_lost": "{lost:,} of {old:,} old objects",
    "max_added": "{added:,} of {new:,} new objects",
    "max_relabelled": "{relabelled:,} of {old:,} old objects",
    "max_score_drop": "mean of {kept:,} objects that both have",
    "max_count_drift": "{old:,} objects became {new:,}",
    "min_mean_iou": "of {kept:,} objects that both have",
}
_NOTHING = {"max_count_drift": "the old model found no object"}
_SHARES = ("max_failed", "max_lost", "max_added", "max_relabelled", "max_count_drift")
