"""A night from its start to its end, jobs/relabel/run.py; with network and S3: tests/chaos/test_month.py."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.cli
import jobs.relabel.run
from jobs.lake.current import history
from jobs.lake.lease import Lease
from jobs.lake.views import current_labels
from schemas.errors import (
    CommitConflictError,
    FailureBudgetExceeded,
    GateRefused,
    MasklakeError,
    StorageError,
    UsageError,
)
from tests.chaos.harness import make_source
from tests.relabel.nights import Nights


def end_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int | str | None, str]:
    """Status and last line of stderr of `masklake …`."""
    sys.argv = ["masklake", *command]
    with pytest.raises(SystemExit) as end:
        jobs.cli.main()
    return end.value.code, capsys.readouterr().err.splitlines()[-1]


def write_truth(nights: Nights, *names: str, side: int = 4) -> str:
    """An instances JSON in which each image has a square door (the stub's are 4x4); as a setting."""
    box = [2, 2, side, side]
    corners = [2, 2, 2 + side, 2, 2 + side, 2 + side, 2, 2 + side]
    truth = {
        "images": [{"id": i, "file_name": name, "width": 8, "height": 8} for i, name in enumerate(names)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": i,
                "category_id": 1,
                "bbox": box,
                "area": side**2,
                "iscrowd": 0,
                "segmentation": [corners],
            }
            for i, _ in enumerate(names)
        ],
        "categories": [{"id": 1, "name": "door"}],
    }
    path = nights.source.parent / "truth.json"
    path.write_text(json.dumps(truth))
    return f"gate.annotations=coco:{path}"


def last_record(nights: Nights) -> dict[str, Any]:
    path = Path(nights.lake.removeprefix("file://"), "runs", nights.runs()[-1], "relabel.json")
    told: dict[str, Any] = json.loads(path.read_text())
    return told


@pytest.fixture(autouse=True)
def _keep_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_a_night_reads_what_changed_and_nothing_else(nights: Nights) -> None:
    """300 labelled images, 7 new, one with another content, one only touched, one gone: 9 are read."""
    nights.put(**{f"old{number:03d}": f"{number}" for number in range(300)})
    m1 = nights.choose(nights.register("m1"))
    nights.given(m1)
    nights.promote(m1)
    new = {f"new{number}": f"new {number}" for number in range(7)}
    nights.put(**new, old017="another")
    nights.touch("old042")
    nights.delete("old299")
    done = nights.night()
    labelled = {f"{name}.jpg" for name in (*new, "old017")}
    assert sorted(nights.labelled) == sorted(labelled)
    assert sorted(nights.read) == sorted(labelled | {"old042.jpg"})
    (part,) = done.passes
    assert (part.images, part.unchanged, part.removed) == (8, 1, 1)
    assert (part.counts["new"], part.counts["changed"], part.counts["fresh"]) == (7, 2, 297)
    contents = {path.stem: path.read_text() for path in nights.source.iterdir()}
    assert nights.seen() == {name: f"m1 {content}" for name, content in contents.items()}
    assert nights.runs() == [done.run_id]

    files = nights.files()
    assert nights.night().status == "up_to_date"
    assert (nights.read, nights.files()) == ([], files)


@pytest.mark.parametrize("trouble", ["bad", "denied"])
def test_one_bad_image_stops_no_more_than_the_promotion(
    trouble: str, nights: Nights, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both models label what they can, and what is gone leaves the labels."""
    nights.put(a="1", b="2", c="3")
    m1, m2 = (nights.register(name, fails_on=["bad"]) for name in ("m1", "m2"))
    nights.given(m1)
    nights.promote(m1)
    nights.choose(m2)
    nights.put(d=trouble, e="5")
    nights.delete("a")
    nights.denied = {"d"} if trouble == "denied" else set()
    status, line = end_of(nights.argv(), capsys)
    assert (status, "could not be read" in line) == ((1, True) if trouble == "denied" else (3, False))
    assert nights.seen().keys() - {"d"} == {"b", "c", "e"}
    assert set(nights.labelled) >= {"b.jpg", "c.jpg", "e.jpg"}
    assert nights.model_id(m1) == nights.current()
    told = last_record(nights)
    assert (told["status"], told["error"]) == ("failed", line.removeprefix("masklake: "))
    assert [(part["status"], part["removed"]) for part in told["passes"]] == [("failed", 1), ("failed", 0)]
    run_ids = nights.table.dataset().to_table(columns=["run_id"])["run_id"].to_pylist()
    assert {told["run_id"], *(part["run_id"] for part in told["passes"])} <= set(run_ids)

    nights.denied = set()
    nights.put(d="4")
    assert nights.night().status == "promoted"
    assert nights.seen() == {"b": "m2 2", "c": "m2 3", "d": "m2 4", "e": "m2 5"}


def test_a_model_that_fails_on_images_of_the_old_one_is_refused(nights: Nights) -> None:
    nights.put(a="1", b="2", c="3", d="4")
    m1 = nights.register("m1")
    nights.given(m1)
    nights.promote(m1)
    nights.choose(nights.register("m2", fails_on=["1"]))
    with pytest.raises(FailureBudgetExceeded):
        nights.night()
    refused = r"max_failed is 25%, wanted at most 1% \(1 of 4 images that the old model had\)"
    with pytest.raises(GateRefused, match=refused):
        nights.night()
    assert nights.labelled == []
    assert nights.seen() == {"a": "m1 1", "b": "m1 2", "c": "m1 3", "d": "m1 4"}
    assert nights.night("gate.max_failed=25%").status == "promoted"


def test_the_first_model_of_a_source_passes_the_gate_too(nights: Nights) -> None:
    nights.put(a="1", b="2")
    m1 = nights.choose(nights.register("m1", fails_on=["2"]))
    with pytest.raises(FailureBudgetExceeded):
        nights.night()
    with pytest.raises(
        GateRefused, match=r"max_failed is 50%.*1 of 2 images of the source.*Nothing is promo"
    ):
        nights.night()
    wrong = ("gate.max_failed=null", "gate.min_ap=0.5", write_truth(nights, "a.png", side=1))
    with pytest.raises(GateRefused, match="min_ap is 0, wanted at least"):
        nights.night(*wrong)
    assert nights.current() is None
    right = ("gate.max_failed=null", "gate.min_ap=0.5", write_truth(nights, "a.png"))
    assert nights.night(*right).status == "up_to_date"
    assert nights.current() == nights.model_id(m1)


def test_a_gate_is_not_asked_twice_about_the_same_labels(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights.put(a="1", b="2")
    m1 = nights.register("m1")
    nights.given(m1)
    nights.promote(m1)
    nights.choose(nights.register("m2", finds=None))
    with pytest.raises(GateRefused) as first:
        nights.night("gate.max_lost=10%")
    report = last_record(nights)["report"]
    with monkeypatch.context() as patch:
        patch.setattr(jobs.relabel.run, "diff_models", None)
        with pytest.raises(GateRefused) as second:
            nights.night("gate.max_lost=10%")
    (asked,) = (note for note in nights.notes if note.startswith("nothing has changed since relabel-"))
    assert asked.split()[4] in report
    assert str(second.value) == str(first.value)
    assert nights.read == []
    nights.put(c="3")
    with pytest.raises(GateRefused, match="3 of 3 old objects"):
        nights.night("gate.max_lost=10%")
    assert nights.night("gate.max_lost=100%").status == "promoted"


def test_a_source_that_lost_most_of_its_images_is_not_believed(
    nights: Nights, capsys: pytest.CaptureFixture[str]
) -> None:
    nights.put(**{f"a{number:03d}": f"{number}" for number in range(60)})
    nights.put(**{f"b{number:03d}": f"{number}" for number in range(40)})
    m1 = nights.choose(nights.register("m1"))
    nights.given(m1)
    nights.promote(m1)
    version = nights.table.version
    status, line = end_of(nights.argv("source.include=b*"), capsys)
    assert status == 4
    assert f"60 of 100 images that {nights.model_id(m1)} labelled are not in" in line
    assert "over budget.max_removed 50%" in line
    assert nights.table.version == version
    sys.argv = ["masklake", "plan", *nights.argv("source.include=b*")[1:], "--sample", "0"]
    with pytest.raises(SystemExit, match="0"):
        jobs.cli.main()
    assert "note      60 of 100 images" in capsys.readouterr().out
    done = nights.night("source.include=b*", "budget.max_removed=60%")
    assert (done.status, done.passes[0].removed) == ("up_to_date", 60)
    assert len(nights.seen()) == 40


def test_ray_is_started_once_a_night_and_not_where_nothing_is_to_be_done(nights: Nights) -> None:
    nights.put(a="1")
    nights.choose(nights.register("m1"))
    nights.night()
    assert nights.ray_starts == 1
    nights.night()
    assert nights.ray_starts == 0
    nights.choose(nights.register("m2"))
    nights.put(b="2")
    assert nights.night().images == 3
    assert nights.ray_starts == 1


def test_a_model_that_was_rolled_back_is_not_promoted_again(
    nights: Nights, capsys: pytest.CaptureFixture[str]
) -> None:
    nights.put(a="1")
    m1, m2 = nights.register("m1"), nights.choose(nights.register("m2"))
    for model in (m1, m2):
        nights.given(model)
        nights.promote(model)
    nights.rollback()
    version = nights.table.version
    status, line = end_of(nights.argv(), capsys)
    assert status == 4
    assert "m2@1 was rolled back (ana, " in line
    assert nights.table.version == version
    nights.put(b="2")  # which the model that counts labels, and the other one does not
    assert end_of(nights.argv(), capsys)[0] == 4
    assert nights.seen() == {"a": "m1 1", "b": "m1 2"}
    assert nights.labelled == ["b.jpg"]
    assert nights.current() == nights.model_id(m1)
    sys.argv = ["masklake", "plan", *nights.argv("keep_current=false")[1:], "--sample", "0"]
    with pytest.raises(SystemExit, match="0"):
        jobs.cli.main()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("note      m2@1 was rolled back (ana, ")
    assert said[2].startswith("this run  0 of 0 images")


def test_what_cannot_work_ends_with_status_2_before_anything_is_written(
    nights: Nights, capsys: pytest.CaptureFixture[str]
) -> None:
    nights.put(a="1", b="2")
    m1 = nights.choose(nights.register("m1"))
    nights.given(m1, "a")
    m2 = nights.choose(nights.register("m2", categories=[(1, "window")]))
    files = nights.files()
    assert end_of(nights.argv(), capsys) == (
        2,
        f"masklake: the categories of {nights.model_id(m2)} contradict "
        f"those of {nights.model_id(m1)}, which this lake has: category 1 was 'door' and is 'window'. "
        "Renumber the checkpoint's, or label into another lake.",
    )
    unknown = [word.replace("champion", "challenger") for word in nights.argv()]
    status, line = end_of(unknown, capsys)
    assert (status, "challenger" in line, "champion" in line) == (2, True, True)
    assert nights.files() == files

    nights.choose(m1)
    nights.given(m1, "a", at=datetime.now(UTC) + timedelta(days=1))
    files = nights.files()
    status, line = end_of(nights.argv(), capsys)
    assert (status, "clock is" in line) == (2, True)
    assert nights.files() == files


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("gone", "there is nothing at"),
        ("no JSON", "is not a COCO instances JSON"),
        ("other names", "no image of .* is in the source"),
        ("two of a name", "two images are called 'a'"),
        ("no outlines", "cannot be evaluated"),
    ],
)
def test_annotations_that_would_fail_at_the_gate_are_refused_before_anything_is_labelled(
    damage: str, says: str, nights: Nights
) -> None:
    nights.put(a="1", b="2")
    nights.choose(nights.register("m1"))
    setting = write_truth(nights, "z.jpg" if damage == "other names" else "a.jpg")
    path = Path(setting.removeprefix("gate.annotations=coco:"))
    if damage == "gone":
        path.unlink()
    elif damage == "no JSON":
        path.write_text("{")
    elif damage == "two of a name":
        (nights.source / "a.png").write_text("3")
    elif damage == "no outlines":
        path.write_text(path.read_text().replace("segmentation", "outlines"))
    with pytest.raises(UsageError, match=f"gate.annotations: .*{says}"):
        nights.night("gate.min_ap=0.3", setting)
    assert (nights.labelled, nights.ray_starts, nights.runs()) == ([], 0, [])


def test_a_second_run_ends_with_status_5_and_a_dead_ones_lease_is_taken_over(
    nights: Nights, capsys: pytest.CaptureFixture[str]
) -> None:
    nights.put(a="1")
    nights.choose(nights.register("m1"))
    ends: list[tuple[int | str | None, str]] = []
    nights.meanwhile = lambda: ends.append(end_of(nights.argv(), capsys))
    done = nights.night()
    ((status, line),) = ends
    assert status == 5
    assert f"run {done.run_id} on " in line
    assert f"is at work on {nights.source_uri} (lease relabel:" in line
    assert done.status == "promoted"

    (key,) = (path.name for path in Path(nights.lake.removeprefix("file://"), "leases").glob("relabel*"))
    Lease.acquire(nights.storage, nights.lake, key, "relabel-1 on a", 60, clock=lambda: time.time() - 3600)
    assert nights.night().status == "up_to_date"


@pytest.mark.slow
def test_before_there_are_labels_of_two_models_the_first_is_promoted(nights: Nights) -> None:
    nights.put(a="1", b="2", c="3")
    m1, m2 = nights.register("m1"), nights.register("m2")
    nights.given(m1, "a", "b")
    nights.choose(m2)
    while_at_work: list[dict[str, str]] = []
    nights.meanwhile = lambda: while_at_work.append(nights.seen())
    nights.night()
    old = {"a": "m1 1", "b": "m1 2"}
    # c by m1, a and b by m2, c by m2: what is committed while a unit is at work is of m1 only
    assert while_at_work == [old, old | {"c": "m1 3"}, old | {"c": "m1 3"}]
    assert nights.seen() == {"a": "m2 1", "b": "m2 2", "c": "m2 3"}
    promotions = [(str(switch.sources[nights.source_uri][0]), switch.why) for switch in history(nights.table)]
    assert promotions == [
        (f"m2@1 ({nights.model_id(m2)})", f"it passed the gate against {nights.model_id(m1)}"),
        (f"m1@1 ({nights.model_id(m1)})", "it was the only model so far"),
    ]


@pytest.mark.slow
def test_a_number_of_images_is_gone_through_in_nights_and_readers_see_one_model_whole(nights: Nights) -> None:
    nights.put(a="1", b="2", c="3", d="4", e="5")
    m1, m2 = nights.register("m1"), nights.register("m2")
    nights.given(m1)
    nights.promote(m1)
    nights.choose(m2)
    nights.put(f="6")
    by_m1 = {name: f"m1 {number}" for number, name in enumerate("abcdef", 1)}
    for labelled in ("ff", "ab", "cd"):  # f by both models: of what is stale the newest comes first
        done = nights.night("budget.max_images=2")
        assert (done.status, done.current) == ("limited", nights.model_id(m1))
        assert nights.labelled == [f"{name}.jpg" for name in labelled]
        assert nights.seen() == by_m1
    done = nights.night("budget.max_images=2")
    assert (done.status, nights.labelled) == ("promoted", ["e.jpg"])
    assert nights.seen() == {name: label.replace("m1", "m2") for name, label in by_m1.items()}


@pytest.mark.slow
def test_images_that_were_only_touched_do_not_hide_that_others_are_left(nights: Nights) -> None:
    """Of a model that is not current yet: changed images come before stale ones, and are found unchanged."""
    nights.put(a="1", b="2", c="3", d="4")
    m1, m2 = nights.register("m1"), nights.choose(nights.register("m2"))
    nights.given(m1)
    nights.promote(m1)
    nights.given(m2, "a", "b")
    nights.touch("a")
    nights.touch("b")
    assert nights.night("budget.max_images=2").status == "limited"  # m1's rows of a and b
    assert nights.labelled == []
    assert nights.current() == nights.model_id(m1)
    statuses = [nights.night("budget.max_images=2").status for _ in range(2)]
    assert statuses == ["limited", "promoted"]
    assert nights.seen() == {"a": "m2 1", "b": "m2 2", "c": "m2 3", "d": "m2 4"}


@pytest.mark.slow
def test_a_time_ends_a_night_after_the_unit_at_work(nights: Nights) -> None:
    nights.put(a="1", b="2", c="3", d="4", e="5")
    m1 = nights.choose(nights.register("m1"))

    def work() -> None:
        nights.now_s += 60

    nights.meanwhile = work
    first = nights.night("budget.time_s=100")
    assert (first.status, first.current) == ("limited", nights.model_id(m1))
    assert nights.labelled == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert nights.seen().keys() == {"a", "b", "c", "d"}
    assert nights.current() is None
    second = nights.night("budget.time_s=100")
    assert (second.status, nights.labelled) == ("up_to_date", ["e.jpg"])
    assert nights.current() == nights.model_id(m1)


@pytest.mark.slow
def test_a_current_model_that_is_gone_leaves_new_images_waiting_and_gone_ones_out(nights: Nights) -> None:
    nights.put(a="1", b="2", c="3")
    m1, m2 = nights.register("m1"), nights.choose(nights.register("m2"))
    nights.given(m1)
    nights.promote(m1)
    Path(nights.registry.weights_uri(m1).removeprefix("file://")).unlink()
    nights.delete("a")
    nights.put(d="4")
    assert nights.night("budget.max_images=2").status == "limited"
    assert any("new images get no labels of" in note and "m1@1 are gone" in note for note in nights.notes)
    assert nights.seen() == {"b": "m1 2", "c": "m1 3"}
    assert nights.night().status == "promoted"
    assert nights.seen() == {"b": "m2 2", "c": "m2 3", "d": "m2 4"}
    assert nights.model_id(m2) == nights.current()


@pytest.mark.slow
def test_without_keep_current_each_image_is_labelled_once(nights: Nights) -> None:
    nights.put(a="1", b="2")
    m1 = nights.register("m1")
    nights.given(m1)
    nights.promote(m1)
    nights.choose(nights.register("m2"))
    nights.put(b="changed", c="3")
    nights.delete("a")
    done = nights.night("keep_current=false", "promote=never")
    assert (done.status, done.current) == ("complete", nights.model_id(m1))
    assert nights.labelled == ["c.jpg", "b.jpg"]
    assert nights.seen() == {"b": "m1 gone"}
    assert nights.night("keep_current=false").status == "promoted"
    assert nights.labelled == []
    assert nights.seen() == {"b": "m2 changed", "c": "m2 3"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old_finds", "new_finds", "rule", "says"),
    [
        (1, None, "gate.max_lost=10%", "max_lost is 100%, wanted at most 10% (2 of 2 old objects)"),
        (1, None, "gate.min_mean_iou=0.5", "min_mean_iou cannot be evaluated: the models have no object in"),
        (None, 1, "gate.max_count_drift=10%", "max_count_drift cannot be evaluated: the old model found no"),
    ],
)
def test_a_rule_that_fails_or_cannot_be_evaluated_refuses_each_night(
    old_finds: int | None,
    new_finds: int | None,
    rule: str,
    says: str,
    nights: Nights,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nights.put(a="1", b="2")
    m1 = nights.register("m1", old_finds)
    nights.given(m1)
    nights.promote(m1)
    nights.choose(nights.register("m2", new_finds))
    with pytest.raises(GateRefused, match=says.replace("(", r"\(").replace(")", r"\)")):
        nights.night(rule)
    assert nights.seen() == {"a": "m1 1", "b": "m1 2"}
    version = nights.table.version
    status, line = end_of(nights.argv(rule), capsys)
    assert (status, says in line) == (4, True)
    assert nights.table.version == version
    told = last_record(nights)
    assert (told["status"], told["rules"][0]["passed"]) == ("refused", False)
    assert Path(told["report"].removeprefix("file://")).exists()


@pytest.mark.slow
def test_a_switch_by_hand_while_a_run_is_at_work_stands(nights: Nights) -> None:
    nights.put(a="1", b="2")
    m1, m2, m3 = (nights.register(name) for name in ("m1", "m2", "m3"))
    nights.given(m1)
    nights.given(m3)
    nights.promote(m1)
    nights.choose(m2)
    nights.meanwhile = lambda: nights.promote(m3)
    with pytest.raises(CommitConflictError, match=r"ana made m3@1 .* current .* Nothing was promoted"):
        nights.night()
    assert nights.seen() == {"a": "m3 1", "b": "m3 2"}
    assert nights.night().status == "promoted"


@pytest.mark.slow
def test_a_run_that_lost_its_lease_promotes_nothing(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    nights.put(a="1")
    nights.choose(nights.register("m1"))
    with monkeypatch.context() as patch:
        patch.setattr(jobs.relabel.run, "LEASE_TTL_S", 1e-3)
        with pytest.raises(MasklakeError, match="another run took the lease over"):
            nights.night()
    assert nights.current() is None
    assert nights.night().status == "up_to_date"
    assert nights.current() is not None


@pytest.mark.slow
def test_a_record_that_cannot_be_written_hides_nothing(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights.put(a="1")
    nights.choose(nights.register("m1"))

    def refuse(*_: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(jobs.relabel.run._Run, "write_records", refuse)
    assert nights.night().status == "promoted"
    assert "the summary could not be written: the disk is full" in nights.notes


@pytest.mark.slow
def test_a_night_that_only_notes_what_is_gone_leaves_its_record(nights: Nights) -> None:
    nights.put(a="1", b="2")
    m1 = nights.choose(nights.register("m1"))
    nights.given(m1)
    nights.promote(m1)
    nights.delete("b")
    done = nights.night()
    assert (done.status, done.images, nights.read) == ("up_to_date", 0, [])
    assert nights.seen() == {"a": "m1 1"}
    assert nights.runs() == [done.run_id]


@pytest.mark.slow
def test_of_two_models_that_nobody_chose_between_the_one_asked_for_is_promoted(nights: Nights) -> None:
    nights.put(a="1")
    nights.given(nights.register("m1"))
    nights.given(nights.choose(nights.register("m2")))
    with pytest.raises(UsageError, match="none of them was promoted"):
        nights.seen()
    done = nights.night()
    assert (done.status, done.images, nights.read) == ("promoted", 0, [])
    assert nights.seen() == {"a": "m2 1"}


@pytest.mark.slow
@pytest.mark.parametrize("retry", ["[]", "[truncated, corrupt]"])
def test_a_shard_that_was_mended_loses_the_row_of_what_could_not_be_read(retry: str, nights: Nights) -> None:
    """A row without a content, or one that is to be tried again, is known to be gone as any other is."""
    (whole,) = make_source("tar", {f"{name}.jpg": name.encode() for name in "abc"}, num_shards=1).values()
    shard = nights.source / "x.tar"
    settings = (f"failures.retry={retry}", "failures.budget=100%", "gate.max_failed=null")
    nights.choose(nights.register("m1"))
    shard.write_bytes(whole[:1500])
    nights.night(*settings)
    assert nights.labelled == ["x.tar/a", "x.tar/#tail"]
    shard.write_bytes(whole)
    (part,) = nights.night(*settings).passes
    assert nights.labelled == ["x.tar/b", "x.tar/c"]
    assert (part.unchanged, part.removed) == (1, 1)
    assert nights.seen().keys() == {"x.tar/a", "x.tar/b", "x.tar/c"}
    nights.night(*settings)
    assert nights.num_tasks == 0


@pytest.mark.slow
def test_images_of_a_parquet_shard_that_was_written_anew_under_another_name_stay(nights: Nights) -> None:
    def write(name: str, ids: str) -> None:
        rows = pa.table({"id": list(ids), "image": [key.encode() for key in ids]})
        pq.write_table(rows, nights.source / name)

    write("old.parquet", "abc")
    nights.choose(nights.register("m1"))
    nights.night("source.id_column=id")
    (nights.source / "old.parquet").unlink()
    write("new.parquet", "bcd")
    (part,) = nights.night("source.id_column=id").passes
    assert (part.images, part.removed) == (3, 1)
    rows = current_labels(nights.lake, nights.storage).relation().order("image_id").select("image_id, shard")
    assert rows.fetchall() == [(key, "new.parquet") for key in "bcd"]


@pytest.mark.slow
def test_a_night_whose_budget_is_used_up_merges_its_small_files(nights: Nights) -> None:
    nights.put(**{f"a{number}": f"{number}" for number in range(10)})
    nights.choose(nights.register("m1"))
    assert nights.night("budget.max_images=8", "commit.compact=true").status == "limited"
    assert len(nights.table.files()) == 1
