"""The catalog on steps that compare rows: explain, diff and the views."""

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest

from tests.support.small_lake import CLIP, NEAR, SmallLake, fetch

ALIKE = {"deduplicate": {"by": "caption", "best": CLIP}}
STRATA = {"stratify": {"by": "width", "score": NEAR, "count": 2}}
DRAW = {"soft_cap_sample": {"score": CLIP, "count": 18, "batch": 6, "penalty": 0.4, "temperature": 0.2}}
UNLIKE = {"deduplicate": {"by": NEAR, "above": 0.5}}


@pytest.fixture
def small(tmp_path):
    """Return two shards: 32 rows, some with the same caption, in seven strata of width."""
    lake = SmallLake(tmp_path / "lake")
    lake.add_shard("00000", range(20))
    lake.add_shard("00001", range(100, 112))
    lake.add_targets()
    return lake


def rows_of(small):
    return [row for rows in small.rows.values() for row in rows]


def uid(row):
    return f"{row['f0']:016x}{row['f1']:016x}"


def best(rows, score):
    return sorted(rows, key=lambda row: (-row[score], row["f0"], row["f1"]))


def one_of_each(rows):
    """Return for each caption the row that stays."""
    stays = {}
    for row in best(rows, CLIP):
        stays.setdefault(row["caption"], row)
    return stays


def top_of_each(rows, count=2):
    strata = {}
    for row in best(rows, NEAR):
        strata.setdefault(row["width"], []).append(row)
    return {width: stratum[:count] for width, stratum in strata.items()}


def explained(small, recipe):
    """Return for each uid the answer's rows by step."""
    with small.build([recipe]) as con:
        return {
            uid(row): {told["step"]: told for told in fetch(con, "FROM explain(?)", uid(row))} for row in rows_of(small)
        }


def test_a_row_that_was_dropped_names_the_one_that_stood_for_it(small):
    small.add_version("mine", 1, recipe={"steps": [{"where": "width > 200"}, ALIKE, {"where": "width < 206"}]})
    entered = [row for row in rows_of(small) if row["width"] > 200]
    stays = one_of_each(entered)
    assert len(stays) < len(entered)
    answers = explained(small, "mine")
    for row in rows_of(small):
        told = answers[uid(row)][2]
        winner = stays.get(row["caption"])
        verdict = "not reached" if row["width"] <= 200 else "kept" if winner is row else "dropped"
        assert told["verdict"] == verdict
        assert told["in_favour_of"] == (uid(winner) if verdict == "dropped" else None)
        after = "kept" if row["width"] < 206 else "dropped"
        assert answers[uid(row)][3]["verdict"] == (after if verdict == "kept" else "not reached")


def test_each_row_is_judged_by_its_own_stratum(small):
    small.add_version("mine", 1, recipe={"steps": [STRATA, {"where": "f0 < 110"}]})
    kept = top_of_each(rows_of(small))
    answers = explained(small, "mine")
    for row in rows_of(small):
        told = answers[uid(row)][1]
        assert told["verdict"] == ("kept" if row in kept[row["width"]] else "dropped")
        assert (told["value"], told["threshold"]) == (row[NEAR], kept[row["width"]][-1][NEAR])
        member = row in kept[row["width"]] and row["f0"] < 110
        assert told["rank"] == (kept[row["width"]].index(row) + 1 if member else None)


def test_a_drawn_row_tells_its_copies_and_what_was_never_drawn_is_dropped(small):
    small.add_version("mine", 1, recipe={"steps": [{"where": f'"{CLIP}" > 0'}, DRAW]})
    with small.build(["mine"]) as con:
        copies = dict(con.execute("SELECT uid, copies FROM read_parquet(?)", [str(manifest(small, 1))]).fetchall())
        assert fetch(con, "SELECT rows, samples FROM subsets") == [{"rows": len(copies), "samples": 18}]
    assert sum(copies.values()) == 18
    assert set(Counter(copies.values())) - {1}, "some are drawn several times"
    answers = explained(small, "mine")
    assert any(row[CLIP] > 0 and uid(row) not in copies for row in rows_of(small)), "one is never drawn"
    for row in rows_of(small):
        told = answers[uid(row)][2]
        verdict = "not reached" if row[CLIP] <= 0 else "kept" if uid(row) in copies else "dropped"
        assert (told["verdict"], told["copies"]) == (verdict, copies.get(uid(row)))
        assert told["value"] == row[CLIP]


def test_only_the_step_that_dropped_a_row_names_another(small):
    steps = [{"keep_top": {"score": CLIP, "fraction": 0.5}}, ALIKE, {"where": "width < 205"}]
    small.add_version("mine", 1, recipe={"steps": steps})
    with small.build(["mine"]) as con:
        for row in rows_of(small):
            for told in fetch(con, "FROM explain(?)", uid(row)):
                assert (told["in_favour_of"] is not None) == (told["step"] == 2 and told["verdict"] == "dropped")


def test_a_likeness_that_is_not_there_now_is_unknown(small):
    """A value that decided the step is gone, so the verdict is unknown."""
    small.add_version("mine", 1, recipe={"steps": [UNLIKE, {"keep_top": {"score": CLIP, "count": 3}}]})
    (small.root / "norm_sim/b32/flowers/00001.parquet").unlink()
    dropped = {uid(row) for row in rows_of(small) if row["f0"] >= 100} - set(members(small))
    answers = explained(small, "mine")
    assert dropped
    assert {answers[sample][1]["verdict"] for sample in dropped} == {"unknown"}


def members(small):
    return pq.read_table(manifest(small, 1))["uid"].to_pylist()


def test_likeness_to_a_better_row_is_told_with_its_limit(small):
    small.add_version("mine", 1, recipe={"steps": [UNLIKE]})
    for row, told in zip(rows_of(small), explained(small, "mine").values(), strict=True):
        assert told[1]["verdict"] == ("kept" if row[NEAR] <= 0.5 else "dropped")
        assert (told[1]["score"], told[1]["value"], told[1]["threshold"]) == (NEAR, row[NEAR], 0.5)


def manifest(small, number):
    return small.root / "subset" / "mine" / f"v{number:04d}" / "manifest.parquet"


def changes(small):
    with small.build(["mine"]) as con:
        told = fetch(con, "FROM diff('mine', 'v0001', 'v0002')")
    return {(change["change"], change["uid"]): change for change in told}


def test_a_row_that_left_for_a_better_one_of_a_new_shard_is_a_duplicate(small):
    steps = {"steps": [ALIKE]}
    small.add_version("mine", 1, recipe=steps, missing=["00001"])
    small.add_version("mine", 2, recipe=steps)
    before, after = one_of_each(small.rows["00000"]), one_of_each(rows_of(small))
    left = {uid(row): uid(after[caption]) for caption, row in before.items() if after[caption] is not row}
    assert left
    told = changes(small)
    assert {sample for change, sample in told if change == "left"} == set(left)
    for sample, winner in left.items():
        change = told["left", sample]
        assert (change["reason"], change["step"]) == ("duplicate", 1)
        assert f"in favour of {winner}" in change["detail"]


def test_a_stratum_whose_cut_moved_and_a_draw_that_fell_otherwise_are_told_as_such(small):
    for step, reason, detail in (
        (STRATA, "threshold moved", "the cut of its stratum depends on the other rows"),
        (DRAW, "not drawn", "what is drawn depends on the other rows"),
    ):
        small.add_version("mine", 1, recipe={"steps": [step]}, missing=["00001"])
        small.add_version("mine", 2, recipe={"steps": [step]})
        left = [change for (kind, _), change in changes(small).items() if kind == "left"]
        assert left
        assert {(change["reason"], change["step"]) for change in left} == {(reason, 1)}
        assert all(detail in change["detail"] for change in left)
        for number in (1, 2):
            for path in sorted(manifest(small, number).parent.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            manifest(small, number).parent.rmdir()


def test_the_views_show_what_a_step_reports(small):
    step = {"where": "width > 203", "report": ["width"]}
    small.add_version("mine", 1, recipe={"steps": [step, STRATA]})
    with small.build(["mine"]) as con:
        told = fetch(con, "SELECT step, name, what, entered, kept, dropped FROM step_reports")
        funnel = fetch(con, 'SELECT step, kind, "by", groups FROM funnel')
    assert [row["what"] for row in told] == ["smallest", "lower quartile", "median", "upper quartile", "largest"]
    assert told[0] == {
        "step": 1, "name": "width", "what": "smallest", "entered": 200.0, "kept": 204.0, "dropped": 200.0
    }  # fmt: skip
    widths = {row["width"] for row in rows_of(small)}
    assert funnel[1] == {"step": 2, "kind": "stratify", "by": "width", "groups": len(widths)}


def test_records_from_before_these_steps_are_told_of_as_they_were(small):
    recipe = {"steps": [{"where": "width > 201"}, {"keep_top": {"score": CLIP, "count": 9}}]}
    small.add_version("mine", 1, recipe=recipe, missing=["00001"])
    small.add_version("mine", 2, recipe=recipe)
    asked = ["FROM funnel", "FROM subsets", "FROM step_reports", "FROM diff('mine', 'v0001', 'v0002')"]
    asked += [f"FROM explain('{uid(row)}')" for row in rows_of(small)]
    with small.build(["mine"]) as con:
        before = [con.sql(question).fetchall() for question in asked]
    for number in (1, 2):
        path = manifest(small, number).with_name("lineage.json")
        record = json.loads(path.read_text())
        del record["samples"]
        for step in record["steps"]:
            for name in ("file", "by", "groups", "samples", "summary"):
                del step[name]
        path.write_text(json.dumps(record))
    with small.build(["mine"]) as con:
        assert [con.sql(question).fetchall() for question in asked] == before
