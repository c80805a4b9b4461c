"""The step `balance`: both forms against brute force, and each source of concepts."""

import re
from collections import Counter
from math import prod

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from selection.recipes.execute import select
from selection.recipes.recipe import Recipe
from selection.scores.negatives import keyed_hash

ROWS = 400
WORDS = ["dog", "cat", "tree", "boat", "zebra", "Über", "a"]


def _source(seed=0):
    random = np.random.default_rng(seed)
    drawn = np.array([0.5, 0.25, 0.12, 0.08, 0.02, 0.02, 0.01])
    captions = [" ".join(random.choice(WORDS, random.integers(0, 4), p=drawn)) + "!" for _ in range(ROWS)]
    captions[3] = None
    concepts = np.sort([random.choice(6, 2, replace=False) for _ in range(ROWS)], axis=1).astype(np.int32)
    values = random.random((ROWS, 2)).astype(np.float32)
    values[:40, 0] = 0
    lists = {"concepts/tiny": concepts, "concept_values/tiny": values}
    return pa.table(
        {
            "f0": random.permutation(ROWS).astype(np.uint64),
            "f1": np.zeros(ROWS, np.uint64),
            "shard": ["0"] * ROWS,
            "key": ["k"] * ROWS,
            "caption": captions,
            "nearest_target/tiny/pets": random.integers(0, 5, ROWS),
            "sort/given": [None if n % 7 == 0 else f"s{n % 3}" for n in range(ROWS)],
            **{n: pa.FixedSizeListArray.from_arrays(pa.array(v.ravel()), 2) for n, v in lists.items()},
        }
    )


def _select(table, balance, threads=2):
    con = duckdb.connect(config={"threads": threads})
    con.register("rows", table)
    con.execute("CREATE TEMP TABLE source AS FROM rows").fetchall()
    con.register("target_embeddings/tiny/pets", pa.table({"target_index": range(5), "label": list("ababc")}))
    con.register("sparse_autoencoder/tiny", pa.table({"concept": range(-1, 6), "label": ["", *"uvwxyz"]}))
    return select(con, "balanced", Recipe.model_validate({"steps": [{"balance": balance}]}))


def _kept(selection):
    return [f0 for (f0,) in selection.con.sql(f"SELECT f0 FROM ({selection.tables[1]}) WHERE kept").fetchall()]


def _words(caption):
    return set(re.findall(r"\w+", (caption or "").lower()))


@pytest.mark.parametrize("cap", [1, 20, 1000])
def test_rows_stay_by_the_chance_of_their_concepts(cap):
    table = _source()
    selection = _select(table, {"concepts": "caption", "cap": cap, "seed": 5})
    rows = {
        f0: _words(caption) for f0, caption in zip(table["f0"].to_pylist(), table["caption"].to_pylist(), strict=True)
    }
    counts = Counter(word for words in rows.values() for word in words)
    expected = []
    for f0, words in sorted(rows.items()):
        chance = 1 - prod(1 - cap / max(cap, counts[word]) for word in words) if words else 0
        bits = int(keyed_hash(5, 5 << 60, np.array([f0], np.uint64), np.zeros(1, np.uint64))[0])
        if (bits >> 11) / 2**53 < chance:
            expected.append(f0)
    assert _kept(selection) == expected
    assert 0 < len(expected) < ROWS, "rows without a word go at any cap"
    concepts = selection.con.sql(selection.concepts[1]).fetchall()
    after = Counter(word for f0 in expected for word in rows[f0])
    assert concepts == [(n, word, counts[word], after[word]) for n, word in enumerate(sorted(counts))]


def test_a_rare_concept_stays_whole():
    selection = _select(_source(), {"concepts": "caption", "cap": 10})
    rare = selection.con.sql(f"SELECT entered, selected FROM ({selection.concepts[1]}) WHERE entered <= 10").fetchall()
    assert rare
    assert all(entered == selected for entered, selected in rare)


@pytest.mark.parametrize("cap", [3, 25])
def test_rows_are_taken_by_the_largest_gain(cap):
    table = _source(1)
    selection = _select(table, {"concepts": "caption", "cap": cap, "form": "greedy", "count": 60})
    rows = {
        f0: _words(caption) for f0, caption in zip(table["f0"].to_pylist(), table["caption"].to_pylist(), strict=True)
    }
    counts, taken, gains = Counter(word for words in rows.values() for word in words), Counter(), {}
    while len(gains) < 60:

        def gain(f0):
            parts = [(cap - taken[w]) / cap + 1 / counts[w] for w in sorted(rows[f0]) if taken[w] < cap]
            return sum(parts) / len(rows[f0]) if rows[f0] else 0

        best = max((f0 for f0 in rows if f0 not in gains), key=lambda f0: (round(gain(f0), 12), -f0))
        if not gain(best):
            break
        gains[best] = gain(best)
        taken.update(rows[best])
    assert _kept(selection) == sorted(gains)
    found = dict(selection.con.sql(f"SELECT f0, value FROM ({selection.tables[1]}) WHERE kept").fetchall())
    assert found == {f0: pytest.approx(value) for f0, value in gains.items()}
    assert (selection.steps[0].note is None) == (len(gains) == 60)


@pytest.mark.parametrize(
    ("concepts", "labels"),
    [
        ("nearest_target/tiny/pets", {"a", "b", "c"}),
        ("sparse_features/tiny", {f"{label} #{n}" for n, label in enumerate("uvwxyz")}),
        ("sort/given", {"s0", "s1", "s2"}),
    ],
)
def test_concepts_come_from_targets_features_or_any_column(concepts, labels):
    table = _source()
    selection = _select(table, {"concepts": concepts, "cap": 30})
    counts = {label: entered for _, label, entered, _ in selection.con.sql(selection.concepts[1]).fetchall()}
    assert set(counts) == labels
    expected = {
        "nearest_target/tiny/pets": Counter("ababc"[n] for n in table["nearest_target/tiny/pets"].to_pylist()),
        "sort/given": Counter(name for name in table["sort/given"].to_pylist() if name),
        "sparse_features/tiny": Counter(
            f"{'uvwxyz'[c]} #{c}"
            for row, values in zip(
                table["concepts/tiny"].to_pylist(), table["concept_values/tiny"].to_pylist(), strict=True
            )
            for c, z in zip(row, values, strict=True)
            if z > 0
        ),
    }[concepts]
    assert counts == expected


def test_only_given_words_count():
    selection = _select(_source(), {"concepts": "caption", "words": ["Dog", "ÜBER", "yak"], "cap": 5})
    assert [label for _, label, *_ in selection.con.sql(selection.concepts[1]).fetchall()] == ["dog", "über"]
    with pytest.raises(ValueError, match="no row that entered has a concept of caption"):
        _select(_source(), {"concepts": "caption", "words": ["yak"], "cap": 5})


@pytest.mark.parametrize("form", [{}, {"form": "greedy", "count": 50}])
def test_the_result_depends_on_neither_threads_nor_the_order_of_rows(form):
    table = _source()
    shuffled = table.take(np.random.default_rng(2).permutation(ROWS))
    first = _select(table, {"concepts": "sparse_features/tiny", "cap": 9, **form}, threads=1)
    second = _select(shuffled, {"concepts": "sparse_features/tiny", "cap": 9, **form}, threads=4)
    for a, b in ((first.tables, second.tables), (first.concepts, second.concepts)):
        assert first.con.sql(a[1]).fetchall() == second.con.sql(b[1]).fetchall()
    assert first.manifest().fetchall() == second.manifest().fetchall()
    assert {name: ranks.tolist() for name, ranks in first.ranks().items()} == {
        name: ranks.tolist() for name, ranks in second.ranks().items()
    }


@pytest.mark.parametrize(
    ("balance", "message"),
    [
        ({"concepts": "caption", "cap": 0}, "greater than or equal to 1"),
        ({"concepts": "caption", "cap": 5, "count": 3}, "belong to form: greedy"),
        ({"concepts": "caption", "cap": 5, "form": "greedy"}, "needs exactly one of fraction, count; found none"),
        ({"concepts": "sort/given", "cap": 5, "words": ["dog"]}, "words are those of captions"),
    ],
)
def test_a_wrong_setting_is_refused(balance, message):
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate({"steps": [{"balance": balance}]})
