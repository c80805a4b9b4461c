"""The plots of the study page, as PNG in `data:` URLs."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from assets.base.pages import data_url
from assets.study.numbers import plain
from assets.study.results import BEST, CHANCE, Interval, Sensitivity, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#bf8700", "#57606a", "#d4a72c", "#bf3989")
_MARKERS = "osD^vPX*"
_AXES = {"τ": "temperature", "B": "batch_size", "K": "draws"}


@dataclass(frozen=True)
class Plot:
    """A plot: its picture as a URL, its width on the page in pixels, and the text in its place."""

    url: str
    width: int
    text: str


@dataclass(frozen=True)
class Panel:
    """A square matrix to draw: title, names of rows and columns, values, range of the colours, and colour map."""

    title: str
    names: list[str]
    values: np.ndarray
    limits: tuple[float, float]
    colours: str


def separation_plot(study: Study) -> Plot:
    """Draw every AUC with its interval: a band for each fault and property, a line in it for each score."""
    groups = [group for group in study.separations if group.within is None]
    names = list(study.scores)
    figure = _figure(9.6, 0.9 + len(groups) * (0.22 + 0.13 * len(names)))
    axes = figure.subplots()
    axes.axvline(CHANCE, color="#8c959f", linewidth=1, linestyle="--")
    for i, name in enumerate(names):
        offset = (i - (len(names) - 1) / 2) * 0.75 / max(len(names), 1)
        found = [(at + offset, group.auc[name]) for at, group in enumerate(groups) if name in group.auc]
        marker = _MARKERS[(i // len(_COLOURS)) % len(_MARKERS)]
        look = {"color": _COLOURS[i % len(_COLOURS)], "fmt": marker, "label": name}
        _bars(axes, [y for y, _ in found], [f for _, f in found], look, across=True)
    for at in range(len(groups)):
        if at % 2:
            axes.axhspan(at - 0.5, at + 0.5, color="#f6f8fa", zorder=0)
    labels = [f"{plain(g.name)}{' above others' if g.wanted else ''}\n{g.rows:,} rows" for g in groups]
    axes.set_yticks(range(len(groups)), labels)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel("AUC")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper left", ncols=min(4, len(names)), frameon=False, fontsize=9)
    return _plot(figure, "AUC of every score for every fault")


def matrix_plot(panels: Sequence[Panel], text: str) -> Plot:
    """Draw square matrices side by side."""
    size = max(len(panels[0].names), 3)
    figure = _figure(min(11.4, len(panels) * (0.62 * size + 2.6)), 0.5 * size + 1.9)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        low, high = panel.limits
        axes.imshow(panel.values, vmin=low, vmax=high, cmap=panel.colours, aspect="auto")
        for (row, column), value in np.ndenumerate(panel.values):
            written = "–" if math.isnan(value) else f"{value:.2f}"
            dark = not math.isnan(value) and abs(value) > 0.6 * high
            colour = "white" if dark else "#1c2128"
            axes.text(column, row, written, ha="center", va="center", fontsize=9, color=colour)
        places = range(len(panel.names))
        axes.set_xticks(places, panel.names, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(places, panel.names if axes is figure.axes[0] else [], fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(panel.title, fontsize=10)
    return _plot(figure, text)


def sensitivity_plot(sensitivity: Sensitivity) -> Plot:
    """Draw rank correlation and overlap, and the change of the AUC where there is one, along τ, B and K."""
    judged = sensitivity.variants[0].gain is not None
    figure = _figure(10.4, 4.6 if judged else 2.6)
    grid = figure.subplots(2 if judged else 1, 3, squeeze=False, sharex="col", sharey="row")
    for column, (what, field) in enumerate(_AXES.items()):
        _sensitivity_column([row[column] for row in grid], sensitivity, what, field)
    grid[0][0].set_ylabel("against the stored score", fontsize=9)
    if judged:
        grid[1][0].set_ylabel("AUC of all faults,\nless as configured", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return _plot(figure, f"{sensitivity.score} under other settings")


def _sensitivity_column(column: Sequence["Axes"], sensitivity: Sensitivity, what: str, field: str) -> None:
    """Draw one setting: agreement with the stored score on top, the change of the AUC below it."""
    configured = sensitivity.variants[0]
    seed = next((v for v in sensitivity.variants if v.what == "seed"), None)
    line = [*(v for v in sensitivity.variants if v.what == what), configured]
    line.sort(key=lambda v: float(getattr(v, field)))
    at = [float(getattr(v, field)) for v in line]
    top = column[0]
    top.plot(at, [v.spearman for v in line], "o-", color=_COLOURS[0], label="Spearman")
    top.plot(at, [v.best_overlap for v in line], "s-", color=_COLOURS[4], label=f"best {BEST:.0%} kept")
    if seed is not None:
        top.axhline(seed.spearman, color=_COLOURS[0], linewidth=1, linestyle=":", label="the same, another seed")
        top.axhline(seed.best_overlap, color=_COLOURS[4], linewidth=1, linestyle=":")
    for below in column[1:]:
        below.axhline(0, color="#8c959f", linewidth=1, linestyle="--")
        _bars(below, at, [v.gain for v in line if v.gain is not None], {"color": _COLOURS[3]})
    for axes in column:
        axes.axvline(float(getattr(configured, field)), color="#d0d7de", linewidth=6, zorder=0)
        axes.set_xscale("log")
        axes.set_xticks(at, [f"{x:.2g}" if x < 1 else f"{x:,.0f}" for x in at])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    column[-1].set_xlabel(what)


def _bars(
    axes: "Axes", at: Sequence[float], found: Sequence[Interval], look: dict[str, Any], *, across: bool = False
) -> None:
    """Draw values with their intervals at positions on the other axis."""
    values = np.array([f.value for f in found])
    spread = np.array([[f.value - f.low for f in found], [f.high - f.value for f in found]]).clip(0)
    options = {"fmt": "o", "markersize": 5, "linewidth": 1.6, "capsize": 2, **look}
    if across:
        axes.errorbar(values, at, xerr=spread, **options)
    else:
        axes.errorbar(at, values, yerr=spread, **options)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def _plot(figure: "Figure", text: str) -> Plot:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})  # the version of matplotlib would change the bytes
    return Plot(data_url(out.getvalue(), "png"), round(figure.get_figwidth() * 96), text)
