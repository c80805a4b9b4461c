"""`learned_mix/<name>`: a weighted sum of score columns, whose weights `mix_weights/<name>` learns."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from assets.base.asset import Declared, Dep, Step
from assets.base.columns import Column
from assets.base.partitioned import partitioned
from assets.base.results import Result
from assets.base.score_kind import (
    ScoreKind,
    Scores,
    recorded_entries,
    recorded_targets,
    require_encoders,
    require_targets,
)
from assets.base.score_tables import score_stats
from assets.base.settings import Name, ProjectSettings
from assets.base.shard import Shard
from assets.base.standard_checks import rows_aligned, within_bounds
from assets.pool.target_embeddings import target_embeddings
from assets.scores.mix_weights import (
    WEIGHTS,
    LearnedMixSettings,
    Places,
    configured,
    mix_weights,
    places,
    read_columns,
)
from core.names import suggestion


@dataclass(frozen=True)
class Mix:
    """The learned weights: the score columns, their mean and deviation, and their weights, float64 `[S]` each."""

    columns: Places
    mean: np.ndarray
    deviation: np.ndarray
    weight: np.ndarray


def _mix(step: Step) -> Mix:
    table = step.read(WEIGHTS)
    columns = places(step.context.settings, table["column"].to_pylist())
    return Mix(columns, *(table[name].to_numpy() for name in ("mean", "deviation", "weight")))


def _deps(asset: Declared) -> Sequence[str | Dep]:
    columns = configured(asset.settings)[asset.names["name"]].columns
    scores = dict.fromkeys(key for key, _ in places(asset.settings, columns))
    return ["raw_pool", *(Dep(key, fresh=True) for key in scores), WEIGHTS]


@partitioned(
    key="learned_mix/{name}",
    deps=_deps,
    columns=[
        Column(
            name="learned_mix",
            type=pa.float32(),
            description="Sum of the standardised columns, each times its learned weight; NULL where a column has no "
            "value.",
            direction="larger",
            bounds=None,
            nullable=True,
        )
    ],
    checks=[rows_aligned, within_bounds],
    code_version="1",
    group_name="learned_mix",
    kinds={"parquet"},
    description="Sum of score columns, each standardised and times its weight in `mix_weights/{name}`. NULL for rows "
    "without a value in one of them. Larger is better.",
    prepare=_mix,
)
def learned_mix(shard: Shard, mix: Mix) -> Result:
    """Compute the mixed score of one shard."""
    from selection.scores.learned_mix import standardise

    rows = shard.read("raw_pool", ["f0", "f1"])
    values = read_columns(shard.lake, mix.columns, shard.name)
    mixed = (standardise(values, mix.mean, mix.deviation) * mix.weight).sum(axis=1)
    mixed[np.isnan(values).any(axis=1)] = np.nan
    score = mixed.astype(np.float32)
    columns = [rows["f0"], rows["f1"], pa.array(score, from_pandas=True)]
    names = pa.array([shard.name] * len(score), pa.string())
    table = pa.table([names, *columns], schema=shard.step.asset.declared.schema)
    shard.step.progress(len(score), shard.name)
    known = score[~np.isnan(score)]
    return Result(table, {"rows_without_value": len(score) - len(known), **score_stats("learned_mix", known)})


def _upstream(settings: ProjectSettings) -> Iterable[Declared]:
    for name, chosen in configured(settings).items():
        yield target_embeddings.declare(settings, encoder=chosen.encoder, target=chosen.target)
        yield mix_weights.declare(settings, name=name)


def _validate(settings: ProjectSettings) -> None:
    known = [name for name, score in Scores(settings).by_name.items() if score.column.is_number]
    for name, chosen in configured(settings).items():
        field = f"scores.learned_mix.{name}"
        require_encoders(settings, f"{field}.encoder", [chosen.encoder])
        if settings.encoders[chosen.encoder].model is None:
            raise ValueError(
                f"{field}.encoder: encoder {chosen.encoder!r} has no model to embed the names of classes with. Remedy: "
                f"give encoders.{chosen.encoder}.model"
            )
        require_targets(settings, f"{field}.target", chosen.encoder, [chosen.target])
        for column in chosen.columns:
            if column not in known:
                raise ValueError(
                    f"{field}.columns: there is no score {column!r} with numbers; {suggestion(column, known)}"
                )


def _validate_recipes(settings: ProjectSettings) -> None:
    scores = Scores(settings)
    for name, chosen in configured(settings).items():
        field, asset = f"scores.learned_mix.{name}.columns", f"learned_mix/{name}"
        for column in chosen.columns:
            if asset in scores.with_upstream({scores.by_name[column].asset}):
                raise ValueError(f"{field}: {column} is computed from {asset} itself. Remedy: leave it out")


def _recorded(settings: ProjectSettings, wanted: Collection[str]) -> dict[str, Any]:
    chosen = configured(settings)
    entries = recorded_entries("learned_mix", chosen, wanted, lambda name: [f"learned_mix/{name}"])
    return entries | recorded_targets(settings, (chosen[name].target for name in entries["scores"]["learned_mix"]))


LEARNED_MIX = ScoreKind(
    name="learned_mix",
    asset=learned_mix,
    settings=dict[Name, LearnedMixSettings],
    default={},
    configured=configured,
    instances=lambda settings: [{"name": name} for name in configured(settings)],
    upstream=_upstream,
    validate=_validate,
    validate_recipes=_validate_recipes,
    recorded=_recorded,
)
