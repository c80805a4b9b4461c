"""How the study page writes numbers."""

import math
from collections.abc import Callable

from assets.study.results import Interval


def rate(value: float) -> str:
    """Return an AUC or correlation with three places, and just below 1 with as many as show the difference."""
    missing = 1 - value
    places = min(9, math.ceil(-math.log10(missing))) if 0 < missing < 0.0005 else 3
    return f"{value:.{places}f}".replace("-", "−")


def small(value: float) -> str:
    """Return a difference with two significant digits, so that the sign of a small one shows."""
    return f"{value:.2g}".replace("-", "−")


def bounds(interval: Interval, write: Callable[[float], str]) -> str:
    """Return an interval's bounds in brackets, or nothing if it has none."""
    return "" if math.isnan(interval.low) else f" [{write(interval.low)}, {write(interval.high)}]"


def auc(interval: Interval) -> str:
    """Return an AUC with its interval."""
    return f"{rate(interval.value)}{bounds(interval, rate)}"


def difference(interval: Interval) -> str:
    """Return a difference with its interval."""
    return f"{small(interval.value)}{bounds(interval, small)}"


def plain(name: str) -> str:
    """Return a name with spaces for underscores."""
    return name.replace("_", " ")
