"""`captions/<captioner>`: what a captioner says of each image, for SIEVE (arXiv 2310.02110).

Here: whose images are described, and what of an earlier run is taken over. Not here: how a caption comes to be
(`resources.models.captioners`), nor what is told of the pool's own captions (`assets.scores.caption_facts`).

No other signal is as dear. So captions are kept batch by batch in `<lake>/captioning/<captioner>/<shard>/` until their
shard's file is written: a run that is killed goes on behind its last whole batch. When the rows that shall be described
change, captions that are there are taken over.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from assets.base.partitioned import NotReady, Outcome, Result, ShardAsset, input_fingerprint, sharded_asset
from assets.base.score_tables import IDENTITY
from assets.project import Project
from assets.subsets.subset import SubsetAsset, newest
from core.hashing import digest
from resources.lake.files import LakeError, Provenance
from resources.models.decoding import EncoderError

CODE_VERSION = "1"
SCHEMA = pa.schema([*IDENTITY, pa.field("captions", pa.list_(pa.string()), nullable=True)])
_PART = pa.schema([SCHEMA.field("f0"), SCHEMA.field("f1"), SCHEMA.field("captions")])


def captioned(project: Project, captioner: str, of: SubsetAsset | None) -> ShardAsset:
    """Make the asset `captions/<captioner>`; `of` is the subset whose images are described, None for the pool."""
    key = f"captions/{captioner}"
    settings = project.settings.captioners[captioner]
    survivors = _Survivors(project, of) if of is not None else None

    def parameters() -> dict[str, object]:
        return {"captioner": project.captioner(captioner).identity()}

    def provenance(shard: str) -> Provenance:
        inputs = {"raw_pool": input_fingerprint(project, "raw_pool", shard)}
        if survivors is None:
            return Provenance(key, shard, CODE_VERSION, parameters(), inputs)
        inputs[f"rows of {settings.of}"] = survivors.digest(shard)
        return Provenance(key, shard, CODE_VERSION, {**parameters(), "of": settings.of}, inputs)

    def compute(shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
        with project.at_rest():
            wanted = {shard: provenance(shard) for shard in shards}
        work = _Work(project, key, shards, survivors, digest([CODE_VERSION, parameters()]))
        found = project.captioner(captioner).caption_pool(work, project.pool)
        with contextlib.closing(found):
            for shard, said, last in found:
                if isinstance(said, EncoderError):
                    yield shard, said
                    continue
                work.add(shard, said)
                project.on_progress(key, "", len(said))
                if last:
                    yield shard, work.result(shard)
                    work.clear(shard, wanted[shard])

    return sharded_asset(
        project,
        key=key,
        deps=("raw_pool", *([of.key] if of is not None else [])),
        provenance=provenance,
        compute=compute,
        code_version=CODE_VERSION,
        group="sieve",
        kinds={"pytorch", "parquet"},
        description=f"{settings.captions} captions of each image by captioner `{captioner}`, sampled by a seed and the "
        f"uid. {f'Only rows of `{settings.of}` have them.' if of is not None else ''}",
        columns=SCHEMA,
        pool="gpu",
    )


class _Survivors:
    """The rows of a subset's newest version, shard by shard: a shard in which they stay the same is not done again."""

    def __init__(self, project: Project, of: SubsetAsset) -> None:
        self.project = project
        self.of = of
        self._digests: tuple[str, dict[str, str]] = ("", {})

    def digest(self, shard: str) -> str:
        """Give a digest of a shard's rows in the subset.

        Raises:
            NotReady: the subset is not there, out of date, or was chosen without this shard.
        """
        version = newest(self.project, self.of)
        fingerprint = version.lineage["fingerprint"]
        if shard not in version.lineage["shards"]:
            raise NotReady(f"{self.of.key} was chosen without shard {shard}. Remedy: materialize {self.of.key} again")
        if self._digests[0] != fingerprint:
            with duckdb.connect() as con:
                rows = con.execute(
                    "SELECT shard, count(*), bit_xor(md5_number(concat(f0, '/', f1))) FROM read_parquet(?) GROUP BY 1",
                    [str(version.manifest)],
                ).fetchall()
            self._digests = (fingerprint, {name: digest([count, str(mixed)]) for name, count, mixed in rows})
        return self._digests[1].get(shard, digest([0, ""]))

    def uids(self, shard: str) -> pa.Table:
        """Give f0 and f1 of a shard's rows in the subset."""
        with duckdb.connect() as con:
            return con.sql(
                "SELECT f0, f1 FROM read_parquet($path) WHERE shard = $shard",
                params={"path": str(newest(self.project, self.of).manifest), "shard": shard},
            ).to_arrow_table()


class _Work(Mapping[str, pa.Table]):
    """The rows of shards that are still to be described, each shard read when its turn comes, and what was said.

    Args:
        project: the project.
        key: the asset's.
        shards: to be worked through in this order.
        survivors: whose images are described; None for all.
        maker: digest of all that decides a caption besides the image.
    """

    def __init__(
        self, project: Project, key: str, shards: Sequence[str], survivors: _Survivors | None, maker: str
    ) -> None:
        self.project = project
        self.key = key
        self.shards = shards
        self.survivors = survivors
        self.maker = maker
        self._left: dict[str, pa.Table] = {}
        self._said: dict[str, dict[tuple[int, int], list[str]]] = {}
        self._done: dict[str, int] = {}

    def __getitem__(self, shard: str) -> pa.Table:
        if shard not in self._left:
            try:
                pool = self.project.lake.read("raw_pool", shard)
                self._said[shard] = self._kept(shard)
                wanted = set(_words(pool if self.survivors is None else self.survivors.uids(shard)))
            except (LakeError, NotReady) as error:
                raise OSError(str(error)) from error  # which stays with its shard
            to_do = [row for row, uid in enumerate(_words(pool)) if uid in wanted and uid not in self._said[shard]]
            self._left[shard] = pool.take(pa.array(to_do, pa.int64()))
            self._done[shard] = 0
        return self._left[shard]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)

    def add(self, shard: str, said: Sequence[list[str]]) -> None:
        """Keep what was said of the next rows."""
        if not said:
            return
        rows = self._left[shard].slice(self._done[shard], len(said))
        part = pa.table([rows["f0"], rows["f1"], pa.array(said, pa.list_(pa.string()))], schema=_PART)
        path = f"{self._folder(shard)}/{self._prefix(shard)}{len(self._said[shard]):09d}.parquet"
        with self.project.lake.replacing(path) as temporary:
            pq.write_table(part, temporary)
        self._said[shard] |= dict(zip(_words(rows), said, strict=True))
        self._done[shard] += len(said)

    def result(self, shard: str) -> Result:
        """Give the shard's table: NULL where nothing was to be said."""
        pool = self.project.lake.read("raw_pool", shard, ["f0", "f1"])
        wanted = None if self.survivors is None else set(_words(self.survivors.uids(shard)))
        said = self._said[shard]
        captions = [said[uid] if wanted is None or uid in wanted else None for uid in _words(pool)]
        column = pa.array(captions, pa.list_(pa.string()))
        names = pa.array([shard] * pool.num_rows, pa.string())
        described = pool.num_rows - column.null_count
        taken_over = described - self._done[shard]
        words = pc.mean(pc.count_substring(pc.list_flatten(column), " ")).as_py()
        summary = {"described": described, "taken_over": taken_over}
        if words is not None:
            summary["words_a_caption"] = round(words + 1, 2)
        return Result(pa.table([names, pool["f0"], pool["f1"], column], schema=SCHEMA), summary)

    def clear(self, shard: str, written: Provenance) -> None:
        """Forget a shard whose file is written."""
        del self._left[shard], self._said[shard], self._done[shard]
        lake = self.project.lake
        stored = lake.stored(self.key, shard)
        if stored is not None and stored.is_from(written) and lake.fs.exists(self._folder(shard)):
            lake.fs.rm(self._folder(shard), recursive=True)

    def _folder(self, shard: str) -> str:
        return f"{self.project.lake.root}/captioning/{self.key.removeprefix('captions/')}/{shard}"

    def _prefix(self, shard: str) -> str:
        """Begin a part's name by what decides its captions: captioner and rows."""
        return digest([self.maker, input_fingerprint(self.project, "raw_pool", shard)])[:16] + "-"

    def _kept(self, shard: str) -> dict[tuple[int, int], list[str]]:
        """Give what this captioner has said of the shard's rows before."""
        lake, tables = self.project.lake, []
        stored = lake.stored(self.key, shard)
        if stored is not None:
            old = stored.provenance
            captioner = {"captioner": old.parameters.get("captioner")}
            pool = input_fingerprint(self.project, "raw_pool", shard)
            if digest([old.code_version, captioner]) == self.maker and old.inputs["raw_pool"] == pool:
                tables.append(lake.read(self.key, shard, _PART.names))
        if lake.fs.exists(self._folder(shard)):
            for path in sorted(lake.fs.ls(self._folder(shard), detail=False, refresh=True)):
                if path.rsplit("/", 1)[-1].startswith(self._prefix(shard)):
                    with lake.fs.open(path) as file:
                        tables.append(pq.ParquetFile(file).read())
        kept: dict[tuple[int, int], list[str]] = {}
        for table in tables:
            for uid, said in zip(_words(table), table["captions"].to_pylist(), strict=True):
                if said is not None:
                    kept[uid] = said
        return kept


def _words(table: pa.Table) -> list[tuple[int, int]]:
    return list(zip(table["f0"].to_pylist(), table["f1"].to_pylist(), strict=True))
