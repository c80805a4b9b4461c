"""Rows, bytes, operations and time of the work on each asset, and of the whole on each engine.

A time is `fixed + rows x seconds per row`, from Dagster's records of this deployment or else from a calibration. A rate
that was measured at other sizes (negatives, targets) is scaled by the operations that the asset declares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from assets.base.asset import Amount
from assets.base.context import Snapshot
from assets.base.partitioned import PartitionedAsset
from assets.base.unpartitioned import UnpartitionedAsset
from assets.graph import Graph
from assets.subsets.subset import SubsetAsset
from dagster_project.plan.calibration import RUN_SECONDS, Calibrated
from dagster_project.plan.recorded import Deployment, Rate
from dagster_project.plan.sizes import FileSize, PoolSize
from dagster_project.plan.work import Work
from resources.lake.versions import Versions
from resources.models.operations import ModelSize
from resources.settings import recipe_of
from selection.recipes.model import POOL
from selection.recipes.recipe import Recipe

if TYPE_CHECKING:
    from assets.graph import Node

SELECTING = Rate(1.0, 4e-7, "arithmetic", 0, "1 s and 0.4 s for each million rows")
"""Selecting a subset with its report: `docs/performance.md` has 10 M rows in 3.9 s."""
CATALOG = Rate(0.4, 0.0, "arithmetic", 0, "0.4 s")
NO_ROWS = "the number of rows is not known"


@dataclass(frozen=True)
class Estimate:
    """The work on an asset, with its cost.

    Attributes:
        work: what is due, and why.
        rows: rows to be computed; None where they are not known.
        bytes_read: bytes that are read from pool and lake; None where they are not known.
        bytes_written: bytes of the new files.
        operations: floating-point operations; None where the asset declares none.
        seconds: time on the planned engine; None where nothing has been measured.
        basis: where the time is from: recorded, calibrated, arithmetic, or the reason why there is none.
        rate: what the time follows from.
    """

    work: Work
    rows: int | None = None
    bytes_read: float | None = None
    bytes_written: float | None = None
    operations: float | None = None
    seconds: float | None = None
    basis: str = ""
    rate: Rate | None = None


@dataclass(frozen=True)
class Sources:
    """All that an estimate follows from.

    Attributes:
        snapshot: the project's inputs.
        graph: its assets.
        work: what is due.
        pool: the pool's size.
        files: the size of the lake's files, by asset.
        models: the size of each encoder's model, where it is known.
        recorded: the recorded rates, by asset and deployment.
        calibrated: what was measured now; None if nothing was.
        deployment: the planned engine.
    """

    snapshot: Snapshot
    graph: Graph
    work: Sequence[Work]
    pool: PoolSize
    files: Mapping[str, FileSize]
    models: Mapping[str, ModelSize]
    recorded: Mapping[str, Mapping[Deployment, Rate]]
    deployment: Deployment
    calibrated: Calibrated | None = None


def usable(
    work: Sequence[Work], recorded: Mapping[str, Mapping[Deployment, Rate]]
) -> dict[str, dict[Deployment, Rate]]:
    """Return the recorded rates without those of assets whose settings or code changed since.

    A score's rate is not usable either if an unpartitioned asset that it reads, such as the negatives, has changed.
    """
    changed = {each.asset for each in work if each.changed}
    ahead = {each.asset for each in work if each.changed and isinstance(each.node, UnpartitionedAsset)}
    found = {}
    for each in work:
        deps = set() if each.node is None or isinstance(each.node, SubsetAsset) else {*each.node.deps}
        is_known = each.asset not in changed and not deps & ahead
        found[each.asset] = dict(recorded.get(each.asset, {})) if is_known else {}
    return found


def estimates(sources: Sources) -> list[Estimate]:
    """Return the estimate of each asset, in the order of the work."""
    return [_estimate(sources, work) for work in sources.work]


def seconds_by_deployment(sources: Sources) -> dict[Deployment, float]:
    """Return the time of all that is due on each engine for which every rate is known."""
    found = {}
    due = [work for work in sources.work if work.due]
    known = {deployment for work in due if work.shards for deployment in sources.recorded.get(work.asset, {})}
    for deployment in sorted({sources.deployment, *known}):
        seconds = [_estimate(replace(sources, deployment=deployment), work).seconds for work in due]
        if all(each is not None for each in seconds):
            found[deployment] = sum(each for each in seconds if each is not None)
    return found


def _estimate(sources: Sources, work: Work) -> Estimate:
    if not work.due:
        return Estimate(work)
    node = work.node
    if node is None:
        return Estimate(work, None, None, None, None, *_selecting(sources, work, 0))
    if isinstance(node, SubsetAsset):
        rows = sources.pool.total
        return Estimate(work, rows, None, None, None, *_selecting(sources, work, rows))
    rows = _rows_of_shards(sources, node, work.shards) if work.shards else _rows_of_one(sources, node)
    amount = None if rows is None else _amount(sources, node, rows)
    operations = None if amount is None else _operations(node, amount)
    cost = _of_shards(sources, node, amount) if work.shards else _of_one(sources, node, amount)
    written = _rows_written(sources, node, rows)
    return Estimate(
        work,
        rows,
        _bytes_read(sources, work, rows),
        None if written is None else written * _bytes_per_row(sources, node.key),
        operations,
        *cost,
    )


Cost = tuple[float | None, str, Rate | None]
"""Seconds, their basis, and the rate."""


def _selecting(sources: Sources, work: Work, rows: int | None) -> Cost:
    """Return the cost of a subset or the catalog: of the last run, and of the rows that have come since."""
    recorded = sources.recorded.get(work.asset, {})
    rate = _any(sources, recorded) if recorded else SELECTING if work.node is not None else CATALOG
    if rows is None:
        return None, NO_ROWS, rate
    more = max(0, rows - rate.rows) if work.node is not None else 0
    return rate.fixed + SELECTING.per_row * more, rate.basis, rate


def _of_shards(sources: Sources, node: "Node", amount: Amount | None) -> Cost:
    if amount is None:
        return None, NO_ROWS, None
    recorded = sources.recorded.get(node.key, {}).get(sources.deployment)
    if recorded is not None:
        return recorded.fixed + recorded.per_row * amount.rows, "recorded", recorded
    rate = None if sources.calibrated is None else sources.calibrated.rates.get(node.key)
    if rate is None or sources.calibrated is None:
        return None, _why_not(sources, node), None
    then = replace(amount, pool=sources.calibrated.rows, inputs=_by_kind(sources.calibrated.inputs, node))
    rate = replace(rate, per_row=rate.per_row * _ratio(node, amount, then, 1.0))
    return rate.fixed + rate.per_row * amount.rows, "calibrated", rate


def _of_one(sources: Sources, node: "Node", amount: Amount | None) -> Cost:
    """Return the cost of an asset without shards: a run, scaled by its rows or operations."""
    if amount is None:
        return None, NO_ROWS, None
    recorded = sources.recorded.get(node.key, {})
    if recorded:
        last = _any(sources, recorded)
        then = replace(amount, rows=round(amount.rows * _share_then(sources, node)))
        return last.fixed * _ratio(node, amount, then, amount.rows / max(then.rows, 1)), "recorded", last
    found = sources.calibrated
    if node.key.startswith("target_embeddings/") and amount.image:
        embedding = sources.graph.by_key(f"embeddings/{node.declared.names['encoder']}")
        _, basis, rate = _of_shards(sources, embedding, amount)
        if rate is None:
            return None, basis, None
        part = amount.image / (amount.image + (amount.text or 0))
        loaded = sources.deployment == Deployment()  # by the embeddings, in the same process
        return (RUN_SECONDS if loaded else rate.fixed) + rate.per_row * part * amount.rows, basis, rate
    rate = None if found is None else found.rates.get(node.key)
    if found is None or rate is None:
        return None, _why_not(sources, node), None
    then = replace(amount, rows=found.rows, pool=found.rows, inputs=_by_kind(found.inputs, node))
    seconds = rate.per_row * found.rows * _ratio(node, amount, then, amount.rows / max(found.rows, 1))
    return rate.fixed + seconds, "calibrated", rate


def _any(sources: Sources, recorded: Mapping[Deployment, Rate]) -> Rate:
    """Return the rate of an asset without shards: recorded with the planned engine, else with any."""
    return recorded.get(sources.deployment) or next(iter(recorded.values()))


def _why_not(sources: Sources, node: "Node") -> str:
    failed = {} if sources.calibrated is None else sources.calibrated.failed
    return failed.get(node.key, "not measured on this engine yet")


def _ratio(node: "Node", now: Amount, then: Amount, otherwise: float) -> float:
    """Return the operations now as a multiple of those then, rows being equal for assets with shards."""
    ours, theirs = _operations(node, now), _operations(node, then)
    return ours / theirs if ours and theirs else otherwise


def _share_then(sources: Sources, node: "Node") -> float:
    """Return the part of the pool's shards that an asset's stored file was computed from; 1 where it read none."""
    stored = sources.snapshot.context.lake.stored(node.key)
    then = 0 if stored is None else sum(shard in stored.provenance.inputs for shard in sources.pool.bytes)
    return then / len(sources.pool.bytes) if then else 1.0


def _operations(node: "Node", amount: Amount) -> float | None:
    operations = node.declared.template.operations
    return None if operations is None or not amount.dimensions else operations(node.declared, amount)


def _amount(sources: Sources, node: "Node", rows: int) -> Amount:
    model = sources.models.get(node.declared.names.get("encoder", ""), ModelSize(0))
    inputs = {}
    for dep in node.deps:
        upstream = sources.graph.by_key(dep)
        if isinstance(upstream, UnpartitionedAsset):
            read = _rows_written(sources, upstream, _rows_of_one(sources, upstream))
            if read is not None:
                inputs[dep] = read
    pool = sources.pool.total or rows
    return Amount(rows, pool, _by_kind(inputs, node), model.dimensions, model.image, model.text)


def _by_kind(inputs: Mapping[str, int], node: "Node") -> dict[str, int]:
    """Return the rows of the inputs of an asset by the first part of their key."""
    return {key.partition("/")[0]: rows for key, rows in inputs.items() if key in node.deps}


def _rows_of_shards(sources: Sources, node: "Node", shards: Sequence[str]) -> int | None:
    """Return the rows to compute in shards; of an encoder with `of`, their part of the rows that its subset keeps."""
    rows, total = sources.pool.rows_of(shards), sources.pool.total
    recipe = recipe_of(node.declared.of)
    if rows is None or not total or recipe is None or not node.key.startswith("embeddings/"):
        return rows
    context = sources.snapshot.context
    version = Versions(context.lake, recipe).current()
    kept = _asked(context.settings.recipes[recipe], total) if version is None else int(version.lineage["rows"])
    return round(rows * min(1.0, kept / total))


def _asked(recipe: Recipe, total: int) -> int:
    """Return the rows that a recipe keeps at most, from its last step over `total` rows."""
    top = recipe.steps[-1].keep_top if recipe.steps and recipe.source == POOL else None
    wanted = None if top is None else top.wanted(total)
    return total if wanted is None else wanted


def _rows_of_one(sources: Sources, node: "Node") -> int | None:
    """Return the rows that an asset without shards computes or reads: target images, or the pool."""
    if not node.key.startswith("target_embeddings/"):
        return sources.pool.total
    names = node.declared.names
    count = sources.snapshot.context.target(names["target"]).count(names["encoder"])
    stored = sources.snapshot.context.lake.stored(node.key)
    return stored.rows if count is None and stored is not None else count


def _rows_written(sources: Sources, node: "Node", rows: int | None) -> int | None:
    if isinstance(node, PartitionedAsset) or node.key.startswith("target_embeddings/"):
        return rows
    stored = sources.snapshot.context.lake.stored(node.key)
    if stored is not None:
        return stored.rows
    return None if sources.calibrated is None else sources.calibrated.inputs.get(node.key)


def _bytes_per_row(sources: Sources, key: str) -> float:
    size = sources.files[key]
    if size.by_shard or sources.calibrated is None:
        return size.per_row
    return sources.calibrated.bytes_per_row.get(key, size.per_row)


def _bytes_read(sources: Sources, work: Work, rows: int | None) -> float | None:
    """Return the bytes of the inputs: each dep's files of the shards, or its whole file, and the pool's."""
    node, total = work.node, 0.0
    if rows is None or node is None or isinstance(node, SubsetAsset):
        return None
    shards = work.shards or list(sources.pool.bytes)
    if node.declared.template.reads_pool:
        total += sum(sources.pool.bytes[shard] for shard in shards)
    for dep in node.deps:
        upstream = sources.graph.by_key(dep)
        if isinstance(upstream, PartitionedAsset):
            total += (sources.pool.rows_of(shards) or 0) * _bytes_per_row(sources, dep)
        elif isinstance(upstream, UnpartitionedAsset):
            read = _rows_written(sources, upstream, _rows_of_one(sources, upstream))
            total += (read or 0) * _bytes_per_row(sources, dep)
    return total
