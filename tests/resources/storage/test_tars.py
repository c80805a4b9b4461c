"""The walk over a tar's headers: equal to tarfile, and complete up to a fault."""

import gc
import gzip
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resources.storage.tars import TarError, TarIndex, walk
from tests.support.pool_factory import write_tar

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def make(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def by_tarfile(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]


def members(index: TarIndex) -> list[tuple[str, int, int]]:
    return [tuple(member) for member in index.members]


@pytest.mark.parametrize("form", FORMATS)
def test_members_are_those_of_tarfile(form: int) -> None:
    names = ["a.jpg", "d/" * 60 + "b.txt", "x" * 99, "y" * 90 + "/" + "z" * 90]
    data = make([(name, b"0" * (i * 511)) for i, name in enumerate(names)], form)
    index = walk(data, "it.tar")
    assert index.fault is None
    assert members(index) == by_tarfile(data)
    assert index.names == names


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_those_of_tarfile(form: int) -> None:
    names = ["n" * 300 + ".jpg", "Grüße/猫.png", "ü" * 120, "plain.txt"]
    data = make([(name, b"data") for name in names], form)
    index = walk(data, "it.tar")
    assert members(index) == by_tarfile(data)
    assert index.names == names


def test_folders_and_links_are_no_members_with_bytes() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("s", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "f.jpg"
            tar.addfile(info)
        info = tarfile.TarInfo("f.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    index = walk(out.getvalue(), "it.tar")
    assert members(index) == by_tarfile(out.getvalue())
    assert [name.rstrip("/") for name in index.others] == ["d", "s", "h"]


def test_a_size_in_base_256_is_read() -> None:
    data = bytearray(make([("a.jpg", b"x" * 700), ("b.jpg", b"y")], tarfile.GNU_FORMAT))
    data[124:136] = b"\x80" + (700).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    assert members(walk(bytes(data), "it.tar")) == by_tarfile(bytes(data))


def test_a_size_in_a_pax_header_wins() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 600
        info.pax_headers = {"size": "600", "comment": "with = and\nnew line"}
        tar.addfile(info, io.BytesIO(b"x" * 600))
        tar.addfile(tarfile.TarInfo("b.jpg"))
    data = bytearray(out.getvalue())
    header = data.index(b"a.jpg", 1024)
    data[header + 124 : header + 136] = b"%011o\0" % 0
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    index = walk(bytes(data), "it.tar")
    assert members(index) == by_tarfile(bytes(data))
    assert index.sizes == [600, 0]


@given(cut=st.integers(0, 6 * 1024 + 10240))
@settings(max_examples=60, deadline=None)
def test_a_cut_tar_gives_every_member_before_the_cut(cut: int) -> None:
    data = make([(f"{i}.jpg", b"x" * 400) for i in range(6)])
    whole = walk(data, "it.tar")
    part = walk(data[:cut], "it.tar") if cut >= 512 or cut == 0 else None
    if part is None:
        with pytest.raises(TarError, match="not a tar"):
            walk(data[:cut], "it.tar")
        return
    assert list(part.members) == [m for m in whole.members if m.offset + m.size <= cut]
    assert (part.fault is None) == (cut >= 6 * 1024 + 512)
    if part.cut is not None:
        assert part.cut == list(whole.members)[len(part.names)]


def test_what_comes_before_a_damaged_header_is_used() -> None:
    data = bytearray(make([(f"{i}.jpg", b"x" * 400) for i in range(4)]))
    data[2 * 1024 + 3] ^= 0xFF
    index = walk(bytes(data), "it.tar")
    assert index.names == ["0.jpg", "1.jpg"]
    assert index.fault == "damaged header at byte 2,048"


@pytest.mark.parametrize("size", [b"-0000001000\0", b"\xff" * 12])
def test_a_negative_size_ends_the_walk_and_does_not_turn_it_back(size: bytes) -> None:
    data = bytearray(make([("a.jpg", b"x"), ("b.jpg", b"y")]))
    data[1024 + 124 : 1024 + 136] = size
    data[1024 + 148 : 1024 + 156] = b" " * 8
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024:1536])
    index = walk(bytes(data), "it.tar")
    assert index.names == ["a.jpg"]
    assert index.fault == "damaged header at byte 1,024"


@pytest.mark.parametrize("size", ["-512", "many"])
def test_a_pax_size_that_is_none_is_a_damaged_header(size: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
        info = tarfile.TarInfo("b.jpg")
        info.pax_headers = {"size": size}
        tar.addfile(info)
    index = walk(out.getvalue(), "it.tar")
    assert index.names == ["a.jpg"]
    assert index.fault is not None
    assert "damaged header" in index.fault


def test_a_file_that_is_no_tar_is_refused_by_name() -> None:
    with pytest.raises(TarError, match=r"it\.tar.*not a tar"):
        walk(b"<html>not found</html>" * 100, "it.tar")


def test_a_compressed_tar_is_refused_with_the_remedy() -> None:
    with pytest.raises(TarError, match=r"it\.tar: this is a gzip file.*Decompress"):
        walk(gzip.compress(make([("a.jpg", b"x")])), "it.tar")


def test_a_sparse_member_is_refused_with_the_remedy() -> None:
    data = bytearray(make([("a.jpg", b"x")], tarfile.GNU_FORMAT))
    data[156:157] = b"S"
    with pytest.raises(TarError, match=r"a\.jpg is sparse.*--sparse"):
        walk(bytes(data), "it.tar")


def test_an_empty_file_is_a_fault_and_an_empty_tar_is_not(tmp_path: Path) -> None:
    assert walk(b"", "it.tar").fault == "the file is empty"
    with tarfile.open(tmp_path / "it.tar", "w"):
        pass
    index = walk((tmp_path / "it.tar").read_bytes(), "it.tar")
    assert (index.names, index.fault) == ([], None)


def test_many_members_keep_their_names_and_the_first_bad_one_is_found_among_them() -> None:
    names = [f"{i:05d}.txt" for i in range(9000)]
    names[8500] = "long/" * 25 + "8500.txt"
    data = bytearray(make([(name, b"") for name in names]))
    index = walk(bytes(data), "it.tar")
    assert index.names == names
    damaged = data.index(b"08700.txt")
    data[damaged + 1] ^= 1
    index = walk(bytes(data), "it.tar")
    assert index.names == names[:8700]
    assert index.fault == f"damaged header at byte {damaged:,}"


def test_the_walk_leaves_nothing_to_collect_however_many_members_there_are() -> None:
    data = make([(f"{i:05d}.txt", b"") for i in range(9000)])
    collections: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        collections.append(phase)

    gc.collect()
    gc.callbacks.append(note)
    try:
        found = sum(member.size == 0 for member in walk(data, "it.tar").members)
    finally:
        gc.callbacks.remove(note)
    assert (found, collections) == (9000, [])


def test_tars_that_are_joined_are_read_to_the_last_and_noted(tmp_path: Path) -> None:
    parts = [write_tar(tmp_path / f"{n}.tar", [(f"{n}.txt", bytes([n]) * 700)]).read_bytes() for n in range(3)]
    index = walk(b"".join(parts), "a.tar")
    assert index.names == ["0.txt", "1.txt", "2.txt"]
    assert [b"".join(parts)[offset] for offset in index.offsets] == [0, 1, 2]
    assert index.fault is None
    assert index.after_end is not None
    assert index.after_end.startswith("3 tars are joined")


def test_other_data_after_the_end_is_noted_and_padding_is_not(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar", [("a.txt", b"x")]).read_bytes()
    assert walk(data + bytes(10**7), "a.tar").after_end is None
    index = walk(data + bytes(10**7) + b"<html>" * 200, "a.tar")
    assert index.names == ["a.txt"]
    assert index.fault is None
    assert index.after_end is not None
    assert "are no tar" in index.after_end
