"""Recipes: valid settings, selected rows, and reports."""

import json
import re
from fractions import Fraction
from pathlib import Path

import duckdb
import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from core.uids import UID_DTYPE, format_uids, parse_uids
from selection.recipes.execute import select
from selection.recipes.predicates import FUNCTIONS, predicate_columns
from selection.recipes.recipe import Recipe, check_recipes
from selection.recipes.steps import KINDS, KeepTop

A, B = "clip_score/b32", "norm_sim_inf/b32/imagenet"
TYPES = {"f0": "UBIGINT", "f1": "UBIGINT", "shard": "VARCHAR", "key": "VARCHAR", "width": "INTEGER"}


@pytest.fixture
def con():
    with duckdb.connect() as connection:
        yield connection


def make_source(con, rows, score_type="FLOAT"):
    """Create the relation `source` from dicts with f0, f1 and any of width, A, B."""
    types = TYPES | {A: score_type, B: score_type}
    columns = ", ".join(f'"{name}" {kind}' for name, kind in types.items())
    con.execute(f"CREATE OR REPLACE TABLE source ({columns})")
    filled = [{"shard": "00000", "key": str(i), **row} for i, row in enumerate(rows)]
    if filled:
        con.executemany(
            f"INSERT INTO source VALUES ({', '.join('?' * len(types))})",
            [[row.get(name) for name in types] for row in filled],
        )
    return filled


def recipe(*steps, **more):
    return Recipe.model_validate({"from": "pool", "steps": list(steps), **more})


def top(score, **limit):
    return {"keep_top": {"score": score, **limit}}


def choose(con, *steps):
    return select(con, "mine", recipe(*steps))


def uids(selection):
    return [row[0] for row in selection.manifest().fetchall()]


def figures(selection):
    """Return each selected row's value and rank at each ranking, in the order of the manifest."""
    relation, ranks = selection.manifest(), selection.ranks()
    columns = []
    for place, name in enumerate(relation.columns):
        if name.endswith("_value"):
            columns += [[row[place] for row in relation.fetchall()], ranks.pop(name.replace("value", "rank")).tolist()]
    assert not ranks
    return list(zip(*columns, strict=True)) if columns else [()] * selection.rows


def brute_force(rows, steps):
    """Select rows in plain Python; return them with value and rank at each keep_top, or None if none stay."""
    total, left = len(rows), [dict(row) for row in rows]
    for number, step in enumerate(steps, start=1):
        if "where" in step:
            left = [row for row in left if row["width"] is not None and row["width"] >= 2]
        else:
            limit = dict(step["keep_top"])
            score = limit.pop("score")
            left.sort(key=lambda row: (-row[score], row["f0"], row["f1"]))
            for rank, row in enumerate(left, start=1):
                row[f"step{number}"] = (row[score], rank)
            if "threshold" in limit:
                left = [row for row in left if row[score] >= limit["threshold"]]
            elif "count" in limit:
                left = left[: limit["count"]]
            else:
                left = left[: int(total * Fraction(str(limit["fraction"])))]
        if not left:
            return None
    return sorted(left, key=lambda row: (row["f0"], row["f1"]))


WORD = st.sampled_from([0, 1, 2**63 - 1, 2**63, 2**64 - 1])
TIED = st.sampled_from([-1.0, -0.25, -0.0, 0.0, 0.25, 0.1, float(np.float32(0.1)), 5e-324, 1e308, -1e308])
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "f0": WORD,
            "f1": WORD,
            "width": st.sampled_from([None, 1, 2, 3]),
            A: TIED | st.floats(allow_nan=False, allow_infinity=False),
            B: TIED,
        }
    ),
    min_size=1,
    max_size=25,
    unique_by=lambda row: (row["f0"], row["f1"]),
)
STEPS = st.lists(
    st.just({"where": "width >= 2"})
    | st.builds(lambda s, f: top(s, fraction=f), st.sampled_from([A, B]), st.sampled_from([0.3, 0.29, 0.7, 1]))
    | st.builds(lambda s, n: top(s, count=n), st.sampled_from([A, B]), st.integers(1, 12))
    | st.builds(lambda s, t: top(s, threshold=t), st.sampled_from([A, B]), TIED),
    max_size=4,
)


@settings(max_examples=120, deadline=None)
@given(ROWS, STEPS)
@example([{"f0": i, "f1": 0, "width": 1, A: -0.0 if i % 2 else 0.0, B: 0.0} for i in range(5)], [top(A, count=2)])
def test_a_recipe_chooses_what_brute_force_chooses(rows, steps):
    with duckdb.connect() as con:
        rows = make_source(con, rows, "DOUBLE")
        expected = brute_force(rows, steps)
        if expected is None:
            with pytest.raises(ValueError, match="recipe mine, step"):
                choose(con, *steps)
            return
        selection = choose(con, *steps)
        manifest = selection.manifest()
        ranked = [number for number, step in enumerate(steps, start=1) if "keep_top" in step]
        assert manifest.columns == ["uid", "f0", "f1", "shard", "key", *(f"step{number}_value" for number in ranked)]
        assert [row[:5] for row in manifest.fetchall()] == [
            (f"{row['f0']:016x}{row['f1']:016x}", *(row[name] for name in ("f0", "f1", "shard", "key")))
            for row in expected
        ]
        assert figures(selection) == [
            tuple(figure for number in ranked for figure in row[f"step{number}"]) for row in expected
        ]
        assert selection.rows == len(expected)
        subset = selection.subset()
        assert subset.dtype == UID_DTYPE
        assert subset.tolist() == [(row["f0"], row["f1"]) for row in expected]


@settings(max_examples=60, deadline=None)
@given(ROWS, STEPS)
def test_the_predicates_of_the_reports_choose_the_same_rows_step_by_step(rows, steps):
    with duckdb.connect() as con:
        make_source(con, rows, "DOUBLE")
        if brute_force(rows, steps) is None:
            return
        selection = choose(con, *steps)
        reports = [json.loads(json.dumps(report.as_dict())) for report in selection.steps]
        entered, condition = len(rows), "true"
        for report, original in zip(reports, selection.steps, strict=True):
            condition += f" AND ({report['predicate']})"
            kept = con.execute(f"SELECT count(*) FROM source WHERE {condition}").fetchall()[0][0]
            assert (report["entered"], report["kept"], report["left"]) == (entered, kept, entered - kept)
            assert report == original.as_dict()
            entered = kept


def test_the_cut_is_exact_among_many_values(con):
    con.execute(
        f"""
        CREATE TABLE source AS SELECT i::UBIGINT AS f0, 0::UBIGINT AS f1, '' AS shard, '' AS key,
            exp((hash(i) % 140000) / 2000.0)::FLOAT AS "{B}", (hash(i, 1) % 700000)::FLOAT AS "{A}"
        FROM range(400000) t(i)
        """
    )
    for score in (A, B):
        f0, values = con.execute(f'SELECT f0, "{score}" AS v FROM source').fetchnumpy().values()
        order = np.lexsort((f0, -values.astype(np.float64)))
        for count in (1, 1000, 199_999, 399_999):
            selection = choose(con, top(score, count=count))
            assert selection.steps[0].threshold == values[order[count - 1]]
            np.testing.assert_array_equal(selection.subset()["f0"], np.sort(f0[order[:count]]))


@pytest.mark.parametrize(("fraction", "rows", "kept"), [(0.29, 100, 29), (0.57, 100, 57), (0.58, 100, 58)])
def test_a_fraction_means_the_decimal_that_was_written(con, fraction, rows, kept):
    make_source(con, [{"f0": i, "f1": 0, A: 0.5} for i in range(rows)])
    assert choose(con, top(A, fraction=fraction)).rows == kept


@given(st.integers(1, 10**12), st.integers(1, 10**6))
def test_a_fraction_asks_for_the_floor(rows, millionths):
    keep = KeepTop(score=A, fraction=millionths / 10**6)
    assert keep.wanted(rows) == rows * millionths // 10**6


def test_the_smaller_uid_wins_a_tie_even_beyond_the_signed_range(con):
    make_source(con, [{"f0": f0, "f1": f1, A: 1.0} for f0 in (2**64 - 1, 1, 2**63) for f1 in (2**64 - 1, 0)])
    selection = choose(con, top(A, count=3))
    assert selection.subset().tolist() == [(1, 0), (1, 2**64 - 1), (2**63, 0)]
    assert selection.steps[0].tie_uid == "8000000000000000" + "0" * 16
    assert choose(con, top(A, count=6)).steps[0].tie_uid is None


def test_a_fraction_is_of_the_rows_the_recipe_began_with(con):
    make_source(con, [{"f0": i, "f1": 0, A: float(i), B: float(-i)} for i in range(100)])
    selection = choose(con, top(A, fraction=0.5), top(B, fraction=0.2))
    assert [report.kept for report in selection.steps] == [50, 20]
    assert selection.subset()["f0"].tolist() == list(range(50, 70))


@pytest.mark.parametrize("limit", [{"fraction": 1.0}, {"fraction": 1}, {"count": 7}])
def test_everything_may_stay(con, limit):
    make_source(con, [{"f0": i, "f1": 0, A: float(i)} for i in range(7)])
    report = choose(con, top(A, **limit)).steps[0]
    assert (report.kept, report.left, report.threshold, report.tie_uid, report.note) == (7, 0, 0.0, None, None)


@pytest.mark.parametrize("limit", [{"fraction": 0.9}, {"count": 9}])
def test_fewer_rows_than_wanted_all_stay_and_the_report_says_so(con, limit):
    make_source(con, [{"f0": i, "f1": 0, "width": i, A: float(i)} for i in range(10)])
    report = choose(con, {"where": "width < 5"}, top(A, **limit)).steps[1]
    assert (report.entered, report.kept, report.wanted) == (5, 5, 9)
    assert report.note == "5 rows entered, fewer than the 9 wanted: all stay"


def test_a_fraction_that_keeps_nothing_is_an_error_that_says_so(con):
    make_source(con, [{"f0": i, "f1": 0, A: float(i)} for i in range(9)])
    with pytest.raises(ValueError, match="less than one row") as error:
        choose(con, {"where": "true"}, top(A, fraction=0.1))
    for part in ("recipe mine, step 2", A, "fraction 0.1 of the 9 rows", "Remedy", "1/9"):
        assert part in str(error.value)


def test_a_threshold_that_nothing_reaches_is_an_error_with_the_largest_value(con):
    make_source(con, [{"f0": i, "f1": 0, A: i / 4} for i in range(9)])
    with pytest.raises(ValueError, match=r"step 1 .*none of the 9 rows.*largest value is 2\.0.*Remedy"):
        choose(con, top(A, threshold=2.5))


def test_a_where_that_keeps_nothing_is_an_error(con):
    make_source(con, [{"f0": 0, "f1": 0, "width": 3}])
    with pytest.raises(ValueError, match=r"recipe mine, step 1 \(where width > 5\): none of the 1 rows"):
        choose(con, {"where": "width > 5"})


def test_an_empty_source_is_an_error(con):
    make_source(con, [])
    with pytest.raises(ValueError, match="recipe mine: its source has no rows"):
        choose(con, {"where": "true"})


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (None, "NULL"), (float("-inf"), "-inf")])
def test_a_value_without_rank_is_an_error_with_score_and_uid(con, value, shown):
    rows = [{"f0": i, "f1": 2**64 - 1, "width": i, A: value if i > 1 else 0.5} for i in range(4)]
    make_source(con, rows)
    with pytest.raises(ValueError, match="Remedy") as error:
        choose(con, top(A, count=1))
    assert f"{A} is {shown} for uid {2:016x}{2**64 - 1:016x} (2 such rows in all)" in str(error.value)
    assert choose(con, {"where": f'isfinite("{A}")'}, top(A, count=1)).rows == 1
    assert choose(con, {"where": "width < 2"}, top(A, count=1)).rows == 1


def test_a_predicate_that_does_not_fit_the_types_is_an_error_with_its_step(con):
    make_source(con, [{"f0": 0, "f1": 0, "width": 3}])
    with pytest.raises(ValueError, match="recipe mine, step 1") as error:
        choose(con, {"where": "shard + 1 > [2]"})
    assert "\n" not in str(error.value)


def test_a_threshold_compares_in_float64_with_the_stored_float32(con):
    make_source(con, [{"f0": 0, "f1": 0, A: 0.7}, {"f0": 1, "f1": 0, A: 0.71}])
    assert float(np.float32(0.7)) < 0.7
    assert choose(con, top(A, threshold=0.7)).subset()["f0"].tolist() == [1]


def test_a_comment_or_an_or_in_a_where_stays_inside_its_step(con):
    make_source(con, [{"f0": i, "f1": 0, "width": i, A: float(i)} for i in range(4)])
    selection = choose(con, {"where": "width < 1 OR width > 1 -- but not 1"}, top(A, threshold=1))
    assert selection.subset()["f0"].tolist() == [2, 3]


def test_ranks_are_among_the_rows_that_entered_the_step(con):
    make_source(con, [{"f0": i, "f1": 0, "width": i % 2, A: float(i), B: float(-i)} for i in range(8)])
    selection = choose(con, top(A, count=6), {"where": "width = 1"}, top(B, count=2))
    assert list(selection.ranks()) == ["step1_rank", "step3_rank"]
    assert figures(selection) == [(3.0, 5, -3.0, 1), (5.0, 3, -5.0, 2)]


# Sets, and scores that are combined

NAMES = ["other", "lists/dfn.npy"]
SETS = {name: f"in {name}" for name in NAMES}


def make_sets(con, rows):
    """Add boolean columns for the two sets to `source`; `rows` have them under the sets' names."""
    for name, column in SETS.items():
        listed = ", ".join(f"({row['f0']}, {row['f1']})" for row in rows if row[name])
        inside = f"(f0, f1) IN ({listed})" if listed else "false"
        con.execute(f'CREATE OR REPLACE TABLE source AS SELECT *, {inside} AS "{column}" FROM source')


def combined(left, top):
    """Compute the ranked value of a `keep_top` in plain Python, for each row that entered."""
    names = top.get("rank_sum") or list(top["weighted"])
    columns = {name: np.array([row[name] for row in left], dtype=np.float64) for name in names}
    rank = {name: np.array([1 + int((values > value).sum()) for value in values]) for name, values in columns.items()}
    if "rank_sum" in top:
        return [-int(sum(ranks)) for ranks in zip(*rank.values(), strict=True)]
    total, n = np.zeros(len(left)), len(left)
    for name, weight in top["weighted"].items():
        values = columns[name]
        if values.min() == values.max() and top["normalise"] != "rank":
            continue
        scaled = {
            "rank": lambda name=name: (n - rank[name]) / max(n - 1, 1),
            "min_max": lambda v=values: (v - v.min()) / (v.max() - v.min()),
            "z_score": lambda v=values: (v - v.mean()) / v.std(),
            "none": lambda v=values: v,
        }[top["normalise"]]()
        total += weight * scaled
    return total.tolist()


def plain(rows, steps, source="pool"):
    """Select rows step by step as sets of indices; return the indices after each step, and the ranked values."""
    inside = {i for i, row in enumerate(rows) if source == "pool" or row[source]}
    basis, after, ranked = len(inside), [inside], {}
    for number, step in enumerate(steps, start=1):
        ((kind, what),) = step.items()
        if kind == "keep_top":
            places = sorted(inside)
            left = [rows[i] for i in places]
            values = dict(zip(places, combined(left, what), strict=True))
            order = sorted(places, key=lambda i: (-values[i], rows[i]["f0"], rows[i]["f1"]))
            inside = set(order[: int(basis * Fraction(str(what["fraction"])))])
            ranked[number] = {i: (values[i], rank) for rank, i in enumerate(order, start=1)}
        else:
            members = {i for i, row in enumerate(rows) if row[what]}
            inside = {
                "within": inside & members,
                "intersect": inside & members,
                "except": inside - members,
                "union": inside | members,
            }[kind]
            basis = len(inside) if kind == "within" else basis
        after.append(inside)
        if not inside:
            return None
    return after, ranked


# Few values, far apart once they are combined, so that float64 sums of another order can't swap two rows.
SET_ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "f0": WORD,
            "f1": WORD,
            A: st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0]),
            B: st.sampled_from([0.0, 1.0, 7.0]),
            **dict.fromkeys(NAMES, st.booleans()),
        }
    ),
    min_size=1,
    max_size=20,
    unique_by=lambda row: (row["f0"], row["f1"]),
)
WEIGHTS = st.dictionaries(st.sampled_from([A, B]), st.sampled_from([1.0, -2.0, 0.5]), min_size=2)
SET_STEPS = st.lists(
    st.builds(
        lambda kind, name: {kind: name},
        st.sampled_from(["within", "union", "intersect", "except"]),
        st.sampled_from(NAMES),
    )
    | st.builds(lambda f: {"keep_top": {"rank_sum": [A, B], "fraction": f}}, st.sampled_from([0.3, 0.6, 1.0]))
    | st.builds(
        lambda w, n, f: {"keep_top": {"weighted": w, "normalise": n, "fraction": f}},
        WEIGHTS,
        st.sampled_from(["rank", "min_max"]),
        st.sampled_from([0.5, 0.8]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=70, deadline=None)
@given(SET_ROWS, SET_STEPS, st.sampled_from(["pool", *NAMES]))
def test_sets_and_combined_scores_choose_what_brute_force_chooses(rows, steps, source):
    with duckdb.connect() as con:
        rows = make_source(con, rows, "DOUBLE")
        make_sets(con, rows)
        found = plain(rows, steps, source) if source == "pool" or any(row[source] for row in rows) else None
        if found is None:
            with pytest.raises(ValueError, match="recipe mine"):
                select(con, "mine", recipe(*steps, **{"from": source}))
            return
        after, ranked = found
        selection = select(con, "mine", recipe(*steps, **{"from": source}))
        for report, before, now in zip(selection.steps, after, after[1:], strict=False):
            assert (report.entered, report.kept) == (len(before), len(now))
            assert (report.joined, report.left) == (len(now - before), len(before - now))
        chosen = sorted(after[-1], key=lambda i: (rows[i]["f0"], rows[i]["f1"]))
        assert selection.subset().tolist() == [(rows[i]["f0"], rows[i]["f1"]) for i in chosen]
        relation, ranks = selection.manifest(), selection.ranks()
        told = {name: [row[place] for row in relation.fetchall()] for place, name in enumerate(relation.columns)}
        for number, figures_of in ranked.items():
            kept = after[number]  # what a later union brought in has no figures
            values = [figures_of[i][0] if i in kept else None for i in chosen]
            assert told[f"step{number}_value"] == [None if v is None else pytest.approx(v, abs=1e-12) for v in values]
            assert ranks[f"step{number}_rank"].tolist() == [figures_of[i][1] if i in kept else None for i in chosen]


def random_scores(con, rows=3000, dtype="FLOAT"):
    con.execute(
        f"""
        CREATE OR REPLACE TABLE source AS SELECT hash(i) AS f0, i::UBIGINT AS f1, '' AS shard, '' AS key,
            (sqrt(i % 97) + 3)::{dtype} AS "{A}", exp((hash(i, 1) % 1000) / 300.0)::{dtype} AS "{B}"
        FROM range({rows}) t(i)
        """
    )
    return con.execute("FROM source ORDER BY f0, f1").fetchnumpy()


@pytest.mark.parametrize("normalise", ["rank", "min_max", "z_score", "none"])
def test_weighted_values_are_those_of_float64_numpy(con, normalise):
    table = random_scores(con)
    weighted = {A: 0.3, B: -1.7}
    selection = choose(con, {"keep_top": {"weighted": weighted, "normalise": normalise, "fraction": 1.0}})
    left = [{A: float(a), B: float(b)} for a, b in zip(table[A], table[B], strict=True)]
    expected = combined(left, {"weighted": weighted, "normalise": normalise})
    values = [row[5] for row in selection.manifest().fetchall()]
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-9)


def test_combined_values_are_the_same_whatever_the_threads_do(con):
    random_scores(con, 400_000)
    steps = [
        {"keep_top": {"weighted": {A: 1.0, B: 1.0}, "normalise": "z_score", "fraction": 0.5}},
        {"keep_top": {"weighted": {A: 1.0, B: -3.0}, "normalise": "rank", "fraction": 0.4}},
        {"keep_top": {"rank_sum": [A, B], "fraction": 0.1}},
    ]
    told = set()
    for threads in (1, 2, 3, 4):
        con.execute(f"SET threads = {threads}")
        told.add(json.dumps([report.as_dict() for report in choose(con, *steps).steps]))
    assert len(told) == 1


def test_equal_values_have_equal_ranks(con):
    make_source(
        con, [{"f0": i, "f1": 0, A: float(a), B: float(b)} for i, (a, b) in enumerate([(5, 1), (5, 2), (4, 3)])]
    )
    selection = choose(con, {"keep_top": {"rank_sum": [A, B], "count": 3}})
    assert figures(selection) == [(-4.0, 2), (-3.0, 1), (-4.0, 3)]


def test_a_score_that_is_the_same_everywhere_is_without_effect_and_the_report_says_so(con):
    make_source(con, [{"f0": i, "f1": 0, A: float(i), B: 5.0} for i in range(10)])
    for normalise in ("min_max", "z_score", "none"):
        step = {"keep_top": {"weighted": {A: 1, B: 100}, "normalise": normalise, "count": 3}}
        selection = choose(con, step)
        assert selection.subset()["f0"].tolist() == [7, 8, 9]
        assert selection.steps[0].note == f"{B}: the same for every row that entered, so without effect"


def test_a_value_without_rank_among_combined_scores_names_its_score(con):
    make_source(con, [{"f0": i, "f1": 0, A: 1.0, B: float("nan") if i == 2 else 0.5} for i in range(4)])
    with pytest.raises(ValueError, match=rf"recipe mine, step 1 .*{B} is nan for uid {2:016x}"):
        choose(con, {"keep_top": {"rank_sum": [A, B], "count": 2}})


def test_a_fraction_counts_from_what_is_within(con):
    rows = make_source(con, [{"f0": i, "f1": 0, A: float(i), "other": i < 40, NAMES[1]: False} for i in range(100)])
    make_sets(con, rows)
    steps = [{"within": "other"}, top(A, fraction=0.9), top(A, fraction=0.8)]
    within = choose(con, *steps)
    assert [report.kept for report in within.steps] == [40, 36, 32]
    assert within.steps[1].text == f"keep the top 0.9 of what is within other by {A}"
    intersected = choose(con, {"intersect": "other"}, *steps[1:])
    assert [report.kept for report in intersected.steps] == [40, 40, 40]


def test_a_union_brings_in_rows_that_the_recipe_did_not_begin_with(con):
    rows = make_source(con, [{"f0": i, "f1": 0, A: float(i), "other": i < 4, NAMES[1]: i in (1, 9)} for i in range(10)])
    make_sets(con, rows)
    selection = select(con, "mine", recipe(top(A, count=2), {"union": NAMES[1]}, **{"from": "other"}))
    assert selection.source_rows == 4
    assert selection.subset()["f0"].tolist() == [1, 2, 3, 9]
    report = selection.steps[1]
    assert (report.entered, report.joined, report.left, report.kept) == (2, 2, 0, 4)
    assert figures(selection) == [(None, None), (2.0, 2), (3.0, 1), (None, None)]


def test_a_set_step_that_keeps_nothing_is_an_error_with_recipe_and_step(con):
    make_sets(con, make_source(con, [{"f0": 0, "f1": 0, "other": True, NAMES[1]: False}]))
    for step in ({"except": "other"}, {"within": NAMES[1]}, {"intersect": NAMES[1]}):
        with pytest.raises(
            ValueError, match=r"recipe mine, step 1 \(.*\): none of the 1 rows that entered stays.*Remedy"
        ):
            choose(con, step)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"keep_top": {"count": 1}}, "exactly one of score, rank_sum, weighted; found none"),
        ({"keep_top": {"score": A, "rank_sum": [A, B], "count": 1}}, "found score and rank_sum"),
        ({"keep_top": {"rank_sum": [A], "count": 1}}, "two or more different scores"),
        ({"keep_top": {"rank_sum": [A, A], "count": 1}}, "two or more different scores"),
        ({"keep_top": {"rank_sum": [A, B], "threshold": 1.0}}, "no meaningful threshold"),
        ({"keep_top": {"weighted": {A: 1, B: 2}, "count": 1}}, "together or not at all"),
        ({"keep_top": {"score": A, "normalise": "rank", "count": 1}}, "together or not at all"),
        ({"keep_top": {"weighted": {A: 1, B: 0}, "normalise": "rank", "count": 1}}, "other than 0"),
        ({"keep_top": {"weighted": {A: 1, B: float("inf")}, "normalise": "rank", "count": 1}}, "finite number"),
        ({"keep_top": {"weighted": {A: 1, B: 1}, "normalise": "max", "count": 1}}, "rank"),
        ({"union": "a", "except": "b"}, "found union and except_"),
        ({"union": "pool"}, "union: name another recipe, or a uid list"),
        ({"within": ""}, "within: name another recipe"),
    ],
)
def test_a_set_or_a_combination_that_makes_no_sense_is_refused(step, message):
    with pytest.raises(ValidationError, match=message):
        recipe(step)


def test_a_recipe_names_the_sets_and_scores_of_all_its_steps():
    mine = recipe(
        {"keep_top": {"weighted": {B: 1, A: 2}, "normalise": "z_score", "fraction": 0.5}},
        {"except": "uids.txt"},
        {"union": "other"},
        {"within": "uids.txt"},
        **{"from": "first"},
    )
    assert mine.columns().scores == (A, B)
    assert mine.sets == ("first", "uids.txt", "other")
    assert mine.recipes == ("first", "other")
    assert Recipe.model_validate(json.loads(json.dumps(mine.definition()))) == mine


def test_an_unknown_set_is_told_with_recipe_and_step():
    recipes = {"first": recipe({"where": "true"}, {"union": "frist"}), "frost": recipe()}
    with pytest.raises(ValueError, match=r"recipe first, step 2 \(add the rows of frist\): there is no recipe 'frist'"):
        check_recipes(recipes, scores=[], pool_columns=[])


# What a recipe may say


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({}, "exactly one of where, keep_top, within"),
        ({"where": "true", **top(A, count=1)}, "exactly one of where, keep_top, within"),
        (top(A), "found none"),
        (top(A, count=1, fraction=0.5), "found fraction and count"),
        (top(A, fraction=0), "greater than 0"),
        (top(A, fraction=1.1), "less than or equal to 1"),
        (top(A, fraction="0.3"), "valid number"),
        (top(A, fraction=True), "valid number"),
        (top(A, count=0), "greater than 0"),
        (top(A, count=2.5), "valid integer"),
        (top(A, threshold=float("nan")), "finite"),
        (top(A, cuont=1), "cuont"),
        ({"were": "true"}, "were"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused(step, message):
    with pytest.raises(ValidationError, match=message):
        recipe(step)


@pytest.mark.parametrize(
    ("predicate", "columns"),
    [
        ("least(width, height) >= 200", {"width", "height"}),
        (f'"{A}" > 0.2 AND caption LIKE \'%"url"%\'', {A, "caption"}),
        ("list_filter([1, 2], lambda x, i: x > i + width) = [1]", {"width"}),
        ("CASE WHEN width > 3 THEN height IS NULL ELSE true END", {"width", "height"}),
        ("TRY_CAST(key AS INT) BETWEEN 1 AND f0", {"key", "f0"}),
        ("shard IN ('a', url)", {"shard", "url"}),
        ("length(regexp_replace(caption, 'a', '', 'g')) > 5", {"caption"}),
        ("nullif(width, 0) > 1", {"width"}),
        ("true", set()),
    ],
)
def test_the_columns_of_a_predicate_are_found(predicate, columns):
    assert predicate_columns(predicate) == columns


@pytest.mark.parametrize(
    ("predicate", "message"),
    [
        ("", "no DuckDB predicate"),
        ("width >", "no DuckDB predicate"),
        ("width > 1; DROP TABLE source", "no DuckDB predicate"),
        ("true) OR (false", "no DuckDB predicate"),
        ("true GROUP BY width", "no DuckDB predicate"),
        ("width IN (SELECT 1)", "a subquery"),
        ("EXISTS (FROM source)", "a subquery"),
        ("row_number() OVER () < 5", "a window"),
        ("width > ?", "a parameter"),
        ("COLUMNS('w.*') > 1", r"uses \*"),
        ("#1 > 1", "column by its number"),
        ("sum(width) > 1", "the function sum"),
        ("random() < 0.5", "the function random"),
        ("today() > DATE '2020-01-01'", "the function today"),
        ("ago(INTERVAL 1 DAY) > NULL", "the function ago"),
        ("nonsense(width)", "the function nonsense"),
        ("uper(caption) = 'A'", "the function uper, which is not in the list; did you mean upper"),
        ("current_localtimestamp() > NULL", "the function current_localtimestamp"),
        ("current_localtimestamp > NULL", "current_localtimestamp, whose value does not depend on the row"),
        ("current_user() = 'me'", "the function current_user"),
        ("CURRENT_USER = 'me'", "CURRENT_USER, whose value"),
        ("pg_sleep(1) IS NULL", "the function pg_sleep"),
        ("PG_SLEEP(1) IS NULL", "the function pg_sleep"),
        ("getenv('HOME') = 'a'", "the function getenv"),
        ("read_text('a') IS NULL", "the function read_text"),
        ("current_setting('threads') = 1", "the function current_setting"),
        ("age(TIMESTAMP '2020-01-01') > INTERVAL 1 DAY", "the function age"),
        ("list_aggregate([width], 'any_value') > 1", "the function list_aggregate"),
        ("list_transform([1], lambda x: pg_sleep(x)) IS NULL", "the function pg_sleep"),
        ("caption.upper() = 'A'", r"write upper\(caption\)"),
        ("clip_score.b32 > 1", 'write a score as "clip_score/b32"'),
        ("caption -> '$.a' = 'x'", "json_extract"),
    ],
)
def test_a_predicate_of_more_than_one_row_or_of_an_unlisted_function_is_refused(predicate, message):
    with pytest.raises(ValidationError, match=message):
        recipe({"where": predicate})


@pytest.mark.parametrize(
    "predicate",
    [
        "width BETWEEN 1 AND 2 AND caption NOT LIKE 'a!%' ESCAPE '!' AND caption ILIKE 'a' AND caption ~ 'a'",
        "CASE WHEN width IN (1, 2) THEN -width % 2 ELSE width ^ 2 // 3 END > 1 AND caption[1:3] || 'a' = 'b'",
        "coalesce(width, 1) = ifnull(width, 2) AND TRY_CAST(caption AS INT) IS DISTINCT FROM 1",
        "extract(year FROM TRY_CAST(caption AS DATE)) > 2000 AND position('a' IN caption) = 1 AND [width][1] = 1",
        "list_filter([1, 2], lambda x: x > width) = [1] AND {'a': width}.a = 1 AND MAP {'a': 1}['a'] = 1",
    ],
)
def test_operators_and_listed_functions_are_allowed(predicate):
    assert predicate_columns(predicate) <= {"width", "caption"}


def test_every_listed_function_depends_on_its_arguments_alone():
    listed = {name for names in FUNCTIONS.values() for name in names.split(", ")}
    with duckdb.connect() as con:
        rows = con.execute(
            "SELECT DISTINCT lower(function_name), function_type, stability, coalesce(macro_definition, '') "
            "FROM duckdb_functions()"
        ).fetchall()
    found = [row for row in rows if row[0] in listed]
    assert {row[0] for row in found} == listed - {"coalesce", "ifnull"}  # which the parser makes an operator
    for name, kind, stability, macro in found:
        assert kind == "macro" or (kind, stability) == ("scalar", "CONSISTENT"), name
        assert "current_" not in macro, name
        assert "select" not in macro.casefold(), name


def test_the_page_about_recipes_lists_the_functions():
    page = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for subject, names in FUNCTIONS.items():
        assert f"| {subject} | {', '.join(f'`{name}`' for name in names.split(', '))} |" in page


def test_a_recipe_tells_pool_columns_from_scores():
    mine = recipe({"where": f'width > 2 AND "{B}" > 0'}, top(A, count=1))
    assert mine.columns() == (("width",), (A, B))


@pytest.mark.parametrize(
    ("source", "kind"), [("pool", "pool"), ("other", "recipe"), ("a/dfn.npy", "uids"), ("uids.txt", "uids")]
)
def test_a_source_is_the_pool_a_recipe_or_a_uid_list(source, kind):
    assert recipe(**{"from": source}).source_kind == kind


def test_a_definition_reads_back_as_the_same_recipe():
    mine = recipe({"where": "width > 2"}, top(A, fraction=0.3), top(B, threshold=-0.1), description="why")
    definition = json.loads(json.dumps(mine.definition()))
    assert definition == {
        "from": "pool",
        "steps": [{"where": "width > 2"}, top(A, fraction=0.3), top(B, threshold=-0.1)],
        "description": "why",
    }
    assert Recipe.model_validate(definition) == mine


def test_unknown_names_are_all_told_at_once_with_close_matches():
    recipes = {
        "first": recipe(top("clip_scoer/b32", count=1), {"where": "widht > 3"}),
        "second": recipe(**{"from": "frist"}),
        "third": recipe({"where": '"norm_sim_inf/b32/imagenetz" > 0'}, **{"from": "first"}),
    }
    with pytest.raises(ValueError, match="recipe") as error:
        check_recipes(recipes, scores=[A, B], pool_columns=["width", "height"])
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    for line, parts in zip(
        lines,
        [
            ("recipe first, step 1", "no score 'clip_scoer/b32'", f"did you mean {A}"),
            ("recipe first, step 2", "no column 'widht'", "did you mean width"),
            ("recipe second, from", "no recipe 'frist'", "did you mean first", ".npy or .txt"),
            ("recipe third, step 1", "no score 'norm_sim_inf/b32/imagenetz'", f"did you mean {B}"),
        ],
        strict=True,
    ):
        assert [part for part in parts if part not in line] == []


def test_recipes_that_rest_on_one_another_are_told_once():
    recipes = {name: recipe(**{"from": source}) for name, source in ["ab", "bc", "ca", "da", "ee"]}
    recipes["f"] = recipe({"union": "g"}, {"except": "a"})
    recipes["g"] = recipe({"within": "x.npy"}, {"intersect": "f"}, {"within": "h"})
    recipes["h"] = recipe({"where": "true"}, {"except": "f"})
    with pytest.raises(ValueError, match="recipes depend") as error:
        check_recipes(recipes, scores=[], pool_columns=[])
    assert str(error.value).splitlines() == [
        "recipes depend on each other: a on b on c on a",
        "recipes depend on each other: e on e",
        "recipes depend on each other: f on g on f",
        "recipes depend on each other: f on g on h on f",
    ]


@pytest.mark.parametrize("name", ["pool", "mine.npy", "mine.txt"])
def test_a_recipe_named_like_another_kind_of_source_is_refused(name):
    with pytest.raises(ValueError, match=f"recipe {re.escape(name)}: .*rename the recipe"):
        check_recipes({name: recipe()}, scores=[], pool_columns=[])


def test_recipes_that_fit_the_project_pass():
    recipes = {
        "one": recipe({"where": "width > 3"}, top(A, fraction=0.3), top("clip_b32_similarity_score", count=2)),
        "two": recipe(**{"from": "one"}),
        "three": recipe(**{"from": "uids.npy"}),
    }
    check_recipes(recipes, scores=[A], pool_columns=["width", "clip_b32_similarity_score"])


def test_uids_of_the_manifest_are_the_numbers_as_text(con):
    make_source(con, [{"f0": 2**64 - 1, "f1": 10}, {"f0": 0, "f1": 2**63}])
    manifest = select(con, "mine", recipe()).manifest().fetchall()
    f0, f1 = parse_uids([row[0] for row in manifest])
    assert [row[1:3] for row in manifest] == list(zip(f0.tolist(), f1.tolist(), strict=True))
    assert [row[0] for row in manifest] == format_uids(f0, f1)


PAGE = Path(__file__).resolve().parents[3] / "docs/recipes.md"
PAGE_SCORES = ["clip_score/b32", "neg_clip_loss/b32", "norm_sim_2/b32/imagenet", "norm_sim_inf/b32/imagenet"]
PAGE_SCORES += ["near_duplicate/b32", "cluster/b32/imagenet", "language/facts"]
PAGE_CONCEPTS = ["concepts/b32", "concept_values/b32", "nearest_target/b32/imagenet"]
PAGE_TABLES = ["target_concepts/b32/imagenet", "target_embeddings/b32/imagenet"]


def test_the_examples_of_the_page_are_recipes_that_choose_rows(con):
    recipes = {}
    for block in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL):
        recipes |= {name: Recipe.model_validate(text) for name, text in yaml.safe_load(block)["recipes"].items()}
    columns = ["width", "height", "caption", "sha256"]
    check_recipes(recipes, scores=PAGE_SCORES + PAGE_CONCEPTS, pool_columns=columns, tables=PAGE_TABLES)
    assert {step.kind for mine in recipes.values() for step in mine.steps} == set(KINDS)
    # steps that read a target's concepts choose rows in test_matching and test_balance
    recipes = {name: mine for name, mine in recipes.items() if not any(step.tables for step in mine.steps)}
    scores = ", ".join(f'(hash(i, {n}) % 1000) / 999.0 AS "{name}"' for n, name in enumerate(PAGE_SCORES))
    con.execute(
        f"""
        CREATE TABLE source AS SELECT hash(i) AS f0, i::UBIGINT AS f1, '' AS shard, '' AS key, 150 + i % 100 AS width,
            300 AS height, 'a picture of dog ' || i AS caption, (i % 3900)::VARCHAR AS sha256,
            i % 3 = 0 AS "in lists/dfn.npy", i % 7 = 0 AS "in lists/hype.npy", {scores}
        FROM range(4000) t(i)
        """
    )
    chosen = {}
    while recipes:
        name = next(name for name, mine in recipes.items() if set(mine.recipes) <= chosen.keys())
        chosen[name] = selection = select(con, name, recipes.pop(name))
        con.register("listed", dict(zip(("f0", "f1"), map(selection.subset().__getitem__, ("f0", "f1")), strict=True)))
        con.execute(
            f"CREATE OR REPLACE TABLE source AS SELECT *, EXISTS (FROM listed AS l WHERE l.f0 = s.f0 AND l.f1 = s.f1) "
            f'AS "in {name}" FROM source AS s'
        )
    rows = {name: selection.rows for name, selection in chosen.items()}
    assert (rows["paper"], rows["strict"], rows["half_and_half"]) == (800, 400, 800)
    assert rows["within_a_published_list"] == int(1334 * 0.8)
    assert rows["union_with_published_lists"] > 1334
    assert (rows["one_of_each_image"], chosen["drawn"].samples) == (3900, 4000)
