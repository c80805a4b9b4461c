"""`captions/<captioner>`: generated captions of each image, for SIEVE (arXiv 2310.02110).

Here: which images get captions, and which captions of an earlier run are reused. Not here: how a caption is generated
(`resources.models.captioners`), and statistics of the pool's own captions (`assets.scores.caption_facts`).

No other score takes as long. So captions are kept batch by batch in `<lake>/captioning/<captioner>/<shard>/` until the
file of their shard is written: an interrupted run resumes after its last complete batch. When the set of rows to
describe changes, existing captions are reused.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from assets.base.asset import Declared, Dep, FileAsset, Step, input_fingerprint
from assets.base.columns import IDENTITY
from assets.base.context import Context, Snapshot
from assets.base.partitioned import partitioned
from assets.base.results import NotReady, Outcome, Result
from assets.base.standard_checks import rows_aligned
from assets.base.subset_rows import SubsetRows, subset_rows_input
from core.hashing import digest
from resources.lake.files import LakeError, Provenance
from resources.lake.scratch import WorkFolder
from resources.models.decoding import EncoderError
from resources.settings import CaptionerSettings

SCHEMA = pa.schema([*IDENTITY, pa.field("captions", pa.list_(pa.string()), nullable=True)])
CODE_VERSION = "1"
_PART = pa.schema([SCHEMA.field("f0"), SCHEMA.field("f1"), SCHEMA.field("captions")])


def _settings(asset: Declared) -> CaptionerSettings:
    return asset.settings.captioners[asset.names["captioner"]]


def _captioner(context: Context, asset: Declared) -> dict[str, Any]:
    return {"captioner": context.models.captioner(asset.names["captioner"]).identity()}


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    of = _settings(asset).of
    return _captioner(context, asset) | ({"of": of} if of is not None else {})


def _deps(asset: Declared) -> Sequence[str | Dep]:
    of = _settings(asset).of
    return ["raw_pool", *([Dep(of, recorded=False)] if of is not None else [])]


def _rows_to_describe(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    assert shard is not None
    of = _settings(asset.declared).of
    return {} if of is None else subset_rows_input(asset, snapshot, of, shard)


def _description(asset: Declared) -> str:
    settings, name = _settings(asset), asset.names["captioner"]
    only = f" Only rows of `{settings.of}` have them." if settings.of is not None else ""
    text = f"{settings.captions} generated captions of each image by captioner `{name}`, sampled by a seed and the uid."
    return text + only


@partitioned(
    key="captions/{captioner}",
    deps=_deps,
    columns=SCHEMA,
    checks=[rows_aligned],
    code_version=CODE_VERSION,
    group_name="sieve",
    kinds={"pytorch", "parquet"},
    pool="gpu",
    description=_description,
    parameters=_parameters,
    inputs=_rows_to_describe,
    streams=True,
    every_row=False,
    reads_pool=True,
)
def captions(step: Step, shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
    """Generate the captions of shards in order."""
    work = _Work(step, shards)
    found = step.context.models.captioner(step.names["captioner"]).caption_pool(work, step.context.pool)
    with contextlib.closing(found):
        for shard, generated, last in found:
            if isinstance(generated, EncoderError):
                yield shard, generated
                continue
            work.add(shard, generated)
            step.progress(len(generated), shard)
            if last:
                yield shard, work.result(shard)
                work.clear(shard, step.wanted[shard])


class _Work(Mapping[str, pa.Table]):
    """The rows of shards that still need captions, each shard read when its turn comes, and the captions so far.

    Args:
        step: the step.
        shards: in the order in which they are captioned.
    """

    def __init__(self, step: Step, shards: Sequence[str]) -> None:
        self.step = step
        self.shards = shards
        self.lake = step.context.lake
        self.subset = SubsetRows.newest(step, _settings(step.asset.declared).of)
        # Everything that decides a caption, apart from the image.
        self._maker = digest([CODE_VERSION, _captioner(step.context, step.asset.declared)])
        self._left: dict[str, pa.Table] = {}
        self._captions: dict[str, dict[tuple[int, int], list[str]]] = {}
        self._done: dict[str, int] = {}

    def __getitem__(self, shard: str) -> pa.Table:
        if shard not in self._left:
            try:
                pool = self.step.read("raw_pool", shard)
                self._captions[shard] = self._kept(shard)
                wanted = set(_uids(pool if self.subset is None else self.subset.uids(shard)))
            except (LakeError, NotReady) as error:
                raise OSError(str(error)) from error  # which stays with its shard
            kept = self._captions[shard]
            to_do = [row for row, uid in enumerate(_uids(pool)) if uid in wanted and uid not in kept]
            self._left[shard] = pool.take(pa.array(to_do, pa.int64()))
            self._done[shard] = 0
        return self._left[shard]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)

    def add(self, shard: str, generated: Sequence[list[str]]) -> None:
        """Keep the captions of the next rows."""
        if not generated:
            return
        rows = self._left[shard].slice(self._done[shard], len(generated))
        part = pa.table([rows["f0"], rows["f1"], pa.array(generated, pa.list_(pa.string()))], schema=_PART)
        name = f"{self._prefix(shard)}{len(self._captions[shard]):09d}.parquet"
        with self._folder(shard).writing(name) as temporary:
            pq.write_table(part, temporary)
        self._captions[shard] |= dict(zip(_uids(rows), generated, strict=True))
        self._done[shard] += len(generated)

    def result(self, shard: str) -> Result:
        """Return the shard's table: NULL for rows that get no captions."""
        pool = self.step.read("raw_pool", shard, ["f0", "f1"])
        wanted = None if self.subset is None else set(_uids(self.subset.uids(shard)))
        known = self._captions[shard]
        found = [known[uid] if wanted is None or uid in wanted else None for uid in _uids(pool)]
        column = pa.array(found, pa.list_(pa.string()))
        names = pa.array([shard] * pool.num_rows, pa.string())
        described = pool.num_rows - column.null_count
        words = pc.mean(pc.count_substring(pc.list_flatten(column), " ")).as_py()
        summary = {"described": described, "taken_over": described - self._done[shard]}
        if words is not None:
            summary["words_a_caption"] = round(words + 1, 2)
        return Result(pa.table([names, pool["f0"], pool["f1"], column], schema=SCHEMA), summary)

    def clear(self, shard: str, written: Provenance) -> None:
        """Forget a shard whose file is written."""
        del self._left[shard], self._captions[shard], self._done[shard]
        stored = self.step.stored(self.step.asset.key, shard)
        if stored is not None and stored.is_from(written):
            self._folder(shard).clear()

    def _folder(self, shard: str) -> WorkFolder:
        return WorkFolder(self.lake, f"captioning/{self.step.names['captioner']}/{shard}")

    def _prefix(self, shard: str) -> str:
        """Return the beginning of a part's name: a digest of captioner and rows."""
        return digest([self._maker, input_fingerprint(self.step.context, "raw_pool", shard)])[:16] + "-"

    def _kept(self, shard: str) -> dict[tuple[int, int], list[str]]:
        """Read the captions that this captioner generated for the shard's rows before, by uid."""
        tables = []
        stored = self.step.stored(self.step.asset.key, shard)
        if stored is not None:
            old = stored.provenance
            captioner = {"captioner": old.parameters.get("captioner")}
            pool = input_fingerprint(self.step.context, "raw_pool", shard)
            if digest([old.code_version, captioner]) == self._maker and old.inputs["raw_pool"] == pool:
                tables.append(self.step.read(self.step.asset.key, shard, _PART.names))
        for path in self._folder(shard).parts(self._prefix(shard)):
            with pq.ParquetFile(self.lake.store.local(path)) as file:
                tables.append(file.read())
        kept: dict[tuple[int, int], list[str]] = {}
        for table in tables:
            for uid, generated in zip(_uids(table), table["captions"].to_pylist(), strict=True):
                if generated is not None:
                    kept[uid] = generated
        return kept


def _uids(table: pa.Table) -> list[tuple[int, int]]:
    return list(zip(table["f0"].to_pylist(), table["f1"].to_pylist(), strict=True))
