"""Many keys listed by many requests at once, jobs/lake/parallel_listing.py."""

import threading
import time
from bisect import bisect_right

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.lake import parallel_listing
from jobs.lake.parallel_listing import Listed, pages_in_parallel
from jobs.lake.storage import ObjectInfo, TransientStorageError


class Bucket:
    """Keys in order, asked page by page; remembers how many asked at once."""

    def __init__(self, keys: list[str], page_keys: int = 10, delay_s: float = 0.0) -> None:
        self.keys = sorted(set(keys))
        self.num_requests = 0
        self.most_at_once = 0
        self._page_keys = page_keys
        self._delay_s = delay_s
        self._at_once = 0
        self._lock = threading.Lock()

    def list_page(self, prefix: str, after: str, max_keys: int) -> tuple[list[Listed], bool]:
        with self._lock:
            self.num_requests += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(self._delay_s)
        later = self.keys[bisect_right(self.keys, after) :] if after else self.keys
        found = [key for key in later if key.startswith(prefix)]
        page = found[: min(max_keys, self._page_keys)]
        with self._lock:
            self._at_once -= 1
        return [(key, ObjectInfo(f"s3://b/{key}", 1, None, "")) for key in page], len(page) < len(found)


def listed(bucket: Bucket, prefix: str = "") -> list[str]:
    """Every key, by pages of up to ten."""
    return [
        info.uri.removeprefix("s3://b/")
        for page in pages_in_parallel(bucket.list_page, prefix, 10)
        for info in page
    ]


NAMES = {
    "a counter": [f"images/{number:012d}.jpg" for number in range(2000)],
    "hashes": [f"{number * 2654435761 % 2**32:08x}.jpg" for number in range(2000)],
    "dates": [f"2026/{m:02d}/{d:02d}/{n}.jpg" for m in range(1, 13) for d in range(1, 29) for n in range(6)],
    "words": [f"{a}{b}{c}" for a in "aäb€" for b in "xyz\U0001f600" for c in range(100)],
    "a key that begins all others": ["a" * number for number in range(1, 300)],
    "the last character": ["\U0010ffff" * number for number in range(1, 50)],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_every_key_comes_once_and_in_order(names: list[str]) -> None:
    bucket = Bucket(names)
    assert listed(bucket) == bucket.keys


@pytest.fixture
def _splits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_listing, "_PAGES_IN_TURN", 1)


@pytest.mark.usefixtures("_splits_at_once")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=1, max_size=6), max_size=60), st.text(max_size=1))
def test_whatever_the_keys_are_all_are_listed(keys: list[str], prefix: str) -> None:
    bucket = Bucket(keys, page_keys=3)
    assert listed(bucket, prefix) == [key for key in bucket.keys if key.startswith(prefix)]


def test_what_fits_on_a_page_takes_one_request() -> None:
    for names in ([], ["a"], [f"{number}" for number in range(10)]):
        bucket = Bucket(names)
        assert listed(bucket) == bucket.keys
        assert bucket.num_requests == 1


@pytest.mark.parametrize("names", ["a counter", "hashes", "dates"])
def test_requests_go_out_side_by_side(names: str) -> None:
    bucket = Bucket(NAMES[names], delay_s=0.002)
    assert listed(bucket) == bucket.keys
    assert bucket.most_at_once >= 8
    assert bucket.num_requests < 4 * len(bucket.keys) / 10


def test_an_error_comes_through_and_nothing_is_left_running() -> None:
    bucket = Bucket(NAMES["hashes"])
    num_before = threading.active_count()

    def fails_late(prefix: str, after: str, max_keys: int) -> tuple[list[Listed], bool]:
        if prefix.startswith("8") and max_keys > 1:
            raise TransientStorageError("busy")
        return bucket.list_page(prefix, after, max_keys)

    pages = pages_in_parallel(fails_late, "", 10)
    with pytest.raises(TransientStorageError):
        list(pages)
    assert threading.active_count() == num_before


def test_whoever_stops_early_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_listing, "_PAGES_AHEAD", 1)
    num_before = threading.active_count()
    pages = pages_in_parallel(Bucket(NAMES["a counter"]).list_page, "", 10)
    next(pages)
    next(pages)
    pages.close()  # type: ignore[attr-defined]  # a generator, typed as an iterator
    assert threading.active_count() == num_before
