"""DataComp's baseline filters, in the words of its paper and code, against plain Python over the rows."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest
import yaml

from assets.project import ConfigError
from resources.languages import LanguageError, Languages
from selection.recipes import Recipe
from selection.selecting import select
from tests.pool_factory import picture, sample, write_shard
from tests.scenario import Scenario

RECIPES = Path(__file__).resolve().parents[1] / "config/recipes"


def from_file(name: str, **names: str) -> dict[str, Any]:
    return {"file": str(RECIPES / f"{name}.yaml"), "names": names}


CAPTIONS = [
    "a brown dog runs across the green park",
    "ein brauner Hund läuft durch den grünen Park",
    "un perro marrón corre por el parque verde",
    "a dog",
    "the cat",
    "the big cat sleeps",
    "un chien\nbrun court dans le parc",
    "a bird sits on\nthe old wooden fence",
]
SIZES = [(400, 300), (200, 600), (601, 200), (199, 400), (200, 200), (640, 480), (640, 480), (250, 640)]
ENGLISH = [True, False, False, True, True, True, False, True]


def write_pool(scenario: Scenario) -> pl.DataFrame:
    """Write shard 00000 anew: its samples have these captions and sizes; give what is known of them."""
    samples = []
    for number, (text, (width, height)) in enumerate(zip(CAPTIONS, SIZES, strict=True)):
        meta = {"uid": f"{number:032x}", "caption": text}
        samples.append(sample(number, text=text.encode(), meta=meta, image=picture(number, width, height)))
    write_shard(scenario.folder / "pool", samples, "00000")
    for shard in ("00001", "00002"):
        (scenario.folder / f"pool/{shard}.tar").unlink()
    return pl.DataFrame(
        {"uid": [f"{n:032x}" for n in range(len(samples))], "caption": CAPTIONS, "size": SIZES, "english": ENGLISH},
        schema_overrides={"size": pl.List(pl.Int64)},
    )


def chosen(scenario: Scenario, recipe: str) -> set[str]:
    return set(scenario.manifest(recipe)["uid"])


def test_the_basic_filter_keeps_what_its_words_say(scenario: Scenario) -> None:
    pool = write_pool(scenario)
    scenario.set("scores", "captions", value={})
    scenario.set("recipes", value={"basic": from_file("datacomp_basic")})
    assert scenario.run().failures == {}
    wanted = {
        row["uid"]
        for row in pool.to_dicts()
        if row["english"]
        and len(row["caption"].split()) > 2
        and len(row["caption"]) > 5
        and min(row["size"]) >= 200
        and max(row["size"]) / min(row["size"]) <= 3.0
    }
    assert len(wanted) == 3
    assert chosen(scenario, "basic") == wanted


def test_facts_of_captions_are_columns_of_the_catalog(scenario: Scenario) -> None:
    pool = write_pool(scenario)
    scenario.set("scores", "captions", value={})
    scenario.set("recipes", value={"basic": from_file("datacomp_basic")})
    scenario.run()
    with duckdb.connect(str(scenario.folder / "lake/catalog.duckdb"), read_only=True) as con:
        facts = con.execute(
            'SELECT uid, "language/facts" = \'en\', "words/facts", "characters/facts" FROM scores ORDER BY uid'
        ).fetchall()
        said = con.execute("SELECT step, verdict FROM explain(?) ORDER BY step", [f"{1:032x}"]).fetchall()
    assert facts == [
        (row["uid"], row["english"], len(row["caption"].split()), len(row["caption"])) for row in pool.to_dicts()
    ]
    assert said == [(0, "kept"), (1, "dropped"), (2, "not reached"), (3, "not reached")]


def test_laion_2b_asks_for_english_and_a_clip_score(scenario: Scenario) -> None:
    pool = write_pool(scenario)
    scenario.set("scores", "captions", value={})
    rule = yaml.safe_load((RECIPES / "datacomp_laion2b.yaml").read_text().replace("{encoder}", "tiny"))
    assert rule["steps"][1]["keep_top"]["threshold"] == 0.28
    scenario.set("recipes", value={"laion": from_file("datacomp_laion2b", encoder="tiny"), "lower": rule})
    rule["steps"][1]["keep_top"]["threshold"] = -0.01
    scenario.run()
    scores = scenario.scores("clip_score/tiny", ["00000"])["clip_score"].to_list()
    wanted = [
        {uid for uid, english, s in zip(pool["uid"], ENGLISH, scores, strict=True) if english and s >= limit}
        for limit in (0.28, -0.01)
    ]
    assert chosen(scenario, "lower") == wanted[1]
    assert 0 < len(wanted[1]) < sum(ENGLISH)
    if wanted[0]:
        assert chosen(scenario, "laion") == wanted[0]


@pytest.mark.parametrize("fraction", [0.29, 0.3, 0.5, 1.0])
def test_datacomps_fraction_keeps_all_rows_from_the_value_behind_it_on(fraction: float) -> None:
    values = np.random.default_rng(0).integers(0, 40, 100) / 64
    with duckdb.connect() as con:
        con.register("arrays", {"score": values, "f0": np.arange(100, dtype=np.uint64)})
        con.execute(
            "CREATE TABLE source AS SELECT f0, f0 AS f1, 's' AS shard, f0::VARCHAR AS key, score AS \"clip_score/b32\" "
            "FROM arrays"
        )
        step = {"keep_top": {"score": "clip_score/b32", "fraction": fraction, "rule": "datacomp"}}
        selection = select(con, "r", Recipe.model_validate({"steps": [step]}))
        found = set(selection.subset()["f0"].tolist())
        (report,) = selection.steps
    threshold = -np.sort(-values)[min(int(len(values) * fraction), 99)]
    assert found == set(np.flatnonzero(values >= threshold).tolist())
    assert (report.threshold, report.tie_uid, report.kept) == (threshold, None, len(found))
    assert len(found) > int(100 * fraction) or fraction == 1.0


def test_a_rule_without_a_fraction_is_refused() -> None:
    with pytest.raises(ValueError, match="rule datacomp says what a fraction keeps"):
        Recipe.model_validate({"steps": [{"keep_top": {"score": "a/b", "count": 3, "rule": "datacomp"}}]})


# Recipes in files of their own


def test_a_recipe_may_be_a_file_and_its_path_begins_at_the_projects_folder(scenario: Scenario) -> None:
    (scenario.folder / "mine.yaml").write_text("steps: [{keep_top: {score: clip_score/tiny, count: 2}}]")
    scenario.set("recipes", value={"mine": "mine.yaml"})
    scenario.run()
    assert scenario.subset("mine").lineage["definition"] == {
        "from": "pool",
        "steps": [{"keep_top": {"score": "clip_score/tiny", "count": 2}}],
    }


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("absent.yaml", "absent.yaml: no such recipe file"),
        ({"file": "mine.yaml"}, "mine.yaml: it wants names for encoder"),
        ({"file": "mine.yaml", "names": {"encoder": "tiny"}, "steps": []}, "has `file` and `names`"),
        ({"file": "mine.yaml", "names": {"encoder": "large"}}, "there is no score 'clip_score/large'"),
        ({"file": "list.yaml"}, "list.yaml: expected one recipe"),
    ],
)
def test_a_recipe_file_that_cannot_be_used_is_named(scenario: Scenario, recipe: Any, message: str) -> None:
    (scenario.folder / "mine.yaml").write_text("steps: [{keep_top: {score: 'clip_score/{encoder}', count: 2}}]")
    (scenario.folder / "list.yaml").write_text("[1]")
    scenario.set("recipes", value={"mine": recipe})
    with pytest.raises(ConfigError, match=message):
        scenario.open()


# Languages


def test_a_language_model_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(LanguageError, match="no such language model"):
        Languages(str(tmp_path / "absent.bin")).digest()
    (tmp_path / "text.bin").write_text("no model")
    with pytest.raises(LanguageError, match="not a fastText model"):
        Languages(str(tmp_path / "text.bin")).identify(["a"])
