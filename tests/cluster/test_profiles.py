import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.profiles import PoolPlan, actor_profile
from schemas.errors import UsageError
from schemas.specs import PoolSpec


def plan(
    gpus: float, cpus: float, preset: str = "lite", nodes: Sequence[float] | None = None, **pool: Any
) -> PoolPlan:
    """Of a cluster whose GPUs are on its first node."""
    described: list[dict[str, float]] = [{"CPU": node} for node in nodes or [cpus]]
    described[0]["GPU"] = gpus
    return actor_profile(described, PoolSpec(**pool), preset)


def test_two_cpus_hold_one_actor_a_task_of_ray_data_and_one_of_each_of_ours() -> None:
    two = plan(0, 2)
    assert (two.min_actors, two.max_actors, two.gpus_per_actor, two.cpus_per_actor) == (1, 1, 0, 1)
    assert two.cpus_per_actor + 1 <= 2
    assert two.cpus_per_actor + two.read_cpus + two.write_cpus <= 2
    assert two.torch_threads == 2


@pytest.mark.parametrize(("cpus", "actors", "threads"), [(3, 1, 3), (4, 1, 4), (8, 3, 2), (16, 7, 2)])
def test_more_cpus_hold_more_actors_of_two_cpus_each(cpus: int, actors: int, threads: int) -> None:
    wide = plan(0, cpus)
    assert (wide.max_actors, wide.cpus_per_actor, wide.torch_threads) == (actors, 2, threads)


def test_an_actor_fits_on_one_node() -> None:
    assert plan(0, 3, nodes=[1, 1, 1]).cpus_per_actor == 1
    assert plan(0, 3, nodes=[1, 1, 1]).max_actors == 2
    assert plan(0, 6, nodes=[2, 2, 2]).max_actors == 2
    assert plan(0, 10, nodes=[8, 1, 1]).max_actors == 4


def test_each_gpu_gets_an_actor_and_the_cpus_are_shared_out_for_decoding() -> None:
    assert plan(1, 16).gpus_per_actor == 1
    assert (plan(1, 16).cpus_per_actor, plan(1, 16).actors) == (8, 1)
    assert (plan(4, 16).cpus_per_actor, plan(4, 16).actors) == (3, 4)
    assert (plan(8, 8).cpus_per_actor, plan(8, 8).actors) == (0.87, 8)


def test_a_gpu_can_be_shared_or_left_alone() -> None:
    assert plan(1, 16, gpus_per_actor=0.25).actors == 4
    assert plan(1, 16, gpus_per_actor=0).gpus_per_actor == 0


@pytest.mark.parametrize(
    ("gpus", "preset", "images"),
    [(0, "lite", 32), (0, "r50_fpn", 4), (0, "r101_fpn", 4), (1, "lite", 512), (1, "r50_fpn_v2", 512)],
)
def test_a_unit_is_hundreds_of_images_on_a_gpu_and_a_handful_on_cpus(
    gpus: int, preset: str, images: int
) -> None:
    assert plan(gpus, 4, preset).max_images == images


def test_what_the_spec_says_is_taken() -> None:
    spec = PoolSpec(min_actors=2, max_actors=6, cpus_per_actor=0.5, gpus_per_actor=0.5)
    taken = actor_profile([{"CPU": 16, "GPU": 2}], spec, "lite", max_images=7)
    assert (taken.min_actors, taken.max_actors) == (2, 6)
    assert (taken.cpus_per_actor, taken.gpus_per_actor, taken.torch_threads, taken.max_images) == (
        0.5,
        0.5,
        1,
        7,
    )


@pytest.mark.parametrize(
    ("gpus", "cpus", "pool", "message"),
    [
        (0, 2, {"cpus_per_actor": 2}, "room for 0 actors of 2 CPUs and 0 GPUs, the spec wants 1"),
        (0, 2, {"min_actors": 2}, "room for 1 actors of 1 CPUs and 0 GPUs, the spec wants 2"),
        (0, 8, {"gpus_per_actor": 1}, "and 0 GPUs: room for 0 actors of"),
        (0, 1, {}, "the cluster has 1 CPUs, of which 1 is kept for reading and writing"),
        (0, 0, {}, "the cluster has 0 CPUs"),
    ],
)
def test_actors_that_would_never_start_are_refused(
    gpus: int, cpus: int, pool: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        plan(gpus, cpus, **pool)


def test_a_cluster_that_grows_may_begin_without_room() -> None:
    grows = plan(0, 2, gpus_per_actor=1, max_actors=8)
    assert (grows.max_actors, grows.gpus_per_actor, grows.cpus_per_actor) == (8, 1, 0.12)
    assert (grows.room, grows.actors) == (0, 1)  # which waits for its node


def test_one_and_a_half_gpus_are_refused() -> None:
    with pytest.raises(UsageError, match="wanted a whole number, or less than 1"):
        plan(4, 8, gpus_per_actor=1.5)


def test_actors_stand_on_the_nodes_that_have_gpus_and_leave_the_others_to_read() -> None:
    mixed = [{"CPU": 0.0}, {"CPU": 64.0}, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}]
    made = actor_profile(mixed, PoolSpec(), "r50_fpn")
    assert (made.actors, made.gpus_per_actor, made.cpus_per_actor) == (8, 1, 2)
    assert made.max_actors is None  # nodes with GPUs may join
    few = actor_profile(mixed, PoolSpec(max_actors=2), "r50_fpn")
    assert (few.max_actors, few.cpus_per_actor) == (2, 8)


def test_actors_stand_where_the_resource_is_that_they_book() -> None:
    nodes = [{"CPU": 32.0}, {"CPU": 4.0, "edge": 2.0}, {"CPU": 4.0, "edge": 1.0}]
    made = actor_profile(nodes, PoolSpec(resources={"edge": 1}), "lite")
    assert (made.max_actors, made.cpus_per_actor, made.resources) == (3, 2, {"edge": 1})
    assert made.torch_threads == 2  # 8 cores there, not 40
    with pytest.raises(UsageError, match=r"and 0 GPUs, 0 mars: room for 0 .* and 0 GPUs, 1 mars, the spec"):
        actor_profile(nodes, PoolSpec(resources={"mars": 1}), "lite")


def test_the_cpu_that_is_kept_free_is_none_of_a_head_that_has_none() -> None:
    assert actor_profile([{"CPU": 0.0}, {"CPU": 4.0}], PoolSpec(), "lite").max_actors == 1


@given(
    nodes=st.lists(st.integers(1, 64), min_size=1, max_size=6),
    gpus=st.integers(0, 16),
    preset=st.sampled_from(["lite", "r50_fpn"]),
)
def test_every_plan_leaves_a_cpu_free_and_fits_on_its_nodes(nodes: list[int], gpus: int, preset: str) -> None:
    total = sum(nodes)
    try:
        made = plan(gpus, total, preset, nodes)
    except UsageError:
        assert total == 1
        return
    # Ray books actors greedily; whichever way they fall, they cannot take more than their own sum.
    assert made.actors * made.cpus_per_actor <= total - 1
    assert made.actors <= sum(math.floor(node / made.cpus_per_actor) for node in nodes)
    assert made.actors * made.gpus_per_actor <= gpus
    assert made.max_actors == (None if gpus else made.actors)
    assert made.cpus_per_actor not in (made.read_cpus, made.write_cpus)
    assert 1 <= made.torch_threads <= max(nodes)
