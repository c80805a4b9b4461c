"""Lakes that an earlier commit wrote (`tests/data/old_lake.py`): explain, diff and reproduce work.

Shards and targets are read again (code version 2 of raw_pool and target_embeddings). Their content is the same, because
all pictures are RGB, so that what was computed from them is up to date, except for scores whose values were wrong, and
for the subsets that were selected by those: `hype` had the caption's specificity reversed (code version 2); negCLIPLoss
by random partitions had smaller batches in smaller shards (it now reads `negatives`, so that its provenance differs).
"""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import duckdb
import pytest

from assets.base.context import Context
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
MEASURED = {"datacomp": {"subset/paper"}, "webdataset": set[str]()}
"""Subsets whose step runs only to measure drift, because the pool had doubled since the draw; no version is written."""


@pytest.fixture(scope="module")
def old() -> Iterator[Path]:
    with unpacked() as folder:
        yield folder


@pytest.fixture(scope="module", params=["datacomp", "webdataset"])
def opened(old: Path, request: pytest.FixtureRequest) -> tuple[Context, set[str]]:
    """One of the two projects after a pass over its lake, and what was computed."""
    config = old / request.param / "project.yaml"
    project = open_project(config)
    (encoder,) = project.settings.encoders
    targets = f"target_embeddings/{encoder}/pets"
    before = project.lake.stored(targets)
    with dg.DagsterInstance.ephemeral() as instance:
        outcome = materialize(project, build_graph(project), instance, notice=lambda *_: None)
    assert outcome.failures == {}
    after = project.lake.stored(targets)
    assert before is not None
    assert after is not None
    computed = set(outcome.computed)
    name = config.parent.name
    expected = {"raw_pool", targets, "catalog", *CORRECTED[name], *MEASURED[name]}  # the archive has no catalog
    assert computed >= expected
    # A CPU that rounds embeddings otherwise than the archive's changes the targets, so that their scores follow.
    assert computed == expected or after.fingerprint != before.fingerprint
    return project, computed


def test_only_corrected_scores_are_computed_and_every_version_can_be_chosen_again(
    opened: tuple[Context, set[str]], tmp_path: Path
) -> None:
    project, computed = opened
    for recipe in project.settings.recipes:
        versions = Versions(project.lake, recipe)
        selected = f"subset/{recipe}" in computed - MEASURED[project.config.parent.name]
        assert versions.names() == ["v0001", "v0002", *(["v0003"] if selected else [])]
        newest = versions.current()
        assert newest is not None
        choose_again(project.lake, newest.lineage, tmp_path / recipe)


def test_explain_and_diff_answer(opened: tuple[Context, set[str]]) -> None:
    project, _ = opened
    with duckdb.connect(str(project.catalog_path()), read_only=True) as con:
        for recipe in project.settings.recipes:
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
    project = open_project(old / "datacomp" / "project.yaml")
    record = Versions(project.lake, "exact").read("v0002").lineage
    assert rebuild(record, tmp_path) == tmp_path
