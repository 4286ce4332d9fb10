"""The workers of a training run, cluster/train_profiles.py."""

import pytest

from cluster.growing import NoRoomError
from cluster.session import ClusterInfo
from cluster.train_profiles import TrainPlan, least_train_room, train_plan
from schemas.spec_loader import parse_spec
from schemas.train_spec import TrainSpec


def spec(**scaling: object) -> TrainSpec:
    return parse_spec(
        TrainSpec,
        {
            "data": {"a": {"uri": "coco:a.json", "images": "a"}},
            "model": {"uri": "lite"},
            "out": {"uri": "out"},
            "scaling": scaling,
        },
        "spec",
    )


def cluster(num_cpus: float, num_gpus: float = 0, num_nodes: int = 1) -> ClusterInfo:
    return ClusterInfo(({"CPU": num_cpus / num_nodes, "GPU": num_gpus / num_nodes},) * num_nodes, True)


@pytest.mark.parametrize(
    ("info", "scaling", "wanted"),
    [
        (cluster(2), {}, TrainPlan(1, 1, False, 2.0, 2, 1)),
        (cluster(2), {"num_workers": 4}, TrainPlan(4, 4, False, 0.5, 1, 1)),
        (cluster(64, 8), {"num_workers": 8}, TrainPlan(8, 8, True, 4.0, 4, 4)),
        (cluster(64, 8), {"num_workers": "2..8"}, TrainPlan(2, 8, True, 4.0, 4, 4)),
        (cluster(192, 8), {"num_workers": 8}, TrainPlan(8, 8, True, 4.0, 4, 4)),
        (cluster(64, 8), {"num_workers": 2, "use_gpu": False}, TrainPlan(2, 2, False, 32.0, 32, 1)),
        (cluster(32, 0, 4), {"num_workers": 2}, TrainPlan(2, 2, False, 8.0, 8, 1)),
        (cluster(8), {"cpus_per_worker": 3, "loader_threads": 2}, TrainPlan(1, 1, False, 3.0, 3, 2)),
    ],
)
def test_every_auto_becomes_a_number_that_fits(
    info: ClusterInfo, scaling: dict[str, object], wanted: TrainPlan
) -> None:
    assert train_plan(info.nodes, spec(**scaling)) == wanted


@pytest.mark.parametrize(
    ("scaling", "problem"),
    [
        ({"num_workers": 2, "use_gpu": True}, "wants 2 GPUs and the cluster has 1"),
        (
            {"num_workers": 3, "cpus_per_worker": 4},
            "3 workers of 4 CPUs, and the nodes, the largest of 8 CPUs, have room for 2",
        ),
    ],
)
def test_workers_that_would_never_start_are_refused(scaling: dict[str, object], problem: str) -> None:
    with pytest.raises(NoRoomError, match=problem):
        train_plan(cluster(8, 1).nodes, spec(**scaling))


def test_a_worker_fits_on_one_node() -> None:
    nodes = [{"CPU": 64.0}, {"CPU": 7.0, "GPU": 1.0}, {"CPU": 7.0, "GPU": 1.0}]
    assert train_plan(nodes, spec(num_workers="1..2")) == TrainPlan(1, 2, True, 4.0, 4, 4)
    assert train_plan([{"CPU": 7.0}, {"CPU": 1.0}], spec(num_workers=2)).cpus_per_worker == 3
    with pytest.raises(NoRoomError, match="2 workers of 8 CPUs and a GPU, and the nodes, the largest of 64"):
        train_plan(nodes, spec(num_workers=2, cpus_per_worker=8))


def test_an_autoscaler_is_asked_for_the_fewest_workers() -> None:
    assert (
        least_train_room(spec(num_workers="2..8", use_gpu=True, cpus_per_worker=6))
        == [{"CPU": 6, "GPU": 1}] * 2
    )
    assert least_train_room(spec()) == [{"CPU": 1}]
