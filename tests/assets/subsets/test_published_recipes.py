"""Every published recipe in config/recipes against its paper, on a pool of the demo's pictures.

Plain Python selects from the scores in the lake, row by row, and subsets must be equal. A new file needs a line in
`CASES`; without it a test fails.
"""

import re
from collections.abc import Callable, Collection
from fractions import Fraction
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import dagster as dg
import numpy as np
import polars as pl
import pytest
import yaml

from assets.base.context import Context
from assets.base.score_kind import Scores
from assets.graph import build_graph
from assets.settings import open_project
from core.uids import format_uids, parse_uids, subset_array
from dagster_project.headless import materialize
from examples.demo import pool as demo
from resources.lake.versions import Versions
from tests.support.matching import match_row_by_row, thirds
from tests.support.pool_factory import Sample, uid, write_shard, write_tar
from tests.support.soft_cap import draw_row_by_row
from tests.support.wordnet import write_wordnet

ROOT = Path(__file__).resolve().parents[3]
FILES = ROOT / "config/recipes"
SHARD_ROWS = (103, 97, 102)  # one uid is there twice, and no recipe's share of 301 is a whole number
Row = dict[str, Any]


class Rows:
    """The selected rows, and the number that a fraction refers to."""

    def __init__(self, rows: list[Row], of: int | None = None) -> None:
        self.rows = rows
        self.of = len(rows) if of is None else of

    def top(self, score: str | Callable[[Row], float], share: str) -> "Rows":
        """Keep floor(share · of) rows with the largest values, of equal ones the smaller uids."""
        value = score if callable(score) else lambda row: row[score]
        best = sorted(self.rows, key=lambda row: (-value(row), row["uid"]))
        return Rows(best[: int(self.of * Fraction(share))], self.of)

    def from_the_value_behind(self, score: str, share: float) -> "Rows":
        """Keep what DataComp's code keeps."""
        least = sorted((row[score] for row in self.rows), reverse=True)[int(self.of * share)]
        return self.where(lambda row: row[score] >= least)

    def where(self, true: Callable[[Row], bool]) -> "Rows":
        """Keep the rows for which something is true."""
        return Rows([row for row in self.rows if true(row)], self.of)

    def or_in(self, *lists: Collection[str], pool: "Rows") -> "Rows":
        """Add the rows of the pool that are in a list, each once."""
        uids = {row["uid"] for row in self.rows}.union(*lists)
        return pool.where(lambda row: row["uid"] in uids)

    def begin_with(self, uids: Collection[str]) -> "Rows":
        """Keep the rows of a list; later fractions refer to them."""
        return Rows([row for row in self.rows if row["uid"] in uids])

    def drawn(self, one: str, other: str, share: str) -> "Rows":
        """Draw by the sum of two scores' z-scores, in one round."""
        scores = [np.array([row[name] for row in self.rows], np.float64) for name in (one, other)]
        values = sum((score - score.mean()) / score.std() for score in scores)
        uids = parse_uids([row["uid"] for row in self.rows])
        copies = draw_row_by_row(values, *uids, int(self.of * Fraction(share)), 100_000, 0.15, 1.0, 0)
        return Rows([row for row, times in zip(self.rows, copies, strict=True) for _ in range(times)], self.of)

    def difference(self, one: str, other: str) -> Callable[[Row], float]:
        """Return the difference of two scores in units of a temperature of 0.01."""
        return lambda row: 100.0 * row[one] + -100.0 * row[other]

    def matched(self, share: str, trade_off: float, *encoders: str) -> "Rows":
        """Keep the rows that match a target's distribution over the concepts of some encoders."""
        features = [
            {(name, i): z for name in encoders for i, z in zip(*of_row(row, name), strict=True) if z > 0}
            for row in self.rows
        ]
        target = {
            (name, i): p / len(encoders) for name in encoders for i, p in enumerate(self.rows[0][f"target of {name}"])
        }
        quality = thirds([row[LOSS] for row in self.rows])
        uids = list(zip(*(words.tolist() for words in parse_uids([row["uid"] for row in self.rows])), strict=True))
        found = match_row_by_row(features, target, quality, uids, int(self.of * Fraction(share)), trade_off)
        return Rows([self.rows[row] for row in found], self.of)

    def halves(self, one: str, other: str) -> Callable[[Row], float]:
        """Return the mean of two scores, each scaled to [0, 1] over these rows."""
        ends = {name: [end(row[name] for row in self.rows) for end in (min, max)] for name in (one, other)}
        return lambda row: sum(0.5 * (row[name] - least) / (most - least) for name, (least, most) in ends.items())


def of_row(row: Row, encoder: str) -> tuple[list[int], list[float]]:
    """Return the concepts of a row and their values."""
    return row[f"concepts/{encoder}"], row[f"concept_values/{encoder}"]


def english(row: Row, *, words: int = 0, characters: int = 0) -> bool:
    """Check whether a caption is English, with more words and characters than these."""
    return row["language/facts"] == "en" and row["words/facts"] > words and row["characters/facts"] > characters


def well_shaped(row: Row) -> bool:
    """Check whether a picture has the size and shape that the basic filter asks for."""
    short, long = sorted((row["original_width"], row["original_height"]))
    return short >= 200 and long <= 3 * short


CLIP, LOSS, SIEVE = "clip_score/tiny", "neg_clip_loss/tiny", "sieve/tiny/tower"
NEAR, NEAR_ALL, PRUNED = "norm_sim_inf/tiny/imagenet", "norm_sim_inf/tiny/tasks", "norm_sim_dynamic/tiny"
HIT = "in_target_cluster/tiny/imagenet"
TINY = {"encoder": "tiny"}
ONE, ALL = {**TINY, "target": "imagenet"}, {**TINY, "target": "tasks"}


class Case(NamedTuple):
    """A recipe file, its names, and its steps in plain Python."""

    file: str
    names: dict[str, str]
    wanted: Callable[[Rows], Rows]


CASES = {
    "clip_score_30": Case("clip_score_30", TINY, lambda pool: pool.top(CLIP, "0.3")),
    "basic": Case(
        "datacomp_basic", {}, lambda pool: pool.where(lambda r: english(r, words=2, characters=5) and well_shaped(r))
    ),
    "clip_score_30_and_equals": Case(
        "datacomp_clip_score_30", TINY, lambda pool: pool.from_the_value_behind(CLIP, 0.3)
    ),
    "laion2b": Case("datacomp_laion2b", TINY, lambda pool: pool.where(lambda r: english(r) and r[CLIP] >= 0.28)),
    "text_based": Case(
        "datacomp_text_based", {}, lambda pool: pool.where(lambda r: english(r) and r["names_synset/facts"])
    ),
    "image_based": Case(
        "datacomp_image_based", ONE, lambda pool: pool.where(lambda r: english(r, words=1, characters=5) and r[HIT])
    ),
    "image_based_clip_score_30": Case(
        "datacomp_image_based_clip_score_30",
        ONE,
        lambda pool: pool.from_the_value_behind(CLIP, 0.3).where(
            lambda r: english(r, words=1, characters=5) and r[HIT]
        ),
    ),
    "neg_clip_loss_30": Case("neg_clip_loss_30", TINY, lambda pool: pool.top(LOSS, "0.3")),
    "norm_sim_one_task": Case("neg_clip_loss_30_norm_sim_20", ONE, lambda pool: pool.top(LOSS, "0.3").top(NEAR, "0.2")),
    "norm_sim_all_tasks": Case(
        "neg_clip_loss_30_norm_sim_20", ALL, lambda pool: pool.top(LOSS, "0.3").top(NEAR_ALL, "0.2")
    ),
    "norm_sim_2d": Case("neg_clip_loss_30_norm_sim_2d_20", TINY, lambda pool: pool.top(LOSS, "0.3").top(PRUNED, "0.2")),
    "strict": Case("neg_clip_loss_20_norm_sim_10", ONE, lambda pool: pool.top(LOSS, "0.2").top(NEAR, "0.1")),
    "strict_or_listed": Case(
        "neg_clip_loss_20_norm_sim_10_or_dfn_or_hype",
        {**ALL, "dfn": "dfn", "hype": "hype"},
        lambda pool: pool.top(LOSS, "0.2").top(NEAR_ALL, "0.1").or_in(listed("dfn"), listed("hype"), pool=pool),
    ),
    "within_dfn": Case(
        "within_uids_neg_clip_loss_90_norm_sim_80",
        {**ONE, "uids": "dfn"},
        lambda pool: pool.begin_with(listed("dfn")).top(LOSS, "0.9").top(NEAR, "0.8"),
    ),
    "within_hype": Case(
        "within_uids_neg_clip_loss_90_norm_sim_80",
        {**ALL, "uids": "hype"},
        lambda pool: pool.begin_with(listed("hype")).top(LOSS, "0.9").top(NEAR_ALL, "0.8"),
    ),
    "learnability": Case(
        "learnability_20",
        {"reference": "tiny", "learner": "weak"},
        lambda pool: pool.top(pool.difference(LOSS, "neg_clip_loss/weak"), "0.2"),
    ),
    "learned_mix": Case("learned_mix_20", {"mix": "main"}, lambda pool: pool.top("learned_mix/main", "0.2")),
    "soft_cap_sample": Case("soft_cap_sample_weighted", ONE, lambda pool: pool.drawn(LOSS, NEAR, "1.0")),
    "sdm": Case("sdm_14", ONE, lambda pool: pool.matched("0.14", 0.5, "tiny")),
    "sdm_within": Case("neg_clip_loss_30_sdm_14", ONE, lambda pool: pool.top(LOSS, "0.3").matched("0.14", 1.0, "tiny")),
    "sdm_two_encoders": Case(
        "sdm_two_encoders_14", {**ONE, "other": "weak"}, lambda pool: pool.matched("0.14", 0.5, "tiny", "weak")
    ),
    "sieve_clip_score_20": Case(
        "sieve_clip_score_20",
        {**TINY, "captioner": "tiny", "text_encoder": "tower"},
        lambda pool: pool.top(pool.halves(SIEVE, CLIP), "0.2"),
    ),
}


def planned(shard: int) -> list[demo.Row]:
    """Return the first rows of a shard of the demo's pool, whose kinds are shuffled."""
    return demo.plan_shard(shard)[: SHARD_ROWS[shard]]


FIRST = planned(0)[0].uid
"""Is in two shards: the first row counts, and a union brings it in once."""


@cache
def listed(name: str) -> list[str]:
    """Return uids of an external list: some in the pool, some in both lists, some in neither."""
    rng = Random(name)
    uids = [row.uid for shard in range(len(SHARD_ROWS)) for row in planned(shard)]
    return [FIRST, *(one for one in uids if rng.random() < 0.3), *(uid("elsewhere", n) for n in range(7))]


def write_pool(folder: Path) -> None:
    """Write the pool as img2dataset would, with larger original sizes and some captions in other languages."""
    for shard in range(len(SHARD_ROWS)):
        samples = []
        for number, row in enumerate(planned(shard)):
            jpeg, words, side = demo.picture(row)
            words = f"das hier ist ein Bild: {words}" if number % 6 == 0 else words
            shape = Random(row.uid)
            meta = {
                "uid": FIRST if (shard, number) == (2, 50) else row.uid,
                "caption": words,
                "original_width": side * shape.randint(2, 8),
                "original_height": side * shape.randint(2, 8),
            }
            samples.append(Sample(f"{number:09d}", jpeg, words.encode(), meta))
        write_shard(folder, samples, f"{shard:05d}")


def write_tasks(folder: Path) -> None:
    """Write a target of several tasks, each a webdataset tar."""
    for task in range(2):
        rows = [row for row in demo.plan_shard(8 + task) if row.kind == "clean"][:10]
        members = [(f"{n:03d}.jpg", demo.picture(row)[0]) for n, row in enumerate(rows)]
        write_tar(folder / f"task_{task}.tar", members)


def document() -> dict[str, Any]:
    """Return a project with every file of config/recipes and their inputs."""
    models = f"local-dir:{ROOT / 'examples/demo'}"
    return {
        "name": "published",
        "lake": "lake",
        "pool": {"path": "pool"},
        "encoders": {name: {"model": f"{models}/encoder", "workers": 0} for name in ("tiny", "weak")},
        "targets": {"imagenet": {"path": "imagenet"}, "tasks": {"path": "tasks"}},
        "captioners": {
            "tiny": {"model": f"{models}/captioner", "workers": 0, "captions": 1, "min_tokens": 2, "max_tokens": 6}
        },
        "text_encoders": {"tower": {"encoder": "tiny"}},
        "scores": {
            "neg_clip_loss": {
                "tiny": {"batch_size": 64, "draws": 2},
                "weak": {"batch_size": 64, "draws": 2, "temperature": 0.5},
            },
            "norm_sim_dynamic": {"tiny": {"of": "subset/neg_clip_loss_30", "keep": 0.20, "rounds": 5}},
            "sparse_features": {
                name: {"targets": ["imagenet"], "concepts": 48, "k": 4, "steps": 30, "seed": seed}
                for seed, name in enumerate(("tiny", "weak"))
            },
            "learned_mix": {
                "main": {"encoder": "tiny", "columns": [CLIP, LOSS], "target": "imagenet", "seeds": 2, "steps": 5}
            },
            "captions": {"wordnet": "dict", "synsets": "synsets.txt"},
            "clusters": {"tiny": {"targets": ["imagenet"], "clusters": 12}},
        },
        "external_uids": {"dfn": {"files": "dfn.npy"}, "hype": {"files": "hype.txt"}},
        "recipes": {
            name: {"file": str(FILES / f"{case.file}.yaml"), "names": case.names} for name, case in CASES.items()
        },
    }


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """The project after one pass."""
    folder = tmp_path_factory.mktemp("published")
    write_pool(folder / "pool")
    demo.make_targets(folder / "imagenet", each=4)
    write_tasks(folder / "tasks")
    write_wordnet(folder / "dict")
    (folder / "synsets.txt").write_text("n00000031\nn00000032\n")  # big, large
    np.save(folder / "dfn.npy", subset_array(*parse_uids(listed("dfn"))))
    (folder / "hype.txt").write_text("\n".join(listed("hype")))
    (folder / "project.yaml").write_text(yaml.safe_dump(document()))
    project = open_project(folder / "project.yaml")
    with dg.DagsterInstance.ephemeral() as instance:
        assert materialize(project, build_graph(project), instance, notice=lambda *_: None).failures == {}
    return project


@pytest.fixture(scope="module")
def pool(published: Context) -> Rows:
    """Every uid of the pool with the scores of its first row, by their names in recipes."""
    lake = published.lake

    def read(asset: str) -> pl.DataFrame:
        return pl.concat([pl.from_arrow(lake.read(asset, shard)) for shard in lake.shards(asset)])

    table = read("raw_pool").select("uid", "original_width", "original_height")
    scores = {name: read(s.asset)[s.column.name] for name, s in Scores(published.settings).by_name.items()}
    rows = table.with_columns(column.alias(name) for name, column in scores.items())
    assert (rows.height, rows["uid"].n_unique()) == (302, 301)
    targets = {
        f"target of {name}": lake.read(f"target_concepts/{name}/imagenet")["share"].to_pylist()
        for name in ("tiny", "weak")
    }
    return Rows([row | targets for row in rows.unique("uid", keep="first", maintain_order=True).to_dicts()])


def test_the_file_of_soft_cap_sampling_draws_as_its_paper_does() -> None:
    """The pool fits one round, on which batch and penalty have no effect."""
    (step,) = yaml.safe_load((FILES / "soft_cap_sample_weighted.yaml").read_text())["steps"]
    assert [step["soft_cap_sample"][field] for field in ("batch", "penalty", "fraction")] == [100_000, 0.15, 1.0]


def test_every_file_is_run() -> None:
    assert {case.file for case in CASES.values()} == {path.stem for path in FILES.iterdir()}


def test_the_page_names_every_file_with_the_names_that_it_wants() -> None:
    page = (ROOT / "docs/recipes.md").read_text()
    told = re.findall(r"^\| `(\w+\.yaml)` \|[^|]*\|([^|]*)\|", page, re.MULTILINE)
    wanted = {path.name: set(re.findall(r"\{(\w+)\}", path.read_text())) for path in FILES.iterdir()}
    assert {file: {name for name in names.strip().split(", ") if name} for file, names in told} == wanted
    assert len(told) == len(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_published_recipe_chooses_what_its_paper_says(published: Context, pool: Rows, name: str) -> None:
    wanted = CASES[name].wanted(pool)
    version = Versions(published.lake, name).current()
    assert version is not None
    array = np.load(version.uids, allow_pickle=False)
    assert format_uids(array["f0"], array["f1"]) == sorted(row["uid"] for row in wanted.rows)
    for step in version.lineage["steps"]:  # on this pool no step is idle, but that one batch draws every row once
        assert step["joined"] or step["left"] or step["kind"] == "soft_cap_sample", step["text"]
