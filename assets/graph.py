"""The lineage graph of a project: every asset that its YAML asks for, in an order in which each follows its inputs."""

from dataclasses import dataclass

import dagster as dg

from assets.base.partitioned import ShardAsset
from assets.base.selection_table import SharedSource
from assets.base.unpartitioned import WholeAsset
from assets.pool.embeddings import embeddings
from assets.pool.raw_pool import raw_pool
from assets.pool.target_embeddings import target_embeddings
from assets.project import Project
from assets.scores.caption_facts import captions
from assets.scores.captions import captioned
from assets.scores.clip_score import clip_score
from assets.scores.clusters import centroids, clusters
from assets.scores.external import external_files, external_scores, external_uids
from assets.scores.hype import hype
from assets.scores.near_duplicates import duplicate_search, near_duplicates
from assets.scores.neg_clip_loss import neg_clip_loss
from assets.scores.negatives import negatives
from assets.scores.norm_sim import norm_sim
from assets.scores.norm_sim_dynamic import dynamic_rounds, norm_sim_dynamic
from assets.scores.sieve import sieve
from assets.subsets.catalog import catalog
from assets.subsets.export import export
from assets.subsets.subset import SubsetAsset, subset
from resources.pools.formats import pool_format

REFERENCE = "reference_negatives"


@dataclass(frozen=True)
class Graph:
    """All assets of a project.

    Attributes:
        nodes: assets of shards and unpartitioned ones, upstream first.
        subsets: the subsets, a recipe after those it rests on.
        exports: the subsets' samples as new shards, which are made only when somebody asks.
        catalog: the catalog.
    """

    nodes: tuple[ShardAsset | WholeAsset, ...]
    subsets: tuple[SubsetAsset, ...]
    exports: tuple[ShardAsset, ...]
    catalog: dg.AssetsDefinition

    @property
    def in_order(self) -> list[ShardAsset | WholeAsset | SubsetAsset]:
        """Nodes and subsets, each after all that it reads: a score may begin with a subset."""
        by_key = {node.key: node for node in (*self.nodes, *self.subsets)}
        placed: dict[str, ShardAsset | WholeAsset | SubsetAsset] = {}

        def place(key: str) -> None:
            if key in by_key and key not in placed:
                for dep in by_key[key].deps:
                    place(dep)
                placed[key] = by_key[key]

        for key in by_key:
            place(key)
        return list(placed.values())

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
    nodes.extend(embeddings(project, encoder) for encoder in settings.encoders)
    targets = {pair: target_embeddings(project, *pair) for pair in settings.embedded_targets}
    draws = {
        encoder: negatives(project, encoder)
        for encoder, score in settings.neg_clip_loss.items()
        if score.estimator == REFERENCE
    }
    nodes.extend(targets.values())
    nodes.extend(draws.values())
    nodes.extend(clip_score(project, encoder) for encoder in settings.clip_score)
    nodes.extend(neg_clip_loss(project, encoder, draws.get(encoder)) for encoder in settings.neg_clip_loss)
    nodes.extend(norm_sim(project, e, t, targets[e, t]) for e, names in settings.norm_sim.items() for t in names)
    for encoder, settled in settings.scores.clusters.items():
        found = centroids(project, encoder)
        nodes.append(found)
        nodes.extend(clusters(project, encoder, t, found, targets[encoder, t]) for t in settled.targets)
    read = {name: external_files(project, name) for name in settings.external_scores}
    nodes.extend(read.values())
    nodes.extend(external_scores(project, *pair) for pair in read.items())
    nodes.extend(external_uids(project, name) for name in settings.external_uids)
    if settings.scores.captions is not None:
        nodes.append(captions(project))

    by_key = {node.key: node for node in nodes if isinstance(node, ShardAsset)}
    for name, given in settings.hype.items():
        score = hype(project, name, by_key.get(f"clusters/{given.clusters}"))
        nodes.append(score)
        by_key[score.key] = score
    shared = SharedSource()
    subsets = [subset(project, recipe, by_key, shared) for recipe in _in_order(project)]
    by_recipe = {node.recipe: node for node in subsets}
    for encoder, dynamic in settings.norm_sim_dynamic.items():
        rounds = dynamic_rounds(project, encoder, by_recipe[dynamic.recipe] if dynamic.recipe else None)
        score = norm_sim_dynamic(project, encoder, rounds)
        nodes += [rounds, score]
        by_key[score.key] = score  # which the subsets look up when they are asked what they read
    for captioner, described in settings.captioners.items():
        said = captioned(project, captioner, by_recipe[described.recipe] if described.recipe else None)
        scores = [sieve(project, name, said) for name in settings.sieve.get(captioner, ())]
        nodes += [said, *scores]
        by_key |= {node.key: node for node in (said, *scores)}
    for encoder, near in settings.near_duplicates.items():
        best = by_key[settings.score_columns[near.best][0]]
        search = duplicate_search(project, encoder, by_recipe[near.recipe] if near.recipe else None, best, by_key)
        score = near_duplicates(project, encoder, search)
        nodes += [search, score]
        by_key[score.key] = score
    with_tars = pool_format(settings.pool).has_tars
    exports = [export(project, recipe.recipe, by_key["raw_pool"]) for recipe in subsets] if with_tars else []
    return Graph(tuple(nodes), tuple(subsets), tuple(exports), catalog(project))


def _in_order(project: Project) -> list[str]:
    """Name the recipes, each after those it rests on (`check_recipes` has refused circles)."""
    recipes = project.settings.recipes
    ordered: list[str] = []

    def place(name: str) -> None:
        if name in ordered:
            return
        for other in recipes[name].recipes:
            place(other)
        ordered.append(name)

    for name in recipes:
        place(name)
    return ordered
