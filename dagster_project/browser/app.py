"""The server of `clip-select browse`, on 127.0.0.1 and read-only.

Here: which address leads to which page, and starting the server. Not here: the pages (`grid_pages`, `subset_pages`),
and who may ask for them (`guard`).
"""

import functools
import signal
import socket
import sys
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from assets.base.context import Context
from core.errors import UserError
from dagster_project.browser import grid_pages, subset_pages
from dagster_project.browser.guard import Guard
from dagster_project.browser.parts import JUDGED
from dagster_project.browser.queries import BrowseError
from dagster_project.browser.site import FOLDER, Site
from dagster_project.browser.token import stored_token

PAGES: dict[str, Callable[[Site, Request], Response]] = {
    "/": grid_pages.grid,
    "/api/rows": grid_pages.rows,
    "/api/count": grid_pages.count,
    "/api/trial": subset_pages.trial,
    "/image/{shard:str}/{row:int}": grid_pages.image,
    "/target/{encoder:str}/{target:str}/{number:int}": grid_pages.target,
    "/sample/{uid:str}": grid_pages.sample,
    "/rejects": grid_pages.rejects,
    "/what-if": subset_pages.what_if,
    "/compare": subset_pages.compare,
}


def application(context: Context, token: str, judged: int = JUDGED) -> Starlette:
    """Return the application of a project.

    Args:
        context: the opened project.
        token: which a request must carry once in its address (`?token=`), and then as a cookie.
        judged: rows on which recipes are judged at most.
    """
    site = Site(context, judged)

    def get(page: Callable[[Site, Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        @functools.wraps(page)
        async def endpoint(request: Request) -> Response:
            return await run_in_threadpool(page, site, request)

        return endpoint

    async def tags(request: Request) -> Response:
        return await subset_pages.tags(site, request)

    app = Starlette(
        routes=[
            *(Route(path, get(page), methods=["GET"]) for path, page in PAGES.items()),
            Route("/tags", tags, methods=["POST"]),
            Mount("/static", StaticFiles(directory=FOLDER / "static")),
        ],
        exception_handlers={UserError: functools.partial(_user_error, site)},
    )
    app.add_middleware(Guard, token=token)
    return app


async def _user_error(site: Site, request: Request, error: Exception) -> Response:
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": str(error)}, 400)
    return site.page("error.html", 400, message=str(error))


def serve(context: Context, port: int) -> int:
    """Serve a project's pages on 127.0.0.1 until Ctrl-C.

    Args:
        context: the opened project.
        port: 0 for any free one.

    Raises:
        BrowseError: the port is taken, or the token's file can't be used.
    """
    import click

    token = stored_token()
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
        except OSError as error:
            raise BrowseError(f"port {port}: {error.strerror}. Remedy: another --port") from error
        app = application(context, token)
        listening.listen()  # so that the address answers once it is printed
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/?token={token}"
        click.echo(f"Browse the pool: {address}\nCtrl-C ends it.")
        run(app, listening)
    return 0


def run(app: Starlette, listening: socket.socket) -> None:
    """Serve an application on a listening socket until SIGINT or SIGTERM; then temporary files are removed."""
    import uvicorn

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # uvicorn raises it again at its end
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])
