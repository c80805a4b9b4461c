"""Hashes of large files are remembered, and only as long as the file is the same."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from resources.storage.hash_cache import cached_sha256


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "sha256.json"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"weights")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def remembered(path: Path, cache: Path) -> str:
    return cached_sha256(path, cache=cache, smallest=0, settled=-1)


def test_an_unchanged_file_is_not_read_again(weights: Path, cache: Path) -> None:
    assert remembered(weights, cache) == sha256(weights)
    known = json.loads(cache.read_text())
    known[str(weights)]["sha256"] = "what the cache says"
    cache.write_text(json.dumps(known))
    assert remembered(weights, cache) == "what the cache says"


def test_a_file_of_the_same_size_and_time_but_other_content_is_read_again(weights: Path, cache: Path) -> None:
    remembered(weights, cache)
    times = os.stat(weights)
    weights.write_bytes(b"WEIGHTS")
    while os.stat(weights).st_ctime_ns == times.st_ctime_ns:  # the clock of a file system has coarse ticks
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert remembered(weights, cache) == sha256(weights)
    other = weights.with_name("other")
    other.write_bytes(b"weightS")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, weights)
    assert remembered(weights, cache) == sha256(weights)


def test_a_file_that_has_just_changed_and_a_small_one_are_not_remembered(weights: Path, cache: Path) -> None:
    assert cached_sha256(weights, cache=cache, smallest=0, settled=60) == sha256(weights)
    assert cached_sha256(weights, cache=cache, smallest=100, settled=-1) == sha256(weights)
    assert not cache.exists()


def test_a_cache_that_cannot_be_read_or_written_costs_nothing_but_time(weights: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("{ half a docu")
    assert remembered(weights, cache) == sha256(weights)
    assert list(json.loads(cache.read_text())) == [str(weights)]
    blocked = cache.parent.parent / "file"
    blocked.write_bytes(b"")
    assert remembered(weights, blocked / "sha256.json") == sha256(weights)
