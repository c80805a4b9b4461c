"""The Dagster instance of a project: its folder, opening it, its server, and the lock that allows one pass at a time.

Here: everything that needs to know where Dagster keeps its records. Not here: the work of a run (`headless`,
`executor`), and runs whose process died (`dead_runs`). Dagster is imported where it is used, because the commands that
do without it should start at once.
"""

import fcntl
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click
import yaml

from core.links import BROWSE_VARIABLE
from dagster_project.location import CONFIG_VARIABLE, MODULE
from resources.lake.files import LakeError
from resources.lake.locks import held_lock

if TYPE_CHECKING:
    import dagster as dg

    from assets.base.context import Context
    from assets.graph import Graph
    from resources.lake.files import Lake

SETTINGS = Path(__file__).with_name("dagster.yaml")
"""Settings that a new instance starts with."""


REMEDY_RECORDS = (
    "Remedy: stop Dagster and move its folder `history` away; Dagster starts new records, and nothing is computed again"
)
_UNUSABLE = frozenset("%?*[")
"""Characters that the path of an instance must not have.

SQLite's URLs cut the path at % and ?. Dagster looks for dagster.yaml with `glob`, to which *, ? and [ are a pattern: it
then finds no file and uses its own settings, with telemetry, without an error.
"""


def home_of(project: "Context") -> Path:
    """Return the folder of the Dagster instance: `DAGSTER_HOME`, else `.dagster` in the lake's home."""
    given = os.environ.get("DAGSTER_HOME")
    return Path(given).resolve() if given else project.lake.home / ".dagster"


def prepare_home(project: "Context") -> Path:
    """Return the folder of the Dagster instance, made ready: `DAGSTER_HOME`, else `.dagster` in the lake.

    A lake has an instance of its own, because shard names are partitions and every pool has a `00000`.

    Raises:
        LakeError: the folder can't be used, or belongs to another lake.
    """
    given, home = os.environ.get("DAGSTER_HOME"), home_of(project)
    wrong = sorted(_UNUSABLE & set(str(home)))
    if wrong:
        raise LakeError(
            f"{home}: Dagster can't use a folder with {' or '.join(wrong)} in its path. Remedy: set DAGSTER_HOME to a "
            "folder without; the lake can stay"
        )
    home.mkdir(parents=True, exist_ok=True)
    if not os.access(home, os.W_OK):
        raise LakeError(f"{home}: this folder is not writable. Remedy: set DAGSTER_HOME to one that is")
    if given:
        _refuse_another_lake(home / "lake.txt", project.settings.lake)
    if not _has_settings(home / "dagster.yaml"):
        shutil.copy(SETTINGS, home / "dagster.yaml")
    return home


def _has_settings(path: Path) -> bool:
    """Check whether a `dagster.yaml` has settings: without any, Dagster would send telemetry and limit no pool."""
    try:
        return path.exists() and yaml.safe_load(path.read_bytes()) not in (None, {})
    except yaml.YAMLError:
        return True  # opening the instance reports it


def _refuse_another_lake(owner: Path, lake: str) -> None:
    """Check that an instance is this lake's: of two lakes, each would delete the other's partitions."""
    if not owner.exists():
        owner.write_text(lake, encoding="utf-8")
    found = owner.read_text(encoding="utf-8")
    if found != lake:
        raise LakeError(
            f"{owner.parent}: this Dagster instance belongs to the lake {found}. Remedy: another DAGSTER_HOME for "
            f"{lake}; or, if the lake was moved, correct {owner}"
        )


def damaged_records(home: Path, *, thorough: bool = False) -> dict[Path, str]:
    """Return Dagster's SQLite databases that can't be read, with the reason.

    Args:
        home: folder of the instance.
        thorough: read all databases completely, and not only the beginning of those that runs share. SQLite has no
            checksums, so that only faults of structure are found.
    """
    found = {}
    shared = [home / name for name in ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")]
    for path in sorted(home.rglob("*.db")) if thorough else [path for path in shared if path.exists()]:
        try:
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as con:
                ((tables,),) = con.execute("SELECT count(*) FROM sqlite_master").fetchall()
                answer = "ok" if tables else "it has no tables"
                if tables and thorough:
                    ((answer,),) = con.execute("PRAGMA quick_check(1)").fetchall()
        except sqlite3.Error as error:
            answer = str(error)
        if answer != "ok":
            found[path] = answer
    return found


@contextmanager
def open_instance(project: "Context") -> Iterator["dg.DagsterInstance"]:
    """Open the project's Dagster instance.

    Raises:
        LakeError: its folder or its dagster.yaml can't be used, or its database does not answer.
    """
    import dagster as dg
    from sqlalchemy.exc import DatabaseError

    home = prepare_home(project)
    for path, why in damaged_records(home).items():
        raise LakeError(f"{path}: damaged: {why}. {REMEDY_RECORDS}")
    try:
        opened = dg.DagsterInstance.from_config(str(home))
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).partition("Stack Trace:")[0].split()).rstrip(".")
        raise LakeError(
            f"{home / 'dagster.yaml'}: Dagster can't open its instance: {reason}. Remedy: correct the file or the "
            "environment variables that it names; start the database"
        ) from error
    with opened as instance:
        try:
            yield instance
        except (sqlite3.DatabaseError, DatabaseError) as error:
            raise LakeError(
                f"{home}: Dagster's records can't be read or written ({getattr(error, 'orig', None) or error}). "
                f"{REMEDY_RECORDS}"
            ) from error


@contextmanager
def only_pass(project: "Context") -> Iterator[None]:
    """Hold the lake's lock: two passes at once would do the same work twice.

    Raises:
        LakeError: another process holds it.
    """
    root = project.lake.home
    root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        lock = held.enter_context(open(root / ".pass.lock", "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LakeError(
                f"{lock.name}: another `clip-select` is working on this lake. Remedy: wait for it to end"
            ) from error
        if not project.lake.is_local:
            held.enter_context(held_lock(project.lake.store, f"{project.lake.root}/.pass.lock"))
        yield


def write_workspace(home: Path, name: str) -> Path:
    """Write the workspace file of a project's server, `<home>/workspace.yaml`, and return its path.

    Args:
        home: folder of the instance.
        name: of the project; the UI shows it as the code location's name.
    """
    path = home / "workspace.yaml"
    module = {"module_name": MODULE, "location_name": name, "executable_path": sys.executable}
    path.write_text(yaml.safe_dump({"load_from": [{"python_module": module}]}), encoding="utf-8")
    return path


def graph_address(graph: "Graph", port: int) -> str:
    """Return the address of the page with the whole asset graph, all groups open, so that the assets' states show.

    Dagster has no setting for it: the page opens with all groups closed, unless its address lists the open ones or
    the browser remembers them.
    """
    groups = dict.fromkeys(group for assets in graph.definitions for group in assets.group_names_by_key.values())
    return f"http://127.0.0.1:{port}/asset-groups?expanded={','.join(f'global@global:{group}' for group in groups)}"


def start_server(module: str, arguments: Sequence[str], port: int) -> str:
    """Start a web server on 127.0.0.1 that ends with this process, and return its address.

    Args:
        module: is run with `arguments` and the descriptor of a listening socket; it ends when its standard input is
            closed.
        arguments: what is served.
        port: the port to listen on; where it is taken, any free one.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except (OSError, OverflowError):
        listener.bind(("127.0.0.1", 0))
    listener.listen()
    ended, alive = os.pipe()
    os.set_inheritable(alive, True)  # stays open in the program that replaces this process, until that ends
    descriptor = listener.fileno()
    subprocess.Popen(
        [sys.executable, "-m", module, *arguments, str(descriptor)],
        stdin=ended,
        pass_fds=[descriptor],
        start_new_session=True,
    )
    os.close(ended)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    return address


def start_report_server(lake: "Lake", port: int) -> str:
    """Start a web server of a lake's reports on 127.0.0.1 (`start_server`), and return the address of its reports."""
    from assets.subsets.report import reports_digest

    digest = reports_digest(lake)
    return f"{start_server('dagster_project.report_server', [f'{lake.root}/subset', digest], port)}/{digest}"


def serve(project: "Context", port: int) -> NoReturn:
    """Replace this process by Dagster's web server and daemon, on 127.0.0.1.

    Args:
        project: the opened project.
        port: of the web server.
    """
    from assets.graph import build_graph
    from assets.subsets.report import REPORTS_VARIABLE
    from dagster_project.browser.token import TokenError, stored_token
    from dagster_project.dead_runs import close_dead_runs

    home = prepare_home(project)
    with open_instance(project) as instance:
        close_dead_runs(instance)
    environment = {
        **os.environ,
        "DAGSTER_HOME": str(home),
        "DAGSTER_DISABLE_TELEMETRY": "yes",  # `dg` sends its first event before it reads dagster.yaml
        CONFIG_VARIABLE: str(project.config.resolve()),
    }
    if not environment.get(REPORTS_VARIABLE):
        reports = start_report_server(project.lake, port + 1)
        environment[REPORTS_VARIABLE] = reports
        click.echo(f"Reports: {reports}")
    if not environment.get(BROWSE_VARIABLE):
        try:
            token = stored_token()
        except TokenError as error:
            click.echo(f"The pool can't be browsed: {error}", err=True)
        else:
            browse = start_server("dagster_project.browser.standby", [str(project.config.resolve())], port + 2)
            environment[BROWSE_VARIABLE] = browse
            click.echo(f"Browse the pool: {browse}/?token={token}")
    click.echo(f"The asset graph with all groups open: {graph_address(build_graph(project), port)}")
    sys.stdout.flush()  # before this process is replaced
    workspace = write_workspace(home, project.settings.name)
    arguments = ["dev", "--workspace", str(workspace), "--host", "127.0.0.1", "--port", str(port)]
    os.execve(sys.executable, [sys.executable, "-m", "dagster_dg_cli.cli", *arguments], environment)
