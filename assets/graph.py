"""The lineage graph of a project: every asset that its YAML asks for, in an order in which each follows its inputs."""

from dataclasses import dataclass

import dagster as dg

from assets.catalog import catalog
from assets.clip_score import clip_score
from assets.embeddings import embeddings
from assets.export import export
from assets.neg_clip_loss import neg_clip_loss
from assets.negatives import negatives
from assets.norm_sim import norm_sim
from assets.project import Project
from assets.raw_pool import raw_pool
from assets.sharded import ShardAsset
from assets.subset import SubsetAsset, subset
from assets.target_embeddings import target_embeddings
from assets.whole import WholeAsset

REFERENCE = "reference_negatives"


@dataclass(frozen=True)
class Graph:
    """All assets of a project.

    Attributes:
        nodes: assets of shards and unpartitioned ones, upstream first.
        subsets: the subsets, a recipe after the one it starts from.
        exports: the subsets' samples as new shards, which are made only when somebody asks.
        catalog: the catalog.
    """

    nodes: tuple[ShardAsset | WholeAsset, ...]
    subsets: tuple[SubsetAsset, ...]
    exports: tuple[ShardAsset, ...]
    catalog: dg.AssetsDefinition

    @property
    def definitions(self) -> list[dg.AssetsDefinition]:
        """The Dagster assets."""
        return [
            *(node.definition for node in self.nodes),
            *(node.definition for node in self.subsets),
            *(node.definition for node in self.exports),
            self.catalog,
        ]


def build_graph(project: Project) -> Graph:
    """Build every asset of a project."""
    settings = project.settings
    nodes: list[ShardAsset | WholeAsset] = [raw_pool(project)]
    for encoder in settings.encoders:
        nodes.append(embeddings(project, encoder))
    for encoder, targets in settings.norm_sim.items():
        nodes.extend(target_embeddings(project, encoder, target) for target in targets)
    for encoder, score in settings.neg_clip_loss.items():
        if score.estimator == REFERENCE:
            nodes.append(negatives(project, encoder))
    nodes.extend(clip_score(project, encoder) for encoder in settings.clip_score)
    nodes.extend(neg_clip_loss(project, encoder) for encoder in settings.neg_clip_loss)
    for encoder, targets in settings.norm_sim.items():
        nodes.extend(norm_sim(project, encoder, target) for target in targets)

    by_key = {node.key: node for node in nodes if isinstance(node, ShardAsset)}
    subsets = [subset(project, recipe, by_key) for recipe in _in_order(project)]
    with_images = settings.pool.format == "webdataset"
    exports = [export(project, recipe.recipe, by_key["raw_pool"]) for recipe in subsets] if with_images else []
    return Graph(tuple(nodes), tuple(subsets), tuple(exports), catalog(project))


def _in_order(project: Project) -> list[str]:
    """Name the recipes, each after the one it starts from (`check_recipes` has refused circles)."""
    recipes = project.settings.recipes
    ordered: list[str] = []

    def place(name: str) -> None:
        if name in ordered:
            return
        source = recipes[name].source
        if source in recipes:
            place(source)
        ordered.append(name)

    for name in recipes:
        place(name)
    return ordered
