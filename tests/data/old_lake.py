"""Two small projects with the lakes that commit 91eaec7 wrote for them, for tests that older lakes stay up to date.

The archive `old_lake.tar.xz` beside this file holds pools, targets, score files and lakes. Provenance holds absolute
paths and the times of files, so the archive is always unpacked to `ROOT`. The two models are not in it: `write_models`
makes the same bytes again.

To make the archive again, check out the commit whose lakes are wanted and run this file there:

    git worktree add ../old 91eaec7 && cp tests/data/old_lake.py ../old/old_lake.py
    cd ../old && python old_lake.py && cp old_lake.tar.xz <this folder>
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from core.uids import UID_DTYPE

ROOT = Path("/tmp/clip-data-selection-91eaec7")
ARCHIVE = Path(__file__).with_name("old_lake.tar.xz")
TIME = 1_700_000_000  # of every input file, whole seconds
ROWS = 12
WIDTH = 8

DATACOMP = {
    "name": "old_datacomp",
    "lake": "lake",
    "pool": {"path": "pool", "format": "datacomp"},
    "encoders": {"b32": {"precomputed": "b32", "temperature": 0.07}},
    "targets": {"pets": {"features": {"b32": "pets.npy"}}},
    "scores": {
        "neg_clip_loss": {"b32": {"batch_size": 6, "draws": 3}},
        "norm_sim_dynamic": {"b32": {"keep": 0.25, "rounds": 3, "of": "subset/half"}},
        "near_duplicates": {"b32": {"best": "clip_score/b32"}},
        "clusters": {"b32": {"targets": ["pets"], "clusters": 3, "sample": 20}},
        "captions": {},
        "hype": {
            "meru": {"path": "hyperbolic", "reference": "reference.npz", "curvature": 0.5, "clusters": "b32/pets"}
        },
    },
    "external_scores": {"mlm": {"files": "mlm.parquet", "columns": ["good", "fine"]}},
    "external_uids": {"chosen": {"files": "chosen.npy"}},
    "recipes": {
        "half": {"steps": [{"keep_top": {"score": "clip_score/b32", "fraction": 0.5}}]},
        "paper": {
            "steps": [
                {"keep_top": {"score": "neg_clip_loss/b32", "fraction": 0.6}},
                {"keep_top": {"score": "norm_sim_inf/b32/pets", "fraction": 0.3}},
            ]
        },
        "exact": {
            "steps": [
                {"keep_top": {"score": "clip_score/b32", "fraction": 0.7}},
                {"keep_top": {"score": "norm_sim_inf/b32/pets", "count": 4}},
            ]
        },
        "sets": {
            "from": "half",
            "steps": [
                {"where": 'least(width, height) >= 200 AND "language/facts" IS NOT NULL'},
                {"except": "external_uids/chosen"},
                {"union": "extra.txt"},
                {"deduplicate": {"by": "near_duplicate/b32", "above": 0.999}},
                {"keep_top": {"score": "hype/meru", "fraction": 0.5}},
            ],
        },
        "strata": {
            "steps": [
                {"stratify": {"by": "cluster/b32/pets", "score": "external_scores/mlm/good", "fraction": 0.5}},
                {"soft_cap_sample": {"score": "norm_sim_dynamic/b32", "count": 10, "batch": 5, "penalty": 0.15}},
            ]
        },
    },
}

WEBDATASET = {
    "name": "old_webdataset",
    "lake": "lake",
    "pool": {"path": "pool", "min_side": 8},
    "encoders": {"tiny": {"model": "local-dir:../models/clip", "batch_size": 4, "workers": 0}},
    "targets": {"pets": {"path": "pets"}},
    "captioners": {
        "tiny": {"model": "local-dir:../models/coca", "workers": 0, "captions": 2, "max_tokens": 5, "min_tokens": 2}
    },
    "text_encoders": {"tower": {"encoder": "tiny"}},
    "scores": {"neg_clip_loss": {"tiny": {"batch_size": 4, "draws": 2, "estimator": "random_partitions"}}},
    "recipes": {
        "fused": {"steps": [{"keep_top": {"rank_sum": ["clip_score/tiny", "sieve/tiny/tower"], "count": 3}}]},
        "paper": {
            "steps": [
                {"keep_top": {"score": "neg_clip_loss/tiny", "fraction": 0.5}},
                {"keep_top": {"score": "norm_sim_2/tiny/pets", "fraction": 0.34}},
            ]
        },
    },
}

CLIP_CONFIG = {
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
TOWER = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
COCA_CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {
            **CLIP_CONFIG["model_cfg"]["vision_cfg"],  # type: ignore[dict-item]
            "attentional_pool": True,
            "attn_pooler_queries": 4,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**TOWER, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TOWER, "attn_pooler_heads": 2},
        "custom_text": True,
    },
    "preprocess_cfg": CLIP_CONFIG["preprocess_cfg"],
}


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Return float64 numbers in [-1, 1), the same on every machine: a hash of their place, by whole numbers alone."""
    place = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(seed * 1_000_003)
    mixed = (place * np.uint64(0x9E3779B97F4A7C15)) ^ ((place * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(27))
    return ((mixed >> np.uint64(33)).astype(np.float64) / 2.0**30 - 1).reshape(shape)


def unit_rows(seed: int, rows: int) -> np.ndarray:
    """Return float16 rows with four entries of ±0.5: their norms and cosines are exact in every arithmetic."""
    order = np.argsort(numbers(seed, rows, WIDTH), axis=1, kind="stable")
    signs = np.where(numbers(seed + 500, rows, WIDTH) < 0, -0.5, 0.5)
    return np.where(order < 4, signs, 0).astype(np.float16)


def uid(*parts: object) -> str:
    """Return a uid derived from any values."""
    return hashlib.md5(repr(parts).encode(), usedforsecurity=False).hexdigest()


def write_models(folder: Path) -> None:
    """Write the tiny CLIP and the tiny CoCa."""
    import open_clip
    from safetensors.numpy import save_file

    for name, config in (("clip", CLIP_CONFIG), ("coca", COCA_CONFIG)):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "open_clip_config.json").write_text(json.dumps(config))
        shapes = {key: tuple(t.shape) for key, t in open_clip.create_model(f"local-dir:{place}").state_dict().items()}
        state = {
            key: (numbers(number, *shape) * 0.2 if shape else np.array(2.5)).astype(np.float32)
            for number, (key, shape) in enumerate(sorted(shapes.items()))
        }
        state = {
            key: np.float32(1) + value if key.endswith("ln_final.weight") else value for key, value in state.items()
        }
        save_file(state, place / "open_clip_model.safetensors")


def _picture(seed: int) -> bytes:
    from PIL import Image

    small = Image.fromarray((numbers(seed, 4, 4, 3) * 127 + 128).astype(np.uint8))
    out = io.BytesIO()
    small.resize((32, 32), Image.Resampling.NEAREST).save(out, "PNG")
    return out.getvalue()


def _write_datacomp_shard(folder: Path, shard: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = int(shard)
    table = {
        "uid": [uid(shard, row) for row in range(ROWS)],
        "url": [f"src://{shard}/{row}" for row in range(ROWS)],
        "text": [f"a small {('dog', 'boat', 'tree')[row % 3]} beside a house, number {row}" for row in range(ROWS)],
        "original_width": [100 + 60 * row for row in range(ROWS)],
        "original_height": [480] * ROWS,
        "sha256": [hashlib.sha256(repr((shard, row)).encode()).hexdigest() for row in range(ROWS)],
    }
    (folder / "pool").mkdir(parents=True, exist_ok=True)
    (folder / "hyperbolic").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder / "pool" / f"{shard}.parquet")
    image, text = unit_rows(number + 1, ROWS), unit_rows(number + 51, ROWS)
    text[::2] = image[::2]
    image[5] = image[4]
    np.savez(folder / "pool" / f"{shard}.npz", b32_img=image, b32_txt=text)
    sides = {side: numbers(number + place, ROWS, 6).astype(np.float32) for place, side in ((70, "image"), (90, "text"))}
    np.savez(folder / "hyperbolic" / f"{shard}.npz", **sides)


def _write_datacomp(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    np.save(folder / "pets.npy", unit_rows(200, 6))
    reference = {side: numbers(seed, 7, 6).astype(np.float32) for side, seed in (("image", 301), ("text", 302))}
    np.savez(folder / "reference.npz", **reference)
    known = [uid(shard, row) for shard in ("00000", "00001") for row in range(ROWS)]
    good = numbers(400, len(known))
    pq.write_table(pa.table({"uid": known, "good": good, "fine": good * 2}), folder / "mlm.parquet")
    words = [(int(text[:16], 16), int(text[16:], 16)) for text in known[2:5]]
    np.save(folder / "chosen.npy", np.array(sorted(words), dtype=UID_DTYPE))
    (folder / "extra.txt").write_text("\n".join(known[8:11]) + "\n")


def _write_webdataset_shard(folder: Path, shard: str) -> None:
    (folder / "pool").mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "pool" / f"{shard}.tar", "w") as tar:
        for row in range(4):
            caption = f"a {('dog', 'boat', 'tree', 'house')[row]} of shard {shard}"
            meta = json.dumps({"uid": uid("web", shard, row), "url": f"src://{row}"})
            picture = _picture(int(shard) * 10 + row)
            for suffix, data in (("png", picture), ("json", meta.encode()), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{row:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _stop_clock(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and "lake" not in path.relative_to(folder).parts:
            os.utime(path, (TIME, TIME))


def _run(config: Path, document: dict[str, Any]) -> None:
    import yaml

    from dagster_project.command import main  # of the commit that is checked out

    config.write_text(yaml.safe_dump(document))
    _stop_clock(config.parent)
    if main(["run", str(config)]):
        raise SystemExit(f"{config}: the run failed")


def make(archive: Path) -> None:
    """Run both projects twice, the second time with one more shard, and pack them without Dagster's records."""
    shutil.rmtree(ROOT, ignore_errors=True)
    write_models(ROOT / "models")
    datacomp, webdataset = ROOT / "datacomp", ROOT / "webdataset"
    for number in range(2):
        shard = f"{number:05d}"
        _write_datacomp_shard(datacomp, shard)
        _write_webdataset_shard(webdataset, shard)
        if number == 0:
            _write_datacomp(datacomp)
            for place in range(4):
                (webdataset / "pets" / ("cat", "dog")[place % 2]).mkdir(parents=True, exist_ok=True)
                (webdataset / "pets" / ("cat", "dog")[place % 2] / f"{place}.png").write_bytes(_picture(100 + place))
        _run(datacomp / "project.yaml", DATACOMP)
        _run(webdataset / "project.yaml", WEBDATASET)
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(ROOT.rglob("*")):
            parts = path.relative_to(ROOT).parts
            dropped = {"models", ".dagster", ".pass.lock", "catalog.duckdb", "report"} & set(parts)
            if path.is_file() and not dropped and not path.name.startswith(".nfs"):
                info = tar.gettarinfo(path, "/".join(parts))
                info.uid = info.gid = 0
                info.uname = info.gname = ""
                info.mtime = int(info.mtime)
                with open(path, "rb") as file:
                    tar.addfile(info, file)


@contextmanager
def unpacked() -> Iterator[Path]:
    """Unpack the archive afresh to `ROOT` and hold a lock on it; yield the folder."""
    ROOT.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{ROOT}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(ROOT, ignore_errors=True)
        ROOT.mkdir()
        with tarfile.open(ARCHIVE) as tar:
            tar.extractall(ROOT, filter="data")
        write_models(ROOT / "models")
        try:
            yield ROOT
        finally:
            shutil.rmtree(ROOT, ignore_errors=True)


if __name__ == "__main__":
    make(Path("old_lake.tar.xz"))
