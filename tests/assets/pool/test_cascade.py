"""An encoder that embeds only the rows of a subset, `of: subset/<recipe>`, and recipes that rank by its scores."""

import copy
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest

from assets.base.checks import CheckFailed
from assets.base.context import Snapshot
from assets.base.results import Result
from assets.reproduction import rebuild
from assets.settings import ConfigError
from core.uids import first_places
from resources.lake.files import LakeError, column_to_vectors
from tests.support.automation import Automation
from tests.support.cascading import POOL, UPPER
from tests.support.pool_factory import picture
from tests.support.scenario import ROWS, SHARDS, Scenario, keep

LARGE, FULL = "embeddings/large", "embeddings/tiny"


def vectors(scenario: Scenario, key: str) -> dict[tuple[int, int], bytes]:
    """Return the bits of both embeddings of each row that has them."""
    lake = scenario.open().lake
    found = {}
    for shard in SHARDS:
        table = lake.read(key, shard)
        both = np.concatenate([column_to_vectors(table[side]) for side in ("image", "text")], axis=1)
        for f0, f1, row in zip(table["f0"].to_pylist(), table["f1"].to_pylist(), both, strict=True):
            found[f0, f1] = row.tobytes()
    return found


def uids(frame: pl.DataFrame) -> set[tuple[int, int]]:
    return set(frame.select("f0", "f1").iter_rows())


def summed(scenario: Scenario, name: str) -> int:
    """Sum a number of the summaries of the expensive encoder's files."""
    lake = scenario.open().lake
    return sum(stored.summary[name] for shard in SHARDS if (stored := lake.stored(LARGE, shard)) is not None)


def assert_embedded_as_the_upper_part(cascade: Scenario) -> None:
    """Check that the expensive encoder has the rows of the upper part, with the bits of embeddings of all rows."""
    full = vectors(cascade, FULL)
    assert vectors(cascade, LARGE) == {uid: full[uid] for uid in uids(cascade.manifest("upper"))}


def test_the_expensive_encoder_embeds_the_upper_part_and_a_recipe_ranks_by_it_there(computed_cascade: Scenario) -> None:
    upper = uids(computed_cascade.manifest("upper"))
    assert len(upper) == UPPER
    assert_embedded_as_the_upper_part(computed_cascade)
    pool = computed_cascade.scores("clip_score/tiny")
    for asset, column in (
        ("clip_score/large", "clip_score"),
        ("neg_clip_loss/large", "neg_clip_loss"),
        ("norm_sim/large/pets", "norm_sim_inf"),
    ):
        rows = computed_cascade.scores(asset)
        assert rows.select("f0", "f1").equals(pool.select("f0", "f1"))
        assert uids(rows.filter(pl.col(column).is_not_null())) == upper
    ranked = pool.join(computed_cascade.manifest("upper"), on=["f0", "f1"], how="semi").sort(
        ["clip_score", "f0", "f1"], descending=[True, False, False]
    )
    assert uids(computed_cascade.manifest("best")) == uids(ranked.head(POOL // 4))
    assert not computed_cascade.run().computed


def test_neg_clip_loss_is_normalised_over_the_upper_part_alone(computed_cascade: Scenario) -> None:
    """With one draw of all embedded rows, each row is compared with the others of the upper part: in float64."""
    project = computed_cascade.open()
    tables = [project.lake.read(LARGE, shard) for shard in SHARDS]
    image, text = (
        np.concatenate([column_to_vectors(table[side]) for table in tables]).astype(np.float64)
        for side in ("image", "text")
    )
    tau = project.models.encoder("large").temperature()
    cosines = image @ text.T
    normalisation = sum(np.log(np.exp(cosines / tau).sum(axis)) for axis in (0, 1))
    wanted = np.diag(cosines) - tau / 2 * normalisation
    embedded = [row for table in tables for row in zip(table["f0"].to_pylist(), table["f1"].to_pylist(), strict=True)]
    rows = computed_cascade.scores("neg_clip_loss/large").select("f0", "f1", "neg_clip_loss").rows()
    found = {(f0, f1): value for f0, f1, value in rows}
    np.testing.assert_allclose([found[uid] for uid in embedded], wanted, atol=2e-5)
    assert sum(value is None for value in found.values()) == POOL - UPPER


def test_only_rows_that_are_new_in_the_upper_part_are_embedded(cascade: Scenario, small_clip: Path) -> None:
    assert not cascade.run().failures
    assert (summed(cascade, "embedded"), summed(cascade, "taken_over")) == (UPPER, 0)

    before = {path: of for path, of in cascade.files().items() if "/large" in path}
    threshold = cascade.subset("upper").lineage["steps"][0]["threshold"]
    cascade.set("recipes", "upper", value={"steps": [keep("clip_score/small", threshold=threshold)]})
    outcome = cascade.run()  # another version with the same rows
    assert "subset/upper" in outcome.computed
    assert LARGE not in outcome.computed
    assert {path: of for path, of in cascade.files().items() if path in before} == before

    cascade.set("recipes", "upper", value={"steps": [keep("clip_score/small", fraction=0.75)]})
    assert not cascade.run().failures
    more = POOL * 3 // 4
    assert (summed(cascade, "embedded"), summed(cascade, "taken_over")) == (more - UPPER, UPPER)
    assert_embedded_as_the_upper_part(cascade)

    cascade.write_shard(SHARDS[1], image=picture(999))
    assert not cascade.run().failures
    changed = cascade.open().lake.stored(LARGE, SHARDS[1])
    assert changed is not None
    assert (changed.summary["embedded"], changed.summary["taken_over"]) == (changed.rows, 0)
    assert_embedded_as_the_upper_part(cascade)

    cascade.set("encoders", "large", "model", value=f"local-dir:{small_clip}")
    assert not cascade.run().failures
    assert summed(cascade, "taken_over") == 0


def test_embeddings_of_all_rows_are_taken_over_by_an_encoder_that_gets_a_subset(cascade: Scenario) -> None:
    document = copy.deepcopy(cascade.document)
    cascade.document["encoders"]["large"].pop("of")
    del cascade.document["recipes"]["best"]
    assert not cascade.run().failures
    cascade.document = document
    assert not cascade.run().failures
    assert (summed(cascade, "embedded"), summed(cascade, "taken_over")) == (0, UPPER)
    assert_embedded_as_the_upper_part(cascade)


def test_a_shard_outside_the_upper_part_has_no_rows_and_a_step_over_it_is_an_error(cascade: Scenario) -> None:
    cascade.set("scores", "neg_clip_loss", "large", "estimator", value="random_partitions")
    cascade.set("recipes", "upper", value={"steps": [{"where": f"shard = '{SHARDS[0]}'"}]})
    cascade.set("recipes", "everywhere", value={"steps": [keep("clip_score/large", fraction=0.25)]})
    outcome = cascade.run()
    assert set(outcome.failures) == {"subset/everywhere"}
    assert "clip_score/large is NULL for uid" in outcome.failures["subset/everywhere"]
    lake = cascade.open().lake
    assert [stored.rows for shard in SHARDS if (stored := lake.stored(LARGE, shard))] == [ROWS, 0, 0]
    for asset in ("clip_score/large", "neg_clip_loss/large", "norm_sim/large/pets"):
        found = cascade.scores(asset, SHARDS[1:])
        assert found.height == found[:, 3].null_count() == 2 * ROWS


def test_the_graph_has_an_edge_from_the_subset_to_the_embeddings(cascade: Scenario) -> None:
    _, graph = cascade.open_graph()
    keys = [node.key for node in graph.in_order]
    assert keys.index("subset/upper") < keys.index(LARGE) < keys.index("subset/best")
    (spec,) = graph.by_key(LARGE).definition.specs
    assert dg.AssetKey(["subset", "upper"]) in {dep.asset_key for dep in spec.deps}
    assert "only the rows of `subset/upper`" in (spec.description or "")


def test_embeddings_in_another_order_or_of_a_row_twice_are_not_written(computed_cascade: Scenario) -> None:
    project, graph = computed_cascade.open_graph()
    table, shard = max(((project.lake.read(LARGE, shard), shard) for shard in SHARDS), key=lambda some: len(some[0]))
    stored = project.lake.stored(LARGE, shard)
    assert stored is not None
    for rows in (range(table.num_rows)[::-1], [0, *range(table.num_rows)]):
        with pytest.raises(CheckFailed, match="rows_aligned"):
            graph.by_key(LARGE).write(Snapshot(project), stored.provenance, Result(table.take(list(rows)), {}))


def test_a_version_is_chosen_again_from_its_lake_and_not_rebuilt_from_the_pool(
    computed_cascade: Scenario, tmp_path: Path
) -> None:
    record = computed_cascade.subset("best").lineage
    assert record["project"]["encoders"]["large"]["of"] == "subset/upper"
    assert "upper" in record["project"]["recipes"]
    with pytest.raises(LakeError, match="embeddings/large started from subset/upper"):
        rebuild(record, tmp_path / "rebuilt")
    other = computed_cascade.subset("full").lineage
    assert "of" not in other["project"]["encoders"]["large"]
    built = rebuild(other, tmp_path / "other")
    assert pl.read_parquet(built / "manifest.parquet").equals(computed_cascade.manifest("full"))


def near_duplicates(document: dict[str, Any]) -> None:
    document["scores"]["near_duplicates"] = {"large": {"best": "clip_score/large"}}


def heads_of_a_mix(document: dict[str, Any]) -> None:
    columns = ["clip_score/small", "clip_score/large"]
    document["scores"]["learned_mix"] = {"mixed": {"encoder": "large", "columns": columns, "target": "pets"}}


def chain(document: dict[str, Any]) -> None:
    document["encoders"]["small"]["of"] = "subset/best"


def own_score(document: dict[str, Any]) -> None:
    document["recipes"]["upper"]["steps"] = [keep("clip_score/large", fraction=0.5)]


def unknown(document: dict[str, Any]) -> None:
    document["encoders"]["large"]["of"] = "subset/uper"


def not_a_subset(document: dict[str, Any]) -> None:
    document["encoders"]["large"]["of"] = "upper"


def precomputed(document: dict[str, Any]) -> None:
    document["encoders"]["large"]["precomputed"] = "b32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (near_duplicates, "encoders.large.of: near_duplicates/large needs the embeddings of all rows. Remedy: "),
        (heads_of_a_mix, "encoders.large.of: mix_weights/mixed needs the embeddings of all rows"),
        (chain, "encoders.(small|large).of: recipe '(upper|best)' reads clip_score/(small|large)"),
        (own_score, "encoders.large.of: recipe 'upper' reads clip_score/large, which is computed over its subset"),
        (unknown, "encoders.large.of: there is no recipe 'uper'; did you mean upper"),
        (not_a_subset, "encoders.large.of: expected text of the form"),
        (precomputed, "`of` saves the work of a model"),
    ],
)
def test_the_yaml_says_what_is_wrong_with_it(cascade: Scenario, change: Any, message: str) -> None:
    change(cascade.document)
    with pytest.raises(ConfigError, match=message):
        cascade.open()


def test_places_of_uids_are_those_of_their_first_rows() -> None:
    def records(*numbers: int) -> np.ndarray:
        return np.array([(1, number) for number in numbers], "u8,u8")

    assert first_places(records(7, 5, 7, 9, 5), records(5, 7, 8)).tolist() == [0, 1]
    assert first_places(records(), records(5)).tolist() == []
    assert first_places(records(5), records()).tolist() == []


def test_sensors_follow_a_shard_through_the_subset_to_the_expensive_encoder(
    cascade: Scenario, automation: Automation
) -> None:
    del cascade.document["recipes"]["full"]
    cascade.document["scores"] = {"clip_score": ["small", "large"], "neg_clip_loss": {}, "norm_sim": {}}
    automation.document = cascade.document
    automation.load()
    automation.settle()
    cascade.write_shard("00003")
    runs = automation.settle()
    asked = [keys for keys, _ in runs]
    upper, large = (next(n for n, keys in enumerate(asked) if key in keys.split()) for key in ("subset/upper", LARGE))
    assert upper < large < max(n for n, keys in enumerate(asked) if "subset/best" in keys.split())
    assert "00003" in automation.subset("best").lineage["shards"]
    automation.assert_nothing_is_left()
