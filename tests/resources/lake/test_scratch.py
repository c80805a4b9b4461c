"""Work files reserve their bytes before anything is written."""

import errno
import os
from pathlib import Path

import pytest

from resources.lake.scratch import reserve


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


def test_an_error_that_is_not_want_of_room_is_told_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken") as error:
        reserve(tmp_path, {"taken": 10})
    assert error.value.errno == errno.EISDIR
