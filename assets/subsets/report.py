"""The report of a subset's version: score distributions and contact sheets, as metadata and as `<version>/report/`.

Here: choosing the samples to show, reading their pictures from the pool, and writing the report. Not here: the layout
of pictures (`assets.base.contact_sheets`). The version's identity does not depend on the report, which is written
after the version. If the report fails, the version stays and the run's log has the reason; the next pass, or
materializing the subset again, writes the report of the newest version if it is missing.
"""

import hashlib
import io
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from assets.base.contact_sheets import Sheet, Tile, escaped, html_page, markdown, small_jpeg
from assets.base.context import Context
from assets.base.pages import data_url
from assets.base.tiles import read_tiles
from assets.subsets.evaluated import with_evaluations
from assets.subsets.funnel import COLUMNS, funnel_rows
from core.links import browse_link
from core.sql import quoted
from resources.lake.files import Lake
from resources.lake.versions import Version, Versions
from selection.recipes.execute import Selection
from selection.recipes.step_report import StepReport
from selection.scores.negatives import keyed_hash

PAGE_TILES = 12  # of the report: samples per sheet
WINDOW_TILES, WINDOW_SIDE, WINDOW_BYTES = 8, 96, 2_000  # of the UI: keep an event under 256 KB
BINS = 60
REPORTS_VARIABLE = "CLIP_SELECTION_REPORTS"
"""Environment variable with the address at which a web server has the folder `<lake>/subset`."""

REPORTS_PORT = 3001
"""Where `clip-select ui` serves reports, unless it is told another port or this one is taken."""

SHEET_FILE, CHART_FILE, PAGE_FILE = "sheet.md", "scores.png", "index.html"


def write_report(project: Context, version: Version, selection: Selection) -> None:
    """Write a version's report while the rows it was selected from are still open.

    The version exists already, so an error is logged as a warning and not raised; the next pass tries again.
    """
    try:
        _write_report(project, version, selection)
    except Exception as error:  # noqa: BLE001 - logged below
        dg.get_dagster_logger().warning(
            f"{_folder(version)}: the report could not be written; the subset itself is complete. {error!r}"
        )


def is_reported(lake: Lake, version: Version) -> bool:
    """Check, by reading it, whether a version's report is complete: its page and checksums are written last."""
    is_there = lake.exists(f"{_folder(version)}/{PAGE_FILE}")
    return is_there and not Versions(lake, version.recipe).report_damage(version)


def report_metadata(project: Context, version: Version) -> dict[str, Any]:
    """Return a version's metadata for Dagster's UI: thresholds, summaries, distributions, contact sheets, the page."""
    store, folder = project.lake.store, _folder(version)
    metadata: dict[str, Any] = {
        f"threshold/step{step['step']} {step['score']}": step["threshold"]
        for step in version.lineage["steps"]
        if step["threshold"] is not None and step["score"] is not None
    }
    for title, (head, *rows) in _summaries(version.lineage).items():
        lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
        metadata[title] = dg.MetadataValue.md("\n".join(f"| {' | '.join(map(escaped, line))} |" for line in lines))
    if project.lake.exists(f"{folder}/{PAGE_FILE}"):
        chart = data_url(store.read(f"{folder}/{CHART_FILE}"), "png")
        metadata["score_distributions"] = dg.MetadataValue.md(f"![Scores before and after]({chart})")
        metadata["contact_sheet"] = dg.MetadataValue.md(store.read(f"{folder}/{SHEET_FILE}").decode())
        metadata |= _page_links(project.lake, version)
    return metadata


def reports_digest(lake: Lake) -> str:
    """Return 8 hexadecimal digits that tell a lake's reports from another's, on the same port at another time."""
    return hashlib.blake2b(lake.root.encode(), digest_size=4).hexdigest()


def reports_address(lake: Lake, port: int = REPORTS_PORT) -> str:
    """Return the address where `clip-select ui` serves a lake's reports."""
    return f"http://127.0.0.1:{port}/{reports_digest(lake)}"


def _page_links(lake: Lake, version: Version) -> dict[str, dg.MetadataValue[Any]]:
    """Return the path of the page, and a link to where a server has it: browsers open no file from a server's page."""
    address = os.environ.get(REPORTS_VARIABLE)
    if not address and "DAGSTER_HOME" not in os.environ:  # the lake's own instance, which `clip-select ui` shows
        address = reports_address(lake)
    found: dict[str, dg.MetadataValue[Any]] = {"report_file": dg.MetadataValue.path(f"{_folder(version)}/{PAGE_FILE}")}
    if address:
        found["report"] = dg.MetadataValue.url(
            f"{address.rstrip('/')}/{version.recipe}/{version.name}/report/{PAGE_FILE}"
        )
    return found


@dataclass(frozen=True)
class _Group:
    """Samples to show: title, one sentence, the SQL condition and order that choose them, and a verdict as SQL."""

    title: str
    text: str
    where: str
    order: str
    verdict: str | None = None


def _write_report(project: Context, version: Version, selection: Selection) -> None:
    folder = _folder(version)
    sheets, samples = _sheets(project, selection)
    for sample in samples:
        if sample.problem:
            dg.get_dagster_logger().warning(f"{folder}: {sample.problem}")
    for sample in samples:
        if sample.image is not None:
            project.lake.put(f"{folder}/{sample.path}", sample.image)
    project.lake.put(f"{folder}/{CHART_FILE}", _chart(selection))
    window = "\n\n".join(markdown(_small(sheet)) for sheet in sheets[:5])
    project.lake.put(f"{folder}/{SHEET_FILE}", window.encode())
    tables: dict[str, Sequence[Sequence[str]]] = {
        "Funnel": [COLUMNS, *funnel_rows(version.lineage)],
        **_warnings(version.lineage),
        **_summaries(version.lineage),
        **_concepts(selection),
    }
    browse = browse_link(recipe=version.recipe, version=version.name)
    page = html_page(f"subset/{version.recipe} {version.name}", _about(version), tables, CHART_FILE, sheets, browse)
    page = with_evaluations(project.lake, version.recipe, version.name, page)
    project.lake.put(f"{folder}/{PAGE_FILE}", page.encode())
    Versions(project.lake, version.recipe).write_report_checksums(version)


def _about(version: Version) -> dict[str, str]:
    lineage = version.lineage
    rows, source = lineage["rows"], lineage["source"]["rows"]
    samples = f", {version.samples:,} samples" if version.samples != rows else ""
    overlap = {
        f"target images among the shards' rows ({asset})": f"{counted['rows']:,}"
        for asset, counted in lineage.get("rows_in_targets", {}).items()
    }
    return {
        "selected": f"{rows:,} of {source:,} rows ({rows / source:.1%}){samples}",
        "made": lineage["created"],
        "shards": f"{len(lineage['shards']):,}, and {len(lineage['shards_missing']):,} left out",
        **overlap,
        "fingerprint": lineage["fingerprint"],
    }


def _warnings(lineage: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Return the warnings, notes on steps and drift of the negatives as rows of tables by title, empty without any."""
    tables = {}
    if found := lineage.get("warnings"):
        rows = [
            [e["asset"], e["check"], e["result"], textwrap.shorten(", ".join(e["shards"]), 80), e["why"]] for e in found
        ]
        tables["Warnings"] = [["asset", "check", "result", "shards", "why"], *rows]
    if notes := [[str(step["step"]), step["note"]] for step in lineage["steps"] if step.get("note")]:
        tables["Notes on steps"] = [["step", "note"], *notes]
    if drift := lineage.get("drift"):
        rows = [[asset, finding["figures"].get("verdict", finding["why"])] for asset, finding in drift.items()]
        tables["Drift of the negatives"] = [["negatives", "verdict"], *rows]
    return tables


def _concepts(selection: Selection) -> dict[str, list[list[str]]]:
    """Return the commonest and the rarest concepts of each step over concepts, before and after it, by title."""
    tables = {}
    for number, query in selection.concepts.items():
        report = selection.steps[number - 1]
        shares = "target" in selection.con.sql(query).columns
        figures = ["entered", "selected", *(["target"] if shares else [])]
        name = "trim(label || ' #' || concept)" if shares else "label"
        ranked = f"SELECT {name} AS name, number, {', '.join(figures)} FROM ({query}) WHERE entered > 0"
        for end, order in (("commonest", "DESC"), ("rarest", "ASC")):
            found = selection.con.execute(
                f"SELECT name, {', '.join(figures)} FROM ({ranked}) ORDER BY entered {order}, number LIMIT {PAGE_TILES}"
            ).fetchall()
            written = [[str(n), *(f"{v:.3%}" if shares else f"{v:,}" for v in values)] for n, *values in found]
            tables[f"Step {number}, {report.text}: the {end} concepts"] = [["concept", *figures], *written]
    return tables


def _sheets(project: Context, selection: Selection) -> tuple[list[Sheet], list[Tile]]:
    """Return the sheets, and every sample on them once."""
    groups = list(_groups(selection))
    picked = [_pick(selection, group) for group in groups]
    samples = read_tiles(project, pl.concat([rows.select("f0", "f1", "shard") for rows in picked]).unique())
    sheets = []
    for group, rows in zip(groups, picked, strict=True):
        tiles = [replace(samples[row["f0"], row["f1"]], metadata=_metadata(row)) for row in rows.iter_rows(named=True)]
        sheets.append(Sheet(group.title, group.text, tiles))
    return sheets, list(samples.values())


def _folder(version: Version) -> str:
    return f"{version.folder}/report"


# Which samples


def _groups(selection: Selection) -> Iterator[_Group]:
    """Yield the groups: the four ends of the last ranking, random rows, the ends of earlier rankings, duplicates."""
    ranked = _ranked(selection)
    for report in reversed(ranked):
        before = selection.inside[report.step - 1]
        for end, kept, order in (
            ("best", True, "DESC"),
            ("worst", True, "ASC"),
            ("best", False, "DESC"),
            ("worst", False, "ASC"),
        ):
            verdict = "kept" if kept else "dropped"
            near = {("worst", True): ", just above the threshold", ("best", False): ", just below the threshold"}
            near = near if report.threshold is not None else {}  # strata have many thresholds, draws none
            highest = "highest" if end == "best" else "lowest"
            yield _Group(
                f"{end.capitalize()} {verdict} by {report.score}",
                f"Step {report.step}, {report.text}: the {highest} values {verdict}{near.get((end, kept), '')}.",
                f"{before} AND {'' if kept else 'NOT '}({report.predicate})",
                f"{report.value} {order}, f0, f1",
            )
        if report is ranked[-1]:
            yield _random(selection)
    if not ranked:
        yield _random(selection)
    for report in selection.steps:
        if report.kind == "deduplicate" and report.kept < report.entered:
            yield _alike(selection, report)


def _random(selection: Selection) -> _Group:
    """Return a uniform sample of the subset by the keyed hash of the uid, the same in every run."""
    uids = selection.subset()
    hashes = keyed_hash(0, 0, uids["f0"].copy(), uids["f1"].copy())
    chosen = uids[np.argsort(hashes, kind="stable")[:PAGE_TILES]]
    return _Group(
        "A random handful of the subset",
        "A uniform sample, chosen by a keyed hash of the uid.",
        f"(f0, f1) IN ({_listed(chosen.tolist())})",
        "f0, f1",
    )


def _alike(selection: Selection, report: StepReport) -> _Group:
    """Return the rows that `deduplicate` dropped, each beside the row that stayed if the step recorded it."""
    if report.step not in selection.tables:
        return _Group(
            f"Dropped by {report.by}",
            f"Step {report.step}, {report.text}: the lowest values dropped, just above the limit.",
            f"{selection.inside[report.step - 1]} AND NOT ({report.predicate})",
            f"{quoted(str(report.by))}, f0, f1",
        )
    pairs = selection.con.execute(
        f"SELECT kept_f0, kept_f1, f0, f1 FROM ({selection.tables[report.step]}) ORDER BY ALL LIMIT {PAGE_TILES // 2}"
    ).fetchall()
    uids = list(dict.fromkeys(uid for pair in pairs for uid in (pair[:2], pair[2:])))
    return _Group(
        f"Alike by {report.by}",
        f"Step {report.step}, {report.text}: each row that stayed, followed by those that were dropped in its favour.",
        f"(f0, f1) IN ({_listed(uids)})",
        f"list_position([{_listed(uids)}], (f0, f1))",
        f"CASE WHEN {report.predicate} THEN 'stayed' ELSE 'dropped' END",
    )


def _listed(uids: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"({f0}::UBIGINT, {f1}::UBIGINT)" for f0, f1 in uids)


def _pick(selection: Selection, group: _Group) -> pl.DataFrame:
    shown = [f"{value} AS {quoted(label)}" for label, value in _values(selection).items()]
    if group.verdict is not None:
        shown.append(f"{group.verdict} AS verdict")
    if selection.copies is not None:
        shown.append(f"{selection.copies} AS copies")
    columns = ", ".join(["f0", "f1", "shard", *shown])
    query = f"SELECT {columns} FROM {selection.source} WHERE {group.where} ORDER BY {group.order} LIMIT {PAGE_TILES}"
    return selection.con.sql(query).pl()


def _small(sheet: Sheet) -> Sheet:
    """Return the first samples of a sheet, with pictures small enough for the event log."""
    return replace(
        sheet,
        tiles=[
            tile
            if tile.image is None
            else replace(tile, image=small_jpeg(tile.image, WINDOW_SIDE, most_bytes=WINDOW_BYTES))
            for tile in sheet.tiles[:WINDOW_TILES]
        ],
    )


# Distributions


def _chart(selection: Selection) -> bytes:
    """Return a PNG with the histogram of each ranked score, over the source rows and over the subset."""
    from matplotlib.figure import Figure

    values = _values(selection)
    figure = Figure(figsize=(4.6 * max(len(values), 1), 2.7), dpi=90, layout="constrained")
    for axes, label in zip(figure.subplots(1, max(len(values), 1), squeeze=False)[0], values, strict=False):
        edges, before, after = _histogram(selection, values[label])
        axes.stairs(before, edges, fill=True, color="#d0d7de", label="before")
        axes.stairs(after, edges, fill=True, color="#0969da", label="selected")
        for report in selection.steps:
            if report.score == label and report.threshold is not None:
                axes.axvline(report.threshold, color="#cf222e", linewidth=1, label=f"threshold {report.threshold:.4g}")
        axes.set_xlabel(textwrap.fill(label, 48))
        axes.set_ylabel("rows")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _histogram(selection: Selection, value: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count rows in equal bins of a value's range.

    Returns:
        The edges, float64 `[BINS + 1]`, and the counts of source rows and of selected rows, int64 `[BINS]`.
    """
    finite = f"FROM {selection.source} WHERE isfinite({value}) AND ({selection.inside[0]} OR {selection.inside[-1]})"
    ((low, high),) = selection.con.execute(f"SELECT min({value}), max({value}) {finite}").fetchall()
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    counts = np.zeros((2, BINS), np.int64)
    found = selection.con.execute(
        f"SELECT least({BINS - 1}, floor(({value} - $low) / ($high - $low) * {BINS}))::INTEGER AS bin, "
        f"count(*) FILTER (WHERE {selection.inside[0]}), count(*) FILTER (WHERE {selection.inside[-1]}) "
        f"{finite} GROUP BY bin",
        {"low": float(edges[0]), "high": float(edges[-1])},
    ).fetchall()
    for number, before, after in found:
        counts[:, number] = before, after
    return edges, counts[0], counts[1]


def _ranked(selection: Selection) -> list[StepReport]:
    return [report for report in selection.steps if report.value is not None]


def _values(selection: Selection) -> dict[str, str]:
    """Return the SQL of each value that the recipe ranks by, by its label."""
    return {str(report.score): str(report.value) for report in _ranked(selection)}


def _metadata(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row's values as text; empty for a combination that did not rank this row."""
    return {
        label: "" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value}"
        for label, value in row.items()
        if label not in ("f0", "f1", "shard")
    }


def _summaries(lineage: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Return the statistics of each step that has a `report`, as rows of a table by its title."""
    return {
        f"Step {step['step']}, {step['text']}": _summary(step["summary"])
        for step in lineage["steps"]
        if step.get("summary")
    }


def _summary(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    def written(value: float | None) -> str:
        return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"

    groups = ["entered", "kept", "dropped"]
    table = [["column", "", *groups]]
    before = None
    for row in rows:
        name = "" if row["name"] == before else row["name"]  # a column's name stands in its first row only
        table.append([name, textwrap.shorten(row["what"], 80), *(written(row[group]) for group in groups)])
        before = row["name"]
    return table
