"""Speed of reading tars, decoding images, reading metadata, and feeding a model.

    python -m benchmarks.reading [--embedding] [--model ViT-B-32] [--batch 16] [--json PATH]
    python -m benchmarks.reading --settings [--model …] [--batch …]
    python -m benchmarks.reading --draft examples/photographs.yaml

The fractions compare two ways of doing the same work, timed in turns within one run. `--embedding` also builds a model
with random weights (ViT-B-32; some minutes on two cores) and computes how many cores must decode to keep it busy.
`--settings` compares precisions, memory formats and torch.compile on the same model, `--draft` the two ways of decoding
on photographs. On a GPU, `benchmarks.gpu` measures the embedding.
"""

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks import encoding
from benchmarks.models import CAPTION, save_named_model
from resources.pools.base import Pool
from resources.pools.formats import open_pool
from resources.settings import EncoderSettings, PoolSettings, available_cores
from resources.storage.tars import walk

TAR_SAMPLES = 10_000
DECODE_SAMPLES = 2_000
METADATA_ROWS = 100_000
REPEATS = 5
SIDE = 256  # pixels: what img2dataset writes by default
MODEL = "ViT-B-32"
BATCH = 16


def measure(
    repeats: int = REPEATS, *, embedding: bool = False, model: str = MODEL, batch: int = BATCH
) -> dict[str, Any]:
    """Time the readers on generated data.

    Args:
        repeats: Interleaved repeats; medians are reported.
        embedding: Whether to time a model as well.
        model: Name of the model in open_clip.
        batch: Samples per forward pass.

    Returns:
        Samples per second, or fractions, by name.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = _tars(repeats) | _decoding(folder, repeats) | _metadata(folder, repeats)
        if embedding:
            figures |= encoding.keep_busy(*_pool(folder), save_named_model(folder, model), batch)
    return {"cores": available_cores()} | figures


def _medians(tasks: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def _write(path: Path | io.BytesIO, samples: int, image: Callable[[int], bytes]) -> None:
    options: dict[str, Any] = {"name": path} if isinstance(path, Path) else {"fileobj": path}
    with tarfile.open(mode="w", **options) as tar:
        for number in range(samples):
            parts = {
                "jpg": image(number),
                "json": b'{"caption": null, "status": "success"}',
                "txt": CAPTION.format(number).encode(),
            }
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _jpeg(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    out = io.BytesIO()
    coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(out, "JPEG", quality=95)
    return out.getvalue()


def _tars(repeats: int) -> dict[str, float]:
    out = io.BytesIO()
    _write(out, TAR_SAMPLES, lambda _: b"x" * 2000)
    data = out.getvalue()

    def by_tarfile() -> None:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            deque(tar, maxlen=0)

    def by_walk() -> None:
        deque(walk(data, "tar").members, maxlen=0)

    took = _medians({"walk": by_walk, "tarfile": by_tarfile}, repeats)
    return {
        "tar_walk_samples_per_second": TAR_SAMPLES / took["walk"],
        "tarfile_samples_per_second": TAR_SAMPLES / took["tarfile"],
        "tar_walk_of_tarfile": took["tarfile"] / took["walk"],
    }


def _decoding(folder: Path, repeats: int) -> dict[str, float]:
    pictures = [_jpeg(seed) for seed in range(64)]
    _write(folder / "00000.tar", DECODE_SAMPLES, lambda number: pictures[number % 64] + b"%d" % number)
    pool = open_pool(PoolSettings(path=str(folder)), {})

    def full_decode() -> None:
        for number in range(DECODE_SAMPLES):
            Image.open(io.BytesIO(pictures[number % 64])).load()

    took = _medians({"shard": lambda: pool.read_shard("00000"), "full": full_decode}, min(repeats, 3))
    return {
        "shard_samples_per_second": DECODE_SAMPLES / took["shard"],
        "pillow_decode_samples_per_second_per_core": DECODE_SAMPLES / took["full"],
    }


def _metadata(folder: Path, repeats: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((METADATA_ROWS, 512), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    half = vectors.astype(np.float16)
    np.savez(folder / "metadata.npz", b32_img=half, b32_txt=half)
    table = {
        "uid": [rng.bytes(16).hex() for _ in range(METADATA_ROWS)],
        "text": [f"a caption of ordinary length, number {row}" for row in range(METADATA_ROWS)],
    }
    pq.write_table(pa.table(table), folder / "metadata.parquet")
    encoders = {"b32": EncoderSettings(precomputed="b32", temperature=0.01)}
    pool = open_pool(PoolSettings(path=str(folder), format="datacomp"), encoders)
    rows = pool.read_shard("metadata").rows
    took = _medians(
        {
            "read": lambda: pool.read_shard("metadata"),
            "import": lambda: pool.embeddings("metadata", rows, "b32"),
        },
        min(repeats, 3),
    )
    return {
        "metadata_rows_per_second": METADATA_ROWS / took["read"],
        "imported_embeddings_rows_per_second": METADATA_ROWS / took["import"],
    }


def _pool(folder: Path) -> tuple[Pool, pa.Table]:
    """Return the generated pool and the rows of its shard."""
    pool = open_pool(PoolSettings(path=str(folder)), {})
    return pool, pool.read_shard("00000").rows


def main() -> None:
    """Print the results, and write them to a file with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results to this file")
    parser.add_argument("--embedding", action="store_true", help="time a model as well, and the processes that feed it")
    parser.add_argument("--settings", action="store_true", help="time the model's settings instead of the readers")
    parser.add_argument(
        "--draft", type=Path, metavar="CONFIG", help="compare draft decoding on a project's pool instead"
    )
    parser.add_argument("--model", default=MODEL, help="an open_clip model's name")
    parser.add_argument("--batch", type=int, default=BATCH, help="samples a forward pass")
    arguments = parser.parse_args()
    chosen = {"model": arguments.model, "batch": arguments.batch}
    with tempfile.TemporaryDirectory() as name:
        if arguments.settings:
            place = save_named_model(Path(name), arguments.model)
            figures: dict[str, Any] = chosen | encoding.settings(place, arguments.batch)
        elif arguments.draft:
            figures = encoding.draft(arguments.draft, Path(name))
        else:
            figures = measure(embedding=arguments.embedding, **chosen)
    for figure_name, figure in figures.items():
        shown = figure if isinstance(figure, str) else f"{figure:,.3f}" if figure < 10 else f"{figure:,.0f}"
        print(f"{figure_name:46} {shown}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
