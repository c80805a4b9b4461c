"""Single files and listings of folders, on local disks and in an object store."""

from pathlib import Path

import pytest

from resources.storage import files
from resources.storage.by_location import open_store


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "pool") if request.param == "local" else f"{request.getfixturevalue('bucket')}/pool"


def test_a_file_by_itself_is_as_its_folder_lists_it_and_can_be_read(folder: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (tmp_path / "pool/inner").mkdir(parents=True)
    for name in ("00000.tar", "inner/00001.tar"):
        source.write_bytes(name.encode())
        open_store(folder).put(f"{folder}/{name}", source)
    listed = files.list_tree(folder)
    assert [file.name for file in listed] == ["00000.tar", "inner/00001.tar"]
    for file in listed:
        alone = files.stat(f"{folder}/{file.name}")
        assert (alone.url, alone.stamp) == (file.url, file.stamp)
        with files.open_binary(alone.url) as content:
            assert content.read().decode() == file.name
        with files.mapped(alone.url) as view:
            assert bytes(view).decode() == file.name
        assert files.read_ranges(alone.url, [(2, 3)]) == [file.name[2:5].encode()]
    with pytest.raises(FileNotFoundError):
        files.stat(f"{folder}/00009.tar")
