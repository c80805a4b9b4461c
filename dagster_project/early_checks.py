"""Checks of everything that a YAML refers to, before a row is read: paths, models, captioners, features, uid lists.

Every asset is asked for the settings and files that its provenance records, so a new score needs no code here.
Not here: the checks of the YAML itself (`assets.settings`).
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from assets.base.context import Context, Snapshot
from assets.base.results import NotReady
from assets.graph import Graph, Node
from assets.settings import ConfigError
from core.errors import UserError
from resources.lake.files import DamagedError
from selection.recipes.recipe import is_uid_list_asset, set_kind


def require_inputs(context: Context, graph: Graph, only: Collection[str] | None = None) -> None:
    """Check everything that a YAML refers to.

    Args:
        context: the project.
        graph: its assets.
        only: keys of the assets whose needs are checked; by default all.

    Raises:
        ConfigError: one message with a line for each problem, and the assets that it stops.
    """
    found = problems(context, graph, only)
    if found:
        lines = [f"{message}\n    needed by {_some(keys)}" for message, keys in found.items()]
        lines.append(_remedy(context, graph, {key for keys in found.values() for key in keys}))
        raise ConfigError(
            f"{context.config}: nothing was computed. Problems: {len(found)}\n  " + "\n  ".join(filter(None, lines))
        )


def _remedy(context: Context, graph: Graph, stopped: set[str]) -> str:
    """Return how to compute the recipes that do without the assets with a problem; empty where there are none."""
    recipes = [subset.recipe for subset in graph.subsets if not graph.needed_by([subset.recipe]) & stopped]
    if not recipes:
        return ""
    only = " ".join(f"--only {recipe}" for recipe in recipes)
    return (
        f"Recipes that need none of this: {_some(recipes)}. To compute those: clip-select run {context.config} {only}"
    )


def problems(context: Context, graph: Graph, only: Collection[str] | None = None) -> dict[str, list[str]]:
    """Return what is missing or wrong: the keys of the assets that need it, by message.

    Args:
        context: the project.
        graph: its assets.
        only: keys of the assets whose needs are checked; by default all.
    """
    snapshot = Snapshot(context)
    found: dict[str, list[str]] = {}

    def ask(key: str, question: Callable[[], Any]) -> None:
        try:
            question()
        except NotReady as waiting:
            if isinstance(waiting.__cause__, UserError):  # else it waits for an input that a run computes first
                note(key, waiting.__cause__)
        except DamagedError:
            pass  # a pass sets the file aside and computes it again
        except (UserError, OSError) as error:
            note(key, error)

    def note(key: str, error: BaseException) -> None:
        keys = found.setdefault(str(error), [])
        if key not in keys:
            keys.append(key)

    ask("raw_pool", lambda: snapshot.listing)
    shards = [] if found else list(snapshot.listing)
    demanded = [node for node in graph.evaluations if only is not None and node.key in only]  # a pass skips the others
    for node in (*graph.nodes, *demanded):
        if only is not None and node.key not in only:
            continue
        template = node.declared.template
        if template.parameters is not None:
            ask(node.key, partial(template.parameters, context, node.declared))
        if template.inputs is not None:
            ask(node.key, partial(_any_input, node, snapshot, shards if node.partitioned else [None]))
    for subset in graph.subsets:
        for name in subset.model.sets if only is None or subset.key in only else ():
            if set_kind(name) == "uids" and not is_uid_list_asset(name):
                ask(subset.key, partial(_uid_list, context, name))
    return found


def _any_input(node: Node, snapshot: Snapshot, shards: Sequence[str | None]) -> None:
    """Ask for the input files of shards until one has them: what only some shards lack does not stop the others.

    Raises:
        Exception: that of the first shard, if none has them.
    """
    inputs, first = node.declared.template.inputs, None
    assert inputs is not None
    for shard in shards:
        try:
            inputs(node, snapshot, shard)
            return
        except (NotReady, UserError, OSError) as error:
            first = first or error
    if first is not None:
        raise first


def _uid_list(context: Context, name: str) -> None:
    path = context.config.resolve().parent / name
    if not path.is_file():
        raise ConfigError(f"{path}: no such uid list. Remedy: correct the path; it starts at the config's folder")


def _some(keys: list[str]) -> str:
    return ", ".join(keys) if len(keys) <= 4 else f"{', '.join(keys[:3])} and {len(keys) - 3} more"
