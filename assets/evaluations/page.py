"""The report page of an evaluation: one sentence each on what it shows and does not show, tables, learning curves.

Here: the texts and the layout. Not here: the numbers (`assets.evaluations.results`).
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from assets.base.pages import data_url, render
from assets.evaluations.arms import OWN_SIZE, Samples
from assets.evaluations.results import MEAN, Measured
from resources.lake.files import Lake
from resources.training.measures import COMPARED
from resources.training.settings import EvaluationSettings
from selection.evaluation.paired import Difference
from selection.evaluation.scaling_law import BestFraction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE_FILE = "index.html"
_COLOURS = ("#57606a", "#0969da", "#1a7f37", "#cf222e", "#8250df", "#bf8700", "#bf3989", "#d4a72c")
_TIERS = {
    "heads": "heads: two linear heads on frozen embeddings, a proxy for training",
    "small": "small: small towers trained from scratch",
    "full": "full: a model trained from scratch",
}


@dataclass(frozen=True)
class Evaluated:
    """An evaluation with its results.

    Attributes:
        name: its name.
        settings: its settings.
        measures: the measures of all arms.
        samples: the samples of all arms.
        sizes: samples of each arm.
        pool_rows: rows of the pool.
        law: the best fraction for each number of samples seen that `how_much` asks for.
        seconds: how long the last run of it took.
    """

    name: str
    settings: EvaluationSettings
    measures: Sequence[Measured]
    samples: Samples
    sizes: Mapping[str, int]
    pool_rows: int
    law: Sequence[BestFraction]
    seconds: float

    @property
    def final(self) -> list[Measured]:
        """The compared measures at the end of each budget, of the arms that are compared."""
        return [
            row for row in self.measures if row.is_final and row.measure in COMPARED and row.arm in self.settings.arms
        ]

    @property
    def summary(self) -> dict[str, Any]:
        """Return the statistics that the asset's record keeps, JSON values."""
        return {
            "tier": self.settings.tier,
            "baseline": self.settings.compared_with,
            "seeds": self.settings.train.seeds,
            "evaluation_images_found_in_arms": dict(self.samples.found),
            "rows_removed_from_arms": int(self.samples.removed.sum()),
            "samples": dict(self.sizes),
            "shows": " ".join(shows(self)),
            "does_not_show": does_not_show(self.settings),
            **({"how_much": [how_much(best, self) for best in self.law]} if self.law else {}),
        }


def write_page(lake: Lake, found: Evaluated) -> str:
    """Write the page of an evaluation, and return its path in the lake."""
    path = f"evaluation/{found.name}/{PAGE_FILE}"
    budgets = found.settings.train.samples_seen
    text = render(
        "evaluation.html",
        title=f"evaluation/{found.name}",
        about=dict(_about(found)),
        shows=shows(found),
        does_not_show=does_not_show(found.settings),
        how_much=[how_much(best, found) for best in found.law],
        tables=[(f"After {budget:,} samples seen", _table(found, budget)) for budget in budgets],
        curves=[(f"Budget of {budget:,} samples", _curves(found, budget)) for budget in budgets],
        baseline=found.settings.compared_with,
    )
    lake.put(f"{lake.root}/{path}", text.encode())
    return path


def _about(found: Evaluated) -> Iterator[tuple[str, str]]:
    settings, train = found.settings, found.settings.train
    yield "tier", _TIERS[settings.tier]
    model = {"heads": f"encoder {settings.encoder}", "small": "small_towers"}.get(settings.tier, train.model or "")
    side = f", {train.image_size} pixels" if train.image_size is not None else ""
    yield "model", f"{model}{side}"
    budgets = " and ".join(f"{budget:,}" for budget in train.samples_seen)
    yield "training budget", f"{budgets} samples seen, in batches of {train.batch_size:,}; {train.seeds} seeds"
    for arm, size in found.sizes.items():
        passes = ", ".join(f"{budget / size:.3g}" for budget in train.samples_seen)
        version = next((a.version for a in found.samples.arms if a.name == arm), None)
        yield f"arm {arm}", f"{f'{version}, ' if version else ''}{size:,} samples, seen {passes} times"
    listed = ", ".join(f"{task} {count:,}" for task, count in found.samples.found.items())
    removed = int(found.samples.removed.sum())
    yield "evaluation images in arms", f"{listed}; {removed:,} rows were removed from every arm"
    yield "duration", f"{timedelta(seconds=round(found.seconds))} (of the run that completed it)"


# Sentences


def shows(found: Evaluated) -> list[str]:
    """Return one sentence for each budget on which arms are better or worse than the baseline."""
    baseline = found.settings.compared_with
    proxy = "As a proxy, linear heads on frozen embeddings after" if found.settings.tier == "heads" else "After"
    sentences = []
    for budget in found.settings.train.samples_seen:
        of_budget = [row for row in found.final if row.budget == budget and row.task != MEAN and row.arm != baseline]
        tasks = list(dict.fromkeys(row.task for row in of_budget))
        parts = [
            f"{_joined(arms)} {'is' if len(arms) == 1 else 'are'} {verdict} than {baseline} on "
            f"{_joined(on) if len(on) < len(tasks) or len(tasks) == 1 else 'every task'}"
            for verdict in ("better", "worse")
            for on, arms in _with_verdict(of_budget, verdict).items()
        ]
        unclear = len([row for row in of_budget if _verdict(row) == "inconclusive"])
        rest = f"{unclear} of {len(of_budget)} comparisons are inconclusive" if unclear else "none is inconclusive"
        clear = "; ".join(parts) if parts else f"no arm differs clearly from {baseline}"
        sentences.append(f"{proxy} {budget:,} samples seen, {clear}; {rest}.")
    return sentences


def _verdict(row: Measured) -> str:
    return "" if row.difference is None else row.difference.verdict


def _with_verdict(rows: Sequence[Measured], verdict: str) -> dict[tuple[str, ...], list[str]]:
    """Return the arms with a verdict, by the tasks on which they have it."""
    by_arm: dict[str, tuple[str, ...]] = {}
    for row in rows:
        if _verdict(row) == verdict:
            by_arm[row.arm] = (*by_arm.get(row.arm, ()), row.task)
    found: dict[tuple[str, ...], list[str]] = {}
    for arm, on in by_arm.items():
        found.setdefault(on, []).append(arm)
    return found


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def does_not_show(settings: EvaluationSettings) -> str:
    """Return one sentence on what the result does not show."""
    proxy = "that training from scratch gives the same order, nor " if settings.tier == "heads" else ""
    return (
        f"It does not show {proxy}the order at another budget, size of subset, model or task: rankings of filters "
        "change with the budget. The intervals cover the seeds, and not the choice of evaluation images or of the pool."
    )


def how_much(best: BestFraction, found: Evaluated) -> str:
    """Return one sentence on how much to keep for a number of samples seen."""
    interval = "" if math.isnan(best.low) else f" (90 % interval {best.low:.1%} to {best.high:.1%} of the pool)"
    if best.fraction is None:
        return f"{best.seen:,.0f} samples seen: the runs do not determine how much to keep: {best.why}{interval}."
    wanted = found.settings.how_much
    assert wanted is not None
    trained = sorted(
        found.sizes[arm] / found.pool_rows for arm in found.sizes if arm.removesuffix(OWN_SIZE) in wanted.arms
    )
    edge = ""
    if best.fraction <= trained[0] * 1.01:
        edge = " It is the smallest fraction that was trained; less may be better."
    elif best.fraction >= trained[-1] * 0.99:
        edge = " It is the largest fraction that was trained; more may be better."
    return f"{best.seen:,.0f} samples seen: keep {best.fraction:.1%} of the pool{interval}.{edge}"


# Tables and curves


@dataclass(frozen=True)
class _Cell:
    text: str
    small: Sequence[str] = ()
    strong: bool = False


def _table(found: Evaluated, budget: int) -> dict[str, Any]:
    """Return the means of every arm and task, with the difference to the baseline."""
    rows = [row for row in found.final if row.budget == budget]
    tasks = list(dict.fromkeys(_heading(row) for row in rows))
    cells = {(row.arm, _heading(row)): _cell(row) for row in rows}
    body = [(arm, [cells[arm, task] for task in tasks]) for arm in found.settings.arms]
    return {"head": ["arm", *tasks], "rows": body}


def _heading(row: Measured) -> str:
    return row.task if row.task == MEAN else f"{row.task}, {row.measure.replace('_', ' ')}"


def _cell(row: Measured) -> _Cell:
    if row.difference is None:
        return _Cell(f"{row.mean:.1%}", ["baseline"])
    is_clear = row.difference.verdict != "inconclusive"
    return _Cell(f"{row.mean:.1%}", [_difference(row.difference), *([] if is_clear else ["inconclusive"])], is_clear)


def _difference(difference: Difference) -> str:
    """Return a difference in percentage points with its interval."""
    interval = "" if math.isnan(difference.low) else f" [{difference.low * 100:+.1f}, {difference.high * 100:+.1f}]"
    return f"{difference.mean * 100:+.1f}{interval}".replace("-", "−")


def _curves(found: Evaluated, budget: int) -> str:
    """Return a PNG, as a URL, of the measures over the samples seen, with the range over the seeds."""
    from matplotlib.figure import Figure

    rows = [row for row in found.measures if row.budget == budget and row.measure in COMPARED]
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(4.2 * len(tasks), 3.2), dpi=110, layout="constrained")
    grid = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(grid, tasks, strict=True):
        for number, arm in enumerate(dict.fromkeys(row.arm for row in rows)):
            line = sorted((r for r in rows if r.arm == arm and r.task == task), key=lambda row: row.seen)
            _line(axes, line, arm, _COLOURS[number % len(_COLOURS)])
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("samples seen")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3, frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return data_url(out.getvalue(), "png")


def _line(axes: "Axes", line: Sequence[Measured], arm: str, colour: str) -> None:
    seen = [row.seen for row in line]
    axes.plot(seen, [row.mean * 100 for row in line], "o-", markersize=3, linewidth=1.5, color=colour, label=arm)
    low, high = ([bound(row.values) * 100 for row in line] for bound in (min, max))
    axes.fill_between(seen, low, high, color=colour, alpha=0.12, linewidth=0)
