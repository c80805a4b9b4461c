"""The study page: the figures of `assets.study.figures` as words, plots and tables in one HTML file.

Here: drawing and wording alone. Every sentence follows from the figures by a rule, whichever method wins or loses, and
nothing in the page depends on the time or the machine: the same figures give the same bytes. The page asks nobody else
for anything.
"""

import html
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from assets.study.figures import BEST, FAULTS, Interval, Sensitivity, Separation, Study, Variant
from assets.subsets.contact_sheets import data_url

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE_FILE, FIGURES_FILE = "index.html", "figures.json"
CONFIGURED = "as configured"
TOLD_OVERLAPS = 3  # in words; of more, the largest and the smallest
_COIN = 0.5
_COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#bf8700", "#57606a", "#d4a72c", "#bf3989")
_MARKERS = "osD^vPX*"
_AXES = {"τ": "temperature", "B": "batch_size", "K": "draws"}


def write_page(study: Study, folder: Path) -> Path:
    """Write the page and its figures as JSON into a folder; give the page's path.

    Args:
        study: the figures.
        folder: is made if it is not there; the two files in it are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(study.figures(), indent=1, ensure_ascii=False)
    (folder / FIGURES_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / PAGE_FILE).write_text(_page(study), encoding="utf-8")
    return folder / PAGE_FILE


# Words


def words(study: Study) -> list[tuple[str, str]]:
    """Say what the figures say: what each paragraph is about, and its sentences."""
    said = []
    if study.truth is None:
        said.append(("No truth was given", "so nothing is said of which score finds which fault (--truth)."))
    for group in study.separations:
        if group.within is None and group.auc:
            said.append(_separated(group, [g for g in study.separations if g.within == group.name]))
    said += [*_agreement(study), *_selections(study)]
    for sensitivity in study.sensitivities:
        said += _sensitive(sensitivity)
    return said


def _separated(group: Separation, variants: Sequence[Separation]) -> tuple[str, str]:
    best = group.best
    top = group.auc[best]
    if top.low > _COIN:
        text = f"{best} has the highest AUC, {_auc(top)}"
    else:
        text = f"no score is better than a coin; the highest AUC is that of {best}, {_auc(top)}"
    if group.covered[best] < 1:
        text += f" on the {group.covered[best]:.0%} of the rows that have it"
    others = sorted(group.ahead, key=lambda score: (-group.auc[score].value, score))
    if others:
        second, ahead = others[0], group.ahead[others[0]]
        overlap = "overlap" if group.auc[second].high >= top.low else "do not overlap"
        can = "cannot" if ahead.holds(0) else "can"
        text += f"; the next is {second} with {_auc(group.auc[second])}. The intervals {overlap}; "
        text += f"the paired difference, {_difference(ahead)}, {can} be told from 0"
    text += "."
    blind = [s for s in group.auc if group.auc[s].holds(_COIN) and s != best]
    inverse = [s for s in group.auc if group.auc[s].high < _COIN]
    if blind:
        text += f" Not to be told from a coin: {', '.join(blind)}."
    if inverse:
        above = "rank these rows below the others" if group.wanted else "rank the fault above clean rows"
        text += f" Worse than a coin, they {above}: {', '.join(inverse)}."
    reached = [v for v in variants if best in v.auc]
    if reached:
        hardest = min(reached, key=lambda v: v.auc[best].value)
        text += f" The variant on which {best} does worst is {_plain(hardest.name)} ({hardest.rows:,} rows): "
        text += f"{_auc(hardest.auc[best])}"
        if hardest.best != best:
            text += f"; there {hardest.best} is highest, {_auc(hardest.auc[hardest.best])}"
        text += "."
    name = _plain(group.name)
    return f"{name[0].upper()}{name[1:]}{' above others' if group.wanted else ''}, {group.rows:,} rows", text


def _agreement(study: Study) -> list[tuple[str, str]]:
    names = list(study.scores)
    pairs = [
        (study.spearman[i][j], names[j], names[i])
        for i in range(len(names))
        for j in range(i)
        if not math.isnan(study.spearman[i][j])
    ]
    if not pairs:
        return []
    most, least = max(pairs), min(pairs, key=lambda pair: abs(pair[0]))
    text = f"{most[1]} and {most[2]} rank the rows most alike (Spearman {_number(most[0])})"
    if len(pairs) > 1:
        text += f", {least[1]} and {least[2]} are least related ({_number(least[0])})"
    return [("Scores", text + ".")]


def _selections(study: Study) -> list[tuple[str, str]]:
    said = []
    told = sorted(study.overlaps, key=lambda overlap: -overlap.jaccard)
    for overlap in told if len(told) <= TOLD_OVERLAPS else (told[0], told[-1]):
        share_a, share_b = (overlap.rows_both / rows for rows in (overlap.rows_a, overlap.rows_b))
        text = (
            f"{overlap.rows_both:,} rows are in both, {share_a:.1%} of the one (by chance "
            f"{overlap.rows_b / study.pool_rows:.1%}) and {share_b:.1%} of the other (by chance "
            f"{overlap.rows_a / study.pool_rows:.1%}); Jaccard {overlap.jaccard:.3f}."
        )
        said.append((f"{overlap.a} and {overlap.b}", text))
    return said


def _sensitive(sensitivity: Sensitivity) -> list[tuple[str, str]]:
    configured, *others = sensitivity.variants
    text = ""
    for variant in others:
        if variant.what == "seed":
            text += f"Another seed alone leaves {_left(variant)}: so much is the chance of the draw. "
    for what in _AXES:
        settings = [v for v in others if v.what == what]
        if settings:
            far = min(settings, key=lambda v: v.spearman)
            text += f"{what} alone changes most at {_setting(far)}, which leaves {_left(far)}. "
    for variant in others:
        if variant.what == "estimator":
            beside = "" if variant.batch_size == configured.batch_size else f" with B = {variant.batch_size:,}"
            text += f"{_setting(variant).capitalize()}{beside} leave {_left(variant)}. "
    said = [(sensitivity.score, text)]
    judged = [(v, v.gain) for v in others if v.gain is not None]
    if judged and configured.all_faults is not None:
        better = [f"{_setting(v)} ({_small(g.value)})" for v, g in judged if g.low > 0]
        worse = [f"{_setting(v)} ({_small(g.value)})" for v, g in judged if g.high < 0]
        text = (
            f"AUC {_auc(configured.all_faults)} as configured. To be told from that and higher: "
            f"{', '.join(better) or 'none'}; lower: {', '.join(worse) or 'none'}; not to be told from it: "
            f"{', '.join(_setting(v) for v, g in judged if g.holds(0)) or 'none'}."
        )
        said.append((f"{sensitivity.score} and all faults", text))
    return said


def _left(variant: Variant) -> str:
    if math.isnan(variant.best_overlap):
        return f"Spearman {variant.spearman:.4f}"
    return f"Spearman {variant.spearman:.4f} and {variant.best_overlap:.1%} of the best {BEST:.0%}"


def _setting(variant: Variant) -> str:
    return {
        "τ": f"τ = {variant.temperature:.3g}",
        "B": f"B = {variant.batch_size:,}",
        "K": f"K = {variant.draws}",
        "seed": "another seed",
        "estimator": _plain(variant.estimator),
    }.get(variant.what, variant.what)


def _auc(interval: Interval) -> str:
    return f"{_number(interval.value)}{_bounds(interval, _number)}"


def _difference(interval: Interval) -> str:
    return f"{_small(interval.value)}{_bounds(interval, _small)}"


def _bounds(interval: Interval, write: Callable[[float], str]) -> str:
    return "" if math.isnan(interval.low) else f" [{write(interval.low)}, {write(interval.high)}]"


def _number(value: float) -> str:
    """Write with three places, and where it is just below 1 with as many as show that."""
    missing = 1 - value
    places = min(9, math.ceil(-math.log10(missing))) if 0 < missing < 0.0005 else 3
    return f"{value:.{places}f}".replace("-", "−")


def _small(value: float) -> str:
    """Write with two significant digits, so that the sign of a small difference shows."""
    return f"{value:.2g}".replace("-", "−")


def _plain(name: str) -> str:
    return name.replace("_", " ")


# The page


def _page(study: Study) -> str:
    escape = html.escape
    title = f"Study of {study.project}"
    sections = [_section("What the figures say", f"<ul>{_items(words(study))}</ul>")]
    if study.truth is not None:
        sections.append(_section("Separation of each fault", _separation_section(study)))
    sections.append(_section("Agreement of the scores", _agreement_section(study)))
    if study.selections:
        sections.append(_section("Overlap of the selections", _overlap_section(study)))
    sections += [
        _section(f"Sensitivity of {s.score}", _sensitivity_section(s, study.resamples)) for s in study.sensitivities
    ]
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _facts(study))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n<dl>{facts}</dl>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _facts(study: Study) -> Iterable[tuple[str, str]]:
    chosen = "all" if study.rows == study.pool_rows else "those of the smallest keyed hash of the uid"
    if study.truth is not None and study.rows < study.pool_rows:
        chosen += f", of those in {study.truth}"
    yield "rows studied", f"{study.rows:,} of the pool's {study.pool_rows:,} ({chosen})"
    if study.truth is not None:
        kinds = ", ".join(f"{_plain(kind)} {rows:,}" for kind, rows in study.kinds.items())
        absent = f"; {study.unknown:,} of its uids are not in the pool" if study.unknown else ""
        yield "truth", f"{study.truth}: {kinds}{absent}"
    partly = [f"{name} ({rows:,} rows)" for name, rows in study.scores.items() if rows < study.rows]
    if partly:
        yield "not on every row", ", ".join(partly)
    if study.left_out:
        yield "not compared", f"{', '.join(study.left_out)}: they rank nothing, or no studied row has them"


def _separation_section(study: Study) -> str:
    names = list(study.scores)
    rows = []
    for group in study.separations:
        label = _plain(group.name)
        if group.wanted:
            label = f"{label} above the others"
        cells = [
            f'<th class="{"variant" if group.within else "kind"}">{html.escape(label)}</th><td>{group.rows:,}</td>'
        ]
        for name in names:
            found = group.auc.get(name)
            first = name == (group.best if group.auc else None)
            tied = first or (name in group.ahead and group.ahead[name].holds(0))
            cells.append("<td>–</td>" if found is None else f"<td>{_cell(found, _number, strong=tied)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{_broken(name)}</th>" for name in ("fault", "rows", *names))
    return (
        _chart(_separation_figure(study), "AUC of every score for every fault")
        + f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
        + _note(
            "AUC: the chance that a clean row scores above a faulty one, ties half; 0.5 is a coin. Exact, by ranks. "
            f"In brackets the 95 % percentile interval of {study.resamples:,} resamples, clean and faulty rows "
            "resampled each by themselves and the same for every score. Bold: the highest, and what can't be told "
            "from it by the paired difference. Each interval stands for itself; with so many, some miss. They say how "
            "far chance in the choice of rows goes, not whether another pool would give the same. Near 1 few pairs are "
            "out of order, and the interval is too narrow if there are few rows."
        )
    )


def _agreement_section(study: Study) -> str:
    names = list(study.scores)
    return _chart(
        _matrix_figure([("Spearman's rank correlation", names, np.array(study.spearman), (-1, 1), "RdBu_r")]),
        "Rank correlation of each two scores",
    ) + _note(
        "Over the studied rows that have both scores; equal values have their mean rank. Clean and faulty rows "
        "together, so two scores that both find the faults agree for that reason alone."
    )


def _overlap_section(study: Study) -> str:
    names = list(study.selections)
    place = {name: i for i, name in enumerate(names)}
    jaccard, share = (np.eye(len(names)) for _ in range(2))
    for o in study.overlaps:
        a, b = place[o.a], place[o.b]
        jaccard[a, b] = jaccard[b, a] = o.jaccard
        share[a, b], share[b, a] = o.rows_both / o.rows_a, o.rows_both / o.rows_b
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{rows:,}</td><td>{rows / study.pool_rows:.1%}</td></tr>"
        for name, rows in study.selections.items()
    )
    table = f"<table><tr><th>recipe</th><th>rows</th><th>of the pool</th></tr>{rows}</table>"
    if len(names) < 2:
        return table + _note("There is one selection, so there is nothing to compare.")
    panels = [
        ("Jaccard", names, jaccard, (0.0, 1.0), "Blues"),
        ("Share of the row's selection in the column's", names, share, (0.0, 1.0), "Blues"),
    ]
    return (
        _chart(_matrix_figure(panels), "Overlap of each two selections")
        + table
        + _note(
            "Of the newest versions, over the whole pool. By chance, the share of a selection that lies in another is "
            "the other's share of the pool."
        )
    )


def _sensitivity_section(sensitivity: Sensitivity, resamples: int) -> str:
    faults = list(sensitivity.variants[0].auc)
    head = ["setting", "τ", "B", "K", "estimator", "Spearman", f"best {BEST:.0%} kept", *map(_plain, faults)]
    if FAULTS in faults:
        head.append("all faults, less as configured")
    rows = []
    for v in sensitivity.variants:
        cells = [f"{v.temperature:.4g}", f"{v.batch_size:,}", str(v.draws), _plain(v.estimator)]
        cells += [f"{v.spearman:.4f}", "–" if math.isnan(v.best_overlap) else f"{v.best_overlap:.1%}"]
        cells += [_number(v.auc[fault]) for fault in faults]
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        if FAULTS in faults:
            same = v.gain is None or v.what == CONFIGURED
            row += f"<td>{'' if same or v.gain is None else _cell(v.gain, _small, strong=not v.gain.holds(0))}</td>"
        rows.append(f"<tr><th>{html.escape(v.what)}</th>{row}</tr>")
    change = sensitivity.largest_change
    again = (
        f"they differ from the stored score by {change:.2g} at most" if change else "they are the stored score exactly"
    )
    text = (
        f"{sensitivity.rows:,} rows scored again from their stored embeddings, by the functions that made the score. "
        f"As configured, {again}. Spearman and the best {BEST:.0%} are against the stored score. Smaller B and K are "
        "parts of the same draws, so they agree with it more than another draw of their size would; the line of "
        "another seed tells how far a draw alone moves it. Random partitions are of the studied rows as if they were "
        "one shard."
    )
    if FAULTS in faults:
        text += (
            f" Columns of faults are AUCs; the last is the paired difference with the 95 % interval of {resamples:,} "
            "resamples, bold where it excludes 0. A setting that is chosen by this table needs another truth to be "
            "judged by."
        )
    titles = "".join(f"<th>{_broken(name)}</th>" for name in head)
    return (
        _chart(_sensitivity_figure(sensitivity), f"{sensitivity.score} under other settings")
        + f'<div class="wide"><table class="dense"><tr>{titles}</tr>{"".join(rows)}</table></div>'
        + _note(text)
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def _items(said: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<li><b>{html.escape(lead)}:</b> {html.escape(text)}</li>" for lead, text in said)


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _broken(name: str) -> str:
    return html.escape(name).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _cell(interval: Interval, write: Callable[[float], str], *, strong: bool) -> str:
    value, bounds = (html.escape(text) for text in (write(interval.value), _bounds(interval, write)))
    return f"{f'<b>{value}</b>' if strong else value}<small>{bounds}</small>"


# Plots


def _chart(figure: "Figure", text: str) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    width = round(figure.get_figwidth() * 96)
    return f'<img class="chart" width="{width}" src="{data_url(out.getvalue(), "png")}" alt="{html.escape(text)}">'


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def _separation_figure(study: Study) -> "Figure":
    """Draw the AUC with its interval: a band for each fault and property, a line in it for each score."""
    groups = [group for group in study.separations if group.within is None]
    names = list(study.scores)
    figure = _figure(9.6, 0.9 + len(groups) * (0.22 + 0.13 * len(names)))
    axes = figure.subplots()
    axes.axvline(_COIN, color="#8c959f", linewidth=1, linestyle="--")
    for i, name in enumerate(names):
        offset = (i - (len(names) - 1) / 2) * 0.75 / max(len(names), 1)
        found = [(at + offset, group.auc[name]) for at, group in enumerate(groups) if name in group.auc]
        marker = _MARKERS[(i // len(_COLOURS)) % len(_MARKERS)]
        look = {"color": _COLOURS[i % len(_COLOURS)], "fmt": marker, "label": name}
        _bars(axes, [y for y, _ in found], [f for _, f in found], look, across=True)
    for at in range(len(groups)):
        if at % 2:
            axes.axhspan(at - 0.5, at + 0.5, color="#f6f8fa", zorder=0)
    labels = [f"{_plain(g.name)}{' above others' if g.wanted else ''}\n{g.rows:,} rows" for g in groups]
    axes.set_yticks(range(len(groups)), labels)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel("AUC")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper left", ncols=min(4, len(names)), frameon=False, fontsize=9)
    return figure


def _bars(
    axes: "Axes", at: Sequence[float], found: Sequence[Interval], look: dict[str, Any], *, across: bool = False
) -> None:
    """Draw figures with their intervals at places of the other axis."""
    values = np.array([f.value for f in found])
    spread = np.array([[f.value - f.low for f in found], [f.high - f.value for f in found]]).clip(0)
    options = {"fmt": "o", "markersize": 5, "linewidth": 1.6, "capsize": 2, **look}
    if across:
        axes.errorbar(values, at, xerr=spread, **options)
    else:
        axes.errorbar(at, values, yerr=spread, **options)


def _matrix_figure(panels: Sequence[tuple[str, list[str], np.ndarray, tuple[float, float], str]]) -> "Figure":
    """Draw square matrices side by side, each with a title, names, values, their range and its colours."""
    size = max(len(panels[0][1]), 3)
    figure = _figure(min(11.4, len(panels) * (0.62 * size + 2.6)), 0.5 * size + 1.9)
    for axes, (title, names, values, (low, high), colours) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        axes.imshow(values, vmin=low, vmax=high, cmap=colours, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            text = "–" if math.isnan(value) else f"{value:.2f}"
            dark = not math.isnan(value) and abs(value) > 0.6 * high
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "#1c2128")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(range(len(names)), names if axes is figure.axes[0] else [], fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=10)
    return figure


def _sensitivity_figure(sensitivity: Sensitivity) -> "Figure":
    """Draw rank correlation and overlap, and the change of the AUC, along τ, B and K."""
    configured = sensitivity.variants[0]
    seed = next((v for v in sensitivity.variants if v.what == "seed"), None)
    judged = configured.gain is not None
    figure = _figure(10.4, 4.6 if judged else 2.6)
    grid = figure.subplots(2 if judged else 1, 3, squeeze=False, sharex="col", sharey="row")
    for column, (what, field) in enumerate(_AXES.items()):
        line = sorted(
            [v for v in sensitivity.variants if v.what == what] + [configured], key=lambda v: float(getattr(v, field))
        )
        at = [float(getattr(v, field)) for v in line]
        top = grid[0][column]
        top.plot(at, [v.spearman for v in line], "o-", color=_COLOURS[0], label="Spearman")
        top.plot(at, [v.best_overlap for v in line], "s-", color=_COLOURS[4], label=f"best {BEST:.0%} kept")
        if seed is not None:
            top.axhline(seed.spearman, color=_COLOURS[0], linewidth=1, linestyle=":", label="the same, another seed")
            top.axhline(seed.best_overlap, color=_COLOURS[4], linewidth=1, linestyle=":")
        if judged:
            low = grid[1][column]
            low.axhline(0, color="#8c959f", linewidth=1, linestyle="--")
            _bars(low, at, [v.gain for v in line if v.gain is not None], {"color": _COLOURS[3]})
        for axes in grid[:, column]:
            axes.axvline(float(getattr(configured, field)), color="#d0d7de", linewidth=6, zorder=0)
            axes.set_xscale("log")
            axes.set_xticks(at, [f"{x:.2g}" if x < 1 else f"{x:,.0f}" for x in at])
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
        grid[-1][column].set_xlabel(what)
    grid[0][0].set_ylabel("against the stored score", fontsize=9)
    if judged:
        grid[1][0].set_ylabel("AUC of all faults,\nless as configured", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


_STYLE = """
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;color:#1c2128;background:#fff;
margin:2rem auto;max-width:1100px;padding:0 1.5rem}
h1{font-size:1.6rem;margin:0 0 1rem}h2{font-size:1.15rem;margin:2.4rem 0 .6rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.2rem;margin:0}dt{color:#57606a}dd{margin:0}
ul{margin:0;padding-left:1.2rem}li{margin:.35rem 0;overflow-wrap:anywhere}
table{border-collapse:collapse;margin-top:.8rem;font-variant-numeric:tabular-nums}
th,td{border-bottom:1px solid #d8dee4;padding:.3rem 1.1rem .3rem 0;text-align:right;vertical-align:top}
th{color:#57606a;font-weight:600}th:first-child,td:first-child{text-align:left}
tr>th.kind{color:#1c2128}tr>th:first-child{white-space:nowrap}tr>th.variant{font-weight:400;padding-left:1rem}
td small{display:block;color:#6e7781;font-size:.72rem;white-space:nowrap}
table.dense{font-size:.8rem}table.dense th,table.dense td{padding-right:.7rem}
td:nth-child(5){white-space:nowrap}.wide{overflow-x:auto}.note{color:#57606a;font-size:.86rem;max-width:60rem}.chart{max-width:100%;height:auto;display:block}
""".replace("\n", "")
