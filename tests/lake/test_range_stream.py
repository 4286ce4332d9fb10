"""A file-like view of ranges behaves like the file."""

import io
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.lake import range_stream
from jobs.lake.range_stream import RangeStream

DATA = os.urandom(3000)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3500), st.integers(0, 3500)), max_size=20), st.integers(1, 700))
def test_any_order_of_seeks_and_reads_gives_what_the_file_has(
    steps: list[tuple[int, int]], buffer: int
) -> None:
    plain = io.BytesIO(DATA)
    ranges = io.BufferedReader(RangeStream(lambda start, end: DATA[start:end], len(DATA)), buffer)
    for position, size_bytes in steps:
        assert ranges.seek(position) == plain.seek(position)
        assert ranges.read(size_bytes) == plain.read(size_bytes)
    assert ranges.seek(-10, io.SEEK_END) == plain.seek(-10, io.SEEK_END)
    assert ranges.seek(3, io.SEEK_CUR) == plain.seek(3, io.SEEK_CUR)
    assert ranges.read() == plain.read()


def test_no_request_is_larger_than_a_chunk_or_reaches_past_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_stream, "CHUNK_BYTES", 1000)
    asked: list[tuple[int, int]] = []

    def read(start: int, end: int) -> bytes:
        asked.append((start, end))
        return DATA[start:end]

    assert RangeStream(read, 2500).readall() == DATA[:2500]
    assert io.BufferedReader(RangeStream(read, 2500), 1000).read(2400) == DATA[:2400]
    assert asked == [(0, 1000), (1000, 2000), (2000, 2500)] * 2


def test_a_seek_before_the_start_is_refused() -> None:
    with pytest.raises(ValueError, match="before the start"):
        RangeStream(lambda start, end: b"", 0).seek(-1)
