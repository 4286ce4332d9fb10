"""What a relabel is asked to do, schemas/relabel_spec.py."""

import pytest

from schemas.errors import UsageError
from schemas.relabel_spec import RelabelSpec
from schemas.spec_loader import load_spec

WORDS = {"source.uri": "s3://b/images", "model.uri": "demo", "lake.uri": "s3://b/lake"}


def test_who_writes_priority_is_told_of_order() -> None:
    with pytest.raises(UsageError, match=r"priority is not a known key; .* order: \{first: \[GLOB"):
        load_spec(RelabelSpec, None, ["priority.first=[a*]"], **WORDS)


def test_a_relabel_leaves_no_image_out() -> None:
    retried = ["failures.retry=[timeout]"]
    assert load_spec(RelabelSpec, None, retried, **WORDS).failures.retry == ("timeout",)
    with pytest.raises(UsageError, match=r"failures\.retry_only leaves images out, which a relabel does not"):
        load_spec(RelabelSpec, None, [*retried, "failures.retry_only=true"], **WORDS)
