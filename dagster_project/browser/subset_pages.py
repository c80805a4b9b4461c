"""The pages of subsets: thresholds to try, comparisons, and tagged samples as a file.

Here: what a request asks for, and the answer. Not here: running recipes (`trials`).
"""

import io
from urllib.parse import parse_qs

import numpy as np
import polars as pl
import pyarrow as pa
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from core.errors import UserError
from core.uids import subset_array
from dagster_project.browser.parts import Part
from dagster_project.browser.queries import BrowseError, Query, uid_table
from dagster_project.browser.site import Site, number, whole
from dagster_project.browser.trial import Trial
from dagster_project.browser.trials import NOW, as_yaml

LARGEST_TAGS = 1_000_000
SHOWN = 24


def what_if(site: Site, request: Request) -> Response:
    """Return the page on which thresholds are tried."""
    recipe = request.query_params.get("recipe") or next(iter(site.trials.subsets), "")
    return site.page("what_if.html", recipe=recipe)


def trial(site: Site, request: Request) -> Response:
    """Return the result of a recipe with other limits as JSON: `limit2=fraction:0.2` is the limit of step 2."""
    asked = request.query_params
    name, limits = asked.get("recipe", ""), {}
    for key, value in asked.items():
        if key.startswith("limit"):
            kind, _, limit = value.partition(":")
            limits[whole(key[5:])] = (kind, number(limit))
    recipe, version, trials = site.trials.changed(name, limits), site.trials.version(name), site.trials
    part = trials.part((name, NOW), (name, None))
    tried, before = trials.run(name, recipe, part), trials.kept(name, None, part)
    current = trials.run(name, None, part).kept_rows if version is None else version.lineage["rows"]
    enter, leave = _without(tried.kept, before), _without(before, tried.kept)
    leaving = round(len(leave) * _scale(current, before, part))
    entering = max(0, tried.kept_rows - current + leaving) if len(enter) else 0
    return JSONResponse(
        {
            "steps": tried.steps,
            "rows": tried.kept_rows,
            "current": current,
            "version": "" if version is None else version.name,
            "overlap": current - leaving,
            "about": not part.is_whole,
            "note": _note(site, part, tried, before, enter, leave),
            "enter": {"total": entering, "rows": site.some(part, enter, SHOWN)},
            "leave": {"total": leaving, "rows": site.some(part, leave, SHOWN)},
            "yaml": as_yaml(f"{name}_tried", recipe),
        }
    )


def _scale(rows: int, judged: pa.Table, part: Part) -> float:
    """Return the rows of the pool for each judged row, from a set of known size."""
    return rows / len(judged) if len(judged) and not part.is_whole else part.scale


def _note(site: Site, part: Part, tried: Trial, before: pa.Table, enter: pa.Table, leave: pa.Table) -> str:
    """Return how many rows were judged, and how exact the numbers of rows that enter, leave and remain are."""
    if part.is_whole:
        return ""
    if not tried.is_estimated:
        return part.note("Judged on", "counts of rows are those of the version")
    known, entering, leaving = (site.trials.by_shard(part, uids) for uids in (before, enter, leave))
    remaining = [n + more - less for n, more, less in zip(known, entering, leaving, strict=True)]
    total, stay = part.scale * len(before), len(before) - len(leave)
    errors = [part.error(counts, known, total) for counts in (entering, leaving, remaining)]
    error = max(part.random_error(len(enter)), part.random_error(len(leave) * stay / max(1, len(before))), *errors)
    return part.note("Judged on", _scaled(error))


def _scaled(error: int) -> str:
    return f"counts are scaled to the pool{f', about ± {error:,}' if error else ''}"


def _error(site: Site, part: Part, uids: pa.Table, known: pa.Table) -> int:
    """Return two standard errors of a number of rows that are among others whose number in the pool is known."""
    counted, among = (site.trials.by_shard(part, some) for some in (uids, known))
    share = len(uids) / max(1, len(known))
    return max(part.error(counted, among, part.scale * len(known)), part.random_error(len(uids) * (1 - share)))


def compare(site: Site, request: Request) -> Response:
    """Return the page that compares two subsets: `left` and `right` are a recipe, or recipe:version."""
    names, asked = [*site.trials.subsets], request.query_params
    left = asked.get("left") or (names[0] if names else "")
    right = asked.get("right") or (names[-1] if names else "")
    part = site.trials.part(*(_named(named) for named in (left, right)))
    sides = {named: site.trials.kept(*_named(named), part) for named in (left, right)}
    scales = {named: _scale(_rows(site, named, part), sides[named], part) for named in (left, right)}
    only_left, only_right = _without(sides[left], sides[right]), _without(sides[right], sides[left])
    groups: list[tuple[str, pa.Table, str, float]] = [
        ("In both", _within(sides[left], sides[right]), "", scales[left]),
        (f"Only in {left}", only_left, right, scales[left]),
        (f"Only in {right}", only_right, left, scales[right]),
    ]
    shown = [
        {
            "title": title,
            "total": round(len(uids) * scale),
            "rows": site.some(part, uids, 12),
            "reasons": _reasons(site, uids, other, part, scale) if other and len(uids) else [],
        }
        for title, uids, other, scale in groups
    ]
    options = [f"{name}{suffix}" for name in names for suffix in ["", *_suffixes(site, name)]]
    note = ""
    if not part.is_whole:
        errors = (_error(site, part, uids, sides[named]) for named, uids in ((left, only_left), (right, only_right)))
        note = part.note("Judged on", _scaled(max(errors)))
    return site.page("compare.html", left=left, right=right, groups=shown, options=options, note=note)


def _rows(site: Site, named: str, part: Part) -> int:
    """Return the number of rows of a subset."""
    version = site.trials.version(*_named(named))
    return int(site.trials.run(_named(named)[0], part=part).kept_rows if version is None else version.lineage["rows"])


def _suffixes(site: Site, recipe: str) -> list[str]:
    return [f":{name}" for name in [*site.trials.versions(recipe), NOW]]


def _named(named: str) -> tuple[str, str | None]:
    recipe, _, version = named.partition(":")
    return recipe, version or None


def _without(left: pa.Table, right: pa.Table) -> pa.Table:
    return left.join(right, ["f0", "f1"], join_type="left anti")


def _within(left: pa.Table, right: pa.Table) -> pa.Table:
    return left.join(right, ["f0", "f1"], join_type="left semi")


def _reasons(site: Site, uids: pa.Table, other: str, part: Part, scale: float) -> list[str]:
    """Return how many of the rows each step of the other subset dropped, in words."""
    try:
        found: Trial = site.trials.of(*_named(other), part)
    except UserError as error:
        return [f"The steps of {other} can't be repeated: {error}"]
    rows = found.rows.join(uids, ["f0", "f1"], join_type="left semi")
    counts = {entry["values"]: entry["counts"] for entry in rows["dropped"].value_counts().to_pylist()}
    texts = {0: f"kept by {other}", -1: f"not in what {other} starts from"}
    texts |= {step["step"]: f"dropped at step {step['step']}: {step['text']}" for step in found.steps}

    def number(count: int) -> str:
        return f"{'' if part.is_whole else 'about '}{round(count * scale):,}"

    lines = [f"{number(count)} {texts[place]}" for place, count in sorted(counts.items())]
    outside = len(uids) - sum(counts.values())
    return [*lines, f"{number(outside)} in shards that {other} did not read"] if outside else lines


async def tags(site: Site, request: Request) -> Response:
    """Return tagged uids as a file; nothing is stored."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_TAGS * 40:
            raise BrowseError(f"more than {LARGEST_TAGS:,} tags. Remedy: fewer, or a `where` in a recipe")
    form = parse_qs(body.decode("ascii", "replace"))
    return await run_in_threadpool(_tagged, site, form.get("uids", [""])[0].split(), form.get("format", ["txt"])[0])


def _tagged(site: Site, uids: list[str], kind: str) -> Response:
    try:
        listed = uid_table(uids)
    except ValueError as error:
        raise BrowseError(str(error)) from error
    out = io.BytesIO()
    if kind == "txt":
        out.write("".join(f"{uid}\n" for uid in dict.fromkeys(uids)).encode())
    elif kind == "npy":
        np.save(out, np.unique(subset_array(listed["f0"].to_numpy(), listed["f1"].to_numpy())), allow_pickle=False)
    elif kind in ("csv", "parquet"):
        rows = Query(site.table).among(listed).to_polars() if uids else pl.DataFrame({"uid": []})
        _without_formulas(rows).write_csv(out) if kind == "csv" else rows.write_parquet(out)
    else:
        raise BrowseError(f"format: {kind[:40]!r}; known: npy, txt, csv, parquet")
    headers = {"Content-Disposition": f'attachment; filename="tagged.{kind}"'}
    return Response(out.getvalue(), media_type="application/octet-stream", headers=headers)


def _without_formulas(rows: pl.DataFrame) -> pl.DataFrame:
    """Return rows whose texts a spreadsheet takes for no formula: an apostrophe stands before such a text."""
    texts = [name for name, kind in rows.schema.items() if kind == pl.String]
    return rows.with_columns(pl.col(name).str.replace(r"^([=+\-@\t\r])", "'$1") for name in texts)
