"""The terminal: progress bars, and the output of a pass and of `explain`.

Here: text for people. Not here: arguments (`cli`), and the work of a pass (`headless`).
"""

import atexit
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from assets.subsets.funnel import COLUMNS, funnel_rows

if TYPE_CHECKING:
    from assets.base.context import Context
    from assets.graph import Graph
    from dagster_project.headless import Outcome

NOTES = 20
"""Notes on shards that are printed at most."""


def run(project: "Context", console: Console, *, redraw: bool = False) -> int:
    """Bring a project up to date, with progress bars, and print the outcome.

    Args:
        project: the opened project.
        console: where to print.
        redraw: draw the negatives again.

    Returns:
        The exit status: 1 if an asset failed, else 0.

    Raises:
        ConfigError: something that the YAML refers to is missing; nothing was computed.
    """
    from assets.graph import build_graph
    from dagster_project.dead_runs import close_dead_runs
    from dagster_project.early_checks import require_inputs
    from dagster_project.headless import materialize
    from dagster_project.instance import only_pass, open_instance

    graph = build_graph(project)
    require_inputs(project, graph)
    with open_instance(project) as instance, only_pass(project):
        close_dead_runs(instance)
        with progress_bars(project, console) as bars:
            outcome = materialize(project, graph, instance, notice=bars, progress=bars.advance, redraw=redraw)
    print_outcome(project, graph, outcome, console)
    return 1 if outcome.failures else 0


def check(project: "Context", console: Console) -> int:
    """Check everything that a YAML refers to, compute nothing, and print that all is well.

    Raises:
        ConfigError: something is missing or wrong.
    """
    from assets.graph import build_graph
    from dagster_project.early_checks import require_inputs

    graph = build_graph(project)
    require_inputs(project, graph)
    text = f"{project.config}: no problems. Shards: {len(project.pool.list_shards())}; assets: {len(graph.in_order)}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def export(project: "Context", recipe: str, console: Console) -> int:
    """Write the tars of a subset's newest version, and print their folder.

    Args:
        project: the opened project.
        recipe: name of the recipe.
        console: where to print.

    Returns:
        The exit status: 1 if a shard failed, else 0.
    """
    from assets.graph import build_graph
    from dagster_project.dead_runs import close_dead_runs
    from dagster_project.headless import write_export
    from dagster_project.instance import only_pass, open_instance
    from dagster_project.queries import require
    from resources.lake.versions import Versions

    require("recipe", recipe, project.settings.recipes)
    with open_instance(project) as instance, only_pass(project):
        close_dead_runs(instance)
        graph = build_graph(project)
        with progress_bars(project, console) as bars:
            outcome = write_export(project, graph, instance, recipe, notice=bars, progress=bars.advance)
    print_failures(outcome, console)
    if not outcome.failures:
        version = Versions(project.lake, recipe).names()[-1]
        folder = f"{project.lake.root}/export/{recipe}/{version}"
        console.print(f"Exported: {folder}", soft_wrap=True, highlight=False, markup=False)
    return 1 if outcome.failures else 0


# Progress


@contextmanager
def progress_bars(project: "Context", console: Console) -> Iterator["Bars"]:
    """Show one progress bar for each asset that is computed within the block."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = Bars(project, progress)
        yield bars
        bars.finish()


class Bars:
    """One progress bar for each asset; call it when an asset starts.

    Args:
        project: the opened project.
        progress: where the bars are drawn.
    """

    def __init__(self, project: "Context", progress: Progress) -> None:
        self.project = project
        self.progress = progress
        self.asset = ""
        self.task: Any = None

    def __call__(self, asset: str, shards: int) -> None:
        """Start the bar of an asset; its length is the number of rows in the pool, as far as that is known."""
        self.finish()
        rows = 0
        if shards and asset != "raw_pool":
            rows = sum(
                stored.rows
                for shard in self.project.pool.list_shards()
                if (stored := self.project.lake.stored("raw_pool", shard)) is not None
            )
        text = f"{asset} ({shards} shards)" if shards else asset
        self.asset = asset
        self.task = self.progress.add_task(text, total=rows or None)

    def advance(self, asset: str, shard: str, rows: int) -> None:
        """Move the bar by some rows, if it is this asset's."""
        del shard
        if self.task is not None and asset == self.asset:
            self.progress.advance(self.task, rows)

    def finish(self) -> None:
        """Fill the bar: shards that were up to date and rows that were rejected never moved it."""
        if self.task is not None:
            done = self.progress.tasks[self.task].completed
            self.progress.update(self.task, total=done or 1, completed=done or 1)


# The outcome of a pass


def print_outcome(project: "Context", graph: "Graph", outcome: "Outcome", console: Console) -> None:
    """Print new shards, the pool's rejects, every recipe's funnel, and the failures."""
    from resources.lake.versions import Versions

    if outcome.added:
        console.print(f"New shards: {', '.join(outcome.added)}")
    if outcome.removed:
        console.print(f"Removed shards: {', '.join(outcome.removed)}")
    if not outcome.computed:
        console.print("Everything is up to date; nothing was computed.")
    _print_pool(project, console)
    for subset in graph.subsets:
        version = Versions(project.lake, subset.recipe).current()
        if version is None:
            continue
        lineage = version.lineage
        console.print(_funnel(f"{subset.key} {version.name}", lineage))
        if version.samples != lineage["rows"]:
            console.print(f"  {version.samples:,} samples of {lineage['rows']:,} rows", highlight=False)
        for shard, reason in lineage["shards_missing"].items():
            console.print(f"  without shard {shard}: {reason}", style="yellow", markup=False)
        if lineage["source"]["duplicates"]:
            console.print(
                f"  {lineage['source']['duplicates']:,} rows left out: an earlier row has their uid", style="yellow"
            )
        console.print(f"  {version.uids}", soft_wrap=True, highlight=False, markup=False)
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
    rows = rejected = 0
    reasons: dict[str, int] = {}
    notes: list[tuple[str, str]] = []
    for shard in project.lake.shards("raw_pool"):
        stored = project.lake.stored("raw_pool", shard)
        if stored is None:
            continue
        rows += stored.rows
        rejected += stored.summary["rejected"]
        notes += [(shard, note) for note in stored.summary.get("notes", "").splitlines()]
        for name, count in stored.summary.items():
            if name.startswith("rejected/"):
                reasons[name.removeprefix("rejected/")] = reasons.get(name.removeprefix("rejected/"), 0) + count
    listed = f" ({', '.join(f'{count} {reason}' for reason, count in sorted(reasons.items()))})" if reasons else ""
    console.print(
        f"Pool: {rows + rejected:,} samples seen = {rows:,} rows + {rejected:,} rejects{listed}", markup=False
    )
    for shard, note in notes[:NOTES]:
        console.print(f"  shard {shard}: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if len(notes) > NOTES:
        console.print(f"  and {len(notes) - NOTES:,} more notes, in the metadata of raw_pool", style="yellow")


# The other commands


def explain(catalog: Path, uid: str, console: Console, *, as_json: bool = False) -> int:
    """Print what every step of every recipe did with a sample.

    Args:
        catalog: path of catalog.duckdb.
        uid: of the sample; or the key of a rejected one.
        console: where to print.
        as_json: print the rows as JSON.

    Returns:
        The exit status: 1 if there is no such sample, else 0.

    Raises:
        FileNotFoundError: there is no catalog yet.
    """
    from dagster_project.queries import ask
    from dagster_project.tables import print_json

    rows = ask(catalog, "FROM explain($uid)", uid=uid)
    if any(row["verdict"] == "unknown uid" for row in rows):
        print_unknown_uid(uid)
        return 1
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
        ):
            if values := [row[column] for row in steps if row[column]]:
                console.print(f"  {label}: {values[-1]}", markup=False, highlight=False)
    return 0


def print_unknown_uid(uid: str) -> None:
    """Print to stderr that no sample has a uid, and whether it is a uid at all."""
    known = re.fullmatch(r"[0-9a-fA-F]{32}", uid, re.ASCII)
    why = "no sample in the pool has this uid" if known else "this is not a uid, which has 32 hexadecimal characters"
    text = f"{uid}: {why}; and no rejected sample has it as its key"
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def print_error(error: Exception) -> None:
    """Print an error that a user can fix to stderr, without a traceback."""
    console = Console(stderr=True)
    console.print(f"[red]{type(error).__name__}[/red]: ", end="")
    console.print(str(error), markup=False, highlight=False, soft_wrap=True)


def leave(status: int) -> NoReturn:
    """End the process after its exit handlers, but without the interpreter's teardown.

    In that teardown DuckDB 2.0 prints forty lines about "leaked" objects if torch is loaded too.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
