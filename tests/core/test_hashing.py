"""Hashes are SHA-256, of local files, of URLs and of JSON values in canonical form."""

import hashlib
import io
from pathlib import Path

import fsspec

from core.hashing import digest, sha256, sha256_of
from resources.storage import files


def test_a_file_a_url_and_an_open_file_have_the_same_hash(tmp_path: Path) -> None:
    data = b"some bytes" * 1000
    wanted = hashlib.sha256(data).hexdigest()
    (tmp_path / "a").write_bytes(data)
    fsspec.filesystem("memory").pipe_file("/hashing/a", data)
    assert sha256(tmp_path / "a") == wanted
    assert sha256_of(io.BytesIO(data)) == wanted
    assert files.sha256(str(tmp_path / "a")) == files.sha256("memory://hashing/a") == wanted


def test_the_order_of_keys_does_not_matter() -> None:
    assert digest({"a": 1, "b": [2, "\N{SNOWMAN}"]}) == digest({"b": [2, "\N{SNOWMAN}"], "a": 1})
    assert digest([1]) == hashlib.sha256(b"[1]").hexdigest()
