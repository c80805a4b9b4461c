"""`clip-select`: the project from a terminal. `run` makes everything, `ui` opens Dagster, `explain` asks why.

What a pass does is in `headless`; here are only arguments, the instance's folder and what is printed.
"""

import argparse
import atexit
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NoReturn

import dagster as dg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from assets.base.context import Context
from assets.graph import Graph, build_graph
from assets.settings import ConfigError, open_project
from assets.study.figures import ROWS, StudyError, study
from assets.study.page import write_page
from assets.subsets.catalog import write_catalog
from assets.subsets.reproduction import rebuild
from dagster_project.dead_runs import close_dead_runs
from dagster_project.definitions import CONFIG_VARIABLE, DEMO_CONFIG
from dagster_project.headless import Outcome, materialize
from resources.catalog.build import read_catalog
from resources.inputs.targets import TargetError
from resources.lake.files import LakeError
from resources.lake.versions import Versions
from resources.models.encoders import EncoderError
from resources.pools.base import PoolError

NOTES = 20
EXPECTED_ERRORS = (ConfigError, PoolError, EncoderError, TargetError, LakeError, StudyError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give the exit status."""
    parser = argparse.ArgumentParser(prog="clip-select", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "discover shards, make what is missing or out of date, select, print the funnel"),
        ("ui", "open Dagster on the project"),
        ("explain", "say what every recipe did with a sample"),
        ("reproduce", "make a subset's version again from its lineage record alone, and compare"),
        ("prune", "delete old versions of subsets for good"),
        ("study", "compare all scores and selections on a page, and with a truth which score finds which fault"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", type=Path, nargs="?", default=DEMO_CONFIG, help="the project's YAML")
        if name == "run":
            command.add_argument("--redraw-negatives", action="store_true", help="draw the negatives again")
        elif name == "ui":
            command.add_argument("--port", type=int, default=3000)
        elif name == "reproduce":
            command.add_argument("--recipe", required=True)
            command.add_argument("--version", required=True, help="v0001, ...")
            command.add_argument("--into", type=Path, required=True, help="an empty folder")
        elif name == "prune":
            command.add_argument("--keep", type=_at_least_one, required=True, help="newest versions of each to keep")
            command.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
        elif name == "study":
            command.add_argument("--truth", type=Path, help="parquet of uid and kind: clean, or the name of a fault")
            command.add_argument("--into", type=Path, required=True, help="folder of the page, index.html")
            command.add_argument("--rows", type=_at_least_one, default=ROWS, help=f"rows studied at most, else {ROWS}")
        else:
            command.add_argument("--uid", required=True, help="32 hexadecimal characters")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        project = open_project(options.config)
        if options.command == "run":
            return run(project, console, redraw=options.redraw_negatives)
        if options.command == "explain":
            return explain(project, options.uid, console)
        if options.command == "reproduce":
            version = Versions(project.lake, options.recipe).read(options.version)
            console.print(f"The same bytes: {rebuild(version.lineage, options.into)}", markup=False, soft_wrap=True)
            return 0
        if options.command == "prune":
            return prune(project, options.keep, console, dry_run=options.dry_run)
        if options.command == "study":
            page = write_page(study(project, options.truth, rows=options.rows), options.into)
            console.print(f"The page: {page}", markup=False, soft_wrap=True)
            return 0
        return ui(project, options.port)
    except EXPECTED_ERRORS as error:
        Console(stderr=True).print(f"[red]{type(error).__name__}[/red]: ", end="")
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 2


def run(project: Context, console: Console, *, redraw: bool = False) -> int:
    """Bring a project up to date and print what came of it; 1 if anything failed."""
    with open_instance(project) as instance, _only_pass(project):
        close_dead_runs(instance)
        graph = build_graph(project)
        with _progress(project, console) as bars:
            outcome = materialize(project, graph, instance, notice=bars, progress=bars.advance, redraw=redraw)
    print_outcome(project, graph, outcome, console)
    return 1 if outcome.failures else 0


def ui(project: Context, port: int) -> int:
    """Open Dagster on 127.0.0.1 in the place of this process."""
    home = prepare_home(project)
    with open_instance(project) as instance:
        close_dead_runs(instance)
    environment = {
        **os.environ,
        "DAGSTER_HOME": str(home),
        "DAGSTER_DISABLE_TELEMETRY": "yes",  # `dagster dev` says its word on telemetry before it reads dagster.yaml
        CONFIG_VARIABLE: str(project.config.resolve()),
    }
    dagster = Path(sys.executable).parent / "dagster"
    arguments = ["-m", "dagster_project.definitions", "-h", "127.0.0.1", "-p", str(port)]
    os.execve(dagster, ["dagster", "dev", *arguments], environment)


def explain(project: Context, uid: str, console: Console) -> int:
    """Print what every recipe did with a sample."""
    with read_catalog(project.catalog_path()) as con:
        rows = con.sql("FROM explain($uid)", params={"uid": uid}).pl().to_dicts()
    for (recipe, version), steps in groupby(rows, key=lambda row: (row["recipe"], row["version"])):
        if recipe is None:
            console.print(*(row["text"] for row in steps), markup=False)
            continue
        table = Table(
            "step", "value", "threshold", "rank", "verdict", title=f"{recipe} {version}", title_justify="left"
        )
        nearest = said = instead = copies = None
        for row in steps:
            nearest = row["nearest_name"] or nearest
            said = row["best_caption"] or said
            instead = row["in_favour_of"] or instead
            copies = row["copies"] or copies
            numbers = ("" if row[name] is None else f"{row[name]:.5f}" for name in ("value", "threshold"))
            table.add_row(
                Text(row["text"]), *numbers, "" if row["rank"] is None else f"{row['rank']:,}", row["verdict"]
            )
        console.print(table)
        if nearest:
            console.print(f"  nearest target: {nearest}", markup=False, highlight=False)
        if said:
            console.print(f"  said of the image: {said}", markup=False, highlight=False)
        if instead:
            console.print(f"  dropped in favour of: {instead}", markup=False, highlight=False)
        if copies:
            console.print(f"  copies in the subset: {copies}", markup=False, highlight=False)
    return 0


def prune(project: Context, keep: int, console: Console, *, dry_run: bool = False) -> int:
    """Delete all but the newest versions of every recipe's subset, and let the catalog forget them."""
    with _only_pass(project):
        for recipe in project.settings.recipes:
            versions = Versions(project.lake, recipe)
            old = versions.names()[:-keep]
            console.print(f"subset/{recipe}: {'to be ' if dry_run else ''}deleted: {', '.join(old) or 'none'}")
            for name in () if dry_run else old:
                versions.remove(name)
        if not dry_run:
            write_catalog(project)
    return 0


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def prepare_home(project: Context) -> Path:
    """Give the folder of the Dagster instance: DAGSTER_HOME, else a folder in the lake.

    A project has an instance of its own, because shard names are partitions and every pool has a `00000`.
    """
    given = os.environ.get("DAGSTER_HOME")
    home = Path(given).resolve() if given else project.lake.local_root() / ".dagster"
    if set("%?") & set(str(home)):
        raise LakeError(
            f"{home}: SQLite can't open a folder with % or ? in its path. Remedy: set DAGSTER_HOME elsewhere"
        )
    home.mkdir(parents=True, exist_ok=True)
    if not os.access(home, os.W_OK):
        raise LakeError(f"{home}: this folder can't be written to. Remedy: set DAGSTER_HOME to one that can")
    if given:
        _refuse_another_lake(home / "lake.txt", project)
    if not (home / "dagster.yaml").exists():
        shutil.copy(Path(__file__).with_name("dagster.yaml"), home / "dagster.yaml")
    return home


def _refuse_another_lake(owner: Path, project: Context) -> None:
    """Two projects in one instance would take each other's partitions for shards that have gone."""
    if not owner.exists():
        owner.write_text(project.settings.lake, encoding="utf-8")
    lake = owner.read_text(encoding="utf-8")
    if lake != project.settings.lake:
        raise LakeError(
            f"{owner.parent}: this Dagster instance belongs to the lake {lake}. Remedy: another DAGSTER_HOME for "
            f"{project.settings.lake}; or, if the lake was moved, correct {owner}"
        )


@contextmanager
def open_instance(project: Context) -> Iterator[dg.DagsterInstance]:
    """Open the project's Dagster instance.

    Raises:
        LakeError: its folder or its dagster.yaml won't do, or its database does not answer.
    """
    home = prepare_home(project)
    try:
        opened = dg.DagsterInstance.from_config(str(home))
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).partition("Stack Trace:")[0].split()).rstrip(".")
        raise LakeError(
            f"{home / 'dagster.yaml'}: Dagster can't open its instance: {reason}. Remedy: correct the file or the "
            "environment variables that it names; start the database"
        ) from error
    with opened as instance:
        yield instance


@contextmanager
def _only_pass(project: Context) -> Iterator[None]:
    """Hold the project's lock: two passes at once would do the same work twice."""
    project.lake.local_root().mkdir(parents=True, exist_ok=True)
    with open(project.lake.local_root() / ".pass.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LakeError(
                f"{lock.name}: another `clip-select run` is at work on this lake. Remedy: wait for it to end"
            ) from error
        yield


@contextmanager
def _progress(project: Context, console: Console) -> Iterator["_Bars"]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = _Bars(project, progress)
        yield bars
        bars.finish()


class _Bars:
    """One progress bar an asset."""

    def __init__(self, project: Context, progress: Progress) -> None:
        self.project = project
        self.progress = progress
        self.asset = ""
        self.task: int | None = None

    def __call__(self, asset: str, shards: int) -> None:
        """Begin an asset's bar."""
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
        """Move the bar of the asset that is being made."""
        del shard
        if self.task is not None and asset == self.asset:
            self.progress.advance(self.task, rows)  # type: ignore[arg-type]

    def finish(self) -> None:
        """Fill the bar: an asset that is through has no rows left, whatever was skipped or rejected."""
        if self.task is not None:
            done = self.progress.tasks[self.task].completed
            self.progress.update(self.task, total=done or 1, completed=done or 1)  # type: ignore[arg-type]


def print_outcome(project: Context, graph: Graph, outcome: Outcome, console: Console) -> None:
    """Print what was computed, what failed, the pool's rejects and every recipe's funnel."""
    if outcome.added:
        console.print(f"New shards: {', '.join(outcome.added)}")
    if outcome.removed:
        console.print(f"Removed shards: {', '.join(outcome.removed)}")
    if not outcome.computed:
        console.print("Everything is there and up to date; nothing was computed.")
    _print_pool(project, console)
    for subset in graph.subsets:
        version = Versions(project.lake, subset.recipe).current()
        if version is None:
            continue
        lineage = version.lineage
        table = Table(
            "step",
            "entered",
            "kept",
            "of source",
            "threshold",
            title=f"{subset.key} {version.name}",
            title_justify="left",
        )
        for step in lineage["steps"]:
            threshold = "" if step["threshold"] is None else f"{step['threshold']:.5f}"
            share = f"{step['kept'] / lineage['source']['rows']:.1%}"
            table.add_row(Text(step["text"]), f"{step['entered']:,}", f"{step['kept']:,}", share, threshold)
        console.print(table)
        if version.samples != lineage["rows"]:
            console.print(f"  {version.samples:,} samples of {lineage['rows']:,} rows", highlight=False)
        for shard, reason in lineage["shards_missing"].items():
            console.print(f"  without shard {shard}: {reason}", style="yellow", markup=False)
        if lineage["source"]["duplicates"]:
            console.print(f"  {lineage['source']['duplicates']:,} rows left out: their uid came before", style="yellow")
        console.print(f"  {version.uids}", soft_wrap=True, highlight=False, markup=False)
    for key, message in outcome.failures.items():
        console.print(f"FAILED {key}", style="bold red")
        console.print(message, markup=False, highlight=False, soft_wrap=True)
    if not outcome.failures:
        console.print(f"Catalog: {project.catalog_path()}", soft_wrap=True, highlight=False, markup=False)


def _print_pool(project: Context, console: Console) -> None:
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


def entry() -> NoReturn:
    """Run the command as a program."""
    leave(main())


def leave(status: int) -> NoReturn:
    """End the process in good order, but for the interpreter's own teardown.

    In that teardown DuckDB 2.0's bindings print forty lines about "leaked" objects once torch is loaded too.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    entry()
