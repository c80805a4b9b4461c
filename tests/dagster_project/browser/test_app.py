"""The server of `clip-select browse`: what the pages answer about a finished project."""

import io
import re
import urllib.parse

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import yaml
from PIL import Image

from dagster_project.browser.queries import BrowseError, Place, Query, Table
from dagster_project.browser.site import Site as Pages
from dagster_project.browser.trials import Trials
from resources.lake.files import LakeError
from selection.recipes.recipe import Recipe
from tests.support.browse_site import Site
from tests.support.scenario import ROWS, SHARDS, Scenario, keep

ALL = ROWS * len(SHARDS)


def shown_uids(found) -> list[str]:
    return [row["uid"] for row in found["rows"]]


def test_a_sort_returns_all_rows_in_the_order_of_the_score(site: Site) -> None:
    found = site.rows(sort="clip_score/tiny", show="clip_score/tiny")
    shown = [row["scores"]["clip_score/tiny"] for row in found["rows"]]
    assert found["total"] == ALL
    assert shown == sorted(shown, reverse=True)


def test_a_filter_and_a_sort_by_different_assets_agree_with_polars(project: Scenario, monkeypatch) -> None:
    query = Query(Table(project.open()))
    every = query.to_polars("clip_score/tiny", "neg_clip_loss/tiny")
    middle = every["clip_score/tiny"].median()
    wanted = every.filter(every["clip_score/tiny"] > middle).sort("neg_clip_loss/tiny")
    asked = query.where(f'"clip_score/tiny" > {middle}').order_by("neg_clip_loss/tiny", descending=False)
    for batch in (1, 2, 32):
        monkeypatch.setattr("dagster_project.browser.queries.BATCH", batch)
        assert asked.to_polars()["uid"].to_list() == wanted["uid"].to_list()
        assert asked.count() == len(wanted)
        pages = [place for offset in range(0, ALL, 5) for place in asked.places(5, offset)]
        assert pages == asked.places(ALL)


def test_files_of_other_rows_are_not_joined(project: Scenario) -> None:
    context = project.open()
    lake, key = context.lake, ("clip_score/tiny", "00000")
    stored, table = lake.stored(*key), lake.read(*key)
    mixed = table.take(pa.array([1, 0, *range(2, ROWS)]))
    other = type(stored.provenance)(**{**stored.provenance.as_dict(), "inputs": {"embeddings/tiny": "of other rows"}})
    lake.write(mixed, other)
    try:
        with pytest.raises(BrowseError, match="other rows"):
            Query(Table(context)).where('"clip_score/tiny" > "neg_clip_loss/tiny"').count()
    finally:
        lake.write(table.replace_schema_metadata(None), stored.provenance, summary=stored.summary)


def test_a_score_that_is_no_number_is_shown_as_missing(project: Scenario) -> None:
    context = project.open()
    lake, key = context.lake, ("clip_score/tiny", "00000")
    stored, table = lake.stored(*key), lake.read(*key)
    values = pa.array([np.nan, np.inf, *range(2, ROWS)], pa.float32())
    lake.write(table.set_column(table.column_names.index("clip_score"), "clip_score", values), stored.provenance)
    try:
        tiles = Pages(context).tiles([Place("00000", row) for row in range(3)], ["clip_score/tiny"])
        assert [tile["scores"]["clip_score/tiny"] for tile in tiles] == [None, None, 2.0]
    finally:
        lake.write(table.replace_schema_metadata(None), stored.provenance, summary=stored.summary)


@pytest.mark.parametrize("predicate", ["1; DROP TABLE x", "(SELECT 1) = 1", "read_text('/etc/passwd') = ''", "foo > 1"])
def test_only_a_recipes_predicate_is_accepted(site: Site, predicate: str) -> None:
    assert site.get(f"/api/rows?{urllib.parse.urlencode({'where': predicate})}")[0] == 400


def test_the_message_of_a_wrong_predicate_suggests_the_score(site: Site) -> None:
    assert "clip_score/tiny" in site.json("/api/rows", where='"clip_scor/tiny" > 0')["error"]


def test_a_version_and_the_rows_that_a_step_dropped_are_shown(site: Site, project: Scenario) -> None:
    kept, dropped = site.rows(recipe="paper"), site.rows(recipe="paper", member="dropped", step=1)
    assert set(shown_uids(kept)) == set(project.manifest("paper")["uid"])
    assert dropped["total"] == ALL // 2
    assert "step" in site.json("/api/rows", recipe="paper", member="dropped", step=7)["error"]


def test_near_a_threshold_are_the_rows_with_the_nearest_values(project: Scenario) -> None:
    trial = Trials(Table(project.open())).of("clip_third")
    values = trial.rows["value1"].to_numpy()
    distances = np.abs(values - trial.steps[0]["threshold"])
    found = trial.near(1)
    assert len(found) == 24
    wanted = trial.rows.take(np.argsort(distances, kind="stable")[:24])
    assert set(found["f0"].to_pylist()) == set(wanted["f0"].to_pylist())


def test_a_versions_rows_come_from_its_own_recipe_and_not_from_todays(project: Scenario) -> None:
    wanted = project.document["recipes"]["paper"]
    project.set("recipes", "paper", value={"steps": [keep("clip_score/tiny", count=3)]})
    try:
        trials = Trials(Table(project.open()))
        assert [step["kept"] for step in trials.of("paper", "v0001").steps] == [ALL // 2, ALL // 4]
        assert trials.of("paper").dropped_at(1).num_rows == ALL // 2
        assert [step["kept"] for step in trials.of("paper", "now").steps] == [3]
    finally:
        project.set("recipes", "paper", value=wanted)
        project.open()


def test_steps_of_a_version_whose_scores_are_gone_are_an_error_and_its_rows_are_shown(project: Scenario) -> None:
    context = project.open()
    trials = Trials(Table(context))
    path = context.lake.path("neg_clip_loss/tiny", "00001")
    with open(path, "rb") as file:
        kept = file.read()
    context.lake.store.delete(path)
    try:
        with pytest.raises(LakeError, match="neg_clip_loss/tiny/00001"):
            trials.of("paper", "v0001")
        assert trials.kept("paper", "v0001").num_rows == ALL // 4
    finally:
        context.lake.put(path, kept)


def test_the_nearest_image_of_an_example_is_itself(site: Site) -> None:
    uid = site.rows()["rows"][5]["uid"]
    found = site.rows(like=uid, side="image")
    assert found["rows"][0]["uid"] == uid
    assert found["note"] == f"Searched all {ALL} rows."


def test_a_search_obeys_the_grids_filters(site: Site, project: Scenario) -> None:
    whole = shown_uids(site.rows(text="red boat"))
    kept = set(project.manifest("paper")["uid"])
    assert shown_uids(site.rows(text="red boat", recipe="paper")) == [uid for uid in whole if uid in kept]
    one = {uid for uid in whole if uid in set(shown_uids(site.rows(shard="00001")))}
    assert set(shown_uids(site.rows(text="red boat", shard="00001"))) == one
    assert "sort" in site.json("/api/rows", text="red boat", sort="random")["error"]


def test_a_random_order_depends_on_the_seed_and_on_nothing_else(site: Site) -> None:
    first, again, other = (shown_uids(site.rows(sort="random", seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(other)


def test_a_limit_tried_out_reports_rows_that_leave_and_a_valid_recipe(site: Site, project: Scenario) -> None:
    found = site.json("/api/trial", recipe="clip_third", limit1="count:5")
    assert (found["rows"], found["current"], found["enter"]["total"], found["leave"]["total"]) == (5, 12, 0, 7)
    (recipe,) = yaml.safe_load(found["yaml"])["recipes"].values()
    assert Recipe.model_validate(recipe).steps[0].keep_top.count == 5
    assert project.open().settings.recipes["clip_third"].steps[0].keep_top.fraction == 0.34


@pytest.mark.parametrize("limit", ["fraction:7", "fraction:nan", "count:2.5", "threshold:inf", "where:1", "count:x"])
def test_a_limit_that_a_recipe_would_refuse_is_an_error(site: Site, limit: str) -> None:
    assert site.json("/api/trial", recipe="clip_third", limit1=limit)["error"]


def test_a_limit_that_is_refused_is_named_with_what_the_step_takes(site: Site) -> None:
    for limit, message in (
        ("fraction:7", "step 1, fraction: expected less than or equal to 1 (given: 7.0)"),
        ("count:2.5", "step 1, count: expected a valid integer (given: 2.5)"),
    ):
        assert site.json("/api/trial", recipe="clip_third", limit1=limit)["error"] == message


def test_pages_answer_and_images_are_encoded_again(site: Site) -> None:
    row = site.rows()["rows"][0]
    for path in ("/", "/compare", "/what-if", "/rejects", f"/sample/{row['uid']}"):
        assert site.get(path)[0] == 200, path
    data = site.get(f"/image/{row['shard']}/0")[2]
    assert Image.open(io.BytesIO(data)).format == "JPEG"


def test_a_sample_has_its_percentile_its_negatives_and_its_place_in_the_tar(site: Site, project: Scenario) -> None:
    best = site.rows(sort="clip_score/tiny")["rows"][0]
    page = site.text(f"/sample/{best['uid']}")
    assert f"<td>{100 * (ALL - 0.5) / ALL:.1f}</td>" in page
    assert re.search(r"<td>nearest_target/tiny/pets</td><td>\d+</td><td></td>", page), "an index has no percentile"
    assert "Nearest image of pets" in page
    assert "Hard negative for the caption" in page
    assert f"{best['shard']}.tar" in page
    row = project.open().lake.read("raw_pool", best["shard"]).slice(best["row"], 1).to_pylist()[0]
    assert f"bytes {row['image_offset']} to {row['image_offset'] + row['image_size']}" in page


def test_compared_subsets_are_counted_by_the_step_that_dropped_them(site: Site, project: Scenario) -> None:
    left, right = set(project.manifest("clip_third")["uid"]), set(project.manifest("paper")["uid"])
    page = site.text("/compare?left=clip_third&right=paper")
    for title, uids in (("In both", left & right), ("Only in clip_third", left - right)):
        assert f"{title}: {len(uids)}" in page
    assert " dropped at step 1: " in page
    assert site.get("/compare?left=clip_third:v0009&right=paper")[0] == 400


def test_an_unknown_order_names_what_is_known(project: Scenario) -> None:
    with pytest.raises(BrowseError, match="clip_score/tiny"):
        Query(Table(project.open())).order_by("clip_scor/tiny")


def test_tags_are_rows_in_csv_and_parquet(site: Site) -> None:
    uids = [row["uid"] for row in site.rows()["rows"][:3]]
    for kind, read in (("csv", pl.read_csv), ("parquet", pl.read_parquet)):
        found = read(io.BytesIO(site.tagged(uids, kind)))
        assert sorted(found["uid"].to_list()) == sorted(uids)
        assert {"caption", "clip_score/tiny"} <= set(found.columns)
    assert site.get("/tags", data=b"uids=nonsense&format=npy")[0] == 400
    assert site.get("/tags", data=b"uids=&format=exe")[0] == 400
