"""A listing of many keys by many requests at once, where a store gives its keys in order, a page at a time.

Enters: a function that lists one page. Leaves: every page, in the order of the keys. Where some pages in turn
are not all, requests for single keys find out by which characters the keys go on (probes), until there are
enough prefixes; those are listed side by side. How well that spreads the work depends on the names; what is
listed does not.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from jobs.lake.store import ObjectInfo
from schemas.errors import StorageError

# A request takes 50-100 ms, most of it waiting. More than the pool of connections takes would wait there.
_LISTERS = 16
# Prefixes of unequal sizes keep all listers busy if there are a few for each.
_MIN_PREFIXES = 4 * _LISTERS
_PAGES_IN_TURN = 10  # the probes cost as much as some dozens of pages
_MAX_LEVELS = 8  # characters beyond what all keys share: "2026/01/31/" is ten, of which most are alike
_MAX_CHILDREN = 100  # of one prefix; more characters than that are no digits or letters
_PAGES_AHEAD = 32  # of one prefix, 1000 keys each: memory
_LAST_CHAR = "\U0010ffff"


class ListPage(Protocol):
    """(prefix, after, max_keys) -> the first keys that begin with prefix and are greater than after, and
    whether there are more. Keys compare by code point, which is also how their UTF-8 bytes do.
    """

    def __call__(self, prefix: str, after: str, max_keys: int) -> tuple[list["Listed"], bool]: ...


Listed = tuple[str, ObjectInfo]  # by its key


@dataclass(frozen=True)
class _Part:
    """All keys that begin with a prefix; or, of a key that is a prefix of others, this one."""

    prefix: str
    own: Listed | None = None


def pages_in_parallel(list_page: ListPage, prefix: str, page_keys: int) -> Iterator[list[ObjectInfo]]:
    """Give every page below a prefix, in order, the first ones as they come. Errors come through."""
    last_key, more = "", True
    for _ in range(_PAGES_IN_TURN):
        page, more = list_page(prefix, last_key, page_keys)
        yield [info for _, info in page]
        if not more or not page:
            return
        last_key = page[-1][0]
    with ThreadPoolExecutor(_LISTERS, thread_name_prefix="masklake-list") as pool:
        parts = _split(list_page, prefix, last_key, pool)
        waiting = deque(_Lister(list_page, part, last_key, page_keys) for part in parts)
        started: deque[_Lister] = deque()
        try:
            while waiting or started:
                while waiting and len(started) < _LISTERS:
                    started.append(waiting.popleft())
                    pool.submit(started[-1].run)
                yield from started[0].pages()
                started.popleft()
        finally:
            for lister in started:
                lister.stop()


def _split(list_page: ListPage, prefix: str, after: str, pool: ThreadPoolExecutor) -> list[_Part]:
    """Prefixes that hold every key after one between them, in order."""
    found = list_page(prefix, after, 1)[0]
    if not found:
        return []
    shared = found[0][0]
    while beyond := list_page(prefix, shared + _LAST_CHAR, 1)[0]:
        shorter = _common(shared, beyond[0][0])
        if shorter == shared:
            break  # keys of the last character there is; the prefix holds them all the same
        shared = shorter
    parts = [_Part(shared)]
    for _ in range(_MAX_LEVELS):
        if len(parts) >= _MIN_PREFIXES:
            break
        finer = pool.map(lambda part: _children(list_page, part, after), parts)
        parts = [part for some in finer for part in some]
    return parts


def _children(list_page: ListPage, part: _Part, after: str) -> list[_Part]:
    """A part cut in finer ones, a character on, without those that end before `after`; itself where that
    cannot be told.
    """
    if part.own is not None:
        return [part]
    found: list[_Part] = []
    while probe := list_page(part.prefix, after, 1)[0]:
        ((key, info),) = probe
        if key == part.prefix:
            found.append(_Part(key, (key, info)))
            after = key
            continue
        child = _Part(key[: len(part.prefix) + 1])
        if (found and child.prefix <= found[-1].prefix) or len(found) == _MAX_CHILDREN:
            return [part]
        found.append(child)
        after = child.prefix + _LAST_CHAR
    return found


def _common(a: str, b: str) -> str:
    """The characters that both begin with."""
    return "".join(x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


class _Lister:
    """Lists one part ahead of whoever takes its pages."""

    def __init__(self, list_page: ListPage, part: _Part, after: str, page_keys: int) -> None:
        self._list_page = list_page
        self._part = part
        self._after = after
        self._page_keys = page_keys
        self._pages: queue.Queue[list[ObjectInfo] | BaseException | None] = queue.Queue()
        self._room = threading.Semaphore(_PAGES_AHEAD)
        self._stopped = False

    def run(self) -> None:
        try:
            self._list()
        except BaseException as error:  # raised again by whoever takes the pages
            self._pages.put(error)

    def stop(self) -> None:
        self._stopped = True
        self._room.release()

    def pages(self) -> Iterator[list[ObjectInfo]]:
        while (page := self._pages.get()) is not None:
            if isinstance(page, BaseException):
                raise page
            self._room.release()
            yield page

    def _list(self) -> None:
        if self._part.own is not None:
            self._pages.put([self._part.own[1]])
        else:
            after, more = self._after, True
            while more and not self._stopped:
                self._room.acquire()
                page, more = self._list_page(self._part.prefix, after, self._page_keys)
                if more and not (page and page[0][0] > after):
                    raise StorageError(
                        f"the store's listing does not go on after {after!r}; it does not know start-after"
                    )
                if page:
                    after = page[-1][0]
                    self._pages.put([info for _, info in page])
        self._pages.put(None)
