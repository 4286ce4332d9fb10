"""Streaming tar reader for archives that may be damaged or hostile.

Enters: a byte stream of a tar, plain or already decompressed. Leaves: its members in order, each member's
bytes on request, or a TarError that says at which byte the archive stops making sense. A member's name is
only ever a string here: nothing is written to disk and no path is made from it. Memory: one member that the
caller asks for, plus at most MAX_EXTENSION_BYTES of headers.

Read: ustar, pax (path and size), GNU long names, base-256 sizes, V7. Where tarfile is lenient this is strict:
the two zero blocks at the end are required, and nothing but zeros may follow them.

Source: POSIX.1-2017 pax, section "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from schemas.labels import ErrorKind

BLOCK_BYTES = 512
# A path is at most 4096 bytes on Linux; a pax header may carry comments and ACLs too, far below this.
MAX_EXTENSION_BYTES = 1 << 20
_SKIP_CHUNK_BYTES = 1 << 20
# A compressed tar may unpack to so many times its size, or to so much if it is small; deflate reaches 1032.
# Photographs do not shrink at all, drawings as BMP by 50, and a bomb would be unpacked for hours.
_MAX_EXPANSION = 100
_MAX_SMALL_BYTES = 1 << 30
_MAX_SIZE_BYTES = 1 << 60  # no storage holds more, and no offset beyond overflows
_ZERO_BLOCK = bytes(BLOCK_BYTES)

_REGULAR_TYPES = frozenset(b"0\x007")
_LINK_TYPES = {ord("1"): "hard link", ord("2"): "symbolic link"}
# Types that have no data whatever their size field says.
_DATALESS_TYPES = frozenset(b"123456")


class TarError(ValueError):
    """The archive is damaged from `offset_bytes` on; what was read before stands."""

    def __init__(self, kind: ErrorKind, offset_bytes: int, problem: str) -> None:
        super().__init__(f"{problem} (byte {offset_bytes} of the tar)")
        self.kind = kind
        self.offset_bytes = offset_bytes


@dataclass(frozen=True, slots=True)
class TarMember:
    """One entry of the archive.

    name: as stored, without a leading "./"; bytes that are not UTF-8 are written as \\xNN.
    size_bytes: of its data, 0 where it has none.
    offset_bytes: where its header starts in the (decompressed) tar.
    not_a_file: "" for a regular file, else what it is instead: "hard link", "sparse file", ...
    """

    name: str
    size_bytes: int
    offset_bytes: int
    not_a_file: str


class TarReader:
    """Iterate over the members; call read_data() for the one just given, or go on to pass its data over.

    Args:
        stream: read(n) gives n bytes unless the stream ends first. With total_bytes it must be seekable.
        total_bytes: size of the tar; members are checked against it. None where it is not known before the
            end (a compressed tar): then data are passed over by reading them.
        packed_bytes: size of the compressed tar, where it is one.

    Raises (while iterating and reading):
        TarError: kind `truncated` when the tar ends before its end marker, `corrupt` when a header or the
            compression is damaged, `too_large` when a compressed tar unpacks to absurdly much.
    """

    def __init__(self, stream: BinaryIO, total_bytes: int | None, packed_bytes: int | None = None) -> None:
        self._stream = stream
        self._total_bytes = total_bytes
        self._max_bytes = (
            None if packed_bytes is None else max(_MAX_SMALL_BYTES, _MAX_EXPANSION * packed_bytes)
        )
        self._offset_bytes = 0
        self._unread_bytes = 0  # of the current member's data
        self._padding_bytes = 0  # after them, up to the next block

    def __iter__(self) -> Iterator[TarMember]:
        extension = _Extension()
        while True:
            self._skip(self._unread_bytes + self._padding_bytes)
            self._unread_bytes = self._padding_bytes = 0
            offset_bytes = self._offset_bytes
            block = self._take(BLOCK_BYTES, "in place of a header or the end marker")
            if block == _ZERO_BLOCK:
                if extension.awaits_member:
                    raise TarError(ErrorKind.CORRUPT, offset_bytes, "no member follows an extended header")
                self._check_end()
                return
            header = _parse_header(block, offset_bytes)
            if header.kind in _EXTENSION_READERS:
                self._extend(extension, header, offset_bytes)
            else:
                yield self._enter(header, extension, offset_bytes)
                extension = _Extension(global_name=extension.global_name)

    def read_data(self) -> bytes:
        """The data of the member that the iteration gave last; once only.

        They are held whole: look at the member's size_bytes first, which in a compressed tar may be anything.
        """
        data = self._take(self._unread_bytes, "inside a member's data")
        self._unread_bytes = 0
        return data

    def _extend(self, extension: "_Extension", header: "_Header", offset_bytes: int) -> None:
        if header.size_bytes > MAX_EXTENSION_BYTES:
            raise TarError(
                ErrorKind.CORRUPT,
                offset_bytes,
                f"an extended header claims {header.size_bytes} bytes, "
                f"at most {MAX_EXTENSION_BYTES} are read",
            )
        payload = self._take(_padded(header.size_bytes), "inside an extended header")[: header.size_bytes]
        _EXTENSION_READERS[header.kind](extension, payload, offset_bytes)
        extension.awaits_member = header.kind != ord("g")

    def _enter(self, header: "_Header", extension: "_Extension", offset_bytes: int) -> TarMember:
        name = extension.name or extension.global_name or header.name
        size_bytes = header.size_bytes if extension.size_bytes is None else extension.size_bytes
        not_a_file = ""
        if header.kind == ord("S"):
            self._skip_sparse_map(header.more_sparse_blocks)
            not_a_file = "sparse file"
        elif extension.sparse:
            not_a_file = "sparse file"
        elif header.kind not in _REGULAR_TYPES:
            not_a_file = _LINK_TYPES.get(header.kind, "special entry")
        elif header.kind == 0 and name.endswith("/"):
            not_a_file = "special entry"  # how V7 writes a folder
        if header.kind in _DATALESS_TYPES:
            size_bytes = 0
        end_bytes = self._offset_bytes + size_bytes
        if self._total_bytes is not None and end_bytes > self._total_bytes:
            raise TarError(
                ErrorKind.TRUNCATED,
                offset_bytes,
                f"member {name!r} claims {size_bytes} bytes, which end at byte {end_bytes}; "
                f"the tar ends at byte {self._total_bytes}",
            )
        self._unread_bytes = size_bytes
        self._padding_bytes = _padded(size_bytes) - size_bytes
        return TarMember(name.removeprefix("./"), size_bytes, offset_bytes, not_a_file)

    def _skip_sparse_map(self, more: bool) -> None:
        while more:
            more = self._take(BLOCK_BYTES, "inside a sparse file's map")[504] != 0

    def _check_end(self) -> None:
        """One zero block was read: want another, then nothing but zeros (padding) to the end of the stream.

        Reading on to the end also makes a compressed stream check its own checksum.
        """
        offset_bytes = self._offset_bytes
        if self._take(BLOCK_BYTES, "in the middle of the end marker") != _ZERO_BLOCK:
            raise TarError(ErrorKind.CORRUPT, offset_bytes, "one zero block where the end marker has two")
        while chunk := self._read(_SKIP_CHUNK_BYTES):
            if chunk.count(0) != len(chunk):
                offset_bytes = self._offset_bytes + len(chunk) - len(chunk.lstrip(b"\0"))
                raise TarError(
                    ErrorKind.CORRUPT, offset_bytes, "data follow the end marker (was a second tar appended?)"
                )
            self._offset_bytes += len(chunk)

    def _take(self, size_bytes: int, where: str) -> bytes:
        data = self._read(size_bytes)
        if len(data) < size_bytes:
            raise TarError(ErrorKind.TRUNCATED, self._offset_bytes + len(data), f"the tar ends {where}")
        self._offset_bytes += size_bytes
        return data

    def _skip(self, size_bytes: int) -> None:
        if self._total_bytes is not None:
            if size_bytes:
                self._stream.seek(size_bytes, 1)
                self._offset_bytes += size_bytes
            return
        end_bytes = self._offset_bytes + size_bytes
        while self._offset_bytes < end_bytes:
            self._take(min(end_bytes - self._offset_bytes, _SKIP_CHUNK_BYTES), "inside a member's data")

    def _read(self, size_bytes: int) -> bytes:
        if self._max_bytes is not None and self._offset_bytes + size_bytes > self._max_bytes:
            raise TarError(
                ErrorKind.TOO_LARGE,
                self._offset_bytes,
                f"the compressed tar unpacks to more than {self._max_bytes} bytes, {_MAX_EXPANSION} times "
                f"its size (a bomb?); if it is meant, pack it uncompressed",
            )
        try:
            return self._stream.read(size_bytes)
        except EOFError as error:
            raise TarError(
                ErrorKind.TRUNCATED, self._offset_bytes, "the compressed stream ends early"
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise TarError(
                ErrorKind.CORRUPT,
                self._offset_bytes,
                f"the compressed stream is damaged, images before this may be too: {error}",
            ) from error


@dataclass(frozen=True, slots=True)
class _Header:
    kind: int
    name: str
    size_bytes: int
    more_sparse_blocks: bool


@dataclass(slots=True)
class _Extension:
    """What extended headers say about the member that follows them."""

    name: str = ""
    size_bytes: int | None = None
    sparse: bool = False
    global_name: str = ""
    awaits_member: bool = False

    def read_long_name(self, payload: bytes, offset_bytes: int) -> None:
        self.name = _decode(payload.split(b"\0", 1)[0])

    def read_long_link(self, payload: bytes, offset_bytes: int) -> None:
        """A link's target is of no use here."""

    def read_pax(self, payload: bytes, offset_bytes: int) -> None:
        for key, value in _pax_records(payload, offset_bytes):
            if key == b"path" and not self.sparse:
                self.name = _decode(value)
            elif key == b"size" and value:
                if not re.fullmatch(rb"[0-9]{1,18}", value):
                    raise TarError(ErrorKind.CORRUPT, offset_bytes, f"a pax header gives size {value[:40]!r}")
                self.size_bytes = int(value)
            elif key.startswith(b"GNU.sparse."):
                self.sparse = True
                if key == b"GNU.sparse.name":
                    self.name = _decode(value)

    def read_global_pax(self, payload: bytes, offset_bytes: int) -> None:
        for key, value in _pax_records(payload, offset_bytes):
            if key == b"path":
                self.global_name = _decode(value)


_EXTENSION_READERS = {
    ord("L"): _Extension.read_long_name,
    ord("K"): _Extension.read_long_link,
    ord("x"): _Extension.read_pax,
    ord("X"): _Extension.read_pax,  # Solaris
    ord("g"): _Extension.read_global_pax,
}


def _parse_header(block: bytes, offset_bytes: int) -> _Header:
    if not _checksum_holds(block):
        raise TarError(ErrorKind.CORRUPT, offset_bytes, "a member's header fails its checksum")
    size_bytes = _number(block[124:136])
    if size_bytes is None:
        raise TarError(
            ErrorKind.CORRUPT, offset_bytes, f"a member's header gives size {block[124:136]!r}, no byte count"
        )
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    return _Header(block[156], _decode(name), size_bytes, more_sparse_blocks=block[482] != 0)


def _checksum_holds(block: bytes) -> bool:
    """Sum of the header's bytes, the checksum's own field as spaces; old archivers took bytes as signed."""
    wanted = _octal(block[148:156])
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if wanted == unsigned:
        return True
    return wanted == unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _number(field: bytes) -> int | None:
    """A size: octal digits, or GNU's base-256 with the top bit set. None where it is neither, or absurd."""
    if field[0] == 0x80:
        number = int.from_bytes(field[1:], "big")
        return number if number <= _MAX_SIZE_BYTES else None
    return _octal(field)


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip(b" ")
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _pax_records(payload: bytes, offset_bytes: int) -> Iterator[tuple[bytes, bytes]]:
    """Records are "<length> <key>=<value>\\n", where length counts the whole record."""
    position = 0
    while position < len(payload) and payload[position] != 0:
        match = re.compile(rb"([0-9]{1,7}) ([^=]+)=").match(payload, position)
        end = position + int(match[1]) if match else 0
        if not match or end > len(payload) or end <= match.end() or payload[end - 1] != ord("\n"):
            raise TarError(ErrorKind.CORRUPT, offset_bytes, "a pax header holds a malformed record")
        yield match[2], payload[match.end() : end - 1]
        position = end


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _decode(name: bytes) -> str:
    return name.decode("utf-8", errors="backslashreplace")
