"""Negatives are kept while the pool grows; the drift check measures by itself, once per doubling, and people see it."""

import io
import json
from pathlib import Path

import dagster as dg
import pytest
from rich.console import Console

from assets.scores.drift import NAME
from dagster_project.console import print_outcome
from dagster_project.headless import Outcome, materialize
from resources.catalog.build import read_catalog
from resources.lake.check_records import read_checks
from resources.lake.files import column_to_vectors, vectors_to_column
from tests.support.automation import Automation

NEGATIVES = "negatives/b32"
KEY = dg.AssetCheckKey(dg.AssetKey(["negatives", "b32"]), NAME)


def headless(project: Automation) -> Outcome:
    outcome = materialize(project.project, project.graph, project.instance, notice=lambda *_: None)
    assert outcome.failures == {}
    return outcome


def measured(project: Automation) -> list[float]:
    """Return the growth at which each drift check ran, the earliest first."""
    records = project.instance.event_log_storage.get_asset_check_execution_history(KEY, limit=50)
    events = [r.event.dagster_event for r in reversed(records) if r.event is not None]
    found = [e.asset_check_evaluation_data.metadata for e in events if e.event_type_value == "ASSET_CHECK_EVALUATION"]
    return [float(metadata["growth"].value) for metadata in found]


def printed(project: Automation, outcome: Outcome) -> str:
    text = io.StringIO()
    print_outcome(project.project, project.graph, outcome, Console(file=text, width=200))
    return text.getvalue()


def test_a_pass_measures_once_per_doubling_and_the_verdict_is_stored_and_shown(automation: Automation) -> None:
    automation.write(1, 2)
    headless(automation)
    automation.write(3)
    headless(automation)
    assert measured(automation) == []
    assert automation.subset().lineage["drift"] == {}

    automation.write(4)
    outcome = headless(automation)
    assert measured(automation) == [2.0]
    lineage = automation.subset().lineage
    verdict = lineage["drift"][NEGATIVES]["figures"]["verdict"]
    assert verdict.startswith("The pool has 2.00 times the rows that the negatives were drawn from.")
    assert lineage["drift"][NEGATIVES]["figures"]["limit/changed"] == 0.02
    assert verdict in printed(automation, outcome)
    report = Path(automation.subset().folder) / "report" / "index.html"
    assert "The pool has 2.00 times the rows" in report.read_text()
    with read_catalog(automation.project.catalog_path()) as con:
        rows = con.execute("SELECT name, value FROM lineage('best') WHERE what = 'drift'").fetchall()
    assert rows == [(NEGATIVES, verdict)]

    for shard in (5, 6, 7):
        automation.write(shard)
        headless(automation)
    assert measured(automation) == [2.0]
    automation.write(8)
    headless(automation)
    assert measured(automation) == [2.0, 4.0]
    automation.assert_nothing_is_left()


def test_the_sensors_measure_too_before_the_subset_is_selected(automation: Automation) -> None:
    automation.write(1, 2)
    automation.settle()
    automation.write(3, 4)
    automation.settle()
    assert measured(automation) == [2.0]
    assert automation.subset().name == "v0002"
    assert automation.subset().lineage["drift"][NEGATIVES]["figures"]["growth"] == 2.0
    assert automation.settle() == []


def test_a_pool_that_had_doubled_before_is_measured_although_nothing_else_is_due(automation: Automation) -> None:
    automation.write(1, 2)
    headless(automation)
    automation.write(3, 4)
    headless(automation)
    for path in (automation.folder / "lake/checks").rglob("*.json"):
        path.unlink()  # a lake from before the check ran by itself
    outcome = headless(automation)
    assert outcome.computed.keys() == {"subset/best", "catalog"}
    assert automation.subset().name == "v0002"
    assert measured(automation) == [2.0, 2.0]
    assert headless(automation).computed == {}

    automation.document["scores"]["drift"] = {"rank_correlation": 1.0, "changed": 0.0}
    automation.load()
    headless(automation)
    assert len(measured(automation)) == 3  # the verdict is judged against other limits now


def test_a_drift_past_its_limit_is_a_warning_with_what_to_do(automation: Automation) -> None:
    automation.document["encoders"]["b32"]["temperature"] = 0.01  # the most similar negatives decide
    automation.document["scores"] = {
        "neg_clip_loss": {"b32": {"batch_size": 8, "draws": 2}},
        "drift": {"rank_correlation": 1.0, "changed": 0.0},
    }
    automation.load()
    automation.write(1, 2, 3, 4)
    headless(automation)
    automation.write(*range(5, 13))
    outcome = headless(automation)
    (warning,) = automation.subset().lineage["warnings"]
    assert (warning["asset"], warning["check"], warning["result"]) == (NEGATIVES, "drift", "failed")
    assert "Remedy: draw again (clip-select run --redraw-negatives" in warning["why"]
    assert "scores.neg_clip_loss.b32.redraw_at_growth: 2" in warning["why"]
    assert f"Warnings:\n  {NEGATIVES} drift: failed: The pool has 3.00 times" in printed(automation, outcome)

    # New negatives start anew: what was measured about the old ones says nothing about them.
    materialize(automation.project, automation.graph, automation.instance, notice=lambda *_: None, redraw=True)
    assert automation.subset().lineage["drift"] == {}
    assert automation.subset().lineage["warnings"] == []


def test_an_error_while_measuring_is_reported_and_the_subset_is_selected(automation: Automation) -> None:
    automation.write(1, 2)
    headless(automation)
    lake = automation.project.lake
    stored = lake.stored("embeddings/b32", "00001")
    assert stored is not None
    narrow = lake.read("embeddings/b32", "00001")
    for column in ("image", "text"):
        halves = vectors_to_column(column_to_vectors(narrow[column])[:, :4])
        narrow = narrow.set_column(narrow.column_names.index(column), column, halves)
    lake.write(narrow, stored.provenance, summary=stored.summary)
    automation.write(3, 4)
    outcome = headless(automation)
    assert automation.subset().name == "v0002"
    (warning,) = automation.subset().lineage["warnings"]
    assert (warning["check"], warning["result"]) == ("drift", "not compared")
    assert "the check ended with an error: ValueError" in warning["why"]
    assert "the check ended with an error: ValueError" in printed(automation, outcome)
    assert headless(automation).computed == {}


def test_a_damaged_record_is_an_error_with_its_path(automation: Automation) -> None:
    automation.write(1, 2)
    headless(automation)
    lake = automation.project.lake
    stored = lake.stored(NEGATIVES)
    assert stored is not None
    assert read_checks(lake, stored) == {}
    record = automation.folder / "lake/checks/negatives/b32/drift.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps(["nothing"]))
    with pytest.raises(Exception, match=r"drift\.json: not the result of a check .* Remedy: remove it"):
        read_checks(lake, stored)
