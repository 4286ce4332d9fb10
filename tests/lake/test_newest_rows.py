"""The newest row of each image, jobs/lake/newest_rows.py."""

from collections.abc import Callable

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads
from hypothesis import given
from hypothesis import strategies as st

from jobs.lake.done_images import LabelFile, Range
from jobs.lake.newest_rows import create_newest_view, split_files

MODEL = "lite-0123456789ab"
SOURCE = "s3://photos/2026"
FRAGMENT = "0123456789abcdef-0123456789abcdef0123456789abcdef.parquet"

MakeRows = Callable[..., pa.Table]
IdBound = str | None


def file(low: IdBound, high: IdBound, source: str | None = SOURCE, name: str = FRAGMENT) -> LabelFile:
    any_ = Range(None, None)
    path = f"model_id={MODEL}/{name}"
    return LabelFile(path, MODEL, 1, 1, 0, Range(low, high), Range(source, source), any_, any_, any_)


def bounds(files: list[LabelFile]) -> list[tuple[IdBound, IdBound]]:
    return [(one.image_ids.low, one.image_ids.high) for one in files]


def test_files_are_alone_where_no_other_reaches_into_their_ids() -> None:
    alone, others = split_files(
        [file("k", "m"), file("a", "c"), file("c", "d"), file("n", "z"), file("x", "x")]
    )
    assert bounds(alone) == [("k", "m")]
    assert bounds(others) == [("a", "c"), ("c", "d"), ("n", "z"), ("x", "x")]
    assert split_files([]) == ([], [])


def test_a_file_that_spans_others_takes_them_along() -> None:
    alone, others = split_files([file("a", "z"), file("b", "c"), file("y", "y"), file("zz", "zz")])
    assert bounds(alone) == [("zz", "zz")]
    assert len(others) == 3


def test_sources_do_not_meet_and_an_unknown_one_meets_all() -> None:
    same_ids = [file("a", "c"), file("a", "c", "s3://elsewhere")]
    assert split_files(same_ids)[1] == []
    assert split_files([*same_ids, file("x", "z", None)])[0] == []


def test_a_merged_file_may_hold_an_image_twice() -> None:
    assert split_files([file("a", "c", name="merged-0.parquet")])[0] == []


def test_a_file_without_bounds_may_hold_any_image() -> None:
    assert split_files([file("a", "c"), file(None, None), file("x", "z")])[0] == []
    assert bounds(split_files([file("a", "c"), file("d", None), file("x", "z")])[0]) == [("a", "c")]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), max_size=8))
def test_files_that_are_alone_share_no_id_with_any_other(ranges: list[tuple[int, int]]) -> None:
    files = [file(f"{low:02}", f"{low + width:02}") for low, width in ranges]
    alone, others = split_files(files)
    assert len(alone) + len(others) == len(files)
    for one in alone:
        ids = one.image_ids
        meeting = [other for other in files if other.image_ids.may_hold(ids.low or "", ids.high or "")]
        assert meeting == [one]


def view(
    connection: duckdb.DuckDBPyConnection, alone: pa.Table, others: pa.Table, condition: str
) -> list[tuple[str, ...]]:
    create_newest_view(connection, "labels", pads.dataset(alone), pads.dataset(others), condition)
    return connection.sql("SELECT image_id, run_id FROM labels ORDER BY ALL").fetchall()


def test_of_each_image_the_newest_row_counts_unless_it_says_removed(make_rows: MakeRows) -> None:
    others = pa.concat_tables(
        [
            make_rows(["a", "b", "c"], MODEL, run_id="1", at_us=1),
            make_rows(["b", "c"], MODEL, run_id="3", at_us=3, removed=["c"]),
            make_rows(["a", "c"], MODEL, run_id="2", at_us=2),
        ]
    )
    alone = make_rows(["x", "y"], MODEL, run_id="1", removed=["y"])
    assert view(duckdb.connect(), alone, others, "true") == [("a", "2"), ("b", "3"), ("x", "1")]


def test_of_rows_of_one_time_one_counts(make_rows: MakeRows) -> None:
    both = pa.concat_tables([make_rows(["a"], MODEL, run_id=run_id, at_us=5) for run_id in ("1", "2")])
    ((image_id, run_id),) = view(duckdb.connect(), both[:0], both, "true")
    assert (image_id, run_id in ("1", "2")) == ("a", True)


def test_rows_that_are_not_meant_do_not_outdo_those_that_are(make_rows: MakeRows) -> None:
    rows = pa.concat_tables(
        [make_rows(["a"], MODEL, run_id="1", at_us=1), make_rows(["a"], "other", run_id="2", at_us=2)]
    )
    assert view(duckdb.connect(), rows[:0], rows, f"model_id = '{MODEL}'") == [("a", "1")]
