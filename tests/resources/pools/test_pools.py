"""Pools of both formats: their samples, uids, rejects, and faults that stop a shard."""

import gzip
import hashlib
import io
import json
import os
import pickle
import re
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from resources.pools.base import RAW_POOL_SCHEMA, PoolError, ShardRead
from resources.pools.formats import open_pool
from resources.settings import EncoderSettings, PoolSettings
from resources.storage import images
from tests.support.pool_factory import (
    SHARED,
    caption,
    cosines,
    datacomp_shard,
    picture,
    sample,
    uid,
    unit_rows,
    webdataset_pool,
    write_shard,
    write_sidecar,
    write_tar,
)

B32 = {"b32": EncoderSettings(precomputed="b32", temperature=0.01)}
REAL = SHARED / "data" / "pools"


def read(folder: Path | str, name: str = "00000", **options: Any) -> ShardRead:
    return open_pool(PoolSettings(path=str(folder), **options), {}).read_shard(name)


def read_datacomp(folder: Path, name: str = "00000", encoders: dict[str, EncoderSettings] = B32) -> ShardRead:
    settings = PoolSettings(path=str(folder), format="datacomp")
    return open_pool(settings, encoders).read_shard(name)


def reasons(found: ShardRead) -> dict[int, str]:
    rows = found.rejects.to_pylist()
    return {row["source_row"]: row["reason"] for row in rows}


# --- shards -----------------------------------------------------------------------------------


def test_shards_are_found_by_their_tars(tmp_path: Path) -> None:
    webdataset_pool(tmp_path, shards=3)
    (tmp_path / "index.parquet").write_bytes(b"")
    (tmp_path / "00001_stats.json").write_text("{}")
    pool = open_pool(PoolSettings(path=str(tmp_path)), {})
    assert list(pool.list_shards()) == ["00000", "00001", "00002"]


def test_a_fingerprint_changes_with_the_tar_or_its_sidecar_alone(tmp_path: Path) -> None:
    webdataset_pool(tmp_path, shards=2)
    pool = open_pool(PoolSettings(path=str(tmp_path)), {})
    before = pool.list_shards()
    assert pool.list_shards() == before
    (tmp_path / "00000_stats.json").write_text("{}")
    assert pool.list_shards() == before
    write_sidecar(tmp_path, [{"key": "000000000", "status": "success"}], "00000")
    after = pool.list_shards()
    assert after["00000"] != before["00000"]
    assert after["00001"] == before["00001"]
    found = os.stat(tmp_path / "00001.tar")
    os.utime(tmp_path / "00001.tar", ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert pool.list_shards()["00001"] != before["00001"]


@pytest.mark.parametrize("form", ["webdataset", "datacomp"])
def test_a_missing_folder_and_one_without_shards_are_named(tmp_path: Path, form: Any) -> None:
    pool = open_pool(PoolSettings(path=str(tmp_path / "no"), format=form), {})
    with pytest.raises(PoolError, match=rf"{tmp_path}/no does not exist.*Set pool\.path"):
        pool.list_shards()
    pool = open_pool(PoolSettings(path=str(tmp_path), format=form), {})
    with pytest.raises(PoolError, match=rf"no shards.*{tmp_path}.*pool\.format"):
        pool.list_shards()
    (tmp_path / "00000.tar.gz").write_bytes(b"")
    pool = open_pool(PoolSettings(path=str(tmp_path)), {})
    with pytest.raises(PoolError, match=r"00000\.tar\.gz.*decompress"):
        pool.list_shards()
    with pytest.raises(PoolError, match="is a file"):
        open_pool(PoolSettings(path=str(tmp_path / "00000.tar.gz")), {}).list_shards()


def test_a_name_that_cannot_be_a_partition_fails_alone_and_hidden_files_are_ignored(tmp_path: Path) -> None:
    write_shard(tmp_path, [sample(0)], "a shard")
    write_shard(tmp_path, [sample(1)], "good")
    (tmp_path / "._good.tar").write_bytes(b"\0\5\x16\7" + bytes(4000))
    pool = open_pool(PoolSettings(path=str(tmp_path)), {})
    odd, good = sorted(pool.list_shards(), key=lambda name: name == "good")
    assert good == "good"
    assert pool.read_shard("good").rows.num_rows == 1
    assert re.fullmatch("[A-Za-z0-9._-]+", odd)
    with pytest.raises(PoolError, match=r"a shard\.tar.*'a shard'.*Rename"):
        pool.read_shard(odd)


def test_an_odd_name_costs_its_file_in_the_other_formats(tmp_path: Path) -> None:
    datacomp_shard(tmp_path / "d", "{0}")
    datacomp_shard(tmp_path / "d", "0")
    pool = open_pool(PoolSettings(path=str(tmp_path / "d"), format="datacomp"), B32)
    assert len(pool.list_shards()) == 2
    with pytest.raises(PoolError, match=r"'\{0\}'.*Rename"):
        pool.read_shard(next(name for name in pool.list_shards() if name != "0"))
    for folder in ("two words", "one"):
        (tmp_path / "f" / folder).mkdir(parents=True)
        (tmp_path / "f" / folder / "a.jpg").write_bytes(picture(1))
    for buckets in (None, 2):
        pool = open_pool(PoolSettings(path=str(tmp_path / "f"), format="image_folder", buckets=buckets), {})
        good, odd = sorted(pool.list_shards())
        assert good.startswith("one")
        assert pool.read_shard(good).samples == 1
        with pytest.raises(PoolError, match=r"'two words'.*Rename"):
            pool.read_shard(odd)


def test_a_shard_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    webdataset_pool(tmp_path, shards=1)
    with pytest.raises(PoolError, match="no shard 00009"):
        read(tmp_path, "00009")


@pytest.mark.parametrize("content", [[], [("README.txt.bak", b"x"), ("notes", b"y")]])
def test_a_shard_without_samples_is_an_error(tmp_path: Path, content: Any) -> None:
    write_tar(tmp_path / "00000.tar", content)
    with pytest.raises(PoolError, match=r"empty shard 00000.*00000\.tar"):
        read(tmp_path)
    (tmp_path / "00000.tar").write_bytes(b"")
    with pytest.raises(PoolError, match="empty shard"):
        read(tmp_path)


def test_a_shard_whose_downloads_all_failed_has_no_rows_and_all_rejects(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [])
    failed = {"status": "failed_to_download", "error_message": "HTTP Error 404"}
    write_sidecar(tmp_path, [{"key": f"{n:09d}", **failed} for n in range(3)])
    found = read(tmp_path)
    assert found.rows.num_rows == 0
    assert reasons(found) == dict.fromkeys(range(3), "download_failed")
    assert "3 download_failed" in found.notes[0]
    write_sidecar(tmp_path, [{"key": "000000000", "status": "success"}])
    with pytest.raises(PoolError, match=r"empty shard.*1 downloads were successful.*Remedy"):
        read(tmp_path)


def test_members_that_are_no_neighbours_are_one_sample_and_noted(tmp_path: Path) -> None:
    members = [member for n in range(3) for member in sample(n).members()]
    write_tar(tmp_path / "00000.tar", sorted(members, key=lambda member: member[0].rpartition(".")[2]))
    found = read(tmp_path)
    assert (found.rows["uid"].to_pylist(), found.samples) == ([uid("00000", n) for n in range(3)], 3)
    assert "--sort=name" in found.notes[0]


def test_two_images_of_a_key_are_one_row_with_the_first(tmp_path: Path) -> None:
    key = "000000001"
    members = [*sample(0).members(), (f"{key}.png", picture(7, kind="PNG")), *sample(1).members()]
    write_tar(tmp_path / "00000.tar", members)
    found = read(tmp_path)
    assert (found.rows["image_format"].to_pylist(), found.samples) == (["JPEG", "PNG"], 2)
    assert found.notes == [f"keys with more than one image, of which the first is used: {key}"]


def test_samples_with_other_suffixes_are_counted_with_their_suffixes(tmp_path: Path) -> None:
    words = b"a caption"
    members = [("a.input.jpg", picture(1)), ("a.outputs.txt", words), ("b.dat", b"x"), ("b.txt", words)]
    write_tar(tmp_path / "00000.tar", [*members, ("c.tiff", b"II*\0"), ("c.txt", words)])
    found = read(tmp_path)
    assert reasons(found) == {0: "image_missing", 1: "image_missing", 2: "image_undecodable"}
    first, second, _ = found.rejects["detail"].to_pylist()
    assert "'input.jpg', 'outputs.txt'" in first
    assert "'dat', 'txt'" in second


def test_tars_joined_to_one_file_are_all_read(tmp_path: Path) -> None:
    for number in range(2):
        write_shard(tmp_path / str(number), [sample(number)])
    joined = b"".join((tmp_path / str(number) / "00000.tar").read_bytes() for number in range(2))
    (tmp_path / "00000.tar").write_bytes(joined)
    found = read(tmp_path)
    assert found.rows["uid"].to_pylist() == [uid("00000", number) for number in range(2)]
    assert "2 tars are joined" in found.notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>not found</html>" * 100, "this is not a tar"),
        (gzip.compress(b"x" * 2000, mtime=0), "Decompress it first"),
    ],
)
def test_a_file_that_is_no_tar_is_an_error_that_names_it(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "00000.tar").write_bytes(content)
    with pytest.raises(PoolError, match=rf"00000\.tar: .*{message}"):
        read(tmp_path)


def test_a_pool_on_another_file_system_gives_the_same_rows(tmp_path: Path) -> None:
    webdataset_pool(tmp_path, shards=2)
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path), "/pool", recursive=True)
    pool = open_pool(PoolSettings(path="memory://pool"), {})
    try:
        assert list(pool.list_shards()) == ["00000", "00001"]
        assert pool.list_shards() == pool.list_shards()
        assert pool.read_shard("00001").rows.equals(read(tmp_path, "00001").rows)
    finally:
        store.rm("/pool", recursive=True)


def test_an_encoder_must_fit_the_format(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match=r"b32 is precomputed.*no embeddings"):
        open_pool(PoolSettings(path=str(tmp_path)), B32)
    model = {"m": EncoderSettings(model="ViT-B-32", pretrained="openai")}
    with pytest.raises(PoolError, match=r"m has a model only.*precomputed"):
        open_pool(PoolSettings(path=str(tmp_path), format="datacomp"), model)


# --- webdataset -------------------------------------------------------------------------------


def test_a_row_says_who_the_sample_is_and_where_its_bytes_lie(tmp_path: Path) -> None:
    write_shard(tmp_path, [sample(0), sample(1)])
    found = read(tmp_path)
    assert found.rows.schema == RAW_POOL_SCHEMA
    assert found.rejects.num_rows == 0
    row = found.rows.to_pylist()[1]
    image = picture(1)
    data = (tmp_path / "00000.tar").read_bytes()
    assert data[row["image_offset"] : row["image_offset"] + row["image_size"]] == image
    assert row["uid"] == uid("00000", 1) == f"{row['f0']:016x}{row['f1']:016x}"
    assert row["caption"] == caption(1)
    assert row["sha256"] == hashlib.sha256(image).hexdigest()
    assert (row["width"], row["height"], row["image_format"]) == (40, 32, "JPEG")
    assert (row["shard"], row["key"], row["source_row"]) == ("00000", "000000001", 1)
    assert row["url"] == "src://00000/1"


def test_the_sidecar_wins_over_json_and_the_text_over_both(tmp_path: Path) -> None:
    write_shard(tmp_path, [sample(0), sample(1, text=None), sample(2, text=None)])
    side = uid("sidecar")
    rows = [
        {"key": "000000000", "uid": side, "caption": "of the sidecar", "status": "success"},
        {"key": "000000001", "uid": uid(1), "caption": "of the sidecar", "status": "success"},
    ]
    write_sidecar(tmp_path, rows)
    found = read(tmp_path).rows
    assert found["uid"].to_pylist() == [side, uid(1), uid("00000", 2)]
    assert found["caption"].to_pylist() == [caption(0), "of the sidecar", caption(2)]


def test_a_uid_of_the_content_is_the_same_in_any_shard_and_order(tmp_path: Path) -> None:
    plain = [sample(number, meta=None) for number in range(3)]
    write_shard(tmp_path, plain, "a")
    write_shard(tmp_path, plain[::-1], "b")
    first = read(tmp_path, "a").rows["uid"].to_pylist()
    assert first == read(tmp_path, "b").rows["uid"].to_pylist()[::-1]
    image = hashlib.sha256(picture(0)).digest()
    assert first[0] == hashlib.sha256(image + caption(0).encode()).hexdigest()[:32]


def test_sidecar_rows_without_members_are_rejected_not_lost(tmp_path: Path) -> None:
    write_shard(tmp_path, [sample(0)])
    rows = [
        {"key": "000000009", "status": "failed_to_download", "error_message": "HTTP Error 404"},
        {"key": "000000000", "status": "success", "error_message": None},
        {"key": "000000008", "status": "success", "error_message": None},
    ]
    write_sidecar(tmp_path, rows)
    found = read(tmp_path)
    assert found.samples == 3
    assert reasons(found) == {1: "download_failed", 2: "missing_from_tar"}
    assert "404" in found.rejects["detail"][0].as_py()


def test_a_sidecar_without_keys_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path, [sample(0)])
    write_sidecar(tmp_path, [{"id": 1}])
    with pytest.raises(PoolError, match=r"00000\.parquet.*no column `key`"):
        read(tmp_path)


def test_a_sidecar_that_matches_few_keys_is_an_error_with_one_key_of_each_side(tmp_path: Path) -> None:
    write_shard(tmp_path, [sample(0), sample(1), sample(2)])
    write_sidecar(tmp_path, [{"key": name, "uid": uid(name)} for name in ("000000001", "other-a", "other-b")])
    with pytest.raises(PoolError, match=r"00000\.parquet: only 1 of the tar's 3 keys.*'000000000'.*'other-a'.*Remedy"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("00000/{:09d}", "{:09d}"),
        ("{:09d}", "train/{:09d}"),
        ("{:09d}", "{}"),
        ("00000/{:09d}", "{}.0"),
        ("{:09d}", "{:09d}.jpg"),
    ],
)
def test_spellings_of_a_key_are_joined_and_noted(tmp_path: Path, ours: str, theirs: str) -> None:
    write_shard(tmp_path, [sample(n, key=ours.format(n), meta=None) for n in range(3)])
    write_sidecar(tmp_path, [{"key": theirs.format(n), "uid": uid("side", n), "status": "success"} for n in range(3)])
    found = read(tmp_path)
    assert found.rows["uid"].to_pylist() == [uid("side", n) for n in range(3)]
    assert found.rejects.num_rows == 0
    assert [note for note in found.notes if "3 keys are spelt differently" in note]


def test_integer_keys_are_joined(tmp_path: Path) -> None:
    write_shard(tmp_path, [sample(n, meta=None) for n in range(3)])
    write_sidecar(tmp_path, [{"key": n, "uid": uid("side", n)} for n in range(3)])
    assert read(tmp_path).rows["uid"].to_pylist() == [uid("side", n) for n in range(3)]


def test_a_key_that_fits_two_samples_is_joined_to_neither(tmp_path: Path) -> None:
    keys = ["a/0", "b/0", "c/1", "c/2", "c/3"]
    write_shard(tmp_path, [sample(n, key=key, meta=None) for n, key in enumerate(keys)])
    write_sidecar(tmp_path, [{"key": str(n), "uid": uid("side", n)} for n in range(4)])
    found = read(tmp_path)
    assert found.rows["uid"].to_pylist() == [uid("side", n) for n in (1, 2, 3)]
    assert reasons(found) == {0: "missing_from_parquet", 1: "missing_from_parquet", 5: "missing_from_tar"}


def test_no_sample_gets_a_uid_of_its_content_when_the_sidecar_has_the_uids(tmp_path: Path) -> None:
    write_shard(tmp_path, [sample(0, meta=None), sample(1, meta=None), sample(2)])
    write_sidecar(tmp_path, [{"key": "000000000", "uid": uid("side", 0)}, {"key": "000000002", "uid": None}])
    found = read(tmp_path)
    assert found.rows["uid"].to_pylist() == [uid("side", 0), uid("00000", 2)]
    assert reasons(found) == {1: "missing_from_parquet"}


def test_each_field_is_the_first_that_is_not_null(tmp_path: Path) -> None:
    meta = {"uid": uid("json"), "caption": "of the json", "url": "src://json", "original_width": 7}
    write_shard(tmp_path, [sample(0, text=None, meta=meta), sample(1, text=None, meta=meta | {"uid": uid(1)})])
    rows = [
        {"key": "000000000", "uid": None, "caption": None, "url": "src://parquet", "original_width": float("nan")},
        {"key": "000000001", "uid": uid(2), "caption": "of the parquet", "url": None, "original_width": 9.0},
    ]
    write_sidecar(tmp_path, rows)
    fields = ["uid", "caption", "url", "original_width"]
    assert [list(row.values()) for row in read(tmp_path).rows.select(fields).to_pylist()] == [
        [uid("json"), "of the json", "src://parquet", 7],
        [uid(2), "of the parquet", "src://json", 9],
    ]


def test_a_bad_row_of_the_sidecar_costs_itself(tmp_path: Path) -> None:
    write_shard(tmp_path, [sample(n, meta=None) for n in range(3)])
    rows = [{"key": f"{n:09d}", "uid": uid("side", n), "status": "success"} for n in range(3)]
    failed = {**rows[1], "uid": uid("other"), "status": "failed_to_download"}
    write_sidecar(tmp_path, [rows[0], failed, rows[1], rows[2], rows[2], {**rows[0], "key": None}])
    found = read(tmp_path)
    assert found.rows["uid"].to_pylist() == [uid("side", n) for n in range(3)]
    assert found.rejects.num_rows == 0
    assert found.notes == [
        "ignored rows of 00000.parquet without a key: 1",
        "keys that 00000.parquet has more than once, of which one row is used: 000000001, 000000002",
    ]


def test_damaged_json_costs_a_sample_only_if_it_may_hold_the_uid(tmp_path: Path) -> None:
    write_shard(tmp_path, [sample(0, meta=b"{"), sample(1, meta=b"{")])
    write_sidecar(tmp_path, [{"key": "000000000", "uid": uid("side")}, {"key": "000000001", "uid": None}])
    found = read(tmp_path)
    assert found.rows["uid"].to_pylist() == [uid("side")]
    assert reasons(found) == {1: "metadata_invalid"}


def spellings(value: str) -> list[Any]:
    return [value.upper(), str(uuid.UUID(value)), f" {value}\n", bytes.fromhex(value), value.encode()]


def test_spellings_of_a_uid_name_the_same_sample(tmp_path: Path) -> None:
    plain = [uid("spelt", n) for n in range(3)]
    for number in range(5):
        given = [spellings(value)[number] for value in plain]
        write_shard(tmp_path / f"tar{number}", [sample(n) for n in range(3)])
        write_sidecar(tmp_path / f"tar{number}", [{"key": f"{n:09d}", "uid": given[n]} for n in range(3)])
        assert read(tmp_path / f"tar{number}").rows["uid"].to_pylist() == plain
        datacomp_shard(tmp_path / f"npz{number}", rows=3, columns={"uid": given})
        assert read_datacomp(tmp_path / f"npz{number}").rows["uid"].to_pylist() == plain


@pytest.mark.parametrize("kind", [pa.int64(), pa.decimal128(38)])
def test_numbers_are_never_read_as_hexadecimal_uids_and_a_shard_without_rows_is_noted(
    tmp_path: Path, kind: pa.DataType
) -> None:
    digits = 10**17 if kind == pa.int64() else 10**31
    datacomp_shard(tmp_path, rows=3, columns={"uid": pa.array([digits + n for n in range(3)], kind)})
    found = read_datacomp(tmp_path)
    assert set(reasons(found).values()) == {"uid_invalid"}
    assert "no sample of this shard is usable: 3 uid_invalid" in found.notes[0]


def test_a_damaged_sidecar_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path, [sample(0)])
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(PoolError, match=r"00000\.parquet.*cannot be read"):
        read(tmp_path)


def test_limits_of_size_and_length_are_the_users(tmp_path: Path) -> None:
    write_shard(tmp_path, [sample(0), sample(1, image=picture(1, 200, 100)), sample(2, text=b"x")])
    assert reasons(read(tmp_path, min_side=33)) == {0: "image_too_small", 2: "image_too_small"}
    assert reasons(read(tmp_path, max_pixels=5000)) == {1: "image_bomb"}
    too_long = reasons(read(tmp_path, max_caption_chars=1))
    assert too_long == {0: "caption_too_long", 1: "caption_too_long"}


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(out, "PNG")
    write_shard(tmp_path, [sample(0, image=out.getvalue()), sample(1)])
    assert reasons(read(tmp_path)) == {0: "image_bomb"}


def test_captions_lose_line_ends_and_nothing_else(tmp_path: Path) -> None:
    write_shard(tmp_path, [sample(0, text=b" two  words \r\n\n"), sample(1, text=b"\x00\ttab ")])
    assert read(tmp_path).rows["caption"].to_pylist() == [" two  words ", "\x00\ttab "]


@pytest.mark.parametrize(
    ("data", "expected", "repaired"),
    [
        (b"\xef\xbb\xbfa dog", "a dog", False),
        ("a d\u00f6g\n".encode("utf-16"), "a d\u00f6g", False),
        ("a dog".encode("utf-16-be"), "\0a\0 \0d\0o\0g", False),
        (b"\xfe\xff\0a\0", "a\N{REPLACEMENT CHARACTER}", True),
        ("\u202eright to left".encode(), "\u202eright to left", False),
    ],
)
def test_captions_with_a_byte_order_mark_are_decoded(
    tmp_path: Path, data: bytes, expected: str, repaired: bool
) -> None:
    write_shard(tmp_path, [sample(0, text=data)])
    rows = read(tmp_path).rows
    assert (rows["caption"].to_pylist(), rows["caption_repaired"].to_pylist()) == ([expected], [repaired])


@pytest.mark.parametrize("text", ["\u200b\u200b", "\ufeff", " \0\x1b \u2060\u00ad\n", "\u2028\u3000"])
def test_a_caption_without_anything_visible_is_empty_in_both_formats(tmp_path: Path, text: str) -> None:
    write_shard(tmp_path, [sample(0, text=text.encode()), sample(1)])
    assert reasons(read(tmp_path)) == {0: "caption_empty"}
    datacomp_shard(tmp_path / "d", rows=3, columns={"text": [text, "\ufeffa dog", "\U0001f415"]})
    found = read_datacomp(tmp_path / "d")
    assert reasons(found) == {0: "caption_empty"}
    assert found.rows["caption"].to_pylist() == ["a dog", "\U0001f415"]


def test_a_caption_that_is_no_text_is_named(tmp_path: Path) -> None:
    values: list[object] = [7, ["a", "b"], {"en": "a dog"}, True, None]
    write_shard(tmp_path, [sample(n, text=None, meta={"caption": value}) for n, value in enumerate(values)])
    found = read(tmp_path)
    assert list(reasons(found).values()) == ["caption_invalid"] * 4 + ["caption_missing"]
    details = found.rejects["detail"].to_pylist()
    for detail, words in zip(details, ["7 (int)", "a list of 2", "an object of 1", "True (bool)"], strict=False):
        assert words in detail


def test_bad_optional_values_become_null_and_are_counted(tmp_path: Path) -> None:
    columns = {
        "original_width": [200.0, float("nan"), 2.0**40, 300.0, 400.0, None],
        "original_height": ["300", "tall", "300", "300", "300", "300"],
        "clip_b32_similarity_score": ["0.5", "", "high", None, "inf", None],
        "url": [["src://list"]] * 6,
    }
    datacomp_shard(tmp_path, columns=columns)
    found = read_datacomp(tmp_path)
    rows = found.rows
    assert rows["original_width"].to_pylist() == [200, None, None, 300, 400, None]
    assert rows["original_height"].to_pylist() == [300, None, 300, 300, 300, 300]
    assert rows["clip_b32_similarity_score"].to_pylist() == [0.5, None, None, None, None, None]
    assert rows["url"].to_pylist() == [None] * 6
    assert found.notes == [
        "6 values of column url are not usable as string and are null",
        "1 values of column original_width are not usable as int32 and are null",
        "1 values of column original_height are not usable as int32 and are null",
        "2 values of column clip_b32_similarity_score are not usable as float and are null",
    ]


def test_metadata_that_is_odd_does_not_stop_the_shard(tmp_path: Path) -> None:
    odd = [
        {"original_width": 10**12, "original_height": "wide", "url": 5},
        {"url": "\ud800", "caption": "lone \ud800", "clip_b32_similarity_score": float("nan")},
        {"uid": 12},
        ["a list"],
    ]
    samples = [
        sample(number, text=None if number == 1 else b"text", meta=json.dumps(meta).encode())
        for number, meta in enumerate(odd)
    ]
    write_shard(tmp_path, samples)
    found = read(tmp_path)
    assert reasons(found) == {2: "uid_invalid", 3: "metadata_invalid"}
    first, second = found.rows.to_pylist()
    assert (first["original_width"], first["original_height"], first["url"]) == (None, None, "5")
    assert second["caption"] == "lone \N{REPLACEMENT CHARACTER}"
    assert second["caption_repaired"]
    assert second["clip_b32_similarity_score"] is None


def test_a_key_that_is_no_text_is_rejected(tmp_path: Path) -> None:
    write_shard(tmp_path, [sample(0, key="caf\udce9"), sample(1)])
    found = read(tmp_path)
    assert reasons(found) == {0: "key_invalid"}
    assert found.rejects["key"].to_pylist() == ["caf\N{REPLACEMENT CHARACTER}"]


def test_a_sample_cut_between_its_members_is_not_taken_for_whole(tmp_path: Path) -> None:
    path = write_shard(tmp_path, [sample(0), sample(1)])
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"000000001.txt")])
    found = read(tmp_path)
    assert reasons(found) == {1: "shard_truncated"}
    path.write_bytes(data[: data.index(b"000000001.txt") + 1024])  # whole, without the end marker
    found = read(tmp_path)
    assert (found.rows.num_rows, found.rejects.num_rows, len(found.notes)) == (2, 0, 1)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_the_quick_look_finds_a_cut_jpeg_wherever_a_full_decode_does(
    options: dict[str, Any],
) -> None:
    whole = Image.open(io.BytesIO(picture(0, 160, 120)))
    out = io.BytesIO()
    whole.save(out, "JPEG", quality=90, **options)
    data = out.getvalue()
    for cut in range(1, len(data), max(1, len(data) // 40)):
        outcomes = []
        for look in (images.check, images.picture):
            try:
                look(data[:cut], 10**6)
                outcomes.append("good")
            except images.ImageError as error:
                outcomes.append(error.reason)
        assert outcomes[0] == outcomes[1], cut


# --- datacomp ---------------------------------------------------------------------------------


def test_metadata_rows_follow_the_parquet(tmp_path: Path) -> None:
    datacomp_shard(tmp_path, rows=4)
    found = read_datacomp(tmp_path)
    assert found.rows.schema == RAW_POOL_SCHEMA
    assert (found.rows.num_rows, found.rejects.num_rows, found.notes) == (4, 0, [])
    row = found.rows.to_pylist()[2]
    assert row["uid"] == uid("00000", 2) == f"{row['f0']:016x}{row['f1']:016x}"
    assert (row["key"], row["source_row"], row["caption"]) == ("2", 2, caption(2))
    assert (row["width"], row["height"], row["original_width"]) == (640, 480, 640)
    assert row["image_offset"] is None
    assert row["clip_l14_similarity_score"] is None


def test_both_formats_give_the_same_identity_and_caption(tmp_path: Path) -> None:
    write_shard(tmp_path / "tars", [sample(number) for number in range(6)])
    datacomp_shard(tmp_path / "npz", rows=6)
    shared = ["uid", "f0", "f1", "shard", "caption", "sha256", "url", "source_row"]
    ours = read(tmp_path / "tars").rows.select(shared)
    assert ours.equals(read_datacomp(tmp_path / "npz").rows.select(shared))


def test_embeddings_are_the_pools_own_bits_for_the_rows_asked(tmp_path: Path) -> None:
    datacomp_shard(tmp_path, rows=6)
    pool = open_pool(PoolSettings(path=str(tmp_path), format="datacomp"), B32)
    rows = pool.read_shard("00000").rows.take([4, 1])
    image, text = pool.embeddings("00000", rows, "b32")
    assert np.array_equal(image, unit_rows(1, 6)[[4, 1]])
    assert np.array_equal(text, unit_rows(2, 6)[[4, 1]])
    assert image.dtype == text.dtype == np.float16


def test_dataset2metadata_names_are_known(tmp_path: Path) -> None:
    arrays = {
        "oai-clip-vit-b32-image": unit_rows(1, 6).astype(np.float32),
        "oai-clip-vit-b32-text": unit_rows(2, 6).astype(np.float32),
    }
    texts = {"text": None, "caption": [caption(row) for row in range(6)]}
    own = cosines(*arrays.values())
    scores = {"clip_b32_similarity_score": None, "oai-clip-vit-b32-score": own}
    datacomp_shard(tmp_path, columns=texts | scores, arrays=arrays)
    np.savez_compressed(tmp_path / "00000.npz", **arrays)  # type: ignore[arg-type]
    pool = open_pool(PoolSettings(path=str(tmp_path), format="datacomp"), B32)
    rows = pool.read_shard("00000").rows
    assert rows["caption"].to_pylist() == texts["caption"]
    assert rows["clip_b32_similarity_score"].to_pylist() == own.tolist()
    assert np.array_equal(pool.embeddings("00000", rows, "b32")[1], unit_rows(2, 6))


@pytest.mark.parametrize("nested", [False, True])
def test_clip_retrieval_names_are_known(tmp_path: Path, nested: bool) -> None:
    def place(kind: str, file: str) -> Path:
        folder = tmp_path / kind if nested else tmp_path
        folder.mkdir(exist_ok=True)
        return folder / file

    for shard in ("0", "1"):
        np.save(place("img_emb", f"img_emb_{shard}.npy"), unit_rows(1, 3))
        np.save(place("text_emb", f"text_emb_{shard}.npy"), unit_rows(2, 3))
        table = {"image_path": ["a", "b", "c"], "caption": [f"{shard} {i}" for i in range(3)]}
        pq.write_table(pa.table(table), place("metadata", f"metadata_{shard}.parquet"))
    pool = open_pool(PoolSettings(path=str(tmp_path), format="datacomp"), B32)
    assert list(pool.list_shards()) == ["0", "1"]
    rows = pool.read_shard("1").rows
    assert rows["caption"].to_pylist() == ["1 0", "1 1", "1 2"]
    assert len(set(rows["uid"].to_pylist())) == 3
    assert np.array_equal(pool.embeddings("1", rows, "b32")[0], unit_rows(1, 3))


def test_two_named_arrays_can_be_an_encoder(tmp_path: Path) -> None:
    datacomp_shard(tmp_path, arrays={"u": unit_rows(1, 6), "v": unit_rows(2, 6)})
    encoders = {
        "mine": EncoderSettings.model_validate({"precomputed": {"image": "u", "text": "v"}, "temperature": 0.01})
    }
    assert read_datacomp(tmp_path, encoders=encoders).rows.num_rows == 6
    with pytest.raises(PoolError, match=r"looked for b32_img and b32_txt.*found u, v"):
        read_datacomp(tmp_path)


def test_bad_embeddings_reject_their_sample_alone(tmp_path: Path) -> None:
    image, text = unit_rows(1, 6), unit_rows(2, 6)
    image[1, 3] = np.nan
    text[2, 0] = np.inf
    text[3] *= 1.02
    image[4] = 0
    image[5] *= 1.005
    datacomp_shard(tmp_path, arrays={"b32_img": image, "b32_txt": text})
    found = read_datacomp(tmp_path)
    assert reasons(found) == {
        1: "embedding_not_finite",
        2: "embedding_not_finite",
        3: "embedding_not_unit",
        4: "embedding_not_unit",
    }
    assert found.samples == 6
    assert "b32_txt" in found.rejects["detail"].to_pylist()[2]
    # nobody uses them
    other = {
        "b": EncoderSettings.model_validate({"precomputed": {"image": "b32_txt", "text": "b32_txt"}, "temperature": 1})
    }
    assert reasons(read_datacomp(tmp_path, encoders=other)) == {
        2: "embedding_not_finite",
        3: "embedding_not_unit",
    }


def test_bad_metadata_rejects_its_sample_alone(tmp_path: Path) -> None:
    columns = {
        "text": ["fine", None, " ", "five", "six", "seven"],
        "uid": [uid(0), uid(1), uid(2), "nonsense", uid(0), uid(5).upper()],
        "original_width": [640, 640, 640, 640, 640, 8],
    }
    datacomp_shard(tmp_path, columns=columns)
    found = read_datacomp(tmp_path)
    assert reasons(found) == {
        1: "caption_missing",
        2: "caption_empty",
        3: "uid_invalid",
        4: "duplicate_uid",
        5: "image_too_small",
    }
    assert found.samples == 6


def test_captions_of_metadata_that_are_no_utf8_are_repaired(tmp_path: Path) -> None:
    captions = pa.array([b"caf\xe9", b"fine\n"], pa.binary()).view(pa.string())
    datacomp_shard(tmp_path, rows=2, columns={"text": captions})
    rows = read_datacomp(tmp_path).rows
    assert rows["caption"].to_pylist() == ["caf\N{REPLACEMENT CHARACTER}", "fine"]
    assert rows["caption_repaired"].to_pylist() == [True, False]


def test_a_uid_is_made_of_the_images_hash_where_metadata_has_none(tmp_path: Path) -> None:
    datacomp_shard(tmp_path, rows=2, columns={"uid": None})
    write_shard(tmp_path / "tars", [sample(number, meta=None) for number in range(2)])
    ours = read_datacomp(tmp_path).rows["uid"]
    assert ours.equals(read(tmp_path / "tars").rows["uid"])


def test_unequal_lengths_name_both_files_and_the_remedy(tmp_path: Path) -> None:
    arrays = {"b32_img": unit_rows(1, 6), "b32_txt": unit_rows(2, 5)}
    datacomp_shard(tmp_path, arrays=arrays)
    message = r"00000\.parquet has 6 rows and b32_txt in .*00000\.npz has 5.*Download"
    with pytest.raises(PoolError, match=message):
        read_datacomp(tmp_path)


def test_a_parquet_and_an_npz_need_one_another(tmp_path: Path) -> None:
    datacomp_shard(tmp_path)
    datacomp_shard(tmp_path, "00001")
    (tmp_path / "00000.npz").unlink()
    (tmp_path / "00001.parquet").unlink()
    with pytest.raises(PoolError, match=r"00000\.parquet has no npz.*b32.*Download"):
        read_datacomp(tmp_path)
    with pytest.raises(PoolError, match=r"00001\.npz has no parquet"):
        read_datacomp(tmp_path, "00001")


def test_a_pickled_npz_is_refused_and_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, Any]:
            return (Path.touch, (tmp_path / "sprung",))

    trap = np.array([Trap()] * 6, dtype=object)
    datacomp_shard(tmp_path, arrays={"b32_img": trap, "b32_txt": unit_rows(2, 6)})
    with pytest.raises(PoolError, match=r"b32_img in .*00000\.npz is a pickle.*refused"):
        read_datacomp(tmp_path)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap()))  # the trap does work
    assert (tmp_path / "sprung").exists()


def test_damaged_and_odd_arrays_are_named(tmp_path: Path) -> None:
    datacomp_shard(tmp_path)
    whole = (tmp_path / "00000.npz").read_bytes()
    (tmp_path / "00000.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PoolError, match=r"00000\.npz cannot be read.*Download"):
        read_datacomp(tmp_path)
    damaged = bytearray(whole)
    damaged[200] ^= 0xFF
    (tmp_path / "00000.npz").write_bytes(damaged)
    with pytest.raises(PoolError, match=r"b32_img in .*00000\.npz cannot be read.*CRC"):
        read_datacomp(tmp_path)
    datacomp_shard(tmp_path, arrays={"b32_img": np.zeros(6), "b32_txt": np.zeros(6)})
    with pytest.raises(PoolError, match=r"float64 of shape \(6,\)"):
        read_datacomp(tmp_path)
    datacomp_shard(tmp_path, arrays={"b32_img": unit_rows(1, 6, 8), "b32_txt": unit_rows(1, 6, 4)})
    with pytest.raises(PoolError, match="differ in length"):
        read_datacomp(tmp_path)


def test_an_empty_metadata_shard_and_one_without_captions_are_errors(tmp_path: Path) -> None:
    datacomp_shard(tmp_path, rows=0)
    with pytest.raises(PoolError, match="empty shard 00000"):
        read_datacomp(tmp_path)
    datacomp_shard(tmp_path, columns={"text": None})
    with pytest.raises(PoolError, match="no column `text` or `caption`"):
        read_datacomp(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real pools are not at {REAL}")
def test_the_real_pool_is_the_same_in_both_formats() -> None:
    shared = ["uid", "f0", "f1", "shard", "caption", "sha256", "url", "width", "source_row"]
    tars = read(REAL / "real")
    assert (tars.rows.num_rows, set(reasons(tars).values())) == (800, {"download_failed"})
    metadata = read_datacomp(REAL / "real_datacomp")
    assert tars.rows.select(shared).equals(metadata.rows.select(shared))


def test_a_numbered_parquet_without_its_tar_is_a_shard_that_fails(tmp_path: Path) -> None:
    webdataset_pool(tmp_path, shards=2)
    write_sidecar(tmp_path, [{"key": "000000000", "status": "success"}], "00007")
    write_sidecar(tmp_path, [{"key": "000000000", "status": "success"}], "index")
    pool = open_pool(PoolSettings(path=str(tmp_path)), {})
    assert set(pool.list_shards()) == {"00000", "00001", "00007"}
    with pytest.raises(PoolError, match=r"00007\.parquet has no 00007\.tar beside it"):
        pool.read_shard("00007")
