"""The study page: the statistics of a study as findings, plots and tables in one HTML file.

Here: writing the two files, and laying out the tables. Not here: the sentences (`findings`) and the plots (`plots`).
The same statistics give the same bytes: nothing on the page depends on the time or the machine.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from assets.base.pages import render
from assets.study.findings import findings
from assets.study.numbers import bounds, plain, rate, small
from assets.study.plots import Panel, Plot, matrix_plot, sensitivity_plot, separation_plot
from assets.study.results import (
    BEST,
    CONFIGURED,
    FAULTS,
    POOL,
    SAMPLE,
    SIMILAR,
    TARGET_OVERLAP,
    Interval,
    Sensitivity,
    Study,
)

PAGE_FILE, FIGURES_FILE = "index.html", "figures.json"


def write_page(study: Study, folder: Path) -> Path:
    """Write the page, and its statistics as JSON, into a folder.

    Args:
        study: The statistics.
        folder: The folder; it is created if it does not exist, and the two files in it are replaced.

    Returns:
        The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(study.as_dict(), indent=1, ensure_ascii=False)
    (folder / FIGURES_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / PAGE_FILE).write_text(_page(study), encoding="utf-8")
    return folder / PAGE_FILE


def _page(study: Study) -> str:
    spearman = Panel("Spearman's rank correlation", list(study.scores), np.array(study.spearman), (-1, 1), "RdBu_r")
    separation = {"plot": separation_plot(study), "table": _separation_table(study)} if study.truth is not None else {}
    return render(
        "study.html",
        title=f"Study of {study.project}",
        about=dict(_about(study)),
        findings=findings(study),
        separation=separation,
        agreement=matrix_plot([spearman], "Rank correlation of each two scores"),
        overlap={"plot": _overlap_plot(study), "table": _overlap_table(study)} if study.selections else {},
        cascades=_cascade_table(study) if study.cascades else None,
        sets=[{"encoder": encoder, "table": _set_table(study, encoder)} for encoder in _encoders(study)],
        similar=f"{SIMILAR:g}",
        sampled=f"{SAMPLE:,}",
        sensitivities=[_sensitivity(sensitivity) for sensitivity in study.sensitivities],
        resamples=f"{study.resamples:,}",
        best=f"{BEST:.0%}",
    )


def _about(study: Study) -> Iterator[tuple[str, str]]:
    chosen = "all" if study.rows == study.pool_rows else "those with the smallest keyed hash of the uid"
    if study.truth is not None and study.rows < study.pool_rows:
        chosen += f", of those in {study.truth}"
    yield "rows studied", f"{study.rows:,} of the pool's {study.pool_rows:,} ({chosen})"
    if study.truth is not None:
        kinds = ", ".join(f"{plain(kind)} {rows:,}" for kind, rows in study.kinds.items())
        absent = f"; {study.unknown:,} of its uids are not in the pool" if study.unknown else ""
        yield "truth", f"{study.truth}: {kinds}{absent}"
    partly = [f"{name} ({rows:,} rows)" for name, rows in study.scores.items() if rows < study.rows]
    if partly:
        yield "not on every row", ", ".join(partly)
    if study.left_out:
        yield "not compared", f"{', '.join(study.left_out)}: these do not rank, or no studied row has them"


# Tables


@dataclass(frozen=True)
class _Cell:
    text: str
    bounds: str = ""
    strong: bool = False


@dataclass(frozen=True)
class _Row:
    label: str
    cells: Sequence[_Cell]
    style: str = ""


@dataclass(frozen=True)
class _Table:
    head: Sequence[str]
    rows: Sequence[_Row]


def _interval(interval: Interval, write: Callable[[float], str], *, strong: bool) -> _Cell:
    return _Cell(write(interval.value), bounds(interval, write), strong)


def _cells(texts: Iterable[str]) -> list[_Cell]:
    return [_Cell(text) for text in texts]


def _separation_table(study: Study) -> _Table:
    """Return the AUC of every score for every fault; bold: the highest, and those not clearly below it."""
    rows = []
    for group in study.separations:
        cells = _cells([f"{group.rows:,}"])
        for name in study.scores:
            auc = group.auc.get(name)
            if auc is None:
                cells.append(_Cell("–"))
                continue
            tied = name == group.best or (name in group.ahead and group.ahead[name].holds(0))
            cells.append(_interval(auc, rate, strong=tied))
        label = f"{plain(group.name)}{' above the others' if group.wanted else ''}"
        rows.append(_Row(label, cells, "variant" if group.within else "kind"))
    return _Table(["fault", "rows", *study.scores], rows)


def _overlap_table(study: Study) -> _Table:
    rows = [_Row(name, _cells([f"{n:,}", f"{n / study.pool_rows:.1%}"])) for name, n in study.selections.items()]
    return _Table(["recipe", "rows", "of the pool"], rows)


def _overlap_plot(study: Study) -> Plot | None:
    names = list(study.selections)
    if len(names) < 2:
        return None
    place = {name: i for i, name in enumerate(names)}
    jaccard, share = np.eye(len(names)), np.eye(len(names))
    for o in study.overlaps:
        a, b = place[o.a], place[o.b]
        jaccard[a, b] = jaccard[b, a] = o.jaccard
        share[a, b], share[b, a] = o.rows_both / o.rows_a, o.rows_both / o.rows_b
    panels = [
        Panel("Jaccard", names, jaccard, (0.0, 1.0), "Blues"),
        Panel("Share of the row's selection in the column's", names, share, (0.0, 1.0), "Blues"),
    ]
    return matrix_plot(panels, "Overlap of each two selections")


def _cascade_table(study: Study) -> _Table:
    """Return overlap, rows embedded, and the share of the full selection within each top by the cheap score."""
    shares = sorted({share for cascade in study.cascades for share in cascade.within})
    rows = []
    for c in study.cascades:
        embedded = ", ".join(f"{share:.1%} by {name}" for name, share in c.embedded.items())
        needed = "–" if c.needed is None else f"{c.needed:.1%}"
        cells = [c.full, f"{c.rows:,}", embedded, f"{c.overlap:.1%}", needed, c.cheap or "–"]
        rows.append(_Row(c.cascade, _cells([*cells, *(_share(c.within, share) for share in shares)])))
    tops = [f"top {share:.0%}" for share in shares]
    head = ["cascade", "full", "rows", "embedded", "overlap", f"top for {TARGET_OVERLAP:.0%}", "cheap score", *tops]
    return _Table(head, rows)


def _share(shares: Mapping[float, float], share: float) -> str:
    return f"{shares[share]:.1%}" if share in shares else "–"


def _encoders(study: Study) -> list[str]:
    return list(dict.fromkeys(measures.encoder for measures in study.sets))


def _set_table(study: Study, encoder: str) -> _Table:
    """Return the measures of each set by one encoder; bold: the smallest divergence of a recipe from each target."""
    found = [measures for measures in study.sets if measures.encoder == encoder]
    targets = list(dict.fromkeys(target for measures in found for target in measures.divergence))
    best = {target: min((m.divergence[target] for m in found if m.recipe != POOL), default=None) for target in targets}
    rows = []
    for m in found:
        cells = [_Cell(f"{m.rows:,}")]
        cells += [_Cell(f"{m.divergence[t]:.3f}", strong=m.divergence[t] == best[t]) for t in targets]
        rows.append(_Row(m.recipe, [*cells, _Cell(f"{m.effective_concepts:,.1f}"), _Cell(f"{m.near_duplicates:.1%}")]))
    return _Table(["set", "rows", *(f"KL to {t}" for t in targets), "effective concepts", "near duplicates"], rows)


def _sensitivity(sensitivity: Sensitivity) -> dict[str, Any]:
    return {
        "score": sensitivity.score,
        "rows": f"{sensitivity.rows:,}",
        "change": f"{sensitivity.largest_change:.2g}" if sensitivity.largest_change else "",
        "has_faults": FAULTS in sensitivity.variants[0].auc,
        "plot": sensitivity_plot(sensitivity),
        "table": _sensitivity_table(sensitivity),
    }


def _sensitivity_table(sensitivity: Sensitivity) -> _Table:
    faults = list(sensitivity.variants[0].auc)
    head = ["setting", "τ", "B", "K", "estimator", "Spearman", f"best {BEST:.0%} kept", *map(plain, faults)]
    if FAULTS in faults:
        head.append("all faults, less as configured")
    rows = []
    for v in sensitivity.variants:
        overlap = "–" if math.isnan(v.best_overlap) else f"{v.best_overlap:.1%}"
        settings = [f"{v.temperature:.4g}", f"{v.batch_size:,}", str(v.draws), plain(v.estimator)]
        cells = _cells([*settings, f"{v.spearman:.4f}", overlap, *(rate(v.auc[fault]) for fault in faults)])
        if FAULTS in faults:
            same = v.gain is None or v.what == CONFIGURED
            cells.append(_Cell("") if same or v.gain is None else _interval(v.gain, small, strong=not v.gain.holds(0)))
        rows.append(_Row(v.what, cells))
    return _Table(head, rows)
