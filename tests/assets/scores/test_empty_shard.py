"""A shard whose samples were all rejected has zero rows in every table, and stops nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from assets.scores import KINDS
from tests.support.caption_length import CAPTION_LENGTH
from tests.support.pool_factory import sample, write_shard
from tests.support.scenario import SHARDS, Scenario, keep

EMPTY = "00003"
SCORES = {
    "neg_clip_loss": {"tiny": {"batch_size": 8, "draws": 3}},
    "norm_sim_dynamic": {"tiny": {"keep": 0.5, "rounds": 3}},
    "near_duplicates": {"tiny": {"best": "clip_score/tiny"}},
    "clusters": {"tiny": {"targets": ["pets"], "clusters": 3, "sample": 20}},
    "learned_mix": {
        "main": {"encoder": "tiny", "columns": ["clip_score/tiny", "neg_clip_loss/tiny"], "target": "pets", "steps": 2}
    },
    "captions": {},
    "caption_length": {"short": {"limit": 20}},
}


@pytest.fixture
def with_empty(tmp_path: Path, tiny_clip: Path) -> Iterator[Scenario]:
    """The scenario with more scores, and with a shard of which no image can be decoded."""
    scenario = Scenario(tmp_path, tiny_clip)
    scenario.kinds = (*KINDS, CAPTION_LENGTH)
    scenario.set("scores", value=SCORES)
    scenario.set("recipes", value={"third": {"steps": [keep("clip_score/tiny", fraction=0.34)]}})
    write_shard(tmp_path / "pool", [sample(300 + i, EMPTY, image=b"no image") for i in range(4)], EMPTY)
    yield scenario
    scenario.instance.dispose()


def test_every_score_of_a_shard_without_rows_is_an_empty_file(with_empty: Scenario) -> None:
    assert with_empty.run().failures == {}
    project, graph = with_empty.open_graph()
    partitioned = [node for node in graph.nodes if node.partitioned and not node.key.startswith("export/")]
    assert len(partitioned) == 11
    for node in partitioned:
        table = project.lake.read(node.key, EMPTY)
        assert (table.num_rows, table.schema.types) == (0, project.lake.read(node.key, SHARDS[0]).schema.types), (
            node.key
        )
    lineage = with_empty.subset("third").lineage
    assert lineage["shards_missing"] == {}
    assert set(lineage["shards"]) == {*SHARDS, EMPTY}
    assert with_empty.run().computed == {}
