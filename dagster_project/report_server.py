"""The web server of a lake's reports: what a subset's page in Dagster's UI links to.

Here: which files are served, and to which hosts. Not here: the reports (`assets.subsets.report`), and starting the
server (`instance`). It is read-only, has no list of a folder, and ends when its standard input is closed.
"""

import os
import re
import socket
import sys
import threading
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Mount, Route

from resources.storage.by_location import open_store
from resources.storage.stores import Store, is_object_store

_REPORT = "/{recipe}/{version}/report/{name:path}"
_VERSION = re.compile(r"v[0-9]+", re.ASCII)
HEADERS = {
    "Content-Security-Policy": "default-src 'self' data: 'unsafe-inline'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def report_server(subsets: str, digest: str) -> Starlette:
    """Return a server of the files below `<recipe>/v*/report` in a folder, for this machine's own host names.

    Args:
        subsets: path or URL of the folder `<lake>/subset`.
        digest: of the lake, with which every path begins: a recorded link must not open another lake's report.
    """
    store = open_store(subsets)

    def serve_file(request: Request) -> FileResponse:
        version = request.path_params["version"]
        report = f"{subsets}/{request.path_params['recipe']}/{version}/report"
        found = _file_below(store, report, request.path_params["name"]) if _VERSION.fullmatch(version) else None
        if found is None:
            raise HTTPException(404)
        return FileResponse(found, headers=HEADERS)

    return Starlette(
        routes=[Mount(f"/{digest}", routes=[Route(_REPORT, serve_file, methods=["GET"])])],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False)],
    )


def _file_below(store: Store, folder: str, name: str) -> Path | None:
    """Return a local path of a report's file; None if there is none, or if it is hidden or outside its folder."""
    report = Path(folder)
    if any(part.startswith(".") for part in (*Path(name).parts, *report.parts[-3:])) or "\0" in name + folder:
        return None
    if is_object_store(folder):
        location = f"{folder}/{name}"
        return None if store.stat(location) is None else store.local(location)
    real = os.path.realpath(report / name)
    below = os.path.join(os.path.realpath(report.parents[2]), *report.parts[-3:])
    return Path(real) if os.path.isfile(real) and os.path.commonpath([real, below]) == below else None


def main() -> None:
    """Serve `<lake>/subset`, with the lake's digest and the descriptor of a listening socket as further arguments."""
    subsets, digest, descriptor = sys.argv[1:]
    settings = uvicorn.Config(report_server(subsets, digest), log_level="warning", access_log=False)
    server = uvicorn.Server(settings)

    def end_with_the_ui() -> None:
        os.read(0, 1)
        os._exit(0)

    threading.Thread(target=end_with_the_ui, daemon=True).start()
    server.run(sockets=[socket.socket(fileno=int(descriptor))])


if __name__ == "__main__":
    main()
