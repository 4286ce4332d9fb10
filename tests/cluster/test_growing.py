from __future__ import annotations

import pytest

from cluster.growing import wait_for_nodes
from cluster.session import ClusterInfo


def test_what_fits_is_there_at_once_and_stays_free(local_ray: ClusterInfo) -> None:
    notes: list[str] = []
    assert wait_for_nodes([{"CPU": 1.0}, {"CPU": 0.5}], 60, notes.append) is not None
    assert wait_for_nodes([{"CPU": 1.0}, {"CPU": 0.5}], 60, notes.append) is not None
    assert notes == []


def test_what_never_comes_is_not_waited_for_longer_than_said(
    local_ray: ClusterInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.growing._AT_ONCE_S", 0.1)
    monkeypatch.setattr("cluster.growing._LOOK_S", 0.1)
    notes: list[str] = []
    assert wait_for_nodes([{"CPU": 1.0}, *([{"CPU": 6.0, "GPU": 1.0}] * 2)], 0.1, notes.append) is None
    (note,) = notes
    assert note.endswith("for nodes with room for 1 × (1 CPU), 2 × (6 CPU + 1 GPU).")
