"""What a worker makes of the warning that nodes go, jobs/train/preemption.py. No Ray."""

from __future__ import annotations

from jobs.train.preemption import Preemption, PreemptionWarnings


def test_a_warning_is_news_once_and_again_for_another_node() -> None:
    said = iter(
        [
            None,
            Preemption(frozenset({"aa"}), 30.0),
            Preemption(frozenset({"aa"}), 30.0),
            Preemption(frozenset({"aa", "bb"}), 20.0),
            Preemption(frozenset({"bb"}), 20.0),  # the first one has ended
            None,
        ]
    )
    warnings = PreemptionWarnings(lambda: next(said))
    assert [warnings.news() for _ in range(6)] == [
        None,
        Preemption(frozenset({"aa"}), 30.0),
        None,
        Preemption(frozenset({"bb"}), 20.0),
        None,
        None,
    ]


def test_a_warning_is_told_with_the_time_that_is_left() -> None:
    node, other = "0123456789abcdef", "fedcba9876543210"
    assert Preemption(frozenset({node}), 117.4).told(100.0) == "node goes in 17 s: 0123456789ab"
    assert Preemption(frozenset({node}), 90.0).told(100.0) == "node goes in 0 s: 0123456789ab"
    two = Preemption(frozenset({other, node}), None)
    assert two.told(100.0) == "nodes go soon: 0123456789ab, fedcba987654"
