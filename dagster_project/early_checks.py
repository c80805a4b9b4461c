"""Checks of everything that a YAML refers to, before a row is read: paths, models, captioners, features, uid lists.

Every asset is asked for the settings and files that its provenance records, so a new score needs no code here.
Not here: the checks of the YAML itself (`assets.settings`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from assets.base.context import Context, Snapshot
from assets.base.results import NotReady
from assets.graph import Graph
from assets.settings import ConfigError
from core.errors import UserError
from resources.lake.files import DamagedError
from selection.recipes.recipe import is_uid_list_asset, set_kind


def require_inputs(context: Context, graph: Graph) -> None:
    """Check everything that a YAML refers to.

    Raises:
        ConfigError: one message with a line for each problem, and the assets that it stops.
    """
    found = problems(context, graph)
    if found:
        lines = [f"{message}\n    needed by {_some(keys)}" for message, keys in found.items()]
        raise ConfigError(f"{context.config}: nothing was computed. Problems: {len(found)}\n  " + "\n  ".join(lines))


def problems(context: Context, graph: Graph) -> dict[str, list[str]]:
    """Return what is missing or wrong: the keys of the assets that need it, by message."""
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
    shard = None if found else next(iter(snapshot.listing), None)
    for node in graph.nodes:
        template = node.declared.template
        if template.parameters is not None:
            ask(node.key, partial(template.parameters, context, node.declared))
        if template.inputs is not None and (shard is not None or not node.partitioned):
            asked = shard if node.partitioned else None
            ask(node.key, partial(template.inputs, node, snapshot, asked))
    for subset in graph.subsets:
        for name in subset.model.sets:
            if set_kind(name) == "uids" and not is_uid_list_asset(name):
                ask(subset.key, partial(_uid_list, context, name))
    return found


def _uid_list(context: Context, name: str) -> None:
    path = context.config.resolve().parent / name
    if not path.is_file():
        raise ConfigError(f"{path}: no such uid list. Remedy: correct the path; it starts at the config's folder")


def _some(keys: list[str]) -> str:
    return ", ".join(keys) if len(keys) <= 4 else f"{', '.join(keys[:3])} and {len(keys) - 3} more"
