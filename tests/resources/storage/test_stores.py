"""Stores: what local disks and an S3 server have in common, and local copies of objects."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from resources.storage.by_location import open_store
from resources.storage.objects import CACHE_VARIABLE, ENDPOINTS, IN_USE_SECONDS, RETRIES, credential_free
from resources.storage.stores import StorageError, Store, cache_folder
from tests.support.faulty_proxy import faulty_proxy


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return a folder that is empty, on either storage."""
    if request.param == "local":
        return str(tmp_path / "data")
    return f"{request.getfixturevalue('bucket')}/team/data"


@pytest.fixture
def store(root: str) -> Store:
    return open_store(root)


def put(store: Store, location: str, content: bytes, folder: Path) -> None:
    if "://" not in location:
        Path(location).parent.mkdir(parents=True, exist_ok=True)
        folder = Path(location).parent
    source = folder / ".source"
    source.write_bytes(content)
    store.put(location, source)


def test_a_listing_shows_names_sizes_and_tags_that_change(store: Store, root: str, tmp_path: Path) -> None:
    put(store, f"{root}/a/two", b"22", tmp_path)
    put(store, f"{root}/a/one", b"1", tmp_path)
    put(store, f"{root}/a/below/three", b"333", tmp_path)
    assert [(entry.name, entry.size) for entry in store.files(f"{root}/a")] == [("one", 1), ("two", 2)]
    assert [entry.name for entry in store.files(root, deep=True)] == ["three", "one", "two"]
    assert store.folders(f"{root}/a") == ["below"]
    before = store.stat(f"{root}/a/one")
    put(store, f"{root}/a/one", b"2", tmp_path)
    after = store.stat(f"{root}/a/one")
    assert before is not None
    assert after is not None
    assert before.tag != after.tag
    assert store.files(f"{root}/a")[0].tag == after.tag


def test_what_is_not_there_is_empty_absent_or_an_error(store: Store, root: str) -> None:
    assert store.files(f"{root}/none") == []
    assert store.folders(f"{root}/none") == []
    assert store.stat(f"{root}/none") is None
    assert not store.delete(f"{root}/none")
    store.delete_folder(f"{root}/none")
    for read in (store.read, store.open, lambda location: store.move(location, f"{root}/other")):
        with pytest.raises(FileNotFoundError):
            read(f"{root}/none")


def test_a_file_is_read_whole_and_in_ranges(store: Store, root: str, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    put(store, f"{root}/x", content, tmp_path)
    assert store.read(f"{root}/x") == content
    assert store.local(f"{root}/x").read_bytes() == content
    with store.open(f"{root}/x") as file:
        assert file.seek(0, os.SEEK_END) == len(content)
        for start, size in ((299_990, 10), (5, 100_000), (240_000, 60_000), (0, 1)):
            file.seek(start)
            assert file.read(size) == content[start : start + size]


def test_one_of_many_writers_takes_a_name(store: Store, root: str) -> None:
    start = threading.Barrier(8)

    def take(number: int) -> bool:
        start.wait()
        return store.put_if_absent(f"{root}/claim", f"writer {number}".encode())

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(take, range(8)))
    assert taken.count(True) == 1
    assert store.read(f"{root}/claim") == f"writer {taken.index(True)}".encode()


def test_a_file_is_replaced_only_as_it_was_read(store: Store, root: str) -> None:
    assert store.put_if_absent(f"{root}/lock", b"first")
    entry = store.stat(f"{root}/lock")
    assert entry is not None
    assert store.put_if_unchanged(f"{root}/lock", b"second", entry.tag)
    assert not store.put_if_unchanged(f"{root}/lock", b"third", entry.tag)
    assert store.read(f"{root}/lock") == b"second"
    assert not store.put_if_unchanged(f"{root}/none", b"x", entry.tag)


def test_files_and_folders_move_and_go(store: Store, root: str, tmp_path: Path) -> None:
    for name in ("v1/a", "v1/sub/b"):
        put(store, f"{root}/{name}", name.encode(), tmp_path)
    store.move(f"{root}/v1", f"{root}/v2")
    assert store.files(f"{root}/v1", deep=True) == []
    assert store.read(f"{root}/v2/sub/b") == b"v1/sub/b"
    store.move(f"{root}/v2/a", f"{root}/v2/c")
    assert [entry.name for entry in store.files(f"{root}/v2")] == ["c"]
    assert store.delete(f"{root}/v2/c")
    store.delete_folder(f"{root}/v2")
    assert store.files(root, deep=True) == []


# --- object stores only -----------------------------------------------------------------------


def test_a_local_copy_serves_until_the_object_changes(bucket: str, tmp_path: Path) -> None:
    store = open_store(bucket)
    put(store, f"{bucket}/x.parquet", b"old", tmp_path)
    first = store.local(f"{bucket}/x.parquet")
    assert store.local(f"{bucket}/x.parquet") == first
    assert first.suffix == ".parquet"
    put(store, f"{bucket}/x.parquet", b"new", tmp_path)
    assert store.local(f"{bucket}/x.parquet").read_bytes() == b"new"
    assert first.read_bytes() == b"old"


def test_copies_that_were_not_used_make_room(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(bucket)
    monkeypatch.setenv(CACHE_VARIABLE, "250")
    copies = []
    for number in range(3):
        put(store, f"{bucket}/{number}", bytes(100), tmp_path)
        copies.append(store.local(f"{bucket}/{number}"))
        if number == 0:
            long_ago = copies[0].stat().st_mtime - 2 * IN_USE_SECONDS
            os.utime(copies[0], (long_ago, long_ago))
    assert [copy.exists() for copy in copies] == [False, True, True]
    assert len(list((cache_folder(bucket) / "objects").iterdir())) == 2


def test_a_missing_bucket_and_an_unreachable_server_are_errors_with_a_remedy(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/a: .*Remedy: check"):
        open_store("s3://no-such-bucket").files("s3://no-such-bucket/a")
    monkeypatch.setattr("resources.storage.objects.RETRIES", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"Remedy: check that it can be reached"):
        open_store(bucket).files(bucket)


@pytest.mark.parametrize("scheme", ["s3", "az"])
def test_the_server_of_the_environment_is_asked_also_without_tls(
    scheme: str, bucket: str, s3_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bucket  # whose fixture sets credentials
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    with faulty_proxy(s3_address) as proxy:
        for name in ENDPOINTS[scheme]:
            monkeypatch.setenv(name, proxy.address)
        proxy.fault("GET", "", "500")
        with pytest.raises(StorageError, match=f"^{scheme}://place/lake: the store failed.*Remedy: "):
            open_store(f"{scheme}://place").files(f"{scheme}://place/lake")
        assert len(proxy.requests) == RETRIES + 1


def test_a_url_of_another_kind_is_refused() -> None:
    with pytest.raises(StorageError, match=r"ftp://host/lake: .* s3://, gs:// or az://"):
        open_store("ftp://host/lake")


def test_a_url_is_shown_without_credentials() -> None:
    assert credential_free("s3://key:secret@bucket/lake/?X-Amz-Signature=abc#x") == "s3://bucket/lake"
