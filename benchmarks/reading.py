"""How fast tars are walked, images decoded, metadata read, and a model kept busy.

    python -m benchmarks.reading [--embedding] [--json PATH]

The fractions compare two ways of doing the same work, timed in turns within one run. `--embedding`
builds a ViT-B-32 with random weights and takes some minutes on two cores.
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

from resources.encoders import Embeddings, Encoder
from resources.pools import open_pool
from resources.settings import EncoderSettings, PoolSettings, available_cores
from resources.tars import walk

TAR_SAMPLES = 10_000
DECODE_SAMPLES = 2_000
METADATA_ROWS = 100_000
REPEATS = 5
SIDE = 256  # pixels: what img2dataset writes by default
BATCH = 16
TIMED_BATCHES = 9
WARM_BATCHES = 3


def measure(repeats: int = REPEATS, *, embedding: bool = False) -> dict[str, Any]:
    """Time the readers on generated data.

    Args:
        repeats: interleaved repeats; medians are reported.
        embedding: whether to time a model as well.

    Returns:
        One figure each by name: samples a second, or fractions.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = _tars(repeats) | _decoding(folder, repeats) | _metadata(folder, repeats)
        if embedding:
            figures |= _embedding(folder)
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
                "txt": f"a caption of ordinary length, number {number}, of nothing".encode(),
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


def _embedding(folder: Path) -> dict[str, float]:
    """Embedding of a pool beside the bare model on ready tensors, batch by batch in turns.

    Both models are one and the same. A batch's turn begins when the next one is asked for, which is
    when a process begins to decode a later one: so decoding is counted as long as the model, and
    not the decoding, is what takes the time.
    """
    import open_clip
    import torch
    from safetensors.torch import save_file

    place = folder / "vit"
    place.mkdir()
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": {}}
    (place / "open_clip_config.json").write_text(json.dumps(config))
    state = open_clip.create_model("ViT-B-32", pretrained=None).state_dict()
    half = {name: tensor.half().contiguous() for name, tensor in state.items()}
    save_file(half, place / "open_clip_model.safetensors")
    del state, half

    pool = open_pool(PoolSettings(path=str(folder)), {})
    rows = pool.read_shard("00000").rows.slice(0, (WARM_BATCHES + TIMED_BATCHES + 4) * BATCH)
    settings = EncoderSettings(model=f"local-dir:{place}", batch_size=BATCH)
    encoder = Encoder("vit", settings)
    model = encoder.loaded.model
    pixels = torch.randn(BATCH, 3, 224, 224)
    tokens = encoder.loaded.tokenizer(rows["caption"].to_pylist()[:BATCH])
    bare: list[float] = []
    embedding: list[float] = []
    started = time.perf_counter()

    def take_turns(_: int) -> None:
        nonlocal started
        embedding.append(time.perf_counter() - started)
        started = time.perf_counter()
        with torch.inference_mode():
            model.encode_image(pixels)
            model.encode_text(tokens)
        bare.append(time.perf_counter() - started)
        started = time.perf_counter()

    for _, found in encoder.embed_pool({"00000": rows}, pool, on_rows=take_turns):
        if not isinstance(found, Embeddings):
            raise found
    timed = slice(WARM_BATCHES, WARM_BATCHES + TIMED_BATCHES)  # the last ones have none to decode
    return {
        "embedding_samples_per_second": BATCH / median(embedding[timed]),
        "embedding_of_bare_forward": median(bare[timed]) / median(embedding[timed]),
    }


def main() -> None:
    """Print the figures, and write them where --json says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    parser.add_argument("--embedding", action="store_true", help="time a ViT-B-32 as well")
    arguments = parser.parse_args()
    figures = measure(embedding=arguments.embedding)
    for name, figure in figures.items():
        print(f"{name:46} {figure:,.3f}" if figure < 10 else f"{name:46} {figure:,.0f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
