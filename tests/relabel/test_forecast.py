"""`masklake plan`, jobs/relabel/forecast.py, and what its command prints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from jobs.relabel import forecast as forecast_module
from jobs.relabel.forecast import PASS_S, RUN_S, _Sample, run_forecast
from schemas.relabel_spec import RelabelSpec
from schemas.spec_loader import load_spec
from tests.chaos.harness import make_source, write_source
from tests.relabel.nights import Nights

START_S = RUN_S + PASS_S + 2  # of a run with one model: all but labelling


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "images").mkdir()
    for number in range(30):
        Image.new("RGB", (64, 48), (number * 8, 90, 90)).save(tmp_path / "images" / f"{number:02d}.png")
    return str(tmp_path / "images")


def make_spec(source: str, tmp_path: Path, *settings: str) -> RelabelSpec:
    flags = {"source.uri": source, "model.uri": "demo", "lake.uri": str(tmp_path / "lake")}
    sizes = ["model.min_size_px=64", "model.max_size_px=96", "price.per_hour=2"]
    return load_spec(RelabelSpec, None, [*sizes, *settings], **flags)


@pytest.fixture
def ten_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """One actor labels an image in 0.094 s, so that with its share of idleness it makes ten a second; it is
    warm after 2 s, and looking takes no time.
    """
    monkeypatch.setattr(forecast_module, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.setattr(forecast_module, "_measure", lambda *_: _Sample(0.094, 1000, 2.0))
    monkeypatch.setattr(forecast_module, "local_cpus", lambda: 2)


@pytest.mark.usefixtures("ten_a_second")
def test_without_a_budget_one_run_does_it_all(source: str, tmp_path: Path) -> None:
    found = run_forecast(make_spec(source, tmp_path))
    (only,) = found.passes
    assert (only.counts["new"], only.images) == (30, 30)
    assert only.images_per_s == pytest.approx(10)
    assert (found.current, found.actors, found.images, found.this_run, found.runs) == (None, 1, 30, 30, 1)
    seconds = 3 + START_S
    assert found.seconds == pytest.approx(seconds)
    assert found.hours == pytest.approx(seconds / 3600)
    assert found.price == pytest.approx(2 * seconds / 3600)
    assert not (tmp_path / "lake").exists()


@pytest.mark.usefixtures("ten_a_second")
def test_shards_that_nobody_has_read_are_counted_by_their_size(tmp_path: Path) -> None:
    images = {f"{number}.jpg": b"x" * 1000 for number in range(40)}
    source = write_source(tmp_path / "tars", make_source("tar", images, num_shards=2))
    (sampled,) = run_forecast(make_spec(source, tmp_path)).passes
    size = sum(path.stat().st_size for path in (tmp_path / "tars").iterdir())
    assert (sampled.images, sampled.estimated, sampled.counts["new"]) == (round(size / 1000),) * 3
    (unsampled,) = run_forecast(make_spec(source, tmp_path), sample=0).passes
    assert (unsampled.images, unsampled.images_per_s) == (2, None)


@pytest.mark.usefixtures("ten_a_second")
def test_a_budget_makes_several_runs_of_it(source: str, tmp_path: Path) -> None:
    by_time = run_forecast(make_spec(source, tmp_path, f"budget.time_s={START_S + 1}"))
    assert (by_time.this_run, by_time.runs) == (10, 3)
    by_number = run_forecast(make_spec(source, tmp_path, "budget.max_images=7"))
    assert (by_number.this_run, by_number.runs) == (7, 5)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_rate_is_measured_on_the_images_themselves(source: str, tmp_path: Path) -> None:
    found = run_forecast(make_spec(source, tmp_path), sample=4)
    rate = found.passes[0].images_per_s
    assert rate is not None
    assert 0 < rate < 1000
    assert found.passes[0].start_s > 0


def test_the_command_prints_a_table_or_json_and_without_a_sample_no_times(
    source: str, tmp_path: Path
) -> None:
    argv = ["plan", "--source", source, "--model", "demo", "--lake", str(tmp_path / "lake"), "--sample", "0"]
    told = CliRunner().invoke(app, argv)
    assert told.exit_code == 0, told.output
    assert "this run  30 of 30 images" in told.output
    assert "not known: nothing was sampled" in told.output
    values = json.loads(CliRunner().invoke(app, [*argv, "--json"]).output.splitlines()[-1])
    assert (values["images"], values["seconds"], values["price"]) == (30, None, None)


@pytest.mark.usefixtures("ten_a_second")
def test_of_images_that_are_to_be_read_a_sample_tells_which_hold_what_they_held(nights: Nights) -> None:
    nights.put(**{f"{number}": f"content {number}" for number in range(6)})
    old = nights.register("m1")
    nights.given(nights.choose(old))
    for number in range(4):
        nights.touch(f"{number}")
    nights.put(**{"4": "another"})
    (part,) = run_forecast(nights.spec()).passes
    assert (part.counts["changed"], part.read_only, part.images) == (5, 4, 1)


@pytest.mark.usefixtures("ten_a_second")
def test_a_gate_and_each_model_take_their_time(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_module, "_COMPARED_PER_S", 2)
    nights.put(**{f"{number}": f"content {number}" for number in range(6)})
    old = nights.register("m1")
    nights.given(nights.choose(old))
    nights.put(new="new")
    nights.choose(nights.register("m2", finds=None))
    found = run_forecast(nights.spec())
    assert [part.images for part in found.passes] == [1, 7]
    labelling_s, comparing_s = 8 / 10, 7 / 2
    assert found.seconds == pytest.approx(START_S + PASS_S + 2 + labelling_s + comparing_s)
    by_number = run_forecast(nights.spec("budget.max_images=4"))
    assert by_number.seconds == pytest.approx(START_S + PASS_S + 2 + 0.4)
