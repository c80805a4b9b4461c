"""A learned mix in a project: weights, scores, rows without a value, what makes it stale, and what is refused."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from assets.reproduction import rebuild
from assets.settings import ConfigError
from dagster_project.early_checks import problems
from tests.support.pool_factory import class_folders, datacomp_shard, picture, uid, unit_rows, write_tar
from tests.support.scenario import Scenario, keep
from tests.support.steps import begin, findings, node_of

ROWS, WIDTH = 36, 16
COLUMNS = ["clip_score/tiny", "neg_clip_loss/tiny", "norm_sim_inf/tiny/pets"]
MIX = {"encoder": "tiny", "columns": COLUMNS, "target": "pets", "seeds": 3, "steps": 6, "batch": 12}
PARTIAL = {**MIX, "columns": ["external_scores/half", "clip_score/tiny"], "seeds": 1}
WEIGHTS, SCORE = "mix_weights/main", "learned_mix/main"
SHARDS = ("00000", "00001", "00002")


def write_pool(folder: Path, shards: Mapping[str, Sequence[int]]) -> None:
    """Write the rows of each shard, with embeddings that depend on the row alone."""
    image, text = (unit_rows(seed, 2 * ROWS, WIDTH) for seed in (1, 2))
    for shard, rows in shards.items():
        arrays = {"b32_img": image[list(rows)], "b32_txt": text[list(rows)]}
        datacomp_shard(folder, shard, len(rows), columns={"uid": [uid(row) for row in rows]}, arrays=arrays)


def mixed_project(folder: Path, model: Path, shards: Mapping[str, Sequence[int]]) -> Scenario:
    """Return a project over stored embeddings with two mixes, one of a column that every second row has."""
    scenario = Scenario(folder, model)
    write_pool(folder / "metadata", shards)
    half = pl.DataFrame({"uid": [uid(row) for row in range(0, ROWS, 2)], "value": [float(r) for r in range(ROWS // 2)]})
    half.write_parquet(folder / "half.parquet")
    scenario.document |= {
        "pool": {"path": "metadata", "format": "datacomp"},
        "encoders": {"tiny": {"precomputed": "b32", "model": f"local-dir:{model}", "workers": 0}},
        "external_scores": {"half": {"files": "half.parquet", "columns": "value"}},
        "scores": {
            "neg_clip_loss": {"tiny": {"batch_size": 8, "draws": 3}},
            "learned_mix": {"main": MIX, "partial": PARTIAL},
        },
        "recipes": {
            "best": {"steps": [keep(SCORE, fraction=0.25)]},
            "known": {"steps": [{"where": 'isfinite("learned_mix/partial")'}, keep("learned_mix/partial", count=5)]},
        },
    }
    return scenario


def in_order() -> dict[str, range]:
    return {shard: range(12 * n, 12 * n + 12) for n, shard in enumerate(SHARDS)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Iterator[Scenario]:
    """Yield the project after its first pass."""
    scenario = mixed_project(tmp_path_factory.mktemp("mixed"), tiny_clip, in_order())
    assert scenario.run().failures == {}
    yield scenario
    scenario.instance.dispose()


def column_values(scenario: Scenario) -> np.ndarray:
    """Read the columns of `main`, float64 [n, 3]."""
    assets = {
        "clip_score": "clip_score/tiny",
        "neg_clip_loss": "neg_clip_loss/tiny",
        "norm_sim_inf": "norm_sim/tiny/pets",
    }
    return np.stack([scenario.scores(key)[name].cast(pl.Float64).to_numpy() for name, key in assets.items()], axis=1)


def test_the_score_is_the_weighted_sum_of_the_standardised_columns(finished: Scenario) -> None:
    weights = pl.from_arrow(finished.open().lake.read(WEIGHTS))
    assert weights["column"].to_list() == COLUMNS
    values = column_values(finished)
    expected = np.zeros(ROWS)
    for place, (by_seed, weight, spread) in enumerate(weights.select("by_seed", "weight", "spread").iter_rows()):
        assert len(set(by_seed)) == 3
        assert weight == pytest.approx(sum(by_seed) / 3)
        assert spread == pytest.approx((sum((w - weight) ** 2 for w in by_seed) / 2) ** 0.5)
        of_all = values[:, place]  # the sample is larger than the pool
        mean = of_all.sum() / ROWS
        deviation = (((of_all - mean) ** 2).sum() / ROWS) ** 0.5
        assert weights["mean"][place] == pytest.approx(mean)
        assert weights["deviation"][place] == pytest.approx(deviation)
        expected += weight * (of_all - mean) / deviation
    found = finished.scores(SCORE)
    assert found["learned_mix"].to_numpy() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found["f0"].equals(finished.scores("raw_pool")["f0"])


def test_the_weights_their_spread_and_the_losses_are_metadata(finished: Scenario) -> None:
    stored = finished.open().lake.stored(WEIGHTS)
    weights = pl.from_arrow(finished.open().lake.read(WEIGHTS))
    event = finished.instance.get_latest_materialization_event(dg.AssetKey(WEIGHTS.split("/")))
    metadata = event.asset_materialization.metadata
    for column, weight, spread in weights.select("column", "weight", "spread").iter_rows():
        assert metadata[f"weight/{column}"].value == weight
        assert metadata[f"spread/{column}"].value == spread
        assert f"| {column} | {weight:+.3f} | {spread:.3f} |" in metadata["weights"].value
    (by_seed,) = {tuple(losses) for losses in weights["loss_at_end"]}
    assert len(set(by_seed)) == 3
    assert metadata["loss_at_end"].value == pytest.approx(sum(by_seed) / 3)
    assert metadata["loss_at_start"].value != metadata["loss_at_end"].value
    assert (stored.summary["rows_sampled"], stored.summary["classes"], stored.summary["target_images"]) == (ROWS, 2, 6)


def test_doubtful_weights_warn_and_weights_that_are_not_finite_are_not_written(finished: Scenario) -> None:
    project = finished.open()
    table = project.lake.read(WEIGHTS)

    def checked(weight: Sequence[float], spread: Sequence[float | None]) -> dict[str, dict[str, Any]]:
        changed = table.set_column(3, table.schema.field("weight"), pa.array(weight))
        changed = changed.set_column(4, table.schema.field("spread"), pa.array(spread, pa.float64()))
        return findings(project, WEIGHTS, None, {WEIGHTS: changed})

    sure = checked([1.0, -1.0, 0.5], [0.5, 0.9, 0.1])
    assert sure["weights_agree"]["passed"]
    assert sure["weights_agree"]["figures"]["spread_over_weight/neg_clip_loss/tiny"] == pytest.approx(0.9)
    unsure = checked([1.0, -1.0, 0.5], [0.5, 1.1, 0.1])["weights_agree"]
    assert not unsure["passed"]
    assert not unsure["blocking"]
    assert "exceeds the weight of neg_clip_loss/tiny:" in unsure["why"]
    assert checked([1.0, -1.0, 0.5], [None] * 3)["weights_agree"]["compared"] is False
    start = table.schema.get_field_index("loss_at_start")
    for loss, passed in ((0.69, True), (0.70, False)):  # ln 2 = 0.693
        changed = table.set_column(start, table.schema.field(start), pa.array([loss] * 3))
        chance = findings(project, WEIGHTS, None, {WEIGHTS: changed})["above_chance"]
        assert (chance["passed"], chance["blocking"]) == (passed, False)
    wrong = checked([1.0, np.nan, 0.5], [0.5, 0.5, 0.1])["weights_finite"]
    assert not wrong["passed"]
    assert wrong["blocking"]
    assert wrong["why"] == "weight of neg_clip_loss/tiny is not finite. Remedy: a smaller weight_rate or head_rate"


def test_rows_without_a_value_are_not_learned_from_and_have_no_score(finished: Scenario) -> None:
    stored = finished.open().lake.stored("mix_weights/partial")
    assert (stored.summary["rows_sampled"], stored.summary["rows_without_value"]) == (ROWS // 2, ROWS // 2)
    has_value = finished.scores("external_scores/half")["value"].is_not_null()
    assert finished.scores("learned_mix/partial")["learned_mix"].is_not_null().equals(has_value)


def test_a_step_refuses_rows_without_a_score_until_they_are_dropped(finished: Scenario) -> None:
    finished.set("recipes", "refused", value={"steps": [keep("learned_mix/partial", count=5)]})
    failures = finished.run().failures
    del finished.document["recipes"]["refused"]
    assert set(failures) == {"subset/refused"}
    assert "learned_mix/partial is NULL for uid" in failures["subset/refused"]
    score = finished.scores("learned_mix/partial")
    best = score.filter(pl.col("learned_mix") >= score["learned_mix"].drop_nulls().sort()[-5])
    assert set(finished.manifest("known")["f0"]) == set(best["f0"])


def test_the_same_rows_give_the_same_weights_again_and_in_other_shards(
    finished: Scenario, tmp_path: Path, tiny_clip: Path
) -> None:
    stored = finished.open().lake.read(WEIGHTS)
    node = node_of(finished.open(), WEIGHTS)
    assert node.compute(begin(node)).table.equals(stored)
    shuffled = np.random.default_rng(0).permutation(ROWS).tolist()
    other = mixed_project(tmp_path, tiny_clip, {"a": shuffled[:30], "b": shuffled[30:]})
    other.set("scores", "learned_mix", value={"main": MIX})
    other.set("recipes", value={})
    assert other.run().failures == {}
    assert other.open().lake.read(WEIGHTS).equals(stored)
    one, two = (s.scores(SCORE, shards).sort("f0") for s, shards in ((finished, SHARDS), (other, ("a", "b"))))
    assert one["learned_mix"].equals(two["learned_mix"])
    other.instance.dispose()


def test_a_version_is_reproduced_with_the_target_that_its_weights_were_learned_on(
    finished: Scenario, tmp_path: Path
) -> None:
    version = finished.subset("best")
    assert {WEIGHTS, "target_embeddings/tiny/pets", "negatives/tiny"} <= set(version.lineage["inputs"])
    assert set(version.lineage["project"]["scores"]["learned_mix"]) == {"main"}
    rebuild(version.lineage, tmp_path / "again")
    assert (tmp_path / "again/subset.npy").read_bytes() == Path(version.uids).read_bytes()


def test_weights_stay_while_shards_arrive_and_are_learned_again_when_what_they_come_from_changes(
    tmp_path: Path, tiny_clip: Path
) -> None:
    scenario = mixed_project(tmp_path, tiny_clip, in_order())
    scenario.set("scores", "learned_mix", value={"main": MIX})
    scenario.document["recipes"].pop("known")
    assert scenario.run().failures == {}
    fingerprint = scenario.open().lake.stored(WEIGHTS).fingerprint
    write_pool(scenario.folder / "metadata", {"00003": range(36, 48)})
    computed = scenario.run().computed
    assert computed[SCORE] == ["00003"]
    assert WEIGHTS not in computed
    assert scenario.open().lake.stored(WEIGHTS).fingerprint == fingerprint

    (scenario.folder / "pets" / "dog" / "9.jpg").write_bytes(picture(99))
    computed = scenario.run().computed
    assert {"target_embeddings/tiny/pets", WEIGHTS} <= set(computed)
    assert sorted(computed[SCORE]) == [*SHARDS, "00003"]

    for field, value in (("draws", 2), ("temperature", 0.5)):
        scenario.set("scores", "neg_clip_loss", "tiny", field, value=value)
        computed = scenario.run().computed
        assert WEIGHTS in computed, field
        assert sorted(computed[SCORE]) == [*SHARDS, "00003"]
    scenario.set("scores", "learned_mix", "main", "templates", value=["{}"])
    assert set(scenario.run().computed) == {WEIGHTS, SCORE, "subset/best", "catalog"}
    assert scenario.run().computed == {}
    scenario.instance.dispose()


def no_classes(folder: Path) -> dict[str, Any]:
    for number in range(3):
        (folder / "plain").mkdir(exist_ok=True)
        (folder / "plain" / f"{number}.jpg").write_bytes(picture(number))
    return {"path": "plain"}


def one_class(folder: Path) -> dict[str, Any]:
    class_folders(folder / "cats", ["cat"])
    return {"path": "cats"}


def some_without_class(folder: Path) -> dict[str, Any]:
    write_tar(folder / "some.tar", [("x.jpg", picture(5)), ("x.cls", b"7"), ("y.jpg", picture(6)), ("y.txt", b"y")])
    return {"path": "some.tar"}


def bare_features(folder: Path) -> dict[str, Any]:
    np.save(folder / "bare.npy", unit_rows(3, 5, WIDTH).astype(np.float32))
    return {"features": {"tiny": "bare.npy"}}


@pytest.mark.parametrize("make", [no_classes, one_class, some_without_class, bare_features])
def test_a_target_without_labels_is_found_before_a_row_is_read(scenario: Scenario, make: Any) -> None:
    scenario.document["targets"]["plain"] = make(scenario.folder)
    scenario.set("scores", "learned_mix", value={"main": {**MIX, "target": "plain"}})
    scenario.set("recipes", value={})
    project, graph = scenario.open_graph()
    (message,) = problems(project, graph)
    assert message.startswith("target plain has no class labels to learn from: ")
    assert "Remedy: class folders" in message
    assert problems(project, graph)[message] == [WEIGHTS]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("main", "columns"), ["clip_score/tiny", "clip_scor/tiny"], "there is no score 'clip_scor/tiny' with numbers"),
        (("main", "columns"), ["clip_score/tiny", "language/facts"], "there is no score 'language/facts' with numbers"),
        (("main", "columns"), ["clip_score/tiny"], "at least 2 entry"),
        (("main", "columns"), ["clip_score/tiny", "clip_score/tiny"], "clip_score/tiny is given twice"),
        (("main", "columns"), ["clip_score/tiny", SCORE], f"{SCORE} is computed from {SCORE} itself"),
        (("main", "columns"), ["clip_score/tiny", "learned_mix/other"], "learned_mix/other is computed from"),
        (("main", "columns"), ["clip_score/tiny", "near_duplicate/tiny"], "near_duplicate/tiny is computed from"),
        (("main", "columns"), ["clip_score/tiny", "norm_sim_dynamic/tiny"], "recipe 'best' reads norm_sim_dyn"),
        (("main", "target"), "pet", "there is no target 'pet'"),
        (("main", "encoder"), "tinny", "there is no encoder 'tinny'"),
        (("main", "encoder"), "stored", "encoder 'stored' has no model to embed the names of classes with"),
        (("main", "templates"), ["a photo"], "'a photo' has no {}"),
        (("main", "templates"), ["a {} of {name}"], "'a {} of {name}' has no {}, or other braces"),
        (("main", "steps"), 0, "scores.learned_mix.main.steps: expected at least 1"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_message(scenario: Scenario, path: tuple[str, ...], value: object, message: str) -> None:
    scenario.document["encoders"]["tiny"]["precomputed"] = "b32"
    scenario.document["encoders"]["stored"] = {"precomputed": "b32", "temperature": 0.1}
    scenario.document["pool"] = {"path": "metadata", "format": "datacomp"}
    mixes = {"main": dict(MIX), "other": {**MIX, "columns": ["clip_score/tiny", SCORE]}}
    scenario.set("recipes", value={"best": {"steps": [keep(SCORE, fraction=0.5)]}})
    scenario.document["scores"] |= {
        "norm_sim": {"tiny": ["pets"]},
        "captions": {},
        "learned_mix": mixes,
        "near_duplicates": {"tiny": {"best": SCORE}},
        "norm_sim_dynamic": {"tiny": {"keep": 0.5, "of": "subset/best"}},
    }
    scenario.open()
    scenario.set("scores", "learned_mix", *path, value=value)
    with pytest.raises(ConfigError) as caught:
        scenario.open()
    assert message in str(caught.value)
