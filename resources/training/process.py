"""One training run: `python -m resources.training.process <run folder>` runs open_clip_train on an arm's samples.

open_clip_train builds the model, trains, and writes a checkpoint after each part of the budget. Two of its functions
are replaced: `get_data`, so that samples come from an evaluation's arrays or straight from the pool; and `evaluate`, so
that the evaluation's own tasks are measured at each checkpoint. A killed run resumes from its last checkpoint.

The folder has `run.json`, the fields of `Run`. The process writes `position`, the samples seen so far, `curve.jsonl`, a
line for each checkpoint, and `done.json` at the end. It ends when its standard input closes, so it never outlives the
process that started it.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resources.training.measures import Task, measure
from resources.training.order import training_order

SMALL_TOWERS = Path(__file__).with_name("small_towers.json")
_WARM_UP, _MOST_WARM_UP = 0.1, 500


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        work: the evaluation's work folder, with the arrays that all runs share.
        model: open_clip's name of the model; `small_towers` for the project's own.
        image_size: pixels of a side.
        seed: of initial weights and of the order of samples.
        points: checkpoints.
        steps: optimizer steps, a multiple of `points`.
        batch_size: samples per step.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        warmup: steps; None for a tenth, at most 500.
        precision: open_clip_train's.
        device: cpu or cuda.
        threads: of torch on the CPU, and decoding processes where the pictures are not in an array.
        templates: captions of a class.
        tasks: their names.
        pool: settings of the pool, where the pictures are not in an array.
    """

    work: str
    model: str
    image_size: int
    seed: int
    points: int
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: int | None
    precision: str
    device: str
    threads: int
    templates: list[str]
    tasks: list[str]
    pool: dict[str, Any] | None = None

    def write(self, folder: Path, samples: np.ndarray) -> None:
        """Write the run and its samples, int64 [n] rows of the shared arrays, into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "samples.npy", samples)
        (folder / "run.json").write_text(json.dumps(asdict(self), indent=1))

    @property
    def arguments(self) -> list[str]:
        """The arguments of open_clip_train, without its folder."""
        warmup = min(_MOST_WARM_UP, int(self.steps * _WARM_UP)) if self.warmup is None else self.warmup
        given = {
            "model": self.model,
            "train-data": "the pool",
            "dataset-type": "webdataset",
            "epochs": self.points,
            "batch-size": self.batch_size,
            "lr": self.learning_rate,
            "wd": self.weight_decay,
            "warmup": warmup,
            "seed": self.seed,
            "precision": self.precision,
            "device": self.device,
            "force-image-size": self.image_size,
            "workers": 0,
            "save-frequency": 0,
            "log-every-n-steps": 50,
            "resume": "latest",
        }
        return [*(f"--{name}={value}" for name, value in given.items()), "--save-most-recent"]


def load_run(folder: Path) -> Run:
    """Read a run from its folder."""
    return Run(**json.loads((folder / "run.json").read_text()))


class Batches:
    """The batches of a part of a run, each the rows of its samples; torch's DataLoader takes it as its sampler."""

    def __init__(self, run: Run, samples: np.ndarray) -> None:
        self.run, self.samples, self.part = run, samples, 0

    def __len__(self) -> int:
        return self.run.steps // self.run.points

    def __iter__(self) -> Iterator[np.ndarray]:
        size = self.run.batch_size
        for step in range(self.part * len(self), (self.part + 1) * len(self)):
            order = training_order(len(self.samples), step * size, (step + 1) * size, seed=self.run.seed)
            yield self.samples[order]


class Samples:
    """Pictures and captions by row: from the shared arrays, or from the pool. torch's DataLoader takes it as a dataset.

    Args:
        run: the run.
        preprocess: open_clip's transform of a picture; its last part normalises.
        tokenizer: the model's.
    """

    def __init__(self, run: Run, preprocess: Any, tokenizer: Any) -> None:
        import pyarrow.parquet as pq

        self.run, self.preprocess, self.tokenizer = run, preprocess, tokenizer
        self.rows = pq.read_table(f"{run.work}/samples.parquet")
        self.pictures = np.load(f"{run.work}/pictures.npy", mmap_mode="r") if run.pool is None else None
        self._pool: Any = None

    def __getitem__(self, rows: np.ndarray) -> Any:
        import torch

        tokens = self.tokenizer(self.rows["caption"].take(rows).to_pylist())
        if self.pictures is not None:
            pixels = torch.from_numpy(self.pictures[rows]).float() / 255
            return self.preprocess.transforms[-1](pixels), tokens
        return torch.stack([self.preprocess(image) for image in self._from_pool(rows)]), tokens

    def _from_pool(self, rows: np.ndarray) -> Iterator[Any]:

        from resources.pools.base import IMAGE_COLUMNS
        from resources.pools.formats import open_pool
        from resources.settings import PoolSettings
        from resources.storage.images import picture

        if self._pool is None:
            self._pool = open_pool(PoolSettings.model_validate(self.run.pool), {})
        batch = self.rows.take(rows)
        shards = np.array(batch["shard"].to_pylist())
        blobs: list[Any] = [None] * len(rows)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            found = self._pool.read_images(str(shard), batch.take(places).select(IMAGE_COLUMNS))
            for place, blob in zip(places.tolist(), found, strict=True):
                blobs[place] = blob
        for blob in blobs:
            if isinstance(blob, Exception):
                raise blob
            yield picture(blob)


class Loader:
    """The batches as open_clip_train takes them, and the count of those it has taken."""

    def __init__(self, run: Run, batches: Batches, samples: Samples, position: Path) -> None:
        import torch.utils.data

        self.run, self.batches, self.position = run, batches, position
        self.num_batches = len(batches)
        self.num_samples = len(batches) * run.batch_size
        options: dict[str, Any] = {}
        if run.pool is not None:  # a forked process would hang in the threads of a library that this one has used
            options = {
                "num_workers": run.threads,
                "multiprocessing_context": "forkserver",
                "persistent_workers": True,
            }
        self._loader: Any = torch.utils.data.DataLoader(
            samples,  # type: ignore[arg-type]
            batch_size=None,
            sampler=batches,
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        before = self.batches.part * self.num_samples
        for number, batch in enumerate(self._loader, start=1):
            yield batch
            self.position.write_text(str(before + number * self.run.batch_size))


class Data:
    """What open_clip_train keeps of a dataset."""

    def __init__(self, loader: Loader) -> None:
        self.dataloader = loader

    def set_epoch(self, epoch: int) -> None:
        """Choose the part of the run that the next iteration yields."""
        self.dataloader.batches.part = epoch


def train(folder: Path) -> None:
    """Train and measure a run with open_clip_train, or resume it from its last checkpoint."""
    import open_clip
    import open_clip_train.main as open_clip_main
    import torch

    run = load_run(folder)
    torch.set_num_threads(run.threads)
    started = time.monotonic()
    if run.model == SMALL_TOWERS.stem:
        open_clip.add_model_config(SMALL_TOWERS)
    rows = np.load(folder / "samples.npy")

    def get_data(args: Any, preprocess: Any, epoch: int = 0, tokenizer: Any = None) -> dict[str, Any]:
        del args, epoch
        samples = Samples(run, preprocess[1], tokenizer)
        return {"train": Data(Loader(run, Batches(run, rows), samples, folder / "position")), "val": preprocess[1]}

    def evaluate(model: Any, data: Any, epoch: int, args: Any, tb_writer: Any = None, tokenizer: Any = None) -> None:
        del args, tb_writer
        model.eval()
        device = next(model.parameters()).device
        tasks = [_task(run, name, model, data["val"], device) for name in run.tasks]
        found = measure(model, tokenizer, tasks, run.templates, device)
        seen = epoch * run.steps // run.points * run.batch_size
        with open(folder / "curve.jsonl", "a", encoding="utf-8") as curve:
            curve.write(json.dumps({"seen": seen, "measures": found}) + "\n")

    open_clip_main.get_data, open_clip_main.evaluate = get_data, evaluate
    if open_clip_main.main([*run.arguments, f"--logs={folder}", "--name=open_clip_train"]) == -1:
        raise SystemExit(f"{folder}: open_clip_train did not start; its message is above")
    (folder / "done.json").write_text(json.dumps({"seconds": time.monotonic() - started}))
    shutil.rmtree(folder / "open_clip_train" / "checkpoints")


def _task(run: Run, name: str, model: Any, preprocess: Any, device: Any) -> Task:
    import torch

    pictures = np.load(f"{run.work}/tasks/{name}.npy", mmap_mode="r")

    def features() -> Any:
        parts = []
        for start in range(0, len(pictures), 256):
            pixels = torch.from_numpy(pictures[start : start + 256].astype(np.float32) / 255).to(device)
            parts.append(model.encode_image(preprocess.transforms[-1](pixels), normalize=True))
        return torch.cat(parts)

    return Task(name, json.loads(Path(f"{run.work}/tasks/{name}.json").read_text()), features)


def _end_with_parent() -> None:
    """End this process when the one that started it ends, even if that one is killed."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    train(Path(sys.argv[1]))
