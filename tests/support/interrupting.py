"""Real processes that tests send signals to."""

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

END_SECONDS = 120
"""Time after which a process that was sent a signal counts as hanging, on a machine that is very busy."""


class Running:
    """A process in a session of its own, as a terminal or a service manager starts it.

    Args:
        command: its command line.
        ignored: start it with SIGINT ignored, as a shell script starts background commands.
    """

    def __init__(self, command: Sequence[str], *, ignored: bool = False) -> None:
        script = 'trap "" INT; exec "$@"' if ignored else 'exec "$@"'
        self.process = subprocess.Popen(
            ["sh", "-c", script, "sh", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until a condition is true; fail if the process ends before."""
        while not condition():
            try:
                self.process.wait(timeout=0.005)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError(f"ended with {self.process.returncode}: {self.process.communicate()}")

    def end(self, number: signal.Signals, *, group: bool = False) -> tuple[int, str]:
        """Send a signal, also to its child processes for `group`, as Ctrl-C does; return exit status and stderr."""
        (os.killpg if group else os.kill)(self.process.pid, number)
        try:
            _, errors = self.process.communicate(timeout=END_SECONDS)
        finally:
            self.process.kill()
        return self.process.returncode, errors


def data_files(lake: Path) -> dict[str, bytes]:
    """Return the lake's data: everything but Dagster's records, the catalog, and timings."""
    return {
        str(path.relative_to(lake)): path.read_bytes()
        for path in sorted(lake.rglob("*"))
        if path.suffix in (".parquet", ".arrow", ".npy") and ".dagster" not in path.parts
    }


def stray_files(lake: Path) -> list[Path]:
    """List the temporary files in a lake."""
    return [path for path in lake.rglob(".*.tmp*") if ".dagster" not in path.parts]


def start_forked_run(config: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Start `clip-select run` in a process that is forked from a server with its modules loaded, as workers are.

    Such a run starts in a fraction of a second; a new interpreter needs several.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "open_clip", "dagster_project.headless", "dagster_project.early_checks"])
    process = context.Process(target=_run, args=(str(config), dict(environment or {})))
    process.start()
    return process


def _run(config: str, environment: dict[str, str]) -> None:
    os.environ |= environment  # the server was started with another one
    from dagster_project import cli, console

    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    console.leave(cli.main(["run", config]))
