"""Mistakes in `evaluations` are one message with field and remedy, before anything runs."""

from pathlib import Path
from typing import Any

import pytest

from assets.settings import ConfigError, open_project
from dagster_project.early_checks import require_inputs
from tests.support.evaluations import small_evaluation, write_pairs
from tests.support.scenario import Scenario

HELD_OUT = {"retrieval": {"path": "held_out.tar"}}
HEADS = {"tier": "heads", "train": {}, "encoder": "tiny"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arms": ["random", "clip_thirt"]}, "arms: there is no recipe 'clip_thirt'.*clip_third"),
        ({"arms": ["random", "pool"]}, "arms: give a recipe"),
        ({"arms": ["random"]}, "arms: expected at least 2"),
        ({"arms": ["paper", "paper"]}, "given twice"),
        ({"baseline": "paper"}, "'paper' is no arm"),
        ({"tier": "full"}, "train.model is missing"),
        ({"train": {"model": "ViT-B-32"}}, "train.model is for the tier full"),
        ({"train": {"samples_seen": 10, "batch_size": 16}}, "less than one batch"),
        ({"train": {"sample_seen": 10}}, "no such field"),
        ({"tasks": {}}, "give `zero_shot` targets, or `retrieval`"),
        ({"tasks": {"zero_shot": "petz"}}, "no target 'petz'.*pets"),
        ({"tasks": {"zero_shot": "pets", "templates": "a photo"}}, "has no {}"),
        ({"encoder": "tiny"}, "`encoder` is what the tier heads needs"),
        ({"tier": "heads", "train": {}}, "`encoder` is what the tier heads needs"),
        (
            {**HEADS, "arms": ["random", "clip_third"]},
            "selects by clip_score/tiny, which comes from the model of 'tiny'",
        ),
        ({**HEADS, "arms": ["random", "inside"]}, "'inside' selects by"),
        ({**HEADS, "encoder": "tony"}, "there is no encoder 'tony'"),
        (
            {"how_much": {"arms": ["random", "paper", "inside"], "samples_seen": 5}},
            "how_much.arms: recipes only",
        ),
        (
            {"how_much": {"arms": ["clip_third", "paper", "inside"], "samples_seen": 5, "task": "pet"}},
            "there is no task 'pet'",
        ),
    ],
)
def test_a_mistake_is_named_with_its_remedy(scenario: Scenario, changed: dict[str, Any], message: str) -> None:
    small_evaluation(scenario, **changed)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        scenario.open()


def test_an_encoder_of_the_same_model_under_another_name_is_refused(scenario: Scenario) -> None:
    scenario.set("encoders", "twin", value=dict(scenario.document["encoders"]["tiny"]))
    small_evaluation(scenario, **HEADS | {"encoder": "twin"})
    with pytest.raises(ConfigError, match="comes from the model of 'twin'"):
        scenario.open()


def test_a_recipe_cannot_have_the_name_of_an_arm(scenario: Scenario) -> None:
    small_evaluation(scenario)
    scenario.set("recipes", "pool", value={"steps": [{"where": "width > 0"}]})
    with pytest.raises(ConfigError, match="rename the recipe"):
        scenario.open()


def test_a_pool_without_images_trains_nothing(scenario: Scenario) -> None:
    small_evaluation(scenario)
    scenario.set("pool", value={"path": "pool", "format": "datacomp"})
    scenario.set("encoders", "tiny", value={"precomputed": "b32", "temperature": 0.01})
    scenario.set("targets", "pets", "features", value={"tiny": "features.npy"})
    with pytest.raises(ConfigError, match="has no images to train on"):
        scenario.open()


def test_missing_held_out_pairs_stop_the_evaluation_and_nothing_else(scenario: Scenario) -> None:
    small_evaluation(scenario, tasks=HELD_OUT)
    project, graph = scenario.open_graph()
    require_inputs(project, graph)
    with pytest.raises(ConfigError, match=r"held_out\.tar does not exist(?s:.*)needed by evaluation/small"):
        require_inputs(project, graph, ["evaluation/small"])
    write_pairs(scenario.folder / "held_out.tar", {})
    require_inputs(project, graph, ["evaluation/small"])


def test_an_unknown_model_is_found_before_anything_is_trained(scenario: Scenario) -> None:
    small_evaluation(scenario, tier="full", train={"model": "ViT-B-33"}, tasks={"zero_shot": "pets"})
    project, graph = scenario.open_graph()
    with pytest.raises(ConfigError, match="open_clip has no model 'ViT-B-33'"):
        require_inputs(project, graph, ["evaluation/small"])


def test_the_documented_settings_are_accepted(scenario: Scenario, tmp_path: Path) -> None:
    path = Path(__file__).parents[3] / "config" / "demo-evaluation.yaml"
    assert open_project(path).settings.evaluations["small"].compared_with == "random"
    del scenario, tmp_path
