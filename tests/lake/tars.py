"""Tars for tests: honest ones by tarfile, dishonest ones header by header."""

import io
import tarfile
from collections.abc import Mapping, Sequence

BLOCK = 512
END = bytes(2 * BLOCK)


def make_tar(
    members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT
) -> bytes:
    """What Python's tarfile writes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header(
    name: bytes = b"a.jpg", size: int | bytes = 0, kind: bytes = b"0", magic: bytes = b"ustar\x0000"
) -> bytes:
    """One header block with a right checksum, whatever it says. Bytes for a size are put in as they are."""
    size_field = b"%011o\0" % size if isinstance(size, int) else size.ljust(12, b"\0")
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size_field + b"00000000000\0"
    block += b" " * 8 + kind + bytes(100) + magic
    block = block.ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def record(key: bytes, value: bytes) -> bytes:
    """A pax record, which starts with its own length."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    """An extended header with its payload."""
    return header(b"PaxHeader", len(records), kind) + padded(records)
