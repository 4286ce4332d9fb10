"""The names that jobs export, and what becomes of figures with and without Ray."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ray.util import metrics as ray_metrics

from cluster.metrics import METRICS, Metric, NoRecorder, RayRecorder, recorder

IMAGES = Metric("images_total", "counter", "Images.", ("status",))
LOSS = Metric("loss", "gauge", "Loss.")


class FakeMetric:
    """Stands in for Ray's, of which each process may make one of a name."""

    made: list[FakeMetric]  # set by the fixture

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys = name, tag_keys
        self.told: list[tuple[float, dict[str, str]]] = []
        self.made.append(self)

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.told.append((value, tags))

    set = inc


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeMetric]:
    FakeMetric.made = []
    monkeypatch.setattr(ray_metrics, "Counter", FakeMetric)
    monkeypatch.setattr(ray_metrics, "Gauge", FakeMetric)
    return FakeMetric.made


def test_names_follow_prometheus_and_are_of_masklake() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS) > 10
    for metric in METRICS:
        assert metric.name.startswith("masklake_")
        assert metric.help.endswith(".")
        assert metric.exported == f"ray_{metric.name}"


def test_no_label_is_of_single_images() -> None:
    assert {label for metric in METRICS for label in metric.labels} == {
        "command",
        "error_kind",
        "model_id",
        "run_id",
        "status",
    }


def test_a_counter_that_does_not_say_total_is_refused() -> None:
    with pytest.raises(AssertionError, match="images"):
        Metric("images", "counter", "Images.")


def test_ray_is_asked_once_for_a_name_and_told_each_figure(made: list[FakeMetric]) -> None:
    sink = RayRecorder()
    sink.add(IMAGES, 3, status="ok")
    sink.add(IMAGES, 2, status="failed")
    sink.set(LOSS, 0.5)
    assert [(metric.name, metric.tag_keys) for metric in made] == [
        ("images_total", ("status",)),
        ("loss", ()),
    ]
    assert made[0].told == [(3, {"status": "ok"}), (2, {"status": "failed"})]
    assert made[1].told == [(0.5, {})]


def test_a_counter_that_does_not_grow_is_not_told_for_ray_refuses_zero(made: list[FakeMetric]) -> None:
    RayRecorder().add(IMAGES, 0, status="ok")
    assert made == []


@pytest.mark.parametrize("labels", [{}, {"status": "ok", "image_id": "7"}])
def test_other_labels_than_the_metrics_own_are_refused(
    labels: dict[str, str], made: list[FakeMetric]
) -> None:
    with pytest.raises(AssertionError, match="images_total has labels"):
        RayRecorder().add(IMAGES, 1, **labels)


def test_a_process_without_ray_records_nothing_and_does_not_import_it() -> None:
    program = (
        "import sys; from cluster.metrics import IMAGES, recorder\n"
        "recorder().add(IMAGES, 1, status='ok', error_kind='')\n"
        "print(type(recorder()).__name__, 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["NoRecorder", "False"]
    assert done.stderr == ""


def test_ray_that_is_imported_and_not_joined_is_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert isinstance(recorder(), NoRecorder)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    assert isinstance(recorder(), RayRecorder)
    assert recorder() is recorder()
