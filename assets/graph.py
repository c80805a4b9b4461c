"""The asset graph of a project: every asset that its YAML asks for, upstream first.

```mermaid
graph LR
  raw_pool --> embeddings["embeddings/&lt;encoder&gt;"]
  embeddings --> negatives["negatives/&lt;encoder&gt;"]
  embeddings --> scores["scores, such as<br>clip_score, neg_clip_loss, norm_sim"]
  negatives --> scores
  targets["target_embeddings/&lt;encoder&gt;/&lt;target&gt;"] --> scores
  external["external_files, external_uids"] --> scores
  scores --> subset["subset/&lt;recipe&gt;"]
  raw_pool --> subset
  subset --> export["export/&lt;recipe&gt;"]
  subset --> catalog
  subset --> evaluation["evaluation/&lt;name&gt;"]
```

Some scores compare the rows of a subset with each other, and an encoder may embed only a subset's rows, so a subset may
also be upstream of a score or of embeddings.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg

from assets.base.asset import Declared
from assets.base.context import Context
from assets.base.partitioned import PartitionedAsset, PartitionedTemplate
from assets.base.score_kind import Scores
from assets.base.selection_table import CachedTable
from assets.base.unpartitioned import UnpartitionedAsset, UnpartitionedTemplate
from assets.evaluations.evaluation import evaluation
from assets.pool.embeddings import embeddings
from assets.pool.raw_pool import raw_pool
from assets.scores.external_uids import external_uids
from assets.subsets.catalog import catalog
from assets.subsets.export import export
from assets.subsets.subset import SubsetAsset, subset
from core.ordering import dependencies_first
from resources.pools.formats import pool_format

Node = PartitionedAsset | UnpartitionedAsset
Template = PartitionedTemplate | UnpartitionedTemplate


@dataclass(frozen=True)
class Graph:
    """All assets of a project.

    Attributes:
        nodes: assets of files, partitioned by shard or unpartitioned, upstream first.
        subsets: the subsets, a recipe after those it reads.
        exports: the subsets' samples as new shards, which are written on demand only.
        evaluations: comparisons of subsets by trained models, which are computed on demand only.
        catalog: the catalog.
    """

    nodes: tuple[Node, ...]
    subsets: tuple[SubsetAsset, ...]
    exports: tuple[PartitionedAsset, ...]
    evaluations: tuple[UnpartitionedAsset, ...]
    catalog: dg.AssetsDefinition

    @property
    def in_order(self) -> list[Node | SubsetAsset]:
        """Nodes and subsets, each after everything that it reads."""
        by_key: dict[str, Node | SubsetAsset] = {node.key: node for node in (*self.nodes, *self.subsets)}
        return [by_key[key] for key in _upstream_first(by_key)]

    def by_key(self, key: str) -> Any:
        """Return the node or subset of a key."""
        return next(node for node in (*self.nodes, *self.subsets) if node.key == key)

    def needed_by(self, recipes: Iterable[str]) -> set[str]:
        """List the keys of some recipes' subsets and of everything that they are computed from."""
        by_key = {node.key: node for node in self.in_order}
        found: set[str] = set()
        waiting = [f"subset/{recipe}" for recipe in recipes]
        while waiting:
            key = waiting.pop()
            if key not in found:
                found.add(key)
                waiting.extend(by_key[key].deps)
        return found

    @property
    def definitions(self) -> list[dg.AssetsDefinition]:
        """The Dagster assets."""
        assets = (*self.nodes, *self.subsets, *self.exports, *self.evaluations)
        return [*(asset.definition for asset in assets), self.catalog]


def build_graph(context: Context) -> Graph:
    """Build every asset of a project."""
    settings, scores = context.settings, Scores(context.settings)
    assets: dict[str, Any] = {}  # which every asset looks its upstream assets up in
    for declared in _declared(context, scores):
        template = declared.template
        assert isinstance(template, PartitionedTemplate | UnpartitionedTemplate)
        assets[declared.key] = template.build(declared, context, assets)
    keys = set(assets)
    cached = CachedTable()
    subsets = [subset(context, recipe, scores, assets, cached) for recipe in _recipes_in_order(context)]
    assets |= {node.key: node for node in subsets}
    exports: list[PartitionedAsset] = []
    if pool_format(settings.pool).has_tars:
        exports = [export.build(export.declare(settings, recipe=node.recipe), context, assets) for node in subsets]
    nodes = [assets[key] for key in _upstream_first(assets) if key in keys]
    evaluations = [
        evaluation.build(evaluation.declare(settings, name=name), context, assets) for name in settings.evaluations
    ]
    return Graph(tuple(nodes), tuple(subsets), tuple(exports), tuple(evaluations), catalog(context, scores, assets))


def _declared(context: Context, scores: Scores) -> Iterator[Declared]:
    """Yield every asset of files that the settings ask for, each once."""
    settings = context.settings
    seen = set()
    found: list[Declared] = [raw_pool.declare(settings)]
    found += [embeddings.declare(settings, encoder=encoder) for encoder in settings.encoders]
    for kind in settings.kinds:
        found += kind.upstream(settings)
    found += scores.assets.values()
    found += [external_uids.declare(settings, name=name) for name in settings.external_uids]
    for declared in found:
        if declared.key not in seen:
            seen.add(declared.key)
            yield declared


def _recipes_in_order(context: Context) -> Iterable[str]:
    """List the recipes, each after those it reads (`check_recipes` has refused cycles)."""
    recipes = context.settings.recipes
    return dependencies_first(recipes, lambda name: recipes[name].recipes)


def _upstream_first(assets: Mapping[str, Any]) -> list[str]:
    """List keys, each after the deps that are among them."""
    return dependencies_first(assets, lambda key: [dep for dep in assets[key].deps if dep in assets])
