"""Many objects as Arrow columns, jobs/lake/object_table.py."""

import pickle

from jobs.lake.object_table import NO_OBJECTS, ObjectTable, concat
from jobs.lake.storage import ObjectInfo

OBJECTS = (
    ("a.jpg", ObjectInfo("s3://b/a.jpg", 10, "0" * 32, "0" * 32)),
    ("a.jpg#2", None),
    ("b.jpg", ObjectInfo("file:///\udcff.jpg", 5, None, "1-5")),  # a name that is no text
    ("listed", ObjectInfo("gs://b/listed", -1, None, "")),
)


def test_what_went_in_comes_out() -> None:
    table = ObjectTable.of(OBJECTS)
    assert tuple(table) == OBJECTS
    assert [table[0], table[-1], len(table)] == [OBJECTS[0], OBJECTS[3], 4]
    assert tuple(table[1:3]) == tuple(table.part(1, 2)) == OBJECTS[1:3]
    assert tuple(table.where([True, False, False, True])) == (OBJECTS[0], OBJECTS[3])
    assert tuple(concat([table, table[:1]])) == (*OBJECTS, OBJECTS[0])
    assert tuple(NO_OBJECTS) == tuple(concat([])) == ()


def test_bytes_are_counted_where_they_are_known() -> None:
    assert ObjectTable.of(OBJECTS).num_bytes == 15
    assert NO_OBJECTS.num_bytes == 0


def test_a_part_travels_without_the_whole() -> None:
    whole = ObjectTable.of(
        (f"{n:06d}.jpg", ObjectInfo(f"s3://b/{n:06d}.jpg", n, None, "v")) for n in range(9999)
    )
    pickled = pickle.dumps(whole.part(5000, 10))
    assert pickle.loads(pickled) == whole.part(5000, 10)
    assert len(pickled) < 3000
    assert pickle.loads(pickle.dumps(NO_OBJECTS)) == NO_OBJECTS
