"""Near duplicates against every pair in float64; resuming a killed run; recipes that use them."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import numpy as np
import polars as pl
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.base.context import Context, Progress
from assets.base.partitioned import PartitionedAsset
from assets.base.results import Result
from assets.graph import build_graph
from assets.reproduction import choose_again, rebuild
from assets.scores import search_files
from assets.settings import ConfigError, open_project
from dagster_project.headless import Outcome, materialize
from resources.lake.files import LakeError, column_to_vectors, vectors_to_column
from resources.lake.versions import Versions
from selection.scores.near_duplicates import CHUNK_ROWS, nearest_before
from tests.support.automation import Automation
from tests.support.corruption import put, swapped
from tests.support.pool_factory import datacomp_shard, picture, unit_rows
from tests.support.pool_factory import uid as uid_of
from tests.support.scenario import ROWS, SHARDS, Scenario, keep
from tests.support.steps import begin_shards, findings

CPU = torch.device("cpu")


def search(vectors: np.ndarray, *, done: int = 0, block: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return values and earlier rows, from row `done` on."""
    found = list(nearest_before(vectors, device=CPU, done=done, block=block))
    assert [at.start for at, _, _ in found] == [done, *[at.stop for at, _, _ in found[:-1]]]
    assert found[-1][0].stop == len(vectors)
    return np.concatenate([value for _, value, _ in found]), np.concatenate([index for _, _, index in found])


def by_the_definition(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute from every pair, in float64, the largest cosine to an earlier row and the first row that attains it."""
    wide = vectors.astype(np.float64)
    value, index = np.full(len(wide), -1.0), np.full(len(wide), -1)
    for row in range(1, len(wide)):
        cosines = wide[:row] @ wide[row]
        index[row] = cosines.argmax()
        value[row] = cosines[index[row]]
    return value, index


@pytest.mark.parametrize("width", [1, 7, 256])
@pytest.mark.parametrize("rows", [1, 2, 37, 480, 481, 513, 1100])
def test_the_most_similar_row_before_is_that_of_every_pair(rows: int, width: int) -> None:
    vectors = unit_rows(rows + width, rows, width)
    value, index = search(vectors)
    assert (value.dtype, index.dtype) == (np.float32, np.int64)
    expected, _ = by_the_definition(vectors)
    np.testing.assert_allclose(value, expected, atol=5e-7)
    assert (value[0], index[0]) == (-1, -1)
    later = np.arange(1, rows)
    assert (index[later] < later).all()
    named = (vectors[later].astype(np.float64) * vectors[index[later]].astype(np.float64)).sum(1)
    np.testing.assert_allclose(value[later], named, atol=5e-7)


@given(rows=st.integers(1, 700), width=st.integers(1, 6), block=st.integers(1, 800), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_of_equally_similar_rows_the_first_is_named(rows: int, width: int, block: int, seed: int) -> None:
    """Products of integers are exact, so many are equal."""
    vectors = np.random.default_rng(seed).integers(-2, 3, (rows, width)).astype(np.float16)
    value, index = search(vectors, block=block)
    expected, first = by_the_definition(vectors)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(index, first)


def test_copies_name_the_first_of_them_across_tiles_blocks_and_chunks() -> None:
    vectors = unit_rows(3, CHUNK_ROWS + 700, 64)
    copies = [5, 300, 511, 512, 1000, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 600]
    vectors[copies] = vectors[5]
    later = CHUNK_ROWS - 40  # the rows before are not compared here
    value, index = search(vectors, done=later, block=300)
    for copy in copies[-3:]:
        assert index[copy - later] == 5
        assert value[copy - later] == pytest.approx(1, abs=1e-3)
    near, _ = search(vectors[:1200])
    assert (near[copies[1:5]] == value[copies[-1] - later]).all()
    others = np.delete(value, [copy - later for copy in copies[-3:]])
    assert others.max() < 0.9


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("block", [1, 100, 480, 999, 5000])
def test_a_rows_bits_depend_neither_on_blocks_nor_on_threads(block: int, threads: int) -> None:
    vectors = unit_rows(9, 300 if block == 1 else 1700, 97)
    expected = search(vectors)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        value, index = search(vectors, block=block)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(value, expected[0])
    np.testing.assert_array_equal(index, expected[1])


@pytest.mark.parametrize("done", [0, 1, 480, 700, 1199])
def test_it_goes_on_behind_the_rows_that_are_done(done: int) -> None:
    vectors = unit_rows(4, 1200, 30)
    expected = search(vectors)
    value, index = search(vectors, done=done, block=250)
    np.testing.assert_array_equal(value, expected[0][done:])
    np.testing.assert_array_equal(index, expected[1][done:])


def test_no_rows_give_no_blocks() -> None:
    assert list(nearest_before(np.empty((0, 4), np.float16), device=CPU)) == []
    assert list(nearest_before(unit_rows(1, 3), device=CPU, done=3)) == []


def test_other_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vectors must be float16 \[n, d\], not float32 \[2, 8\]"):
        next(nearest_before(unit_rows(1, 2).astype(np.float32), device=CPU))
    vectors = unit_rows(1, 5)
    vectors[3, 2] = np.nan
    with pytest.raises(ValueError, match="vectors holds NaN"):
        next(nearest_before(vectors, device=CPU))


# In the graph

SEARCH, TOLD = "duplicate_search/tiny", "near_duplicates/tiny"
SCORE = "near_duplicate/tiny"


def ask_for(scenario: Scenario, **given: object) -> None:
    """Add a search ordered by CLIPScore, a recipe that drops near duplicates, and copies of some pictures."""
    scenario.set("scores", "near_duplicates", value={"tiny": {"best": "clip_score/tiny", **given}})
    scenario.set("recipes", "apart", value={"steps": [{"where": f'"{SCORE}" <= 0.9999'}]})
    for shard, seed in (("00001", 3), ("00002", 3)):
        scenario.write_shard(shard, image=picture(seed))


def expected(
    project: Context, begins: set[str] | None = None, shards: Sequence[str] = SHARDS, encoder: str = "tiny"
) -> dict[str, tuple[float, str | None] | None]:
    """Return each row's value and most similar better row by uid, from the definition; repeated uids count once."""
    lake = project.lake
    pool = pl.concat([pl.from_arrow(lake.read("raw_pool", shard, ["uid", "f0", "f1"])) for shard in shards])
    score = pl.concat([pl.from_arrow(lake.read(f"clip_score/{encoder}", shard)) for shard in shards])["clip_score"]
    vectors = np.concatenate(
        [column_to_vectors(lake.read(f"embeddings/{encoder}", shard, ["image"])["image"]) for shard in shards]
    )
    uids = pool["uid"].to_list()
    first = {uid: row for row, uid in reversed(list(enumerate(uids)))}
    inside = [row for uid, row in first.items() if begins is None or uid in begins]
    order = sorted(inside, key=lambda row: (-score[row], uids[row]))
    value, index = by_the_definition(vectors[order])
    found: dict[str, tuple[float, str | None] | None] = dict.fromkeys(uids)
    for rank, row in enumerate(order):
        found[uids[row]] = value[rank], uids[order[index[rank]]] if index[rank] >= 0 else None
    return found


def told(
    project: Context, shards: Sequence[str] = SHARDS, encoder: str = "tiny"
) -> dict[str, tuple[float, str | None] | None]:
    table = pl.concat([pl.from_arrow(project.lake.read(f"near_duplicates/{encoder}", shard)) for shard in shards])
    return {
        f"{f0:016x}{f1:016x}": None if value is None else (value, of)
        for f0, f1, value, of in table.select("f0", "f1", "near_duplicate", "near_duplicate_of").rows()
    }


def assert_same(
    found: dict[str, tuple[float, str | None] | None], wanted: dict[str, tuple[float, str | None] | None]
) -> None:
    assert found.keys() == wanted.keys()
    assert {uid for uid, row in found.items() if row is None} == {uid for uid, row in wanted.items() if row is None}
    for uid, row in found.items():
        other = wanted[uid]
        if row is not None and other is not None:
            assert row == (pytest.approx(other[0], abs=5e-7), other[1])


@pytest.mark.usefixtures("finished")
def test_a_recipe_drops_what_is_too_near_to_a_better_row(scenario: Scenario) -> None:
    ask_for(scenario)
    assert scenario.run().failures == {}
    found = told(scenario.open())
    assert_same(found, expected(scenario.open()))
    near = {uid: row for uid, row in found.items() if row is not None and row[0] > 0.9999}
    # The picture of row 3 is there three times; the best of the three pairs stays, and the others name it.
    assert len(near) == 2
    (best,) = {row[1] for row in near.values()}
    assert best is not None
    assert set(scenario.manifest("apart")["uid"]) == found.keys() - near.keys()
    assert best in set(scenario.manifest("apart")["uid"])
    assert SEARCH in scenario.subset("apart").lineage["inputs"]
    stored = scenario.open().lake.stored(SEARCH)
    assert stored is not None
    assert stored.summary["rows_compared"] == 36
    above = pl.from_arrow(scenario.open().lake.read(SEARCH))
    values = np.array([row[0] for row in found.values() if row is not None])
    assert above["above"].to_list() == [(values > limit).sum() for limit in above["limit"]]
    assert stored.summary["above/0.95"] == (values > 0.95).sum()


@pytest.mark.usefixtures("finished")
def test_rows_are_compared_with_the_rows_of_the_subset_alone(scenario: Scenario) -> None:
    ask_for(scenario, of="subset/clip_third")
    assert scenario.run().failures == {}
    begins = set(scenario.manifest("clip_third")["uid"])
    found = told(scenario.open())
    assert {uid for uid, row in found.items() if row is not None} == begins
    assert_same(found, expected(scenario.open(), begins))
    assert set(scenario.manifest("apart")["uid"]) <= begins


@pytest.mark.usefixtures("finished")
def test_what_is_left_of_a_search_is_small(scenario: Scenario) -> None:
    ask_for(scenario)
    scenario.run()
    (folder,) = (scenario.folder / "lake/duplicate_search/tiny").iterdir()
    assert {path.name for path in folder.iterdir()} == {"state.json", "rank", "uid", "value", "better"}
    assert sum(path.stat().st_size for path in folder.iterdir() if path.name != "state.json") == 36 * (8 + 16 + 4 + 8)


@pytest.mark.usefixtures("finished")
def test_the_catalog_and_explain_know_the_better_row(scenario: Scenario) -> None:
    ask_for(scenario)
    scenario.run()
    uid, row = next((uid, row) for uid, row in told(scenario.open()).items() if row is not None and row[0] > 0.9999)
    with duckdb.connect(str(scenario.folder / "lake/catalog.duckdb"), read_only=True) as con:
        names = f'"{SCORE}", "near_duplicate_of/tiny"'
        assert con.execute(f"SELECT {names} FROM scores WHERE uid = ?", [uid]).fetchall() == [row]
        verdicts = con.execute("SELECT verdict FROM explain(?) WHERE recipe = 'apart' ORDER BY step", [uid]).fetchall()
    assert verdicts == [("kept",), ("dropped",)]


@pytest.mark.usefixtures("finished")
def test_the_step_drops_the_same_rows_and_each_names_the_better_one(scenario: Scenario) -> None:
    ask_for(scenario)
    scenario.set("recipes", "unlike", value={"steps": [{"deduplicate": {"by": SCORE, "above": 0.9999}}]})
    assert scenario.run().failures == {}
    assert scenario.manifest("unlike")["uid"].to_list() == scenario.manifest("apart")["uid"].to_list()
    with duckdb.connect(str(scenario.folder / "lake/catalog.duckdb"), read_only=True) as con:
        for uid, row in told(scenario.open()).items():
            assert row is not None
            answer = con.execute(
                "SELECT verdict, value, threshold, in_favour_of FROM explain(?) WHERE recipe = 'unlike' AND step = 1",
                [uid],
            ).fetchall()
            value, better = row
            verdict = ("kept", value, 0.9999, None) if value <= 0.9999 else ("dropped", value, 0.9999, better)
            assert answer == [verdict]


@pytest.mark.usefixtures("finished")
def test_a_row_that_was_not_compared_can_not_be_judged_by_the_step(scenario: Scenario) -> None:
    ask_for(scenario, of="subset/clip_third")
    scenario.set("recipes", "unlike", value={"steps": [{"deduplicate": {"by": SCORE, "above": 0.9999}}]})
    failures = scenario.run().failures
    assert set(failures) == {"subset/unlike"}
    assert "near_duplicate/tiny is NULL for uid" in failures["subset/unlike"]


@pytest.mark.usefixtures("finished")
def test_nothing_is_done_again_when_nothing_changed(scenario: Scenario) -> None:
    ask_for(scenario, of="subset/clip_third")
    scenario.run()
    before = scenario.files()
    assert scenario.run().computed == {}
    assert scenario.files() == before


@pytest.mark.usefixtures("finished")
def test_a_new_shard_is_searched_and_every_row_told_again(scenario: Scenario) -> None:
    ask_for(scenario)
    scenario.run()
    scenario.write_shard("00007", image=picture(3))
    outcome = scenario.run()
    assert outcome.failures == {}
    assert outcome.computed[SEARCH] == []
    assert outcome.computed[TOLD] == [*SHARDS, "00007"]
    shards = [*SHARDS, "00007"]
    assert_same(told(scenario.open(), shards), expected(scenario.open(), shards=shards))
    assert scenario.subset("apart").lineage["rows"] == 4 * ROWS - 3


@pytest.mark.usefixtures("finished")
def test_another_subset_or_another_score_begins_the_search_anew(scenario: Scenario) -> None:
    ask_for(scenario, of="subset/clip_third")
    scenario.run()
    scenario.set("recipes", "clip_third", value={"steps": [keep("clip_score/tiny", fraction=0.5)]})
    outcome = scenario.run()
    assert {"subset/clip_third", SEARCH, TOLD, "subset/apart"} <= set(outcome.computed)
    assert_files_are_of_the_last(scenario, 2)
    assert_same(told(scenario.open()), expected(scenario.open(), set(scenario.manifest("clip_third")["uid"])))

    scenario.set("scores", "near_duplicates", "tiny", value={"best": "neg_clip_loss/tiny"})
    assert {SEARCH, TOLD} <= set(scenario.run().computed)
    scenario.set("scores", "neg_clip_loss", "tiny", "temperature", value=0.3)
    outcome = scenario.run()
    assert outcome.failures == {}
    assert_files_are_of_the_last(scenario, 2)
    assert {"neg_clip_loss/tiny", SEARCH, TOLD, "subset/apart"} <= set(outcome.computed)
    with duckdb.connect(str(scenario.folder / "lake/catalog.duckdb"), read_only=True) as con:
        names = [name for (name,) in con.execute("SELECT version FROM versions('apart')").fetchall()]
        changes = con.execute(f"SELECT reason FROM diff('apart', '{names[0]}', '{names[-1]}')").fetchall()
    assert set(changes) <= {("score changed",)}


@pytest.mark.parametrize("of", [None, "subset/pictures"])
@pytest.mark.usefixtures("finished")
def test_a_uid_that_is_in_two_shards_is_compared_once_and_told_in_both(scenario: Scenario, of: str | None) -> None:
    """A recipe that reads only the second of the two shards selects from the copy that was not compared."""
    ask_for(scenario, of=of)
    scenario.write_shard("00001", meta={"uid": "f" * 32}, image=picture(3))
    scenario.write_shard("00002", meta={"uid": "f" * 32}, image=picture(8))
    scenario.set("recipes", "pictures", value={"steps": [keep("clip_score/tiny", count=35)]})
    steps = [{"where": '"neg_clip_loss/tiny" > -99'}, {"deduplicate": {"by": SCORE, "above": 0.9999}}]
    scenario.set("recipes", "unlike", value={"steps": steps})
    assert scenario.run().failures == {}
    rows = scenario.scores(TOLD).filter(pl.col("f0") == 2**64 - 1)
    assert rows["shard"].to_list() == ["00001", "00002"]
    wanted = expected(scenario.open())["f" * 32]
    assert wanted is not None
    assert (
        rows.select("near_duplicate", "near_duplicate_of").rows()
        == [(pytest.approx(wanted[0], abs=5e-7), wanted[1])] * 2
    )
    stored = scenario.open().lake.stored(SEARCH)
    assert stored is not None
    assert stored.summary["rows_compared"] == 35
    assert scenario.subset("apart").lineage["source"]["duplicates"] == 1

    scenario.open().lake.remove("neg_clip_loss/tiny", "00001")
    assert scenario.execute("subset/unlike").success
    assert list(scenario.subset("unlike").lineage["shards_missing"]) == ["00001"]


@pytest.mark.usefixtures("finished")
def test_a_shard_that_is_not_there_yet_waits_and_the_others_are_compared(scenario: Scenario) -> None:
    ask_for(scenario)
    (scenario.folder / "pool/00001.tar").write_bytes(b"")
    outcome = scenario.run()
    assert set(outcome.failures) == {"raw_pool"}
    assert outcome.computed[TOLD] == ["00000", "00002"]
    assert_same(told(scenario.open(), ["00000", "00002"]), expected(scenario.open(), shards=["00000", "00002"]))
    scenario.write_shard("00001", image=picture(3))
    assert scenario.run().failures == {}
    assert_same(told(scenario.open()), expected(scenario.open()))


@pytest.mark.usefixtures("finished")
def test_a_score_that_some_row_has_not_is_one_error_with_a_uid(scenario: Scenario) -> None:
    ask_for(scenario, best="external_scores/theirs")
    theirs = scenario.folder / "theirs.parquet"
    uids = [uid_of(shard, int(shard) * 100 + row) for shard in SHARDS for row in range(ROWS)]
    pl.DataFrame({"uid": uids[1:], "value": [0.5] * (len(uids) - 1)}).write_parquet(theirs)
    scenario.document["external_scores"] = {"theirs": {"files": str(theirs), "columns": "value"}}
    said = scenario.run().failures[SEARCH]
    assert f"external_scores/theirs is NULL for uid {uids[0]} (1 such rows in all)" in said
    assert "Remedy" in said
    pl.DataFrame({"uid": uids, "value": [0.5] * len(uids)}).write_parquet(theirs)
    assert scenario.run().failures == {}
    found = told(scenario.open())  # of equal scores the smaller uid is the better
    assert found[min(uids)] == (-1.0, None)
    assert all(
        row is not None and row[1] is not None and row[1] < uid for uid, row in found.items() if uid != min(uids)
    )


@pytest.mark.usefixtures("finished")
def test_a_subset_without_a_row_in_the_shards_that_are_there_is_one_error(scenario: Scenario) -> None:
    ask_for(scenario, of="subset/first")
    scenario.set("recipes", "first", value={"steps": [{"where": "shard = '00000'"}]})
    scenario.run()
    scenario.open().lake.remove("clip_score/tiny", "00000")
    said = scenario.execute(SEARCH).failure_data_for_node(SEARCH.replace("/", "__"))
    assert "subset/first has no row in the 2 shards that have both embeddings/tiny and clip_score/tiny" in str(said)
    assert "Remedy: materialize both for more shards" in str(said)


@pytest.mark.usefixtures("finished")
def test_an_embedding_that_is_no_number_is_an_error_with_file_and_uid(scenario: Scenario) -> None:
    ask_for(scenario)
    scenario.run()
    lake = scenario.open().lake
    table, stored = lake.read("embeddings/tiny", "00001"), lake.stored("embeddings/tiny", "00001")
    assert stored is not None
    vectors = column_to_vectors(table["image"]).copy()
    vectors[4, 2] = np.nan
    at = table.schema.get_field_index("image")
    lake.write(table.set_column(at, table.schema.field(at), vectors_to_column(vectors)), stored.provenance)
    forget(scenario)
    said = str(scenario.execute(SEARCH).failure_data_for_node(SEARCH.replace("/", "__")))
    assert f"embeddings/tiny/00001.arrow: the image embedding of uid {uid_of('00001', 104)} holds NaN or" in said
    assert "Remedy" in said


@pytest.mark.usefixtures("finished")
def test_what_a_score_reads_is_gone_and_the_message_says_what_to_do(scenario: Scenario) -> None:
    ask_for(scenario)
    scenario.run()
    wanted = told(scenario.open())
    (state,) = (scenario.folder / "lake/duplicate_search/tiny").glob("*/state.json")
    state.unlink()
    scenario.open().lake.remove(TOLD, "00001")
    said = scenario.run().failures[TOLD]
    assert f"{state.parent}: these are not the rows of the stored {SEARCH}. Remedy: remove" in said
    scenario.open().lake.remove(SEARCH)
    assert scenario.run().failures == {}
    assert told(scenario.open()) == wanted


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.usefixtures("finished")
def test_a_score_reads_the_search_that_its_provenance_names(scenario: Scenario, is_done: bool) -> None:
    """Also while another search is running or has been written since."""
    ask_for(scenario)
    scenario.run()
    project, graph = scenario.open_graph()
    (score,) = (node for node in graph.nodes if node.key == TOLD)
    assert isinstance(score, PartitionedAsset)
    step = begin_shards(score, ["00001"])
    before = told(project, ["00001"])

    scenario.set("scores", "near_duplicates", "tiny", "best", value="norm_sim_2/tiny/pets")
    other, their_graph = scenario.open_graph()

    def dies(asset: str, *_: object) -> None:
        if asset == SEARCH and not is_done:
            raise RuntimeError("no power")

    outcome = materialize(other, their_graph, scenario.instance, notice=lambda *_: None, progress=dies)
    assert (SEARCH in outcome.failures) == (not is_done)
    ((_, found),) = score.compute(step, ["00001"])
    assert isinstance(found, Result)
    assert found.table["near_duplicate"].to_pylist() == [row and row[0] for row in before.values()]
    assert found.table["near_duplicate_of"].to_pylist() == [row and row[1] for row in before.values()]
    assert is_done == (told(other, ["00001"]) != before)


def assert_files_are_of_the_last(scenario: Scenario, searches: int) -> None:
    """Check that only the files of the last two searches exist."""
    stored = scenario.open().lake.stored(SEARCH)
    assert stored is not None
    folders = {path.name for path in (scenario.folder / "lake/duplicate_search/tiny").iterdir()}
    assert stored.provenance.digest()[:16] in folders
    assert len(folders) == searches


def forget(scenario: Scenario) -> None:
    """Delete the results of the search."""
    scenario.open().lake.remove(SEARCH)
    shutil.rmtree(scenario.folder / "lake/duplicate_search")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"of": "subset/apart"}, "tiny.of: recipe 'apart' reads near_duplicates/tiny"),
        ({"of": "subset/outer"}, "tiny.of: recipe 'apart' reads near_duplicates/tiny"),
        ({"of": "subset/none"}, "tiny.of: there is no recipe 'none'"),
        (
            {"best": "norm_sim_dynamic/tiny"},
            "scores.norm_sim_dynamic.tiny.of: recipe 'apart' reads norm_sim_dynamic/tiny",
        ),
        (
            {"best": "clip_score/none"},
            "tiny.best: there is no score 'clip_score/none' to order rows by; did you mean clip_score/tiny",
        ),
        ({"best": SCORE}, "tiny.best: there is no score '[a-z_/]+' to order rows by"),
        ({"best": "near_duplicate_of/tiny"}, "tiny.best: there is no score 'near_duplicate_of/tiny' to order rows by"),
    ],
)
def test_what_can_not_be_is_refused(scenario: Scenario, given: dict[str, str], message: str) -> None:
    ask_for(scenario, **given)
    scenario.set("recipes", "outer", value={"from": "apart", "steps": [keep("clip_score/tiny", count=2)]})
    dynamic = {"keep": 0.2} | ({"of": "subset/apart"} if given.get("best", "").startswith("norm") else {})
    scenario.set("scores", "norm_sim_dynamic", value={"tiny": dynamic})
    with pytest.raises(ConfigError, match=message):
        scenario.open()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {
                "norm_sim_dynamic": {"tiny": {"keep": 0.2, "of": "subset/apart"}},
                "near_duplicates": {"tiny": {"best": "clip_score/tiny", "of": "subset/typo"}},
            },
            r"scores\.near_duplicates\.tiny\.of: there is no recipe 'typo'; known: .*apart",
        ),
        (
            {
                "norm_sim_dynamic": {"tiny": {"keep": 0.2, "of": "subset/typo"}},
                "near_duplicates": {"tiny": {"best": "norm_sim_dynamic/tiny", "of": "subset/clip_third"}},
            },
            r"scores\.norm_sim_dynamic\.tiny\.of: there is no recipe 'typo'",
        ),
        (
            {"near_duplicates": {"tiny": {"best": "sieve/said/words"}}},
            r"captioners\.said\.of: there is no recipe 'typo'",
        ),
        ({}, r"captioners\.said\.of: there is no recipe 'typo'"),
    ],
)
def test_a_recipe_that_is_not_there_is_told_of_the_field_that_names_it(
    scenario: Scenario, settings: dict[str, Any], message: str
) -> None:
    """Also where other recipes and scores depend on the score in whose settings the name is."""
    ask_for(scenario)
    for name, value in settings.items():
        scenario.set("scores", name, value=value)
    if "captioners" in message:
        scenario.document["captioners"] = {"said": {"model": "coca_ViT-B-32", "of": "subset/typo"}}
        scenario.document["text_encoders"] = {"words": {"encoder": "tiny"}} if settings else {}
    with pytest.raises(ConfigError, match=message):
        scenario.open()


def test_near_duplicates_need_an_encoder_and_a_best_score(scenario: Scenario) -> None:
    scenario.set("scores", "near_duplicates", value={"big": {"best": "clip_score/tiny"}})
    with pytest.raises(ConfigError, match=r"scores\.near_duplicates: there is no encoder 'big'"):
        scenario.open()
    scenario.set("scores", "near_duplicates", value={"tiny": {}})
    with pytest.raises(ConfigError, match=r"scores\.near_duplicates\.tiny\.best: is missing"):
        scenario.open()


@pytest.mark.usefixtures("finished")
def test_the_better_row_may_be_told_by_rounds_and_the_version_is_made_again(scenario: Scenario, tmp_path: Path) -> None:
    ask_for(scenario, best="norm_sim_2_last/tiny")
    scenario.set("scores", "norm_sim_dynamic", value={"tiny": {"keep": 0.25, "rounds": 2}})
    assert scenario.run().failures == {}
    version = scenario.subset("apart")
    assert {"norm_sim_dynamic/tiny", TOLD} <= set(version.lineage["scores"])
    folder = rebuild(version.lineage, tmp_path / "again")
    assert (folder / "subset.npy").read_bytes() == Path(version.uids).read_bytes()


def test_a_version_is_made_again_from_its_record_also_without_a_shard_that_was_compared(
    scenario: Scenario, tmp_path: Path
) -> None:
    ask_for(scenario, best="neg_clip_loss/tiny")
    near, target = {"where": f'"{SCORE}" <= 0.9999'}, keep("norm_sim_inf/tiny/pets", count=20)
    scenario.set("recipes", value={"apart": {"steps": [near, target]}})
    scenario.run()
    scenario.open().lake.remove("norm_sim/tiny/pets", "00001")
    assert scenario.execute("subset/apart").success
    versions = Versions(scenario.open().lake, "apart")
    for version in map(versions.read, versions.names()):
        folder = rebuild(version.lineage, tmp_path / version.name)
        assert (folder / "subset.npy").read_bytes() == Path(version.uids).read_bytes()
    assert (version.name, list(version.lineage["shards_missing"])) == ("v0002", ["00001"])


@pytest.mark.usefixtures("finished")
def test_a_version_of_rows_of_a_subset_is_chosen_again_and_not_rebuilt(scenario: Scenario, tmp_path: Path) -> None:
    ask_for(scenario, of="subset/clip_third")
    scenario.run()
    version = scenario.subset("apart")
    folder = choose_again(scenario.open().lake, version.lineage, tmp_path / "again")
    assert (folder / "subset.npy").read_bytes() == Path(version.uids).read_bytes()
    with pytest.raises(LakeError, match="duplicate_search/tiny started from subset/clip_third"):
        rebuild(version.lineage, tmp_path / "rebuilt")


def precomputed(folder: Path, *sizes: int, best: str = "clip_score/b32") -> Context:
    """Write and open a pool of precomputed shards; the rows of all shards together do not depend on `sizes`."""
    folder.mkdir()
    image, text = unit_rows(1, sum(sizes)), unit_rows(2, sum(sizes))
    image[-3:] = image[:3]
    start = 0
    for number, size in enumerate(sizes):
        at = slice(start, start + size)
        columns = {"uid": [uid_of(row) for row in range(at.start, at.stop)]}
        arrays = {"b32_img": image[at], "b32_txt": text[at]}
        datacomp_shard(folder / "pool", f"{number:05d}", size, columns=columns, arrays=arrays)
        start = at.stop
    document: dict[str, Any] = {
        "name": "precomputed",
        "lake": "lake",
        "pool": {"path": "pool", "format": "datacomp"},
        "encoders": {"b32": {"precomputed": "b32", "temperature": 0.1}},
        "scores": {
            "neg_clip_loss": {},
            "near_duplicates": {"b32": {"best": best}},
            "norm_sim_dynamic": {"b32": {"keep": 0.5, "rounds": 2}},
        },
    }
    path = folder / "project.yaml"
    path.write_text(yaml.safe_dump(document))
    return open_project(path)


def test_embeddings_are_gathered_window_by_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_files, "WINDOW_BYTES", 7 * 16)
    project = precomputed(tmp_path / "windows", 1, 49, 40)
    with dg.DagsterInstance.ephemeral() as instance:
        assert run(project, instance).failures == {}
    shards = ["00000", "00001", "00002"]
    assert_same(told(project, shards, "b32"), expected(project, shards=shards, encoder="b32"))


def run(project: Context, instance: dg.DagsterInstance, progress: Progress | None = None) -> Outcome:
    return materialize(project, build_graph(project), instance, notice=lambda *_: None, progress=progress)


def test_it_does_not_matter_how_rows_are_parted_into_shards(tmp_path: Path) -> None:
    found = []
    for name, sizes in (("one", [90]), ("three", [1, 49, 40])):
        project = precomputed(tmp_path / name, *sizes)
        with dg.DagsterInstance.ephemeral() as instance:
            assert run(project, instance).failures == {}
        found.append(told(project, [f"{number:05d}" for number in range(len(sizes))], "b32"))
    assert found[0] == found[1]
    near = [row[0] for row in found[0].values() if row is not None and row[0] > 0.999]
    assert len(near) >= 3


def test_a_killed_run_goes_on_behind_its_last_whole_block(tmp_path: Path) -> None:
    project = precomputed(tmp_path / "big", 9000, 8000)
    shards = ["00000", "00001"]
    compared: list[int] = []

    def dies(asset: str, _: str, rows: int) -> None:
        if asset == "duplicate_search/b32":
            compared.append(rows)
            if len(compared) == 1:
                raise RuntimeError("no power")

    with dg.DagsterInstance.ephemeral() as instance:
        assert "no power" in run(project, instance, dies).failures["duplicate_search/b32"]
        assert project.lake.stored("duplicate_search/b32") is None
        compared.append(0)
        assert run(project, instance, dies).failures == {}
    assert compared == [16_384, 0, 17_000 - 16_384]
    found, wanted = told(project, shards, "b32"), expected(project, shards=shards, encoder="b32")
    values = [row[0] for rows in (found, wanted) for row in rows.values() if row is not None]
    np.testing.assert_allclose(values[:17_000], values[17_000:], atol=5e-7)
    assert found.keys() == wanted.keys()


def in_a_child(config: Path, key: str, *, method: str = "", call: int = 0, limit: int = 0) -> Any:
    """Compute an unpartitioned asset in another process, which writes only its work files.

    Args:
        config: the project's YAML.
        key: the asset key.
        method: a method of the lake for work files, or of the vectors that it reads.
        call: kill the process at this call of the method, from 1.
        limit: largest file that it may write, in bytes.
    """
    command = [sys.executable, "-c", _CHILD, str(config), key, method, str(call), str(limit)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


_CHILD = """
import os, resource, signal, sys
from pathlib import Path
import selection.scores.near_duplicates
from assets.scores import search_files
from assets.settings import open_project
from resources.lake.files import Lake
from resources.lake.sealed import Vectors
from tests.support.steps import begin, node_of

search_files.WINDOW_BYTES = 40 * 16
selection.scores.near_duplicates._BLOCK["cpu"] = 20
config, key, method, call, limit = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
if method:
    owner = Lake if hasattr(Lake, method) else Vectors
    real, calls = getattr(owner, method), []
    def deadly(self, what, *rest):
        calls.extend([what] if owner is Vectors or what.endswith("state.json") else [])
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, what, *rest)
    setattr(owner, method, deadly)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
node = node_of(open_project(Path(config)), key)
node.compute(begin(node))
"""


@pytest.mark.slow
def test_killed_while_gathering_and_before_a_state_is_written_a_search_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    project = precomputed(tmp_path / "killed", 30, 41, 19)
    key, config = "duplicate_search/b32", tmp_path / "killed/project.yaml"
    with dg.DagsterInstance.ephemeral() as instance:
        assert run(project, instance).failures == {}
        work = tmp_path / "killed/lake/duplicate_search/b32"
        (folder,) = work.iterdir()
        wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
        project.lake.remove(key)
        shutil.rmtree(work)
        state = folder / "state.json"
        for method, call, left in (
            ("replacing", 1, None),  # all is in order, which no state tells
            ("__getitem__", 5, (40, 0)),  # in the second window of 40 rows
            ("replacing", 1, (40, 0)),  # the second window is gathered, which no state tells
            ("replacing", 3, (90, 0)),  # so is the third; the first block of 20 rows is done, which no state tells
            ("replacing", 2, (90, 20)),
        ):
            assert in_a_child(config, key, method=method, call=call).returncode == -signal.SIGKILL
            found = json.loads(state.read_text()) if state.exists() else None
            assert (found and (found["gathered"], found["done"])) == left
        finished = in_a_child(config, key)
        assert finished.returncode == 0, finished.stderr
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted
        assert run(project, instance).failures == {}


def test_killed_and_then_given_another_best_score_a_search_begins_anew(tmp_path: Path) -> None:
    project = precomputed(tmp_path / "killed", 30, 41, 19, best="norm_sim_2_last/b32")
    key, config = "duplicate_search/b32", tmp_path / "killed/project.yaml"
    with dg.DagsterInstance.ephemeral() as instance:
        assert run(project, instance).failures == {}
        project.lake.remove(key)
        shutil.rmtree(tmp_path / "killed/lake/duplicate_search/b32")
        assert in_a_child(config, key, method="replacing", call=6).returncode == -signal.SIGKILL
        (left,) = (tmp_path / "killed/lake/duplicate_search/b32").glob("*/")
        assert (left / "vectors").exists()
        config.write_text(config.read_text().replace("best: norm_sim_2_last/b32", "best: clip_score/b32"))
        assert run(open_project(config), instance).failures == {}
    shards = ["00000", "00001", "00002"]
    assert_same(told(project, shards, "b32"), expected(project, shards=shards, encoder="b32"))
    assert not left.exists()


@pytest.mark.parametrize("key", ["duplicate_search/b32", "dynamic_rounds/b32"])
def test_a_full_disk_is_an_error_that_says_what_is_needed(tmp_path: Path, key: str) -> None:
    """A limit on file size stands in for a full disk: both fail when bytes are reserved."""
    project = precomputed(tmp_path / "full", 300)
    with dg.DagsterInstance.ephemeral() as instance:
        assert run(project, instance).failures == {}
    project.lake.remove(key)
    shutil.rmtree(tmp_path / "full/lake" / key)
    found = in_a_child(tmp_path / "full/project.yaml", key, limit=1000)
    needed = 300 * (8 + 16 + 4 + 8 + 16) if key.startswith("duplicate") else 300 * 8
    assert found.returncode == 1
    assert re.search(rf"LakeError: .*{key}.*: no room for {needed:,} bytes .*\. Remedy: make room there", found.stderr)
    assert not [path for path in (tmp_path / "full/lake" / key).rglob("*") if path.is_file()]


def test_sensors_search_once_after_the_score_and_the_subset(tmp_path: Path) -> None:
    automation = Automation(tmp_path)
    near = {"of": "subset/best", "best": "neg_clip_loss/b32"}
    automation.document["scores"]["near_duplicates"] = {"b32": near}
    automation.document["recipes"]["apart"] = {"steps": [{"where": '"near_duplicate/b32" <= 0.5'}]}
    automation.load()
    for arriving in ([0, 1, 2, 3], [4, 5]):
        automation.write(*arriving)
        runs = [key for keys, _ in automation.settle() for key in keys.split() if key != "catalog"]
        assert runs.count("duplicate_search/b32") == 1
        order = ["neg_clip_loss/b32", "subset/best", "duplicate_search/b32", "near_duplicates/b32", "subset/apart"]
        assert [key for key in dict.fromkeys(runs) if key in order] == order
    automation.assert_nothing_is_left()
    automation.assert_as_headless()
    automation.instance.dispose()


@pytest.mark.usefixtures("finished")
def test_a_table_with_other_rows_or_an_impossible_cosine_is_refused(scenario: Scenario) -> None:
    ask_for(scenario)
    scenario.run()
    project = scenario.open()
    table = project.lake.read(TOLD, "00000")
    for spoil, why in (
        (lambda table: table, {""}),
        (
            put("near_duplicate", 2, 1.25),
            {"", "near_duplicate: 1 rows are not in [-1.0201, 1.0201], the first is row 2: 1.25"},
        ),
        (put("near_duplicate", 2, None), {""}),
        (swapped, {"", "row 0 is another sample than in raw_pool"}),
    ):
        found = findings(project, TOLD, "00000", {TOLD: spoil(table)})
        assert list(found) == ["rows_aligned", "within_bounds"]
        assert {finding["why"] for finding in found.values()} == why
