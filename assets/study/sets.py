"""Set-level measures of the study page: how the subset of each recipe is distributed over concepts.

Here: measures of whole selections. Not here: the distribution's formulas (`selection.recipes.distribution`).
"""

from collections.abc import Iterator, Sequence

import duckdb
import numpy as np
import pyarrow as pa

from assets.base.context import Context
from assets.base.score_tables import to_tensor
from assets.base.standard_checks import uid_records
from assets.scores.sparse_autoencoder import SparseFeatureSettings, configured
from assets.study.results import POOL, SAMPLE, SIMILAR, SetMeasures
from core.sql import quoted, text
from selection.recipes.distribution import effective_concepts, kl_divergence
from selection.scores.negatives import keyed_hash


def set_measures(project: Context, con: duckdb.DuckDBPyConnection, recipes: Sequence[str]) -> list[SetMeasures]:
    """Measure the pool and the newest version of each recipe, by each encoder with sparse features.

    Args:
        project: The project.
        con: Its catalog.
        recipes: Recipes with a version.
    """
    found = []
    for encoder, settings in configured(project.settings).items():
        if not project.lake.shards(f"sparse_features/{encoder}"):
            continue
        for recipe in (POOL, *recipes):
            found.append(_measured(project, con, recipe, encoder, settings))
    return found


def _measured(
    project: Context,
    con: duckdb.DuckDBPyConnection,
    recipe: str,
    encoder: str,
    settings: SparseFeatureSettings,
) -> SetMeasures:
    members = "SELECT f0, f1, min(shard) AS shard FROM pool GROUP BY f0, f1"  # of equal uids the first row counts
    if recipe != POOL:
        newest = "SEMI JOIN (FROM subsets WHERE current) USING (recipe, version)"
        members = f"SELECT f0, f1, shard FROM subset_members {newest} WHERE recipe = {text(recipe)}"
    rows = con.sql(f"SELECT * FROM ({members}) ORDER BY shard, f0, f1").to_arrow_table()
    own = f"FROM {quoted(f'sparse_features/{encoder}')} SEMI JOIN ({members}) USING (shard, f0, f1)"
    flat = f"SELECT unnest(concepts) AS concept, unnest(concept_values)::DOUBLE AS z {own}"
    summed = con.sql(f"SELECT concept, sum(z) AS mass FROM ({flat}) GROUP BY concept").to_arrow_table()
    mass = np.zeros(settings.concepts)
    mass[summed["concept"].to_numpy()] = summed["mass"].to_numpy()
    targets = {
        target: project.lake.read(f"target_concepts/{encoder}/{target}", columns=["share"])["share"].to_numpy()
        for target in settings.targets
        if project.lake.stored(f"target_concepts/{encoder}/{target}") is not None
    }
    return SetMeasures(
        recipe,
        encoder,
        rows.num_rows,
        {target: kl_divergence(share, mass) for target, share in targets.items()},
        effective_concepts(mass),
        _near_duplicates(project, f"embeddings/{encoder}", rows),
    )


def _near_duplicates(project: Context, key: str, members: pa.Table) -> float:
    """Return the share of rows that have another row at a cosine of `SIMILAR` or more."""
    from selection.scores.near_duplicates import count_similar

    uids, shard = uid_records(members), members["shard"].to_numpy(zero_copy_only=False)
    order = np.argsort(keyed_hash(0, 0, uids["f0"].copy(), uids["f1"].copy()), kind="stable")
    sampled = np.zeros(len(uids), bool)
    sampled[order[:SAMPLE]] = True

    def images(chosen: np.ndarray) -> Iterator[np.ndarray]:
        for name in np.unique(shard[chosen]):
            (vectors,) = project.lake.vectors(key, name, columns=["image"])
            of_shard = uid_records(project.lake.read(key, name, ["f0", "f1"]))
            yield vectors[:][np.isin(of_shard, uids[chosen & (shard == name)])]

    sample = to_tensor(np.concatenate(list(images(sampled))))
    similar = sum(count_similar(sample, to_tensor(part), SIMILAR).cpu().numpy() for part in images(shard == shard))
    return float((np.asarray(similar) > 1).mean())  # one is the row itself
