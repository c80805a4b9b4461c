"""`clip-select`: the project from a terminal.

Here: commands and their options. Commands import their modules when they run, so that `--help` takes a fraction of a
second. Not here: the work of a pass (`headless`), and the printing (`console`).
"""

import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from core.errors import UserError
from core.links import BROWSE_PORT
from dagster_project.command_line import Age, Sections
from dagster_project.interrupts import run_interruptible
from dagster_project.location import DEMO_CONFIG, ENGINES, lake_of

if TYPE_CHECKING:
    from rich.console import Console

    from assets.base.context import Context
    from dagster_project.interrupts import Interrupts


def _config(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument CONFIG, the path of the project's YAML, and the flag --demo in its place."""

    @functools.wraps(command)
    def with_config(config: Path | None, demo: bool, **options: Any) -> Any:
        if demo == (config is not None):
            what = (
                "CONFIG and --demo exclude each other" if demo else "CONFIG is missing, the path of the project's YAML"
            )
            name = click.get_current_context().info_name
            raise click.UsageError(
                f"{what}. Remedy: `clip-select {name} project.yaml`, or `clip-select {name} --demo` for the demo"
            )
        return command(DEMO_CONFIG if config is None else config, **options)

    argument = click.argument("config", metavar="CONFIG", required=False, type=click.Path(path_type=Path))
    return argument(
        click.option("--demo", is_flag=True, help="Use the demo's project in place of CONFIG.")(with_config)
    )


_recipe = click.option("--recipe", required=True, help="Name of the recipe.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON in place of a table.")
_document = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout; progress is on stderr."
)
_only = click.option(
    "--only", metavar="RECIPE", multiple=True, help="Only what this recipe needs; may be given several times."
)
_engine = click.option(
    "--engine",
    type=click.Choice(ENGINES),
    help="Where shards are computed. [default: CLIP_SELECTION_ENGINE, else in_process; with --workers processes]",
)
_workers = click.option("--workers", type=click.IntRange(1), help="Number of the engine's workers.")
_limit = click.option("--limit", type=click.IntRange(0), help="Rows to print at most. [default: 20; all with --json]")


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("clip-data-selection"), prog_name="clip-select")
def commands() -> None:
    """Select training data for CLIP from a pool of image-text pairs.

    CONFIG is the path of the project's YAML; --demo in its place uses the demo.
    """


@commands.command()
@_config
@_only
@_json
def check(config: Path, only: tuple[str, ...], as_json: bool) -> int:
    """Check the YAML and all paths, models and features in it; compute nothing."""
    from dagster_project import console

    return console.check(_open(config), _console(), only=only, as_json=as_json)


@commands.command()
@_config
@_only
@_engine
@_workers
@click.option("--no-calibration", is_flag=True, help="Use recorded rates only; measure nothing.")
@_document
def plan(
    config: Path, only: tuple[str, ...], engine: str | None, workers: int | None, no_calibration: bool, as_json: bool
) -> int:
    """Estimate what a run would compute: rows, bytes, operations, disk space and time; compute nothing.

    Times follow from the rates that earlier runs recorded with the engine. Without a record, parts of real shards are
    computed for about ten seconds into a temporary folder.
    """
    from dagster_project import console
    from dagster_project.plan import report

    settings: dict[str, Any] = {"only": only, "engine": engine, "workers": workers, "calibration": not no_calibration}
    if not as_json:
        return report.plan(_open(config), _console(), **settings)
    with console.json_document() as document:
        return report.plan(_open(config), document, **settings, as_json=True)


@commands.command()
@_config
@_only
@click.option("--redraw-negatives", is_flag=True, help="Draw the negatives again first.")
@_engine
@_workers
@_document
def run(
    config: Path,
    only: tuple[str, ...],
    redraw_negatives: bool,
    engine: str | None,
    workers: int | None,
    as_json: bool,
) -> int:
    """Compute whatever is missing or out of date, and select the subsets.

    Finds new, changed and removed shards; computes embeddings and scores; selects a subset for every recipe; prints
    what each step kept. Exits with 1 if an asset failed.

    SIGINT (Ctrl-C) and SIGTERM end it within seconds: no further asset, no subset and no catalog. Finished files
    stay, and the same command resumes. Exits with 130 (SIGINT) or 143 (SIGTERM).
    """

    def command(interrupts: "Interrupts") -> int:
        from dagster_project import console

        settings: dict[str, Any] = {"redraw": redraw_negatives, "only": only, "interrupts": interrupts}
        settings |= {"engine": engine, "workers": workers}
        if not as_json:
            return console.run(_open(config), _console(), **settings)
        with console.json_document() as document:
            return console.run(_open(config), document, **settings, as_json=True)

    options = [part for recipe in only for part in ("--only", recipe)]
    options += _engine_options(engine, workers)
    options += ["--redraw-negatives"] * redraw_negatives + ["--json"] * as_json
    return run_interruptible(command, _again(config, *options))


def _engine_options(engine: str | None, workers: int | None) -> list[str]:
    return [*(["--engine", engine] if engine else []), *(["--workers", str(workers)] if workers else [])]


@commands.command()
@_config
@click.option("--asset", required=True, help="Key of an asset that has shards, such as embeddings/b32.")
@click.option("--part", default="1/1", show_default=True, help="Part of the sorted shards: 3/64 is the third of 64.")
@_engine
@_workers
def compute(config: Path, asset: str, part: str, engine: str | None, workers: int | None) -> int:
    """Compute some shards of one asset, without Dagster: for Slurm and other schedulers.

    Skips shards that are up to date. Several such commands may run at once. Exits with 1 if a shard failed or lacks an
    input; the others are computed. SIGINT and SIGTERM end it like `run`.
    """
    from dagster_project.compute import Part

    chosen = Part.parse(part)

    def command(interrupts: "Interrupts") -> int:
        from dagster_project.compute import compute as compute_part
        from dagster_project.engines.choice import opened_engine

        with opened_engine(engine, workers) as opened:
            return compute_part(_open(config), asset, chosen, opened, _console(), interrupts)

    options = ["--asset", asset, "--part", part, *_engine_options(engine, workers)]
    return run_interruptible(command, _again(config, *options))


@commands.command()
@_config
@click.option("--shards", is_flag=True, help="For each shard, which assets are up to date.")
@_limit
@_json
def status(config: Path, shards: bool, limit: int | None, as_json: bool) -> int:
    """Show which assets are up to date, and what a run would compute."""
    from dagster_project import queries

    if shards:
        return queries.shard_status(_open(config), _console(), limit=limit, as_json=as_json)
    return queries.status(_open(config), _console(), as_json=as_json)


@commands.command()
@_config
@click.option("--port", type=click.IntRange(1, 65535), default=3000, show_default=True, help="On 127.0.0.1.")
def ui(config: Path, port: int) -> int:
    """Open the project in Dagster's web UI."""
    from dagster_project.instance import serve

    serve(_open(config), port)


@commands.command()
@_config
@click.option(
    "--port", type=click.IntRange(0, 65535), default=BROWSE_PORT, show_default=True, help="On 127.0.0.1; 0: any."
)
def browse(config: Path, port: int) -> int:
    """Search the pool in a browser, compare subsets, and try thresholds."""
    from dagster_project.browser.app import serve

    return serve(_open(config), port)


@commands.command()
@_config
@click.option("--uid", required=True, help="32 hexadecimal characters, or the key of a rejected sample.")
@_json
def explain(config: Path, uid: str, as_json: bool) -> int:
    """Show what every recipe did with a sample. Exits with 1 if there is no such sample."""
    from dagster_project import console

    return console.explain(lake_of(config).catalog, uid, _console(), as_json=as_json)


@commands.command()
@_config
@click.option("--reason", help="Only samples rejected for this reason.")
@click.option(
    "--retry",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write failed downloads to a Parquet file for img2dataset (url, caption, uid, key, shard).",
)
@_limit
@_json
def rejects(config: Path, reason: str | None, retry: Path | None, limit: int | None, as_json: bool) -> int:
    """Show the rejected samples and their reasons, or list failed downloads for a retry."""
    from dagster_project import queries

    if retry is not None:
        return queries.write_retry(_open(config), reason, retry, _console(), as_json=as_json)
    return queries.rejects(_open(config), reason, _console(), limit=limit, as_json=as_json)


@commands.command()
@_config
@click.option("--into", type=click.Path(path_type=Path), required=True, help="Folder for the page, index.html.")
@click.option(
    "--truth", type=click.Path(path_type=Path), help="Parquet of uid and kind: clean, or the name of a fault."
)
@click.option(
    "--cascade",
    "cascades",
    type=(str, str),
    multiple=True,
    metavar="FULL CASCADE",
    help="Two recipes: a selection from all rows, and the one by an encoder with `of` to compare with it. Repeatable.",
)
@click.option("--rows", type=click.IntRange(1), help="Rows to study at most. [default: 8192]")
def study(config: Path, into: Path, truth: Path | None, cascades: tuple[tuple[str, str], ...], rows: int | None) -> int:
    """Compare all scores and subsets on a page.

    With a truth, the page also shows which score finds which fault.
    """
    from assets.study import figures
    from assets.study.page import write_page

    found = figures.study(_open(config), truth, pairs=cascades, rows=figures.ROWS if rows is None else rows)
    _console().print(f"The page: {write_page(found, into)}", markup=False, soft_wrap=True)
    return 0


@commands.command()
@_config
@click.option("--repair", is_flag=True, help="Set damaged files aside, so that the next run computes them again.")
@_json
def verify(config: Path, repair: bool, as_json: bool) -> int:
    """Read every file of the lake and compare it with its checksum.

    Exits with 1 if a file is damaged or missing. Files from before checksums existed are counted as unverified.
    """
    from dagster_project import verify

    return verify.verify(_open(config), _console(), repair=repair, as_json=as_json)


@commands.command()
@_config
@click.option("--recipe", help="Name of the recipe. [default: all]")
@_json
def versions(config: Path, recipe: str | None, as_json: bool) -> int:
    """List the versions of the subsets, oldest first."""
    from dagster_project import queries

    return queries.versions(lake_of(config).catalog, recipe, _console(), as_json=as_json)


@commands.command()
@_config
@_recipe
@click.option("--from", "a", metavar="VERSION", help="The earlier version. [default: the one before --to]")
@click.option("--to", "b", metavar="VERSION", help="The later version. [default: the newest]")
@_limit
@_json
def diff(config: Path, recipe: str, a: str | None, b: str | None, limit: int | None, as_json: bool) -> int:
    """Show which rows entered or left between two versions of a subset, and why."""
    from dagster_project import queries

    catalog = lake_of(config).catalog
    return queries.diff(catalog, recipe, a, b, _console(), limit=limit, as_json=as_json)


@commands.command()
@_config
@_recipe
@click.option("--version", "version_name", metavar="VERSION", help="Such as v0001. [default: the newest]")
@_json
def lineage(config: Path, recipe: str, version_name: str | None, as_json: bool) -> int:
    """Show everything that a version of a subset was made from."""
    from dagster_project import queries

    return queries.lineage(lake_of(config), recipe, version_name, _console(), as_json=as_json)


@commands.command()
@_config
@_recipe
@_document
def export(config: Path, recipe: str, as_json: bool) -> int:
    """Copy the samples of a subset's newest version into new tars.

    The tars are in <lake>/export/<recipe>/<version>. Exits with 1 if a shard failed. SIGINT and SIGTERM end it like
    `run`.
    """

    def command(interrupts: "Interrupts") -> int:
        from dagster_project import console

        if not as_json:
            return console.export(_open(config), recipe, _console(), interrupts=interrupts)
        with console.json_document() as document:
            return console.export(_open(config), recipe, document, as_json=True, interrupts=interrupts)

    return run_interruptible(command, _again(config, "--recipe", recipe, *["--json"] * as_json), selects=False)


@commands.command()
@_config
@click.option("--name", required=True, help="Name of the evaluation.")
@_document
def evaluate(config: Path, name: str, as_json: bool) -> int:
    """Train models on several subsets under equal conditions, and compare them.

    Prints what the result shows, and the path of its page. Does nothing if the evaluation is up to date. SIGINT and
    SIGTERM end it like `run`; the same command resumes from the checkpoints.
    """

    def command(interrupts: "Interrupts") -> int:
        from dagster_project import console

        if not as_json:
            return console.evaluate(_open(config), name, _console(), interrupts=interrupts)
        with console.json_document() as document:
            return console.evaluate(_open(config), name, document, as_json=True, interrupts=interrupts)

    return run_interruptible(command, _again(config, "--name", name, *["--json"] * as_json), selects=False)


@commands.command()
@_config
@_recipe
@click.option("--version", "version_name", required=True, help="Its version: v0001, ...")
@click.option("--into", type=click.Path(path_type=Path), required=True, help="An empty folder.")
def reproduce(config: Path, recipe: str, version_name: str, into: Path) -> int:
    """Build a version of a subset again from its lineage record, and compare.

    Uses only the version's lineage.json and the pool, model and target files that it names.
    """
    from assets.reproduction import rebuild
    from resources.lake.versions import Versions

    found = Versions(_open(config).lake, recipe).read(version_name)
    _console().print(f"The same bytes: {rebuild(found.lineage, into)}", markup=False, soft_wrap=True)
    return 0


@commands.command()
@_config
@click.option("--keep", type=click.IntRange(1), help="Newest versions of each recipe to keep.")
@click.option("--runs-older-than", type=Age(), metavar="AGE", help="Age of Dagster's runs to delete: 12h, 30d, 8w.")
@click.option("--dry-run", is_flag=True, help="Print what would be deleted; delete nothing.")
@_json
def prune(config: Path, keep: int | None, runs_older_than: timedelta | None, dry_run: bool, as_json: bool) -> int:
    """Delete old versions of subsets, or old runs of Dagster, for good.

    A run stays if it has not ended, or if it was the last to report an asset or a shard of the pool.
    """
    if keep is None and runs_older_than is None:
        raise click.UsageError("Nothing to delete. Remedy: --keep N for versions, --runs-older-than 30d for runs")
    from dagster_project import prune as pruning

    return pruning.prune(
        _open(config), _console(), keep=keep, runs_older_than=runs_older_than, dry_run=dry_run, as_json=as_json
    )


def _open(config: Path) -> "Context":
    """Open the project of a YAML file."""
    from assets.settings import open_project

    return open_project(config)


def _again(config: Path, *options: str) -> str:
    """Return the command line of the command that is running."""
    project = "--demo" if config == DEMO_CONFIG else str(config)
    return shlex.join(["clip-select", str(click.get_current_context().info_name), project, *options])


def _console() -> "Console":
    from rich.console import Console

    return Console()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; `sys.argv[1:]` by default.

    Returns:
        The exit status: 0 if all went well, 1 if something failed, 2 for an error that the user can fix, 130 or 143
        if it was interrupted.
    """
    as_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
    try:
        status = commands.main(arguments, prog_name="clip-select", standalone_mode=False) or 0
        kind, message = "Interrupted", "the command was interrupted"
    except click.ClickException as error:
        error.show()
        kind, message, status = type(error).__name__, error.format_message(), error.exit_code
    except click.Abort:
        kind, message, status = "Interrupted", "the command was interrupted", 130  # as a shell reports Ctrl-C
    except (UserError, OSError) as error:
        from dagster_project.console import print_error

        print_error(error)
        kind, message, status = type(error).__name__, str(error), getattr(error, "exit_status", 2)
    else:
        if status < 128:
            return status  # the command has printed its document
    if as_json:
        from dagster_project.console import print_json_error

        print_json_error(kind, message, status)
    return status


def entry() -> NoReturn:
    """Run the command as a program."""
    from dagster_project.console import leave

    leave(main())


if __name__ == "__main__":
    entry()
