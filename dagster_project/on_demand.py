"""Assets that a pass leaves out, because they cost much: exports and evaluations.

Here: launching the run of one of them. Not here: the pass (`dagster_project.headless`).
"""

import dagster as dg

from assets.base.context import Context, Progress
from assets.base.keys import SHARDS_NAME
from assets.base.results import NotReady
from assets.graph import Graph
from dagster_project.headless import Notice, Pass, Stage
from dagster_project.interrupts import Interrupts
from dagster_project.outcome import Outcome
from resources.lake.files import LakeError


def write_export(
    context: Context,
    graph: Graph,
    instance: dg.DagsterInstance,
    recipe: str,
    *,
    notice: Notice,
    progress: Progress | None = None,
    interrupts: Interrupts | None = None,
) -> Outcome:
    """Write the tars of a subset's newest version, `export/<recipe>`, as far as they are missing or out of date.

    Args:
        context: the project.
        graph: its assets.
        instance: where runs are recorded.
        recipe: name of the recipe.
        notice: called at each stage.
        progress: called when rows are done.
        interrupts: signals that end it.

    Raises:
        LakeError: the pool has no tars; or the subset has no version, or was not selected from the pool as it is now.
        KeyboardInterrupt: it was interrupted.
    """
    return _OnDemand(context, graph, instance, notice, progress, redraw=False, interrupts=interrupts).export(recipe)


def evaluate(
    context: Context,
    graph: Graph,
    instance: dg.DagsterInstance,
    name: str,
    *,
    notice: Notice,
    progress: Progress | None = None,
    interrupts: Interrupts | None = None,
) -> Outcome:
    """Compute `evaluation/<name>`, unless it is up to date; what an interrupted run of it has trained is kept.

    Args:
        context: the project.
        graph: its assets.
        instance: where runs are recorded.
        name: name of the evaluation.
        notice: called at each stage.
        progress: called when rows are done.
        interrupts: signals that end it.

    Raises:
        LakeError: a subset that it compares has no version, or is out of date.
        KeyboardInterrupt: it was interrupted.
    """
    return _OnDemand(context, graph, instance, notice, progress, redraw=False, interrupts=interrupts).evaluate(name)


class _OnDemand(Pass):
    """A pass of a single asset that is asked for by name."""

    def export(self, recipe: str) -> Outcome:
        node = next((node for node in self.graph.exports if node.declared.names["recipe"] == recipe), None)
        if node is None:
            raise LakeError(f"export/{recipe}: only pools of tars can be exported. Remedy: read subset.npy instead")
        subset = next(subset for subset in self.graph.subsets if subset.recipe == recipe)
        if not subset.is_fresh(self._now()):
            raise LakeError(f"{subset.key} has no version, or is out of date. Remedy: clip-select run")
        self.stage = Stage(node.key)
        known = self.instance.get_dynamic_partitions(SHARDS_NAME)
        unknown = sorted(self.snapshot.listing.keys() - set(known))  # as on another machine's Dagster instance
        if unknown:
            self.instance.add_dynamic_partitions(SHARDS_NAME, unknown)
        self._compute_shards(node, [*known, *unknown])
        self._end()
        return self.outcome

    def evaluate(self, name: str) -> Outcome:
        node = next(node for node in self.graph.evaluations if node.declared.names["name"] == name)
        try:
            node.provenance(self._now())
        except NotReady as error:
            raise LakeError(f"{node.key}: {error}. Or all at once: clip-select run") from error
        self.stage = Stage(node.key)
        if not node.is_fresh(self._now()):
            self._begin()
            self._launch(node.key, None)
        self._end()
        return self.outcome
