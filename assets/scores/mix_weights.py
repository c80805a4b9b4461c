"""`mix_weights/<name>`: the weights of score columns, learned on a labelled target (M-FLYT, arXiv 2503.08805).

They are learned from a sample of the pool and kept while shards arrive. They are learned again when their settings, the
target, or what a column is computed with changes, such as its reference negatives (`docs/methods/learned_mix.md`).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dagster as dg
import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from assets.base.asset import Declared, Dep, FileAsset, Step
from assets.base.checks import Check, Finding, Tables, not_compared
from assets.base.context import Context, Snapshot
from assets.base.freshness import shard_inputs
from assets.base.partitioned import PartitionedTemplate
from assets.base.results import NotReady, Result
from assets.base.score_kind import Scores
from assets.base.score_tables import device, to_tensor
from assets.base.settings import Name, ProjectSettings
from assets.base.standard_checks import uid_records
from assets.base.unpartitioned import unpartitioned
from assets.pool.embeddings import embeddings
from assets.scores.draws import sample
from core.hashing import digest
from resources.inputs.targets import require_classes
from resources.lake.files import Lake, LakeError, column_to_vectors
from resources.settings import Settings, check_templates

if TYPE_CHECKING:
    from selection.scores.learned_mix import LearnedMix, Target

WEIGHTS = "mix_weights/{name}"
_IMAGES = 5 << 60  # draw number of the keyed hash that chooses images of a target

Places = Sequence[tuple[str, str]]
"""The asset and the column of each score."""

SCHEMA = pa.schema(
    [
        pa.field("column", pa.string(), nullable=False),
        pa.field("mean", pa.float64(), nullable=False),
        pa.field("deviation", pa.float64(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("spread", pa.float64()),
        pa.field("by_seed", pa.list_(pa.float64()), nullable=False),
        pa.field("classes", pa.int64(), nullable=False),
        pa.field("loss_at_start", pa.float64(), nullable=False),
        pa.field("loss_at_end", pa.list_(pa.float64()), nullable=False),
    ]
)
"""One row for each column. The target's classes and losses, the last by seed, are the same in every row."""


class LearnedMixSettings(Settings):
    """How the weights of score columns are learned (`docs/methods/learned_mix.md`).

    Attributes:
        encoder: its frozen embeddings are what the two heads are trained on.
        columns: scores, named as in recipes.
        target: a target set with class labels.
        templates: captions of a class, in which {} is its name.
        seeds: trainings, each with batches of its own; the weights are their mean.
        sample: rows of the pool, and images of the target, that are used at most.
        steps: batches of a training.
        batch: rows of the pool, and images of the target, in a batch.
        head_rate: step of the heads, η.
        weight_rate: Adam's step of the weights.
        temperature: τ of both losses.
        seed: chooses the sample and the batches.
    """

    encoder: Name
    columns: tuple[str, ...] = Field(min_length=2)
    target: Name
    templates: tuple[str, ...] = Field(default=("a photo of a {}.",), min_length=1)
    seeds: int = Field(default=5, ge=1, le=1_000)
    sample: int = Field(default=20_000, ge=2)
    steps: int = Field(default=200, ge=1)
    batch: int = Field(default=256, ge=2)
    head_rate: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    weight_rate: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    temperature: float = Field(default=0.07, ge=0.001, le=10.0)
    seed: int = Field(default=0, ge=0, lt=2**62)

    @model_validator(mode="after")
    def _sound(self) -> "LearnedMixSettings":
        twice = sorted({column for column in self.columns if self.columns.count(column) > 1})
        if twice:
            raise ValueError(f"columns: {', '.join(twice)} is given twice. Remedy: keep one")
        check_templates(self.templates)
        return self


def configured(settings: ProjectSettings) -> Mapping[str, LearnedMixSettings]:
    """Return the settings by name."""
    found: Mapping[str, LearnedMixSettings] = settings.scores.learned_mix
    return found


def _settings(asset: Declared) -> LearnedMixSettings:
    return configured(asset.settings)[asset.names["name"]]


def places(settings: ProjectSettings, columns: Sequence[str]) -> Places:
    """Return the asset and the column of scores, by their names in recipes."""
    found = Scores(settings).places(columns)
    return [found[column] for column in columns]


def _sources(asset: Declared) -> list[str]:
    """List the keys of the assets that have a value for each row: the columns' and the embeddings."""
    settings = _settings(asset)
    columns = dict.fromkeys(key for key, _ in places(asset.settings, settings.columns))
    return [f"embeddings/{settings.encoder}", *columns]


@dataclass(frozen=True)
class _Upstream:
    """What the sources are computed from, directly or not: assets with a file a shard, and keys of the others."""

    partitioned: Sequence[Declared]
    unpartitioned: Sequence[str]


def _upstream(asset: Declared) -> _Upstream:
    settings = asset.settings
    known = {declared.key: declared for kind in settings.kinds for declared in kind.upstream(settings)}
    known |= Scores(settings).assets
    known |= {d.key: d for e in settings.encoders for d in [embeddings.declare(settings, encoder=e)]}
    partitioned: dict[str, Declared] = {}
    others: set[str] = set()
    waiting = _sources(asset)
    while waiting:
        key = waiting.pop()
        declared = known.get(key)
        if declared is None or not isinstance(declared.template, PartitionedTemplate):
            others.add(key)
        elif key not in partitioned:
            partitioned[key] = declared
            waiting += [dep.key for dep in declared.deps]
    return _Upstream([partitioned[key] for key in sorted(partitioned)], sorted(others - {"raw_pool"}))


def _target(settings: LearnedMixSettings) -> str:
    return f"target_embeddings/{settings.encoder}/{settings.target}"


def _deps(asset: Declared) -> Sequence[Dep]:
    files = dict.fromkeys([_target(_settings(asset)), *_upstream(asset).unpartitioned])
    return [*(Dep(key, recorded=False) for key in _sources(asset)), *map(Dep, files)]


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    made_from: dict[str, Any] = {}
    for declared in _upstream(asset).partitioned:
        template = declared.template
        parameters = template.parameters(context, declared) if template.parameters is not None else {}
        made_from[declared.key] = {"code_version": template.code_version, **parameters}
    return {**_settings(asset).model_dump(mode="json"), "made_from": made_from}


def _complete_shards(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    """Return the embeddings' fingerprints of shards that have all sources, and one of each source's files."""
    settings, sources = _settings(asset.declared), _sources(asset.declared)
    _require_labels(asset, snapshot, settings)
    found = {}
    for name in sorted(snapshot.listing):
        with suppress(NotReady):
            found[name] = shard_inputs(snapshot, name, sources, asset.assets)
    total = len(snapshot.listing)
    if not found or len(found) < total / 2:
        raise NotReady(
            f"{len(found)} of the pool's {total} shards have {', '.join(sources)}, up to date, too few to represent "
            "it. Remedy: materialize them for the others first"
        )
    inputs = {name: read[sources[0]] for name, read in found.items()}
    return inputs | {source: digest({name: read[source] for name, read in found.items()}) for source in sources}


def _require_labels(asset: FileAsset, snapshot: Snapshot, settings: LearnedMixSettings) -> None:
    """Check that the target has class labels: its files, as long as they are not embedded."""
    key = _target(settings)
    stored = snapshot.context.lake.stored(key)
    if stored is None or not asset.assets[key].is_fresh(snapshot):
        snapshot.context.target(settings.target).require_labels(settings.encoder)
    elif stored.summary["classes"] < 2:
        require_classes(settings.target, [""] * stored.rows)


def _stays(asset: Declared) -> bool:
    """Check whether nothing that the weights are kept by can change when shards arrive."""
    by_files = ("target_embeddings/", "external_files/")
    return all(key.startswith(by_files) for key in _upstream(asset).unpartitioned)


def _finite(tables: Tables) -> Finding:
    table = tables.read()
    for name, remedy in (
        ("mean", "leave out the column with such large values"),
        ("deviation", "leave out the column with such large values"),
        ("weight", "a smaller weight_rate or head_rate"),
    ):
        wrong = np.flatnonzero(~np.isfinite(table[name].to_numpy()))
        if len(wrong):
            column = table["column"][wrong[0]]
            return Finding(False, why=f"{name} of {column} is not finite. Remedy: {remedy}")
    return Finding(True, {"columns": table.num_rows})


def _agree(tables: Tables) -> Finding:
    table = [row for row in tables.read().to_pylist() if row["deviation"] > 0]
    if any(row["spread"] is None for row in table):
        return not_compared("a single seed has no spread")
    unsure = [row["column"] for row in table if row["spread"] > abs(row["weight"])]
    figures = {f"spread_over_weight/{r['column']}": r["spread"] / abs(r["weight"]) for r in table if r["weight"]}
    why = (
        f"the spread across seeds exceeds the weight of {', '.join(unsure)}: its sign is not known. Remedy: leave the "
        "column out, or more steps or seeds"
    )
    return Finding(not unsure, figures, why if unsure else "")


def _above_chance(tables: Tables) -> Finding:
    first = tables.read(columns=["classes", "loss_at_start"]).slice(0, 1).to_pylist()[0]
    loss, chance = first["loss_at_start"], math.log(first["classes"])
    why = (
        f"before training the target's loss is {loss:.3f}, and guessing has {chance:.3f}: weights that make the heads "
        "less sure lower it too. Remedy: a larger temperature, other templates, or a target that the encoder knows"
    )
    return Finding(loss < chance, {"loss_at_start": loss, "loss_of_chance": chance}, "" if loss < chance else why)


def _weights_table(context: Context, asset: Declared) -> Mapping[str, Any]:
    """Return the weights, and the target's loss by seed, as metadata."""
    if context.lake.stored(asset.key) is None:
        return {}
    rows = context.lake.read(asset.key).to_pylist()
    seeds = range(len(rows[0]["by_seed"]))
    lines = ["| column | mean weight | spread | " + " | ".join(f"seed {seed}" for seed in seeds) + " |"]
    lines.append("|---" * (3 + len(seeds)) + "|")
    for row in rows:
        spread = "" if row["spread"] is None else f"{row['spread']:.3f}"
        weights = " | ".join(f"{weight:+.3f}" for weight in row["by_seed"])
        lines.append(f"| {row['column']} | {row['weight']:+.3f} | {spread} | {weights} |")
    ends = " | ".join(f"{loss:.3f}" for loss in rows[0]["loss_at_end"])
    lines.append(f"| loss at the end; {rows[0]['loss_at_start']:.3f} at the start | | | {ends} |")
    return {"weights": dg.MetadataValue.md("\n".join(lines))}


@unpartitioned(
    key=WEIGHTS,
    deps=_deps,
    columns=SCHEMA,
    checks=[
        lambda _: Check("weights_finite", "All weights are finite.", _finite),
        lambda _: Check(
            "weights_agree", "No column's weight varies more across seeds than it is large.", _agree, blocking=False
        ),
        lambda _: Check(
            "above_chance",
            "Before training, the target's loss is below that of guessing: the logarithm of the number of classes.",
            _above_chance,
            blocking=False,
        ),
    ],
    code_version="1",
    group_name="learned_mix",
    kinds={"pytorch", "parquet"},
    pool="gpu",
    description=lambda asset: (
        f"Weights of {', '.join(f'`{column}`' for column in _settings(asset).columns)}, learned on the classes of "
        f"target set `{_settings(asset).target}`. Kept while shards arrive."
    ),
    parameters=_parameters,
    inputs=_complete_shards,
    keeps=lambda asset, stored, snapshot: True,
    stays=lambda asset, stored: _stays(asset),
    metadata=_weights_table,
)
def mix_weights(step: Step) -> Result:
    """Learn the weights from a sample of the pool, once for each seed."""
    import torch

    from selection.scores.learned_mix import MixTraining, learn_mix, moments, standardise

    settings = _settings(step.asset.declared)
    target = _labelled(step, settings)
    shards = [name for name in step.wanted[None].inputs if "/" not in name]
    source = f"embeddings/{settings.encoder}"
    chosen, *vectors = sample(
        step.snapshot,
        source,
        shards,
        size=settings.sample,
        seed=settings.seed,
        spread=step.map,
        columns=("image", "text"),
    )
    values = _sampled(step, places(step.context.settings, settings.columns), shards, chosen)
    known = _known(settings, values)
    mean, deviation = moments(values[known])
    columns = torch.from_numpy(standardise(values[known], mean, deviation)).float().to(device())
    image, text = (to_tensor(part[known]) for part in vectors)
    step.expect(settings.seeds * settings.steps * settings.batch)
    learned = []
    for seed in range(settings.seeds):
        training = MixTraining(
            **settings.model_dump(include={"steps", "batch", "head_rate", "weight_rate", "temperature"}),
            seed=settings.seed + seed,
        )
        learned.append(learn_mix(columns, image, text, target, training, on_step=lambda: step.progress(settings.batch)))
    summary = {
        "rows_sampled": int(known.sum()),
        "rows_without_value": int((~known).sum()),
        "target_images": len(target.image),
        "classes": len(target.text),
    }
    return _result(settings, mean, deviation, learned, summary)


def _result(
    settings: LearnedMixSettings,
    mean: np.ndarray,
    deviation: np.ndarray,
    learned: "Sequence[LearnedMix]",
    summary: dict[str, Any],
) -> Result:
    """Return the table of the weights, and the numbers that describe them."""
    by_seed = np.stack([found.weights.double().cpu().numpy() for found in learned])
    weight = by_seed.mean(axis=0)
    spread = by_seed.std(axis=0, ddof=1) if len(learned) > 1 else np.full(len(weight), np.nan)
    start, ends = learned[0].loss_at_start, [found.loss_at_end for found in learned]
    summary |= {"loss_at_start": start, "loss_at_end": float(np.mean(ends))}
    for column, value, off in zip(settings.columns, weight, spread, strict=True):
        summary |= {f"weight/{column}": float(value)} | ({} if np.isnan(off) else {f"spread/{column}": float(off)})
    if flat := [column for column, off in zip(settings.columns, deviation, strict=True) if off == 0]:
        summary["notes"] = f"{' and '.join(flat)}: the same for every sampled row, so without effect"
    each = len(settings.columns)
    columns = {
        "column": list(settings.columns),
        "mean": mean,
        "deviation": deviation,
        "weight": weight,
        "spread": pa.array(spread, from_pandas=True),
        "by_seed": by_seed.T.tolist(),
        "classes": [summary["classes"]] * each,
        "loss_at_start": [start] * each,
        "loss_at_end": [ends] * each,
    }
    return Result(pa.table(columns, schema=SCHEMA), summary)


def _labelled(step: Step, settings: LearnedMixSettings) -> "Target":
    """Return the target on the device: at most `sample` of its images, their classes, and the classes' texts.

    Raises:
        TargetError: it has no class labels.
    """
    import torch

    from selection.scores.learned_mix import Target
    from selection.scores.negatives import keyed_hash

    table = step.read(_target(settings))
    labels = np.array(table["label"].to_pylist())
    require_classes(settings.target, labels.tolist())
    classes, number = np.unique(labels, return_inverse=True)
    place = np.arange(len(labels), dtype=np.uint64)
    order = np.argsort(keyed_hash(settings.seed, _IMAGES, place, place), kind="stable")[: settings.sample]
    texts = step.context.models.encoder(settings.encoder).loaded.class_texts(classes.tolist(), settings.templates)
    image = to_tensor(column_to_vectors(table["image"])[order])
    return Target(image, torch.from_numpy(number[order].astype(np.int64)).to(device()), texts.to(device()))


def _sampled(step: Step, wanted: Places, shards: Sequence[str], chosen: np.ndarray) -> np.ndarray:
    """Read the columns of the sampled rows, float64 `[n, S]`; NaN where a row has no value."""
    numbers = np.unique(chosen["shard"])
    rows = [np.flatnonzero(chosen["shard"] == number) for number in numbers]
    parts = step.map(
        _rows_of_shard,
        ((wanted, shards[number], chosen["row"][some]) for number, some in zip(numbers, rows, strict=True)),
    )
    values = np.empty((len(chosen), len(wanted)))
    for some, part in zip(rows, parts, strict=True):
        values[some] = part
    return values


def _rows_of_shard(snapshot: Snapshot, wanted: Places, shard: str, rows: np.ndarray) -> np.ndarray:
    return read_columns(snapshot.context.lake, wanted, shard)[rows]


def read_columns(lake: Lake, wanted: Places, shard: str) -> np.ndarray:
    """Read score columns of a shard, float64 `[n, S]`, row by row as in `raw_pool`; NaN where a row has no value.

    Raises:
        LakeError: a score has other rows than the shard.
    """
    own = uid_records(lake.read("raw_pool", shard, ["f0", "f1"]))
    values = np.empty((len(own), len(wanted)))
    for place, (asset, column) in enumerate(wanted):
        table = lake.read(asset, shard, ["f0", "f1", column])
        if not np.array_equal(uid_records(table), own):
            raise LakeError(
                f"{lake.path(asset, shard)} has other rows than {lake.path('raw_pool', shard)}. Remedy: materialize "
                "it for this shard again"
            )
        values[:, place] = table[column].cast(pa.float64()).to_numpy()
    values[~np.isfinite(values)] = np.nan
    return values


def _known(settings: LearnedMixSettings, values: np.ndarray) -> np.ndarray:
    """Return which sampled rows have a value in every column, bool `[n]`.

    Raises:
        NotReady: hardly any has.
    """
    missing = np.isnan(values)
    known: np.ndarray = ~missing.any(axis=1)
    if known.sum() < 2:
        counts = _listed(settings.columns, missing.sum(axis=0))
        raise NotReady(
            f"{known.sum()} of {len(values)} sampled rows have a value in every column; without one: {counts}. "
            "Remedy: leave out columns that few rows have, or compute them"
        )
    return known


def _listed(columns: Collection[str], counts: np.ndarray) -> str:
    return ", ".join(f"{column} {count:,}" for column, count in zip(columns, counts.tolist(), strict=True) if count)
