import json

import pytest

from jobs.infer.progress import JsonWatcher, TerminalWatcher
from jobs.infer.summary import Summary
from jobs.infer.units import UnitReport


def summary() -> Summary:
    result = Summary("run", "model", "source", "lake")
    result.add(UnitReport("s", node="n1", num_images=10, encoded_bytes=500, failed={"empty": 2}, label_s=4.0))
    return result


def test_a_log_gets_one_json_line_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    now = iter([0.0, 0.0, 5.0, 10.0, 15.0])
    watcher = JsonWatcher(interval_s=10.0, clock=lambda: next(now))
    watcher.start(num_shards=2, num_bytes=1000)
    for _ in range(3):
        watcher.update(summary())
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == {"shards": 2, "bytes": 1000}
    assert len(lines) == 2
    assert lines[1]["images"] == 10
    assert lines[1]["images_per_s"] == 1.0
    assert lines[1]["eta_s"] == 10.0


def test_a_terminal_gets_a_bar_and_notes_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    watcher = TerminalWatcher()
    watcher.note("a [note] with brackets")
    watcher.start(1, 1000)
    watcher.update(summary())
    watcher.stop(summary())
    assert "a [note] with brackets" in capsys.readouterr().err


def test_the_summary_adds_up_and_gives_rates() -> None:
    total = summary()
    total.add(UnitReport("s", node="n2", num_images=5, failed={"empty": 1, "io": 1}, label_s=1.0))
    total.add(UnitReport("t", shard_error="gone"))
    total.seconds = 5.0
    assert (total.images, total.ok, total.failed) == (15, 11, 4)
    assert total.failed_by_kind == {"empty": 3, "io": 1}
    assert total.images_by_node == {"n1": 10, "n2": 5}
    assert total.unread_shards == {"t": "gone"}
    values = total.to_dict()
    assert values["images_per_s"] == 3.0
    assert values["stage_rates"]["label_images_per_s"] == 3.0
    assert values["stage_rates"]["read_images_per_s"] is None
    assert json.loads(total.to_json()) == values
