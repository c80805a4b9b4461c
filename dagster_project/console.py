"""The terminal: the output of a pass and of `explain`.

Here: text for people. Not here: arguments (`cli`), the work of a pass (`headless`), progress (`progress`).
"""

import atexit
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from assets.subsets.funnel import COLUMNS, funnel_rows
from core.errors import UserError
from core.links import sample_link
from dagster_project.outcome import document, failures, pool_counts, subset_warnings
from dagster_project.tables import print_json

if TYPE_CHECKING:
    from assets.base.context import Context
    from assets.graph import Graph
    from dagster_project.headless import Outcome
    from dagster_project.interrupts import Interrupts

NOTES = 20
"""Notes on shards that are printed at most."""


def run(
    project: "Context",
    console: Console,
    *,
    redraw: bool = False,
    only: Collection[str] = (),
    as_json: bool = False,
    interrupts: "Interrupts | None" = None,
    engine: str | None = None,
    workers: int | None = None,
) -> int:
    """Bring a project up to date, with progress on stderr, and print the outcome.

    Args:
        project: the opened project.
        console: where to print.
        redraw: draw the negatives again.
        only: names of the recipes; compute only what they need. By default all recipes and scores.
        as_json: print one JSON document.
        interrupts: the signals that end the pass.
        engine: where shards are computed; by default as the environment says.
        workers: number of the engine's workers.

    Returns:
        The exit status: 1 if an asset failed, else 0.

    Raises:
        ConfigError: something that the YAML refers to is missing; nothing was computed.
        QueryError: there is no such recipe.
    """
    from dagster_project.dead_runs import close_dead_runs
    from dagster_project.early_checks import require_inputs
    from dagster_project.engines.choice import opened_engine
    from dagster_project.headless import materialize
    from dagster_project.instance import only_pass, open_instance
    from dagster_project.progress import shown_progress

    began = time.monotonic()
    graph, needed = _graph(project, only)
    require_inputs(project, graph, needed)
    with open_instance(project) as instance, only_pass(project), opened_engine(engine, workers) as opened:
        close_dead_runs(instance)
        with shown_progress() as shown:
            outcome = materialize(
                project,
                graph,
                instance,
                notice=shown.notice,
                progress=shown.advance,
                redraw=redraw,
                only=needed,
                interrupts=interrupts,
                engine=opened,
            )
    if as_json:
        print_json(document(project, graph, outcome, time.monotonic() - began, needed), console)
    else:
        print_outcome(project, graph, outcome, console, needed)
    return 1 if outcome.failures else 0


def _graph(project: "Context", only: Collection[str]) -> "tuple[Graph, set[str] | None]":
    """Return a project's assets, and the keys of those that some recipes need; None where all are wanted.

    Raises:
        QueryError: there is no such recipe.
    """
    from assets.graph import build_graph
    from dagster_project.queries import require

    for recipe in only:
        require("recipe", recipe, project.settings.recipes)
    graph = build_graph(project)
    return graph, graph.needed_by(only) if only else None


def check(project: "Context", console: Console, *, only: Collection[str] = (), as_json: bool = False) -> int:
    """Check everything that a YAML refers to, compute nothing, and print that all is well.

    Args:
        project: the opened project.
        console: where to print.
        only: names of the recipes; check only what they need.
        as_json: print JSON.

    Raises:
        ConfigError: something is missing or wrong.
        QueryError: there is no such recipe.
    """
    from dagster_project.early_checks import require_inputs

    graph, needed = _graph(project, only)
    everything = {asset.key for asset in (*graph.in_order, *graph.evaluations)}
    require_inputs(project, graph, everything if needed is None else needed)
    assets, shards = len(graph.in_order if needed is None else needed), len(project.pool.list_shards())
    if as_json:
        config = str(project.config)
        print_json({"exit_status": 0, "error": None, "config": config, "shards": shards, "assets": assets}, console)
        return 0
    text = f"{project.config}: no problems. Shards: {shards}; assets: {assets}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def export(
    project: "Context",
    recipe: str,
    console: Console,
    *,
    as_json: bool = False,
    interrupts: "Interrupts | None" = None,
) -> int:
    """Write the tars of a subset's newest version, and print their folder.

    Args:
        project: the opened project.
        recipe: name of the recipe.
        console: where to print.
        as_json: print one JSON document.
        interrupts: the signals that end it.

    Returns:
        The exit status: 1 if a shard failed, else 0.
    """
    from assets.graph import build_graph
    from dagster_project.on_demand import write_export
    from dagster_project.queries import require
    from resources.lake.versions import Versions

    require("recipe", recipe, project.settings.recipes)
    outcome = _alone(project, build_graph(project), write_export, recipe, interrupts)
    status = 1 if outcome.failures else 0
    version = None if status else Versions(project.lake, recipe).newest()
    folder = f"{project.lake.root}/export/{recipe}/{version}" if version else None
    if as_json:
        found = {"recipe": recipe, "version": version, "folder": folder, **failures(outcome)}
        print_json({"exit_status": status, "error": None, **found}, console)
        return status
    print_failures(outcome, console)
    if folder:
        console.print(f"Exported: {folder}", soft_wrap=True, highlight=False, markup=False)
    return status


def evaluate(
    project: "Context",
    name: str,
    console: Console,
    *,
    as_json: bool = False,
    interrupts: "Interrupts | None" = None,
) -> int:
    """Compute an evaluation, and print what it shows and the path of its page.

    Args:
        project: the opened project.
        name: name of the evaluation.
        console: where to print.
        as_json: print one JSON document.
        interrupts: the signals that end it.

    Returns:
        The exit status: 1 if it failed, else 0.
    """
    from assets.graph import build_graph
    from dagster_project.early_checks import require_inputs
    from dagster_project.on_demand import evaluate as compute
    from dagster_project.queries import require

    require("evaluation", name, project.settings.evaluations)
    graph, key = build_graph(project), f"evaluation/{name}"
    require_inputs(project, graph, [key])
    outcome = _alone(project, graph, compute, name, interrupts)
    status = 1 if outcome.failures else 0
    stored = None if status else project.lake.stored(key)
    summary = stored.summary if stored is not None else {}
    if as_json:
        print_json({"exit_status": status, "error": None, "evaluation": name, **summary, **failures(outcome)}, console)
        return status
    print_failures(outcome, console)
    if summary:
        lines = [summary["table"], "", summary["shows"], *summary.get("how_much", []), summary["does_not_show"]]
        page = f"{project.lake.root}/{summary['report']}"
        console.print("\n".join([*lines, f"The page: {page}"]), soft_wrap=True, highlight=False, markup=False)
    return status


def _alone(
    project: "Context",
    graph: "Graph",
    compute: "Callable[..., Outcome]",
    name: str,
    interrupts: "Interrupts | None",
) -> "Outcome":
    """Compute one asset by name, as `on_demand` does, with a progress bar, while no other pass works on the lake."""
    from dagster_project.dead_runs import close_dead_runs
    from dagster_project.instance import only_pass, open_instance
    from dagster_project.progress import shown_progress

    with open_instance(project) as instance, only_pass(project):
        close_dead_runs(instance)
        with shown_progress() as shown:
            return compute(
                project, graph, instance, name, notice=shown.notice, progress=shown.advance, interrupts=interrupts
            )


# The outcome of a pass


def print_outcome(
    project: "Context",
    graph: "Graph",
    outcome: "Outcome",
    console: Console,
    only: Collection[str] | None = None,
) -> None:
    """Print new shards, the pool's rejects, the funnels of subsets, checks that warn, and the failures.

    Args:
        project: the opened project.
        graph: its assets.
        outcome: of the pass.
        console: where to print.
        only: keys of the assets of the pass; by default all.
    """
    from resources.lake.versions import Versions

    if outcome.added:
        console.print(f"New shards: {', '.join(outcome.added)}")
    if outcome.removed:
        console.print(f"Removed shards: {', '.join(outcome.removed)}")
    for path, why in outcome.damaged.items():
        again = Path(path).exists() or Path(path).match("subset/*/v*/*")  # a version is written under a new number
        state = "computed again" if again else "set aside"
        console.print(f"Damaged, and {state}: {path}: {why}", style="yellow", markup=False, soft_wrap=True)
    if not outcome.computed:
        console.print("Everything is up to date; nothing was computed.")
    _print_pool(project, console)
    for subset in graph.subsets:
        if only is not None and subset.key not in only:
            continue
        version = Versions(project.lake, subset.recipe).current()
        if version is None:
            continue
        lineage = version.lineage
        console.print(_funnel(f"{subset.key} {version.name}", lineage))
        if version.samples != lineage["rows"]:
            console.print(f"  {version.samples:,} samples of {lineage['rows']:,} rows", highlight=False)
        for warning in subset_warnings(lineage):
            console.print(f"  {warning}", style="yellow", markup=False)
        if not subset.has_report(project.lake):
            console.print("  its report could not be written; the next run tries again", style="yellow")
        console.print(f"  {version.uids}", soft_wrap=True, highlight=False, markup=False)
    _print_checks(project, graph, console, only)
    print_failures(outcome, console)
    if not outcome.failures:
        console.print(f"Catalog: {project.catalog_path()}", soft_wrap=True, highlight=False, markup=False)


def print_failures(outcome: "Outcome", console: Console) -> None:
    """Print the message of each asset that failed."""
    for key, message in outcome.failures.items():
        console.print(f"FAILED {key}", style="bold red")
        console.print(message, markup=False, highlight=False, soft_wrap=True)
    for key, needed in outcome.not_attempted.items():
        console.print(f"{key} not attempted: needs {needed}", style="yellow", markup=False, highlight=False)


def _funnel(title: str, lineage: dict[str, Any]) -> Table:
    """Return a table of a version's steps."""
    table = Table(*COLUMNS, title=title, title_justify="left")
    for step, *numbers in funnel_rows(lineage, ".5f"):
        table.add_row(Text(step), *numbers)  # a Text, because rich would read brackets in a predicate as markup
    return table


def _print_pool(project: "Context", console: Console) -> None:
    """Print the pool's rows, its rejects by reason, and notes on its shards."""
    pool = pool_counts(project)
    listed = ", ".join(f"{count} {reason}" for reason, count in pool.rejects.items())
    console.print(
        f"Pool: {pool.samples:,} samples seen = {pool.rows:,} rows + {pool.rejected:,} rejects"
        f"{f' ({listed})' if listed else ''}",
        markup=False,
    )
    for note in pool.notes[:NOTES]:
        console.print(f"  {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if len(pool.notes) > NOTES:
        console.print(f"  and {len(pool.notes) - NOTES:,} more notes, in the metadata of raw_pool", style="yellow")


def _print_checks(project: "Context", graph: "Graph", console: Console, only: Collection[str] | None) -> None:
    """Print the checks that warn or had nothing to compare, whichever run they ran in, and the drift of negatives."""
    from assets.base.upstream_checks import FAILED, verdicts, warning_text, warnings_of

    assets = {node.key: node for node in graph.in_order if only is None or node.key in only}
    found = warnings_of(project.lake, assets, assets, project.lake.shards("raw_pool"))
    for title, entries, style in (
        ("Warnings", [entry for entry in found if entry["result"] == FAILED], "yellow"),
        ("Not compared", [entry for entry in found if entry["result"] != FAILED], "dim"),
    ):
        if entries:
            console.print(f"{title}:", style=style)
        for entry in entries:
            text = f"  {warning_text(entry)}"
            console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
    for asset, finding in verdicts(project.lake, assets, assets).items():
        if finding["passed"]:
            text = f"Drift of {asset}: {finding['figures']['verdict']}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)


# The other commands


class UnknownUidError(UserError):
    """No sample has a uid, and no rejected sample has it as its key."""

    exit_status = 1

    def __init__(self, uid: str) -> None:
        known = re.fullmatch(r"[0-9a-fA-F]{32}", uid, re.ASCII)
        why = (
            "no sample in the pool has this uid" if known else "this is not a uid, which has 32 hexadecimal characters"
        )
        super().__init__(f"{uid}: {why}; and no rejected sample has it as its key")


def explain(catalog: Path, uid: str, console: Console, *, as_json: bool = False) -> int:
    """Print what every step of every recipe did with a sample.

    Args:
        catalog: path of catalog.duckdb.
        uid: of the sample; or the key of a rejected one.
        console: where to print.
        as_json: print the rows as JSON.

    Returns:
        The exit status, 0.

    Raises:
        FileNotFoundError: there is no catalog yet.
        UnknownUidError: there is no such sample.
    """
    from dagster_project.queries import ask

    rows = ask(catalog, "FROM explain($uid)", uid=uid)
    if any(row["verdict"] == "unknown uid" for row in rows):
        raise UnknownUidError(uid)
    if as_json:
        print_json(rows, console)
        return 0
    for (recipe, version), group in groupby(rows, key=lambda row: (row["recipe"], row["version"])):
        steps = list(group)
        if recipe is None:
            console.print(*(row["text"] for row in steps), markup=False)
            continue
        table = Table(
            "step", "value", "threshold", "rank", "verdict", title=f"{recipe} {version}", title_justify="left"
        )
        for row in steps:
            numbers = ("" if row[name] is None else f"{row[name]:.5f}" for name in ("value", "threshold"))
            rank = "" if row["rank"] is None else f"{row['rank']:,}"
            table.add_row(Text(row["text"]), *numbers, rank, row["verdict"])
        console.print(table)
        for column, label in (
            ("nearest_name", "nearest target"),
            ("best_caption", "best generated caption"),
            ("in_favour_of", "dropped in favour of"),
            ("copies", "copies in the subset"),
            ("concepts", "concepts"),
        ):
            if values := [row[column] for row in steps if row[column]]:
                console.print(f"  {label}: {values[-1]}", markup=False, highlight=False)
    if any(row["recipe"] is not None or row["verdict"] == "no subset" for row in rows):
        console.print(f"Browse: {sample_link(uid.lower())}", markup=False, highlight=False, soft_wrap=True)
    return 0


@contextmanager
def json_document() -> Iterator[Console]:
    """Yield a console for one JSON document, which is all of stdout."""
    from dagster_project.progress import only_document

    with only_document() as file:
        yield Console(file=file)


def print_error(error: Exception) -> None:
    """Print the message of an error that a user can fix to stderr, without a traceback."""
    Console(stderr=True).print(Text(str(error), style="red"), highlight=False, soft_wrap=True)


def print_json_error(kind: str, message: str, status: int) -> None:
    """Print the JSON document of a command that failed to stdout.

    Args:
        kind: name of the error's class.
        message: its message.
        status: the exit status.
    """
    print_json({"exit_status": status, "error": {"type": kind, "message": message}}, Console())


def leave(status: int) -> NoReturn:
    """End the process after its exit handlers, but without the interpreter's teardown.

    In that teardown DuckDB 2.0 prints forty lines about "leaked" objects if torch is loaded too.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
