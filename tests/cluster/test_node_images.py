"""Nodes of another image, cluster/node_images.py; on a real cluster in tests/integration."""

from __future__ import annotations

import pytest

from cluster.node_images import refuse_others
from schemas.errors import UsageError


def test_nodes_with_the_driver_s_version_are_taken() -> None:
    refuse_others([("10.0.0.5", "0.1.0"), ("10.0.0.6", "0.1.0")], "0.1.0")
    refuse_others([], "0.1.0")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            [("10.0.0.5", "0.1.0"), ("10.0.0.6", "0.0.9")],
            "node 10.0.0.6 has masklake 0.0.9, and here is masklake 0.1.0: ",
        ),
        (
            [("10.0.0.6", None)],
            "node 10.0.0.6 has no masklake, and here is masklake 0.1.0: start all nodes from one",
        ),
        (
            [("10.0.0.5", "1"), ("10.0.0.6", None)],
            "is masklake 0.1.0, and 1 more nodes are not alike: start all nodes",
        ),
    ],
)
def test_a_node_of_another_image_is_named_with_both_versions(
    found: list[tuple[str, str | None]], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        refuse_others(found, "0.1.0")
    assert said in str(caught.value)
