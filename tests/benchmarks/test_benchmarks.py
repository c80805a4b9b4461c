"""When a low ratio fails, and that every bar belongs to a benchmark."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from benchmarks.bars import Compared, compare, read_bars, still_broken

BARS = {"fast": 0.9, "faster": 3.0}
GOOD = {"fast": 1.0, "faster": 3.0, "seconds": 12.0}
LOW = {"fast": 0.61, "faster": 3.0}
BROKEN = {"fast": 0.59, "faster": 3.0}
OTHER_BROKEN = {"fast": 1.0, "faster": 1.9}


def runs(*later: Mapping[str, Any]) -> tuple[Callable[[], Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return a benchmark that returns these results in order, and the list of results still to come."""
    left = list(later)
    return lambda: left.pop(0), left


@pytest.mark.parametrize(("ratio", "mark"), [(0.9, "reached"), (0.89, "below"), (0.61, "below"), (0.59, "BROKEN")])
def test_a_ratio_is_marked_by_its_distance_from_the_bar(ratio: float, mark: str) -> None:
    assert compare({"fast": 0.9}, "part", {"fast": ratio}) == [Compared("part", "fast", ratio, 0.9)]
    assert Compared("part", "fast", ratio, 0.9).mark == mark


@pytest.mark.parametrize("first", [GOOD, LOW])
def test_what_is_not_a_third_below_is_not_measured_again(first: Mapping[str, float]) -> None:
    again, left = runs(BROKEN, BROKEN)
    assert still_broken(BARS, "part", first, again) == []
    assert len(left) == 2


@pytest.mark.parametrize("later", [[GOOD], [BROKEN, LOW], [OTHER_BROKEN]])
def test_a_ratio_that_is_better_once_in_three_runs_is_not_broken(later: list[Mapping[str, float]]) -> None:
    again, left = runs(*later)
    assert still_broken(BARS, "part", BROKEN, again) == []
    assert left == []


def test_a_ratio_a_third_below_in_three_runs_of_three_is_broken() -> None:
    again, left = runs(BROKEN | OTHER_BROKEN | {"fast": 0.1}, BROKEN)
    assert [(one.name, one.ratio) for one in still_broken(BARS, "part", BROKEN, again)] == [("fast", 0.59)]
    assert left == []


def test_a_bar_of_something_that_is_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="part gives no faster"):
        compare(BARS, "part", {"fast": 1.0})


def test_what_a_machine_cannot_measure_has_no_bar_there() -> None:
    assert compare({"fast": 0.9}, "part", {"fast": None}) == []


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
def test_every_bar_is_a_ratio_of_a_benchmark_that_is_run(capability: str) -> None:
    from benchmarks.__main__ import PARTS

    bars = read_bars(capability)
    assert {"neg_clip_loss_of_product", "plain_of_time"} <= bars["scores"].keys()
    assert bars.keys() <= PARTS.keys()
    assert all(bar > 0 for of_part in bars.values() for bar in of_part.values())
