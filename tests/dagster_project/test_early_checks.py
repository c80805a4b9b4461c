"""Everything that a YAML refers to is checked before a row is read, and dependents of a failure are reported once."""

import errno
import io
import json

import dagster as dg
import numpy as np
import pytest
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run
from rich.console import Console

from assets.base.keys import SHARDS_NAME, asset_key
from dagster_project import cli, console
from dagster_project.definitions import build_defs
from dagster_project.headless import QUIET
from dagster_project.staleness import RANGE_END, RANGE_START
from tests.support.evaluations import small_evaluation
from tests.support.scenario import SHARDS, Scenario, keep


def test_all_problems_are_one_message_before_anything_is_computed(
    scenario: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario.open()
    config = str(scenario.folder / "project.yaml")
    assert cli.main(["check", config]) == 0
    assert "no problems. Shards: 3; assets: " in capsys.readouterr().out
    scenario.set("targets", "pets", value={"path": "pest"})
    scenario.set("encoders", "wide", value={"model": "ViT-B-23", "pretrained": "openai"})
    scenario.set("external_uids", value={"dfn": {"files": ["dfn.npy"]}})
    scenario.set("recipes", "listed", value={"from": "mine.npy", "steps": [keep("clip_score/tiny", count=2)]})
    scenario.open()
    for command in ("check", "run"):
        assert cli.main([command, config]) == 2
        message = capsys.readouterr().err
        assert "project.yaml: nothing was computed. Problems: 4" in message
        for part in (
            "pest",
            "open_clip has no model 'ViT-B-23'",
            "dfn.npy: no such file",
            "mine.npy: no such uid list",
        ):
            assert part in message
        assert "needed by embeddings/wide" in message
        assert "Traceback" not in message
        assert "Recipes that need none of this: clip_third. To compute those: clip-select run" in message
        assert "--only clip_third" in message
    assert not (scenario.folder / "lake" / "raw_pool").exists()


def test_check_reports_what_an_evaluation_lacks_unless_only_recipes_are_asked_for(
    scenario: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    small_evaluation(scenario, tasks={"retrieval": {"path": "none.tar"}})
    scenario.open()
    config = str(scenario.folder / "project.yaml")
    assert cli.main(["check", config]) == 2
    message = capsys.readouterr().err
    assert "none.tar does not exist" in message
    assert "needed by evaluation/small" in message
    assert "--only clip_third" in message
    assert cli.main(["check", config, "--only", "clip_third"]) == 0


def test_the_recipes_that_can_be_computed_are_computed_with_only(
    scenario: Scenario, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    scenario.set("targets", "pets", value={"path": "pest"})
    scenario.open()
    config = str(scenario.folder / "project.yaml")
    assert cli.main(["check", config, "--only", "clip_third"]) == 0
    assert "assets: 4" in capsys.readouterr().out  # raw_pool, embeddings, the score and the subset
    assert cli.main(["run", config, "--only", "clip_third", "--only", "inside"]) == 2
    assert "pest" in capsys.readouterr().err
    assert cli.main(["run", config, "--only", "clip_thrid"]) == 2
    assert "there is no recipe 'clip_thrid'; did you mean clip_third?" in capsys.readouterr().err
    assert cli.main(["run", config, "--only", "clip_third", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [row["asset"] for row in found["computed"]] == [
        "raw_pool",
        "embeddings/tiny",
        "clip_score/tiny",
        "subset/clip_third",
        "catalog",
    ]
    assert "step 5 of 5: catalog: computed in" in printed.err
    (subset,) = found["subsets"]
    assert (subset["recipe"], subset["version"], subset["computed"]) == ("clip_third", "v0001", True)
    assert len(np.load(subset["path"])) == subset["rows"] == 12
    assert sorted(path.name for path in (scenario.folder / "lake").iterdir() if path.is_dir()) == [
        ".dagster",
        "catalog",
        "clip_score",
        "embeddings",
        "raw_pool",
        "rejects",
        "subset",
    ]


def test_an_error_that_a_user_can_fix_is_a_json_document_too(
    scenario: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario.set("targets", "pets", value={"path": "pest"})
    scenario.open()
    assert cli.main(["run", str(scenario.folder / "project.yaml"), "--json"]) == 2
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["exit_status"], found["error"]["type"]) == (2, "ConfigError")
    assert "pest" in found["error"]["message"]
    assert "pest" in printed.err


def test_a_run_that_the_ui_starts_fails_before_its_first_step(scenario: Scenario) -> None:
    scenario.set("targets", "pets", value={"path": "pest"})
    project, graph = scenario.open_graph()
    job = build_defs(project, graph).resolve_implicit_global_asset_job_def()
    scenario.instance.add_dynamic_partitions(SHARDS_NAME, list(SHARDS))

    def start(*keys: str) -> dg.JobExecutionResult:
        selection = frozenset(map(asset_key, keys))
        run = scenario.instance.create_run_for_job(
            job.get_subset(asset_selection=selection),
            run_config=QUIET,
            tags={RANGE_START: SHARDS[0], RANGE_END: SHARDS[0]},
            asset_selection=selection,
        )
        return execute_run(InMemoryJob(job.get_subset(asset_selection=selection)), run, scenario.instance)

    failed = start("raw_pool", "embeddings/tiny", "target_embeddings/tiny/pets")
    assert not failed.success
    assert [event for event in failed.all_events if event.is_step_event] == []
    (event,) = (event for event in failed.all_events if event.is_job_failure)
    assert "pest" in str(event.job_failure_data.error)
    assert "needed by target_embeddings/tiny/pets" in str(event.job_failure_data.error)
    assert not (scenario.folder / "lake" / "raw_pool").exists()
    assert start("raw_pool").success  # which needs no target


def test_assets_that_need_a_failed_one_are_not_attempted(scenario: Scenario) -> None:
    for path in (scenario.folder / "pets").rglob("*"):
        if path.is_file():
            path.write_bytes(b"no image")
    outcome = scenario.run()
    assert list(outcome.failures) == ["target_embeddings/tiny/pets"]
    assert outcome.not_attempted == dict.fromkeys(
        ["norm_sim/tiny/pets", "subset/paper", "subset/inside"], "target_embeddings/tiny/pets"
    )
    assert "subset/clip_third" in outcome.computed
    text = io.StringIO()
    console.print_failures(outcome, Console(file=text, width=200))
    assert text.getvalue().count("subset/paper") == 1
    assert "subset/paper not attempted: needs target_embeddings/tiny/pets\n" in text.getvalue()


@pytest.mark.usefixtures("finished")
def test_a_subset_is_not_selected_from_the_earlier_file_of_a_failed_asset_that_is_out_of_date(
    scenario: Scenario,
) -> None:
    for path in (scenario.folder / "pets").rglob("*"):
        if path.is_file():
            path.write_bytes(b"no image")
    outcome = scenario.run()
    assert list(outcome.failures) == ["target_embeddings/tiny/pets"]
    needed = "target_embeddings/tiny/pets (its earlier results are out of date)"
    assert outcome.not_attempted == dict.fromkeys(["norm_sim/tiny/pets", "subset/paper", "subset/inside"], needed)
    assert scenario.subset("paper").name == "v0001"


@pytest.mark.usefixtures("finished")
def test_a_failed_asset_whose_file_is_up_to_date_keeps_nothing_from_being_computed(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    scenario.write_shard("00003")
    assert scenario.run().failures == {}  # with the negatives that are there
    scenario.set("recipes", "late", value={"steps": [keep("neg_clip_loss/tiny", count=3)]})
    monkeypatch.setattr("pyarrow.ipc.new_file", full)
    outcome = scenario.run(redraw=True)
    assert list(outcome.failures) == ["negatives/tiny"]
    assert outcome.not_attempted == {}
    assert "subset/late" in outcome.computed
