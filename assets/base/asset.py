"""Assets of files as declared: a decorated function is a template; a project's asset is a template with its names.

Here: `Template`, `Declared`, and `FileAsset`, which a project computes. Not here: how Dagster runs them
(`assets.base.partitioned`, `assets.base.unpartitioned`).

The usual asset needs no code for its provenance: the fingerprints of its `deps`, and its `parameters`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import dagster as dg
import pyarrow as pa

from assets.base.checks import SUMMARY_KEY, Check, Tables
from assets.base.columns import Column, score_schema
from assets.base.context import Context, RunState, Snapshot
from assets.base.engines import Engine, InProcess
from assets.base.keys import asset_key
from assets.base.progress import Meter
from assets.base.results import NotReady
from assets.base.settings import ProjectSettings
from core.links import asset_link
from resources.lake.files import Provenance, Stored
from resources.lake.scratch import WorkFolder

T = TypeVar("T")


@dataclass(frozen=True)
class Dep:
    """An asset that another one reads.

    Attributes:
        key: its key, in which `{names}` are filled in.
        fresh: a partition of it must be up to date, not merely there. Unpartitioned assets always must.
        recorded: the provenance has its fingerprint, under its key. Otherwise `inputs` records the files that are read.
    """

    key: str
    fresh: bool = False
    recorded: bool = True


@dataclass(frozen=True)
class Amount:
    """Numbers that the operations of a computation follow from.

    Attributes:
        rows: rows to be computed.
        pool: rows of the pool.
        inputs: rows of the unpartitioned assets that it reads, by the first part of their key.
        dimensions: d, the length of the encoder's embeddings.
        image: floating-point operations of the encoder for one image; None where they are not known.
        text: the same for one caption.
    """

    rows: int
    pool: int
    inputs: Mapping[str, int]
    dimensions: int
    image: float | None = None
    text: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """An asset for every encoder, target or other name that a project gives it.

    Arguments that depend on a project's settings may be functions of the `Declared` asset.

    Attributes:
        key: the asset's key with `{names}` in it, such as `norm_sim/{encoder}/{target}`.
        deps: the assets it reads.
        columns: the columns of its files: a schema, or a score's columns, which follow the row's identity.
        checks: functions of the `Declared` asset that return the checks of its files; None for a check that does not
            apply.
        code_version: version of the code that computes it.
        group_name: its group in Dagster's UI.
        kinds: its kinds in Dagster's UI.
        description: its description there, with `{names}`.
        pool: Dagster's concurrency pool: `gpu` or `cpu`.
        parameters: settings that its rows depend on, JSON values, for provenance.
        inputs: fingerprints of further inputs, by name; raises NotReady.
        operations: floating-point operations of a computation, two for each multiply-add, for estimates; None where
            they are not known. Additions that are few beside them do not count.
        reads_pool: whether it reads the pool's files.
        function: the decorated function.
    """

    key: str
    deps: "Sequence[str | Dep] | Callable[[Declared], Sequence[str | Dep]]"
    columns: "pa.Schema | Sequence[Column] | Callable[[Declared], pa.Schema | Sequence[Column]]"
    checks: "Sequence[Callable[[Declared], Check | None]]"
    code_version: str
    group_name: str
    kinds: set[str]
    description: "str | Callable[[Declared], str]"
    pool: str | None = None
    parameters: "Callable[[Context, Declared], Mapping[str, Any]] | None" = None
    inputs: "Callable[[FileAsset, Snapshot, str | None], Mapping[str, str]] | None" = None
    operations: "Callable[[Declared, Amount], float | None] | None" = None
    reads_pool: bool = False
    function: Callable[..., Any]

    def declare(self, settings: ProjectSettings, **names: str) -> "Declared":
        """Return a project's asset: this template with its names filled in."""
        return Declared(self, settings, names)


@dataclass(frozen=True, eq=False)
class Declared:
    """An asset of a project, not opened yet.

    Attributes:
        template: what it was declared with.
        settings: the project's.
        names: the encoder, target and other names in its key.
    """

    template: Template
    settings: ProjectSettings
    names: Mapping[str, str]

    @cached_property
    def key(self) -> str:
        """Its key, such as `clip_score/b32`."""
        return self.template.key.format(**self.names)

    @cached_property
    def deps(self) -> tuple[Dep, ...]:
        """The assets it reads."""
        found = self.template.deps(self) if callable(self.template.deps) else self.template.deps
        deps = [dep if isinstance(dep, Dep) else Dep(dep) for dep in found]
        return tuple(replace(dep, key=dep.key.format(**self.names)) for dep in deps)

    @cached_property
    def of(self) -> str | None:
        """The subset whose rows its encoder embeds, as `subset/<recipe>`; None for the whole pool."""
        if "encoder" not in self.names:
            return None
        encoder = self.settings.encoders.get(self.names["encoder"])
        return None if encoder is None else encoder.of

    @cached_property
    def _columns(self) -> pa.Schema | Sequence[Column]:
        columns = self.template.columns
        found = columns(self) if callable(columns) else columns
        if self.of is None or isinstance(found, pa.Schema):
            return found
        return [replace(column, nullable=True) for column in found]

    @property
    def columns(self) -> Sequence[Column]:
        """The columns of a score, without the row's identity; none for other assets."""
        return () if isinstance(self._columns, pa.Schema) else self._columns

    @property
    def schema(self) -> pa.Schema:
        """The schema of its files."""
        return self._columns if isinstance(self._columns, pa.Schema) else score_schema(self._columns)

    @property
    def checks(self) -> tuple[Check, ...]:
        """The checks of its files."""
        return tuple(check for make in self.template.checks if (check := make(self)) is not None)

    @property
    def tags(self) -> dict[str, str]:
        """Tags by which the UI filters: the encoder and the target set."""
        return {name: self.names[name] for name in ("encoder", "target") if name in self.names}

    def spec(self) -> dg.AssetSpec:
        """Return the asset as Dagster shows it; skippable, because events may be logged in place of an output."""
        template = self.template
        text = template.description
        return dg.AssetSpec(
            asset_key(self.key),
            deps=[asset_key(dep.key) for dep in self.deps],
            skippable=True,
            code_version=template.code_version,
            group_name=template.group_name,
            kinds=template.kinds,
            tags=self.tags,
            description=text(self) if callable(text) else text.format(**self.names),
            metadata={"dagster/column_schema": column_schema(self.schema, self.columns)},
        )


@dataclass(frozen=True, eq=False)
class FileAsset:
    """An asset of a project whose rows lie in files of the lake.

    Attributes:
        declared: the asset as declared.
        context: the project; a run replaces its lake, pool and models by its resources.
        assets: all assets of the project, by key.
        definition: the Dagster asset.
    """

    declared: Declared
    context: Context
    assets: Mapping[str, Any]
    definition: dg.AssetsDefinition

    @property
    def key(self) -> str:
        """Its key, such as `clip_score/b32`."""
        return self.declared.key

    @cached_property
    def deps(self) -> tuple[str, ...]:
        """Keys of the assets it reads."""
        return tuple(dep.key for dep in self.declared.deps)

    @cached_property
    def checks(self) -> tuple[Check, ...]:
        """The checks of its files."""
        return self.declared.checks

    @property
    def row_source(self) -> str:
        """Key of the asset that its rows are computed from: the embeddings that it reads, else `raw_pool`."""
        return next((key for key in self.deps if key.startswith("embeddings/")), "raw_pool")

    def tables(self, snapshot: Snapshot, shard: str | None, new: Mapping[str, pa.Table] | None = None) -> Tables:
        """Return the tables that its checks look at; `new` are not in the lake yet."""
        return Tables(snapshot, self.key, shard, new)

    def _provenance(self, snapshot: Snapshot, shard: str | None) -> Provenance:
        template = self.declared.template
        inputs = self.recorded_deps(snapshot, shard)
        if template.inputs is not None:
            inputs |= template.inputs(self, snapshot, shard)
        return Provenance(self.key, shard, template.code_version, self.parameters(snapshot), inputs)

    def parameters(self, snapshot: Snapshot) -> Mapping[str, Any]:
        """Return the settings that the rows depend on."""
        parameters = self.declared.template.parameters
        if parameters is None:
            return {}
        return snapshot.memoized(f"{self.key}: parameters", lambda: parameters(snapshot.context, self.declared))

    def recorded_deps(self, snapshot: Snapshot, shard: str | None) -> dict[str, str]:
        """Return the fingerprints of the deps that the provenance records, by key.

        Raises:
            NotReady: one is missing or out of date.
        """
        return {dep.key: self._input(snapshot, dep, shard) for dep in self.declared.deps if dep.recorded}

    def _input(self, snapshot: Snapshot, dep: Dep, shard: str | None) -> str:
        """Return the fingerprint of a dep's file: of the shard's, or of the unpartitioned asset's."""
        upstream = self.assets[dep.key]
        if not upstream.partitioned:
            fingerprint: str = upstream.fingerprint(snapshot)
            return fingerprint
        assert shard is not None
        if dep.fresh and not upstream.is_fresh(snapshot, shard):
            raise NotReady(f"{dep.key} of shard {shard} is not there yet, or out of date. Remedy: materialize it")
        return input_fingerprint(snapshot.context, dep.key, shard)


@dataclass(frozen=True, eq=False)
class Step:
    """An asset that a run is computing.

    Attributes:
        asset: the asset.
        snapshot: the inputs when the step began.
        wanted: provenance of each file that is to be written, by shard; under None that of an unpartitioned asset.
        state: the run's state.
        requested: keys of all assets that the run was asked for.
        meter: counts its rows, for Dagster's log.
        engine: computes the parts of an unpartitioned asset.
    """

    asset: FileAsset
    snapshot: Snapshot
    wanted: Mapping[str | None, Provenance]
    state: RunState = field(default_factory=RunState)
    requested: frozenset[str] = frozenset()
    meter: Meter = field(default_factory=Meter)
    engine: Engine = field(default_factory=InProcess)

    @property
    def context(self) -> Context:
        """The project."""
        return self.snapshot.context

    def map(self, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """Yield `function(snapshot, *some)` for `some` in `arguments`, in their order, as `Engine.map` does."""
        return self.engine.map(self, function, arguments)

    def shared(self, work: WorkFolder, name: str) -> str:
        """Return where workers read an array of a work folder that is complete: a path, or a URL of the lake."""
        return str(work.path / name) if self.engine.has_files(self.context) else work.share(name)

    @property
    def names(self) -> Mapping[str, str]:
        """The encoder, target and other names in the asset's key."""
        return self.asset.declared.names

    def read(self, key: str, shard: str | None = None, columns: list[str] | None = None) -> pa.Table:
        """Read an asset's file; `{names}` in the key are filled in.

        Raises:
            LakeError: there is no such file, or it can't be read.
        """
        return self.context.lake.read(key.format(**self.names), shard, columns)

    def stored(self, key: str, shard: str | None = None) -> Stored | None:
        """Return the record of an asset's file, None where there is none; `{names}` in the key are filled in."""
        return self.context.lake.stored(key.format(**self.names), shard)

    def progress(self, rows: int, shard: str = "") -> None:
        """Report rows as done."""
        self.meter.advance(rows, shard)
        self.state.progress(self.asset.key, shard, rows)

    def expect(self, rows: int) -> None:
        """Report how many rows there are to do, for a step that can't be told beforehand."""
        self.meter.expect(rows)
        self.state.expect(self.asset.key, rows)


def input_fingerprint(context: Context, asset: str, shard: str | None = None) -> str:
    """Return the fingerprint of a file that an asset reads.

    Raises:
        NotReady: there is no such file.
    """
    stored = context.lake.stored(asset, shard)
    if stored is None:
        of = f" of shard {shard}" if shard else ""
        raise NotReady(f"{asset}{of} is not there yet. Remedy: materialize it first")
    return stored.fingerprint


def column_schema(schema: pa.Schema, columns: Sequence[Column] = ()) -> dg.TableSchema:
    """Return an Arrow schema as Dagster shows it, with the descriptions of the columns that have one."""
    descriptions = {column.name: column.description for column in columns}
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                f.name,
                str(f.type),
                description=descriptions.get(f.name),
                constraints=dg.TableColumnConstraints(nullable=f.nullable),
            )
            for f in schema
        ]
    )


def event_metadata(stored: Stored, computed: bool, seconds: float) -> dict[str, Any]:
    """Return the metadata of a file's materialization: numbers as numbers, so that Dagster plots them over shards."""
    metadata: dict[str, Any] = {
        "dagster/partition_row_count": stored.rows,
        "fingerprint": stored.fingerprint,
        "computed": computed,
    }
    if computed and seconds > 0:
        metadata["seconds"] = round(seconds, 3)
        metadata["rows_per_second"] = round(stored.rows / seconds, 1)
    metadata.update({name: value for name, value in stored.summary.items() if name != SUMMARY_KEY})
    if stored.summary.get("rejected"):
        metadata["browse"] = dg.MetadataValue.url(asset_link(stored.provenance.asset, stored.provenance.shard))
    return metadata
