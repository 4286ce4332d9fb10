from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from cluster.growing import NoRoomError, planned_with_room
from cluster.session import ClusterInfo

FITS = [{"CPU": 1.0}, {"CPU": 0.5}]


def test_what_fits_is_planned_at_once(local_ray: ClusterInfo) -> None:
    notes: list[str] = []
    assert planned_with_room(len, local_ray, FITS, 60, notes.append) == 1
    assert notes == []


def test_a_plan_is_made_again_of_the_nodes_that_are_there_then(local_ray: ClusterInfo) -> None:
    asked: list[float] = []

    def plan(nodes: Sequence[Mapping[str, float]]) -> float:
        asked.append(sum(node["CPU"] for node in nodes))
        if asked == [0]:
            raise NoRoomError("no room")
        return asked[-1]

    for _ in range(2):  # what was asked for is given back
        asked.clear()
        earlier = ClusterInfo(({"CPU": 0.0},), False)
        assert planned_with_room(plan, earlier, FITS, 60, lambda text: None) == local_ray.num_cpus
    asked.clear()
    with pytest.raises(NoRoomError, match=r"^no room$"):
        planned_with_room(plan, earlier, FITS, None, lambda text: None)


def test_what_never_comes_is_not_waited_for_longer_than_said(
    local_ray: ClusterInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.growing._AT_ONCE_S", 0.1)
    monkeypatch.setattr("cluster.growing._LOOK_S", 0.1)

    def plan(nodes: Sequence[Mapping[str, float]]) -> None:
        raise NoRoomError("no room for 2 actors")

    notes: list[str] = []
    wanted = [{"CPU": 1.0}, *([{"CPU": 6.0, "GPU": 1.0}] * 2)]
    with pytest.raises(NoRoomError, match=r"^no nodes came within 1 s: no room for 2 actors$"):
        planned_with_room(plan, local_ray, wanted, 1, notes.append)
    (note,) = notes
    assert note == "waiting up to 1 s for nodes with room for 1 × (1 CPU), 2 × (6 CPU + 1 GPU)."
