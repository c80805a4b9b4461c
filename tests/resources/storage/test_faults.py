"""An object store that fails: what is tried again, what is reported, and that no partial object appears."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from resources.storage.by_location import open_store
from resources.storage.objects import RETRIES
from resources.storage.stores import ReplacedError, StorageError, Store
from tests.support.faulty_proxy import Kind, Proxy, faulty_proxy

OLD, NEW = b"old " * 5000, b"new " * 5000


@pytest.fixture
def proxy(s3_address: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    del store  # whose settings were read before
    with faulty_proxy(s3_address) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        yield proxy


@pytest.fixture
def store(bucket: str, tmp_path: Path) -> Store:
    """Return a store with the object `a`, written without faults."""
    store = open_store(bucket)
    (tmp_path / "old").write_bytes(OLD)
    (tmp_path / "new").write_bytes(NEW)
    store.put(f"{bucket}/a", tmp_path / "old")
    return store


def read_all(store: Store, location: str) -> bytes:
    return store.local(location).read_bytes()


@pytest.mark.parametrize("kind", ["500", "503", "slow", "truncated", "aborted", "lost"])
def test_a_passing_fault_is_not_noticed(kind: Kind, proxy: Proxy, bucket: str, tmp_path: Path) -> None:
    reopened = open_store(bucket)
    reads = proxy.fault("GET", "/a", kind, times=2)
    assert reopened.read(f"{bucket}/a") == OLD
    reads.left = 1
    assert read_all(reopened, f"{bucket}/a") == OLD
    if kind == "truncated":
        return
    writes = proxy.fault("PUT", "/b", kind, times=2)
    reopened.put(f"{bucket}/b", tmp_path / "new")
    assert reopened.read(f"{bucket}/b") == NEW
    assert (reads.seen, writes.seen) == ((2, 1) if kind == "slow" else (3, 2))
    lists = proxy.fault("GET", "list-type", kind, times=1)
    assert [entry.name for entry in reopened.files(bucket)] == ["a", "b"]
    assert lists.seen == 1


@pytest.mark.parametrize("kind", ["500", "truncated", "aborted"])
def test_a_lasting_fault_of_reading_is_one_error_after_a_few_attempts(
    kind: Kind, proxy: Proxy, store: Store, bucket: str, tmp_path: Path
) -> None:
    fault = proxy.fault("GET", "/a", kind)
    with pytest.raises(StorageError, match=rf"^{bucket}/a: .*Remedy: "):
        read_all(open_store(bucket), f"{bucket}/a")
    assert 1 < fault.seen <= RETRIES + 1
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    proxy.faults.clear()
    assert read_all(store, f"{bucket}/a") == OLD


@pytest.mark.parametrize("kind", ["503", "aborted"])
def test_a_lasting_fault_of_writing_leaves_the_earlier_object_or_none(
    kind: Kind, proxy: Proxy, store: Store, bucket: str, tmp_path: Path
) -> None:
    through_proxy = open_store(bucket)
    fault = proxy.fault("PUT", "/", kind)
    for name in ("a", "b"):
        with pytest.raises(StorageError, match=rf"^{bucket}/{name}: .*Remedy: "):
            through_proxy.put(f"{bucket}/{name}", tmp_path / "new")
    assert 2 < fault.seen <= 2 * (RETRIES + 1)
    proxy.faults.clear()
    assert [entry.name for entry in store.files(bucket)] == ["a"]
    assert store.read(f"{bucket}/a") == OLD


def test_the_parts_of_a_large_upload_that_fails_are_no_object(
    proxy: Proxy, store: Store, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "large").write_bytes(NEW * 700)  # 14 MB, which are sent in parts
    proxy.fault("PUT", "partNumber=2", "500")
    with pytest.raises(StorageError, match=rf"^{bucket}/b: .*Remedy: "):
        open_store(bucket).put(f"{bucket}/b", tmp_path / "large")
    assert [entry.name for entry in store.files(bucket)] == ["a"]


def test_a_number_is_taken_once_although_the_answer_was_lost(proxy: Proxy, store: Store, bucket: str) -> None:
    proxy.fault("PUT", "/claim", "lost", times=1)
    through_proxy = open_store(bucket)
    assert through_proxy.put_if_absent(f"{bucket}/claim", b"mine")
    assert not through_proxy.put_if_absent(f"{bucket}/claim", b"another's")
    assert store.read(f"{bucket}/claim") == b"mine"


def test_an_object_that_is_replaced_while_it_is_read_is_never_mixed(store: Store, bucket: str, tmp_path: Path) -> None:
    entry = store.stat(f"{bucket}/a")
    store.put(f"{bucket}/a", tmp_path / "new")
    with pytest.raises(ReplacedError, match=f"{bucket}/a: it was replaced"):
        store.local(f"{bucket}/a", entry)
    with pytest.raises(ReplacedError), store.open(f"{bucket}/a", entry) as file:
        file.read()
    assert read_all(store, f"{bucket}/a") == NEW
