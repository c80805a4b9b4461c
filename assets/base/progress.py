"""How far a step is: rows done and due, rows per second, and the time remaining.

Here: the figures, for Dagster's log and for the terminal. Not here: who draws them (`dagster_project.progress`).
"""

import time
from collections.abc import Callable
from datetime import timedelta

INTERVAL = 30.0
"""Seconds between two lines about the progress of a step."""


def _ignored(line: str) -> None:
    del line


class Meter:
    """Counts the rows that a step has done, and logs a line at regular intervals.

    Args:
        log: takes a line.
        interval: seconds between two lines.
        clock: returns the time in seconds.

    Attributes:
        rows: rows done.
        due: rows that the step has to do; None where this is not known beforehand, and shards are counted.
        shards: shards that the step has to do; 0 for an unpartitioned asset.
    """

    def __init__(
        self,
        log: Callable[[str], None] = _ignored,
        *,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.log, self.interval, self.clock = log, interval, clock
        self.rows = 0
        self.due: int | None = None
        self.shards = 0
        self._seen: set[str] = set()
        self._logged = clock()
        self._first = (0.0, 0, 0.0)  # time, rows and fraction at the first report: before it, models are loaded

    def expect(self, rows: int | None, shards: int = 0) -> None:
        """Set the rows and shards that the step has to do."""
        self.due, self.shards = rows, shards

    def advance(self, rows: int, shard: str = "") -> None:
        """Count rows as done, and log a line if the last one is older than the interval."""
        is_first = not self.rows
        self.rows += rows
        if shard:
            self._seen.add(shard)
        if is_first:
            self._first = (self.clock(), self.rows, self.fraction or 0.0)
        if self.clock() - self._logged >= self.interval:
            self._logged = self.clock()
            self.log(str(self))

    @property
    def fraction(self) -> float | None:
        """The part that is done, 0 to 1; None where nothing tells how much there is to do."""
        if self.due is not None:
            return min(1.0, self.rows / self.due) if self.due else 1.0
        return min(1.0, len(self._seen) / self.shards) if self.shards else None

    @property
    def amount(self) -> str:
        """What is done of what is due, such as `1,200 of 5,000 rows`."""
        if self.due is not None:
            return f"{min(self.rows, self.due):,} of {self.due:,} rows"
        shards = f"shard {len(self._seen):,} of {self.shards:,}, " if self.shards else ""
        return f"{shards}{self.rows:,} rows"

    @property
    def rate(self) -> str:
        """Rows per second since the first report; empty before the second one."""
        began, rows, _ = self._first
        passed = self.clock() - began
        return f"{(self.rows - rows) / passed:,.0f} rows/s" if self.rows > rows and passed > 0 else ""

    @property
    def remaining(self) -> str:
        """The time remaining at this rate, such as `0:01:28 left`; empty where it is not known."""
        began, _, before = self._first
        done = self.fraction
        if done is None or done <= before or done == 1:
            return ""
        return f"{timedelta(seconds=round((self.clock() - began) * (1 - done) / (done - before)))} left"

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.amount, self.rate, self.remaining)))
