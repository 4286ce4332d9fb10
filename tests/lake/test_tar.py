"""The tar reader agrees with tarfile on honest archives, and survives the others."""

import gzip
import io
import tarfile
import tracemalloc
from pathlib import Path
from typing import BinaryIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.lake.tar import MAX_EXTENSION_BYTES, TarError, TarReader
from schemas.labels import ErrorKind
from tests.lake.tars import BLOCK, END, header, make_tar, padded, pax, record

Members = list[tuple[str, bytes]]
HONEST = make_tar({"a.jpg": b"first", "folder/b.jpg": b"x" * 700, "c.txt": b"", "d.jpg": b"last" * 128})


def read_all(data: bytes, sized: bool = True) -> tuple[Members, TarError | None]:
    """The regular files until the end, or until the error."""
    reader = TarReader(io.BytesIO(data), len(data) if sized else None)
    members: Members = []
    try:
        for member in reader:
            if not member.not_a_file and member.size_bytes < 1 << 20:
                members.append((member.name, reader.read_data()))
    except TarError as error:
        return members, error
    return members, None


def read_error(data: bytes, sized: bool = True) -> TarError:
    _, error = read_all(data, sized)
    assert error is not None
    return error


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=["Cc"]),
    min_size=1,
    max_size=160,
).filter(lambda name: name.strip(".") != "")


class TestHonestTars:
    @settings(deadline=None)
    @given(
        st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=6),
        st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
        st.booleans(),
    )
    def test_names_and_data_are_those_that_tarfile_wrote(
        self, members: Members, tar_format: int, sized: bool
    ) -> None:
        if tar_format == tarfile.USTAR_FORMAT:  # it has no room for longer names
            members = [(name.encode()[:90].decode(errors="ignore") or "n", data) for name, data in members]
        data = make_tar(members, tar_format)
        with tarfile.open(fileobj=io.BytesIO(data)) as oracle:
            expected = [(info.name, cast(BinaryIO, oracle.extractfile(info)).read()) for info in oracle]
        assert read_all(data, sized) == (expected, None)

    @pytest.mark.parametrize("sized", [True, False])
    def test_data_that_nobody_asks_for_are_passed_over(self, sized: bool) -> None:
        reader = TarReader(io.BytesIO(HONEST), len(HONEST) if sized else None)
        assert [(member.name, member.size_bytes, member.offset_bytes) for member in reader] == [
            ("a.jpg", 5, 0),
            ("folder/b.jpg", 700, 1024),
            ("c.txt", 0, 2560),
            ("d.jpg", 512, 3072),
        ]

    def test_an_empty_tar_has_no_members(self) -> None:
        assert read_all(make_tar({})) == ([], None)

    @pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_a_long_name_is_whole(self, tar_format: int) -> None:
        name = "folder/" * 60 + "é.jpg"
        assert read_all(make_tar({name: b"x"}, tar_format)) == ([(name, b"x")], None)

    def test_ustar_splits_a_name_into_prefix_and_rest(self) -> None:
        name = "f" * 120 + "/" + "n" * 90 + ".jpg"
        assert read_all(make_tar({name: b"x"}, tarfile.USTAR_FORMAT)) == ([(name, b"x")], None)

    def test_gnu_times_are_not_taken_for_a_prefix(self) -> None:
        gnu = bytearray(header(b"a.jpg", 1, magic=b"ustar  \0"))
        gnu[345:356] = b"14371573052"
        gnu[148:156] = b"%06o\0 " % (sum(gnu) - sum(gnu[148:156]) + 8 * 32)
        assert read_all(bytes(gnu) + padded(b"x") + END) == ([("a.jpg", b"x")], None)

    def test_a_v7_header_without_magic_is_read(self) -> None:
        data = (
            header(b"a.jpg", 1, kind=b"\0", magic=b"")
            + padded(b"x")
            + header(b"folder/", kind=b"\0", magic=b"")
        )
        assert read_all(data + END) == ([("a.jpg", b"x")], None)

    def test_a_checksum_of_signed_bytes_is_accepted(self) -> None:
        block = bytearray(header("é.jpg".encode(), 1))
        unsigned = sum(block) - sum(block[148:156]) + 8 * 32
        block[148:156] = b"%06o\0 " % (unsigned - 2 * 256)
        assert read_all(bytes(block) + padded(b"x") + END) == ([("é.jpg", b"x")], None)

    @pytest.mark.parametrize(
        ("stored", "shown"),
        [
            (b"./a.jpg", "a.jpg"),
            (b"../../etc/passwd", "../../etc/passwd"),
            (b"/etc/passwd", "/etc/passwd"),
            (b"\xff.jpg", "\\xff.jpg"),
        ],
    )
    def test_a_name_is_only_text(
        self, stored: bytes, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert read_all(header(stored, 1) + padded(b"x") + END) == ([(shown, b"x")], None)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("kind", "named"),
        [(b"1", "hard link"), (b"2", "symbolic link"), (b"5", "special entry"), (b"6", "special entry")],
    )
    def test_what_is_not_a_file_says_what_it_is_and_has_no_data(self, kind: bytes, named: str) -> None:
        data = header(b"a.jpg", 5, kind) + header(b"b.jpg", 1) + padded(b"x") + END
        members = [(m.name, m.not_a_file, m.size_bytes) for m in TarReader(io.BytesIO(data), len(data))]
        assert members == [("a.jpg", named, 0), ("b.jpg", "", 1)]

    def test_sparse_files_are_recognized_and_passed_over(self) -> None:
        gnu = bytearray(header(b"old.jpg", 3, b"S", magic=b"ustar  \0"))
        gnu[482] = 1  # another block of the map follows
        gnu[148:156] = b"%06o\0 " % (sum(gnu) - sum(gnu[148:156]) + 8 * 32)
        more = bytes(504) + b"\1" + bytes(7)
        by_pax = pax(record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.name", b"new.jpg"))
        data = bytes(gnu) + more + bytes(BLOCK) + padded(b"abc")
        data += by_pax + header(b"GNUSparseFile.0/new.jpg", 3) + padded(b"abc") + header(b"b.jpg") + END
        members = [(m.name, m.not_a_file) for m in TarReader(io.BytesIO(data), len(data))]
        assert members == [("old.jpg", "sparse file"), ("new.jpg", "sparse file"), ("b.jpg", "")]


class TestDamagedTars:
    @pytest.mark.parametrize("sized", [True, False])
    def test_a_tar_cut_anywhere_gives_what_is_whole_and_says_truncated(self, sized: bool) -> None:
        whole, _ = read_all(HONEST)
        end_of_marker = len(padded(HONEST.rstrip(b"\0"))) + 2 * BLOCK
        for size in [*range(0, end_of_marker, 61), *range(0, end_of_marker, BLOCK), end_of_marker - 1]:
            members, error = read_all(HONEST[:size], sized)
            assert error is not None, size
            assert error.kind == ErrorKind.TRUNCATED
            assert members == whole[: len(members)]
        assert read_all(HONEST[:end_of_marker], sized) == (whole, None)

    def test_a_tar_cut_between_members_is_not_taken_for_complete(self) -> None:
        error = read_error(HONEST[:1024])
        assert str(error) == "the tar ends in place of a header or the end marker (byte 1024 of the tar)"

    def test_every_byte_of_a_header_is_under_its_checksum(self) -> None:
        whole, _ = read_all(HONEST)
        for position in {*range(1024, 1024 + BLOCK)} - {1024 + 155}:  # the space behind the checksum itself
            damaged = bytearray(HONEST)
            damaged[position] ^= 0x04
            members, error = read_all(bytes(damaged))
            assert members == whole[:1]
            assert error is not None
            assert (error.kind, error.offset_bytes) == (ErrorKind.CORRUPT, 1024)

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, len(HONEST) - 1), st.integers(0, 255)), min_size=1, max_size=8),
        st.integers(0, len(HONEST)),
        st.booleans(),
        st.booleans(),
    )
    def test_any_damage_ends_in_members_or_a_tar_error(
        self, changes: list[tuple[int, int]], size: int, cut: bool, sized: bool
    ) -> None:
        damaged = bytearray(HONEST)
        for position, value in changes:
            damaged[position] = value
        members, error = read_all(bytes(damaged[:size] if cut else damaged), sized)
        assert len(members) <= 4
        assert error is None or error.offset_bytes <= len(HONEST)

    @settings(deadline=None)
    @given(st.binary(max_size=3000), st.booleans())
    def test_noise_ends_in_a_tar_error(self, noise: bytes, sized: bool) -> None:
        members, error = read_all(noise, sized)
        assert error is not None or members == []

    @pytest.mark.parametrize("sized", [True, False])
    @pytest.mark.parametrize(
        ("size", "kind"),
        [
            (b"\xff" * 12, ErrorKind.CORRUPT),  # -1 in base 256
            (b"\x80" + b"\xff" * 11, ErrorKind.CORRUPT),
            (b"\x80" + (1 << 50).to_bytes(11, "big"), ErrorKind.TRUNCATED),
            (b"-0000000001", ErrorKind.CORRUPT),
            (b"0x10", ErrorKind.CORRUPT),
            (b"1_000", ErrorKind.CORRUPT),
            (b"77777777777", ErrorKind.TRUNCATED),
        ],
    )
    def test_a_size_that_cannot_be_is_refused(self, size: bytes, kind: ErrorKind, sized: bool) -> None:
        data = header(b"good.jpg", 1) + padded(b"x") + header(b"a.jpg", size) + END
        reader = TarReader(io.BytesIO(data), len(data) if sized else None)
        with pytest.raises(TarError) as failure:
            list(reader)
        assert failure.value.kind == kind

    def test_a_size_past_the_end_names_member_and_bytes(self) -> None:
        error = read_error(header(b"a.jpg", 5000) + b"x" * 2000 + END)
        assert str(error) == (
            "member 'a.jpg' claims 5000 bytes, which end at byte 5512; the tar ends at byte 3536 "
            "(byte 0 of the tar)"
        )

    def test_one_zero_block_is_not_the_end(self) -> None:
        error = read_error(header(b"a.jpg") + bytes(BLOCK) + header(b"b.jpg") + END)
        assert (error.kind, error.offset_bytes) == (ErrorKind.CORRUPT, 2 * BLOCK)

    def test_a_second_tar_behind_the_first_does_not_vanish(self) -> None:
        members, error = read_all(HONEST + HONEST)
        assert [name for name, _ in members] == ["a.jpg", "folder/b.jpg", "c.txt", "d.jpg"]
        assert error is not None
        assert (error.kind, error.offset_bytes) == (ErrorKind.CORRUPT, len(HONEST))


class TestExtendedHeaders:
    def test_pax_gives_name_and_size_to_the_next_member_only(self) -> None:
        data = pax(record(b"path", b"long.jpg") + record(b"size", b"3"))
        data += header(b"short", 0) + padded(b"abc") + header(b"b.jpg", 1) + padded(b"x") + END
        assert read_all(data) == ([("long.jpg", b"abc"), ("b.jpg", b"x")], None)

    def test_an_empty_value_takes_pax_back(self) -> None:
        data = pax(record(b"path", b"") + record(b"size", b"")) + header(b"a.jpg", 1) + padded(b"x") + END
        assert read_all(data) == ([("a.jpg", b"x")], None)

    def test_a_global_name_is_weaker_than_a_members_own(self) -> None:
        data = (
            pax(record(b"path", b"g.jpg"), b"g")
            + header(b"a.jpg")
            + pax(record(b"path", b"p.jpg"))
            + header(b"b.jpg")
        )
        assert [name for name, _ in read_all(data + END)[0]] == ["g.jpg", "p.jpg"]

    @pytest.mark.parametrize(
        "records",
        [
            b"path=a\n",
            b"99 path=a\n",
            b"10 path=a\n ",
            b"0 path=a\n",
            b"5 path=a\n",
            b"9999999999999999999 path=a\n",
            b"-5 path=a\n",
            b"11 size=-33\n",
            b"12 size=0x10\n",
            b"40 size=99999999999999999999999999999999\n",
            b"12 patha....\n",
        ],
    )
    def test_a_malformed_pax_record_is_corrupt(self, records: bytes) -> None:
        error = read_error(header(b"good.jpg") + pax(records) + header(b"a.jpg") + END)
        assert (error.kind, error.offset_bytes) == (ErrorKind.CORRUPT, BLOCK)

    def test_an_extended_header_without_its_member_is_corrupt(self) -> None:
        error = read_error(header(b"a.jpg") + pax(record(b"path", b"b.jpg")) + END)
        assert str(error) == "no member follows an extended header (byte 1536 of the tar)"
        assert read_all(header(b"a.jpg") + pax(record(b"comment", b"bye"), b"g") + END)[1] is None

    @pytest.mark.parametrize("sized", [True, False])
    @pytest.mark.parametrize("kind", [b"x", b"g", b"X", b"L", b"K"])
    def test_an_extended_header_has_a_ceiling(self, kind: bytes, sized: bool) -> None:
        at_most = b"n" * MAX_EXTENSION_BYTES
        too_much = (
            header(b"", MAX_EXTENSION_BYTES + 1, kind) + padded(at_most + b"n") + header(b"a.jpg") + END
        )
        assert "claims 1048577 bytes, at most 1048576 are read" in str(read_error(too_much, sized))
        huge = header(b"", b"\x80" + b"\x00\x00\x00\x7f" + bytes(7), kind) + END
        assert read_error(huge, sized).kind == ErrorKind.CORRUPT

    def test_a_long_chain_of_extended_headers_costs_no_memory_or_stack(self) -> None:
        chain = pax(record(b"path", b"p.jpg")) * 5000
        members, error = read_all(chain + header(b"a.jpg") + END)
        assert (members, error) == ([("p.jpg", b"")], None)

    def test_pax_records_are_read_in_linear_time(self) -> None:
        records = b"6 a=b\n" * (MAX_EXTENSION_BYTES // 6)
        assert read_all(pax(records) + header(b"a.jpg") + END) == ([("a.jpg", b"")], None)


class _Parts:
    """A stream of given bytes and numbers of zeros, not seekable, as a decompressor is."""

    def __init__(self, *parts: bytes | int) -> None:
        self._parts = list(parts)

    def read(self, size_bytes: int) -> bytes:
        if not self._parts:
            return b""
        part = self._parts.pop(0)
        if isinstance(part, int):
            given = bytes(min(part, size_bytes))
            rest: bytes | int = part - len(given)
        else:
            given, rest = part[:size_bytes], part[size_bytes:]
        if rest:
            self._parts.insert(0, rest)
        return given if len(given) == size_bytes else given + self.read(size_bytes - len(given))


class TestMemory:
    def test_members_of_gigabytes_are_passed_over_without_being_read(self, tmp_path: Path) -> None:
        """A sparse file of 20 GB: sizes beyond octal's 8 GiB, in base 256 and in pax."""
        ten_gb = 10_000_000_000
        gap_bytes = ten_gb + -ten_gb % BLOCK
        with open(tmp_path / "big.tar", "wb") as file:
            file.write(header(b"one.bin", b"\x80" + ten_gb.to_bytes(11, "big")))
            file.seek(gap_bytes, 1)
            file.write(pax(record(b"size", b"10000000000")) + header(b"two.bin", 0))
            file.seek(gap_bytes, 1)
            file.write(header(b"photo.jpg", 5) + padded(b"photo") + END)
            total_bytes = file.tell()
        tracemalloc.start()
        with open(tmp_path / "big.tar", "rb") as file:
            reader = TarReader(file, total_bytes)
            sizes = {member.name: member.size_bytes for member in reader}
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert sizes == {"one.bin": ten_gb, "two.bin": ten_gb, "photo.jpg": 5}
        assert peak_bytes < 4 << 20

    def test_a_gzipped_member_of_a_gigabyte_is_passed_over_in_pieces(self) -> None:
        tracemalloc.start()
        names = [
            member.name
            for member in TarReader(cast(BinaryIO, _Parts(header(b"big.bin", 1 << 30), 1 << 30, END)), None)
        ]
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert names == ["big.bin"]
        assert peak_bytes < 8 << 20


class TestGzip:
    def read(self, data: bytes) -> tuple[Members, TarError | None]:
        reader = TarReader(cast(BinaryIO, gzip.GzipFile(fileobj=io.BytesIO(data))), None)
        members: Members = []
        try:
            for member in reader:
                members.append((member.name, reader.read_data()))
        except TarError as error:
            return members, error
        return members, None

    def test_it_reads_as_the_plain_tar_does_also_in_several_gzip_members(self) -> None:
        assert self.read(gzip.compress(HONEST)) == read_all(HONEST)
        assert self.read(gzip.compress(HONEST[:1500]) + gzip.compress(HONEST[1500:])) == read_all(HONEST)

    def test_a_cut_stream_is_truncated(self) -> None:
        whole = gzip.compress(HONEST)
        for size in range(0, len(whole), 7):
            members, error = self.read(whole[:size])
            assert error is not None
            assert error.kind == ErrorKind.TRUNCATED
            assert members == read_all(HONEST)[0][: len(members)]

    def test_damage_shows_at_the_latest_in_the_checksum_at_the_end(self) -> None:
        whole = gzip.compress(HONEST)
        for position in range(10, len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 0x10
            members, error = self.read(bytes(damaged))
            # A match may move within a run of zeros and change nothing.
            assert error is not None or members == read_all(HONEST)[0]
