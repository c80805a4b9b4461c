"""The pages of samples: the grid with its filters and search, a sample, its images, and the rejected samples.

Here: what a request asks for, and the answer. The browser sends names, predicates and uids; no path, and no SQL beyond
a checked predicate. Not here: the queries.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from core.errors import UserError
from dagster_project.browser import samples, search
from dagster_project.browser.parts import Part
from dagster_project.browser.queries import BrowseError, Place, Query, find
from dagster_project.browser.site import Site, whole
from resources.storage.images import ImageError

PAGE = 60
LONGEST_TEXT = 2000
LARGE, SMALL = 1024, 256  # pixels of the longer side

Asked = Mapping[str, str]


def grid(site: Site, request: Request) -> Response:
    """Return the page with the grid."""
    del request
    return site.page(
        "grid.html",
        shards=site.table.shards(["raw_pool"]),
        encoders=search.encoders(site.table),
        versions={recipe["name"]: site.trials.versions(recipe["name"]) for recipe in site.recipes()},
        reasons=samples.reject_counts(site.table),
    )


def rows(site: Site, request: Request) -> Response:
    """Return a part of the grid as JSON: rows, a note, and the number of all; it is null where `count` takes time."""
    asked, offset = request.query_params, whole(request.query_params.get("offset", "0"))
    shown = [name for name in asked.get("show", "").split(",") if name in site.table.numbers]
    if asked.get("rejected"):
        return JSONResponse(_rejected(site, asked, offset))
    if asked.get("text") or asked.get("like"):
        return JSONResponse(_searched(site, asked, shown))
    query, members = _query(site, asked)
    places = query.places(PAGE, offset)
    total = query.count() if query.is_counted else None
    sorted_by = [query.sort] if query.sort in site.table.scores.by_name else []
    listed = site.tiles(places, [*shown, *sorted_by])
    return JSONResponse({"rows": listed, "total": total, "note": _note(members), "last": len(places) < PAGE})


def count(site: Site, request: Request) -> Response:
    """Return the number of rows that the filters of the grid leave, as JSON; `about` if it is scaled from a part."""
    query, members = _query(site, request.query_params)
    rows = query.count()
    if members is None or not members.is_sample:
        return JSONResponse({"total": rows, "about": False, "note": ""})
    about = members.is_estimated or not len(members.uids) or bool(query.predicates)
    scale = members.part.scale if members.total is None else members.total / max(1, len(members.uids))
    return JSONResponse({"total": round(rows * scale), "about": about, "note": _note(members, about)})


@dataclass(frozen=True)
class Members:
    """The rows of a subset that are asked for.

    Attributes:
        part: the rows that were judged.
        uids: f0 and f1 of those of them that are asked for.
        total: their number in the pool; None to scale the number of `uids`.
        is_estimated: whether the total is.
        score: to sort them by.
        is_sample: whether the part stands for the pool.
    """

    part: Part
    uids: pa.Table
    total: int | None
    is_estimated: bool
    score: str
    is_sample: bool


def _note(members: Members | None, about: bool = False) -> str:
    if members is None or not members.is_sample:
        return ""
    return members.part.note("Shown are rows among", "counts are scaled to the pool" if about else "")


def _rejected(site: Site, asked: Asked, offset: int) -> dict[str, Any]:
    for name in ("where", "sort", "recipe", "text", "like"):
        if asked.get(name):
            raise BrowseError(f"rejected samples have no scores, so {name} does not apply. Remedy: leave it out")
    reason = "" if asked["rejected"] == samples.ANY_REASON else asked["rejected"]
    found = samples.rejects(site.table, reason, asked.get("shard", ""), limit=PAGE, offset=offset)
    return {"rows": found["rows"], "total": found["total"], "note": "Rejected samples are not in the pool."}


def _searched(site: Site, asked: Asked, shown: list[str]) -> dict[str, Any]:
    if asked.get("sort"):
        raise BrowseError("a search is sorted by cosine. Remedy: leave sort out")
    known = search.encoders(site.table)
    encoder = asked.get("encoder") or (known[0] if known else "")
    if encoder not in known:
        raise BrowseError(f"no embeddings by {encoder or 'any encoder'}, which search needs. Remedy: clip-select run")
    side = "text" if asked.get("side") == "text" else "image"
    if asked.get("like"):
        query = search.of_row(site.table, encoder, find(site.table, asked["like"]), side)
    else:
        query = search.of_text(site.table, encoder, asked["text"][:LONGEST_TEXT])
    among, _ = _query(site, asked)
    found = search.nearest(site.table, encoder, query, side, among=among if among.restricts else None)
    listed = site.tiles(found.places, shown)
    for row, cosine in zip(listed, found.cosines, strict=True):
        row["scores"]["cosine"] = cosine
    return {"rows": listed, "total": len(listed), "note": found.part.note("Searched")}


def _query(site: Site, asked: Asked) -> tuple[Query, Members | None]:
    """Return the query that is asked for, and the rows of the subset that it is restricted to."""
    query, members = Query(site.table), None
    if asked.get("where", "").strip():
        query = query.where(asked["where"])
    if asked.get("shard"):
        query = query.shard(asked["shard"])
    if asked.get("recipe"):
        members = _members(site, asked)
        query = query.among(members.uids)
        query = query if members.part.is_whole else query.within(members.part.shards)
        query = query.order_by(members.score) if members.score in site.table.scores.by_name else query
    if asked.get("sort"):
        descending = asked.get("order", "desc") != "asc"
        query = query.order_by(asked["sort"], descending=descending, seed=whole(asked.get("seed", "0")))
    return query, members


def _members(site: Site, asked: Asked) -> Members:
    """Return the rows of a subset that are asked for; of a large pool in one shard, if that is asked for."""
    recipe, version, kind = asked["recipe"], asked.get("version") or None, asked.get("member", "kept")
    part, trials = site.trials.part((recipe, version)), site.trials
    is_sample = not part.is_whole and not asked.get("shard")
    if asked.get("shard") and not part.is_whole:
        part = trials.part_of_shard(part, asked["shard"])
    if kind == "kept":
        found = trials.version(recipe, version)
        if found is not None:
            return Members(part, trials.kept(recipe, version, part), found.lineage["rows"], False, "", is_sample)
        trial = trials.run(recipe, part=part)
        return Members(part, trial.kept, trial.kept_rows, trial.is_estimated, "", is_sample)
    if kind not in ("near", "dropped"):
        raise BrowseError(f"member: {kind[:40]!r}; known: kept, dropped, near")
    trial, step = trials.of(recipe, version, part), whole(asked.get("step", "1"))
    uids = trial.near(step) if kind == "near" else trial.dropped_at(step)
    shown = trial.step(step)
    total = trial.dropped_rows(step) if kind == "dropped" else None
    return Members(part, uids, total, total is None or trial.is_estimated, shown["score"] or "", is_sample)


def image(site: Site, request: Request) -> Response:
    """Return an image, decoded and encoded again as JPEG."""
    side = LARGE if request.query_params.get("size") == "large" else SMALL
    place = Place(request.path_params["shard"], request.path_params["row"])
    try:
        data = samples.jpeg(site.table, place, side)
    except (UserError, ImageError) as error:
        return PlainTextResponse(str(error), 404)
    return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


def target(site: Site, request: Request) -> Response:
    """Return a target's image, encoded again."""
    try:
        data = samples.target_jpeg(site.context, **request.path_params, side=LARGE)
    except (UserError, ImageError) as error:
        return PlainTextResponse(str(error), 404)
    return Response(data, media_type="image/jpeg")


def sample(site: Site, request: Request) -> Response:
    """Return the page of a sample."""
    return site.page("sample.html", **samples.describe(site.table, request.path_params["uid"]))


def rejects(site: Site, request: Request) -> Response:
    """Return the page of rejected samples."""
    reason, shard = (request.query_params.get(name, "") for name in ("reason", "shard"))
    found = samples.rejects(site.table, reason, shard)
    counts = samples.reject_counts(site.table, shard)
    return site.page("rejects.html", reason=reason, shard=shard, counts=counts, any=samples.ANY_REASON, **found)
