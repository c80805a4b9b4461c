"""Encoders trained with a sigmoid loss: negCLIPLoss uses their logit scale and ignores their logit bias."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from assets.scores.neg_clip_loss_settings import temperature
from resources.lake.files import column_to_vectors
from tests.support.pool_factory import TINY_CONFIG, write_clip
from tests.support.scenario import SHARDS, Scenario

SCALE, BIAS = 2.9, -10.0
SIGLIP_CONFIG = {
    **TINY_CONFIG,
    "model_cfg": {
        **TINY_CONFIG["model_cfg"],
        "custom_text": True,
        "init_logit_scale": SCALE,
        "init_logit_bias": BIAS,
        "text_cfg": {
            **TINY_CONFIG["model_cfg"]["text_cfg"],
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    },
}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP with random weights: a logit bias, and a custom text tower."""
    return write_clip(tmp_path_factory.mktemp("siglip"), SIGLIP_CONFIG, seed=4)


def with_bias(siglip: Path, folder: Path, bias: float | None) -> Path:
    """Write the same model with another bias, or without one."""
    config = json.loads((siglip / "open_clip_config.json").read_text())
    config["model_cfg"]["init_logit_bias"] = bias
    state = load_file(siglip / "open_clip_model.safetensors")
    assert state.pop("logit_bias").item() == BIAS
    if bias is not None:
        state["logit_bias"] = torch.tensor(bias)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def use(scenario: Scenario, **models: Path) -> None:
    scenario.set(
        "encoders", value={n: {"model": f"local-dir:{m}", "batch_size": 5, "workers": 0} for n, m in models.items()}
    )
    scenario.set("scores", "neg_clip_loss", value={n: {"batch_size": 64, "draws": 1} for n in models})
    scenario.set("recipes", value={})


def test_neg_clip_loss_is_the_symmetric_loss_of_the_models_own_logits(scenario: Scenario, siglip: Path) -> None:
    use(scenario, sig=siglip)
    assert scenario.run().failures == {}
    project = scenario.open()
    tau = temperature(project, "sig")
    assert tau == pytest.approx(np.exp(-SCALE), rel=1e-6)

    model = open_clip.create_model(f"local-dir:{siglip}").double()
    tables = [project.lake.read("embeddings/sig", shard) for shard in SHARDS]
    image, text = (
        torch.from_numpy(np.concatenate([column_to_vectors(t[side]) for t in tables])).double()
        for side in ("image", "text")
    )
    with torch.no_grad():
        logits = model.logit_scale.exp() * image @ text.T + model.logit_bias
    assert model.logit_bias.item() == BIAS
    # The draw is the whole pool: it has fewer rows than were asked for.
    loss = logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()
    found = scenario.scores("neg_clip_loss/sig")["neg_clip_loss"].to_numpy()
    np.testing.assert_allclose(found, (-tau / 2 * loss).numpy(), atol=2e-6)


def test_the_bias_changes_no_score(scenario: Scenario, siglip: Path, tmp_path: Path) -> None:
    use(
        scenario,
        sig=siglip,
        other=with_bias(siglip, tmp_path / "other", 3.5),
        none=with_bias(siglip, tmp_path / "none", None),
    )
    assert scenario.run().failures == {}
    scores = [scenario.scores(f"neg_clip_loss/{name}")["neg_clip_loss"].to_list() for name in ("sig", "other", "none")]
    assert scores[0] == scores[1] == scores[2]
    assert len(set(scores[0])) > 30
