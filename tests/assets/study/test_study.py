"""The study page: statistics against brute force, findings where a method loses, and the same bytes each time."""

import html
import json
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assets.scores.draws import read_draws
from assets.study.figures import study
from assets.study.findings import findings
from assets.study.page import write_page
from assets.study.results import Study, StudyError
from dagster_project import cli
from resources.catalog.build import read_catalog
from resources.lake.files import column_to_vectors
from selection.scores.negatives import keyed_hash
from selection.statistics import auc, best_overlap, bootstrap_auc, spearman
from tests.support.pool_factory import uid
from tests.support.scenario import ROWS, SHARDS, Scenario

RESAMPLES = 50
HOSTILE = "junk <script>alert(1)</script>"


def pairwise_auc(better: np.ndarray, worse: np.ndarray) -> float:
    """Compute the AUC from every pair, in float64."""
    better, worse = better[~np.isnan(better)], worse[~np.isnan(worse)]
    if not len(better) or not len(worse):
        return math.nan
    return float(np.mean([(b > w) + 0.5 * (b == w) for b in better for w in worse]))


def brute_spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Compute Pearson's correlation of ranks: rows below, plus half of the equal ones."""
    both = ~np.isnan(a) & ~np.isnan(b)
    ranks = [np.array([(v < x).sum() + 0.5 * (v == x).sum() for x in v]) for v in (a[both], b[both])]
    return float(np.corrcoef(*ranks)[0, 1])


scores_with_ties = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, math.nan]), min_size=1, max_size=12)


@given(scores_with_ties, scores_with_ties)
def test_the_auc_is_that_of_all_pairs_with_ties_and_missing_scores(left: list[float], right: list[float]) -> None:
    better, worse = np.array(left), np.array(right)
    found = auc(np.stack([better, -better], 1), np.stack([worse, -worse], 1))
    np.testing.assert_allclose(found, [pairwise_auc(better, worse), pairwise_auc(-better, -worse)], atol=1e-14)


def test_the_auc_does_not_care_for_scale() -> None:
    rng = np.random.default_rng(1)
    better, worse = rng.normal(0.5, 1, (300, 1)), rng.normal(0, 1, (200, 1))
    assert auc(np.exp(better), np.exp(worse))[0] == auc(better, worse)[0] == pairwise_auc(better[:, 0], worse[:, 0])


def test_the_bootstrap_spreads_as_delong_says() -> None:
    rng = np.random.default_rng(2)
    better, worse = rng.normal(0.8, 1, (300, 1)).round(1), rng.normal(0, 1, (120, 1)).round(1)
    above = (better > worse.T) + 0.5 * (better == worse.T)  # [300, 120]
    delong = math.sqrt(above.mean(1).var(ddof=1) / 300 + above.mean(0).var(ddof=1) / 120)
    drawn = bootstrap_auc(better, worse, resamples=4000, seed=0)[:, 0]
    assert drawn.std() == pytest.approx(delong, rel=0.06)
    assert drawn.mean() == pytest.approx(above.mean(), abs=0.003)


def test_scores_of_a_resample_are_of_the_same_rows() -> None:
    rng = np.random.default_rng(3)
    better, worse = rng.normal(0.5, 1, (40, 1)), rng.normal(0, 1, (30, 1))
    drawn = bootstrap_auc(np.hstack([better, 7 * better]), np.hstack([worse, 7 * worse]), resamples=60, seed=4)
    assert (drawn[:, 0] == drawn[:, 1]).all()
    assert len(set(drawn[:, 0])) > 30
    assert (drawn == bootstrap_auc(np.hstack([better] * 2), np.hstack([worse] * 2), resamples=60, seed=4)).all()


def test_rows_without_a_score_do_not_count_in_a_resample() -> None:
    better, worse = np.array([[3.0], [math.nan], [5.0]]), np.array([[1.0], [math.nan]])
    drawn = bootstrap_auc(better, worse, resamples=200, seed=0)[:, 0]
    assert set(drawn[~np.isnan(drawn)]) == {1.0}
    assert 0 < np.isnan(drawn).sum() < 120  # a resample of two rows has the NaN alone in a quarter of the cases
    with pytest.raises(ValueError, match="rows on both sides"):
        bootstrap_auc(better, worse[:0], resamples=2, seed=0)


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, 2.0, 3.5, math.nan])] * 3), min_size=1, max_size=15))
def test_spearman_is_the_correlation_of_counted_ranks(rows: list[tuple[float, ...]]) -> None:
    values = np.array(rows)
    found = spearman(values)
    for i in range(3):
        for j in range(3):
            both = values[~np.isnan(values[:, i]) & ~np.isnan(values[:, j])]
            if len(both) < 2 or min(np.ptp(both[:, i]), np.ptp(both[:, j])) == 0:
                assert math.isnan(found[i, j])
            else:
                assert found[i, j] == pytest.approx(brute_spearman(values[:, i], values[:, j]), abs=1e-12)


def test_the_overlap_of_the_best_takes_the_earlier_of_equal_rows() -> None:
    a = np.array([1.0, 1.0, 1.0, 0.0])
    assert best_overlap(a, np.array([0.0, 1.0, 1.0, 1.0]), 0.5) == 0.5
    assert best_overlap(a, a * 3, 0.5) == 1.0
    assert best_overlap(a, -a, 0.25) == 0.0
    with pytest.raises(ValueError, match="no row"):
        best_overlap(a, a, 0.2)


# The page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Iterator[Scenario]:
    """A project that was run, with an external score for half of its rows, and a truth of its uids."""
    scenario = Scenario(tmp_path_factory.mktemp("study"), tiny_clip)
    uids = sorted(uid(shard, int(shard) * 100 + row) for shard in SHARDS for row in range(ROWS))
    half = pl.DataFrame({"uid": uids[::2], "given": [float(i) for i in range(len(uids[::2]))]})
    half.write_parquet(scenario.folder / "half.parquet")
    scenario.document["external_scores"] = {"half": {"files": "half.parquet", "columns": "given"}}
    scenario.set(
        "scores",
        "sparse_features",
        value={"tiny": {"targets": ["pets"], "concepts": 20, "k": 3, "steps": 5, "batch": 8}},
    )
    assert scenario.run().failures == {}
    with read_catalog(scenario.open().catalog_path()) as con:
        rows = con.sql('SELECT uid, "clip_score/tiny" AS score FROM scores ORDER BY uid').pl()
    lowest = pl.col("score").rank("ordinal")
    truth = rows.select(
        "uid",
        # What CLIPScore ranks highest is called a fault, so that it loses; the two faults differ in nothing else.
        kind=pl.when(lowest <= 20).then(pl.lit("clean")).when(lowest <= 28).then(pl.lit("off_topic")).otherwise(
            pl.lit(HOSTILE)
        ),
        variant=pl.when(lowest <= 20).then(pl.lit("")).when(lowest % 2 == 0).then(pl.lit("even")).otherwise(
            pl.lit("odd")
        ),
        wanted=lowest > 30,
    )  # fmt: skip
    strangers = truth.head(2).with_columns(uid=pl.Series(["f" * 32, "e" * 32]))
    pl.concat([truth, strangers]).write_parquet(scenario.folder / "truth.parquet")
    yield scenario
    scenario.instance.dispose()


@pytest.fixture(scope="module")
def found(made: Scenario) -> Study:
    return study(made.open(), made.folder / "truth.parquet", resamples=RESAMPLES)


def scored(scenario: Scenario) -> pl.DataFrame:
    with read_catalog(scenario.open().catalog_path()) as con:
        rows = con.sql("FROM scores ORDER BY f0, f1").pl()
    return rows.join(pl.read_parquet(scenario.folder / "truth.parquet"), on="uid", how="left", maintain_order="left")


def test_every_score_column_that_ranks_is_studied(made: Scenario, found: Study) -> None:
    columns = [c for c in scored(made).columns if "/" in c]
    assert sorted([*found.scores, *found.left_out]) == sorted(columns)
    lists = ["concepts/tiny", "concept_values/tiny"]
    assert found.left_out == ["neg_clip_loss_stderr/tiny", "nearest_target/tiny/pets", *lists]
    assert found.scores["clip_score/tiny"] == 36
    assert found.scores["external_scores/half"] == 18
    assert (found.rows, found.pool_rows, found.unknown) == (36, 36, 2)
    assert found.kinds == {"clean": 20, HOSTILE: 8, "off_topic": 8}


def test_every_auc_is_that_of_all_pairs(made: Scenario, found: Study) -> None:
    rows = scored(made)
    clean, wanted = rows["kind"] == "clean", rows["wanted"]
    sides = {(g.name, g.within): (clean, ~clean) for g in found.separations if g.name == "all faults"}
    sides[("wanted", None)] = (wanted, ~wanted)
    for kind in ("off_topic", HOSTILE):
        sides[(kind, None)] = (clean, rows["kind"] == kind)
        for variant in ("even", "odd"):
            sides[(variant, kind)] = (clean, (rows["kind"] == kind) & (rows["variant"] == variant))
    assert {(g.name, g.within) for g in found.separations} == set(sides)
    for group in found.separations:
        better, worse = sides[(group.name, group.within)]
        for name in found.scores:
            values = rows[name].cast(pl.Float64).to_numpy()
            compared = [values[side.to_numpy()] for side in (better, worse)]
            exact = pairwise_auc(*compared)
            known = [np.isfinite(side) for side in compared]
            if math.isnan(exact) or any(side.sum() < 10 and not side.all() for side in known):
                assert name not in group.auc
                continue
            assert group.auc[name].value == pytest.approx(exact, abs=1e-12)
            assert math.isnan(group.auc[name].low) or group.auc[name].low <= group.auc[name].high
        assert group.auc[group.best].value == max(f.value for f in group.auc.values())
    half = next(g for g in found.separations if g.name == "all faults").covered["external_scores/half"]
    assert half == 0.5


def test_findings_report_a_method_that_loses(found: Study) -> None:
    text_of = dict(findings(found))
    text = text_of["Off topic, 8 rows"]
    assert re.search(r"Worse than chance, ranking the fault above clean rows: [^.]*clip_score/tiny", text)
    assert not text.startswith("clip_score/tiny has the highest")
    assert "clip_score/tiny has the highest AUC, 1.000 [1.000, 1.000]" in text_of["Wanted above others, 6 rows"]


def test_agreement_is_that_of_the_catalog(made: Scenario, found: Study) -> None:
    rows, names = scored(made), list(found.scores)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            values = [rows[name].cast(pl.Float64).to_numpy() for name in (a, b)]
            assert found.spearman[i][j] == pytest.approx(brute_spearman(*values), abs=1e-12)


def test_overlaps_are_those_of_the_manifests(made: Scenario, found: Study) -> None:
    sets = {recipe: set(made.manifest(recipe)["uid"]) for recipe in ("clip_third", "paper", "inside")}
    assert found.selections == {recipe: len(uids) for recipe, uids in sets.items()}
    assert len(found.overlaps) == 3
    for o in found.overlaps:
        both = sets[o.a] & sets[o.b]
        assert (o.rows_a, o.rows_b, o.rows_both) == (len(sets[o.a]), len(sets[o.b]), len(both))
        assert o.jaccard == pytest.approx(len(both) / len(sets[o.a] | sets[o.b]))


def oracle_scores(scenario: Scenario, temperature: float, size: int, draws: int) -> np.ndarray:
    """Compute the score in float64 against the first rows of the stored draws; rows are in order of (f0, f1)."""
    lake = scenario.open().lake
    uids, *negatives = read_draws(lake.read("negatives/tiny"))
    rows = []
    for shard in SHARDS:
        table = lake.read("embeddings/tiny", shard)
        sides = (column_to_vectors(table[side]).astype(float) for side in ("image", "text"))
        rows += list(zip(zip(table["f0"].to_pylist(), table["f1"].to_pylist(), strict=True), *sides, strict=True))
    found = []
    for row, image, text in sorted(rows, key=lambda part: part[0]):
        per_draw = []
        for k in range(draws):
            images, texts = (n[k, :size].astype(float) for n in negatives)
            if row not in [tuple(u) for u in uids[k, :size].tolist()]:
                images, texts = (np.vstack([own, n[:-1]]) for own, n in ((image, images), (text, texts)))
            logs = [np.log(np.exp(s / temperature).sum()) for s in (texts @ image, images @ text)]
            per_draw.append(image @ text - temperature / 2 * sum(logs))
        found.append(np.mean(per_draw))
    return np.array(found)


def test_sets_are_measured_as_brute_force_does(made: Scenario, found: Study) -> None:
    lake = made.open().lake
    share = lake.read("target_concepts/tiny/pets")["share"].to_numpy()
    rows = made.scores("sparse_features/tiny")
    image = np.concatenate([column_to_vectors(lake.read("embeddings/tiny", shard)["image"]) for shard in SHARDS])
    whole = [("the pool", np.ones(rows.height, bool))]
    kept = {name: set(made.manifest(name).select("f0").to_series()) for name in found.selections}
    chosen = whole + [(name, np.array([f0 in kept[name] for f0 in rows["f0"]])) for name in found.selections]
    assert [(m.recipe, m.rows) for m in found.sets] == [(name, inside.sum()) for name, inside in chosen]
    for measures, (_, inside) in zip(found.sets, chosen, strict=True):
        mass = [Fraction(0)] * 20
        for concepts, values in rows.filter(inside).select("concepts", "concept_values").rows():
            for concept, value in zip(concepts, values, strict=True):
                mass[concept] += Fraction(value)
        total = sum(mass)
        q = [(m + Fraction(1, 20)) / (total + 1) for m in mass]
        divergence = sum(p * math.log(p / float(one)) for p, one in zip(share, q, strict=True) if p)
        assert measures.divergence == {"pets": pytest.approx(divergence)}
        entropy = -sum(float(m / total) * math.log(float(m / total)) for m in mass if m)
        assert measures.effective_concepts == pytest.approx(math.exp(entropy))
        cosines = image[inside].astype(np.float64) @ image[inside].astype(np.float64).T
        np.fill_diagonal(cosines, -1)
        assert measures.near_duplicates == pytest.approx((cosines.max(axis=1) >= 0.95).mean())


def test_the_page_has_a_table_of_sets(found: Study, tmp_path: Path) -> None:
    page = write_page(found, tmp_path).read_text()
    assert "Sets by the concepts of tiny" in page
    assert "KL to pets" in page
    for measures in found.sets:
        assert f"{measures.effective_concepts:,.1f}" in page


def test_every_setting_is_scored_as_its_equation_says(made: Scenario, found: Study) -> None:
    (sensitivity,) = found.sensitivities
    assert (sensitivity.score, sensitivity.rows) == ("neg_clip_loss/tiny", 36)
    assert sensitivity.largest_change == 0
    configured = sensitivity.variants[0]
    assert (configured.what, configured.batch_size, configured.draws) == ("as configured", 8, 3)
    assert (configured.spearman, configured.best_overlap) == (pytest.approx(1), 1)
    rows = scored(made)
    stored = rows["neg_clip_loss/tiny"].cast(pl.Float64).to_numpy()
    clean = (rows["kind"] == "clean").to_numpy()
    checked = [v for v in sensitivity.variants if v.what in ("as configured", "τ", "B", "K")]
    assert [v.what for v in checked] == ["as configured", "τ", "τ", "τ", "τ", "B", "K", "K"]
    for v in checked:
        exact = oracle_scores(made, v.temperature, v.batch_size, v.draws)
        assert v.spearman == pytest.approx(brute_spearman(exact, stored), abs=2e-3)
        assert v.auc["all faults"] == pytest.approx(pairwise_auc(exact[clean], exact[~clean]), abs=4e-3)
        assert v.all_faults is not None
        assert v.all_faults.value == v.auc["all faults"]
    assert {v.temperature / configured.temperature for v in checked if v.what == "τ"} == {0.25, 0.5, 2, 4}


def test_another_seed_and_the_other_estimator_are_other_scores(found: Study) -> None:
    others = {v.what: v for v in found.sensitivities[0].variants}
    assert others["estimator"].estimator == "random_partitions"
    assert others["estimator"].batch_size == 8
    for what in ("seed", "estimator"):
        assert -1 <= others[what].spearman < 1
        assert others[what].gain is not None


def test_the_same_statistics_give_the_same_bytes(made: Scenario, found: Study, tmp_path: Path) -> None:
    again = study(made.open(), made.folder / "truth.parquet", resamples=RESAMPLES)
    first, second = (write_page(made, tmp_path / name) for made, name in ((found, "a"), (again, "b")))
    assert first.read_bytes() == second.read_bytes()
    figures = [(path.parent / "figures.json").read_text() for path in (first, second)]
    assert figures[0] == figures[1]
    assert json.loads(figures[0])["kinds"] == found.kinds


def test_a_page_loads_nothing_and_labels_stay_inert(found: Study, tmp_path: Path) -> None:
    text = write_page(found, tmp_path / "page").read_text()
    assert "<script" not in text
    assert html.escape(HOSTILE) in text
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', text))
    assert not re.findall(r"(?:href|url\()", text)
    assert text.count("<img") == 4
    assert "external_scores/half (18 rows)" in text


def test_without_a_truth_the_page_has_no_auc(made: Scenario, tmp_path: Path) -> None:
    config = str(made.folder / "project.yaml")
    assert cli.main(["study", config, "--into", str(tmp_path / "page")]) == 0
    text = re.sub(r'src="[^"]*"', "", (tmp_path / "page/index.html").read_text())
    figures = json.loads((tmp_path / "page/figures.json").read_text())
    assert figures["separations"] == []
    assert "No truth was given" in text
    assert "AUC" not in text
    assert "Separation" not in text
    assert text.count("<img") == 3


def test_no_more_rows_are_studied_than_asked_for_and_always_the_same(made: Scenario) -> None:
    rows = scored(made)
    hashes = keyed_hash(0, 0, rows["f0"].to_numpy(), rows["f1"].to_numpy())
    chosen = rows[np.sort(np.argsort(hashes)[:20])]
    few = study(made.open(), made.folder / "truth.parquet", rows=20, resamples=2)
    assert few.rows == 20
    assert few.kinds == dict(chosen["kind"].value_counts().iter_rows())
    assert few.sensitivities[0].rows == 20


def test_a_single_row_has_a_page_without_correlations(made: Scenario, tmp_path: Path) -> None:
    single = study(made.open(), rows=1)
    assert single.rows == 1
    assert np.isnan(single.spearman).all()
    assert "the pool's 36" in html.unescape(write_page(single, tmp_path).read_text())


def test_the_caller_may_name_the_columns_that_rank(made: Scenario) -> None:
    ranking = ["external_scores/half", "clip_score/tiny", "absent/tiny"]
    found = study(made.open(), ranking=ranking, rows=10, resamples=2)
    assert set(found.scores) == {"external_scores/half", "clip_score/tiny"}
    assert "norm_sim_inf/tiny/pets" in found.left_out


def test_the_papers_estimator_is_studied_beside_reference_negatives(scenario: Scenario) -> None:
    scenario.set(
        "scores", "neg_clip_loss", "tiny", value={"batch_size": 6, "draws": 2, "estimator": "random_partitions"}
    )
    assert scenario.run().failures == {}
    (sensitivity,) = study(scenario.open()).sensitivities
    configured, other = sensitivity.variants[0], sensitivity.variants[-1]
    assert (configured.estimator, other.estimator) == ("random_partitions", "reference_negatives")
    assert (other.batch_size, other.draws) == (6, 2)
    assert sensitivity.largest_change > 0  # of other partitions


def refused(scenario: Scenario, truth: Any, tmp_path: Path) -> str:
    path = tmp_path / "wrong.parquet"
    truth.write_parquet(path) if isinstance(truth, pl.DataFrame) else path.write_bytes(truth)
    with pytest.raises(StudyError) as error:
        study(scenario.open(), path)
    assert str(path) in str(error.value)
    assert "Remedy" in str(error.value)
    return str(error.value)


def test_a_truth_that_is_wrong_is_refused_with_the_reason(
    made: Scenario, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = pl.read_parquet(made.folder / "truth.parquet")
    assert "not a parquet file" in refused(made, b"no parquet", tmp_path)
    assert "'kind'" in refused(made, truth.drop("kind"), tmp_path)
    assert "'uid'" in refused(made, truth.with_columns(uid=1), tmp_path)
    assert "two kinds" in refused(made, pl.concat([truth, truth.with_columns(kind=pl.lit("x"))]), tmp_path)
    assert "'clean'" in refused(made, truth.filter(pl.col("kind") != "clean"), tmp_path)
    assert "no row of the pool" in refused(made, truth.with_columns(uid=pl.lit("a" * 30) + "00").head(1), tmp_path)
    config, wrong = str(made.folder / "project.yaml"), str(tmp_path / "absent.parquet")
    assert cli.main(["study", config, "--truth", wrong, "--into", str(tmp_path / "page")]) == 2
    assert "absent.parquet" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()
