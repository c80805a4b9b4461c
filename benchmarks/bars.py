"""Minimum ratios (`bars.json`), and when a lower one counts.

Here: comparing results with bars. Not here: measuring. Machines are shared, so one low ratio proves nothing: a bar is
broken if a ratio is more than a third below it in each of three runs.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BARS = Path(__file__).with_name("bars.json")
RUNS = 3
SLACK = 1 / 3

Results = Mapping[str, Any]
Bars = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Compared:
    """A ratio and its bar.

    Attributes:
        part: The benchmark.
        name: Name of the ratio in the benchmark's results.
        ratio: The measured ratio.
        bar: The minimum.
    """

    part: str
    name: str
    ratio: float
    bar: float

    @property
    def mark(self) -> str:
        """The verdict: reached, below, or so far below that it counts."""
        if self.ratio >= self.bar:
            return "reached"
        return "BROKEN" if self.is_broken else "below"

    @property
    def is_broken(self) -> bool:
        """Whether the ratio is more than a third below the bar."""
        return self.ratio < self.bar * (1 - SLACK)


def read_bars(capability: str, path: Path = BARS) -> Bars:
    """Read the bars for a CPU capability, as torch names it: by benchmark, the minimum by the ratio's name.

    The file has bars for every CPU, and more by capability; for a capability without a row of its own, those of
    `other`.
    """
    stored = json.loads(path.read_text())
    own = stored["by_capability"].get(capability, stored["by_capability"]["other"])
    return {part: stored["every"].get(part, {}) | own.get(part, {}) for part in stored["every"].keys() | own.keys()}


def compare(bars: Mapping[str, float], part: str, found: Results) -> list[Compared]:
    """Compare a benchmark's ratios with their bars; None can't be measured on this machine and is left out.

    Raises:
        ValueError: A bar has a ratio that the benchmark does not return.
    """
    if unknown := sorted(bars.keys() - found.keys()):
        raise ValueError(f"{BARS}: {part} gives no {', '.join(unknown)}. Remedy: correct the names, or delete the bars")
    return [Compared(part, name, found[name], bar) for name, bar in bars.items() if found[name] is not None]


def still_broken(bars: Mapping[str, float], part: str, found: Results, again: Callable[[], Results]) -> list[Compared]:
    """Measure again while the same ratio is broken, up to three runs, and return the ratios broken in each of them."""
    broken = [one for one in compare(bars, part, found) if one.is_broken]
    for _ in range(RUNS - 1):
        if not broken:
            break
        names = {one.name for one in broken}
        broken = [one for one in compare(bars, part, again()) if one.is_broken and one.name in names]
    return broken
