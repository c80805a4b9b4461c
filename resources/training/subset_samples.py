"""The samples of a subset, read from the pool where they lie: a source for webdataset pipelines, without an export.

`dagster_project.notebook.Project.training_samples` opens it, and `docs/evaluation.md` shows a pipeline. Here: which
samples, in which order, for which worker. Not here: decoding and batching, which are webdataset's or torch's.

Polars stops forever in a forked process, and a DataLoader forks its workers by default, so nothing here uses it.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import IterableDataset, get_worker_info

from core.uids import UID_DTYPE
from resources.lake.files import Lake
from resources.lake.versions import Version, Versions
from resources.pools.base import IMAGE_COLUMNS, Pool, PoolError

_TOGETHER = 256
"""Images that are read together."""
_SUFFIXES = {"JPEG": "jpg"}


class SubsetSamples(IterableDataset[dict[str, Any]]):
    """A subset's samples as webdataset has them: `__key__`, `__url__`, the image under its suffix, `txt` and `json`.

    A sample that the subset has several times comes that often in an epoch. Shards are divided among the processes of
    a distributed run (RANK and WORLD_SIZE) and among the workers of a DataLoader; each shard is read by one of them.

    Args:
        pool: reads the images.
        lake: has `raw_pool`, with the captions.
        version: the subset's version.
        seed: of the order.
        shuffle: whether shards, and the samples of a shard, come in another order in every epoch. Samples of several
            shards are mixed by the pipeline, with webdataset's `shuffle`.
    """

    def __init__(self, pool: Pool, lake: Lake, version: Version, *, seed: int = 0, shuffle: bool = True) -> None:
        versions = Versions(lake, version.recipe)
        rows = versions.read_uids(version, columns=("f0", "f1", "shard"))
        self.uids = np.load(versions.verified_path(version, "subset.npy"), allow_pickle=False)
        self.pool, self.lake, self.version, self.seed, self.shuffle = pool, lake, version, seed, shuffle
        self.epoch = 0
        shard, uids = rows["shard"].combine_chunks().dictionary_encode(), _uids(rows)
        names, codes = shard.dictionary.to_pylist(), shard.indices.to_numpy()
        self.selected = {name: uids[codes == code] for code, name in enumerate(names)}
        self.shards = sorted(names)

    def __len__(self) -> int:
        """Return the samples of an epoch, over all processes and workers."""
        return len(self.uids)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; each process and worker must choose the same epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        order = self._order([self.seed, self.epoch], len(self.shards))
        for place in order[rank * workers + number :: processes * workers]:
            yield from self._shard(self.shards[place], int(place))

    def _order(self, seed: list[int], n: int) -> np.ndarray:
        return np.random.default_rng(seed).permutation(n) if self.shuffle else np.arange(n)

    def _shard(self, shard: str, place: int) -> Iterator[dict[str, Any]]:
        """Yield the samples of one shard.

        Raises:
            PoolError: the shard is not as it was when the subset was selected.
        """
        stored = self.lake.stored("raw_pool", shard)
        if stored is None or stored.fingerprint != self.version.lineage["shards"][shard]["raw_pool"]:
            raise self._changed(shard, "raw_pool has changed")
        columns = ["f0", "f1", "uid", "caption", "url", "image_format", "sha256", *IMAGE_COLUMNS]
        rows = self.lake.read("raw_pool", shard, columns)
        each = np.repeat(np.arange(rows.num_rows), self._times(shard, _uids(rows)))
        each = each[self._order([self.seed, self.epoch, place], len(each))]
        for start in range(0, len(each), _TOGETHER):
            part = rows.take(each[start : start + _TOGETHER])
            blobs = self.pool.read_images(shard, part.select(IMAGE_COLUMNS))
            for row, blob in zip(part.to_pylist(), blobs, strict=True):
                if isinstance(blob, PoolError):
                    raise self._changed(shard, str(blob)) from blob
                if row["sha256"] not in (None, hashlib.sha256(blob).hexdigest()):
                    raise self._changed(shard, f"the image of key {row['key']} has changed")
                suffix = _SUFFIXES.get(row["image_format"], row["image_format"].lower())
                yield {
                    "__key__": row["key"],
                    "__url__": f"{self.pool.settings.path}/{shard}",
                    suffix: blob,
                    "txt": row["caption"].encode(),
                    "json": json.dumps({"uid": row["uid"], "url": row["url"]}).encode(),
                }

    def _times(self, shard: str, uids: np.ndarray) -> np.ndarray:
        """Return how often the subset has each row of a shard; another shard may have a row with the same uid."""
        times = np.searchsorted(self.uids, uids, side="right") - np.searchsorted(self.uids, uids, side="left")
        return np.where(np.isin(uids, self.selected[shard]), times, 0)

    def _changed(self, shard: str, why: str) -> PoolError:
        of = f"subset/{self.version.recipe} {self.version.name}"
        return PoolError(f"shard {shard}: {why} since {of} was selected. Remedy: clip-select run selects a new version")


def _uids(rows: pa.Table) -> np.ndarray:
    """Return the uids of rows, [n] of UID_DTYPE."""
    uids = np.empty(rows.num_rows, UID_DTYPE)
    uids["f0"], uids["f1"] = rows["f0"].to_numpy(), rows["f1"].to_numpy()
    return uids
