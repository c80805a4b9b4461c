"""Encoders fed from JPEG files: pairs per second beside the bare forward pass, and the cores that decode for them.

Runs the product's decoding processes, preprocessing, tokenizer and model (`resources.models.decoding`,
`resources.models.clip_models`) on pictures and captions made here, from one file. Tables and pools of the product need
pyarrow, and settings pydantic, so a few lines here replace them.
"""

import io
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.models import CAPTION, forward, prepared_per_second, save_model, wait
from resources.models.clip_models import ClipModel, LoadedModel
from resources.models.decoding import Prepare, RowsItem, run

SIDE = 256  # pixels: what img2dataset writes by default
QUALITY = 86  # files of about 20 kB
FILES = 512  # different pictures; they are read again and again, from the page cache
WARM_UP = 3  # passes of the bare model
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
"""A model for the smoke run."""


@dataclass(frozen=True)
class Column:
    """A column of `Rows`."""

    values: Sequence[Any]

    def to_pylist(self) -> list[Any]:
        """Return the values."""
        return list(self.values)


@dataclass(frozen=True)
class Rows:
    """The columns of a table that `Prepare` reads, in the place of pyarrow's."""

    columns: Mapping[str, Sequence[Any]]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.columns["key"])

    def __getitem__(self, name: str) -> Column:
        return Column(self.columns[name])


class Pool:
    """Pictures in one file, read row by row at their offsets, as from a tar."""

    def __init__(self, path: Path, sizes: Sequence[int]) -> None:
        self.settings = SimpleNamespace(path=str(path))
        self.sizes = list(sizes)
        self.offsets = [0, *np.cumsum(sizes).tolist()]

    def read_images(self, shard: str, rows: Rows) -> list[bytes]:
        """Return the bytes of the rows' images."""
        del shard
        with open(self.settings.path, "rb") as file:
            found = []
            for row in rows["source_row"].to_pylist():
                file.seek(self.offsets[row])
                found.append(file.read(self.sizes[row]))
        return found

    def items(self, batch: int, batches: int) -> list[RowsItem]:
        """Return work for so many batches; after the last picture the first one follows again."""
        found = []
        for number in range(batches):
            rows = [row % len(self.sizes) for row in range(number * batch, (number + 1) * batch)]
            columns = {
                "key": [f"{row:09d}" for row in rows],
                "caption": [CAPTION.format(row) for row in rows],
                "source_row": rows,
            }
            found.append(RowsItem("00000", Rows(columns), batch * batches, number == batches - 1))  # type: ignore[arg-type]
        return found


def picture(seed: int) -> bytes:
    """Return a JPEG of noise at every scale, with amplitudes that fall with the frequency, as in photographs."""
    rng = np.random.default_rng(seed)
    total = np.full((SIDE, SIDE, 3), 128, np.float32)
    for cells in (4, 8, 16, 32, 64, 128, 256):
        noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        octave = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        total += (np.asarray(octave, np.float32) - 128) * 1.4 / cells**0.5
    out = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def write_pool(path: Path, files: int) -> Pool:
    """Write pictures to a file."""
    pictures = [picture(seed) for seed in range(files)]
    path.write_bytes(b"".join(pictures))
    return Pool(path, [len(data) for data in pictures])


def encoder(
    device: torch.device, *, model: str, batch: int, batches: int, workers: int | None = None
) -> Iterator[dict[str, Any]]:
    """Embed pairs with a model of random weights.

    Args:
        device: where the model runs; on CPU in float32, else in bfloat16.
        model: open_clip's name, or "tiny".
        batch: pairs per forward pass.
        batches: timed batches.
        workers: decoding processes; by default one per core.

    Yields:
        The model and its input; the samples that one core prepares per second; pairs per second of the bare forward
        pass and of the whole way from the file; and the cores that keep the model busy.
    """
    import open_clip

    if workers is None:
        workers = len(os.sched_getaffinity(0))
    precision = "bf16" if device.type == "cuda" else "fp32"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool = write_pool(folder / "pictures", min(FILES, batch * batches))
        yield {
            "model": model,
            "weights": "random",
            "precision": precision,
            "batch": batch,
            "decoding_processes": workers,
            "pictures": "JPEG files made by the benchmark, noise at every scale; no photographs",
            "picture_side": SIDE,
            "picture_bytes": round(mean(pool.sizes)),
        }
        place = save_model(folder / "model", TINY if model == "tiny" else open_clip.get_model_config(model))
        loaded = load(place, device, precision)
        prepare = Prepare([loaded.look], [loaded.tokenizer], pool)  # type: ignore[arg-type]
        decoded, tokenised = prepared_per_second(prepare, pool.items(min(batch, 64), 4))
        yield {"prepared_per_second_per_core": decoded, "tokenised_per_second_per_core": tokenised}
        bare = forward(loaded, batch)
        alone = median([bare.seconds() for _ in range(WARM_UP + batches)][WARM_UP:])
        yield {
            "bare_forward_pairs_per_second": batch / alone,
            "cores_that_keep_the_model_busy": batch / alone / decoded,
        }
        ahead = 2 * workers + WARM_UP  # batches that may be decoded before the clock starts
        taken = stream(loaded, prepare, pool.items(batch, ahead + batches), workers, skip=ahead)
        yield {"pairs_per_second": batch / taken, "of_bare_forward": alone / taken}


def load(place: Path, device: torch.device, precision: str) -> LoadedModel:
    """Load a stored model by the product's loader, with the settings of an encoder."""
    settings = SimpleNamespace(
        model=f"local-dir:{place}",
        pretrained=None,
        precision=precision,
        decode="exact",
        channels_last=None,
        compile=False,
        device=str(device),
    )
    return ClipModel("benchmark", settings).loaded  # type: ignore[arg-type]


def stream(model: LoadedModel, prepare: Prepare, items: Sequence[RowsItem], workers: int, *, skip: int) -> float:
    """Return the seconds per batch from the file to embeddings on CPU.

    Args:
        model: the model.
        prepare: its preprocessing.
        items: the work.
        workers: decoding processes.
        skip: batches before the clock starts.
    """
    embedded = []
    with closing(run(prepare, items, workers, pin=model.device.type == "cuda")) as batches:
        for number, batch in enumerate(batches):
            if batch.error is not None:
                raise RuntimeError(batch.error)
            if number == skip:
                wait(model.device)
                started = time.perf_counter()
            embedded.append(model.encode(batch.images[0], batch.tokens[0]))
        for image, text in embedded:
            image.cpu()
            text.cpu()
        return (time.perf_counter() - started) / (len(items) - skip)
