"""The least that ratios must be (`bars.json`), and when a lower one counts.

Here: comparing figures with bars. Not here: measuring. Machines are shared, so one low figure proves nothing: a bar is
broken where a ratio lies more than a third below it in each of three runs.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BARS = Path(__file__).with_name("bars.json")
RUNS = 3
SLACK = 1 / 3

Figures = Mapping[str, Any]
Bars = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Compared:
    """A ratio and its bar.

    Attributes:
        part: the benchmark.
        name: the ratio's name in what the benchmark gives.
        ratio: what was measured.
        bar: the least that it should be.
    """

    part: str
    name: str
    ratio: float
    bar: float

    @property
    def mark(self) -> str:
        """Say how it stands: reached, below, or so far below that it counts."""
        if self.ratio >= self.bar:
            return "reached"
        return "BROKEN" if self.is_broken else "below"

    @property
    def is_broken(self) -> bool:
        """Tell whether it lies more than a third below the bar."""
        return self.ratio < self.bar * (1 - SLACK)


def read_bars(path: Path = BARS) -> Bars:
    """Read the bars: minimum by the ratio's name, by benchmark."""
    bars: Bars = json.loads(path.read_text())
    return bars


def compare(bars: Mapping[str, float], part: str, found: Figures) -> list[Compared]:
    """Put a benchmark's ratios beside their bars; a figure of None can't be had on this machine.

    Raises:
        ValueError: a bar is of a figure that the benchmark does not give.
    """
    if unknown := sorted(bars.keys() - found.keys()):
        raise ValueError(f"{BARS}: {part} gives no {', '.join(unknown)}. Remedy: correct the names, or drop the bars")
    return [Compared(part, name, found[name], bar) for name, bar in bars.items() if found[name] is not None]


def still_broken(bars: Mapping[str, float], part: str, found: Figures, again: Callable[[], Figures]) -> list[Compared]:
    """Measure again as long as the same ratio is broken, three runs in all; give what was broken in each of them."""
    broken = [one for one in compare(bars, part, found) if one.is_broken]
    for _ in range(RUNS - 1):
        if not broken:
            break
        names = {one.name for one in broken}
        broken = [one for one in compare(bars, part, again()) if one.is_broken and one.name in names]
    return broken
