"""A lake on a disk: that of tests/care."""

from tests.care.conftest import lake, storage, table

__all__ = ["lake", "storage", "table"]
