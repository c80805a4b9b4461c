"""Work folders can be resumed, and their files have all bytes before anything is written to them."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from resources.lake import scratch
from resources.lake.files import Lake, LakeError
from resources.lake.scratch import Arrays, WorkFolder, reserve, shared_file


@pytest.mark.parametrize("by_the_system", [True, False])
def test_bytes_are_on_the_disk_and_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_the_system: bool) -> None:
    if not by_the_system:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "large").write_bytes(b"left by another search" * 1000)
    reserve(folder, {"large": 3_000_000, "small": 3, "empty": 0})
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == {"large": 3_000_000, "small": 3, "empty": 0}
    assert (folder / "large").stat().st_blocks * 512 >= 3_000_000
    assert (folder / "large").read_bytes() == bytes(3_000_000)


def test_an_error_other_than_no_room_is_raised_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken") as error:
        reserve(tmp_path, {"taken": 10})
    assert error.value.errno == errno.EISDIR


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


ARRAYS: Arrays = {"rank": (np.int64, (5,)), "vectors": (np.float16, (5, 3))}


def test_work_is_resumed_from_the_last_saved_state(lake: Lake) -> None:
    work = WorkFolder(lake, "search/b32")
    assert work.state == {}
    assert not work.is_complete([])
    work.begin({"provenance": "p", "done": 0}, ARRAYS)
    assert WorkFolder(lake, "search/b32").state == {}  # not stored before the arrays are filled
    work.array("rank", np.int64, mode="r+")[:] = range(5)
    work.array("vectors", np.float16, (5, 3), "r+")[2] = 1
    work.save(done=2)
    work.state["done"] = 4  # and the process ends

    again = WorkFolder(lake, "search/b32")
    assert again.state == {"provenance": "p", "done": 2}
    assert again.is_of("p")
    assert not again.is_of("q")
    assert again.array("rank", np.int64).tolist() == [0, 1, 2, 3, 4]
    assert again.array("vectors", np.float16, (5, 3)).sum() == 3
    assert json.loads((Path(lake.root) / "search/b32/state.json").read_text()) == again.state


def test_an_array_for_reading_cannot_be_written(lake: Lake) -> None:
    work = WorkFolder(lake, "search/b32")
    work.begin({"done": 0}, ARRAYS)
    with pytest.raises(ValueError, match="read-only"):
        work.array("rank", np.int64)[0] = 1


def test_work_that_lost_a_file_is_not_complete(lake: Lake) -> None:
    work = WorkFolder(lake, "search/b32")
    work.begin({"done": 0}, ARRAYS)
    work.save()
    assert work.is_complete(ARRAYS)
    work.remove("vectors")
    assert not WorkFolder(lake, "search/b32").is_complete(ARRAYS)
    assert WorkFolder(lake, "search/b32").is_complete(["rank"])


def test_work_that_begins_anew_has_no_state_until_it_is_saved_and_leaves_readers_their_arrays(lake: Lake) -> None:
    work = WorkFolder(lake, "search/b32")
    work.begin({"provenance": "p"}, ARRAYS)
    work.array("rank", np.int64, mode="r+")[:] = 7
    work.save()
    reader = WorkFolder(lake, "search/b32")
    read = reader.array("rank", np.int64)
    work.begin({"provenance": "q"}, ARRAYS)
    assert reader.read_state() == {}
    assert read.tolist() == [7] * 5
    assert work.array("rank", np.int64).tolist() == [0] * 5
    work.save()
    assert reader.read_state() == {"provenance": "q"}
    assert reader.state == {"provenance": "p"}


def test_no_room_leaves_neither_arrays_nor_state(lake: Lake) -> None:
    work = WorkFolder(lake, "search/b32")
    work.begin({"done": 0}, ARRAYS)
    work.save()
    with pytest.raises(LakeError, match=r"no room for .*Remedy: make room"):
        work.begin({"done": 0}, {"rank": (np.int8, (1 << 60,))})
    assert {path.name for path in work.path.iterdir()} == {"vectors"}
    assert WorkFolder(lake, "search/b32").state == {}


def test_folders_of_other_searches_are_removed_but_for_those_that_are_kept(lake: Lake) -> None:
    for name in ("a", "b", "c"):
        WorkFolder(lake, f"search/{name}").begin({}, ARRAYS)
    WorkFolder(lake, "search/a").remove_siblings(["c"])
    assert sorted(path.name for path in (Path(lake.root) / "search").iterdir()) == ["a", "c"]


@pytest.mark.parametrize("root", ["lake", "s3"])
def test_parts_are_whole_or_absent_and_go_with_their_folder(
    tmp_path: Path, root: str, request: pytest.FixtureRequest
) -> None:
    lake = Lake(f"{request.getfixturevalue('bucket')}/lake" if root == "s3" else str(tmp_path / root))
    work = WorkFolder(lake, "captioning/blip/00000")
    assert work.parts() == []
    for name in ("a-2", "a-1", "b-1"):
        with work.writing(name) as temporary:
            temporary.write_text(name)
    with pytest.raises(RuntimeError, match="killed"), work.writing("a-3") as temporary:
        temporary.write_text("half")
        raise RuntimeError("killed")
    work.save(done=1)
    assert [lake.store.read(path) for path in work.parts("a-")] == [b"a-1", b"a-2"]
    assert [path.rsplit("/", 1)[-1] for path in work.parts()] == ["a-1", "a-2", "b-1"]
    work.clear()
    assert work.parts() == []
    assert not lake.store.files(work.url)
    assert WorkFolder(lake, "captioning/blip/00000").state == {}


def test_work_on_a_remote_lake_goes_on_on_another_machine(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on(machine: str) -> WorkFolder:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        return WorkFolder(Lake(f"{bucket}/lake"), "work/b32")

    first = on("first")
    first.begin({"done": 0}, ARRAYS)
    first.array("rank", np.int64, mode="r+")[:] = [5, 4, 3, 2, 1]
    first.save(done=1)
    second = on("second")
    assert second.state == {"done": 1}
    assert second.array("rank", np.int64).tolist() == [5, 4, 3, 2, 1]
    second.array("rank", np.int64, mode="r+")[0] = 9
    second.save(done=2)
    again = on("first")  # whose own copy is older by now
    assert again.state == {"done": 2}
    assert again.array("rank", np.int64).tolist() == [9, 4, 3, 2, 1]
    again.clear()
    assert on("third").state == {}


def test_a_complete_array_is_copied_to_a_remote_lake_once_for_workers_elsewhere(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "CHECKPOINT_SECONDS", 0)
    work = WorkFolder(Lake(f"{bucket}/lake"), "work/b32")
    work.begin({}, ARRAYS)
    work.array("rank", np.int64, mode="r+")[:] = [5, 4, 3, 2, 1]
    location = work.share("rank")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    elsewhere = Lake(f"{bucket}/lake")
    assert np.fromfile(shared_file(elsewhere, location), np.int64).tolist() == [5, 4, 3, 2, 1]
    (tmp_path / "other").write_bytes(b"other")
    elsewhere.store.put(location, tmp_path / "other")
    work.save(done=1)
    assert work.share("rank") == location
    assert elsewhere.store.read(location) == b"other"
    work.remove("rank")
    assert elsewhere.store.stat(location) is None


def test_a_local_lake_shares_its_own_files(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "lake"))
    work = WorkFolder(lake, "work/b32")
    work.begin({}, ARRAYS)
    assert shared_file(lake, work.share("rank")) == work.path / "rank"
