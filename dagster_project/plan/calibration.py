"""Rates measured now: assets compute a part of real shards into a temporary lake, for about ten seconds in all.

Embeddings and captions are computed from the pool's images. Scores read random unit vectors in place of embeddings and
targets, which take the same time. Loading models and starting workers is measured too, and does not count towards the
ten seconds.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from assets.base.asset import Step
from assets.base.context import Context, RunState, Snapshot
from assets.base.engines import Engine
from assets.base.partitioned import PartitionedAsset, PartitionedTemplate
from assets.base.unpartitioned import UnpartitionedAsset
from assets.graph import build_graph
from assets.settings import open_context
from dagster_project.plan.recorded import Rate, fitted
from resources.lake.files import Provenance, Stored, vectors_to_column
from resources.pools.base import PoolError

SECONDS = 10.0
"""Time to compute in, without loading models."""
RUN_SECONDS, SHARD_SECONDS = 0.1, 0.014
"""Dagster's own time for a run, and for the events of a shard: `docs/performance.md`, Framework."""
POOL_SECONDS = 4.0
"""Time to read shards in, in one process."""
SHARDS = 4
"""Shards that are read at least, if there are so many."""
FIRST = 32
"""Rows of each shard in the first measurement."""
ENOUGH = 16 * FIRST
"""Rows of each shard in the last measurement, at least: with fewer, what is done once for a shard hides the rate."""
TARGETS = 4096
"""Random target images that scores are measured with, at most."""


@dataclass
class Calibrated:
    """What a calibration measured.

    Attributes:
        rates: of each asset, with the temporary pool.
        rows: rows of that pool.
        shards: its shards.
        inputs: rows of its unpartitioned assets, by key.
        bytes_per_row: of the files that were written, by asset.
        dimensions: d of the encoders that embedded rows.
        failed: the reason, for each asset that could not be measured.
    """

    rates: dict[str, Rate] = field(default_factory=dict)
    rows: int = 0
    shards: list[str] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)
    bytes_per_row: dict[str, float] = field(default_factory=dict)
    dimensions: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def calibrate(
    project: Context,
    engine: Engine,
    wanted: Collection[str],
    sizes: Mapping[str, int],
    dimensions: Callable[[str], int | None],
    seconds: float = SECONDS,
) -> Calibrated:
    """Measure assets.

    Args:
        project: the project; its lake is not touched.
        engine: where shards are computed.
        wanted: keys of the assets.
        sizes: bytes of each shard's files; shards of about the median size are read.
        dimensions: returns d of an encoder.
        seconds: time to compute in.
    """
    by_size = sorted(sizes, key=lambda shard: (sizes[shard], shard))
    number = max(SHARDS, 2 * engine.workers)
    first = max(0, (len(by_size) - number) // 2)
    with tempfile.TemporaryDirectory(prefix="clip-select-plan-") as folder:
        # An encoder with `of` is measured on all rows: there is no subset yet.
        encoders = {name: model.model_copy(update={"of": None}) for name, model in project.settings.encoders.items()}
        settings = project.settings.model_copy(update={"lake": f"{folder}/lake", "encoders": encoders})
        context = open_context(settings, project.config)
        calibration = _Calibration(context, engine, by_size[first : first + number], dimensions)
        return calibration.run(wanted, seconds)


class _EnoughError(Exception):
    """A measurement has taken its time."""


class _Calibration:
    """One calibration.

    Args:
        context: the project with a temporary lake.
        engine: where shards are computed.
        shards: the shards that are read.
        dimensions: returns d of an encoder.
    """

    def __init__(
        self, context: Context, engine: Engine, shards: list[str], dimensions: Callable[[str], int | None]
    ) -> None:
        self.context, self.engine, self.shards, self.dimensions = context, engine, shards, dimensions
        self.nodes = {node.key: node for node in build_graph(context).nodes}
        self.found = Calibrated(shards=shards)
        self.pool: dict[str, pa.Table] = {}
        self.most = 0  # rows of the largest shard

    def run(self, wanted: Collection[str], seconds: float) -> Calibrated:
        """Measure assets, upstream first; others are computed as far as those need them."""
        weights = {key: 4 if self.nodes[key].declared.template.reads_pool else 1 for key in self.nodes if key in wanted}
        share = seconds / max(1, sum(weights.values()))
        needed = self._needed(wanted)
        for key, node in self.nodes.items():
            if key not in needed:
                continue
            try:
                if key == "raw_pool":
                    self._read_pool()
                elif isinstance(node, PartitionedAsset):
                    if key in wanted:
                        self.found.rates[key] = self._measured(node, share * weights[key])
                    self._all_rows(node)
                elif key.startswith("target_embeddings/"):
                    self._random_targets(node)
                else:
                    self._whole(node)
            except Exception as error:  # noqa: BLE001 - the estimate is without this asset, and shows why
                self.found.failed[key] = (str(error) or type(error).__name__).splitlines()[0]
                if key == "raw_pool":
                    self.found.failed |= dict.fromkeys(needed, self.found.failed[key])
                    break
        return self.found

    def _needed(self, wanted: Collection[str]) -> set[str]:
        found, waiting = {"raw_pool"}, [key for key in wanted if key in self.nodes]
        while waiting:
            key = waiting.pop()
            if key not in found and key in self.nodes:
                found.add(key)
                waiting.extend(self.nodes[key].deps)
        return found

    def _computed(
        self,
        node: PartitionedAsset,
        shards: Sequence[str],
        state: RunState | None = None,
    ) -> Generator[tuple[str, Stored], None, None]:
        """Compute shards as they are in the temporary lake.

        Raises:
            Exception: that of the first shard that failed, unless it is one of the pool's that can't be read.
        """
        snapshot = Snapshot(self.context, self.shards)
        wanted: dict[str | None, Provenance] = {shard: node.provenance(snapshot, shard) for shard in shards}
        step = Step(node, snapshot, wanted, state or RunState(), frozenset([node.key]))
        with contextlib.closing(self.engine.compute(node, step, shards)) as outcomes:
            for shard, outcome in outcomes:
                if not isinstance(outcome, Exception):
                    yield shard, outcome
                elif node.key != "raw_pool":
                    raise outcome

    def _timed(self, node: PartitionedAsset, shards: Sequence[str]) -> float:
        """Compute shards, and return the seconds."""
        began = time.perf_counter()
        for _ in self._computed(node, shards):
            pass
        return time.perf_counter() - began

    def _read_pool(self) -> None:
        """Read shards; in this process for a limited time, but two at least."""
        node = self.nodes["raw_pool"]
        assert isinstance(node, PartitionedAsset)
        rows, seconds, began = [], [], time.perf_counter()
        last = began
        with contextlib.closing(self._computed(node, self.shards)) as computed:
            for shard, stored in computed:
                now = time.perf_counter()
                self.pool[shard] = self.context.lake.read("raw_pool", shard)
                rows.append(stored.rows)
                seconds.append(now - last)
                last = time.perf_counter()
                if self.engine.workers == 1 and len(rows) > 1 and last - began > POOL_SECONDS:
                    break
        self.shards = self.found.shards = list(self.pool)
        if not any(rows):
            raise PoolError("no shard that was read has usable rows")
        self.most, self.found.rows = max(rows), sum(rows)
        fixed, per_row = fitted(rows, seconds, self.engine.workers)
        self.found.rates["raw_pool"] = self._rate(RUN_SECONDS + fixed, per_row, sum(rows))
        self._note_bytes(node)

    def _rate(self, fixed: float, per_row: float, rows: int) -> Rate:
        per_shard = self.found.rows / max(len(self.shards), 1)
        return Rate(fixed, per_row + SHARD_SECONDS / max(per_shard, 1), "calibrated", rows, f"{rows:,} rows")

    def _measured(self, node: PartitionedAsset, seconds: float) -> Rate:
        template = node.declared.template
        assert isinstance(template, PartitionedTemplate)
        if template.streams and self.engine.name == "in_process":
            return self._by_progress(node, seconds)
        return self._by_size(node, seconds, once=template.streams)

    def _by_progress(self, node: PartitionedAsset, seconds: float) -> Rate:
        """Measure an asset that reports its batches, from the first report for some seconds."""
        self._resize(node, self.most, random=False)
        reports: list[tuple[float, int]] = []

        def report(asset: str, shard: str, rows: int) -> None:
            del asset, shard
            reports.append((time.perf_counter(), rows))
            if len(reports) > 1 and reports[-1][0] - reports[0][0] > seconds:
                raise _EnoughError

        began = time.perf_counter()
        with contextlib.suppress(_EnoughError):
            for _ in self._computed(node, self.shards, RunState(report)):
                pass
        done = sum(rows for _, rows in reports)
        later = reports[(len(reports) - 1) // 2 :]  # decoding has run ahead of the first reports
        steady = sum(rows for _, rows in later[1:])
        per_row = (later[-1][0] - later[0][0]) / steady if steady else (time.perf_counter() - began) / max(done, 1)
        fixed = max(0.0, reports[-1][0] - began - done * per_row)
        return self._rate(RUN_SECONDS + fixed, per_row, done)

    def _by_size(self, node: PartitionedAsset, seconds: float, *, once: bool) -> Rate:
        """Measure an asset on more and more rows of the shards, for some seconds.

        Args:
            node: the asset.
            seconds: time to compute in.
            once: what does not depend on the rows is done once for all shards, not for each.
        """
        random = not node.declared.template.reads_pool
        shards = self.shards[: self.engine.workers]
        size = min(FIRST, self.most)
        first_rows = self._resize(node, size, random=random, of=shards)
        first = self._timed(node, shards)  # loads models and starts workers
        points: list[tuple[int, float]] = []
        while True:
            points.append((self._resize(node, size, random=random, of=shards), self._timed(node, shards)))
            seconds -= points[-1][1]
            if size >= self.most or (seconds <= 0 and size >= ENOUGH):
                break
            size = min(self.most, 16 * size)
        (few, quick), (many, slow) = points[0], points[-1]
        per_row = (slow - quick) / (many - few) if many > few and slow > quick else slow / max(many, 1)
        each = max(0.0, slow - per_row * many)
        fixed = max(0.0, first - per_row * first_rows)
        if not once:
            fixed, per_row = (
                max(0.0, fixed - each),
                per_row + each / max(sum(self.pool[shard].num_rows for shard in shards), 1),
            )
        return self._rate(RUN_SECONDS + fixed, per_row, many)

    def _resize(self, reader: PartitionedAsset, rows: int, *, random: bool, of: Sequence[str] | None = None) -> int:
        """Write the first rows of shards to `raw_pool`, and random embeddings for their reader; return their number."""
        shards, needed = self.shards if of is None else of, self._needed([reader.key])
        snapshot = Snapshot(self.context, self.shards)
        for shard in shards:
            table = self.pool[shard]
            provenance = self.nodes["raw_pool"].provenance(snapshot, shard)  # type: ignore[call-arg, arg-type]
            self.context.lake.write(table.slice(0, rows), provenance, content=shard)
        for key, node in self.nodes.items():
            if random and key in needed and key.startswith("embeddings/"):
                assert isinstance(node, PartitionedAsset)
                self._random_embeddings(node, shards, rows)
        return sum(min(rows, self.pool[shard].num_rows) for shard in shards)

    def _all_rows(self, node: PartitionedAsset) -> None:
        """Have an asset's file of whole shards in the lake, for the assets that read it."""
        stored = self.context.lake.stored(node.key, self.shards[0])
        if node.key.startswith("embeddings/") and stored is not None:
            self.found.dimensions[node.declared.names["encoder"]] = int(stored.summary["dimensions"])
            self._note_bytes(node)
        if not node.key.startswith("captions/"):  # which would take long
            self._resize(node, self.most, random=True)
        if not node.key.startswith(("embeddings/", "captions/")):
            self._timed(node, self.shards)
            self._note_bytes(node)

    def _random_embeddings(self, node: PartitionedAsset, shards: Sequence[str], rows: int) -> None:
        snapshot = Snapshot(self.context, self.shards)
        for number, shard in enumerate(shards):
            some = self.pool[shard].slice(0, rows)
            vectors = [self._random(node, len(some), 2 * number + side) for side in (0, 1)]
            columns = {"f0": some["f0"], "f1": some["f1"], "image": vectors[0], "text": vectors[1]}
            self.context.lake.write(pa.table(columns), node.provenance(snapshot, shard), content=shard)

    def _random(self, node: PartitionedAsset | UnpartitionedAsset, rows: int, seed: int) -> pa.FixedSizeListArray:
        """Return random unit vectors with the encoder's dimensions."""
        encoder = node.declared.names["encoder"]
        dimensions = self.found.dimensions.get(encoder) or self.dimensions(encoder)
        if dimensions is None:
            raise ValueError(f"the dimensions of encoder {encoder} are not known before it has embedded a shard")
        vectors = np.random.default_rng(seed).standard_normal((rows, dimensions), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors_to_column(vectors.astype(np.float16))

    def _random_targets(self, node: UnpartitionedAsset) -> None:
        names = node.declared.names
        rows = min(TARGETS, self.context.target(names["target"]).count(names["encoder"]) or TARGETS)
        text = pa.array([""] * rows)
        columns = {"target_index": np.arange(rows), "label": text, "name": text, "image": self._random(node, rows, 0)}
        self.context.lake.write(pa.table(columns), node.provenance(Snapshot(self.context, self.shards)))
        self.found.inputs[node.key] = rows

    def _whole(self, node: UnpartitionedAsset) -> None:
        snapshot = Snapshot(self.context, self.shards)
        wanted = node.provenance(snapshot)
        step = Step(node, snapshot, {}, RunState(), frozenset([node.key]), engine=self.engine)
        began = time.perf_counter()
        stored = node.write(snapshot, wanted, node.compute(replace(step, wanted={None: wanted})))
        seconds = time.perf_counter() - began
        rows = self.found.rows
        self.found.rates[node.key] = Rate(RUN_SECONDS, seconds / max(rows, 1), "calibrated", rows, f"{rows:,} rows")
        self.found.inputs[node.key] = stored.rows
        self._note_bytes(node, stored.rows)

    def _note_bytes(self, node: PartitionedAsset | UnpartitionedAsset, rows: int | None = None) -> None:
        lake = self.context.lake
        shards = self.shards if node.partitioned else [None]
        written = [(lake.stored(node.key, shard), lake.store.stat(lake.path(node.key, shard))) for shard in shards]
        rows = rows or sum(stored.rows for stored, _ in written if stored is not None)
        size = sum(entry.size for _, entry in written if entry is not None)
        self.found.bytes_per_row[node.key] = size / max(rows, 1)
