"""A server of `clip-select browse` in this process, and requests to it."""

import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from assets.base.context import Context
from dagster_project.browser.app import application
from dagster_project.browser.parts import JUDGED

TOKEN = "a-token-of-the-tests-of-32-characters"


class Site:
    """A running server, and requests to it with the token's cookie."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.address = f"http://127.0.0.1:{port}"

    def get(
        self, path: str, *, cookie: str = TOKEN, data: bytes | None = None, **headers: str
    ) -> tuple[int, Any, bytes]:
        """Return status, headers and body."""
        request = urllib.request.Request(f"{self.address}{path}", data, headers=headers)
        if cookie:
            request.add_header("Cookie", f"browse-{self.port}={cookie}")
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def text(self, path: str) -> str:
        """Return the body of a page that answers."""
        status, _, body = self.get(path)
        assert status == 200, body
        return body.decode()

    def json(self, path: str, **asked: object) -> dict[str, Any]:
        """Return JSON; of an error, its `error`."""
        return dict(json.loads(self.get(f"{path}?{urllib.parse.urlencode(asked)}")[2]))

    def rows(self, **asked: object) -> dict[str, Any]:
        """Return a part of the grid with the number of all rows."""
        found = self.json("/api/rows", **asked)
        return found | self.json("/api/count", **asked) if found.get("total", 0) is None else found

    def tagged(self, uids: list[str], kind: str) -> bytes:
        """Return tagged uids as a file."""
        body = urllib.parse.urlencode({"uids": "\n".join(uids), "format": kind}).encode()
        return self.get("/tags", data=body)[2]


@contextmanager
def open_site(context: Context, judged: int = JUDGED) -> Iterator[Site]:
    """Serve a project on a free port."""
    server = uvicorn.Server(uvicorn.Config(application(context, TOKEN, judged), port=0, log_level="error"))
    started = threading.Event()
    startup = server.startup

    async def announced(*args: Any, **kwargs: Any) -> None:
        await startup(*args, **kwargs)
        started.set()

    server.startup = announced  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(60)
        yield Site(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(60)
