"""Evaluations of the shared scenario: their settings, held-out pairs, and running one."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from dagster_project.on_demand import evaluate
from dagster_project.outcome import Outcome
from tests.support.pool_factory import caption, picture, write_tar
from tests.support.scenario import Scenario

TINY = {"samples_seen": 32, "batch_size": 4, "seeds": 2, "checkpoints": 2, "device": "cpu"}
"""A training budget of eight steps."""


def write_pairs(path: Path, images: dict[str, bytes]) -> Path:
    """Write held-out pairs: some that no pool has, and the given ones."""
    images = {f"held{seed}": picture(seed) for seed in range(2000, 2006)} | images
    members = []
    for seed, (key, data) in enumerate(images.items()):
        members += [(f"{key}.jpg", data), (f"{key}.txt", caption(seed).encode())]
    return write_tar(path, members)


def reencoded(data: bytes, side: int) -> bytes:
    """Return a picture at another size and in another format: a near duplicate with other bytes."""
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((side, side), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def small_evaluation(scenario: Scenario, **changed: Any) -> None:
    """Add the evaluation `small` to a scenario."""
    settings: dict[str, Any] = {
        "tier": "small",
        "arms": ["random", "clip_third"],
        "train": TINY,
        "tasks": {"zero_shot": ["pets"], "retrieval": {"path": "held_out.tar"}},
    }
    scenario.document["evaluations"] = {"small": {**settings, **changed}}


def run_evaluation(scenario: Scenario, name: str = "small") -> Outcome:
    """Compute an evaluation as `clip-select evaluate` does."""
    project, graph = scenario.open_graph()
    return evaluate(project, graph, scenario.instance, name, notice=lambda *_: None)
