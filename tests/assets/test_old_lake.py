"""Lakes that an earlier commit wrote (`tests/data/old_lake.py`): explain, diff and reproduce work.

They are up to date except for scores whose values were wrong, and for the subsets that were selected by those:
`hype` had the caption's specificity reversed (code version 2); negCLIPLoss by random partitions had smaller batches in
smaller shards (it now reads `negatives`, so that its provenance differs).
"""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import duckdb
import pytest

from assets.graph import build_graph
from assets.reproduction import choose_again, rebuild
from assets.settings import open_project
from dagster_project.headless import materialize
from resources.lake.versions import Versions
from tests.data.old_lake import unpacked

CORRECTED = {
    "datacomp": {"hype/meru", "subset/sets"},
    "webdataset": {"negatives/tiny", "neg_clip_loss/tiny", "subset/paper"},
}
"""What is computed anew, by project."""


@pytest.fixture(scope="module")
def old() -> Iterator[Path]:
    with unpacked() as folder:
        yield folder


@pytest.fixture(scope="module", params=["datacomp", "webdataset"])
def project(old: Path, request: pytest.FixtureRequest) -> Path:
    """One of the two projects after a pass over its lake."""
    config = old / request.param / "project.yaml"
    opened = open_project(config)
    with dg.DagsterInstance.ephemeral() as instance:
        outcome = materialize(opened, build_graph(opened), instance, notice=lambda *_: None)
    assert outcome.failures == {}
    assert set(outcome.computed) == {"catalog", *CORRECTED[config.parent.name]}  # the archive has no catalog
    return config


def test_only_corrected_scores_are_computed_and_every_version_can_be_chosen_again(
    project: Path, tmp_path: Path
) -> None:
    opened = open_project(project)
    for recipe in opened.settings.recipes:
        versions = Versions(opened.lake, recipe)
        corrected = f"subset/{recipe}" in CORRECTED[project.parent.name]
        assert versions.names() == ["v0001", "v0002", *(["v0003"] if corrected else [])]
        newest = versions.current()
        assert newest is not None
        choose_again(opened.lake, newest.lineage, tmp_path / recipe)


def test_explain_and_diff_answer(project: Path) -> None:
    opened = open_project(project)
    with duckdb.connect(str(opened.catalog_path()), read_only=True) as con:
        for recipe in opened.settings.recipes:
            ((uid,),) = con.execute(
                "SELECT uid FROM subset_members WHERE recipe = ? AND version = 'v0002' LIMIT 1", [recipe]
            ).fetchall()
            verdicts = con.execute(
                "SELECT verdict FROM explain($uid) WHERE recipe = $recipe ORDER BY step", {"uid": uid, "recipe": recipe}
            ).fetchall()
            assert verdicts[-1] == ("kept",)
            changes = con.execute("FROM diff($recipe, 'v0001', 'v0002')", {"recipe": recipe}).fetchall()
            assert changes
            assert {change[0] for change in changes} <= {"entered", "left"}


def test_a_version_is_made_again_from_the_pool(old: Path, tmp_path: Path) -> None:
    # The recipe's scores have no rounding, so that every machine makes the same bytes.
    opened = open_project(old / "datacomp" / "project.yaml")
    record = Versions(opened.lake, "exact").read("v0002").lineage
    assert rebuild(record, tmp_path) == tmp_path
