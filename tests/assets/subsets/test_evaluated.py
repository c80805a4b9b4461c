"""The section of a subset's page about evaluations."""

from pathlib import Path

import pyarrow as pa

from assets.evaluations.results import measured, results_table
from assets.subsets.evaluated import with_evaluations
from resources.lake.files import Lake, Provenance

PAGE = "<html><body><p>funnel</p><h2>Scores before and after</h2></body></html>"


def evaluation_table(*, better_by: float, version: str = "v0002") -> pa.Table:
    """Return the table of an evaluation of one task with three seeds."""
    curves = {
        (arm, 1000, seed): [{"seen": 1000, "measures": {"pets": {"accuracy": 0.5 + seed / 100 + gain}}}]
        for arm, gain in (("random", 0.0), ("paper", better_by))
        for seed in range(3)
    }
    rows = measured(curves, "random", ["random", "paper"])
    origin = {"random": (None, None), "paper": ("paper", version)}
    return results_table(rows, "random", "small", origin, {"random": 9, "paper": 9})


def test_a_page_shows_each_evaluation_of_its_version_once(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    page = with_evaluations(lake, "paper", "v0002", PAGE, ("first", evaluation_table(better_by=0.2)))
    assert page.index("<h2>Evaluations</h2>") < page.index("<h2>Scores before and after</h2>")
    assert "+20.0 points to random" in page
    lake.write(evaluation_table(better_by=0.2), Provenance("evaluation/first", None, "1"))
    again = with_evaluations(lake, "paper", "v0002", page, ("second", evaluation_table(better_by=-0.1)))
    assert again.count("<h2>Evaluations</h2>") == 1
    assert "+20.0 points" in again
    assert "-10.0 points" in again
    replaced = with_evaluations(lake, "paper", "v0002", again, ("first", evaluation_table(better_by=0.3)))
    assert "+20.0 points" not in replaced
    assert "+30.0 points" in replaced


def test_a_page_of_another_version_is_unchanged(tmp_path: Path) -> None:
    new = ("first", evaluation_table(better_by=0.2))
    assert with_evaluations(Lake(str(tmp_path)), "paper", "v0001", PAGE, new) == PAGE
    assert with_evaluations(Lake(str(tmp_path)), "other", "v0002", PAGE, new) == PAGE
