"""A file-like view of an object, read range by range."""

import io
from collections.abc import Callable
from typing import Any

# One request. Large enough that the round trip does not matter, small enough to repeat and to hold.
CHUNK_BYTES = 8 << 20


class RangeStream(io.RawIOBase):
    """Seekable and unbuffered; wrap it in io.BufferedReader.

    Args:
        read: (start, end) -> exactly those bytes, end excluded, or an error.
        size: of the object, in bytes.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read = read
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to byte {base + offset}, before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + min(len(buffer), CHUNK_BYTES), self._size)
        if end <= self._position:
            return 0
        data = self._read(self._position, end)
        buffer[: len(data)] = data
        self._position = end
        return len(data)

    def readall(self) -> bytes:
        """The rest; inherited, it would come in requests of 8 KiB."""
        return b"".join(iter(lambda: self.read(CHUNK_BYTES) or b"", b""))
