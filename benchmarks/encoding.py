"""Throughput of an encoder on CPU: decoding beside the forward pass, the model's settings, and draft decoding.

Called by `benchmarks.reading`, which has the command line. Not here: GPUs (`gpu.encoders`).
"""

import io
import tarfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from assets.settings import open_project
from benchmarks.models import Forward, forward, prepared_per_second
from resources.models.decoding import Prepare, ShardWork
from resources.models.encoders import Embeddings, Encoder, embed_together
from resources.pools.base import Pool
from resources.pools.formats import open_pool
from resources.settings import EncoderSettings, PoolSettings

WARM_BATCHES = 3
TIMED_BATCHES = 9
DECODED = 256
PHOTOGRAPHS = 400
TOP = 0.3
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32_channels_last": {"channels_last": True},
    "bf16": {"precision": "bf16"},
    "amp_bf16": {"precision": "amp_bf16"},
    "fp32_compiled": {"compile": True},
}


def load(place: Path, batch: int, **options: Any) -> Encoder:
    """Return an encoder of a stored model, on CPU."""
    return Encoder("model", EncoderSettings(model=f"local-dir:{place}", batch_size=batch, device="cpu", **options))


def keep_busy(pool: Pool, rows: pa.Table, place: Path, batch: int) -> dict[str, float]:
    """Compare embedding a pool with the bare forward pass, and compute how many cores must decode for it.

    Args:
        pool: A pool with one shard, 00000.
        rows: Its rows.
        place: Folder of the model.
        batch: Samples per forward pass.
    """
    encoder = load(place, batch)
    model = encoder.loaded
    # the turns of the last batches have none to decode
    some = rows.take(np.arange((WARM_BATCHES + TIMED_BATCHES + 4) * batch) % len(rows))
    ratio, rate = _in_turns(encoder, forward(model, batch), {"00000": some}, pool)
    decoded, tokenised = _prepared(encoder, rows, pool)
    return {
        "bare_forward_samples_per_second": rate / ratio,
        "embedding_samples_per_second": rate,
        "embedding_of_bare_forward": ratio,
        "prepared_samples_per_second_per_core": decoded,
        "tokenised_captions_per_second_per_core": tokenised,
        "cores_that_keep_the_model_busy": rate / ratio / decoded,
    }


def _in_turns(encoder: Encoder, bare: Forward, shards: dict[str, pa.Table], pool: Pool) -> tuple[float, float]:
    """Return the embedding's rate as a fraction of the bare pass's, and the rate, with batches timed in turns.

    Both use the same model. The turn of a batch starts when the next one is requested, which is when a process starts
    to decode a later one. So decoding is included as long as the model is the bottleneck.
    """
    alone: list[float] = []
    embedding: list[float] = []
    started = time.perf_counter()

    def take_turns(_: int) -> None:
        nonlocal started
        embedding.append(time.perf_counter() - started)
        alone.append(bare.seconds())
        started = time.perf_counter()

    for _, found in encoder.embed_pool(shards, pool, on_rows=take_turns):
        if not isinstance(found, Embeddings):
            raise found
    timed = slice(WARM_BATCHES, WARM_BATCHES + TIMED_BATCHES)
    took = median(embedding[timed])
    return median(alone[timed]) / took, len(bare.pixels) / took


def _prepared(encoder: Encoder, rows: pa.Table, pool: Pool) -> tuple[float, float]:
    """Return the samples that one decoding process prepares per second, and the captions that it tokenises."""
    model = encoder.loaded
    items = list(ShardWork({"00000": rows.slice(0, DECODED)}, 32))
    return prepared_per_second(Prepare([model.look], [model.tokenizer], pool), items)


def settings(place: Path, batch: int) -> dict[str, float]:
    """Time the forward pass under an encoder's settings, in turns; each as a multiple of the plain float32 one."""
    forwards = {name: forward(load(place, batch, **options).loaded, batch) for name, options in VARIANTS.items()}
    for one in forwards.values():
        one.seconds()
    turns = [{name: one.seconds() for name, one in forwards.items()} for _ in range(5)]
    figures = {"fp32_samples_per_second": batch / median(turn["fp32"] for turn in turns)}
    plain = forwards["fp32"].model.encode(forwards["fp32"].pixels, forwards["fp32"].tokens)
    for name, one in forwards.items():
        if name != "fp32":
            figures[f"{name}_of_fp32"] = median(turn["fp32"] / turn[name] for turn in turns)
            found = one.model.encode(one.pixels, one.tokens)
            away = (found[0].float() * plain[0].float()).sum(1)
            figures[f"{name}_smallest_cosine"] = float(away.min())
    return figures


def draft(config: Path, folder: Path) -> dict[str, float]:
    """Compare draft with exact decoding on a project's photographs, as stored and enlarged.

    Args:
        config: A project's YAML; its first encoder and the first rows of its first shard are used.
        folder: A folder for enlarged pools.
    """
    project = open_project(config)
    shard = min(project.pool.list_shards())
    rows = project.pool.read_shard(shard).rows.slice(0, PHOTOGRAPHS)
    pictures = [data for data in project.pool.read_images(shard, rows) if isinstance(data, bytes)]
    given = next(iter(project.settings.encoders.values()))
    encoders = [Encoder(mode, given.model_copy(update={"decode": mode})) for mode in ("exact", "draft")]
    figures: dict[str, float] = {"photographs": len(rows)}
    for times in (1, 3, 4):
        place = folder / f"times_{times}"
        place.mkdir()
        _write(place / "00000.tar", [_enlarged(data, times) for data in pictures], rows["caption"].to_pylist())
        pool = open_pool(PoolSettings(path=str(place)), {})
        table = pool.read_shard("00000").rows
        ((_, (exact, rough)),) = embed_together(encoders, {"00000": table}, pool)
        if not isinstance(exact, Embeddings) or not isinstance(rough, Embeddings):
            raise TypeError(f"{exact}, {rough}")
        scores = [np.einsum("nd,nd->n", *(x.astype(np.float64) for x in (e.image, e.text))) for e in (exact, rough)]
        kept = int(len(table) * TOP)
        top = [set(np.argsort(-score, kind="stable")[:kept].tolist()) for score in scores]
        rates = [_prepared(encoder, table, pool)[0] for encoder in encoders]
        figures |= {
            f"times_{times}_exact_prepared_per_second_per_core": rates[0],
            f"times_{times}_draft_of_exact": rates[1] / rates[0],
            f"times_{times}_clip_score_mean_difference": float(np.abs(scores[0] - scores[1]).mean()),
            f"times_{times}_clip_score_largest_difference": float(np.abs(scores[0] - scores[1]).max()),
            f"times_{times}_clip_score_spread": float(scores[0].std()),
            f"times_{times}_top_30_percent_changed": 1 - len(top[0] & top[1]) / kept,
        }
    return figures


def _enlarged(data: bytes, times: int) -> bytes:
    if times == 1:
        return data
    image = Image.open(io.BytesIO(data)).convert("RGB")
    out = io.BytesIO()
    image.resize((image.width * times, image.height * times), Image.Resampling.LANCZOS).save(out, "JPEG", quality=90)
    return out.getvalue()


def _write(path: Path, pictures: list[bytes], captions: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            for suffix, data in (("jpg", picture), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
