"""The arms of an evaluation: their samples, and the rows of the pool that all arms share.

Here: which rows, from the versions of subsets and from the pool; the removal of evaluation images. Not here: decoding
and training (`resources.training`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from assets.base.context import Context
from core.uids import UID_DTYPE
from resources.lake.versions import Version, Versions
from resources.pools.base import IMAGE_COLUMNS
from resources.training.decoded import EvaluationError, TaskImages
from resources.training.settings import POOL, RANDOM, EvaluationSettings
from selection.evaluation.draws import hash_order

_UID = ["f0", "f1"]
OWN_SIZE = " (own size)"
"""Follows the name of an arm of `how_much` whose size differs from that of the arm of the same recipe."""


@dataclass(frozen=True)
class Arm:
    """An arm before evaluation images are removed.

    Attributes:
        name: as reports show it.
        recipe: its recipe; None for `random` and `pool`.
        version: the version of the subset.
        equal: whether it is cut to the size of the other such arms.
        orders: for each seed, the uids of its samples in the order in which they are drawn, [n] of UID_DTYPE.
    """

    name: str
    recipe: str | None
    version: str | None
    equal: bool
    orders: Sequence[np.ndarray]


@dataclass(frozen=True)
class Samples:
    """The samples of all arms.

    Attributes:
        rows: the pool's rows that an arm has, each once; the rows of a shard are neighbours.
        arms: the arms.
        removed: rows that are evaluation images, bool [n].
        found: number of evaluation images that an arm had, by task.
        by_arm: for each arm and seed, the rows of its samples, int64.
    """

    rows: pl.DataFrame
    arms: Sequence[Arm]
    removed: np.ndarray
    found: Mapping[str, int]
    by_arm: Mapping[str, Sequence[np.ndarray]]


def find_arms(context: Context, settings: EvaluationSettings, shards: Sequence[str]) -> list[Arm]:
    """Return the arms with the samples that they draw.

    Args:
        context: the project.
        settings: the evaluation's.
        shards: those of the pool.
    """
    seeds = range(settings.train.seeds)
    versions = {recipe: _newest(context, recipe) for recipe in settings.recipes}
    listed = {recipe: _uids(context, version) for recipe, version in versions.items()}
    compared = [arm for arm in settings.arms if arm in versions]
    size = settings.size if isinstance(settings.size, int) else min(len(listed[recipe]) for recipe in compared)
    pool = _pool_uids(context, shards) if {RANDOM, POOL} & set(settings.arms) else np.empty(0, UID_DTYPE)
    found = []
    for name in settings.arms:
        uids = pool if name in (RANDOM, POOL) else listed[name]
        equal = name == RANDOM or (name != POOL and settings.size != "own")
        if equal and len(uids) < size:
            raise EvaluationError(
                f"arm {name} has {len(uids)} samples, and size asks for {size}. Remedy: a smaller size"
            )
        orders = [_drawn(uids, seed)[: size if equal else None] for seed in seeds]
        found.append(Arm(name, *_origin(name, versions), equal, orders))
    for name in settings.how_much.arms if settings.how_much is not None else ():
        same = next((arm for arm in found if arm.name == name and len(arm.orders[0]) == len(listed[name])), None)
        if same is None:
            taken = name in settings.arms
            orders = [_drawn(listed[name], seed) for seed in seeds]
            found.append(Arm(name + OWN_SIZE * taken, *_origin(name, versions), False, orders))
    return found


def _origin(name: str, versions: Mapping[str, Version]) -> tuple[str | None, str | None]:
    return (name, versions[name].name) if name in versions else (None, None)


def _newest(context: Context, recipe: str) -> Version:
    version = Versions(context.lake, recipe).current()
    if version is None:
        raise EvaluationError(f"subset/{recipe} has no version yet. Remedy: clip-select run")
    return version


def _uids(context: Context, version: Version) -> np.ndarray:
    """Read the uids of a version's samples, [n] of UID_DTYPE, each as often as it was drawn."""
    path = Versions(context.lake, version.recipe).verified_path(version, "subset.npy")
    found: np.ndarray = np.load(path, allow_pickle=False)
    if not len(found):
        raise EvaluationError(f"subset/{version.recipe} {version.name} is empty. Remedy: another arm")
    return found


def _pool_uids(context: Context, shards: Sequence[str]) -> np.ndarray:
    tables = [context.lake.read("raw_pool", shard, _UID) for shard in shards]
    parts = []
    for table in tables:
        uids = np.empty(table.num_rows, UID_DTYPE)
        uids["f0"], uids["f1"] = table["f0"].to_numpy(), table["f1"].to_numpy()
        parts.append(uids)
    return np.unique(np.concatenate(parts))


def _drawn(uids: np.ndarray, seed: int) -> np.ndarray:
    """Return the uids of samples in the order in which a seed draws them."""
    each, copies = np.unique(uids, return_counts=True)
    return each[hash_order(each["f0"].copy(), each["f1"].copy(), copies, seed=seed)]


def needed_rows(context: Context, arms: Iterable[Arm], shards: Sequence[str]) -> pl.DataFrame:
    """Read the pool's rows that an arm has, each once: uid words, caption, digest, place of the image, and `place`.

    `place` is the row's number in its shard, which is that of its embeddings.
    """
    wanted = np.unique(np.concatenate([order for arm in arms for order in arm.orders]))
    uids = pl.DataFrame({"f0": wanted["f0"].copy(), "f1": wanted["f1"].copy()})
    columns = [*_UID, "shard", "caption", "sha256", *IMAGE_COLUMNS]
    parts = []
    for shard in shards:
        rows = pl.DataFrame(context.lake.read("raw_pool", shard, columns)).with_row_index("place")
        parts.append(rows.join(uids, on=_UID, how="semi", maintain_order="left"))
    found = pl.concat(parts).unique(_UID, keep="first", maintain_order=True)
    if len(found) < len(uids):
        raise EvaluationError(
            f"{len(uids) - len(found)} samples of the arms are not in the pool any more, or not embedded. Remedy: "
            "clip-select run"
        )
    return found


def without_evaluation_images(
    arms: Sequence[Arm],
    rows: pl.DataFrame,
    pictures: np.ndarray,
    tasks: Mapping[str, TaskImages],
    task_pictures: Mapping[str, np.ndarray],
    near: float,
) -> Samples:
    """Remove evaluation images from every arm, and cut the arms that are compared to one size.

    Args:
        arms: the arms.
        rows: the rows that they share.
        pictures: float16 [n, d], unit norm or zero: the rows as they are compared.
        tasks: the evaluation's images.
        task_pictures: the same as `pictures` of each task's images.
        near: similarity from which two are near duplicates.
    """
    import torch

    from selection.scores.norm_sim import nearest_target

    removed, found = np.zeros(len(rows), bool), {}
    of_rows, known = torch.from_numpy(pictures), set(rows["sha256"].drop_nulls())
    for name, task in tasks.items():
        of_task = torch.from_numpy(task_pictures[name])
        removed |= rows["sha256"].is_in(list(set(task.digests))).fill_null(False).to_numpy()
        removed |= nearest_target(of_rows, of_task)[0].numpy() >= near
        alike = nearest_target(of_task, of_rows)[0].numpy() >= near
        found[name] = int((alike | np.array([digest in known for digest in task.digests])).sum())
    return Samples(rows, arms, removed, found, _cut(arms, rows, removed))


def _cut(arms: Sequence[Arm], rows: pl.DataFrame, removed: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Return the rows of each arm's samples, without the removed ones and cut to one size."""
    uids = np.empty(len(rows), UID_DTYPE)
    uids["f0"], uids["f1"] = rows["f0"], rows["f1"]
    order = np.argsort(uids)
    by_arm = {}
    for arm in arms:
        found = [order[np.searchsorted(uids, drawn, sorter=order)] for drawn in arm.orders]
        by_arm[arm.name] = [samples[~removed[samples]] for samples in found]
    size = (
        min(len(samples) for arm in arms if arm.equal for samples in by_arm[arm.name])
        if any(arm.equal for arm in arms)
        else None
    )
    for arm in arms:
        if arm.equal:
            by_arm[arm.name] = [samples[:size] for samples in by_arm[arm.name]]
        if any(not len(samples) for samples in by_arm[arm.name]):
            raise EvaluationError(
                f"arm {arm.name} has no sample that is not an evaluation image. Remedy: other tasks, or a higher "
                "near_duplicate"
            )
    return by_arm
