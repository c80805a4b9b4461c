"""Small pools, images and models that tests write into their own folders.

Everything is generated from fixed seeds. `tiny_clip` is a session fixture.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
WORDS = ("red", "blue", "old", "small", "dog", "boat", "tree", "house", "runs", "floats")


def picture(seed: int = 0, width: int = 40, height: int = 32, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """Return an encoded image of smooth noise, determined by its arguments."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def caption(seed: int) -> str:
    """Return a caption of four words and the seed."""
    rng = np.random.default_rng(seed)
    return " ".join(str(word) for word in rng.choice(WORDS, 4)) + f" {seed}"


def uid(*parts: object) -> str:
    """Return a uid, as text, derived from any values."""
    return hashlib.md5(repr(parts).encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Sample:
    """The tar members of one key. None leaves a member out."""

    key: str
    image: bytes | None
    text: bytes | None
    meta: dict[str, Any] | bytes | None = None
    suffix: str = "jpg"

    def members(self) -> list[tuple[str, bytes]]:
        """Return the sample's members in img2dataset's order."""
        found = []
        if self.image is not None:
            found.append((f"{self.key}.{self.suffix}", self.image))
        if self.meta is not None:
            meta = self.meta if isinstance(self.meta, bytes) else json.dumps(self.meta).encode()
            found.append((f"{self.key}.json", meta))
        if self.text is not None:
            found.append((f"{self.key}.txt", self.text))
        return found


def sample(number: int, shard: str = "00000", **changes: Any) -> Sample:
    """Return a valid sample with some fields replaced.

    Args:
        number: its key, and the seed of its image, caption and uid.
        shard: part of the uid.
        changes: fields of `Sample` to replace.
    """
    key = f"{number:09d}"
    words = caption(number)
    parts: dict[str, Any] = {
        "key": key,
        "image": picture(number),
        "text": words.encode(),
        "meta": {"uid": uid(shard, number), "url": f"src://{shard}/{number}", "caption": words},
    }
    return Sample(**{**parts, **changes})


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **options: Any) -> Path:
    """Write a tar of the members in the order given, all with the same modification time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shard(folder: Path, samples: Sequence[Sample], name: str = "00000", *, sidecar: bool = False) -> Path:
    """Write a webdataset shard and, with `sidecar`, a Parquet file of its samples' metadata."""
    path = write_tar(folder / f"{name}.tar", [part for one in samples for part in one.members()])
    if sidecar:
        rows = [{"key": one.key, "status": "success", **one.meta} for one in samples if isinstance(one.meta, dict)]
        write_sidecar(folder, rows, name)
    return path


def write_sidecar(folder: Path, rows: Sequence[dict[str, Any]], name: str = "00000") -> Path:
    """Write the Parquet file beside a tar."""
    path = folder / f"{name}.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def webdataset_pool(folder: Path, shards: int = 2, rows: int = 6) -> Path:
    """Write a valid webdataset pool with shards 00000, 00001, …; every other one has a sidecar."""
    for number in range(shards):
        name = f"{number:05d}"
        first = number * rows
        write_shard(folder, [sample(first + i, name) for i in range(rows)], name, sidecar=number % 2 == 0)
    return folder


def unit_rows(seed: int, rows: int, dimension: int = 8) -> np.ndarray:
    """Return random vectors of unit norm, float16 [rows, dimension]."""
    vectors = np.random.default_rng(seed).standard_normal((rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def datacomp_shard(
    folder: Path,
    name: str = "00000",
    rows: int = 6,
    *,
    columns: dict[str, Any] | None = None,
    arrays: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a shard in DataComp's metadata format and return its folder.

    Args:
        folder: the pool.
        name: stem of the two files.
        rows: number of samples.
        columns: columns to replace or add; None as a value drops one. By default `clip_b32_similarity_score` holds the
            cosines of b32_img and b32_txt, and is left out without them.
        arrays: the npz's arrays; b32_img and b32_txt (unit norm) by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if arrays is None:
        arrays = {"b32_img": unit_rows(1, rows), "b32_txt": unit_rows(2, rows)}
    table: dict[str, Any] = {
        "uid": [uid(name, row) for row in range(rows)],
        "url": [f"src://{name}/{row}" for row in range(rows)],
        "text": [caption(row) for row in range(rows)],
        "original_width": [640] * rows,
        "original_height": [480] * rows,
        "clip_b32_similarity_score": cosines(arrays["b32_img"], arrays["b32_txt"]) if _has_b32(arrays) else None,
        "sha256": [hashlib.sha256(picture(row)).hexdigest() for row in range(rows)],
    }
    table |= columns or {}
    pq.write_table(
        pa.table({key: value for key, value in table.items() if value is not None}),
        folder / f"{name}.parquet",
    )
    np.savez(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    return folder


def cosines(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Return the cosines of embeddings of unit norm `[n, d]`, float32 `[n]`, as DataComp's metadata has them."""
    return np.einsum("nd,nd->n", image.astype(np.float32), text.astype(np.float32))


def _has_b32(arrays: dict[str, np.ndarray]) -> bool:
    shapes = {arrays[key].shape for key in ("b32_img", "b32_txt") if key in arrays}
    return len(shapes) == 1 and {"b32_img", "b32_txt"} <= arrays.keys() and len(next(iter(shapes))) == 2


def class_folders(folder: Path, classes: Sequence[str] = ("cat", "dog"), images: int = 3) -> Path:
    """Write a target as class folders."""
    for number, label in enumerate(classes):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            (folder / label / f"{i:03d}.jpg").write_bytes(picture(1000 + number * images + i))
    return folder


@dataclass(frozen=True)
class BrokenCase:
    """A sample of the broken shard and the reason to reject it (None: it is accepted)."""

    sample: Sample
    reason: str | None


def broken_cases() -> list[BrokenCase]:
    """Return every fault known from downloaded shards, between valid samples."""
    jpeg = picture(7, 120, 96)
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = io.BytesIO()
    Image.open(io.BytesIO(picture(8))).save(rotated, "JPEG", exif=exif)
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({}, None),
        ({"image": jpeg[: len(jpeg) * 2 // 5]}, "image_truncated"),
        ({"image": b""}, "image_empty"),
        ({"image": picture(3, kind="PNG")}, None),
        ({"image": b"this is no image"}, "image_undecodable"),
        ({"text": None, "meta": {"caption": None}}, "caption_missing"),
        ({"text": b""}, "caption_empty"),
        ({"text": b" \t \n"}, "caption_empty"),
        ({"text": b"caf\xe9 \xff", "meta": {"caption": None}}, None),
        ({"text": b"long " * 4000}, None),
        ({"key": "same"}, None),
        ({"key": "same"}, "duplicate_key"),
        ({"image": picture(4, mode="CMYK")}, None),
        ({"image": picture(5, mode="L")}, None),
        ({"image": picture(6, 1, 1)}, "image_too_small"),
        ({"image": rotated.getvalue()}, None),
        ({"image": None}, "image_missing"),
        ({"image": picture(9, kind="PNG", mode="RGBA")}, None),
        ({"image": picture(10, kind="WEBP"), "suffix": "webp"}, None),
        ({"key": "../../evil"}, "unsafe_path"),
        ({"key": "/absolute"}, "unsafe_path"),
        ({"meta": None}, None),
        ({"meta": b"{not json"}, "metadata_invalid"),
        ({"meta": {"uid": "short"}}, "uid_invalid"),
        ({"meta": {"uid": uid("00000", 0)}}, "duplicate_uid"),
        ({"text": None}, None),
        ({}, None),
        ({"image": jpeg}, "shard_truncated"),
    ]
    return [BrokenCase(sample(number, **changes), reason) for number, (changes, reason) in enumerate(cases)]


def broken_shard(folder: Path, name: str = "00000") -> list[BrokenCase]:
    """Write all broken cases as one tar that ends inside the last image and holds a stray member."""
    cases = broken_cases()
    members = [part for case in cases for part in case.sample.members()]
    members.insert(6, ("README.nfo", b"no part of a sample"))
    path = write_tar(folder / f"{name}.tar", members)
    data = path.read_bytes()
    image = cases[-1].sample.image
    assert image is not None
    path.write_bytes(data[: data.rindex(image) + len(image) // 2])
    return cases


TINY_CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {
        "size": 32,
        "mode": "RGB",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}
TINY_CONVOLUTIONAL_CONFIG = {
    **TINY_CONFIG,
    "model_cfg": {
        **TINY_CONFIG["model_cfg"],
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    },
}


def write_clip(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Save an open_clip model with random weights as a `local-dir:` folder."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{folder}")
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a CLIP with 16 dimensions and random weights."""
    return write_clip(tmp_path_factory.mktemp("tiny_clip"), TINY_CONFIG)
