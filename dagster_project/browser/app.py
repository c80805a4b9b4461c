"""The server of `clip-select browse`: pages and JSON over the queries, on 127.0.0.1 and read-only.

Here: requests, the token and the headers. The browser sends names, predicates and uids; no path and no SQL beyond a
checked predicate. Not here: the queries.
"""

import functools
import hmac
import io
import secrets
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import polars as pl
import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from assets.base.context import Context
from core.errors import UserError
from core.uids import subset_array
from dagster_project.browser import samples, search
from dagster_project.browser.queries import BrowseError, Place, Query, Table, find, uid_table
from dagster_project.browser.trials import Trial, Trials, as_yaml
from resources.lake.versions import Versions
from resources.pools.errors import PoolError
from resources.storage.images import ImageError

FOLDER = Path(__file__).parent
PAGE = 60
LARGEST_TAGS = 1_000_000
POLICY = (
    "default-src 'none'; img-src 'self'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Browser:
    """The pages of one project.

    Args:
        context: the opened project.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.table = Table(context)
        self.trials = Trials(self.table)
        self.pages = Environment(
            loader=FileSystemLoader(FOLDER / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def page(self, template: str, **values: Any) -> HTMLResponse:
        """Return a page from a template, which escapes every value."""
        common = {
            "project": self.context.settings.name,
            "has_images": self.context.pool.has_images,
            "recipes": self.recipes(),
            "numbers": self.table.numbers,
        }
        return HTMLResponse(self.pages.get_template(template).render(**common, **values))

    def recipes(self) -> list[dict[str, Any]]:
        """Return the name and the steps of each recipe."""
        return [
            {"name": name, "steps": [step.text for step in node.model.steps]}
            for name, node in self.trials.subsets.items()
        ]

    def grid(self, request: Request) -> Response:
        """Return the page with the grid."""
        del request
        return self.page("grid.html", shards=self.table.shards(["raw_pool"]), encoders=search.encoders(self.table))

    def rows(self, request: Request) -> Response:
        """Return a part of the grid as JSON: rows, the number of all, and a note."""
        asked, offset = request.query_params, _whole(request.query_params.get("offset", "0"))
        shown = [name for name in asked.get("show", "").split(",") if name in self.table.numbers]
        if asked.get("text") or asked.get("like"):
            return JSONResponse(self._searched(asked, shown))
        query = self._query(asked)
        places = query.places(PAGE, offset)
        total = query.count() if offset == 0 else None
        return JSONResponse({"rows": self.tiles(places, [*shown, *self._sorted_by(query)]), "total": total, "note": ""})

    def _searched(self, asked: Mapping[str, str], shown: list[str]) -> dict[str, Any]:
        known = search.encoders(self.table)
        encoder = asked.get("encoder") or (known[0] if known else "")
        if encoder not in known:
            raise BrowseError("search needs an encoder with embeddings. Remedy: clip-select run")
        side = "text" if asked.get("side") == "text" else "image"
        if asked.get("like"):
            query = search.of_row(self.table, encoder, find(self.table, asked["like"]), side)
        else:
            query = search.of_text(self.table, encoder, asked["text"][:2000])
        found = search.nearest(self.table, encoder, query, side)
        rows = self.tiles(found.places, shown)
        for row, cosine in zip(rows, found.cosines, strict=True):
            row["scores"]["cosine"] = cosine
        return {"rows": rows, "total": len(rows), "note": found.note}

    @staticmethod
    def _sorted_by(query: Query) -> list[str]:
        return [query.sort] if query.sort in query.table.scores.by_name else []

    def _query(self, asked: Mapping[str, str]) -> Query:
        query = Query(self.table)
        if asked.get("where", "").strip():
            query = query.where(asked["where"])
        if asked.get("shard"):
            query = query.shard(asked["shard"])
        if asked.get("sort"):
            descending = asked.get("order", "desc") != "asc"
            query = query.order_by(asked["sort"], descending=descending, seed=_whole(asked.get("seed", "0")))
        if asked.get("recipe"):
            query = query.among(self._members(asked))
        return query

    def _members(self, asked: Mapping[str, str]) -> pa.Table:
        recipe, kind = asked["recipe"], asked.get("member", "kept")
        if kind == "kept":
            found = self.trials.version(recipe, asked.get("version") or None)
            return self.trials.run(recipe).kept if found is None else found
        trial, step = self.trials.run(recipe), _whole(asked.get("step", "1"))
        return trial.near(step) if kind == "near" else trial.dropped_at(step)

    def tiles(self, places: list[Place], shown: list[str]) -> list[dict[str, Any]]:
        """Return rows as the grid shows them."""
        rows = self.table.read(places, ["uid", "key", "caption", "url", *dict.fromkeys(shown)])
        identity = ("uid", "key", "caption", "url", "shard", "row")
        return [
            {**{name: row[name] for name in identity}, "scores": {name: row[name] for name in dict.fromkeys(shown)}}
            for row in rows
        ]

    def image(self, request: Request) -> Response:
        """Return an image, decoded and encoded again as JPEG."""
        side = 1024 if request.query_params.get("size") == "large" else 256
        place = Place(request.path_params["shard"], request.path_params["row"])
        try:
            data = samples.jpeg(self.table, place, side)
        except (PoolError, ImageError, BrowseError) as error:
            return PlainTextResponse(str(error), 404)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    def target(self, request: Request) -> Response:
        """Return a target's image, encoded again."""
        try:
            data = samples.target_jpeg(self.context, **request.path_params, side=1024)
        except (UserError, ImageError, KeyError) as error:
            return PlainTextResponse(str(error), 404)
        return Response(data, media_type="image/jpeg")

    def sample(self, request: Request) -> Response:
        """Return the page of a sample."""
        return self.page("sample.html", **samples.describe(self.table, request.path_params["uid"]))

    def rejects(self, request: Request) -> Response:
        """Return the page of rejected samples."""
        reason = request.query_params.get("reason", "")
        return self.page("rejects.html", reason=reason, **samples.rejects(self.table, reason))

    def what_if(self, request: Request) -> Response:
        """Return the page on which thresholds are tried."""
        recipe = request.query_params.get("recipe") or next(iter(self.trials.subsets), "")
        return self.page("what_if.html", recipe=recipe)

    def trial(self, request: Request) -> Response:
        """Return the result of a recipe with other limits as JSON."""
        asked = request.query_params
        name = asked.get("recipe", "")
        limits = {}
        for key, value in asked.items():
            if key.startswith("limit"):
                kind, _, number = value.partition(":")
                limits[_whole(key[5:])] = (kind, _number(number))
        recipe = self.trials.changed(name, limits)
        trial, before = self.trials.run(name, recipe), self.trials.version(name, None)
        kept, before = trial.kept, self.trials.run(name).kept if before is None else before
        enter, leave = _without(kept, before), _without(before, kept)
        return JSONResponse(
            {
                "steps": trial.steps,
                "rows": len(kept),
                "current": len(before),
                "overlap": len(kept) - len(enter),
                "enter": {"total": len(enter), "rows": self._first(enter)},
                "leave": {"total": len(leave), "rows": self._first(leave)},
                "yaml": as_yaml(f"{name}_tried", recipe),
            }
        )

    def _first(self, uids: pa.Table, count: int = 24) -> list[dict[str, Any]]:
        return self.tiles(Query(self.table).among(uids).order_by("random").places(count), []) if len(uids) else []

    def compare(self, request: Request) -> Response:
        """Return the page that compares two subsets: `left` and `right` are a recipe, or recipe:version."""
        names = [*self.trials.subsets]
        asked = request.query_params
        left = asked.get("left") or (names[0] if names else "")
        right = asked.get("right") or (names[-1] if names else "")
        sides = [self._side(left), self._side(right)]
        groups = {
            "In both": _within(sides[0], sides[1]),
            f"Only in {left}": _without(sides[0], sides[1]),
            f"Only in {right}": _without(sides[1], sides[0]),
        }
        reasons = {f"Only in {left}": self._reasons(right), f"Only in {right}": self._reasons(left)}
        shown = [
            {
                "title": title,
                "total": len(uids),
                "rows": self._first(uids, 12),
                "reasons": _reasons(uids, *reasons[title]) if title in reasons else [],
            }
            for title, uids in groups.items()
        ]
        options = [f"{name}{suffix}" for name in names for suffix in ["", *self._versions(name)]]
        return self.page("compare.html", left=left, right=right, groups=shown, options=options)

    def _versions(self, recipe: str) -> list[str]:
        return [f":{name}" for name in Versions(self.context.lake, recipe).names()]

    def _side(self, named: str) -> pa.Table:
        recipe, _, version = named.partition(":")
        found = self.trials.version(recipe, version or None)
        return self.trials.run(recipe).kept if found is None else found

    def _reasons(self, named: str) -> tuple[str, Trial]:
        return named, self.trials.run(named.partition(":")[0])

    async def tags(self, request: Request) -> Response:
        """Return tagged uids as a file; nothing is stored."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > LARGEST_TAGS * 40:
                raise BrowseError(f"more than {LARGEST_TAGS:,} tags. Remedy: fewer, or a `where` in a recipe")
        form = parse_qs(body.decode("ascii", "replace"))
        uids = form.get("uids", [""])[0].split()
        return await run_in_threadpool(self._tagged, uids, form.get("format", ["txt"])[0])

    def _tagged(self, uids: list[str], kind: str) -> Response:
        try:
            listed = uid_table(uids)
        except ValueError as error:
            raise BrowseError(str(error)) from error
        out = io.BytesIO()
        if kind == "npy":
            np.save(out, np.unique(subset_array(listed["f0"].to_numpy(), listed["f1"].to_numpy())), allow_pickle=False)
        elif kind in ("csv", "parquet"):
            rows = Query(self.table).among(listed).to_polars() if uids else pl.DataFrame({"uid": []})
            rows.write_csv(out) if kind == "csv" else rows.write_parquet(out)
        else:
            kind = "txt"
            out.write("".join(f"{uid}\n" for uid in dict.fromkeys(uids)).encode())
        named = {"Content-Disposition": f'attachment; filename="tagged.{kind}"'}
        return Response(out.getvalue(), media_type="application/octet-stream", headers=named)


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise BrowseError(f"{text!r} is not a whole number")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise BrowseError(f"{text!r} is not a number") from error


def _without(left: pa.Table, right: pa.Table) -> pa.Table:
    return left.join(right, ["f0", "f1"], join_type="left anti")


def _within(left: pa.Table, right: pa.Table) -> pa.Table:
    return left.join(right, ["f0", "f1"], join_type="left semi")


def _reasons(uids: pa.Table, other: str, trial: Trial) -> list[str]:
    counts = trial.rows.join(uids, ["f0", "f1"], join_type="left semi")["dropped"].value_counts().to_pylist()
    texts = {step["step"]: f"step {step['step']}: {step['text']}" for step in trial.steps}
    texts |= {0: f"kept by {other} with today's scores", -1: "not in its source"}
    return [
        f"{found['counts']:,} dropped at {texts[found['values']]}"
        if found["values"] > 0
        else f"{found['counts']:,} {texts[found['values']]}"
        for found in counts
    ]


# The server


def application(context: Context, token: str) -> Starlette:
    """Return the application of a project.

    Args:
        context: the opened project.
        token: which a request must carry once in its address (`?token=`), and then as a cookie.
    """
    browser = Browser(context)

    def get(handler: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        @functools.wraps(handler)
        async def endpoint(request: Request) -> Response:
            return await run_in_threadpool(handler, request)

        return endpoint

    pages = {
        "/": browser.grid,
        "/api/rows": browser.rows,
        "/api/trial": browser.trial,
        "/image/{shard:str}/{row:int}": browser.image,
        "/target/{encoder:str}/{target:str}/{number:int}": browser.target,
        "/sample/{uid:str}": browser.sample,
        "/rejects": browser.rejects,
        "/what-if": browser.what_if,
        "/compare": browser.compare,
    }
    app = Starlette(
        routes=[
            *(Route(path, get(handler), methods=["GET"]) for path, handler in pages.items()),
            Route("/tags", browser.tags, methods=["POST"]),
            Mount("/static", StaticFiles(directory=FOLDER / "static")),
        ],
        exception_handlers={UserError: functools.partial(_user_error, browser)},
    )
    app.add_middleware(Guard, token=token)
    return app


async def _user_error(browser: Browser, request: Request, error: Exception) -> Response:
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": str(error)}, 400)
    return HTMLResponse(browser.page("error.html", message=str(error)).body, 400)


class Guard:
    """Refuse requests for another host or without the token, and add the security headers to every answer.

    Args:
        app: the application behind it.
        token: the token.
    """

    def __init__(self, app: Any, token: str) -> None:
        self.app = app
        self.token = token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        port = (scope.get("server") or ("", 0))[1]

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self._answer(request, port)(scope, receive, with_headers)

    def _answer(self, request: Request, port: int) -> Any:
        if request.headers.get("host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            return PlainTextResponse("Wrong Host header: open the address that clip-select browse printed.", 403)
        origin = request.headers.get("origin")
        if origin not in (None, f"http://{request.headers['host']}"):
            return PlainTextResponse("Requests from other sites are refused.", 403)
        cookie = f"browse-{port}"
        if self._is_token(request.query_params.get("token", "")):
            if request.method != "GET":
                return self.app
            to = request.url.remove_query_params("token")
            answer = RedirectResponse(f"{to.path}{'?' + to.query if to.query else ''}", 303)
            answer.set_cookie(cookie, self.token, httponly=True, samesite="strict")
            return answer
        if self._is_token(request.cookies.get(cookie, "")):
            return self.app
        return PlainTextResponse(
            "The token is missing or wrong: open the address that clip-select browse printed.", 403
        )

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def serve(context: Context, port: int, token: str | None = None) -> int:
    """Serve a project's pages on 127.0.0.1 until Ctrl-C.

    Args:
        context: the opened project.
        port: 0 for any free one.
        token: by default a random one.
    """
    import socket

    import click
    import uvicorn

    token = token or secrets.token_urlsafe(24)
    app = application(context, token)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
        except OSError as error:
            raise BrowseError(f"port {port}: {error.strerror}. Remedy: another --port") from error
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/?token={token}"
        click.echo(f"Browse the pool: {address}\nCtrl-C ends it.")
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        uvicorn.Server(config).run(sockets=[listening])
    return 0
