"""Members of a tar form samples, and what is read of a sample is what is written of it."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from resources.pools.formats import open_pool
from resources.settings import PoolSettings
from resources.storage import tars
from resources.storage.tar_samples import group_samples, members_by_key, split_name
from resources.storage.tar_writer import Copy, copy_samples, new_tar
from tests.support.pool_factory import caption, picture
from tests.support.pool_factory import write_tar as write_source

Members = list[tuple[str, bytes]]


def index_of(path: Path) -> tars.TarIndex:
    return tars.walk(memoryview(path.read_bytes()), str(path))


def test_a_key_ends_at_the_first_dot_of_the_file_name() -> None:
    assert split_name("./a.b/c.seg.png") == ("a.b/c", "seg.png")
    assert split_name("._c.jpg") == ("", "_c.jpg")
    assert split_name("README") == ("README", "")


def test_a_sample_has_the_members_of_one_key_with_each_suffix_once(tmp_path: Path) -> None:
    path = write_source(
        tmp_path / "a.tar",
        [
            ("x/a.jpg", b"1"),
            ("x/a.txt", b"2"),
            ("b.seg.png", b"3"),
            ("b.jpg", b"4"),
            ("b.jpg", b"5"),
            ("x/a.json", b"6"),
            ("./c.JPG", b"7"),
            ("c.png", b"8"),
        ],
    )
    samples, others = group_samples(index_of(path))
    assert [(sample.key, sorted(sample.kinds), sample.scattered) for sample in samples] == [
        ("x/a", ["image", "json", "text"], True),
        ("b", ["image"], False),
        ("b", ["image"], False),
        ("c", ["image"], False),
    ]
    assert samples[3].image is not None
    assert samples[3].image.name == "./c.JPG"
    assert others == ["b.seg.png"]


def test_the_first_image_that_can_be_read_is_the_samples(tmp_path: Path) -> None:
    path = write_source(tmp_path / "a.tar", [("a.tiff", b"1"), ("a.png", b"2"), ("a.jpg", b"3"), ("b.heic", b"4")])
    samples, _ = group_samples(index_of(path))
    assert [sample.image.name for sample in samples if sample.image is not None] == ["a.png", "b.heic"]
    assert [member.name for member in samples[0].members] == ["a.tiff", "a.png", "a.jpg"]


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["a.input.jpg", "a.outputs.txt", "b.input.jpg", "b.outputs.txt"], ["a", "b"]),
        (["v1.0.jpg", "v1.0.txt", "v1.1.jpg", "v1.1.txt", "./v1.2.jpg"], ["v1.0", "v1.1", "v1.2"]),
        (["a.jpg", "a.seg.png", "a.mask.png"], ["a"]),
        (["README.txt.bak", "log.md", "a.npy"], []),
    ],
)
def test_names_with_several_dots_are_counted(tmp_path: Path, names: list[str], keys: list[str]) -> None:
    path = write_source(tmp_path / "a.tar", [(name, b"x") for name in names])
    samples, others = group_samples(index_of(path))
    assert [sample.key for sample in samples] == keys
    assert sum(len(sample.members) for sample in samples) + len(others) >= len(names)


def test_of_samples_with_one_key_the_first_is_written_with_all_its_members(tmp_path: Path) -> None:
    path = write_source(
        tmp_path / "a.tar",
        [
            ("x/a.jpg", b"1"),
            ("x/a.txt", b"2"),
            ("b.seg.png", b"3"),
            ("b.jpg", b"4"),
            ("b.cls", b"5"),
            ("b.cls", b"6"),
            ("b.jpg", b"7"),
            ("b.seg.png", b"8"),
            ("x/a.json", b"9"),
        ],
    )
    data = memoryview(path.read_bytes())
    found = members_by_key(index_of(path))
    assert {key: [bytes(data[m.offset : m.offset + m.size]) for m in group] for key, group in found.items()} == {
        "x/a": [b"1", b"2", b"9"],
        "b": [b"3", b"4", b"5"],
    }
    out = tmp_path / "b.tar"
    with new_tar(out) as tar:
        copy_samples(tar, data, found, [Copy("b", "b", 0), Copy("x/a", "x/a", 0), Copy("b", "b_1", 1)])
    with tarfile.open(out) as tar:
        assert tar.getnames() == [
            "b.seg.png",
            "b.jpg",
            "b.cls",
            "x/a.jpg",
            "x/a.txt",
            "x/a.json",
            *(f"b_1.{s}" for s in ("seg.png", "jpg", "cls")),
        ]


def whole(number: int) -> Members:
    return [(f"{number}.jpg", picture(number)), (f"{number}.json", b"{}"), (f"{number}.txt", caption(number).encode())]


def of_a_mac() -> Members:
    """Every member with its companion before it."""
    return [pair for n in range(4) for name, data in whole(n) for pair in ((f"._{name}", b"\0\5\x16\7"), (name, data))]


def with_notes() -> Members:
    """A member of another key between those of each sample."""
    return [m for n in range(4) for m in (whole(n)[0], (f"log-{n}.md", b"downloaded"), *whole(n)[1:])]


def with_two_images() -> Members:
    """A second image of the key, which belongs to the sample and is not its image."""
    return [m for n in range(4) for m in (*whole(n), (f"{n}.png", picture(n + 50, kind="PNG")))]


def with_a_key_again() -> Members:
    """A key that comes again later, with other bytes."""
    return [*whole(0), *whole(1), ("0.jpg", picture(60)), ("0.txt", b"another caption")]


def sorted_by_suffix() -> Members:
    """All images, then all .json, then all .txt."""
    return sorted((member for n in range(4) for member in whole(n)), key=lambda member: member[0].rpartition(".")[2])


@pytest.mark.parametrize("make", [of_a_mac, with_notes, with_two_images, with_a_key_again, sorted_by_suffix])
def test_what_is_exported_of_a_row_is_what_was_read_of_it(tmp_path: Path, make: Callable[[], Members]) -> None:
    path = write_source(tmp_path / "pool" / "00000.tar", make())
    read = open_pool(PoolSettings(path=str(path.parent)), {}).read_shard("00000").rows
    out = tmp_path / "exported" / "00000.tar"
    out.parent.mkdir()
    data = memoryview(path.read_bytes())
    with new_tar(out) as tar:
        wanted = [Copy(key, key, 0) for key in read["key"].to_pylist()]
        copy_samples(tar, data, members_by_key(index_of(path)), wanted)
    again = open_pool(PoolSettings(path=str(out.parent)), {}).read_shard("00000")
    assert again.rejects.num_rows == 0
    same = ["uid", "key", "caption", "sha256", "url"]
    assert again.rows.select(same).equals(read.select(same))


def test_a_mac_tar_is_exported_with_every_member_of_its_samples(tmp_path: Path) -> None:
    path = write_source(tmp_path / "a.tar", of_a_mac())
    found = members_by_key(index_of(path))
    assert [[member.name for member in members] for members in found.values()] == [
        [name for name, _ in whole(number)] for number in range(4)
    ]
