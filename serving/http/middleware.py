"""ASGI middleware: API key authentication and a limit of the body size."""

import hmac

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http.protocol import APIError


class APIKeyMiddleware:
    """Responds with 401 without the API key, except for `/health` and the page, which asks for it."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on requests with the key. It is compared in constant time, which leaks nothing."""
        path = scope.get("path", "/")  # there is none while the server starts and shuts down
        public = path in ("/", "/health") or path.startswith("/page/")
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if public or hmac.compare_digest(given, self.expected):
            await self.app(scope, receive, send)
        else:
            message = "expected the server's API key: Authorization: Bearer KEY"
            headers = {"www-authenticate": "Bearer"}
            error = APIError(401, message, code="invalid_api_key", headers=headers)
            await error.response()(scope, receive, send)


class BodySizeLimitMiddleware:
    """Responds with 413 to bodies above a limit: by Content-Length, else once too much has come."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes
        self.message = f"the body is larger than {max_body_bytes:,} bytes, this server's limit"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on the request, counting the bytes of its body."""
        # The HTTP parser has checked that it is a number.
        length = int(dict(scope.get("headers", ())).get(b"content-length", b"0"))
        if length > self.max_body_bytes:
            error = APIError(413, self.message, headers={"connection": "close"})
            await error.response()(scope, receive, send)
            return
        num_bytes = 0

        async def counting_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_bytes:
                raise HTTPException(413, self.message, {"connection": "close"})
            return message

        await self.app(scope, counting_receive, send)
