"""Who may ask: the Host header, the token, and the headers of every answer.

Here: refusing requests. Not here: what the pages show.
"""

import hmac
from html import escape
from typing import Any
from urllib.parse import urlencode

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse

COOKIE_SECONDS = 30 * 24 * 3600
POLICY = (
    "default-src 'none'; img-src 'self'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


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
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a web socket, of which there is none
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
            answer = RedirectResponse(_without_token(request), 303)
            answer.set_cookie(cookie, self.token, max_age=COOKIE_SECONDS, httponly=True, samesite="lax")
            return answer
        if self._is_token(request.cookies.get(cookie, "")):
            return self.app
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(_token_page(request), 403)
        return PlainTextResponse(
            "The token is missing or wrong: open the address that clip-select browse printed.", 403
        )

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def _without_token(request: Request) -> str:
    """Return the request's path and query without the token; the path has one slash first, so it stays on this host."""
    asked = [(name, value) for name, value in request.query_params.multi_items() if name != "token"]
    path = "/" + request.scope["raw_path"].decode("ascii", "replace").lstrip("/\\")
    return f"{path}{'?' + urlencode(asked) if asked else ''}"


def _token_page(request: Request) -> str:
    """Return the page that asks for the token and then opens the page that was asked for."""
    asked: QueryParams = request.query_params
    hidden = "".join(
        f'<input type="hidden" name="{escape(name)}" value="{escape(value)}">'
        for name, value in asked.multi_items()
        if name != "token"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Token</title></head><body><main>'
        "<h1>This page needs the token</h1>"
        "<p>It is in the address that <code>clip-select browse</code> printed, after <code>token=</code>. "
        "It stays the same for the next start.</p>"
        f'<form method="get"><label>Token <input name="token" autocomplete="off" autofocus></label>{hidden} '
        "<button>Open</button></form></main></body></html>"
    )
