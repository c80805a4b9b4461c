"""Pools of Parquet files with images, and of image files: the same rows, rejects and uids as tars give."""

import csv
import json
import multiprocessing
import pickle
import typing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resources.models.encoders import Embeddings, Encoder
from resources.pools.base import RAW_POOL_SCHEMA, REJECTS_SCHEMA, PoolError, ShardRead, TarPool
from resources.pools.formats import FORMATS, open_pool
from resources.pools.image_folder import ImageFolderPool
from resources.pools.parquet_images import ParquetImagesPool
from resources.settings import EncoderSettings, FormatName, PoolSettings
from tests.support.pool_factory import caption, picture, sample, uid, write_shard

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet_shard(folder: Path, columns: dict[str, Any], name: str = "train-00000-of-00001", group: int = 4) -> Path:
    """Write a shard of Parquet with row groups of a few rows."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=group)
    return folder


def images_column(data: list[bytes | None], kind: pa.DataType) -> pa.Array:
    """Return images as Hugging Face's struct or as plain binary."""
    if pa.types.is_struct(kind):
        return pa.array([{"bytes": image, "path": f"{row}.jpg"} for row, image in enumerate(data)], kind)
    return pa.array(data, kind)


def parquet_pool(folder: Path, **options: Any) -> ParquetImagesPool:
    pool = open_pool(PoolSettings.model_validate({"path": str(folder), "format": "parquet_images", **options}), {})
    assert isinstance(pool, ParquetImagesPool)
    return pool


def folder_pool(folder: Path, **options: Any) -> ImageFolderPool:
    pool = open_pool(PoolSettings.model_validate({"path": str(folder), "format": "image_folder", **options}), {})
    assert isinstance(pool, ImageFolderPool)
    return pool


def rejects(found: ShardRead) -> dict[str, str]:
    assert found.rows.schema == RAW_POOL_SCHEMA
    assert found.rejects.schema == REJECTS_SCHEMA
    return dict(zip(found.rejects["key"].to_pylist(), found.rejects["reason"].to_pylist(), strict=True))


def write_images(folder: Path, numbers: range) -> None:
    """Write images with a .txt beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number:03d}.jpg").write_bytes(picture(number))
        (folder / f"{number:03d}.txt").write_text(caption(number))


def test_the_registry_and_the_settings_name_the_same_formats() -> None:
    assert set(FORMATS) == set(typing.get_args(FormatName))


@pytest.mark.parametrize("name", FORMATS)
def test_a_pool_does_what_its_format_declares(tmp_path: Path, name: str) -> None:
    declared = FORMATS[name]
    pool = declared.open(PoolSettings.model_validate({"path": str(tmp_path), "format": name}), {})
    assert pool.has_images == declared.has_images
    assert isinstance(pool, TarPool) == declared.has_tars
    assert pickle.loads(pickle.dumps(pool)).settings == pool.settings
    rows = pa.table({name: pa.nulls(0, RAW_POOL_SCHEMA.field(name).type) for name in RAW_POOL_SCHEMA.names})
    if not declared.has_images:
        with pytest.raises(PoolError, match="carries no images"):
            pool.read_images("a", rows)
    if not declared.has_embeddings:
        with pytest.raises(PoolError, match="carries no embeddings for b32"):
            pool.embeddings("a", rows, "b32")


def test_a_setting_of_another_format_is_refused(tmp_path: Path) -> None:
    settings = PoolSettings.model_validate({"path": str(tmp_path), "columns": {"image": "a"}})
    with pytest.raises(PoolError, match=r"pool.columns is for format image_folder or parquet_images.*webdataset"):
        open_pool(settings, {})


def test_settings_of_an_existing_pool_do_not_mention_the_new_fields() -> None:
    dumped = PoolSettings(path="/p").model_dump(mode="json", exclude_none=True)
    assert set(dumped) == {"path", "format", "min_side", "max_pixels"}


# Parquet


@pytest.mark.parametrize("kind", [STRUCT, pa.binary(), pa.large_binary()])
def test_rows_of_parquet_are_those_of_the_same_samples_in_a_tar(tmp_path: Path, kind: pa.DataType) -> None:
    numbers = range(10)
    write_shard(tmp_path / "tars", [sample(number) for number in numbers])
    parquet_shard(
        tmp_path / "parquet",
        {
            "image": images_column([picture(number) for number in numbers], kind),
            "text": [caption(number) for number in numbers],
            "uid": [uid("00000", number) for number in numbers],
            "url": [f"src://00000/{number}" for number in numbers],
        },
    )
    pool = parquet_pool(tmp_path / "parquet")
    assert list(pool.list_shards()) == ["train-00000-of-00001"]
    found = pool.read_shard("train-00000-of-00001")
    wanted = open_pool(PoolSettings(path=str(tmp_path / "tars")), {}).read_shard("00000")
    same = [name for name in RAW_POOL_SCHEMA.names if name not in ("shard", "image_offset")]
    assert found.rows.select(same).equals(wanted.rows.select(same))
    assert found.rejects.num_rows == 0


def test_images_of_parquet_are_read_by_row_in_any_order(tmp_path: Path) -> None:
    pictures = [picture(number) for number in range(300)]
    parquet_shard(tmp_path, {"image": pictures, "caption": [f"c {i}" for i in range(300)]}, "a", group=200)
    parquet_shard(tmp_path, {"image": pictures[::-1], "caption": [f"c {i}" for i in range(300)]}, "b", group=7)
    pool = parquet_pool(tmp_path)
    rows = {name: pool.read_shard(name).rows for name in ("a", "b")}
    for wanted in ([0, 1, 2], [299, 150, 3, 3, 199, 200], [5], list(range(100, 260)), [0]):
        taken = pa.array(wanted)
        assert pool.read_images("a", rows["a"].take(taken)) == [pictures[row] for row in wanted]
        assert pool.read_images("b", rows["b"].take(taken)) == [pictures[299 - row] for row in wanted]
    assert pool.read_images("a", rows["a"].slice(0, 0)) == []


def test_a_parquet_file_that_changed_is_read_anew_and_a_row_that_is_gone_is_its_own_error(tmp_path: Path) -> None:
    parquet_shard(tmp_path, {"image": [picture(i) for i in range(6)], "caption": list("abcdef")}, "a")
    pool = parquet_pool(tmp_path)
    rows = pool.read_shard("a").rows
    assert pool.read_images("a", rows)[2] == picture(2)
    parquet_shard(tmp_path, {"image": [picture(i + 10) for i in range(3)], "caption": list("abc")}, "a")
    found = pool.read_images("a", rows)
    assert found[:3] == [picture(10), picture(11), picture(12)]
    for error in found[3:]:
        assert isinstance(error, PoolError)
        assert "a.parquet has 3 rows" in str(error)
    (tmp_path / "a.parquet").unlink()
    assert all(isinstance(error, PoolError) for error in pool.read_images("a", rows))


def test_every_bad_row_of_parquet_is_rejected_for_its_own_fault(tmp_path: Path) -> None:
    good, large = picture(0), picture(7, 120, 96)
    cases: list[tuple[bytes | None, str | None, str | None, str | None]] = [
        (good, "fine", uid(0), None),
        (None, "no image", uid(1), "image_missing"),
        (b"", "empty", uid(2), "image_empty"),
        (b"no image", "junk", uid(3), "image_undecodable"),
        (large[: len(large) * 2 // 5], "cut", uid(4), "image_truncated"),
        (picture(5, 1, 1), "dot", uid(5), "image_too_small"),
        (good, None, uid(6), "caption_missing"),
        (good, " \n", uid(7), "caption_empty"),
        (good, "bad uid", "short", "uid_invalid"),
        (good, "again", uid(0).upper(), "duplicate_uid"),
        (picture(9), "no uid", None, None),
    ]
    image, text, uids, reasons = zip(*cases, strict=True)
    parquet_shard(tmp_path, {"image": images_column(list(image), STRUCT), "caption": text, "uid": uids}, "a")
    found = parquet_pool(tmp_path).read_shard("a")
    assert rejects(found) == {f"{row:09d}": reason for row, reason in enumerate(reasons) if reason is not None}
    assert found.rows["source_row"].to_pylist() == [0, 10]
    assert found.samples == len(cases)


def test_columns_of_parquet_can_be_named(tmp_path: Path) -> None:
    columns = {
        "picture": [picture(1)],
        "alt": ["words"],
        "id": [uid(1)],
        "where": ["u"],
        "name": ["k"],
        "caption": [""],
    }
    parquet_shard(tmp_path, columns, "a")
    named = {"image": "picture", "caption": "alt", "uid": "id", "url": "where", "key": "name"}
    (row,) = parquet_pool(tmp_path, columns=named).read_shard("a").rows.to_pylist()
    assert (row["caption"], row["uid"], row["url"], row["key"]) == ("words", uid(1), "u", "k")
    with pytest.raises(PoolError, match=r"no column 'alto' \(pool.columns.caption\); it has picture, alt"):
        parquet_pool(tmp_path, columns=named | {"caption": "alto"}).read_shard("a")
    with pytest.raises(PoolError, match=r"no column image or .*Set pool.columns.image"):
        parquet_pool(tmp_path).read_shard("a")
    with pytest.raises(PoolError, match=r"column alt is string, not binary"):
        parquet_pool(tmp_path, columns=named | {"image": "alt"}).read_shard("a")


def test_a_parquet_shard_that_is_empty_damaged_or_absent_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match=r"no \*.parquet in"):
        parquet_pool(tmp_path).list_shards()
    parquet_shard(tmp_path, {"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}, "a")
    (tmp_path / "b.parquet").write_bytes(b"nothing of the kind")
    (tmp_path / "._c.parquet").write_bytes(b"left by a Mac")
    pool = parquet_pool(tmp_path)
    assert list(pool.list_shards()) == ["a", "b"]
    for name, words in (("a", "empty shard a"), ("b", "cannot be read"), ("d", "no shard d")):
        with pytest.raises(PoolError, match=words):
            pool.read_shard(name)


# Image folders


def test_folders_are_shards_and_a_new_file_changes_its_own_alone(tmp_path: Path) -> None:
    for number, name in enumerate(("cats", "dogs")):
        write_images(tmp_path / name, range(number * 10, number * 10 + 3))
    write_images(tmp_path / "cats" / "deep", range(5, 7))
    write_images(tmp_path, range(20, 22))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes").mkdir()
    pool = folder_pool(tmp_path)
    before = pool.list_shards()
    assert set(before) == {"top", "cats", "dogs"}
    cats = pool.read_shard("cats")
    assert cats.rows["key"].to_pylist() == [f"cats/00{n}.jpg" for n in range(3)] + [
        f"cats/deep/00{n}.jpg" for n in (5, 6)
    ]
    assert cats.rows["caption"].to_pylist() == [caption(number) for number in (0, 1, 2, 5, 6)]
    assert pool.read_images("cats", cats.rows) == [picture(number) for number in (0, 1, 2, 5, 6)]
    assert pool.read_shard("top").rows["key"].to_pylist() == ["020.jpg", "021.jpg"]
    write_images(tmp_path / "dogs", range(99, 100))
    after = pool.list_shards()
    assert [name for name in after if after[name] != before[name]] == ["dogs"]
    (tmp_path / "dogs" / "099.txt").write_text("another caption")
    assert [name for name, mark in pool.list_shards().items() if mark != after[name]] == ["dogs"]


def test_uids_are_those_of_the_same_samples_in_a_tar(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "a", range(4))
    write_shard(tmp_path / "tars", [sample(number, meta=None) for number in range(4)])
    tars = open_pool(PoolSettings(path=str(tmp_path / "tars")), {})
    found = folder_pool(tmp_path / "images").read_shard("a").rows
    assert found["uid"].equals(tars.read_shard("00000").rows["uid"])


def test_buckets_divide_a_folder_and_a_file_keeps_its_own(tmp_path: Path) -> None:
    write_images(tmp_path, range(40))
    pool = folder_pool(tmp_path, buckets=4)
    before = pool.list_shards()
    assert set(before) == {f"top-0000{n}" for n in range(4)}
    keys = {name: pool.read_shard(name).rows["key"].to_pylist() for name in before}
    assert sorted(key for listed in keys.values() for key in listed) == [f"{n:03d}.jpg" for n in range(40)]
    write_images(tmp_path, range(40, 41))
    (changed,) = (name for name, mark in pool.list_shards().items() if mark != before[name])
    assert pool.read_shard(changed).rows["key"].to_pylist() == [*keys[changed], "040.jpg"]


TABLE = [
    {
        "file_name": "a/000.jpg",
        "text": 'with "quotes", a comma',
        "uid": uid(0),
        "url": "src://0",
        "original_width": 640,
    },
    {"file_name": "./a/001.jpg", "text": "line\nbreak", "uid": None, "url": None, "original_width": None},
    {"file_name": "a/009.jpg", "text": "the image is lost", "uid": None, "url": None, "original_width": None},
    {"file_name": "b/000.jpg", "text": "another folder's", "uid": None, "url": None, "original_width": None},
]


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a caption table in the format of its suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        tabs = path.suffix == ".tsv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(
                file,
                list(rows[0]),
                delimiter="\t" if tabs else ",",
                quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
                quotechar=None if tabs else '"',
            )
            writer.writeheader()
            writer.writerows(
                {key: str(value).replace("\n", " ") if tabs and value else value for key, value in row.items()}
                for row in rows
            )


@pytest.mark.parametrize("name", ["captions.csv", "captions.tsv", "metadata.parquet", "metadata.jsonl"])
@pytest.mark.parametrize("inside", [True, False])
def test_captions_can_be_in_a_table_of_the_pool_or_of_the_shard(tmp_path: Path, name: str, inside: bool) -> None:
    write_images(tmp_path / "a", range(3))
    for number in range(2):
        (tmp_path / "a" / f"00{number}.txt").unlink()
    if inside:
        write_table(
            tmp_path / "a" / name, [{**row, "file_name": row["file_name"].replace("a/", "")} for row in TABLE[:3]]
        )
    else:
        write_table(tmp_path / name, TABLE)
    pool = folder_pool(tmp_path)
    assert list(pool.list_shards()) == ["a"]
    found = pool.read_shard("a")
    first, second, third = found.rows.to_pylist()
    assert (first["caption"], first["uid"], first["url"]) == (TABLE[0]["text"], uid(0), "src://0")
    assert first["original_width"] == 640
    assert second["caption"].split() == ["line", "break"]
    assert third["caption"] == caption(2)  # its .txt
    assert rejects(found) == {"a/009.jpg": "image_missing"}
    assert found.samples == 4


def test_every_bad_file_of_a_folder_is_rejected_for_its_own_fault(tmp_path: Path) -> None:
    write_images(tmp_path / "a", range(4))
    (tmp_path / "a/000.txt").unlink()
    (tmp_path / "a/001.jpg").write_bytes(b"junk")
    (tmp_path / "a/002.jpg").unlink()
    (tmp_path / "a/003.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a/movie.mp4").write_bytes(b"?")
    found = folder_pool(tmp_path).read_shard("a")
    assert rejects(found) == {
        "a/000.jpg": "caption_missing",
        "a/001.jpg": "image_undecodable",
        "a/002.txt": "image_missing",
    }
    assert found.rows["caption"].to_pylist() == ["caf\N{REPLACEMENT CHARACTER}"]
    assert found.rows["caption_repaired"].to_pylist() == [True]
    assert found.notes == ["ignored files that are neither image nor caption: movie.mp4"]


def test_a_folder_without_images_a_wrong_table_and_a_name_twice_are_errors(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="no image in"):
        folder_pool(tmp_path).list_shards()
    write_images(tmp_path / "top", range(1))
    assert list(folder_pool(tmp_path).list_shards()) == ["top"]
    assert folder_pool(tmp_path).read_shard("top").samples == 1
    write_images(tmp_path, range(1))
    with pytest.raises(PoolError, match="there is a folder top as well"):
        folder_pool(tmp_path).list_shards()
    (tmp_path / "000.jpg").unlink()
    (tmp_path / "captions.csv").write_text("photo,text\n000.jpg,words\n")
    with pytest.raises(PoolError, match=r"captions.csv: a row has no file name.*Set pool.columns.image"):
        folder_pool(tmp_path).read_shard("top")
    (tmp_path / "captions.csv").write_text("photo,text\ntop/000.jpg,words\n")
    named = folder_pool(tmp_path, columns={"image": "photo"})
    assert named.read_shard("top").rows["caption"].to_pylist() == [caption(0)]
    with pytest.raises(PoolError, match="no shard b"):
        named.read_shard("b")


def test_an_image_that_is_gone_is_its_own_error(tmp_path: Path) -> None:
    write_images(tmp_path / "a", range(3))
    pool = folder_pool(tmp_path)
    rows = pool.read_shard("a").rows
    (tmp_path / "a/001.jpg").unlink()
    first, second, third = pool.read_images("a", rows)
    assert (first, third) == (picture(0), picture(2))
    assert isinstance(second, PoolError)
    assert "001.jpg" in str(second)


# Both


@pytest.mark.parametrize("workers", [0, 2])
def test_embeddings_are_those_of_the_same_samples_in_a_tar(tmp_path: Path, tiny_clip: Path, workers: int) -> None:
    numbers = range(12)
    write_shard(tmp_path / "tars", [sample(number) for number in numbers], "a")
    write_images(tmp_path / "images" / "a", numbers)
    columns = {"image": [picture(n) for n in numbers], "caption": [caption(n) for n in numbers]}
    parquet_shard(tmp_path / "parquet", columns, "a")
    settings = EncoderSettings(model=f"local-dir:{tiny_clip}", workers=workers, batch_size=5)
    embedded = []
    for pool in (
        open_pool(PoolSettings(path=str(tmp_path / "tars")), {}),
        folder_pool(tmp_path / "images"),
        parquet_pool(tmp_path / "parquet"),
    ):
        ((_, found),) = Encoder("tiny", settings).embed_pool({"a": pool.read_shard("a").rows}, pool)
        assert isinstance(found, Embeddings)
        embedded.append(found)
    for found in embedded[1:]:
        assert (found.image == embedded[0].image).all()
        assert (found.text == embedded[0].text).all()
    assert not multiprocessing.active_children()
