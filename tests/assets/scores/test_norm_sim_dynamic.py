"""NormSim_2-D against its definition in float64; resuming a killed run; recipes that use it."""

import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.base.partitioned import PartitionedAsset
from assets.base.results import Result
from assets.reproduction import choose_again, rebuild
from assets.settings import ConfigError
from dagster_project.headless import Outcome
from resources.lake.files import LakeError, column_to_vectors
from selection.scores import norm_sim_dynamic
from selection.scores.norm_sim_dynamic import ExactMoment, Part, Round, dynamic_rounds
from tests.support.automation import Automation
from tests.support.scenario import ROWS, SHARDS, Scenario, keep
from tests.support.steps import begin_shards

CPU = torch.device("cpu")


def embeddings(rows: int, width: int = 12, *, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, width)) + 0.5
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def uids(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    words = np.random.default_rng(seed + 1000).integers(0, 2**64, (2, rows), dtype=np.uint64)
    return words[0], words[1]


def parts_of(
    vectors: np.ndarray, f0: np.ndarray, f1: np.ndarray, cuts: list[int], outside: tuple[int, ...] = ()
) -> list[Part]:
    edges = [0, *cuts, len(vectors)]
    left = np.full(len(vectors), 1, np.int32)
    left[list(outside)] = 0
    parts = []
    for start, stop in pairwise(edges):
        at = slice(start, stop)
        parts.append(
            Part(
                lambda at=at: vectors[at],
                lambda at=at: (f0[at], f1[at]),
                left[at].copy(),
                np.zeros(stop - start, np.float32),
            )
        )
    return parts


def left_in(parts: list[Part]) -> np.ndarray:
    return np.concatenate([part.left for part in parts])


def by_the_definition(vectors: np.ndarray, f0: np.ndarray, f1: np.ndarray, keep: int, rounds: int) -> np.ndarray:
    """Compute the rounds in float64: sum the moment again in every round, sort the rows, drop the lowest."""
    wide = vectors.astype(np.float64)
    left = np.full(len(wide), rounds + 1)
    step = math.ceil((len(wide) - keep) / rounds)
    for number in range(1, rounds + 1):
        rows = np.flatnonzero(left == rounds + 1)
        moment = wide[rows].T @ wide[rows]
        scores = np.einsum("nd,de,ne->n", wide[rows], moment, wide[rows])
        order = np.lexsort((~f1[rows], ~f0[rows], scores))
        left[rows[order[: min(step, len(rows) - keep)]]] = number
    return left


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("rows", "keep", "rounds"), [(90, 60, 7), (40, 1, 39), (64, 60, 100), (50, 20, 1)])
def test_rows_leave_in_the_rounds_of_the_definition(seed: int, rows: int, keep: int, rounds: int) -> None:
    vectors, words = embeddings(rows, seed=seed), uids(rows, seed)
    parts = parts_of(vectors, *words, cuts=[rows // 3, rows // 2])
    done = list(dynamic_rounds(parts, keep=keep, rounds=rounds, device=CPU))
    np.testing.assert_array_equal(left_in(parts), by_the_definition(vectors, *words, keep, rounds))
    assert sum(round.left for round in done) == rows - keep
    assert all(round.left == math.ceil((rows - keep) / rounds) for round in done[:-1])


@given(
    rows=st.integers(2, 80),
    width=st.integers(1, 40),
    share=st.floats(0.01, 1),
    rounds=st.integers(1, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_no_row_that_stays_in_a_round_scores_below_one_that_leaves(
    rows: int, width: int, share: float, rounds: int, seed: int
) -> None:
    vectors, words = embeddings(rows, width, seed=seed), uids(rows, seed)
    keep = max(1, int(rows * share))
    parts = parts_of(vectors, *words, cuts=[rows // 2])
    done = list(dynamic_rounds(parts, keep=keep, rounds=rounds, device=CPU))
    left, wide = left_in(parts), vectors.astype(np.float64)
    assert (left == rounds + 1).sum() == keep
    for round in done:
        inside = wide[left >= round.round]
        scores = np.linalg.norm(wide @ inside.T, axis=1)
        goes, stays = left == round.round, left > round.round
        slack = 3e-6 * math.sqrt(len(inside))
        assert scores[goes].max() <= scores[stays].min() + slack
        assert round.threshold == pytest.approx(scores[goes].max(), abs=slack)
        assert (round.entered, round.left) == (len(inside), goes.sum())


def test_scores_are_those_of_the_last_round_that_a_row_took_part_in() -> None:
    vectors, words = embeddings(60, seed=3), uids(60)
    parts = parts_of(vectors, *words, cuts=[25], outside=(4, 40))
    list(dynamic_rounds(parts, keep=30, rounds=5, device=CPU))
    left, wide = left_in(parts), vectors.astype(np.float64)
    expected = np.zeros(60)
    for row in np.flatnonzero(left):
        expected[row] = np.linalg.norm(wide[left >= left[row]] @ wide[row])
    np.testing.assert_allclose(np.concatenate([part.score for part in parts]), expected, atol=1e-5)
    assert left[[4, 40]].tolist() == [0, 0]


def test_of_equal_rows_the_larger_uids_leave_first() -> None:
    rows = 40
    vectors = np.repeat(embeddings(1), rows, axis=0)
    f0 = np.repeat(np.arange(5, dtype=np.uint64) << np.uint64(61), 8)
    f1 = np.random.default_rng(0).permutation(rows).astype(np.uint64)
    parts = parts_of(vectors, f0, f1, cuts=[7, 21])
    done = list(dynamic_rounds(parts, keep=11, rounds=3, device=CPU))
    order = np.lexsort((f1, f0))
    np.testing.assert_array_equal(left_in(parts)[order], [4] * 11 + [3] * 9 + [2] * 10 + [1] * 10)
    smallest_gone = order[30]
    assert (done[0].tie_f0, done[0].tie_f1) == (f0[smallest_gone], f1[smallest_gone])


def test_it_does_not_matter_how_rows_are_parted() -> None:
    vectors, words = embeddings(300, 32, seed=5), uids(300)
    whole, parted = parts_of(vectors, *words, cuts=[]), parts_of(vectors, *words, cuts=[1, 2, 150, 150])
    assert list(dynamic_rounds(whole, keep=100, rounds=9, device=CPU)) == list(
        dynamic_rounds(parted, keep=100, rounds=9, device=CPU)
    )
    np.testing.assert_array_equal(left_in(whole), left_in(parted))
    np.testing.assert_array_equal(whole[0].score, np.concatenate([part.score for part in parted]))


@pytest.mark.parametrize("killed_after", [0, 1, 4, 9])
def test_a_run_that_was_cut_short_goes_on_behind_its_last_whole_round(killed_after: int) -> None:
    vectors, words = embeddings(200, seed=7), uids(200)
    straight = parts_of(vectors, *words, cuts=[90])
    wanted = list(dynamic_rounds(straight, keep=50, rounds=10, device=CPU))

    parts = parts_of(vectors, *words, cuts=[90])
    run = dynamic_rounds(parts, keep=50, rounds=10, device=CPU)
    done = [next(run) for _ in range(killed_after)]
    for part in parts:  # the next round had begun, and was not finished
        part.left[part.left > killed_after] = np.where(
            np.arange((part.left > killed_after).sum()) % 3, 11, killed_after + 1
        )
    again: list[Round] = list(dynamic_rounds(parts, keep=50, rounds=10, device=CPU, done=done))
    assert done + again == wanted
    np.testing.assert_array_equal(left_in(parts), left_in(straight))


def test_the_moment_is_exact_and_subtracting_rows_leaves_no_trace() -> None:
    vectors = np.concatenate([embeddings(300, 5), np.float16([[1, -1, 6e-8, -6e-8, 0.333]])])
    moment = ExactMoment(5, CPU)
    moment.add(torch.from_numpy(vectors))
    for row, column in [(0, 0), (0, 3), (2, 3), (4, 1)]:
        exact = sum(Fraction(float(v[row])) * Fraction(float(v[column])) for v in vectors)
        assert moment.value()[row, column].item() == pytest.approx(float(exact), rel=1e-15, abs=0)
    moment.add(torch.from_numpy(vectors[100:]), sign=-1)
    others = ExactMoment(5, CPU)
    others.add(torch.from_numpy(vectors[:100][::-1].copy()))
    assert torch.equal(moment.value(), others.value())


def test_fewer_rows_than_shall_stay_are_refused() -> None:
    parts = parts_of(embeddings(10), *uids(10), cuts=[], outside=(0,))
    with pytest.raises(ValueError, match="has 9 rows, fewer than the 10"):
        next(dynamic_rounds(parts, keep=10, rounds=2, device=CPU))


# In the graph

TOLD = "norm_sim_dynamic/tiny"


def ask_for(scenario: Scenario, **settings: object) -> None:
    scenario.set("scores", "norm_sim_dynamic", value={"tiny": {"keep": 0.25, "rounds": 4, **settings}})
    scenario.set("recipes", "pruned", value={"steps": [keep(TOLD, fraction=0.25)]})


def expected(scenario: Scenario, begins: set[str] | None = None, *, stay: int, rounds: int = 4) -> dict[str, int]:
    """Return the round in which each row leaves by uid, from the definition."""
    lake = scenario.open().lake
    pool = pl.concat([pl.from_arrow(lake.read("raw_pool", shard, ["uid", "f0", "f1"])) for shard in SHARDS])
    vectors = np.concatenate([column_to_vectors(lake.read("embeddings/tiny", shard)["image"]) for shard in SHARDS])
    inside = np.array([begins is None or uid in begins for uid in pool["uid"]])
    left = np.zeros(len(pool), np.int64)
    words = pool["f0"].to_numpy()[inside], pool["f1"].to_numpy()[inside]
    left[inside] = by_the_definition(vectors[inside], *words, stay, rounds)
    return dict(zip(pool["uid"], left.tolist(), strict=True))


def found(scenario: Scenario) -> dict[str, int]:
    told = scenario.scores(TOLD)
    return {f"{f0:016x}{f1:016x}": left for f0, f1, left in told.select("f0", "f1", "norm_sim_dynamic").rows()}


@pytest.mark.usefixtures("finished")
def test_a_recipe_keeps_the_rows_that_stay(scenario: Scenario) -> None:
    ask_for(scenario)
    assert scenario.run().failures == {}
    wanted = expected(scenario, stay=9)
    assert found(scenario) == wanted
    assert set(scenario.manifest("pruned")["uid"]) == {uid for uid, left in wanted.items() if left == 5}
    assert scenario.subset("pruned").lineage["steps"][0]["threshold"] == 5
    assert "dynamic_rounds/tiny" in scenario.subset("pruned").lineage["inputs"]
    told = pl.from_arrow(scenario.open().lake.read("dynamic_rounds/tiny"))
    assert told.select("round", "entered", "left").rows() == [(1, 36, 7), (2, 29, 7), (3, 22, 7), (4, 15, 6)]


@pytest.mark.usefixtures("finished")
def test_it_may_begin_with_what_another_recipe_chose(scenario: Scenario) -> None:
    ask_for(scenario, of="subset/clip_third", keep=0.2)
    scenario.set(
        "recipes",
        "pruned",
        value={"steps": [keep("clip_score/tiny", fraction=0.34), keep(TOLD, fraction=0.2)]},
    )
    assert scenario.run().failures == {}
    wanted = expected(scenario, set(scenario.manifest("clip_third")["uid"]), stay=7)
    assert found(scenario) == wanted
    assert set(scenario.manifest("pruned")["uid"]) == {uid for uid, left in wanted.items() if left == 5}
    stored = scenario.open().lake.stored("dynamic_rounds/tiny")
    assert stored is not None
    assert {n: stored.summary[n] for n in ("pool_rows", "began_with", "kept")} == {
        "pool_rows": 36,
        "began_with": 12,
        "kept": 7,
    }


@pytest.mark.usefixtures("finished")
def test_a_score_reads_the_rounds_that_it_began_with_while_others_are_begun(scenario: Scenario) -> None:
    ask_for(scenario)
    assert scenario.run().failures == {}
    _, graph = scenario.open_graph()
    (score,) = (node for node in graph.nodes if node.key == TOLD)
    assert isinstance(score, PartitionedAsset)
    before = scenario.scores(TOLD, ["00001"])["norm_sim_dynamic"].to_list()
    shards = ["00000", "00001"]
    computed = score.compute(begin_shards(score, shards), shards)
    next(iter(computed))
    scenario.set("scores", "norm_sim_dynamic", "tiny", "rounds", value=2)
    assert scenario.run().failures == {}
    assert scenario.scores(TOLD, ["00001"])["norm_sim_dynamic"].to_list() != before
    ((_, found),) = computed
    assert isinstance(found, Result)
    assert found.table["norm_sim_dynamic"].to_pylist() == before


def test_the_papers_recipe_is_a_file(scenario: Scenario) -> None:
    file = Path(__file__).resolve().parents[3] / "config/recipes/neg_clip_loss_30_norm_sim_2d_20.yaml"
    ask_for(scenario, of="subset/first", keep=0.2)
    scenario.set("recipes", "first", value={"steps": [keep("neg_clip_loss/tiny", fraction=0.3)]})
    scenario.set("recipes", "pruned", value={"file": str(file), "names": {"encoder": "tiny"}})
    assert scenario.run().failures == {}
    lineage = scenario.subset("pruned").lineage
    assert [(step["entered"], step["kept"]) for step in lineage["steps"]] == [(36, 10), (10, 7)]
    assert lineage["steps"][1]["threshold"] == 5  # all that stayed, and no other


@pytest.mark.usefixtures("finished")
def test_explain_says_in_which_round_a_sample_left(scenario: Scenario) -> None:
    ask_for(scenario)
    scenario.run()
    uid, left = next((uid, left) for uid, left in found(scenario).items() if left == 2)
    with duckdb.connect(str(scenario.folder / "lake/catalog.duckdb"), read_only=True) as con:
        rows = con.execute("SELECT score, value, threshold, verdict FROM explain(?) WHERE recipe = 'pruned'", [uid])
        assert rows.fetchall()[1:] == [(TOLD, float(left), 5.0, "dropped")]


@pytest.mark.usefixtures("finished")
def test_nothing_is_done_again_when_nothing_changed(scenario: Scenario) -> None:
    ask_for(scenario, of="subset/clip_third", keep=0.2)
    scenario.run()
    before = scenario.files()
    assert scenario.run().computed == {}
    assert scenario.files() == before


@pytest.mark.usefixtures("finished")
def test_a_new_shard_begins_the_rounds_anew(scenario: Scenario) -> None:
    ask_for(scenario)
    scenario.run()
    scenario.write_shard("00007")
    outcome = scenario.run()
    assert outcome.failures == {}
    assert outcome.computed["dynamic_rounds/tiny"] == []
    assert outcome.computed[TOLD] == [*SHARDS, "00007"]
    assert scenario.subset("pruned").lineage["rows"] == 4 * ROWS // 4


@pytest.mark.usefixtures("finished")
def test_other_rows_to_begin_with_begin_the_rounds_anew(scenario: Scenario) -> None:
    ask_for(scenario, of="subset/clip_third", keep=0.2)
    scenario.run()
    scenario.set("recipes", "clip_third", value={"steps": [keep("clip_score/tiny", fraction=0.5)]})
    outcome = scenario.run()
    assert outcome.failures == {}
    assert {"subset/clip_third", "dynamic_rounds/tiny", TOLD, "subset/pruned"} <= set(outcome.computed)
    assert found(scenario) == expected(scenario, set(scenario.manifest("clip_third")["uid"]), stay=7)


def test_a_uid_that_is_in_two_shards_counts_once(scenario: Scenario) -> None:
    scenario.write_shard("00001", meta={"uid": "f" * 32})
    scenario.write_shard("00002", meta={"uid": "f" * 32})
    ask_for(scenario)
    scenario.run()
    told = scenario.scores(TOLD).filter(pl.col("f0") == 2**64 - 1)
    assert told["shard"].to_list() == ["00001", "00002"]
    assert told["norm_sim_dynamic"][0] > 0
    assert told["norm_sim_dynamic"][1] == 0
    stored = scenario.open().lake.stored("dynamic_rounds/tiny")
    assert stored is not None
    assert (stored.summary["pool_rows"], stored.summary["kept"]) == (35, 8)


def test_a_killed_run_goes_on_behind_its_last_whole_round(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_for(scenario)
    scored: list[int] = []

    def run(dies_at: int) -> Outcome:
        def on_progress(asset: str, _: str, rows: int) -> None:
            if asset == "dynamic_rounds/tiny":
                scored.append(rows)
                if len(scored) == dies_at:
                    raise RuntimeError("no power")

        return scenario.run(progress=on_progress)

    monkeypatch.setattr(norm_sim_dynamic, "GROUP_ROWS", 1)  # a part of a round for each shard
    assert "no power" in run(dies_at=2 * len(SHARDS) + 2).failures["dynamic_rounds/tiny"]
    assert scenario.open().lake.stored("dynamic_rounds/tiny") is None
    scored.clear()
    assert run(dies_at=0).failures == {}
    assert sum(scored) == 22 + 15 + 9  # rounds 3 and 4, and those that stay
    assert found(scenario) == expected(scenario, stay=9)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("pruned", "recipe 'pruned' reads norm_sim_dynamic/tiny"),
        ("outer", "recipe 'pruned' reads norm_sim_dynamic/tiny"),
        ("none", "there is no recipe 'none'"),
    ],
)
def test_rounds_that_begin_with_what_rests_on_them_are_refused(scenario: Scenario, recipe: str, message: str) -> None:
    ask_for(scenario, of=f"subset/{recipe}")
    scenario.set("recipes", "outer", value={"from": "pruned", "steps": [keep("clip_score/tiny", count=2)]})
    with pytest.raises(ConfigError, match=f"scores.norm_sim_dynamic.tiny.of: {message}"):
        scenario.open()


@pytest.mark.usefixtures("finished")
def test_more_rows_to_keep_than_there_are_to_begin_with_are_refused(scenario: Scenario) -> None:
    ask_for(scenario, of="subset/clip_third", keep=0.9)
    assert "has 12 rows, fewer than the 32 to keep" in scenario.run().failures["dynamic_rounds/tiny"]


@pytest.mark.usefixtures("finished")
def test_a_version_that_rests_on_rounds_is_made_again_from_its_record(scenario: Scenario, tmp_path: Path) -> None:
    ask_for(scenario)
    scenario.run()
    version = scenario.subset("pruned")
    folder = rebuild(version.lineage, tmp_path / "again")
    assert (folder / "subset.npy").read_bytes() == Path(version.uids).read_bytes()


@pytest.mark.usefixtures("finished")
def test_a_version_that_rests_on_rounds_of_a_subset_is_chosen_again_and_not_rebuilt(
    scenario: Scenario, tmp_path: Path
) -> None:
    ask_for(scenario, of="subset/clip_third", keep=0.2)
    scenario.run()
    version = scenario.subset("pruned")
    folder = choose_again(scenario.open().lake, version.lineage, tmp_path / "again")
    assert (folder / "subset.npy").read_bytes() == Path(version.uids).read_bytes()
    with pytest.raises(LakeError, match="dynamic_rounds/tiny started from subset/clip_third"):
        rebuild(version.lineage, tmp_path / "rebuilt")


def test_sensors_make_the_rounds_once_after_the_subset_that_they_begin_with(tmp_path: Path) -> None:
    automation = Automation(tmp_path)
    automation.document["scores"]["norm_sim_dynamic"] = {"b32": {"of": "subset/best", "keep": 0.25, "rounds": 2}}
    best = keep("neg_clip_loss/b32", fraction=0.5)
    automation.document["recipes"]["pruned"] = {"steps": [best, keep("norm_sim_dynamic/b32", fraction=0.25)]}
    automation.load()
    for arriving in ([0, 1, 2, 3], [4, 5]):
        automation.write(*arriving)
        runs = [key for keys, _ in automation.settle() for key in keys.split() if key != "catalog"]
        assert runs.count("dynamic_rounds/b32") == 1
        order = ["subset/best", "dynamic_rounds/b32", "norm_sim_dynamic/b32", "subset/pruned"]
        assert [key for key in runs if key in order] == order
        assert automation.subset("pruned").lineage["rows"] == (arriving[-1] + 1) * 2 // 4
    automation.assert_nothing_is_left()
    automation.assert_as_headless()
    automation.instance.dispose()
