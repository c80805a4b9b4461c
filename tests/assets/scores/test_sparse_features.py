"""Sparse features and distribution matching in a project: assets, explanations, lineage, and resuming."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest

from assets.base.context import RunState
from assets.reproduction import choose_again, rebuild
from assets.scores import sparse_autoencoder as module
from assets.scores.sparse_autoencoder import read_autoencoder
from assets.settings import ConfigError
from dagster_project.engines.processes import Processes
from dagster_project.headless import materialize
from resources.catalog.build import read_catalog
from resources.lake.files import column_to_vectors
from tests.support.interrupting import data_files
from tests.support.scenario import ROWS, SHARDS, Scenario, keep
from tests.support.steps import begin, node_of

CONCEPTS, K = 24, 4
SETTINGS = {"targets": ["pets"], "concepts": CONCEPTS, "k": K, "steps": 12, "batch": 16}
MATCH = {"features": "sparse_features/tiny", "target": "pets", "quality": "clip_score/tiny"}


def _configure(scenario: Scenario) -> None:
    scenario.set("scores", "sparse_features", value={"tiny": SETTINGS})
    scenario.set(
        "recipes",
        value={
            "alone": {"steps": [{"match_distribution": {**MATCH, "fraction": 0.25}}]},
            "inside": {
                "steps": [
                    keep("clip_score/tiny", fraction=0.5),
                    {"match_distribution": {**MATCH, "count": 10}},
                    {"where": "source_row % 2 = 0"},
                ]
            },
            "balanced": {"steps": [{"balance": {"concepts": "nearest_target/tiny/pets", "cap": 3}}]},
            "greedy": {
                "steps": [{"balance": {"concepts": "sparse_features/tiny", "cap": 4, "form": "greedy", "count": 12}}]
            },
        },
    )


@pytest.fixture(scope="module")
def matched(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Iterator[Scenario]:
    """Yield a project with both recipes, after its first pass."""
    scenario = Scenario(tmp_path_factory.mktemp("matched"), tiny_clip)
    _configure(scenario)
    assert scenario.run().failures == {}
    yield scenario
    scenario.instance.dispose()


def _autoencoder(scenario: Scenario):
    return read_autoencoder(scenario.open().lake.read("sparse_autoencoder/tiny"), K)


def test_each_image_has_the_concepts_that_the_stored_autoencoder_gives_it(matched: Scenario) -> None:
    model, lake = _autoencoder(matched), matched.open().lake
    for shard in SHARDS:
        image = module.to_tensor(column_to_vectors(lake.read("embeddings/tiny", shard)["image"]))
        index, value = (part.numpy() for part in model.encode(image))
        table = lake.read("sparse_features/tiny", shard)
        assert column_to_vectors(table["concepts"]).tolist() == index.tolist()
        assert column_to_vectors(table["concept_values"]).tolist() == value.tolist()
        assert table["f0"].equals(lake.read("raw_pool", shard)["f0"])


def test_the_target_is_distributed_as_its_images_are(matched: Scenario) -> None:
    lake = matched.open().lake
    image = module.to_tensor(column_to_vectors(lake.read("target_embeddings/tiny/pets")["image"]))
    index, value = (part.numpy() for part in _autoencoder(matched).encode(image))
    mass = np.bincount(index.ravel(), value.ravel().astype(float), minlength=CONCEPTS)
    table = lake.read("target_concepts/tiny/pets")
    np.testing.assert_allclose(table["share"].to_numpy(), mass / mass.sum())
    assert table["rows"].to_numpy().sum() == (value > 0).sum()


def test_the_autoencoder_reports_its_fit_and_shows_the_largest_concepts(matched: Scenario) -> None:
    stored = matched.open().lake.stored("sparse_autoencoder/tiny")
    assert stored.summary["reconstruction_error"] > 0
    assert 0 <= stored.summary["dead_share"] < 1
    event = matched.instance.get_latest_materialization_event(dg.AssetKey(["sparse_autoencoder", "tiny"]))
    metadata = event.asset_materialization.metadata
    assert metadata["reconstruction_error"].value == stored.summary["reconstruction_error"]
    table = pl.from_arrow(matched.open().lake.read("sparse_autoencoder/tiny"))
    largest = table.filter(pl.col("concept") >= 0).sort("mass", descending=True)["concept"][0]
    sheet = metadata["largest_concepts"].value
    assert f"Concept {largest}" in sheet
    assert sheet.count("data:image/jpeg") > CONCEPTS // 3
    assert sheet.index(f"Concept {largest}") == sheet.index("Concept ")


def test_explain_shows_why_a_row_was_selected_or_dropped(matched: Scenario) -> None:
    version = matched.subset("alone")
    rows = pl.read_parquet(f"{version.folder}/steps/1_match_distribution.parquet")
    concepts = pl.read_parquet(f"{version.folder}/steps/1_concepts.parquet")
    full = set(concepts.filter((pl.col("selected") >= pl.col("target")) & (pl.col("target") > 0))["concept"])
    manifest = matched.manifest("alone").join(rows, on=["f0", "f1"], maintain_order="left")
    own = matched.scores("sparse_features/tiny")
    with read_catalog(matched.open().catalog_path()) as con:

        def explained(uid: str) -> tuple:
            return con.execute(
                "SELECT verdict, value, rank, concepts FROM explain(?) WHERE recipe = 'alone' AND step = 1", [uid]
            ).fetchall()[0]

        for row in manifest[:6].iter_rows(named=True):
            verdict, value, rank, text = explained(row["uid"])
            assert (verdict, value, rank) == ("kept", row["gain"], row["position"])
            named = [c for c, part in zip(row["concepts"], row["parts"], strict=True) if part > 0]
            assert [int(part.split(" ")[0]) for part in text.split("#")[1:]] == named
        uids = con.execute("SELECT uid, f0, f1 FROM pool").fetchall()
        dropped = [found for found in uids if found[0] not in set(manifest["uid"])]
        assert len(dropped) == 3 * ROWS - manifest.height
        for uid, f0, f1 in dropped[:6]:
            verdict, value, rank, text = explained(uid)
            assert (verdict, value, rank) == ("dropped", None, None)
            (mine,) = own.filter(f0=f0, f1=f1).select("concepts", "concept_values").rows()
            active = {c for c, z in zip(*mine, strict=True) if z > 0}
            listed = text.split(";")[0] if text.startswith("already saturated: ") else ""
            assert {int(part.split(" ")[0]) for part in listed.split("#")[1:]} == active & full


def test_explain_knows_the_verdict_of_a_step_that_is_not_the_last(matched: Scenario) -> None:
    rows = pl.read_parquet(f"{matched.subset('inside').folder}/steps/2_match_distribution.parquet")
    assert rows.height == 10
    with read_catalog(matched.open().catalog_path()) as con:
        for uid, f0 in con.execute("SELECT uid, f0 FROM pool WHERE shard = '00000'").fetchall():
            query = "SELECT verdict FROM explain(?) WHERE recipe = 'inside' ORDER BY step"
            verdicts = [verdict for (verdict,) in con.execute(query, [uid]).fetchall()]
            if verdicts[1] == "dropped":
                assert verdicts[2:] == ["not reached", "not reached"]
            else:
                assert verdicts[2] == ("kept" if f0 in set(rows["f0"]) else "dropped")


@pytest.mark.parametrize("recipe", ["balanced", "greedy"])
def test_a_balanced_subset_explains_and_shows_its_concepts(matched: Scenario, recipe: str) -> None:
    version = matched.subset(recipe)
    rows = pl.read_parquet(f"{version.folder}/steps/1_balance.parquet")
    concepts = pl.read_parquet(f"{version.folder}/steps/1_concepts.parquet")
    kept = set(matched.manifest(recipe)["f0"])
    assert set(rows.filter("kept")["f0"]) == kept
    page = Path(f"{version.folder}/report/index.html").read_text()
    assert "the commonest concepts" in page
    with read_catalog(matched.open().catalog_path()) as con:
        for uid, f0 in con.execute("SELECT uid, f0 FROM pool WHERE shard = '00001' LIMIT 5").fetchall():
            (own,) = rows.filter(f0=f0).iter_rows(named=True)
            shown = concepts.filter(pl.col("number").is_in(own["concepts"])).sort("entered", "number")
            texts = [f"{c['label']} ({c['entered']} rows, {c['selected']} after the step)" for c in shown.to_dicts()]
            ((verdict, value, text),) = con.execute(
                "SELECT verdict, value, concepts FROM explain(?) WHERE recipe = ? AND step = 1", [uid, recipe]
            ).fetchall()
            assert (verdict, value, text) == ("kept" if f0 in kept else "dropped", own["value"], ", ".join(texts))


@pytest.mark.parametrize("recipe", ["balanced", "greedy", "inside"])
def test_a_version_is_selected_again_from_its_record(matched: Scenario, tmp_path: Path, recipe: str) -> None:
    version = matched.subset(recipe)
    choose_again(matched.open().lake, version.lineage, tmp_path)
    assert (tmp_path / "subset.npy").read_bytes() == Path(version.uids).read_bytes()


def test_a_version_is_reproduced_from_the_pool(matched: Scenario, tmp_path: Path) -> None:
    version = matched.subset("alone")
    assert {"sparse_autoencoder/tiny", "target_concepts/tiny/pets", "target_embeddings/tiny/pets"} <= set(
        version.lineage["inputs"]
    )
    rebuild(version.lineage, tmp_path / "again")
    assert (tmp_path / "again/subset.npy").read_bytes() == Path(version.uids).read_bytes()


def test_two_processes_write_the_same_files(matched: Scenario) -> None:
    lake = matched.folder / "lake"
    before = data_files(lake)
    for folder in ("sparse_features", "subset"):
        shutil.rmtree(lake / folder)
    project, graph = matched.open_graph()
    engine = Processes(2)
    try:
        outcome = materialize(project, graph, matched.instance, notice=lambda *_: None, engine=engine)
    finally:
        engine.close()
    assert outcome.failures == {}
    assert outcome.computed["sparse_features/tiny"] == list(SHARDS)
    assert data_files(lake) == before


def test_an_arriving_shard_leaves_the_autoencoder_as_it_is(matched: Scenario) -> None:
    assert matched.run().computed == {}
    before = matched.open().lake.stored("sparse_autoencoder/tiny").fingerprint
    matched.write_shard("00003")
    computed = matched.run().computed
    assert computed["sparse_features/tiny"] == ["00003"]
    assert "sparse_autoencoder/tiny" not in computed
    assert {"subset/alone", "subset/inside", "subset/greedy"} <= set(computed)
    assert matched.open().lake.stored("sparse_autoencoder/tiny").fingerprint == before


def test_an_interrupted_training_resumes(matched: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", -1)
    node = node_of(matched.open(), "sparse_autoencoder/tiny")
    whole = node.compute(begin(node)).table
    batches = []

    def stop(asset: str, shard: str, rows: int) -> None:  # noqa: ARG001 - called as `Progress`
        batches.append(rows)
        if len(batches) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        node.compute(replace(begin(node), state=RunState(stop)))
    resumed = node.compute(replace(begin(node), state=RunState(stop)))
    assert resumed.table.equals(whole)
    assert len(batches) == 5 + SETTINGS["steps"] - 4, "the fifth batch came after the last checkpoint"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("recipes", "alone", "steps"), [{"match_distribution": {**MATCH, "target": "pet", "count": 1}}],
         "there is no target_concepts 'target_concepts/tiny/pet'"),
        (("recipes", "alone", "steps"), [{"match_distribution": MATCH | {"features": "sparse_features/t", "count": 1}}],
         "there is no score 'concepts/t'"),
        (("recipes", "alone", "steps"), [keep("concepts/tiny", count=1)], "concepts/tiny holds text or lists"),
        (("scores", "sparse_features", "tiny", "k"), CONCEPTS + 1, "a row can't have 25 of 24 concepts"),
        (("scores", "sparse_features", "tiny", "targets"), ["pet"], "there is no target 'pet'"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_message(scenario: Scenario, path: tuple[str, ...], value: object, message: str) -> None:
    scenario.set("scores", "sparse_features", value={"tiny": dict(SETTINGS)})
    scenario.set("recipes", value={"alone": {"steps": [keep("clip_score/tiny", count=1)]}})
    scenario.set(*path, value=value)
    with pytest.raises(ConfigError) as caught:
        scenario.open()
    assert message in str(caught.value)
