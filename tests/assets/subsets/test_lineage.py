"""Versions: diff and lineage, and reproducing a version from its record."""

import json
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
from dagster import AssetKey

from assets.subsets.reproduction import choose_again, rebuild
from assets.subsets.subset import SHOWN
from dagster_project.notebook import open_project
from resources.lake.files import LakeError
from resources.lake.versions import Versions
from tests.support.scenario import SHARDS, Scenario, keep
from tests.support.small_lake import CLIP, NEAR, SmallLake, fetch
from tests.support.versions import assert_same_bytes

ASSETS = {CLIP: "clip_score/b32", NEAR: "norm_sim/b32/flowers"}


@pytest.fixture
def small(tmp_path):
    """Return a lake with one shard of twenty rows and no subset."""
    small = SmallLake(tmp_path / "the [lake]'s")
    small.add_shard("00000", range(20))
    small.add_targets()
    return small


def diff(small, name="wide", a="v0001", b="v0002"):
    """Query the diff, by f0."""
    with small.build() as con:
        return {int(row["uid"][:16], 16): row for row in fetch(con, "FROM diff(?, ?, ?)", name, a, b)}


def reasons(told):
    """Count changes by kind, step and reason."""
    return Counter((row["change"], row["step"], row["reason"]) for row in told.values())


def top(count, score=CLIP):
    """Return a recipe of one step."""
    return {"steps": [keep(score, count=count)]}


def test_every_row_that_entered_or_left_is_told_once_and_no_other(small):
    old = small.add_version("wide", 1)
    small.add_shard("00001", range(100, 130))
    new = small.add_version("wide", 2)
    with small.build() as con:
        told = fetch(con, "SELECT change, uid FROM diff('wide', 'v0001', 'v0002')")
        back = fetch(con, "SELECT change, uid FROM diff('wide', 'v0002', 'v0001')")
        assert fetch(con, "FROM diff('wide', 'v0001', 'v0001')") == []
    uids = {change: {r["uid"] for r in told if r["change"] == change} for change in ("entered", "left")}

    def texts(members):
        return {f"{f0:016x}{f1:016x}" for f0, f1 in members}

    assert uids == {"entered": texts(set(new) - set(old)), "left": texts(set(old) - set(new))}
    assert len(told) == len({r["uid"] for r in told})
    other = {"entered": "left", "left": "entered"}
    assert {(r["change"], r["uid"]) for r in back} == {(other[r["change"]], r["uid"]) for r in told}


def test_a_new_shard_brings_rows_and_moves_the_threshold_for_others(small):
    small.add_version("wide", 1, recipe=top(8))
    small.add_shard("00001", range(100, 110))
    small.add_version("wide", 2, recipe=top(8))
    told = diff(small)
    assert {f0 for f0, row in told.items() if row["reason"] == "new shard"} == {104, 109}
    assert reasons(told) == {("entered", 0, "new shard"): 2, ("left", 1, "threshold moved"): 2}
    left = [row for row in told.values() if row["change"] == "left"]
    for row in left:
        assert row["value"] == row["threshold_a"] == float(np.float32(0.3))
        assert row["threshold_b"] == float(np.float32(0.3))  # the cut moved among equals
        assert row["text"] == f"keep the top 8 by {CLIP}"
    assert {int(row["uid"][:16], 16) for row in left} == {13, 18}


def test_a_removed_shard_takes_its_rows_and_lets_others_in(small):
    small.add_shard("00001", range(100, 110))
    small.add_version("wide", 1, recipe=top(8))
    small.add_version("wide", 2, recipe=top(8), missing=["00001"])
    told = diff(small)
    assert reasons(told) == {("left", 0, "shard removed"): 2, ("entered", 1, "threshold moved"): 2}
    assert {row["detail"] for row in told.values() if row["change"] == "left"} == {"not scored"}


def test_a_score_that_was_computed_again_is_told_from_a_threshold_that_moved(small):
    small.add_version("wide", 1, recipe=top(4))  # 4, 9, 14, 19 with 0.4
    small.add_shard("00000", range(20), clip=lambda f0: 0.9 if f0 == 1 else 0.05 if f0 == 4 else (f0 % 5) / 10)
    small.add_version("wide", 2, recipe=top(4), made_again=[("00000", ASSETS[CLIP])])
    told = diff(small)
    assert {f0: (row["change"], row["step"], row["reason"]) for f0, row in told.items()} == {
        1: ("entered", 1, "score changed"),
        4: ("left", 1, "score changed"),
    }
    assert told[1]["value"] == float(np.float32(0.9))
    assert told[4]["value"] == float(np.float32(0.4))
    assert told[1]["detail"] == f"made again between the two: {ASSETS[CLIP]}"


def test_a_row_whose_value_then_would_not_pass_the_cut_of_now_left_because_the_threshold_moved(small):
    small.add_version("wide", 1, recipe=top(4))
    small.add_shard("00000", range(20), clip=lambda f0: 0.9 if f0 < 4 else (f0 % 5) / 20)
    small.add_version("wide", 2, recipe=top(4), made_again=[("00000", ASSETS[CLIP])])
    told = diff(small)
    assert reasons(told) == {("entered", 1, "score changed"): 4, ("left", 1, "threshold moved"): 4}
    assert {row["detail"] for row in told.values()} == {f"made again between the two: {ASSETS[CLIP]}"}


def test_of_several_steps_the_one_that_decided_is_named(small):
    steps = {"steps": [{"where": "width >= 201"}, keep(CLIP, count=10), keep(NEAR, count=4)]}
    small.add_version("wide", 1, recipe=steps)
    # 101, 104, ...: they outdo every row by the second score, and some by the first.
    small.add_shard("00001", range(100, 112), clip=lambda _: 0.35, near=lambda _: 0.95)
    small.add_version("wide", 2, recipe=steps)
    told = diff(small)
    row_of = {row["f0"]: row for rows in small.rows.values() for row in rows}
    record = json.loads((small.root / "subset/wide/v0002/lineage.json").read_text())
    expected = {}
    for f0, line in told.items():
        row = row_of[f0]
        if row["shard"] == "00001":
            expected[f0] = (0, "new shard")
            continue
        uid = line["uid"]
        for step in record["steps"][1:]:
            above = row[step["score"]] > step["threshold"]
            tied = row[step["score"]] == step["threshold"] and (step["tie_uid"] is None or uid <= step["tie_uid"])
            if not (above or tied):
                expected[f0] = (step["step"], "threshold moved")
                break
    assert {f0: (line["step"], line["reason"]) for f0, line in told.items()} == expected
    assert {step for step, _ in expected.values()} == {0, 2, 3}


def test_a_score_that_changed_is_laid_to_the_step_that_ranks_it(small):
    steps = {"steps": [keep(CLIP, count=10), keep(NEAR, count=3)]}
    gone = min(f0 for f0, _ in small.add_version("wide", 1, recipe=steps))
    small.add_shard("00000", range(20), near=lambda f0: 0.0 if f0 == gone else (f0 % 3) / 3 + 0.1)
    small.add_version("wide", 2, recipe=steps, made_again=[("00000", ASSETS[NEAR])])
    told = diff(small)
    assert (told[gone]["step"], told[gone]["reason"]) == (2, "score changed")
    assert told[gone]["text"] == f"keep the top 3 by {NEAR}"


def test_which_of_several_changed_scores_decided_is_not_pretended_to_be_known(small):
    steps = {"steps": [keep(CLIP, count=10), keep(NEAR, count=3)]}
    gone = min(f0 for f0, _ in small.add_version("wide", 1, recipe=steps))
    small.add_shard("00000", range(20), near=lambda f0: 0.0 if f0 == gone else (f0 % 3) / 3 + 0.1)
    again = [("00000", asset) for asset in ASSETS.values()]
    small.add_version("wide", 2, recipe=steps, made_again=again)
    told = diff(small)
    assert (told[gone]["step"], told[gone]["text"], told[gone]["reason"]) == (None, None, "score changed")
    assert told[gone]["detail"] == f"made again between the two: {ASSETS[CLIP]}, {ASSETS[NEAR]}"


def test_a_shard_with_other_rows_is_told_from_a_score(small):
    small.add_version("wide", 1, recipe=top(4))
    small.add_shard("00000", [*range(19), 24])
    small.add_version("wide", 2, recipe=top(4), made_again=[("00000", "raw_pool"), ("00000", ASSETS[CLIP])])
    told = diff(small)
    assert told[24]["reason"] == "shard changed"
    assert told[19]["reason"] == "shard changed"


def test_a_recipe_that_changed_is_told_with_its_step(small):
    first = {"steps": [{"where": "width >= 201"}, keep(CLIP, count=10)]}
    small.add_version("wide", 1, recipe=first)
    small.add_version("wide", 2, recipe={"steps": [{"where": "width >= 201"}, keep(CLIP, count=7)]})
    small.add_version("wide", 3, recipe={"steps": [{"where": "width >= 203"}, keep(CLIP, count=7)]})
    told = diff(small)
    assert reasons(told) == {("left", 2, "recipe changed"): 3}
    assert all(row["detail"] is None for row in told.values())
    told = diff(small, a="v0002", b="v0003")
    assert {row["reason"] for row in told.values()} <= {"recipe changed"}
    left = [row for row in told.values() if row["change"] == "left"]
    assert {row["step"] for row in left} == {1}
    assert {row["detail"] for row in left} == {"this step or a later one: v0002 has no value for it"}


def test_a_uid_list_that_changed_is_the_source(small):
    def listed(f0s):
        return np.array([(f0, 2**64 - 1 - f0) for f0 in f0s], dtype="u8,u8")

    recipe = {"from": "list.npy", "steps": [keep(CLIP, threshold=0.3)]}
    small.add_version("listed", 1, listed={"list.npy": listed([3, 4, 8])}, recipe=recipe)
    small.add_version("listed", 2, listed={"list.npy": listed([3, 9, 13])}, recipe=recipe)
    told = diff(small, "listed")
    assert {f0: (row["change"], row["step"], row["reason"]) for f0, row in told.items()} == {
        4: ("left", 0, "source changed"),
        8: ("left", 0, "source changed"),
        9: ("entered", 0, "source changed"),
        13: ("entered", 0, "source changed"),
    }
    small.add_version("listed", 3, recipe={"steps": recipe["steps"]})
    entered = {row["reason"] for row in diff(small, "listed", "v0002", "v0003").values()}
    assert entered == {"recipe changed"}


def uid_list(f0s):
    """Return the uids of rows of a `SmallLake` as DataComp's array."""
    return np.array([(f0, 2**64 - 1 - f0) for f0 in f0s], dtype="u8,u8")


def test_a_list_that_a_step_names_and_that_changed_is_told_with_that_step(small):
    recipe = {"steps": [{"except": "a.npy"}, keep(CLIP, threshold=0.35), {"union": "b.npy"}, {"intersect": "c.npy"}]}
    lists = {"a.npy": uid_list([4]), "b.npy": uid_list([1, 2]), "c.npy": uid_list([1, 2, 3, 4, 9, 14, 19])}
    assert {f0 for f0, _ in small.add_version("wide", 1, recipe=recipe, listed=lists)} == {1, 2, 9, 14, 19}
    lists = {"a.npy": uid_list([9]), "b.npy": uid_list([1, 3]), "c.npy": uid_list([1, 2, 3, 4, 9, 14])}
    assert {f0 for f0, _ in small.add_version("wide", 2, recipe=recipe, listed=lists)} == {1, 3, 4, 14}
    told = diff(small)
    assert {f0: (row["change"], row["step"], row["reason"], row["text"]) for f0, row in told.items()} == {
        2: ("left", 3, "list changed", "add the rows of b.npy"),
        3: ("entered", 3, "list changed", "add the rows of b.npy"),
        4: ("entered", 1, "list changed", "drop the rows of a.npy"),
        9: ("left", 1, "list changed", "drop the rows of a.npy"),
        19: ("left", 4, "list changed", "keep the rows of c.npy"),
    }


def test_a_combined_value_is_not_held_against_the_cut_of_another_version(small):
    recipe = {"steps": [{"keep_top": {"rank_sum": [CLIP, NEAR], "count": 3}}]}
    small.add_version("wide", 1, recipe=recipe)
    small.add_shard("00001", range(100, 110), clip=lambda _: 0.9, near=lambda _: 0.9)
    small.add_version("wide", 2, recipe=recipe)
    told = diff(small)
    assert reasons(told) == {("entered", 0, "new shard"): 3, ("left", 1, "threshold moved"): 3}
    detail = "this step or a later one: a combined value depends on the other rows"
    assert {row["detail"] for row in told.values() if row["change"] == "left"} == {detail}


def test_a_row_that_another_row_of_its_uid_stood_for_is_told(small):
    small.add_shard("00001", [5, 6], clip=lambda _: 0.9)
    small.add_version("wide", 1, recipe=top(4), missing=["00000"])
    small.add_version("wide", 2, recipe=top(4))  # 5 and 6 are now the rows of shard 00000
    told = diff(small)
    assert {f0: told[f0]["reason"] for f0 in (5, 6)} == {5: "another copy", 6: "another copy"}


def test_a_version_that_is_not_there_or_not_complete_is_an_error(small):
    small.add_version("wide", 1)
    small.add_shard("00001", range(100, 110))
    small.add_version("wide", 2)
    (small.root / "subset/wide/v0002/lineage.json").unlink()  # as after a run that was killed
    with small.build() as con:
        for order in (("v0001", "v0002"), ("v0002", "v0001")):
            with pytest.raises(duckdb.Error, match=r"has no version .*versions\('wide'\) lists those"):
                fetch(con, "FROM diff('wide', ?, ?)", *order)
        with pytest.raises(duckdb.Error, match=r"v0009/manifest.parquet"):
            fetch(con, "FROM diff('wide', 'v0001', 'v0009')")


def test_lineage_gives_every_fact_of_the_record_as_a_row(small):
    small.add_version("wide", 1)
    with small.build() as con:
        rows = fetch(con, "FROM lineage('wide')")
        assert fetch(con, "FROM lineage('wide', 'v0001')") == rows
        assert fetch(con, "FROM lineage('wide', 'v0009')") == []
        assert [row["version"] for row in fetch(con, "FROM versions('wide')")] == ["v0001"]
    facts = {(row["what"], row["name"]): row["value"] for row in rows}
    assert facts["subset", "version"] == "v0001"
    assert facts["shard", f"00000 {ASSETS[CLIP]}"] == "fq"
    assert facts["shard left out", "00007"] == "not scored"
    assert facts["step", "1"].startswith("where width >= 202: 20 entered, ")


@pytest.mark.usefixtures("finished")
def test_what_is_asked_of_the_whole_path(scenario: Scenario) -> None:
    scenario.run()
    scenario.write_shard("00007")
    scenario.run()
    catalog = open_project(scenario.folder / "project.yaml")

    versions = catalog.versions("paper")
    assert versions["version"].to_list() == ["v0001", "v0002"]
    assert versions["current"].to_list() == [False, True]
    assert versions["shards"].to_list() == [3, 4]

    told = catalog.diff("paper", "v0001", "v0002")
    members = [set(pl.read_parquet(_version(scenario, "paper", v).manifest)["uid"]) for v in ("v0001", "v0002")]
    assert set(told.filter(change="entered")["uid"]) == members[1] - members[0]
    assert set(told.filter(change="left")["uid"]) == members[0] - members[1]
    assert set(told["reason"]) <= {"new shard", "threshold moved"}
    assert set(told.filter(reason="new shard")["shard"]) == {"00007"}

    facts = {(what, name): value for what, name, value in catalog.lineage("paper").iter_rows()}
    project = scenario.open()
    assert facts["shard", "00007 neg_clip_loss/tiny"] == project.lake.stored("neg_clip_loss/tiny", "00007").fingerprint
    assert facts["encoder", "tiny.precision"] == "fp32"
    weights = project.models.encoder("tiny").identity()["files"]["open_clip_model.safetensors"]
    assert facts["encoder", "tiny.files.open_clip_model.safetensors"] == weights
    assert facts["parameter", "neg_clip_loss/tiny.estimator"] == "reference_negatives"
    assert facts["input", "negatives/tiny.seed"] == "0"
    assert facts["code", "embeddings/tiny"] == "1"
    assert facts["setting", "pool.path"] == str(scenario.folder / "pool")
    assert {"torch", "python"} <= {name for what, name in facts if what == "package"}

    uid = told["uid"][0]
    assert set(catalog.explain(uid)["recipe"]) == {"clip_third", "paper", "inside"}
    assert catalog.overlap("paper", "paper")["jaccard"].to_list() == [1.0]


def _version(scenario: Scenario, recipe: str, name: str):
    return Versions(scenario.open().lake, recipe).read(name)


def _record(scenario: Scenario, recipe: str) -> dict:
    """Read a lineage record from its file."""
    return json.loads(Path(scenario.subset(recipe).folder, "lineage.json").read_text())


@pytest.mark.usefixtures("finished")
def test_a_version_is_made_again_bit_for_bit_from_its_record_alone(scenario: Scenario, tmp_path: Path) -> None:
    scenario.run()
    scenario.write_shard("00007")  # comes after the draw, so the negatives are of the first three shards
    chosen = scenario.manifest("clip_third")["uid"].to_list()[:9]
    (scenario.folder / "list.txt").write_text("\n".join(chosen))
    scenario.set("recipes", "listed", value={"from": "list.txt", "steps": [keep("neg_clip_loss/tiny", count=4)]})
    scenario.run()
    records = {recipe: _record(scenario, recipe) for recipe in ("paper", "inside", "listed")}
    (scenario.folder / "lake").rename(scenario.folder / "away")
    (scenario.folder / "project.yaml").unlink()
    folders = {recipe: rebuild(record, tmp_path / recipe) for recipe, record in records.items()}
    (scenario.folder / "away").rename(scenario.folder / "lake")
    for recipe, folder in folders.items():
        assert_same_bytes(scenario, recipe, folder)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "paper/lake").rglob("*.*")}
    rebuild(records["paper"], tmp_path / "paper")  # what is there is not made again
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "paper/lake").rglob("*.*")} == before

    scenario.write_shard("00007", text=b"another caption")
    with pytest.raises(LakeError, match=r"raw_pool/00007.parquet has fingerprint \w+, not \w+"):
        rebuild(records["paper"], tmp_path / "later")
    (scenario.folder / "pool/00007.tar").unlink()
    with pytest.raises(LakeError, match="the pool has no shard 00007 any more"):
        rebuild(records["paper"], tmp_path / "later")


def add_set_recipes(scenario: Scenario) -> None:
    """Add recipes that depend on each other and on a uid list, and rank by several scores."""
    scenario.set(
        "recipes",
        value={
            "last": {"from": "paper", "steps": [{"except": "mixed"}, {"union": "lists/some.txt"}, {"union": "mixed"}]},
            "mixed": {
                "steps": [
                    {"within": "clip_third"},
                    {"keep_top": {"rank_sum": ["clip_score/tiny", "neg_clip_loss/tiny"], "fraction": 0.5}},
                ]
            },
            "weighed": {
                "steps": [
                    {
                        "keep_top": {
                            "weighted": {"clip_score/tiny": 0.5, "norm_sim_2/tiny/pets": 0.5},
                            "normalise": "min_max",
                            "count": 6,
                        }
                    },
                    {"intersect": "clip_third"},
                ]
            },
            **{name: scenario.document["recipes"][name] for name in ("clip_third", "paper")},
        },
    )


def test_recipes_that_rest_on_others_are_chosen_told_of_and_made_again(scenario: Scenario, tmp_path: Path) -> None:
    add_set_recipes(scenario)
    project, graph = scenario.open_graph()
    order = [subset.recipe for subset in graph.subsets]
    assert order.index("paper") < order.index("last") > order.index("mixed") > order.index("clip_third")
    definition = {subset.recipe: subset.definition for subset in graph.subsets}["last"]
    upstream = definition.asset_deps[AssetKey(["subset", "last"])]
    assert {AssetKey(["subset", "paper"]), AssetKey(["subset", "mixed"])} <= upstream

    assert "no such uid list" in scenario.run().failures["subset/last"]
    known = scenario.manifest("clip_third")["uid"].to_list() + scenario.manifest("paper")["uid"].to_list()
    others = sorted(set(scenario.open().lake.read("raw_pool", "00001", ["uid"])["uid"].to_pylist()) - set(known))
    (scenario.folder / "lists").mkdir()
    (scenario.folder / "lists/some.txt").write_text("\n".join([*others[:2], "f" * 32]))
    outcome = scenario.run()
    assert outcome.failures == {}
    assert set(outcome.computed) == {"subset/last", "catalog"}
    assert scenario.run().computed == {}

    members = {name: set(scenario.manifest(name)["uid"]) for name in scenario.document["recipes"]}
    assert members["last"] == (members["paper"] - members["mixed"]) | set(others[:2]) | members["mixed"]
    assert members["weighed"] <= members["clip_third"]
    pages = {name: Path(scenario.subset(name).folder, "report/index.html").read_text() for name in members}
    assert "Best dropped by rank_sum of clip_score/tiny and neg_clip_loss/tiny" in pages["mixed"]
    assert "add the rows of lists/some.txt" in pages["last"]
    assert len(members["mixed"]) == len(members["clip_third"]) // 2
    lineage = scenario.subset("last").lineage
    assert lineage["source"]["version"] == "v0001"
    read = lineage["sets"]["lists/some.txt"]
    assert (read["kind"], read["uids"], read["in_pool"]) == ("uids", 3, 2)
    assert lineage["sets"]["mixed"]["record"] == scenario.subset("mixed").lineage
    event = scenario.instance.get_latest_materialization_event(AssetKey(["subset", "last"]))
    assert event is not None
    assert {"read/subset/paper", "read/subset/mixed"} <= set(event.asset_materialization.metadata)

    catalog = open_project(scenario.folder / "project.yaml")
    facts = {(what, name): value for what, name, value in catalog.lineage("last").iter_rows()}
    assert facts["set", "mixed version"] == "v0001"
    assert facts["set", "lists/some.txt in_pool"] == "2"
    pool = [uid for shard in SHARDS for uid in project.lake.read("raw_pool", shard, ["uid"])["uid"].to_pylist()]
    for uid in [*others[:3], *sorted(members["paper"])[:4], *sorted(members["mixed"])[:4], *pool[::6]]:
        told = catalog.explain(uid)
        for name, chosen in members.items():
            verdicts = told.filter(recipe=name)["verdict"].to_list()
            if name == "last":
                started, dropped = uid in members["paper"], uid in members["mixed"]
                by_list, by_mixed = uid in others[:2], uid in members["mixed"]
                in2 = started and not dropped
                in3 = in2 or by_list
                assert verdicts == [
                    "kept" if started else "dropped",
                    "not reached" if not started else "dropped" if dropped else "kept",
                    "kept" if in2 else "brought in" if by_list else "not reached",
                    "kept" if in3 else "brought in" if by_mixed else "not reached",
                ]
            else:
                assert (verdicts[-1] == "kept") == (uid in chosen)
                assert "unknown" not in verdicts
                assert "changed" not in verdicts

    for name in ("last", "weighed"):
        assert_same_bytes(
            scenario, name, choose_again(scenario.open().lake, _record(scenario, name), tmp_path / f"c_{name}")
        )
        assert_same_bytes(scenario, name, rebuild(_record(scenario, name), tmp_path / name))
    (scenario.folder / "lists/some.txt").write_text("\n".join(others[1:3]))
    with pytest.raises(LakeError, match=r"lists/some.txt: not the uid list that the subset was made with"):
        rebuild(_record(scenario, "last"), tmp_path / "later")

    assert set(scenario.run().computed) == {"subset/last", "catalog"}
    changes = open_project(scenario.folder / "project.yaml").diff("last", "v0001", "v0002")
    assert sorted(changes.select("uid", "change", "reason").iter_rows()) == sorted(
        [(others[0], "left", "list changed"), (others[2], "entered", "list changed")]
    )


def test_negatives_of_a_pool_smaller_than_a_draw_are_drawn_again_from_the_shards_of_then(
    scenario: Scenario, tmp_path: Path
) -> None:
    scenario.set("scores", "neg_clip_loss", "tiny", value={"batch_size": 1000, "draws": 2, "coverage": 1.0})
    scenario.run()
    record = _record(scenario, "paper")
    scenario.write_shard("00007")
    assert_same_bytes(scenario, "paper", rebuild(record, tmp_path / "again"))


@pytest.mark.usefixtures("finished")
def test_a_version_is_chosen_again_from_the_lake_as_long_as_its_files_are_there(
    scenario: Scenario, tmp_path: Path
) -> None:
    scenario.run()
    lake = scenario.open().lake
    for recipe in ("paper", "inside"):
        assert_same_bytes(scenario, recipe, choose_again(lake, _record(scenario, recipe), tmp_path / recipe))

    record = _record(scenario, "paper")
    wrong = {**record, "files": {**record["files"], "subset.npy": "0" * 64}, "packages": {"torch": "0.1"}}
    with pytest.raises(LakeError, match=r"(?s)subset.npy: sha256 \w+, not 0{64}.*torch .*, not 0\.1"):
        choose_again(lake, wrong, tmp_path / "wrong")
    with pytest.raises(LakeError, match=r"format 1.*Remedy"):
        choose_again(lake, {**record, "format": 1}, tmp_path / "wrong")

    scenario.run(redraw=True)
    scenario.write_shard("00001", text=b"another caption")
    scenario.run()
    with pytest.raises(LakeError, match=r"norm_sim/tiny/pets/00001.parquet has fingerprint"):
        choose_again(lake, record, tmp_path / "later")
    Path(lake.path("clip_score/tiny", "00002")).unlink()
    with pytest.raises(LakeError, match=r"clip_score/tiny/00002.parquet is not there"):
        choose_again(lake, _record(scenario, "clip_third"), tmp_path / "later")


@pytest.mark.usefixtures("finished")
def test_the_event_of_a_subset_names_and_links_all_that_it_read(scenario: Scenario) -> None:
    scenario.run()
    event = scenario.instance.get_latest_materialization_event(AssetKey(["subset", "paper"]))
    assert event is not None
    metadata = event.asset_materialization.metadata
    lineage = scenario.subset("paper").lineage
    read = {
        (row.data["asset"], row.data["shard or version"]): row.data["fingerprint"]
        for row in metadata[f"files_read_first_{SHOWN}"].records
    }
    for shard, files in lineage["shards"].items():
        for asset, fingerprint in files.items():
            assert read[asset, shard] == fingerprint
    assert read["negatives/tiny", ""] == lineage["inputs"]["negatives/tiny"]["fingerprint"]
    assert metadata["files_read"].value == len(read) == 11
    assert metadata["read/neg_clip_loss/tiny"].asset_key == AssetKey(["neg_clip_loss", "tiny"])
    assert Path(metadata["lineage"].value).is_file()
