"""Steps that compare rows: deduplicate, stratify, soft_cap_sample; and reports."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from core import sql
from core.uids import format_uids
from selection.recipes import sampling
from selection.recipes.execute import select
from selection.recipes.recipe import Recipe, check_recipes
from selection.recipes.sampling import soft_cap_sample
from tests.support.soft_cap import draw_row_by_row

A, B, LANGUAGE = "clip_score/b32", "norm_sim_inf/b32/imagenet", "language/facts"
TYPES = {"f0": "UBIGINT", "f1": "UBIGINT", "shard": "VARCHAR", "key": "VARCHAR", "width": "INTEGER"}
TYPES |= {"sha256": "VARCHAR", LANGUAGE: "VARCHAR", A: "FLOAT", B: "DOUBLE"}


@pytest.fixture
def con():
    with duckdb.connect() as connection:
        yield connection


def make_source(con, rows):
    columns = ", ".join(f'"{name}" {kind}' for name, kind in TYPES.items())
    con.execute(f"CREATE OR REPLACE TABLE source ({columns})")
    con.executemany(
        f"INSERT INTO source VALUES ({', '.join('?' * len(TYPES))})",
        [[{"shard": "00000", "key": str(i), **row}.get(name) for name in TYPES] for i, row in enumerate(rows)],
    )


def recipe(*steps):
    return Recipe.model_validate({"steps": list(steps)})


def choose(con, *steps):
    return select(con, "mine", recipe(*steps))


def chosen(selection):
    return [(int(f0), int(f1)) for f0, f1 in selection.subset().tolist()]


def table(con, selection, step):
    return con.sql(selection.tables[step]).fetchall()


WORD = st.sampled_from([0, 1, 2**63, 2**64 - 1])
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "f0": WORD,
            "f1": st.integers(0, 9) | WORD,
            "width": st.integers(0, 3),
            "sha256": st.sampled_from(["a", "b", "c"]),
            LANGUAGE: st.sampled_from(["en", "de", None]),
            A: st.sampled_from([-0.5, 0.0, 0.25, 1.0]),
            B: st.floats(-2, 2),
        }
    ),
    min_size=1,
    max_size=25,
    unique_by=lambda row: (row["f0"], row["f1"]),
)


def better_first(score):
    return lambda row: (-row[score] if score else 0, row["f0"], row["f1"])


def uids(rows):
    return sorted((row["f0"], row["f1"]) for row in rows)


@settings(max_examples=80, deadline=None)
@given(ROWS, st.sampled_from([None, A, B]), st.booleans())
def test_of_rows_that_are_alike_the_best_stays(rows, best, filtered):
    with duckdb.connect() as con:
        make_source(con, rows)
        entered = [row for row in rows if row["width"] > 0] if filtered else rows
        if not entered:
            return
        step = {"deduplicate": {"by": "image", **({"best": best} if best else {})}}
        selection = choose(con, *([{"where": "width > 0"}] if filtered else []), step)
        stays = {}
        for row in sorted(entered, key=better_first(best)):
            stays.setdefault(row["sha256"], row)
        assert chosen(selection) == uids(stays.values())
        report = selection.steps[-1]
        assert (report.kept, report.left) == (len(stays), len(entered) - len(stays))
        sizes = Counter(row["sha256"] for row in entered)
        assert report.groups == sum(size > 1 for size in sizes.values())
        expected = [
            (row["f0"], row["f1"], stays[row["sha256"]]["f0"], stays[row["sha256"]]["f1"])
            for row in entered
            if row is not stays[row["sha256"]]
        ]
        assert table(con, selection, report.step) == sorted(expected)


def test_equal_hashes_are_not_equal_values(con):
    make_source(con, [{"f0": i, "f1": 0, "sha256": str(i // 2)} for i in range(8)])
    con.execute("CREATE MACRO hash(x) AS 7::UBIGINT")
    try:
        assert chosen(choose(con, {"deduplicate": {"by": "image"}})) == [(0, 0), (2, 0), (4, 0), (6, 0)]
    finally:
        con.execute("DROP MACRO hash")


@pytest.mark.parametrize("at_once", [1 << 25, 70_000])
def test_many_rows_are_compared_a_part_at_a_time(con, monkeypatch, at_once):
    monkeypatch.setattr(sql, "_HASHES_AT_ONCE", at_once)
    con.execute(
        f"""
        CREATE TABLE source AS SELECT hash(i, 3) AS f0, i::UBIGINT AS f1, '' AS shard, '' AS key,
            (hash(i) % 90000)::VARCHAR AS sha256, (hash(i, 1) % 50)::FLOAT AS "{A}"
        FROM range(300000) t(i)
        """
    )
    selection = choose(con, {"deduplicate": {"by": "image", "best": A}})
    expected = con.sql(
        f'SELECT f0, f1 FROM source QUALIFY row_number() OVER (PARTITION BY sha256 ORDER BY "{A}" DESC, f0, f1) = 1 '
        "ORDER BY f0, f1"
    ).fetchnumpy()
    np.testing.assert_array_equal(selection.subset()["f0"], expected["f0"])
    assert selection.rows == len(expected["f0"]) < 90_001


def test_a_row_without_a_digest_is_an_error_that_names_it(con):
    make_source(con, [{"f0": 5, "f1": i, "sha256": None if i else "a"} for i in range(3)])
    with pytest.raises(ValueError, match=r"step 1.*sha256 has no value for uid 0{15}50{15}1 \(2 such rows.*Remedy"):
        choose(con, {"deduplicate": {"by": "image"}})


def test_nan_is_no_value_to_compare(con):
    make_source(con, [{"f0": i, "f1": 0, B: math.nan if i > 1 else 0.5} for i in range(4)])
    with pytest.raises(ValueError, match=r"has no value for uid 0{15}2.*isnan") as error:
        choose(con, {"deduplicate": {"by": B}})
    remedy = str(error.value).partition("where: '")[2].partition("'")[0]
    assert chosen(choose(con, {"where": remedy}, {"deduplicate": {"by": B}})) == [(0, 0)]


def test_a_uid_has_no_copies_left(con):
    make_source(con, [{"f0": i, "f1": 0} for i in range(3)])
    report = choose(con, {"deduplicate": {"by": "uid"}}).steps[0]
    assert (report.kept, report.left) == (3, 0)
    assert "the first stayed" in report.note


def test_rows_that_are_too_like_a_better_one_are_dropped(con):
    make_source(con, [{"f0": i, "f1": 0, B: value} for i, value in enumerate([-1.0, 0.95, 0.951, 0.2])])
    selection = choose(con, {"deduplicate": {"by": B, "above": 0.95}})
    assert chosen(selection) == [(0, 0), (1, 0), (3, 0)]
    assert (selection.steps[0].threshold, selection.steps[0].scores) == (0.95, (B,))
    make_source(con, [{"f0": 0, "f1": 0, B: None}])
    with pytest.raises(ValueError, match="norm_sim_inf/b32/imagenet is NULL for uid"):
        choose(con, {"deduplicate": {"by": B, "above": 0.95}})


def test_nothing_is_above_zero_also_where_zero_is_the_limit(con):
    make_source(con, [{"f0": i, "f1": 0, B: value} for i, value in enumerate([-0.5, 0.0, 0.5])])
    assert chosen(choose(con, {"deduplicate": {"by": B, "above": 0.0}})) == [(0, 0), (1, 0)]


@settings(max_examples=80, deadline=None)
@given(ROWS, st.sampled_from(["width", LANGUAGE, "sha256"]), st.sampled_from([0.3, 0.29, 0.5, 1.0, 1, 2, 7]))
def test_each_stratum_keeps_its_own_top(rows, by, limit):
    with duckdb.connect() as con:
        make_source(con, rows)
        limited = {"count": limit} if isinstance(limit, int) else {"fraction": limit}
        steps = [{"where": "width < 3"}, {"stratify": {"by": by, "score": A, **limited}}]
        strata = {}
        for row in sorted(rows, key=better_first(A)):
            strata.setdefault(row[by], []).append(row)
        kept, told = [], {}
        for value, stratum in strata.items():
            wanted = limit if isinstance(limit, int) else int(len(stratum) * Fraction(str(limit)))
            inside = [row for row in stratum if row["width"] < 3]
            kept += inside[:wanted]
            last = inside[:wanted][-1] if inside[:wanted] else None
            tie = (last[A], last["f0"], last["f1"]) if last else (None, None, None)
            told[value] = (len(stratum), len(inside), wanted, len(inside[:wanted]), *tie)
        if not any(row["width"] < 3 for row in rows) or not kept:
            with pytest.raises(ValueError, match=r"none of the|less than one row in every one"):
                choose(con, *steps)
            return
        selection = choose(con, *steps)
        assert chosen(selection) == uids(kept)
        assert {row[0]: row[1:] for row in table(con, selection, 2)} == told
        report = selection.steps[1]
        assert (report.kept, report.wanted, report.groups) == (len(kept), len(kept), len(strata))
        ranks = {}
        for stratum in strata.values():
            inside = [row for row in stratum if row["width"] < 3]
            ranks |= {(row["f0"], row["f1"]): (row[A], rank) for rank, row in enumerate(inside, start=1)}
        manifest = selection.manifest()
        assert manifest.columns[5:] == ["step2_value", "step2_rank"]
        assert [row[5:] for row in manifest.fetchall()] == [ranks[uid] for uid in uids(kept)]


def test_after_a_within_strata_count_from_what_is_within(con):
    make_source(con, [{"f0": i, "f1": 0, "width": i % 2, A: float(i)} for i in range(12)])
    con.execute('ALTER TABLE source ADD COLUMN "in lists/dfn.npy" BOOLEAN')
    con.execute('UPDATE source SET "in lists/dfn.npy" = f0 < 8')
    selection = choose(con, {"within": "lists/dfn.npy"}, {"stratify": {"by": "width", "score": A, "fraction": 0.5}})
    assert chosen(selection) == [(4, 0), (5, 0), (6, 0), (7, 0)]
    assert "counted from what is within lists/dfn.npy" in selection.steps[1].text


def test_later_steps_rank_what_the_grouped_steps_left(con):
    rows = [{"f0": i, "f1": 0, "width": i % 3, "sha256": str(i // 2), A: float(i), B: float(-i)} for i in range(30)]
    make_source(con, rows)
    selection = choose(
        con,
        {"deduplicate": {"by": "image", "best": A}},
        {"stratify": {"by": "width", "score": A, "count": 4}},
        {"keep_top": {"rank_sum": [A, B], "count": 5}},
        {"where": "width > 0"},
    )
    odd = [row for row in rows if row["f0"] % 2]
    strata = [sorted((row for row in odd if row["width"] == w), key=better_first(A))[:4] for w in range(3)]
    all_equal = sorted(itertools.chain(*strata), key=better_first(None))[:5]  # every sum of ranks is the same
    assert chosen(selection) == uids(row for row in all_equal if row["width"])
    assert [report.kept for report in selection.steps] == [15, 12, 5, selection.rows]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"deduplicate": {"by": B, "above": 0.9, "best": A}}, "has decided already which row is better"),
        ({"deduplicate": {"by": "uid", "best": A}}, "copies of a uid are one sample"),
        ({"deduplicate": {"by": B, "above": math.nan}}, "finite"),
        ({"deduplicate": {}}, "Field required"),
        ({"deduplicate": {"by": "image", "above": 0.9}}, "image is no number"),
        ({"deduplicate": {"by": "near_duplicate/b32"}}, "Remedy: set above"),
        ({"stratify": {"by": "width", "score": A}}, "stratify needs exactly one of fraction, count"),
        ({"stratify": {"by": "width", "fraction": 0.5}}, "stratify needs exactly one of score, rank_sum, weighted"),
        ({"stratify": {"by": "width", "score": A, "threshold": 1.0}}, "Extra inputs"),
        ({"soft_cap_sample": {"score": A}}, "soft_cap_sample needs exactly one of fraction, count"),
        ({"soft_cap_sample": {"rank_sum": [A, B], "count": 1}}, "ranks have no meaningful softmax"),
        ({"soft_cap_sample": {"score": A, "count": 1, "penalty": -1}}, "greater than or equal to 0"),
        ({"soft_cap_sample": {"score": A, "count": 1, "temperature": 0}}, "greater than 0"),
        ({"report": ["width"]}, "found none"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused(step, message):
    with pytest.raises(ValidationError, match=message):
        recipe(step)


def test_nothing_follows_a_draw():
    draw = {"soft_cap_sample": {"score": A, "count": 1}}
    with pytest.raises(
        ValidationError, match=r"step 1 draws rows several times.*Remedy: make soft_cap_sample the last step"
    ):
        recipe(draw, {"where": "true"})


# Drawing


def words(n, seed=0):
    return np.random.default_rng(seed).integers(0, 2**64, (2, n), dtype=np.uint64)


@pytest.mark.parametrize(
    ("n", "samples", "batch", "penalty", "temperature"),
    [(1, 5, 3, 0.15, 1.0), (40, 7, 100, 0.15, 1.0), (40, 333, 10, 0.25, 0.1), (40, 100, 40, 0.0, 2.0), (9, 8, 1, 9, 1)],
)
def test_draws_are_those_of_the_plain_way(n, samples, batch, penalty, temperature):
    f0, f1 = words(n)
    values = np.random.default_rng(1).normal(size=n)
    how = {"samples": samples, "batch": batch, "penalty": penalty, "temperature": temperature, "seed": 3}
    copies = soft_cap_sample(values, f0, f1, **how)
    assert copies.tolist() == draw_row_by_row(values, f0, f1, **how)
    assert copies.sum() == samples
    shuffled = np.random.default_rng(2).permutation(n)
    np.testing.assert_array_equal(
        soft_cap_sample(values[shuffled], f0[shuffled], f1[shuffled], **how), copies[shuffled]
    )


def test_one_draw_a_round_without_penalty_follows_the_softmax():
    f0, f1 = words(4)
    values = np.array([0.0, 1.0, 2.0, -1.0])
    copies = soft_cap_sample(values, f0, f1, samples=20_000, batch=1, penalty=0.0, temperature=0.7)
    expected = np.exp(values / 0.7) / np.exp(values / 0.7).sum()
    error = np.sqrt(expected * (1 - expected) / 20_000)
    assert (abs(copies / 20_000 - expected) < 4 * error).all()


def test_a_batch_is_drawn_without_replacement_one_after_the_other():
    f0, f1 = words(3)
    p = np.array([0.6, 0.3, 0.1])
    left_out = np.zeros(3)
    for seed in range(4_000):
        left_out += soft_cap_sample(np.log(p), f0, f1, samples=2, batch=2, penalty=0.0, seed=seed) == 0
    expected = [
        sum(p[i] * p[j] / (1 - p[i]) for i, j in itertools.permutations({0, 1, 2} - {row}, 2)) for row in range(3)
    ]
    error = np.sqrt(np.multiply(expected, np.subtract(1, expected)) / 4_000)
    assert (abs(left_out / 4_000 - expected) < 4 * error).all()


def test_a_penalty_evens_out_what_is_drawn():
    f0, f1 = words(50)
    values = np.linspace(0, 3, 50)
    without, hard = (
        soft_cap_sample(values, f0, f1, samples=1000, batch=10, penalty=penalty) for penalty in (0.0, 100.0)
    )
    assert hard.tolist() == [20] * 50
    assert without.max() > 40


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"batch": 0}, {"temperature": 0.0}, {"values": np.array([math.nan] * 3)}]
)
def test_what_can_not_be_drawn_is_an_error(wrong):
    f0, f1 = words(3)
    given = {"values": np.zeros(3), "samples": 1, "batch": 1, "penalty": 0.0, **wrong}
    with pytest.raises(ValueError, match="above 0"):
        soft_cap_sample(given.pop("values"), f0, f1, **given)


def test_a_drawn_subset_has_a_row_for_each_sample_and_its_copies(con):
    f0, f1 = words(30)
    values = np.random.default_rng(1).normal(size=30)
    languages = ["en"] * 20 + ["de"] * 10
    rows = [{"f0": int(f0[i]), "f1": int(f1[i]), B: float(values[i]), LANGUAGE: languages[i]} for i in range(30)]
    make_source(con, rows)
    draw = {"score": B, "fraction": 1.2, "batch": 12, "penalty": 0.1, "temperature": 0.5, "seed": 9}
    selection = choose(con, {"where": f"\"{LANGUAGE}\" = 'en'"}, {"soft_cap_sample": draw})
    expected = soft_cap_sample(
        values[:20], f0[:20], f1[:20], samples=36, batch=12, penalty=0.1, temperature=0.5, seed=9
    )
    copies = {uid: int(times) for uid, times in zip(format_uids(f0[:20], f1[:20]), expected, strict=True) if times}
    manifest = selection.manifest()
    assert manifest.columns == ["uid", "f0", "f1", "shard", "key", "step2_value", "copies"]
    assert {row[0]: row[-1] for row in manifest.fetchall()} == copies
    report = selection.steps[1]
    assert (selection.samples, report.samples, report.wanted) == (36, 36, 36)
    assert (selection.rows, report.kept, report.entered) == (len(copies), len(copies), 20)
    assert len(copies) < 20, "some are never drawn, and rank among the others all the same"
    assert {*copies.values()} - {1}, "some are drawn several times"
    order = np.argsort(-values[:20])
    rank = {format_uids(f0, f1)[row]: place for place, row in enumerate(order, start=1)}
    assert selection.ranks()["step2_rank"].tolist() == [rank[row[0]] for row in manifest.fetchall()]


def test_of_equal_keys_the_smaller_uids_are_drawn():
    f0, f1 = words(9)
    copies = soft_cap_sample(np.full(9, 1e300), f0, f1, samples=4, batch=4, penalty=0.0)  # which swallows what is added
    order = np.lexsort((f1, f0))
    assert np.flatnonzero(copies).tolist() == sorted(order[:4])


@pytest.mark.parametrize("at_once", [7, 1 << 18])
def test_draws_do_not_depend_on_how_rows_are_shared_out(monkeypatch, at_once):
    f0, f1 = words(100)
    values = np.random.default_rng(1).normal(size=100)
    how = {"samples": 150, "batch": 40, "penalty": 0.15, "temperature": 1.0, "seed": 0}
    monkeypatch.setattr(sampling, "_ROWS", at_once)
    assert soft_cap_sample(values, f0, f1, **how).tolist() == draw_row_by_row(values, f0, f1, **how)


def test_the_same_rows_give_the_same_subset_on_any_number_of_threads():
    def made(threads):
        with duckdb.connect() as con:
            con.execute(f"SET threads = {threads}")
            con.execute(
                f"""
                CREATE TABLE source AS SELECT hash(i, 3) AS f0, i::UBIGINT AS f1, '' AS shard, '' AS key,
                    (hash(i) % 200000)::VARCHAR AS sha256, (hash(i, 1) % 50)::FLOAT AS "{A}",
                    (hash(i, 2) % 30)::INTEGER AS width
                FROM range(300000) t(i)
                """
            )
            selection = choose(
                con,
                {"deduplicate": {"by": "image", "best": A}, "report": ["width", A]},
                {"stratify": {"by": "width", "score": A, "fraction": 0.3}},
                {"soft_cap_sample": {"score": A, "count": 60000, "batch": 7000, "temperature": 9.0}},
            )
            ranks = {name: found.tolist() for name, found in selection.ranks().items()}
            tables = [con.sql(query).fetchall() for query in selection.tables.values()]
            return selection.manifest().fetchall(), ranks, tables, selection.steps

    for one, four in zip(made(1), made(4), strict=True):
        assert one == four


def test_a_temperature_that_overflows_is_an_error_of_its_step(con):
    make_source(con, [{"f0": i, "f1": 0, B: float(i + 1)} for i in range(3)])
    with pytest.raises(ValueError, match=r"recipe mine, step 1.*temperature 1e-320 is too small"):
        choose(con, {"soft_cap_sample": {"score": B, "count": 2, "temperature": 1e-320}})


def test_two_draws_are_told_apart_by_their_text():
    base = {"score": A, "count": 5}
    texts = {recipe({"soft_cap_sample": base | more}).steps[0].text for more in ({}, {"seed": 1}, {"batch": 7})}
    assert len(texts) == 3


def test_less_than_one_draw_is_an_error(con):
    make_source(con, [{"f0": i, "f1": 0, A: 0.0} for i in range(9)])
    with pytest.raises(ValueError, match=r"fraction 0.1 of the 9 rows .* less than one row"):
        choose(con, {"soft_cap_sample": {"score": A, "fraction": 0.1}})


# What a step tells of columns


def told(report):
    return {(row["name"], row["what"]): (row["entered"], row["kept"], row["dropped"]) for row in report.summary}


def test_a_report_gives_quartiles_of_numbers_and_counts_of_values(con):
    rows = [{"f0": i, "f1": 0, "width": i, A: i / 4, LANGUAGE: "en" if i % 3 else "de"} for i in range(1, 10)]
    make_source(con, [*rows, {"f0": 0, "f1": 0, A: 100.0}])
    step = {"keep_top": {"score": A, "count": 5}, "report": ["width", LANGUAGE]}
    assert told(choose(con, step).steps[0]) == {
        ("width", "smallest"): (1.0, 6.0, 1.0),
        ("width", "lower quartile"): (3.0, 6.0, 2.0),
        ("width", "median"): (5.0, 7.0, 3.0),
        ("width", "upper quartile"): (7.0, 8.0, 4.0),
        ("width", "largest"): (9.0, 9.0, 5.0),
        ("width", "missing"): (1, 1, 0),
        (LANGUAGE, "en"): (6, 2, 4),
        (LANGUAGE, "de"): (3, 2, 1),
        (LANGUAGE, "missing"): (1, 1, 0),
    }


def test_a_row_that_a_null_dropped_is_among_the_dropped(con):
    make_source(con, [{"f0": i, "f1": 0, "width": i if i < 6 else None, B: float(i)} for i in range(10)])
    summary = told(choose(con, {"where": "width > 3", "report": ["width", B]}).steps[0])
    assert summary["width", "missing"] == (4, 0, 4)
    assert summary[B, "largest"] == (9.0, 5.0, 9.0)


def test_a_text_can_not_be_ranked():
    recipes = {"mine": recipe({"deduplicate": {"by": "image", "best": LANGUAGE}})}
    with pytest.raises(ValueError, match="language/facts holds text or lists, which have no rank"):
        check_recipes(recipes, scores=[LANGUAGE], pool_columns=["sha256"], texts=[LANGUAGE, "sha256"])


def test_a_report_of_a_group_without_rows_has_no_quartiles(con):
    make_source(con, [{"f0": i, "f1": 0, "width": 1} for i in range(3)])
    summary = told(choose(con, {"where": "true", "report": ["width"]}).steps[0])
    assert summary["width", "median"] == (1.0, 1.0, None)
    assert ("width", "missing") not in summary


def test_a_report_names_the_commonest_values_and_counts_the_others(con):
    rows = [{"f0": i, "f1": j, LANGUAGE: f"l{i:02}"} for i in range(12) for j in range(13 - i)]
    make_source(con, rows)
    summary = choose(con, {"where": "f1 > 0", "report": [LANGUAGE]}).steps[0].summary
    assert [row["what"] for row in summary] == [*(f"l{i:02}" for i in range(10)), "all others"]
    assert summary[-1] == {"name": LANGUAGE, "what": "all others", "entered": 5, "kept": 3, "dropped": 2}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.5, 0.25, 2.0, math.inf, math.nan, None]) | st.floats(-9, 9), min_size=1))
def test_quartiles_are_values_of_the_rows(values):
    with duckdb.connect() as con:
        make_source(con, [{"f0": i, "f1": 0, B: value} for i, value in enumerate(values)])
        summary = told(choose(con, {"where": "true", "report": [B]}).steps[0])
        finite = sorted(value for value in values if value is not None and math.isfinite(value))
        n = len(finite)
        for what, q in (("smallest", 0), ("lower quartile", 1), ("median", 2), ("upper quartile", 3), ("largest", 4)):
            expected = finite[max(-(-n * q // 4), 1) - 1] if n else None
            assert summary[B, what][:2] == (expected, expected)
        assert summary.get((B, "missing"), (0,))[0] == len(values) - n


def test_a_recipe_needs_the_columns_that_it_reports():
    mine = recipe({"where": "true", "report": ["width", A]}, {"stratify": {"by": LANGUAGE, "score": B, "count": 1}})
    assert mine.columns() == (("width",), (A, LANGUAGE, B))
    assert recipe({"deduplicate": {"by": "image", "best": A}}).columns() == (("sha256",), (A,))
    assert recipe({"deduplicate": {"by": "uid"}}).columns() == ((), ())


def test_begun_steps_are_applied_by_their_predicates_and_not_executed_again(con) -> None:
    make_source(con, [{"f0": 0, "f1": n, A: n / 10, B: (n * 7 % 10) / 10} for n in range(10)])
    steps = [{"keep_top": {"score": A, "fraction": 0.6}}, {"keep_top": {"score": B, "count": 2}}]
    whole = choose(con, *steps)
    again = select(con, "mine", recipe(*steps), begun=whole.steps[:1])
    assert chosen(again) == chosen(whole)
    assert again.steps == whole.steps
    con.execute("DELETE FROM source WHERE f1 % 2 = 1")  # as in a part of the pool
    part = select(con, "mine", recipe(*steps), begun=whole.steps)
    assert set(chosen(part)) == {uid for uid in chosen(whole) if uid[1] % 2 == 0}
    assert [step.threshold for step in part.steps] == [step.threshold for step in whole.steps]
    con.execute("DELETE FROM source WHERE f1 > 3")
    assert select(con, "mine", recipe(*steps), begun=whole.steps).rows == 0
    with pytest.raises(ValueError, match=r"step 2 \(.*\): no row reaches this step"):
        select(con, "mine", recipe(*steps), begun=whole.steps[:1])
