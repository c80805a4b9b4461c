"""Everything that a YAML refers to is checked before a row is read, and dependents of a failure are reported once."""

import errno
import io

import pytest
from rich.console import Console

from dagster_project import cli, console
from tests.support.scenario import Scenario, keep


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
    assert not (scenario.folder / "lake" / "raw_pool").exists()


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
