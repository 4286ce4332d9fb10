"""`masklake sql | promote | rollback | history`, jobs/relabel/view_commands.py."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.lake.aliases import Aliases
from jobs.lake.commit import Committer, DeltaStore, app_id
from jobs.lake.current import current_of, promote
from jobs.lake.fragments import write_fragment
from jobs.lake.labels_table import LabelsTable
from jobs.lake.model_ids import ModelIdRecord, record_model_id
from jobs.lake.registry import ModelRegistry
from jobs.lake.storage import Storage
from jobs.relabel.view_commands import app
from schemas.errors import GateRefused, MasklakeError, StorageError, UsageError
from schemas.specs import StorageSpec
from tests.lake.conftest import make_label_rows

A, B = "lite-aaaaaaaaaaaa", "lite-bbbbbbbbbbbb"
SOURCE, OTHER = "s3://photos/2026", "s3://photos/2027"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, MasklakeError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(*arguments: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(run(*arguments, "--json").splitlines()[-1])
    return answer


def add(table: LabelsTable, *labelled: tuple[list[str], str, str]) -> None:
    """Commit rows, (image ids, source, model_id) at a time."""
    storage = Storage(StorageSpec())
    committer = Committer(DeltaStore(table), app_id("tests", ""), {}, every_s=60, every_images=1)
    for ids, source, model_id in labelled:
        rows = make_label_rows(ids, model_id, source=source)
        lake_uri = table.uri.removesuffix("/labels")
        committer.add(write_fragment(rows, [f"{table.version} {ids} {source}"], lake_uri, model_id, storage))
    committer.commit()


@pytest.fixture
def table(tmp_path: Path) -> LabelsTable:
    """Version 2: a and b of SOURCE labelled by A, which is current, and a by B."""
    table = LabelsTable.open_or_create(str(tmp_path / "lake"), Storage(StorageSpec()))
    add(table, (["a", "b"], SOURCE, A), (["a"], SOURCE, B))
    promote(table, [SOURCE], A, "facades@1", "ana", "first")
    return table


@pytest.fixture
def lake(table: LabelsTable, tmp_path: Path) -> str:
    return str(tmp_path / "lake")


def test_a_query_sees_the_current_labels_their_detections_and_all_rows(lake: str) -> None:
    query = "SELECT image_id, model_id FROM labels ORDER BY 1"
    found = run_json("sql", query, "--lake", lake)
    assert found == {"version": 2, "columns": ["image_id", "model_id"], "rows": [["a", A], ["b", A]]}
    query = "SELECT category_id, count(*), sum(area), max(score) FROM detections GROUP BY 1 ORDER BY 1"
    assert run_json("sql", query, "--lake", lake)["rows"] == [[1, 2, 1400, 0.5], [3, 2, 1400, 0.75]]
    assert run_json("sql", "SELECT count(*) FROM all_labels", "--lake", lake)["rows"] == [[3]]
    assert run_json("sql", "FROM labels LIMIT 0", "--lake", lake)["rows"] == []


def test_a_person_gets_a_table_of_the_first_rows(lake: str) -> None:
    text = run("sql", "SELECT image_id, num_detections AS num FROM labels ORDER BY 1", "--lake", lake)
    assert [line.split() for line in text.splitlines()] == [["image_id", "num"], ["a", "2"], ["b", "2"]]
    text = run("sql", "SELECT unnest(range(60)) AS n", "--lake", lake)
    assert text.splitlines()[-2:] == ["49", "the first 50 rows; --csv prints all"]


def test_a_query_reads_labels_and_nothing_else(lake: str) -> None:
    with pytest.raises(UsageError, match="Permission Error"):
        run(
            "sql",
            f"SELECT * FROM read_text('{lake}/labels/_delta_log/00000000000000000000.json')",
            "--lake",
            lake,
        )
    with pytest.raises(UsageError, match="not one SELECT, but COPY"):
        run("sql", f"COPY labels TO '{lake}/x.csv'", "--lake", lake)


def test_a_label_file_that_is_gone_is_not_the_users_mistake(lake: str, table: LabelsTable) -> None:
    for uri in table.file_uris():
        Path(uri).unlink()
    with pytest.raises(StorageError, match="reading labels failed"):
        run("sql", "SELECT sum(num_detections) FROM labels", "--lake", lake)


def test_older_labels_are_found_by_version_and_by_time(lake: str, table: LabelsTable) -> None:
    add(table, (["c"], SOURCE, A))
    query = "SELECT count(*) FROM labels"
    assert run_json("sql", query, "--lake", lake)["rows"] == [[3]]
    assert run_json("sql", query, "--lake", lake, "--version", "2") == {
        "version": 2,
        "columns": ["count_star()"],
        "rows": [[2]],
    }
    assert run_json("sql", query, "--lake", lake, "--at", "2999-01-01")["version"] == 3
    with pytest.raises(UsageError, match=r"no version of 1999-12-31T22:00:00\+00:00"):
        run("sql", query, "--lake", lake, "--at", "1999-12-31T22:00")
    with pytest.raises(UsageError, match="wanted a time such as"):
        run("sql", query, "--lake", lake, "--at", "yesterday")


def test_other_engines_get_a_view(lake: str) -> None:
    text = run("sql", "--lake", lake, "--for", "spark")
    assert text.startswith("CREATE OR REPLACE TEMPORARY VIEW current_labels AS\n")
    assert f"(model_id = '{A}' AND source IN ('{SOURCE}'))" in text
    assert text.endswith(";\n")
    answer = run_json("sql", "--lake", lake, "--for", "trino", "--trino-table", "delta.lake.labels")
    assert 'FROM "delta"."lake"."labels"' in answer["sql"]
    for wrong in ([], ["SELECT 1", "--for", "spark"]):
        with pytest.raises(UsageError, match="give a query, or --for ENGINE"):
            run("sql", *wrong, "--lake", lake)
    with pytest.raises(UsageError, match="wanted one of duckdb, spark, trino"):
        run("sql", "--lake", lake, "--for", "hive")


def test_a_model_is_promoted_once_it_has_all_that_is_current(lake: str, table: LabelsTable) -> None:
    with pytest.raises(GateRefused, match=f"1 images of {SOURCE} have labels of {A}.* none of {B}"):
        run("promote", B, "--lake", lake)
    table.refresh()
    assert (table.version, current_of(table, SOURCE)) == (2, A)
    add(table, (["b"], SOURCE, B))
    text = run("promote", B, "--lake", lake, "--why", "better")
    assert text == (f"current  {B} for {SOURCE}; before: facades@1 ({A})\ntable    version 4\n")
    assert run("promote", B, "--lake", lake).endswith("table    version 4: it was so already\n")
    assert run_json("rollback", "--lake", lake) == {"version": 5, "changed": True, "current": {SOURCE: A}}
    assert run_json("promote", B, "--lake", lake)["current"] == {SOURCE: B}


def test_a_model_whose_categories_mean_other_things_is_not_promoted(lake: str) -> None:
    for model_id, name in ((A, "door"), (B, "window")):
        record = ModelIdRecord(model_id, "f" * 64, "lite", "fp32", {}, ((1, name),), "run-1", "2026-11-23")
        record_model_id(Storage(StorageSpec()), lake, record)
    with pytest.raises(UsageError, match="category 1 was 'door' and is 'window'"):
        run("promote", B, "--lake", lake, "--incomplete")


def test_an_incomplete_model_is_promoted_by_those_who_insist(lake: str, table: LabelsTable) -> None:
    assert run_json("promote", B, "--lake", lake, "--incomplete")["version"] == 3
    assert run_json("sql", "SELECT count(*) FROM labels", "--lake", lake)["rows"] == [[1]]


def test_the_history_names_versions_people_and_reasons(lake: str) -> None:
    run("promote", B, "--lake", lake, "--incomplete", "--by", "ben", "--why", "a test")
    answer = run_json("history", "--lake", lake)
    assert [
        (row["version"], row["event"], row["model_id"], row["by"], row["why"]) for row in answer["history"]
    ] == [
        (3, "promotion", B, "ben", "a test"),
        (2, "promotion", A, "ana", "first"),
    ]
    assert answer["history"][0]["before"] == "facades@1"
    text = run("history", "--lake", lake)
    assert text.index("ben") < text.index("ana")


def test_the_history_names_who_moved_an_alias_and_why(lake: str) -> None:
    storage = Storage(StorageSpec())
    registry = ModelRegistry(lake, storage)
    moments = (datetime(2026, 11, day, tzinfo=UTC) for day in (22, 23))
    for alias, weights, why in (("trial", b"1", "it is new"), ("champion", b"2", "AP 0.41")):
        version = registry.register("facades", weights, weights.hex() * 32)
        Aliases(lake, storage, lambda: next(moments)).move(alias, version, "ben", why)
    newest, first = run_json("history", "--lake", lake)["aliases"]
    assert newest == {
        "alias": "champion",
        "number": 1,
        "model": "facades@2",
        "by": "ben",
        "why": "AP 0.41",
        "at": "2026-11-23T00:00:00+00:00",
    }
    assert first["alias"] == "trial"
    assert [line.split()[0] for line in run("history", "--lake", lake).splitlines()[-2:]] == [
        "champion",
        "trial",
    ]


def test_a_lake_without_promotions_says_so(tmp_path: Path) -> None:
    LabelsTable.open_or_create(str(tmp_path / "new"), Storage(StorageSpec()))
    assert run("history", "--lake", str(tmp_path / "new")).startswith("no model was ever promoted")
    with pytest.raises(UsageError, match="nothing to go back to"):
        run("rollback", "--lake", str(tmp_path / "new"))
    with pytest.raises(UsageError, match="no label table"):
        run("history", "--lake", str(tmp_path / "none"))


def test_sources_whose_models_differ_are_rolled_back_by_name(lake: str, table: LabelsTable) -> None:
    add(table, (["z"], OTHER, B), (["b"], SOURCE, B))
    run("promote", B, "--lake", lake)
    with pytest.raises(UsageError, match=f"name one by --source.*{SOURCE}: {B}, before it facades@1"):
        run("rollback", "--lake", lake)
    assert run_json("rollback", "--lake", lake, "--source", SOURCE)["current"] == {SOURCE: A}
    with pytest.raises(UsageError, match=f"no labels of {OTHER} were current before"):
        run("rollback", "--lake", lake, "--source", OTHER)


def test_a_model_is_named_by_its_version_or_an_alias(lake: str, table: LabelsTable) -> None:
    storage = Storage(StorageSpec())
    version = ModelRegistry(lake, storage).register("facades", b"weights", "b" * 64)
    record = ModelIdRecord(B, "b" * 64, "lite", "fp32", {}, ((1, "door"),), "run", "2026-11-23")
    record_model_id(storage, lake, record)
    Aliases(lake, storage).move("champion", version, "ana", "")
    run("promote", "alias:champion", "--lake", lake, "--incomplete")
    answer = run_json("history", "--lake", lake)["history"][0]
    assert (answer["model"], answer["model_id"]) == ("facades@1", B)
    assert run("promote", "facades@1", "--lake", lake).endswith("it was so already\n")
    with pytest.raises(UsageError, match="no alias 'challenger'"):
        run("promote", "alias:challenger", "--lake", lake)
