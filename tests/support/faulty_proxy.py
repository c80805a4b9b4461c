"""A proxy on 127.0.0.1 in front of an S3 server, which answers chosen requests wrongly."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Kind = Literal["500", "503", "slow", "truncated", "aborted", "lost", "called"]
"""500 and 503: the status, and nothing reaches the server. slow: the answer arrives in pieces. truncated: the answer
ends in its middle. aborted: the connection closes in the middle of the request. lost: the server has done it, and the
connection closes before the answer. called: as aborted, after a function was called."""
ALWAYS = 1 << 30


@dataclass
class Fault:
    """What happens to the next requests of a kind.

    Attributes:
        method: of the requests.
        part: of the path and query.
        kind: what happens.
        left: how many more requests it happens to.
        seen: how many requests it happened to.
        call: the function of the kind "called".
    """

    method: str
    part: str
    kind: Kind
    left: int = ALWAYS
    seen: int = 0
    call: Callable[[], None] = lambda: None


@dataclass
class Proxy:
    """A running proxy.

    Attributes:
        address: its URL.
        faults: the first that fits a request happens.
        requests: method and path of all requests, in order.
    """

    address: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, method: str, part: str, kind: Kind, times: int = ALWAYS) -> Fault:
        """Add a fault."""
        self.faults.append(Fault(method, part, kind, times))
        return self.faults[-1]

    def call_at(self, method: str, part: str, call: Callable[[], None]) -> Fault:
        """Call a function in the middle of the next such request."""
        self.faults.append(Fault(method, part, "called", 1, call=call))
        return self.faults[-1]

    def next(self, method: str, path: str) -> Fault | None:
        """Record a request, and return what happens to it."""
        with self._lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.left and fault.method == method and fault.part in path:
                    fault.left -= 1
                    fault.seen += 1
                    return fault
        return None


@contextmanager
def faulty_proxy(server: str) -> Iterator[Proxy]:
    """Start a proxy in front of the server at an address."""
    host = server.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            fault = proxy.next(self.command, self.path)
            kind = None if fault is None else fault.kind
            size = int(self.headers.get("Content-Length") or 0)
            if fault is not None and kind in ("aborted", "called"):
                self.rfile.read(size // 2)
                fault.call()
                self.close_connection = True
                return
            body = self.rfile.read(size)
            if kind in ("500", "503"):
                self._answer(int(kind), {}, b"<Error><Code>InternalError</Code></Error>")
                return
            upstream = http.client.HTTPConnection(host)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
            upstream.close()
            if kind == "lost":
                self.close_connection = True
                return
            pieces = 4 if kind == "slow" else 1
            self._answer(answer.status, dict(answer.getheaders()), content, pieces, cut=kind == "truncated")

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815 - names of the base class

        def _answer(
            self, status: int, headers: dict[str, str], content: bytes, pieces: int = 1, *, cut: bool = False
        ) -> None:
            self.send_response_only(status)
            headers = {name.lower(): value for name, value in headers.items()}
            headers.pop("transfer-encoding", None)
            if self.command != "HEAD":
                headers["content-length"] = str(len(content))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if cut:
                content = content[: len(content) // 2]
                self.close_connection = True
            step = max(1, -(-len(content) // pieces))
            for start in range(0, len(content), step):
                if start:
                    pause.wait(0.1)
                self.wfile.write(content[start : start + step])
                self.wfile.flush()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    pause = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        proxy = Proxy(f"http://127.0.0.1:{running.server_address[1]}")
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            running.shutdown()
            thread.join()
