import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.growing import NoRoomError
from cluster.profiles import PoolPlan, actor_profile, least_room
from schemas.errors import UsageError
from schemas.specs import PoolSpec


def plan(
    gpus: float, cpus: float, preset: str = "lite", nodes: Sequence[float] | None = None, **pool: Any
) -> PoolPlan:
    """Of a cluster whose GPUs are on its first node."""
    described: list[dict[str, float]] = [{"CPU": node} for node in nodes or [cpus]]
    described[0]["GPU"] = gpus
    return actor_profile(described, PoolSpec(**pool), preset)


def test_two_cpus_hold_one_actor_and_a_task_of_each_kind() -> None:
    two = plan(0, 2)
    assert (two.room, two.gpus_per_actor, two.cpus_per_actor) == (1, 0, 1.4)
    assert two.cpus_per_actor + two.read_cpus + two.write_cpus <= 2
    assert two.torch_threads == 2


@pytest.mark.parametrize(
    ("cpus", "actors", "booked", "threads"),
    [(3, 1, 2, 3), (4, 2, 1.7, 2), (8, 4, 1.85, 2), (16, 8, 1.92, 2)],
)
def test_more_cpus_hold_more_actors_of_two_cores_each(
    cpus: int, actors: int, booked: float, threads: int
) -> None:
    wide = plan(0, cpus)
    assert (wide.room, wide.cpus_per_actor, wide.torch_threads) == (actors, booked, threads)


def test_an_actor_fits_on_one_node() -> None:
    assert (plan(0, 6, nodes=[2, 2, 2]).room, plan(0, 6, nodes=[2, 2, 2]).cpus_per_actor) == (3, 1.4)
    assert plan(0, 10, nodes=[8, 1, 1]).room == 4


def test_where_no_node_has_a_cpu_to_spare_one_stays_without_actor() -> None:
    small = plan(0, 3, nodes=[1, 1, 1])
    assert (small.room, small.cpus_per_actor) == (2, 1)


def test_actors_are_there_for_the_work_and_wait_for_nodes_where_there_is_enough_of_it() -> None:
    eight = plan(0, 16, max_actors=20)
    assert (eight.room, eight.max_actors) == (8, 20)
    assert [eight.num_actors(units) for units in (1, 8, 36, 40, 1000)] == [1, 8, 9, 10, 20]
    assert plan(0, 16).num_actors(1000) == 8
    assert plan(0, 16, min_actors=3).num_actors(1) == 3


def test_each_gpu_gets_an_actor_and_the_cpus_are_shared_out_for_decoding() -> None:
    assert plan(1, 16).gpus_per_actor == 1
    assert (plan(1, 16).cpus_per_actor, plan(1, 16).room) == (8, 1)
    assert (plan(4, 16).cpus_per_actor, plan(4, 16).room, plan(4, 16).torch_threads) == (3.85, 4, 4)
    assert (plan(8, 8).cpus_per_actor, plan(8, 8).room) == (0.92, 8)


def test_a_gpu_can_be_shared_or_left_alone() -> None:
    assert plan(1, 16, gpus_per_actor=0.25).room == 4
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
    assert (taken.min_actors, taken.max_actors, taken.room) == (2, 6, 4)
    assert (taken.cpus_per_actor, taken.gpus_per_actor) == (0.5, 0.5)
    assert (taken.torch_threads, taken.max_images) == (1, 7)


def test_what_the_spec_says_is_a_little_more_where_it_would_fill_a_node() -> None:
    full = plan(0, 6, nodes=[2, 2, 2], cpus_per_actor=1)
    assert (full.cpus_per_actor, full.room, full.torch_threads) == (1.01, 3, 1)


@pytest.mark.parametrize(
    ("gpus", "cpus", "pool", "message"),
    [
        (0, 2, {"cpus_per_actor": 2}, "room for 0 actors of 2 CPUs and 0 GPUs, the spec wants 1"),
        (0, 2, {"min_actors": 2}, "room for 1 actors of 1.4 CPUs and 0 GPUs, the spec wants 2"),
        (0, 8, {"gpus_per_actor": 1}, "and 0 GPUs: room for 0 actors of"),
        (0, 1, {}, "the cluster has 1 CPUs, of which 0.6 is kept for reading and writing"),
        (0, 0, {}, "the cluster has 0 CPUs"),
    ],
)
def test_actors_that_would_never_start_are_refused(
    gpus: int, cpus: int, pool: dict[str, Any], message: str
) -> None:
    with pytest.raises(NoRoomError, match=message):
        plan(gpus, cpus, **pool)


def test_an_autoscaler_is_asked_for_the_first_actors_and_a_cpu_to_read_with() -> None:
    spec = PoolSpec(min_actors=2, gpus_per_actor=1, cpus_per_actor=6, resources={"a100": 1})
    actor = {"CPU": 6, "GPU": 1, "a100": 1}
    assert least_room(spec) == [{"CPU": 1}, actor, actor]
    assert least_room(PoolSpec()) == [{"CPU": 1}, {"CPU": 1}]


def test_one_and_a_half_gpus_are_refused() -> None:
    with pytest.raises(UsageError, match="wanted a whole number, or less than 1"):
        plan(4, 8, gpus_per_actor=1.5)


def test_actors_stand_on_the_nodes_that_have_gpus_and_leave_the_others_to_read() -> None:
    mixed = [{"CPU": 0.0}, {"CPU": 64.0}, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}]
    made = actor_profile(mixed, PoolSpec(), "r50_fpn")
    assert (made.room, made.gpus_per_actor, made.cpus_per_actor) == (8, 1, 1.85)
    assert made.max_actors == 8
    few = actor_profile(mixed, PoolSpec(max_actors=2), "r50_fpn")
    assert (few.max_actors, few.cpus_per_actor) == (2, 7.4)


def test_actors_stand_where_the_resource_is_that_they_book() -> None:
    nodes = [{"CPU": 32.0}, {"CPU": 4.0, "edge": 2.0}, {"CPU": 4.0, "edge": 1.0}]
    made = actor_profile(nodes, PoolSpec(resources={"edge": 1}), "lite")
    assert (made.room, made.cpus_per_actor, made.resources) == (3, 1.7, {"edge": 1})
    assert made.torch_threads == 2  # 8 cores there, not 40
    with pytest.raises(UsageError, match=r"and 0 GPUs, 0 mars: room for 0 .* and 0 GPUs, 1 mars, the spec"):
        actor_profile(nodes, PoolSpec(resources={"mars": 1}), "lite")


def test_a_head_without_cpus_has_no_actors() -> None:
    assert actor_profile([{"CPU": 0.0}, {"CPU": 4.0}], PoolSpec(), "lite").room == 2


@given(
    nodes=st.lists(st.integers(1, 64), min_size=1, max_size=6),
    gpus=st.integers(0, 16),
    preset=st.sampled_from(["lite", "r50_fpn"]),
)
@example(nodes=[2, 3, 11, 15, 42], gpus=0, preset="lite")  # nothing up to two CPUs leaves all of them room
def test_whichever_nodes_are_lost_the_others_can_read_and_write(
    nodes: list[int], gpus: int, preset: str
) -> None:
    total = sum(nodes)
    try:
        made = plan(gpus, total, preset, nodes)
    except NoRoomError:
        assert total == 1 or (gpus and nodes[0] == 1)
        return
    assert made.room <= sum(math.floor(node / made.cpus_per_actor + 1e-6) for node in nodes)
    assert made.room * made.gpus_per_actor <= gpus
    assert made.cpus_per_actor not in (made.read_cpus, made.write_cpus)
    assert 1 <= made.torch_threads <= max(nodes)
    assert made.max_actors == made.room
    if max(nodes) == 1 and not gpus:  # no node has a CPU to spare
        return
    # Ray fills the nodes that are left with actors, as far as their CPUs and GPUs go.
    for number, node in enumerate(nodes):
        slots = math.floor(node / made.cpus_per_actor + 1e-6)
        if gpus:
            slots = min(slots, gpus if number == 0 else 0)
        assert not slots or node - slots * made.cpus_per_actor >= made.read_cpus + made.write_cpus - 1e-6
