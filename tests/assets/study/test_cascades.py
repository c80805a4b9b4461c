"""Cascades on the study page, against counting rows one by one."""

import math
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from assets.study.figures import study
from assets.study.findings import findings
from assets.study.page import write_page
from assets.study.results import StudyError
from core.uids import format_uid
from dagster_project import cli
from tests.support.cascading import POOL, UPPER
from tests.support.scenario import SHARDS, Scenario

PAIR = ("full", "best")


def uids(frame: pl.DataFrame) -> set[tuple[int, int]]:
    return set(frame.select("f0", "f1").iter_rows())


def test_a_cascade_is_compared_with_the_full_selection(computed_cascade: Scenario, tmp_path: Path) -> None:
    found = study(computed_cascade.open(), pairs=[PAIR], resamples=2)
    (cascade,) = found.cascades
    full, best = (uids(computed_cascade.manifest(recipe)) for recipe in PAIR)
    assert 0 < len(full & best) < len(full)
    assert cascade.overlap == len(full & best) / len(full)
    assert cascade.embedded == {"large": UPPER / POOL}
    ranked = computed_cascade.scores("clip_score/small").sort(
        ["clip_score", "f0", "f1"], descending=[True, False, False]
    )
    order = list(ranked.select("f0", "f1").iter_rows())
    assert cascade.within == {
        share: len(full & set(order[: math.floor(share * POOL)])) / len(full)
        for share in (0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8)
    }
    # Within the same upper half, equal weights rank alike.
    assert cascade.overlap == cascade.within[0.5]
    assert cascade.needed is not None
    top = round(cascade.needed * POOL)
    assert len(full & set(order[:top])) >= 0.98 * len(full) > len(full & set(order[: top - 1]))
    page = write_page(found, tmp_path).read_text()
    assert "<h2>Cascades</h2>" in page
    assert ("best", f"keeps {cascade.overlap:.1%} of full") in [
        (lead, text.split(",")[0]) for lead, text in findings(found)
    ]


def test_a_subset_that_is_not_the_top_by_one_score_has_no_curve(computed_cascade: Scenario) -> None:
    project = computed_cascade.open()
    upper = project.settings.recipes["upper"].model_copy(update={"source": "full"})
    settings = project.settings.model_copy(update={"recipes": {**project.settings.recipes, "upper": upper}})
    (cascade,) = study(replace(project, settings=settings), pairs=[PAIR], resamples=2).cascades
    assert (cascade.cheap, cascade.within, cascade.needed) == (None, {}, None)


def test_studied_rows_that_the_expensive_encoder_does_not_embed_are_studied_without_it(
    computed_cascade: Scenario, tmp_path: Path
) -> None:
    scored = computed_cascade.scores("clip_score/large").filter(pl.col("clip_score").is_null())
    truth = tmp_path / "truth.parquet"
    scored.select(
        uid=pl.Series([format_uid(f0, f1) for f0, f1 in scored.select("f0", "f1").iter_rows()]),
        kind=pl.when(pl.int_range(pl.len()) % 2 == 0).then(pl.lit("clean")).otherwise(pl.lit("fault")),
    ).write_parquet(truth)
    found = study(computed_cascade.open(), truth, resamples=2)
    assert found.rows == POOL - UPPER
    assert "clip_score/tiny" in found.scores
    assert "clip_score/large" not in found.scores
    assert found.sensitivities == []


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("best", "full"), "recipe 'full' reads no score of an encoder with `of`"),
        (("ful", "best"), "there is no recipe 'ful'; did you mean full"),
    ],
)
def test_a_pair_that_is_no_cascade_is_refused(computed_cascade: Scenario, pair: tuple[str, str], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        study(computed_cascade.open(), pairs=[pair], resamples=2)


def test_versions_of_different_shards_are_not_compared(cascade: Scenario) -> None:
    assert not cascade.run().failures
    shard = cascade.folder / "pool" / f"{SHARDS[-1]}.tar"
    shard.rename(cascade.folder / shard.name)
    cascade.execute("subset/full")
    with pytest.raises(StudyError, match="full and best were selected from different shards"):
        study(cascade.open(), pairs=[PAIR], resamples=2)


def test_the_command_takes_the_pairs(computed_cascade: Scenario, tmp_path: Path) -> None:
    computed_cascade.open()
    config = str(computed_cascade.folder / "project.yaml")
    assert cli.main(["study", config, "--into", str(tmp_path), "--cascade", *PAIR]) == 0
    assert "Cascades" in (tmp_path / "index.html").read_text()
    assert cli.main(["study", config, "--into", str(tmp_path)]) == 0
    assert "Cascades" not in (tmp_path / "index.html").read_text()
    assert cli.main(["study", config, "--into", str(tmp_path), "--cascade", "full", "full"]) == 2
