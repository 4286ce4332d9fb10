"""What a gate said of two models' labels, kept so that it is not asked the same again each night.

Enters: the labels that are to be judged, and the rules. Leaves: a question, which differs as soon as rows,
rules or ground truth do; and a file of the lake with the last answer for a source:

    <lake>/verdicts/<hash of the source>.json

It saves work only: what is promoted stands in the table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.lake.labels_table import LabelsTable
from jobs.lake.storage import MissingObjectError, Storage
from jobs.relabel.gate import RuleResult
from schemas.gate_spec import GateSpec

Question = Mapping[str, Any]  # JSON-able


@dataclass(frozen=True)
class Verdict:
    """The rules' results. run_id: of the run that asked; report: of its comparison, where it made one."""

    question: Question
    run_id: str
    results: Sequence[RuleResult]
    report: str | None


def ask(
    table: LabelsTable, storage: Storage, source: str, old_id: str | None, new_id: str, gate: GateSpec
) -> Question:
    """What a gate would be asked now: equal questions have equal answers.

    Args:
        table: at the version to be judged. old_id: None where no labels of the source are current yet.
    """
    truth = None
    if gate.annotations is not None:
        truth = storage.stat(storage.normalize(gate.annotations.removeprefix("coco:"))).version
    return {
        "source": source,
        "gate": gate.model_dump(mode="json"),
        "annotations": truth,
        "labels": {
            model_id: _fingerprint(table, source, model_id)
            for model_id in (old_id, new_id)
            if model_id is not None
        },
    }


def last_verdict(storage: Storage, lake_uri: str, question: Question) -> Verdict | None:
    """The last answer for the source, if it is to this question.

    Raises:
        StorageError: the store refused.
    """
    try:
        values = json.loads(storage.read_bytes(storage.stat(_uri(lake_uri, question))))
        results = [RuleResult(**result) for result in values.pop("results")]
        verdict = Verdict(results=results, **values)
    except MissingObjectError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):  # damaged, or of another version: ask anew
        return None
    return verdict if verdict.question == question else None


def keep_verdict(storage: Storage, lake_uri: str, verdict: Verdict) -> None:
    """In the place of the last one. One run at a time judges a source (its lease)."""
    storage.write_bytes(_uri(lake_uri, verdict.question), json.dumps(asdict(verdict), indent=1).encode())


def _fingerprint(table: LabelsTable, source: str, model_id: str) -> str:
    """Of the files with the model's rows of the source: no row comes or goes without them."""
    files = table.files(model_id)
    paths = sorted(file.path for file in files if file.sources.may_hold(source, source))
    return hashlib.blake2b("\n".join(paths).encode(), digest_size=16).hexdigest()


def _uri(lake_uri: str, question: Question) -> str:
    source = str(question["source"]).encode()
    return f"{lake_uri}/verdicts/{hashlib.blake2b(source, digest_size=16).hexdigest()}.json"
