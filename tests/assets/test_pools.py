"""Dagster's concurrency pools: every asset that computes carries the pool by which a deployment limits it."""

from pathlib import Path

from assets.graph import build_graph
from assets.settings import open_project

ROOT = Path(__file__).resolve().parents[2]


def test_assets_carry_their_pool() -> None:
    pools: dict[str, str | None] = {}
    computes: set[str] = set()
    for path in [*ROOT.glob("examples/*.yaml"), *ROOT.glob("config/*.yaml")]:
        graph = build_graph(open_project(path))
        for node in (*graph.nodes, *graph.exports):
            kind = node.key.partition("/")[0]
            pools[kind] = node.definition.op.pool
            if "pytorch" in node.declared.template.kinds:
                computes.add(kind)
    assert {kind: pools[kind] for kind in computes} == dict.fromkeys(computes, "gpu")
    assert {"embeddings", "target_embeddings", "neg_clip_loss", "norm_sim"} <= computes
    assert pools["negatives"] == "gpu"
    assert (pools["raw_pool"], pools["export"]) == ("cpu", "cpu")
