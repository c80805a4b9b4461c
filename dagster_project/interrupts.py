"""SIGINT and SIGTERM: how a command ends when it is interrupted.

While Dagster executes a run, it replaces the signal handlers, and it ends an interrupted run as a failed one without an
error. So signals are noted independently of handlers: Python's C code writes each signal's number to a socket
(`signal.set_wakeup_fd`), even while the main thread computes in C. A thread reads it, and ends the process if the main
thread does not. Files of the lake are complete or absent, so the process can end at any moment.

Not here: what a pass does when it is interrupted (`headless`).
"""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

GRACE_SECONDS = 5.0
"""Time from the first signal in which the command may close its run and files; then the process is ended."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h\r\x1b[K"  # progress bars hide it; and their last line is overwritten


class Interrupts:
    """The signals that a command received, and the one line that it prints about them.

    Args:
        resume: the command to enter to continue.

    Attributes:
        kept: how many files each asset has written since the command started, by key.
        received: the first SIGINT or SIGTERM.
    """

    def __init__(self, resume: str, *, selects: bool = True) -> None:
        self.resume, self.selects = resume, selects
        self.kept: Counter[str] = Counter()
        self.received: signal.Signals | None = None
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._reading = threading.Lock()
        self._printed = threading.Lock()
        self._stderr = os.dup(2)  # Dagster redirects the file descriptors 1 and 2 during a step
        self._done = False

    @property
    def status(self) -> int:
        """The exit status, 130 for SIGINT and 143 for SIGTERM, as a shell reports it; 0 if there was no signal."""
        return 0 if self.received is None else 128 + self.received

    def note(self) -> int:
        """Note the signals that have arrived, and return their number."""
        with self._reading:
            try:
                numbers = [number for number in self._reader.recv(4096) if number in SIGNALS]
            except BlockingIOError:
                return 0
            if numbers and self.received is None:
                self.received = signal.Signals(numbers[0])
                self._writer.send(b"\0")  # wakes the watcher, if it is not the one that reads
            return len(numbers)

    def check(self) -> None:
        """Check that no signal has arrived; call this after code that may have swallowed an interrupt.

        Raises:
            KeyboardInterrupt: a signal has arrived.
        """
        self.note()
        if self.received is not None:
            raise KeyboardInterrupt

    def print_line(self) -> None:
        """Print, once, by what the command was interrupted, what was kept, and how to resume."""
        if not self._printed.acquire(blocking=False):
            return
        text = f"{self.text()}\n".encode(errors="replace")
        with contextlib.suppress(OSError):  # of a terminal that has been closed
            os.write(self._stderr, (_SHOW_CURSOR if os.isatty(self._stderr) else b"") + text)

    def text(self) -> str:
        """Return the line."""
        assert self.received is not None
        written = dict(self.kept)  # the main thread may still be counting
        files = ", ".join(f"{key} ({count} file{'s' * (count != 1)})" for key, count in written.items())
        kept = f"kept all finished files, from this run {files}" if files else "kept all finished files"
        if self.selects and not any(key.startswith("subset/") for key in written):
            kept += "; no subset was selected"
        return f"Interrupted by {self.received.name}: {kept}. To resume: {self.resume}"

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Raise KeyboardInterrupt in the block on SIGINT and SIGTERM, also where this process inherited SIGINT ignored.

        After a signal, the process has GRACE_SECONDS to end, or until the next signal. It then ends in any case.
        """
        before = {number: signal.signal(number, _interrupt) for number in SIGNALS}
        wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, name="interrupts", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            if self.received is None:
                self._done = True
                self._writer.send(b"\0")
                watcher.join()
                signal.set_wakeup_fd(wakeup)
                for number, handler in before.items():
                    signal.signal(number, handler)
                self._reader.close()
                self._writer.close()
                os.close(self._stderr)

    def _watch(self) -> None:
        deadline: float | None = None
        while not self._done:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            select.select([self._reader], [], [], left)
            number = self.note()
            if deadline is not None and (number or time.monotonic() >= deadline):
                self._end()
            if self.received is not None and deadline is None:
                if number > 1:
                    self._end()
                deadline = time.monotonic() + GRACE_SECONDS

    def _end(self) -> NoReturn:
        self.print_line()
        os._exit(self.status)


def run_interruptible(command: Callable[[Interrupts], int], resume: str, *, selects: bool = True) -> int:
    """Run a command that SIGINT and SIGTERM end within seconds.

    Args:
        command: takes the `Interrupts`, which it checks; returns the exit status.
        resume: the command to enter to continue.
        selects: whether the command selects subsets.

    Returns:
        The command's exit status; after a signal 130 (SIGINT) or 143 (SIGTERM). The process must end then.
    """
    interrupts = Interrupts(resume, selects=selects)
    with interrupts.handled():
        try:
            return command(interrupts)
        except BaseException:
            interrupts.note()
            if interrupts.received is None:
                raise
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # the command has ended already
            interrupts.print_line()
            return interrupts.status


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise KeyboardInterrupt
