"""The measures of an evaluation's runs, and the differences between its arms.

Here: from the curves of runs to rows of the asset's table and to the best fraction. Not here: training, and the page.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from resources.training.measures import ACCURACY, COMPARED
from resources.training.settings import HowMuchSettings
from selection.evaluation.paired import Difference, paired_difference
from selection.evaluation.scaling_law import BestFraction, best_fraction

MEAN = "mean of tasks"

SCHEMA = pa.schema(
    [
        pa.field("arm", pa.string(), nullable=False),
        pa.field("recipe", pa.string()),
        pa.field("version", pa.string()),
        pa.field("tier", pa.string(), nullable=False),
        pa.field("samples", pa.int64(), nullable=False),
        pa.field("samples_seen", pa.int64(), nullable=False),
        pa.field("seen", pa.int64(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("measure", pa.string(), nullable=False),
        pa.field("values", pa.list_(pa.float64()), nullable=False),
        pa.field("mean", pa.float64(), nullable=False),
        pa.field("baseline", pa.string()),
        pa.field("difference", pa.float64()),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("verdict", pa.string()),
    ]
)
"""One row for each arm, budget, point of the learning curve, task and measure. `values` has one for each seed, and
`difference` is paired by seed, with its 95 % interval from `low` to `high`."""

Key = tuple[str, int, int]
"""Arm, budget and seed of a run."""
Curve = Sequence[Mapping[str, Any]]
"""The points of a run: `seen`, and `measures` by task and measure."""


@dataclass(frozen=True)
class Measured:
    """A measure of an arm.

    Attributes:
        arm: the arm.
        budget: samples that the whole run sees.
        seen: samples seen at this point.
        task: the task.
        measure: the measure.
        values: one for each seed.
        difference: to the baseline at the same point; None for the baseline itself and for arms of `how_much` alone.
    """

    arm: str
    budget: int
    seen: int
    task: str
    measure: str
    values: tuple[float, ...]
    difference: Difference | None = None

    @property
    def is_final(self) -> bool:
        """Whether the whole budget is spent."""
        return self.seen == self.budget

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return float(np.mean(self.values))


def measured(curves: Mapping[Key, Curve], baseline: str, compared: Iterable[str]) -> list[Measured]:
    """Return the measures of all runs, with the differences of the compared arms.

    Args:
        curves: the points of each run.
        baseline: the arm that others are compared with.
        compared: the arms that are compared.
    """
    found: dict[tuple[str, int, int, str, str], list[float]] = {}
    for (arm, budget, _), curve in sorted(curves.items(), key=lambda item: item[0][1:]):
        end = curve[-1]["seen"]
        for point in curve:
            seen = budget if point["seen"] == end else point["seen"]
            measures = dict(point["measures"])
            if len(measures) > 1:
                main = [value[name] for value in measures.values() for name in COMPARED if name in value]
                measures[MEAN] = {ACCURACY: float(np.mean(main))}
            for task, values in measures.items():
                for name, value in values.items():
                    found.setdefault((arm, budget, seen, task, name), []).append(value)
    wanted = set(compared) - {baseline}
    return [
        Measured(
            *key,
            tuple(values),
            paired_difference(np.array(values), np.array(found[(baseline, *key[1:])])) if key[0] in wanted else None,
        )
        for key, values in found.items()
    ]


def results_table(
    rows: Sequence[Measured],
    baseline: str,
    tier: str,
    arms: Mapping[str, tuple[str | None, str | None]],
    samples: Mapping[str, int],
) -> pa.Table:
    """Return the measures as the asset's table.

    Args:
        rows: the measures.
        baseline: the arm that others are compared with.
        tier: the evaluation's.
        arms: recipe and version of each arm.
        samples: samples of each arm.
    """
    listed = []
    for row in rows:
        recipe, version = arms[row.arm]
        listed.append(
            {
                "arm": row.arm,
                "recipe": recipe,
                "version": version,
                "tier": tier,
                "samples": samples[row.arm],
                "samples_seen": row.budget,
                "seen": row.seen,
                "task": row.task,
                "measure": row.measure,
                "values": list(row.values),
                "mean": row.mean,
                "baseline": baseline if row.difference is not None else None,
                "difference": row.difference.mean if row.difference is not None else None,
                "low": row.difference.low if row.difference is not None else None,
                "high": row.difference.high if row.difference is not None else None,
                "verdict": row.difference.verdict if row.difference is not None else None,
            }
        )
    return pa.Table.from_pylist(listed, SCHEMA)


def how_much_to_keep(
    rows: Sequence[Measured], settings: HowMuchSettings, samples: Mapping[str, int], pool: int
) -> list[BestFraction]:
    """Return the best fraction for each number of samples seen that the settings ask for.

    Args:
        rows: the measures.
        settings: `how_much` of the evaluation.
        samples: samples of each arm of `how_much`.
        pool: rows of the pool.
    """
    tasks = {row.task for row in rows}
    task = settings.task or (MEAN if MEAN in tasks else next(iter(tasks)))
    used = [r for r in rows if r.is_final and r.arm in samples and r.task == task and r.measure in COMPARED]
    fraction = np.array([samples[row.arm] / pool for row in used])
    seen = np.array([float(row.budget) for row in used])
    errors = 1 - np.array([row.values for row in used])
    errors = np.maximum(errors, 1e-6)
    return [best_fraction(fraction, seen, errors, pool=pool, at=at) for at in settings.samples_seen]
