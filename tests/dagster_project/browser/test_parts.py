"""Recipes on a part of a pool that is larger than the budget: the verdicts of the whole pool, and scaled counts."""

import itertools
import threading
from collections.abc import Iterator

import numpy as np
import polars as pl
import pytest
import yaml

from dagster_project.browser.memory import Memory
from dagster_project.browser.parts import Part, first_part
from dagster_project.browser.queries import BrowseError, Table
from dagster_project.browser.trial import Scale, Trial
from dagster_project.browser.trials import NOW, Trials, as_yaml
from tests.support.browse_site import Site, open_site
from tests.support.scenario import ROWS, SHARDS, FinishedPass, Scenario, keep

ALL, JUDGED = ROWS * len(SHARDS), ROWS * 2
CLIP, NEG, NORM = "clip_score/tiny", "neg_clip_loss/tiny", "norm_sim_inf/tiny/pets"
ORDERS = {"weighted": {CLIP: 1.0, NEG: 0.5}, "normalise": "z_score"}
RECIPES = {
    "thresholds": [{"where": f'"{CLIP}" > -0.9'}, {"keep_top": {**ORDERS, "fraction": 0.6}}, keep(NORM, count=9)],
    "one": [keep(CLIP, count=1)],
    "duplicates": [{"deduplicate": {"by": "width", "best": CLIP}}, keep(NEG, fraction=0.2)],
    "sets": [keep(NEG, fraction=0.7), {"except": "clip_third"}, {"union": "inside"}, keep(NORM, fraction=0.3)],
    "balanced": [{"balance": {"concepts": "caption", "cap": 9}}, keep(CLIP, fraction=0.2)],
    "drawn": [keep(CLIP, fraction=0.9), {"soft_cap_sample": {"score": NEG, "count": 20, "batch": 6}}],
    "strata": [keep(CLIP, fraction=0.9), {"stratify": {"by": "image_format", "score": NEG, "count": 11}}],
    "ranks": [{"keep_top": {"rank_sum": [CLIP, NEG], "fraction": 0.7}}, keep(NORM, fraction=0.3)],
}
KNOWN_OF_EVERY_ROW = sorted(RECIPES.keys() - {"ranks"})


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, tiny_clip, finished_pass: FinishedPass) -> Iterator[Scenario]:
    """Yield a project of which two shards of three are within the budget."""
    scenario = Scenario(tmp_path_factory.mktemp("large"), tiny_clip)
    finished_pass.restore(scenario)
    scenario.document["recipes"] |= {name: {"steps": steps} for name, steps in RECIPES.items()}
    assert scenario.run().failures == {}
    yield scenario
    scenario.instance.dispose()


@pytest.fixture(scope="module")
def trials(large: Scenario) -> Trials:
    return Trials(Table(large.open()), JUDGED)


@pytest.fixture(scope="module")
def whole(large: Scenario) -> Trials:
    return Trials(Table(large.open()))


@pytest.fixture(scope="module")
def site(large: Scenario) -> Iterator[Site]:
    with open_site(large.open(), JUDGED) as opened:
        yield opened


def verdicts(trial: Trial) -> dict[tuple[int, int], int]:
    """Return by uid the step that dropped the row, 0 for none."""
    return {(f0, f1): dropped for f0, f1, dropped in pl.from_arrow(trial.rows).select("f0", "f1", "dropped").rows()}


def in_part(scenario: Scenario, trials: Trials, name: str) -> pl.DataFrame:
    """Return the rows of a version's manifest that are in the judged shards."""
    return scenario.manifest(name).filter(pl.col("shard").is_in(trials.part((name, None)).shards))


@pytest.mark.parametrize("name", KNOWN_OF_EVERY_ROW)
def test_a_judged_row_has_the_verdict_that_it_has_in_the_whole_pool(trials: Trials, whole: Trials, name: str) -> None:
    judged, wanted = verdicts(trials.of(name)), verdicts(whole.of(name))
    assert len(judged) == JUDGED
    assert judged == {uid: wanted[uid] for uid in judged}


@pytest.mark.parametrize("name", RECIPES)
def test_with_nothing_changed_nothing_enters_or_leaves(large: Scenario, trials: Trials, site: Site, name: str) -> None:
    found = site.json("/api/trial", recipe=name)
    steps = large.subset(name).lineage["steps"]
    assert [(step["entered"], step["kept"], step["left"]) for step in found["steps"]] == [
        (step["entered"], step["kept"], step["left"]) for step in steps
    ]
    assert [step["threshold"] for step in found["steps"]] == [step["threshold"] for step in steps]
    assert (found["enter"]["total"], found["leave"]["total"]) == (0, 0)
    assert found["rows"] == found["current"] == found["overlap"] == steps[-1]["kept"]
    assert not any(step["about"] for step in found["steps"])
    kept = trials.kept(name)
    assert set(kept["f0"].to_pylist()) == set(in_part(large, trials, name)["f0"])


def test_rows_that_a_step_by_ranks_and_later_ones_dropped_are_counted_together(
    large: Scenario, trials: Trials, site: Site
) -> None:
    steps = large.subset("ranks").lineage["steps"]
    found = trials.of("ranks")
    assert found.dropped_rows(1) == sum(step["left"] for step in steps) == ALL - found.kept_rows
    assert len(found.dropped_at(1)) + len(found.kept) == JUDGED
    assert site.json("/api/count", recipe="ranks", member="dropped", step="1")["total"] == ALL - found.kept_rows
    with pytest.raises(BrowseError, match="which rows step 2 dropped and which step 1"):
        found.dropped_rows(2)
    with pytest.raises(BrowseError, match="records no value of single rows for step 1"):
        found.near(1)
    assert trials.of("sets").dropped_rows(4) == large.subset("sets").lineage["steps"][3]["left"]


def test_a_step_that_was_not_changed_stays_the_same_when_a_later_one_is(
    large: Scenario, trials: Trials, whole: Trials
) -> None:
    looser = trials.changed("sets", {4: ("fraction", 0.32)})
    found, wanted = verdicts(trials.run("sets", looser)), verdicts(whole.of("sets"))
    assert {uid for uid, step in found.items() if step in (1, 2)} == {uid for uid in found if wanted[uid] in (1, 2)}
    assert trials.run("sets", looser).steps[2]["kept"] == large.subset("sets").lineage["steps"][2]["kept"]


def test_a_changed_threshold_has_the_verdicts_of_the_whole_pool_and_scaled_counts(
    trials: Trials, whole: Trials, site: Site
) -> None:
    limit = float(np.sort(whole.of("clip_third").rows["value1"].to_numpy())[ALL // 2])
    recipe = trials.changed("clip_third", {1: ("threshold", limit)})
    judged, wanted = verdicts(trials.run("clip_third", recipe)), verdicts(whole.run("clip_third", recipe))
    assert judged == {uid: wanted[uid] for uid in judged}
    version = trials.of("clip_third")
    kept, more = len(version.kept), sum(not step for step in judged.values()) - len(version.kept)
    entering = round(more * (ALL - version.kept_rows) / (JUDGED - kept))
    found = site.json("/api/trial", recipe="clip_third", limit1=f"threshold:{limit!r}")
    (step,) = found["steps"]
    assert (step["entered"], step["about_entered"]) == (ALL, False)
    assert (step["kept"], step["about"]) == (version.kept_rows + entering, True)
    assert found["enter"]["total"] == entering > 0
    assert found["leave"]["total"] == 0
    start = (
        f"Judged on {JUDGED} of {ALL} rows: whole shards, in the order of a keyed hash; counts are scaled to the pool"
    )
    assert found["note"].startswith(f"{start}, about ± ")


def test_rows_of_the_pool_are_interpolated_between_known_numbers() -> None:
    scale = Scale.through((10, 30), (20, 50), (15, 20), (40, 120))
    assert [scale.to_pool(rows) for rows in (0, 5, 10, 15, 20, 30, 40)] == [0, 15, 30, 40, 50, 85, 120]
    assert [scale.to_part(rows) for rows in (0, 15, 30, 40, 50, 85, 120, 240)] == [0, 5, 10, 15, 20, 30, 40, 80]
    assert (Scale().to_pool(7), Scale().to_part(7), Scale.through((0, 0)).to_pool(7)) == (7, 7, 7)


def test_limits_in_rows_are_scaled_and_shown_and_copied_as_they_are(trials: Trials, site: Site) -> None:
    found = site.json("/api/trial", recipe="thresholds", limit3="count:6")
    step = found["steps"][2]
    assert (step["kept"], step["about"], step["text"]) == (6, False, f"keep the top 6 by {NORM}")
    assert 0 < step["sampled"] < 6
    assert yaml.safe_load(found["yaml"])["recipes"]["thresholds_tried"]["steps"][2] == keep(NORM, count=6)
    found = site.json("/api/trial", recipe="drawn", limit1="fraction:0.8")
    drawn = yaml.safe_load(found["yaml"])["recipes"]["drawn_tried"]["steps"][1]["soft_cap_sample"]
    assert (drawn["count"], drawn["batch"]) == (20, 6)
    changed = trials.changed("balanced", {2: ("fraction", 0.3)})
    assert "cap: 9" in as_yaml("balanced", changed)
    assert trials.run("balanced", changed).recipe == changed


def test_without_a_version_limits_are_shares_of_the_part(large: Scenario) -> None:
    large.set("recipes", "new", value={"steps": [keep(CLIP, fraction=0.5)]})
    try:
        fresh = Trials(Table(large.open()), JUDGED)
        found = fresh.run("new")
        assert (found.kept_rows, len(found.kept)) == (ALL // 2, JUDGED // 2)
        assert found.steps[0]["basis"] == ALL
        assert fresh.run("new", fresh.changed("new", {1: ("count", 3.0)})).kept_rows == 3
        with pytest.raises(BrowseError, match=r"none of the .* rows that entered stays.*Judged on 24 of 36 rows"):
            fresh.run("new", fresh.changed("new", {1: ("threshold", 5.0)}))
    finally:
        del large.document["recipes"]["new"]
        large.open()


def test_limits_are_those_of_the_version_also_behind_a_new_step(large: Scenario) -> None:
    wanted = large.document["recipes"]["paper"]
    large.set("recipes", "paper", value={"steps": [{"where": "width > 0"}, *wanted["steps"]]})
    try:
        with open_site(large.open(), JUDGED) as site:
            found = site.json("/api/trial", recipe="paper")
    finally:
        large.set("recipes", "paper", value=wanted)
        large.open()
    assert [step["kept"] for step in found["steps"][1:]] == [ALL // 2, ALL // 4]
    assert (found["enter"]["total"], found["leave"]["total"], found["overlap"]) == (0, 0, ALL // 4)


def test_the_grid_shows_rows_of_the_part_with_the_number_in_the_pool(
    large: Scenario, trials: Trials, site: Site
) -> None:
    steps = large.subset("paper").lineage["steps"]
    found = site.rows(recipe="paper")
    assert {row["uid"] for row in found["rows"]} == set(in_part(large, trials, "paper")["uid"])
    assert (found["total"], found["about"]) == (steps[-1]["kept"], False)
    assert found["note"].startswith(f"Shown are rows among {JUDGED} of {ALL} rows: whole shards")
    dropped = site.rows(recipe="paper", member="dropped", step=1)
    assert (dropped["total"], dropped["about"]) == (steps[0]["left"], False)
    assert {row["shard"] for row in dropped["rows"]} == set(trials.part(("paper", None)).shards)
    assert site.rows(recipe="paper", where="width > 0")["about"]
    near = site.rows(recipe="paper", member="near", step=2)
    assert 0 < len(near["rows"]) <= JUDGED
    (other,) = set(SHARDS) - set(trials.part(("paper", None)).shards)
    alone = site.rows(recipe="paper", shard=other)
    assert {row["uid"] for row in alone["rows"]} == set(large.manifest("paper").filter(shard=other)["uid"])
    assert (alone["total"], alone["note"]) == (len(alone["rows"]), "")


def test_a_comparison_is_scaled_from_the_same_shards(large: Scenario, trials: Trials, site: Site) -> None:
    page = site.text("/compare?left=clip_third&right=paper")
    assert f"Judged on {JUDGED} of {ALL} rows: whole shards, in the order of a keyed hash; counts are scaled" in page
    assert "scaled to the pool, about ± " in page
    assert "scaled to the pool.<" in site.text("/compare?left=paper&right=paper:v0001")
    left, right = (set(in_part(large, trials, name)["uid"]) for name in ("clip_third", "paper"))
    total = large.subset("clip_third").lineage["rows"]
    assert f"Only in clip_third: about {round(len(left - right) * total / len(left))}<" in page
    assert "In both: about" in page
    assert "about" in page.partition("dropped at step")[0].rpartition("<li>")[2]


def test_rows_of_a_version_are_found_by_uid_where_its_scores_are_gone(large: Scenario, trials: Trials) -> None:
    context = large.open()
    fresh = Trials(Table(context), JUDGED)
    path = context.lake.path("neg_clip_loss/tiny", fresh.part(("paper", None)).shards[0])
    with open(path, "rb") as file:
        content = file.read()
    context.lake.store.delete(path)
    try:
        assert set(fresh.kept("paper")["f0"].to_pylist()) == set(in_part(large, trials, "paper")["f0"])
        tried = fresh.run("paper", part=fresh.part(("paper", NOW), ("paper", None)))
        assert (tried.is_estimated, tried.source_rows, tried.pool_rows) == (True, ROWS, 2 * ROWS)
        assert [step["kept"] for step in tried.steps] == [ROWS, ROWS // 2]
    finally:
        context.lake.put(path, content)


def test_a_part_has_rows_and_no_more_shards_than_fit() -> None:
    sizes = {f"{number:05d}": 10 * (number % 3) for number in range(30)}
    for budget in (1, 25, 60, 1000):
        part = first_part(sizes, budget)
        assert part.rows == sum(sizes[shard] for shard in part.shards) > 0
        assert part.rows <= max(budget, 20)
        assert part.is_whole == (budget == 1000)
    assert first_part(sizes, 60).shards == first_part(sizes, 1000).shards[: len(first_part(sizes, 60).shards)]
    assert first_part(sizes, 1, first="00002").shards[0] == "00002"


def test_the_stated_error_is_that_of_all_samples_of_shards() -> None:
    counted, rows, m = np.array([310, 250, 420, 390, 120, 505]) * 10_000, 6_000_000, 3
    samples = [list(some) for some in itertools.combinations(range(len(counted)), m)]
    part = Part(("a",) * m, rows * m, rows * len(counted), len(counted))
    errors = [part.error(counted[some].tolist(), [rows] * m, part.total) for some in samples]
    estimates = np.array([counted[some].mean() * len(counted) for some in samples])
    true = np.mean((estimates - counted.sum()) ** 2)
    assert np.mean((np.array(errors) / 2.0) ** 2) == pytest.approx(true, rel=1e-6)
    assert part.error([5, 5, 5], [9, 9, 9], 1e6) == 0
    assert Part(("a",), 1, 9, 9).error([1], [1], 9) == 0
    assert part.random_error(10_000) == round(2 * 2.0 * np.sqrt(10_000 * 0.5))


def test_results_are_kept_up_to_a_number_of_bytes_and_computed_once() -> None:
    memory: Memory[bytes] = Memory(len, most=10)
    for key in "abc":
        assert memory.once(key, lambda key=key: key.encode() * 4) == key.encode() * 4
    assert memory.bytes == 8
    assert memory.once("a", lambda: b"again") == b"again", "the oldest was dropped"
    assert memory.once("c", lambda: b"never") == b"cccc"
    assert memory.once("large", lambda: b"l" * 99) == b"l" * 99
    assert memory.bytes == 99


def test_known_results_do_not_wait_for_one_that_is_computed() -> None:
    memory: Memory[str] = Memory(len, most=99)
    memory.once("known", lambda: "known")
    begun, ended = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        assert ended.wait(60)
        return "slow"

    thread = threading.Thread(target=memory.once, args=("slow", slow))
    thread.start()
    assert begun.wait(60)
    assert memory.once("known", lambda: "again") == "known"
    ended.set()
    thread.join(60)
    assert memory.once("slow", lambda: "again") == "slow"
