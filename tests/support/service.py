"""A running service without a network: its client, and its requests as the server passes them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx2
from fastapi import FastAPI


@contextlib.asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """Start an application, and stop it at the end."""
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://service") as client,
    ):
        yield client


class RawRequest:
    """A POST of an image whose client may send it in parts, stall or leave.

    Args:
        app: The application.
        headers: Of the request.
    """

    def __init__(self, app: FastAPI, headers: dict[str, str]) -> None:
        self._messages: asyncio.Queue[dict] = asyncio.Queue()
        self.sent: list[dict] = []
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/detect",
            "raw_path": b"/v1/detect",
            "query_string": b"",
            "root_path": "",
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.task = asyncio.ensure_future(app(scope, self._messages.get, self._send))

    async def _send(self, message: dict) -> None:
        self.sent.append(message)

    def body(self, content: bytes, more: bool = False) -> None:
        """Send a part of the body."""
        self._messages.put_nowait({"type": "http.request", "body": content, "more_body": more})

    def leave(self) -> None:
        """Close the connection."""
        self._messages.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        """Status of the response."""
        return self.sent[0]["status"]
