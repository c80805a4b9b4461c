"""The cached table that the recipes of a process select from."""

from pathlib import Path

import pyarrow as pa
import pytest

from assets.base.selection_table import CachedTable, open_selection
from resources.lake.files import LakeError
from selection.recipes.recipe import Recipe
from tests.support.scenario import keep
from tests.support.small_lake import CLIP, NEAR, SmallLake

SCORES = {CLIP: ("clip_score/b32", "clip_score"), NEAR: ("norm_sim/b32/flowers", "norm_sim_inf")}


@pytest.fixture
def small(tmp_path):
    """Return a lake of two shards."""
    small = SmallLake(tmp_path / "lake")
    small.add_shard("00000", range(20))
    small.add_shard("00001", range(100, 110))
    return small


@pytest.fixture
def shared():
    """Yield a table that is closed at the end."""
    shared = CachedTable()
    yield shared
    shared.close()


def choose(small, shared, steps, *, shards=("00000", "00001"), sets=None, version="1", **more):
    """Select by a recipe and return f0 of the selected rows."""
    recipe = Recipe.model_validate({"steps": steps, **more})
    scores = {score: SCORES[score] for score in recipe.columns().scores}
    read = {"raw_pool": version, **dict.fromkeys((asset for asset, _ in SCORES.values()), version)}
    files = dict.fromkeys(shards, read)
    with open_selection(small.lake, "mine", recipe, scores, files, sets or {}, shared) as (selection, _):
        return set(selection.subset()["f0"].tolist())


def alone(small, steps, **more):
    """Select the same without a cached table."""
    return choose(small, None, steps, **more)


def test_the_next_recipe_reads_no_file_again(small, shared):
    steps = [{"where": "width > 201"}, keep(CLIP, count=7)]
    expected = alone(small, steps), alone(small, [keep(CLIP, fraction=0.5)])
    assert choose(small, shared, steps) == expected[0]
    for path in Path(small.root).rglob("*.parquet"):
        path.unlink()
    assert choose(small, shared, [keep(CLIP, fraction=0.5)]) == expected[1]


def test_other_shards_other_files_and_further_columns_are_read(small, shared):
    steps = [keep(CLIP, count=5)]
    assert choose(small, shared, steps, shards=["00000"]) == alone(small, steps, shards=["00000"])
    assert choose(small, shared, steps) == alone(small, steps)
    further = [{"where": "width > 202"}, keep(NEAR, count=4)]
    assert choose(small, shared, further) == alone(small, further)
    small.add_shard("00000", range(20), clip=lambda f0: -f0)
    assert choose(small, shared, steps, version="2") == alone(small, steps) != alone(small, [keep(NEAR, count=5)])


def test_a_set_of_one_recipe_is_no_matter_of_the_next(small, shared):
    def uids(*f0s):
        return pa.table({"f0": pa.array(f0s, pa.uint64()), "f1": pa.array([2**64 - 1 - f0 for f0 in f0s], pa.uint64())})

    assert choose(small, shared, [{"union": "a.npy"}], sets={"a.npy": uids(1, 2)}, shards=["00000"]) == set(range(20))
    assert choose(small, shared, [], sets={"a.npy": uids(3, 105)}, **{"from": "a.npy"}) == {3, 105}
    assert choose(small, shared, [], sets={"a.npy": uids(4)}, **{"from": "a.npy"}) == {4}
    assert choose(small, shared, [{"intersect": "a.npy"}], sets={"a.npy": uids(1, 2)}) == {1, 2}


def test_a_source_that_could_not_be_made_is_made_by_the_next_recipe(small, shared):
    steps = [keep(CLIP, count=5)]
    away = Path(small.lake.path("clip_score/b32", "00001"))
    away.rename(away.with_suffix(".away"))
    with pytest.raises(LakeError, match="clip_score/b32 of shard 00001 is not there yet"):
        choose(small, shared, steps)
    away.with_suffix(".away").rename(away)
    assert choose(small, shared, steps) == alone(small, steps)
