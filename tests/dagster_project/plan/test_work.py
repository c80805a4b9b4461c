"""What `clip-select plan` lists is what a pass then computes."""

from collections.abc import Callable

import pytest

from assets.base.context import Snapshot
from dagster_project.plan.work import Work, find_work
from tests.support.scenario import SHARDS, Scenario


def planned(scenario: Scenario) -> dict[str, Work]:
    project, graph = scenario.open_graph()
    return {work.asset: work for work in find_work(Snapshot(project), graph) if work.due}


def remove_embeddings(scenario: Scenario) -> None:
    (scenario.folder / "lake/embeddings/tiny" / f"{SHARDS[1]}.arrow").unlink()


def remove_negatives(scenario: Scenario) -> None:
    (scenario.folder / "lake/negatives/tiny.arrow").unlink()


def change_draws(scenario: Scenario) -> None:
    scenario.set("scores", "neg_clip_loss", value={"tiny": {"batch_size": 8, "draws": 2}})


def add_shard(scenario: Scenario) -> None:
    scenario.write_shard("00003")


def change_recipe(scenario: Scenario) -> None:
    scenario.set("recipes", "clip_third", "steps", value=[{"keep_top": {"score": "clip_score/tiny", "count": 5}}])


def remove_report(scenario: Scenario) -> None:
    next((scenario.folder / "lake/subset/paper").rglob("index.html")).unlink()


@pytest.mark.parametrize("change", [remove_embeddings, remove_negatives, change_draws, add_shard, change_recipe])
def test_the_plan_lists_what_a_pass_computes(finished: Scenario, change: Callable[[Scenario], None]) -> None:
    assert planned(finished) == {}
    change(finished)
    plan = planned(finished)
    outcome = finished.run()
    assert outcome.failures == {}
    assert {key: sorted(work.shards) for key, work in plan.items()} == {
        key: sorted(shards) for key, shards in outcome.computed.items()
    }
    assert planned(finished) == {}


def test_the_reason_names_the_changed_setting(finished: Scenario) -> None:
    change_draws(finished)
    plan = planned(finished)
    assert plan["negatives/tiny"].why == {"settings changed: draws": 1}
    assert plan["neg_clip_loss/tiny"].why == {"negatives/tiny is computed again": len(SHARDS)}
    assert "clip_score/tiny" not in plan


def test_a_missing_report_is_due(finished: Scenario) -> None:
    remove_report(finished)
    assert planned(finished)["subset/paper"].why == {"its report is missing": 1}


def test_an_asset_without_its_input_files_is_blocked_with_the_reason(finished: Scenario) -> None:
    finished.set("external_scores", value={"other": {"files": "none.parquet", "columns": "score"}})
    project, graph = finished.open_graph()
    (blocked,) = (work for work in find_work(Snapshot(project), graph) if work.asset == "external_files/other")
    assert not blocked.due
    assert "none.parquet" in blocked.blocked[None]
