"""DataComp's baseline filters against plain Python, after the paper and its code."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.reproduction import rebuild
from assets.settings import ConfigError
from assets.study.figures import study
from resources.inputs.languages import LanguageError, Languages
from resources.inputs.wordnet import WordNet
from resources.lake.files import column_to_vectors
from selection.recipes.execute import select
from selection.recipes.recipe import Recipe
from selection.scores.clustering import nearest_centroid, spherical_k_means
from tests.support.pool_factory import picture, sample, write_shard
from tests.support.scenario import SHARDS, Scenario
from tests.support.wordnet import write_wordnet

RECIPES = Path(__file__).resolve().parents[3] / "config/recipes"


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
    """Replace the pool by one shard with these captions and sizes, and return its rows."""
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


def test_the_basic_filter_keeps_what_its_words_say(scenario: Scenario, tmp_path: Path) -> None:
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
    version = scenario.subset("basic")
    again = rebuild(version.lineage, tmp_path / "again")
    assert (again / "subset.npy").read_bytes() == Path(version.uids).read_bytes()


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


def test_a_version_may_have_more_rows_than_its_fraction_where_the_rule_keeps_equal_ones(scenario: Scenario) -> None:
    write_pool(scenario)
    scenario.set("scores", "captions", value={})
    step = {"keep_top": {"score": "words/facts", "fraction": 0.4, "rule": "datacomp"}}
    scenario.set(
        "recipes",
        value={"long": {"steps": [step]}, "exact": {"steps": [{"keep_top": {**step["keep_top"], "rule": "exact"}}]}},
    )
    assert scenario.run().failures == {}
    words = [len(text.split()) for text in CAPTIONS]  # 8, 8, 8, 2, 2, 4, 7, 8: the value at place 3 is 8
    assert len(scenario.manifest("long")) == sum(n >= sorted(words, reverse=True)[3] for n in words) == 4
    assert len(scenario.manifest("exact")) == 3
    step["keep_top"]["fraction"] = 0.25
    assert scenario.run().failures == {}
    assert scenario.subset("long").name == "v0002"
    assert len(scenario.manifest("long")) == 4  # int(8 · 0.25) + 1 is 3, and one more is equal


def test_a_rule_without_a_fraction_is_refused() -> None:
    with pytest.raises(ValueError, match="rule datacomp applies to a fraction only"):
        Recipe.model_validate({"steps": [{"keep_top": {"score": "a/b", "count": 3, "rule": "datacomp"}}]})


# Synsets


@pytest.mark.parametrize(
    ("word", "offset"),
    [
        ("dog", 11),  # the first of two
        ("DOGS", 11),
        ("run", 14),  # a noun before it is a verb
        ("ran", 21),  # irregular
        ("oxen", 13),
        ("churches", 15),
        ("wolves", 16),
        ("barking", 22),
        ("hopping", 23),
        ("bigger", 31),
        ("larger", 32),
        ("soon", 41),
        ("pans", 18),
        ("panses", 18),  # panses, pans, pan: endings are taken off until something is found
        ("dog,", None),
        ("zebra", None),
    ],
)
def test_the_first_synset_of_a_word_is_wordnets(tmp_path: Path, word: str, offset: int | None) -> None:
    assert WordNet(str(write_wordnet(tmp_path / "dict"))).first_synset(word) == offset


def test_the_text_based_filter_asks_for_a_word_of_the_synsets(scenario: Scenario) -> None:
    write_pool(scenario)
    write_wordnet(scenario.folder / "dict")
    (scenario.folder / "synsets.txt").write_text("n00000014\nn00000012\nn00000031\n")
    scenario.set("scores", "captions", value={"wordnet": "dict", "synsets": "synsets.txt"})
    scenario.set("recipes", value={"text": from_file("datacomp_text_based")})
    assert scenario.run().failures == {}
    assert chosen(scenario, "text") == {f"{0:032x}", f"{5:032x}"}  # "runs" and "big", not the second synset of "dog"
    (scenario.folder / "synsets.txt").write_text("n00000011\n")
    assert set(scenario.run().computed) == {"captions/facts", "subset/text", "catalog"}
    assert chosen(scenario, "text") == {f"{0:032x}", f"{3:032x}"}


@pytest.mark.parametrize(
    ("synsets", "message"), [("dog\n", "'dog' is no synset"), ("\n", "this list of synsets is empty")]
)
def test_a_list_of_synsets_that_is_none_is_named(scenario: Scenario, synsets: str, message: str) -> None:
    write_wordnet(scenario.folder / "dict")
    (scenario.folder / "synsets.txt").write_text(synsets)
    scenario.set("scores", "captions", value={"wordnet": "dict", "synsets": "synsets.txt"})
    scenario.set("recipes", value={})
    assert message in scenario.run().failures["captions/facts"]
    (scenario.folder / "synsets.txt").unlink()
    assert "no such list of synsets" in scenario.run().failures["captions/facts"]


# Clusters


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    vectors = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


@given(rows=st.integers(1, 700), clusters=st.integers(1, 600), width=st.integers(1, 20))
@settings(max_examples=15, deadline=None)
def test_the_nearest_centroid_is_that_of_the_largest_product(rows: int, clusters: int, width: int) -> None:
    image, centroid = unit(rows, width, 1).half(), 2 * unit(clusters, width, 2)
    products = image.double() @ centroid.double().T
    found = nearest_centroid(image, centroid)
    assert (products.gather(1, found[:, None])[:, 0] >= products.amax(1) - 1e-6).all()


def test_of_equally_near_centroids_the_first_is_named() -> None:
    centroid = unit(600, 8, 1)[[5, 5, 9] + [7] * 590]
    assert nearest_centroid(centroid[[0, 2, 590]], centroid).tolist() == [0, 2, 3]


def test_k_means_finds_clusters_that_are_there() -> None:
    middles = unit(5, 16, 3)
    image = torch.nn.functional.normalize(middles.repeat(40, 1) + 0.05 * unit(200, 16, 4), dim=1)
    found = spherical_k_means(image.half(), clusters=5, iterations=20)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    assert (found @ middles.T).amax(1).min() > 0.995
    assert nearest_centroid(image, found).reshape(40, 5).unique(dim=0).shape == (1, 5)
    with pytest.raises(ValueError, match="3 rows are fewer than 5 clusters"):
        spherical_k_means(image[:3], clusters=5, iterations=1)


def in_clusters(scenario: Scenario, centroids: np.ndarray) -> list[bool]:
    """Return, from float64, which rows share their nearest centroid with a target image."""
    lake = scenario.open().lake
    pets = column_to_vectors(lake.read("target_embeddings/tiny/pets")["image"]).astype(np.float64)
    vectors = np.concatenate([column_to_vectors(lake.read("embeddings/tiny", s)["image"]) for s in SHARDS])
    hit = set((pets @ centroids.T).argmax(1).tolist())
    return [c in hit for c in (vectors.astype(np.float64) @ centroids.T).argmax(1).tolist()]


def test_the_image_based_filter_keeps_rows_in_a_targets_cluster(scenario: Scenario) -> None:
    scenario.set("scores", "captions", value={})
    clusters = {"clusters": 6, "sample": 20, "targets": ["pets"]}
    scenario.set("scores", "clusters", value={"tiny": clusters})
    names = {"encoder": "tiny", "target": "pets"}
    scenario.set("recipes", value={"image": {"steps": [{"where": '"in_target_cluster/tiny/pets"'}]}})
    assert scenario.run().failures == {}
    table = scenario.open().lake.read("centroids/tiny")
    inside = in_clusters(scenario, column_to_vectors(table["centroid"]).astype(np.float64))
    told = scenario.scores("clusters/tiny/pets")
    assert told["in_target_cluster"].to_list() == inside
    assert 0 < sum(inside) < 36
    assert len(scenario.manifest("image")) == sum(inside)

    # The whole filter asks for an English caption, too; most of the made-up ones are.
    scenario.set("recipes", "based", value=from_file("datacomp_image_based", **names))
    scenario.set("recipes", "both", value=from_file("datacomp_image_based_clip_score_30", **names))
    outcome = scenario.run()
    assert set(outcome.computed) <= {"subset/based", "subset/both", "catalog"}
    english = scenario.scores("captions/facts")["language"] == "en"
    based = set(told.filter(english & told["in_target_cluster"]).select("f0", "f1").rows())
    assert set(scenario.manifest("based").select("f0", "f1").rows()) == based
    scores = scenario.scores("clip_score/tiny")
    above = scores.filter(pl.col("clip_score") >= scores["clip_score"].sort(descending=True)[int(36 * 0.30)])
    assert set(scenario.manifest("both").select("f0", "f1").rows()) == based & set(above.select("f0", "f1").rows())


def test_a_study_ranks_by_scores_and_not_by_facts(scenario: Scenario) -> None:
    scenario.set("scores", "captions", value={})
    scenario.set("scores", "clusters", value={"tiny": {"clusters": 3, "targets": ["pets"]}})
    scenario.run()
    found = study(scenario.open(), resamples=10)
    assert set(found.scores) == {
        "clip_score/tiny",
        "neg_clip_loss/tiny",
        "norm_sim_2/tiny/pets",
        "norm_sim_inf/tiny/pets",
    }


def test_centroids_of_the_pool_stay_when_a_shard_arrives(scenario: Scenario) -> None:
    scenario.set("scores", "clusters", value={"tiny": {"clusters": 3, "targets": ["pets"]}})
    scenario.run()
    scenario.write_shard("00007")
    outcome = scenario.run()
    assert outcome.failures == {}
    assert "centroids/tiny" not in outcome.computed
    assert outcome.computed["clusters/tiny/pets"] == ["00007"]


def test_centroids_may_be_given(scenario: Scenario, tmp_path: Path) -> None:
    ready = unit(4, 16, 9).numpy()
    np.save(scenario.folder / "given.npy", ready)
    scenario.set("scores", "clusters", value={"tiny": {"centroids": "given.npy", "targets": ["pets"]}})
    scenario.set("recipes", value={"image": {"steps": [{"where": '"in_target_cluster/tiny/pets"'}]}})
    assert scenario.run().failures == {}
    assert scenario.scores("clusters/tiny/pets")["in_target_cluster"].to_list() == in_clusters(scenario, ready)
    version = scenario.subset("image")
    again = rebuild(version.lineage, tmp_path / "again")
    assert (again / "subset.npy").read_bytes() == Path(version.uids).read_bytes()
    np.save(scenario.folder / "given.npy", ready[:, :5])
    assert "has 5 dimensions" in scenario.run().failures["clusters/tiny/pets"]


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
        ({"file": "mine.yaml"}, "mine.yaml: it needs names for encoder"),
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
