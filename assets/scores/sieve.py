"""`sieve/<captioner>/<text_encoder>`: how similar a caption is to generated ones of its image (arXiv 2310.02110)."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from assets.base.asset import Declared, Dep
from assets.base.columns import Column
from assets.base.context import Context
from assets.base.partitioned import partitioned
from assets.base.results import Result
from assets.base.score_kind import ScoreKind, require_no_cycle, require_recipe
from assets.base.score_tables import score_stats
from assets.base.settings import Name, ProjectSettings, json_settings
from assets.base.shard import Shard
from assets.base.standard_checks import COSINE_BOUNDS, rows_aligned, within_bounds
from assets.scores.captions import captions
from core.names import suggestion
from resources.models.text_encoders import TextEncoder
from resources.pools.formats import FORMATS, pool_format

ROWS_AT_ONCE = 4096


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    return {"text_encoder": context.models.text_encoder(asset.names["text_encoder"]).identity()}


@partitioned(
    key="sieve/{captioner}/{text_encoder}",
    deps=["raw_pool", Dep("captions/{captioner}", fresh=True)],
    columns=[
        Column(
            name="sieve",
            type=pa.float32(),
            description="Largest cosine of the caption and a generated one, both without words for the medium.",
            direction="larger",
            bounds=COSINE_BOUNDS,
            nullable=True,
        ),
        Column(
            name="sieve_caption",
            type=pa.string(),
            description="That generated caption.",
            direction=None,
            bounds=None,
            nullable=True,
            explains="best_caption",
        ),
    ],
    checks=[rows_aligned, within_bounds],
    code_version="1",
    group_name="sieve",
    kinds={"pytorch", "parquet"},
    pool="gpu",
    description="SIEVE by captioner `{captioner}` and text encoder `{text_encoder}`: the largest cosine of the caption "
    "and a generated caption of its image, with words for the medium masked in both, and that generated caption. NULL "
    "for images without generated captions. Larger is better.",
    parameters=_parameters,
    every_row=False,
)
def sieve(shard: Shard) -> Result:
    """Compute SIEVE of one shard."""
    text_encoder = shard.step.context.models.text_encoder(shard.step.names["text_encoder"])
    pool = shard.read("raw_pool", ["f0", "f1", "caption"])
    generated = shard.read("captions/{captioner}", ["captions"])["captions"]
    described = np.flatnonzero(generated.is_valid())
    values = np.full(pool.num_rows, np.nan, np.float32)
    best: list[str | None] = [None] * pool.num_rows
    for start in range(0, len(described), ROWS_AT_ONCE):
        rows = described[start : start + ROWS_AT_ONCE]
        some = generated.take(pa.array(rows)).to_pylist()
        values[rows], chosen = _scores(text_encoder, pool["caption"].take(pa.array(rows)).to_pylist(), some)
        for row, of_row, place in zip(rows.tolist(), some, chosen.tolist(), strict=True):
            best[row] = of_row[place]
        shard.step.progress(len(rows), shard.name)
    columns = [pool["f0"], pool["f1"], pa.array(values, from_pandas=True), pa.array(best, pa.string())]
    table = pa.table(
        [pa.array([shard.name] * pool.num_rows, pa.string()), *columns], schema=shard.step.asset.declared.schema
    )
    return Result(table, {"described": len(described), **score_stats("sieve", values[described])})


def _scores(
    text_encoder: TextEncoder, captions: list[str], generated: list[list[str]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return SIEVE, float32 `[n]`, and the place of each row's best caption; equal texts are embedded once."""
    from selection.scores.sieve import mask, sieve

    texts = [[mask(caption), *map(mask, of_row)] for caption, of_row in zip(captions, generated, strict=True)]
    places = {text: place for place, text in enumerate(dict.fromkeys(text for row in texts for text in row))}
    vectors = text_encoder.encode(list(places))
    found = np.array([[places[text] for text in row] for row in texts])
    empty = np.array([[not text for text in row] for row in texts])
    return sieve(vectors[found[:, 0]], vectors[found[:, 1:]], empty[:, 0], empty[:, 1:])


def configured(settings: ProjectSettings) -> Mapping[str, tuple[str, ...]]:
    """Return the text encoders that SIEVE compares by, for each captioner: by default all with all."""
    found: Mapping[str, tuple[str, ...]] | None = settings.scores.sieve
    return {name: tuple(settings.text_encoders) for name in settings.captioners} if found is None else found


def _instances(settings: ProjectSettings) -> Iterable[dict[str, str]]:
    for captioner, names in configured(settings).items():
        for text_encoder in names:
            yield {"captioner": captioner, "text_encoder": text_encoder}


def _validate(settings: ProjectSettings) -> None:
    if "facts" in settings.captioners:
        raise ValueError("captioners.facts: this name is taken by captions/facts. Remedy: another name")
    if settings.captioners and not pool_format(settings.pool).has_images:
        having = ", ".join(declared.name for declared in FORMATS.values() if declared.has_images)
        raise ValueError(f"captioners: the pool has no images to describe. Remedy: a pool of format {having}")
    for captioner, names in (settings.scores.sieve or {}).items():
        if captioner not in settings.captioners:
            raise ValueError(
                f"scores.sieve: there is no captioner {captioner!r}; {suggestion(captioner, settings.captioners)}"
            )
        for name in names:
            if name not in settings.text_encoders:
                raise ValueError(
                    f"scores.sieve.{captioner}: there is no text encoder {name!r}; "
                    f"{suggestion(name, settings.text_encoders)}"
                )
    for name, text_encoder in settings.text_encoders.items():
        if text_encoder.encoder is not None and text_encoder.encoder not in settings.encoders:
            raise ValueError(
                f"text_encoders.{name}: there is no encoder {text_encoder.encoder!r}; "
                f"{suggestion(text_encoder.encoder, settings.encoders)}"
            )


def _validate_recipes(settings: ProjectSettings) -> None:
    for name, captioner in settings.captioners.items():
        require_recipe(settings, f"captioners.{name}.of", captioner.recipe)
    for names in _instances(settings):
        field, recipe = f"captioners.{names['captioner']}.of", settings.captioners[names["captioner"]].recipe
        require_no_cycle(settings, field, "sieve/{captioner}/{text_encoder}".format(**names), recipe)


def _recorded(settings: ProjectSettings, wanted: Collection[str]) -> dict[str, Any]:
    kept = {
        captioner: found
        for captioner, names in configured(settings).items()
        if (found := [name for name in names if f"sieve/{captioner}/{name}" in wanted])
    }
    used = {name for names in kept.values() for name in names}
    return {
        "scores": {"sieve": kept},
        "captioners": {captioner: json_settings(settings.captioners[captioner]) for captioner in kept},
        "text_encoders": {name: json_settings(model) for name, model in settings.text_encoders.items() if name in used},
    }


SIEVE = ScoreKind(
    name="sieve",
    asset=sieve,
    settings=dict[Name, tuple[Name, ...]] | None,
    configured=configured,
    instances=_instances,
    upstream=lambda settings: (captions.declare(settings, captioner=name) for name in settings.captioners),
    validate=_validate,
    validate_recipes=_validate_recipes,
    starts_from=lambda asset: asset.settings.captioners[asset.names["captioner"]].recipe,
    recorded=_recorded,
)
