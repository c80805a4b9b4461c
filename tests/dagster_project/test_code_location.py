"""The code location loads without torch and without a pool, from the YAML in the environment."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.scenario import Scenario

ROOT = Path(__file__).resolve().parents[2]

LOAD = """
import sys
from dagster_project.definitions import defs
found = defs()
print(sorted(key.to_user_string() for key in found.resolve_asset_graph().get_all_asset_keys()))
print(sorted({"torch", "open_clip", "torchvision", "matplotlib"} & set(sys.modules)))
"""


def load(**environment: str) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-c", LOAD]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_demo_loads_without_torch_and_before_its_pool_is_there() -> None:
    keys, heavy = load(CLIP_SELECTION_CONFIG="")
    assert "'subset/neg_clip_loss_30_norm_sim_20'" in keys
    assert "'neg_clip_loss/tiny'" in keys
    assert heavy == "[]"


def test_the_environment_names_another_project(scenario: Scenario) -> None:
    scenario.open()
    keys, heavy = load(CLIP_SELECTION_CONFIG=str(scenario.folder / "project.yaml"))
    assert "'subset/paper'" in keys
    assert heavy == "[]"


def test_every_example_is_a_valid_project() -> None:
    for path in [*sorted((ROOT / "examples").glob("*.yaml")), ROOT / "config/demo.yaml"]:
        keys, _ = load(CLIP_SELECTION_CONFIG=str(path))
        assert "'catalog'" in keys
