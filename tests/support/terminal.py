"""A program on a terminal of its own: what it has drawn so far, and the size of the terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Callable, Sequence
from pathlib import Path

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]")


class Terminal:
    """A program whose stdin, stdout and stderr are a terminal.

    Args:
        command: the program.
        columns: width of the terminal.
        environment: further environment variables.
    """

    def __init__(
        self, command: Sequence[str], *, columns: int = 120, environment: dict[str, str] | None = None
    ) -> None:
        self.main, other = pty.openpty()
        resize(self.main, columns)
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            command,
            stdin=other,
            stdout=other,
            stderr=other,
            env={**kept, "TERM": "xterm", **(environment or {})},
            cwd=Path(__file__).parents[2],
        )
        os.close(other)
        self.raw = ""

    def resize(self, columns: int) -> None:
        """Set the width of the terminal, as a window manager does."""
        resize(self.main, columns)

    def read(self) -> bool:
        """Read what the program has written since; return False when it has ended."""
        try:
            found = os.read(self.main, 65536)
        except OSError:  # Linux's answer when no process has the other side open
            return False
        self.raw += found.decode(errors="replace")
        return bool(found)

    def wait_for(self, shown: Callable[[str], object]) -> str:
        """Read until the text drawn since this call fulfils a condition, and return that text.

        Raises:
            AssertionError: the program ended before.
        """
        start = len(self.raw)
        while not shown(text := plain(self.raw[start:])):
            assert self.read(), f"it ended after\n{plain(self.raw)}"
        return text

    def finish(self) -> int:
        """Read until the program ends, and return its exit status."""
        while self.read():
            pass
        os.close(self.main)
        return self.process.wait()


def resize(main: int, columns: int) -> None:
    """Set the width of a terminal, given the descriptor of its main side."""
    fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))


def plain(raw: str) -> str:
    """Return what a program drew, without control sequences; each redrawn line is a line."""
    return CONTROL.sub("", raw).replace("\r", "\n")
