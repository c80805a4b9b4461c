"""The progress of a pass on the terminal: a bar for the asset in progress, and a line for each that has ended.

Dagster redirects the descriptors 1 and 2 to files while a step runs, so the bar is drawn on a copy of stderr's.
Without a terminal there are plain lines only. Not here: the figures (`assets.base.progress`).
"""

import io
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TextIO

from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column, Table
from rich.text import Text

from assets.base.progress import Meter
from dagster_project.headless import Stage


@contextmanager
def shown_progress() -> Iterator["Bars | Lines"]:
    """Show the progress of a pass on stderr: bars on a terminal, else plain lines."""
    with _own_descriptor(sys.stderr, _Patient) as file:
        if not file.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
            yield Lines(file)
            return
        with _Progress(_Terminal(file=file)) as bars:
            yield Bars(bars)


@contextmanager
def only_document() -> Iterator[TextIO]:
    """Yield a stream for a document that is all of stdout: what else is written to stdout goes to stderr."""
    with _own_descriptor(sys.stdout, io.TextIOWrapper) as file:
        if file is sys.stdout:
            with redirect_stdout(sys.stderr):
                yield file
            return
        sys.stdout.flush()
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        try:
            yield file
        finally:
            sys.stdout.flush()
            os.dup2(file.fileno(), sys.stdout.fileno())


@contextmanager
def _own_descriptor(stream: TextIO, kind: type[io.TextIOWrapper]) -> Iterator[TextIO]:
    """Yield a stream that writes where another one writes now, whatever its descriptor is redirected to."""
    try:
        descriptor = os.dup(stream.fileno())
    except io.UnsupportedOperation:  # a stream in memory, which nobody redirects
        yield stream
        return
    # a buffer would be flushed once more when it is closed, and could raise then
    with open(descriptor, "wb", buffering=0 if kind is _Patient else -1) as raw:
        file = kind(raw, encoding=stream.encoding, errors="backslashreplace", write_through=True)
        yield file
        file.flush()
        file.detach()


class _Patient(io.TextIOWrapper):
    """A stream on a terminal or pipe that may go away: a run goes on without showing its progress."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


class Lines:
    """Plain lines, without control characters: when an asset begins, when it has ended, and at intervals between."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.asset = ""
        self.meter = Meter(self._during)

    def notice(self, stage: Stage) -> None:
        """Print that an asset begins or has ended."""
        if stage.state == "begins":
            if stage.asset != self.asset:
                self._print(f"{_place(stage)}: {', '.join(_size(stage))}")
            self.asset = stage.asset
            self.meter.expect(stage.rows, stage.shards)
        else:
            self._print(f"{_place(stage)}: {_ending(stage, self.meter)}")
            self.asset, self.meter = "", Meter(self._during)

    def advance(self, asset: str, shard: str, rows: int) -> None:
        """Count the rows of the asset in progress."""
        if asset == self.asset:
            self.meter.advance(rows, shard)

    def _during(self, line: str) -> None:
        self._print(f"  {self.asset}: {line}")

    def _print(self, line: str) -> None:
        self.file.write(f"{line}\n")
        self.file.flush()


class Bars:
    """A bar for the asset in progress, below a line for each that has ended."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.asset = ""
        self.meter = Meter()
        self.task: TaskID | None = None

    def notice(self, stage: Stage) -> None:
        """Draw the bar of an asset that begins, or replace it by a line when it has ended."""
        if stage.state == "begins":
            self.asset = stage.asset
            self.meter.expect(stage.rows, stage.shards)
            if self.task is None:
                self.task = self.progress.add_task(stage.asset, total=None, stage=stage, meter=self.meter)
            self._move()
            return
        if self.task is not None:
            self.progress.remove_task(self.task)
        styles = {"failed": "bold red", "not attempted": "yellow"}
        text = Text(f"{_place(stage)}: {_ending(stage, self.meter)}", style=styles.get(stage.state, ""))
        self.progress.console.print(text, soft_wrap=True)
        self.asset, self.meter, self.task = "", Meter(), None

    def advance(self, asset: str, shard: str, rows: int) -> None:
        """Move the bar by some rows, if it is this asset's."""
        if asset == self.asset:
            self.meter.advance(rows, shard)
            self._move()

    def _move(self) -> None:
        if self.task is not None and (done := self.meter.fraction) is not None:
            self.progress.update(self.task, total=1.0, completed=done)


def _place(stage: Stage) -> str:
    return f"step {stage.number} of {stage.of}: {stage.asset}"


def _size(stage: Stage) -> Iterator[str]:
    if stage.shards:
        yield f"{stage.shards:,} shard{'s' if stage.shards > 1 else ''}"
    if stage.rows is not None:
        yield f"{stage.rows:,} rows"
    if not stage.shards and stage.rows is None:
        yield "begins"


def _ending(stage: Stage, meter: Meter) -> str:
    if stage.state == "not attempted":
        return f"not attempted: needs {stage.needs}"
    seconds = time.monotonic() - stage.began
    done = f", {meter.rows:,} rows, {meter.rows / seconds:,.0f} rows/s" if meter.rows and seconds > 0 else ""
    if stage.state == "failed":
        which = f"{stage.failed:,} of {stage.shards:,} shards " if stage.failed else ""
        return f"{which}FAILED after {seconds:,.1f} s{done}"
    return f"computed in {seconds:,.1f} s{done}"


# Drawing


class _Terminal(Console):
    """A console as wide as its own terminal: rich asks the descriptors 0 to 2, which may be redirected."""

    @property
    def size(self) -> ConsoleDimensions:
        columns = lines = 0  # as of a terminal that does not know its size
        with suppress(OSError):  # it is gone
            columns, lines = os.get_terminal_size(self.file.fileno())
        return ConsoleDimensions(columns or 80, lines or 24)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        del new_size


class _Figure(ProgressColumn):
    """A text about a task, computed whenever it is drawn."""

    def __init__(self, name: str, justify: str = "left") -> None:
        super().__init__(Column(no_wrap=True, justify=justify))  # type: ignore[arg-type]
        self.name = name

    def render(self, task: Task) -> Text:
        stage: Stage = task.fields["stage"]
        if self.name == "place":
            return Text(f"step {stage.number} of {stage.of}")
        return Text(getattr(task.fields["meter"], self.name))


class _Asset(ProgressColumn):
    """The key of an asset, cut where the terminal is narrow."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


PLACE, ASSET, BAR, AMOUNT, RATE, REMAINING = (
    _Figure("place"),
    _Asset(),
    BarColumn(bar_width=20),
    _Figure("amount", "right"),
    _Figure("rate", "right"),
    _Figure("remaining", "right"),
)


class _Progress(Progress):
    """Bars whose columns follow the width of the terminal. Text that a step prints is left to Dagster."""

    def __init__(self, terminal: Console) -> None:
        self.terminal = terminal
        super().__init__(
            console=terminal, transient=True, refresh_per_second=4, redirect_stdout=False, redirect_stderr=False
        )

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        width = self.terminal.width
        wanted = ((PLACE, 0), (ASSET, 0), (BAR, 100), (AMOUNT, 60), (RATE, 80), (REMAINING, 30))
        self.columns = tuple(column for column, least in wanted if width >= least)
        return super().make_tasks_table(tasks)
