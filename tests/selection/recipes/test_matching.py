"""The step `match_distribution` on a relation: which rows it reads, what it records, and what it refuses."""

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from selection.recipes.distribution import Features, match_distribution
from selection.recipes.execute import select
from selection.recipes.recipe import Recipe

ROWS, K, CONCEPTS = 600, 4, 40
FEATURES, TARGET = "sparse_features/tiny", "target_concepts/tiny/pets"
MATCH = {"features": FEATURES, "target": "pets", "quality": "q/tiny", "fraction": 0.1}


def _lists(values):
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _pool(seed=0, encoder="tiny"):
    """Return the columns of a pool: common concepts of the pool are rare in the target."""
    random = np.random.default_rng(seed)
    common = 1 / np.arange(1, CONCEPTS + 1)
    drawn = common / common.sum()
    index = np.sort([random.choice(CONCEPTS, K, replace=False, p=drawn) for _ in range(ROWS)], axis=1)
    value = random.random((ROWS, K)).astype(np.float16)
    value[random.random((ROWS, K)) < 0.1] = 0
    return {
        "f0": np.random.default_rng(99).integers(0, 1 << 62, ROWS).astype(np.uint64),
        "f1": np.arange(ROWS, dtype=np.uint64),
        f"concepts/{encoder}": index.astype(np.int32),
        f"concept_values/{encoder}": value.astype(np.float32),
        "q/tiny": random.random(ROWS),
    }


def _target(concepts=CONCEPTS):
    share = np.arange(1.0, concepts + 1)
    labels = [f"word{number}" for number in range(concepts)]
    return pa.table({"concept": np.arange(concepts), "label": labels, "share": share / share.sum()})


def _open(columns, targets=None, threads=2, order=None):
    con = duckdb.connect(config={"threads": threads})
    arrays = {name: _lists(value) if value.ndim == 2 else value for name, value in columns.items()}
    table = pa.table({**arrays, "shard": ["0"] * ROWS, "key": ["k"] * ROWS})
    con.register("rows", table if order is None else table.take(order))
    con.execute("CREATE TEMP TABLE source AS FROM rows").fetchall()
    for name, target in (targets or {TARGET: _target()}).items():
        con.register(name, target)
    return con


def _select(con, *steps):
    return select(con, "matched", Recipe.model_validate({"steps": list(steps)}))


def _tables(selection, step):
    queries = (selection.tables[step], selection.concepts[step])
    return [selection.manifest().to_arrow_table(), *(selection.con.sql(q).to_arrow_table() for q in queries)]


def test_the_rows_that_entered_are_matched_with_quality_in_thirds():
    columns = _pool()
    selection = _select(
        _open(columns), {"where": "f1 < 450"}, {"match_distribution": {**MATCH, "lambda": 0.25, "seed": 3}}
    )
    quality = columns["q/tiny"][:450]
    thirds = np.searchsorted(np.sort(quality)[[150, 300]], quality, side="right")
    found = match_distribution(
        Features(columns["concepts/tiny"][:450], columns["concept_values/tiny"][:450].astype(np.float16)),
        np.asarray(_target()["share"]),
        thirds,
        columns["f0"][:450],
        columns["f1"][:450],
        count=60,
        trade_off=0.25,
        seed=3,
    )
    manifest, rows, concepts = (table.to_pydict() for table in _tables(selection, 2))
    places = dict(zip(manifest["f1"], zip(manifest["step2_rank"], manifest["step2_value"], strict=True), strict=True))
    assert places == {
        row: (position, gain) for position, (row, gain) in enumerate(zip(found.rows, found.gain, strict=True), 1)
    }
    assert rows["f0"] == manifest["f0"]
    assert rows["position"] == manifest["step2_rank"]
    assert concepts["mass"] == found.mass.tolist()
    assert np.allclose(concepts["selected"], found.mass / found.mass.sum())
    assert concepts["label"][7] == "word7"
    report = selection.steps[-1]
    assert (report.entered, report.kept, report.wanted) == (450, 60, 60)
    assert selection.ranks() == {}


def test_the_result_depends_on_neither_threads_nor_the_order_of_rows():
    first = _tables(_select(_open(_pool(), threads=1), {"match_distribution": MATCH}), 1)
    order = np.random.default_rng(1).permutation(ROWS)
    second = _tables(_select(_open(_pool(), threads=4, order=order), {"match_distribution": MATCH}), 1)
    assert [a.equals(b) for a, b in zip(first, second, strict=True)] == [True] * 3


def test_several_encoders_share_the_target_equally():
    other = {name: value for name, value in _pool(1, "big").items() if name.endswith("big")}
    other["concepts/big"] //= 2
    other["concepts/big"] += np.arange(K, dtype=np.int32) * (CONCEPTS // 2)
    targets = {TARGET: _target(), "target_concepts/big/pets": _target(CONCEPTS * 2 + 10)}
    con = _open(_pool() | other, targets)
    selection = _select(
        con,
        {
            "match_distribution": {
                "features": [FEATURES, "sparse_features/big"],
                "target": "pets",
                "lambda": 1,
                "count": 30,
            }
        },
    )
    concepts = con.sql(f"SELECT features, count(*), sum(target) FROM ({selection.concepts[1]}) GROUP BY 1 ORDER BY 1")
    assert concepts.fetchall() == [
        ("sparse_features/big", CONCEPTS * 2 + 10, pytest.approx(0.5)),
        (FEATURES, CONCEPTS, pytest.approx(0.5)),
    ]
    mass = dict(con.sql(f"SELECT (features, concept), mass FROM ({selection.concepts[1]}) WHERE mass > 0").fetchall())
    summed = " UNION ALL ".join(
        f"SELECT ('sparse_features/{e}', unnest(\"concepts/{e}\")::BIGINT) AS concept, "
        f'unnest("concept_values/{e}") AS z '
        f"FROM source SEMI JOIN ({selection.tables[1]}) USING (f0, f1)"
        for e in ("tiny", "big")
    )
    assert mass == dict(con.sql(f"SELECT concept, sum(z) FROM ({summed}) GROUP BY 1 HAVING sum(z) > 0").fetchall())


def test_a_count_above_the_rows_that_entered_keeps_all_with_a_note():
    selection = _select(_open(_pool()), {"where": "f1 < 20"}, {"match_distribution": {**MATCH, "fraction": 0.5}})
    assert selection.rows == 20
    assert selection.steps[-1].note.startswith("20 rows entered, fewer than the 300 wanted: all stay")


def test_concepts_that_are_too_many_for_the_rows_are_noted():
    few = _select(_open(_pool()), {"match_distribution": {**MATCH, "fraction": None, "count": 3}})
    assert "of the target lies in concepts of which the 3 rows hold little" in few.steps[0].note
    common = pa.table({"concept": np.arange(CONCEPTS), "label": ["w"] * CONCEPTS, "share": np.eye(CONCEPTS)[0]})
    enough = _select(_open(_pool(), {TARGET: common}), {"match_distribution": MATCH | {"fraction": 0.5}})
    assert enough.steps[0].note is None


def test_equal_quality_has_no_effect_and_a_note():
    columns = _pool() | {"q/tiny": np.full(ROWS, 0.5)}
    selection = _select(_open(columns), {"match_distribution": MATCH})
    assert "q/tiny: the same for every row that entered" in selection.steps[0].note


@pytest.mark.parametrize(
    ("changed", "targets", "message"),
    [
        ({"q/tiny": np.full(ROWS, np.nan)}, None, "q/tiny"),
        ({}, {TARGET: _target(20)}, "has concepts that target_concepts/tiny/pets lacks"),
        ({}, {TARGET: _target().slice(1)}, "is not a distribution over concepts from 0"),
        ({"concepts/tiny": np.zeros((ROWS, K + 1), np.int32)}, None, "do not have 5 entries in 600"),
        ({"concept_values/tiny": np.full((ROWS, K), -1, np.float32)}, None, "finite and not negative"),
    ],
)
def test_features_that_do_not_fit_stop_the_step(changed, targets, message):
    with pytest.raises(ValueError, match=rf"recipe matched, step 1 .*{message}"):
        _select(_open(_pool() | changed, targets), {"match_distribution": MATCH})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": None}, "needs exactly one of fraction, count; found none"),
        ({"count": 5}, "found fraction and count"),
        ({"quality": None}, "set quality, or lambda: 1"),
        ({"features": "embeddings/tiny"}, "is not of the form sparse_features/<encoder>"),
        ({"features": [FEATURES, FEATURES]}, "an encoder is listed twice"),
        ({"lambda": 2}, "lambda"),
        ({"epsilon": 0}, "epsilon"),
    ],
)
def test_a_wrong_setting_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate({"steps": [{"match_distribution": MATCH | change}]})
