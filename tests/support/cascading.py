"""A project with a cascade: a cheap encoder, an expensive one of the upper half, and the same one of all rows."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.scenario import ROWS, SHARDS, Scenario, keep

POOL = ROWS * len(SHARDS)
UPPER = POOL // 2


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """Return the folder of a cheap encoder: the tiny one with other weights."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("small_clip")
    (folder / "open_clip_config.json").write_bytes((tiny_clip / "open_clip_config.json").read_bytes())
    state = load_file(tiny_clip / "open_clip_model.safetensors")
    save_file(
        {name: value.flip(0).contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def with_cascade(scenario: Scenario, small_clip: Path) -> Scenario:
    """Return the scenario with a cheap encoder, an expensive one of the upper half, and the same one of all rows."""
    tiny = scenario.document["encoders"]["tiny"]
    scenario.document["encoders"] = {
        "small": {**tiny, "model": f"local-dir:{small_clip}"},
        "tiny": tiny,
        "large": {**tiny, "of": "subset/upper"},
    }
    scenario.document["scores"] = {
        "neg_clip_loss": {"large": {"batch_size": UPPER, "draws": 1}},
        "norm_sim": {"large": ["pets"]},
    }
    scenario.document["recipes"] = {
        "upper": {"steps": [keep("clip_score/small", fraction=0.5)]},
        "best": {"steps": [{"intersect": "upper"}, keep("clip_score/large", fraction=0.25)]},
        "full": {"steps": [keep("clip_score/tiny", fraction=0.25)]},
    }
    return scenario


@pytest.fixture
def cascade(scenario: Scenario, small_clip: Path) -> Scenario:
    """Return that project, in which nothing has run."""
    return with_cascade(scenario, small_clip)


@pytest.fixture(scope="session")
def computed_cascade(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, small_clip: Path) -> Iterator[Scenario]:
    """Yield that project after a pass, for tests that only read it."""
    scenario = with_cascade(Scenario(tmp_path_factory.mktemp("cascade"), tiny_clip), small_clip)
    assert not scenario.run().failures
    yield scenario
    scenario.instance.dispose()
