"""The server: a socket and uvicorn, which stops when it has answered what it accepted."""

import asyncio
import contextlib
import functools
import math
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

_BACKLOG = 2048


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, before a model is loaded for it.

    Args:
        host: Name or address.
        port: Port; 0 takes a free one.

    Raises:
        OSError: The address cannot be used, such as one that is taken.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError:
        opened.close()
        raise
    return opened


def run(app: FastAPI, opened: socket.socket, timeout: float, announce: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM, and then until the accepted requests are answered.

    Args:
        app: The application.
        opened: Socket of `open_socket`.
        timeout: Seconds that a request may take; the longest wait at the end. A connection on which
            no request begins for as long, or for up to twice as long, is closed.
        announce: Called when connections are accepted.

    Raises:
        RuntimeError: The application does not start; its error is on stderr.
    """
    config = uvicorn.Config(
        app,
        # Not httptools where that is installed: it takes headers of any length.
        http=cast(Any, functools.partial(_Connection, seconds=timeout)),
        ws="none",
        # Its own configuration closes the handlers of all loggers in the process.
        log_config=None,
        log_level="warning",
        access_log=False,
        backlog=_BACKLOG,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(timeout) + 1,
    )
    server = _Server(config, announce)
    with contextlib.suppress(SystemExit):  # of recent uvicorn, if it has not started
        server.run(sockets=[opened])
    if not server.started:
        raise RuntimeError("the service has not started; its error is above")


class _Connection(H11Protocol):
    """A connection that is closed when its client is silent: uvicorn would keep it open for ever.

    Args:
        seconds: For the head of a request.
    """

    def __init__(self, *args: Any, seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seconds = seconds
        self._seen: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(self._seconds, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if (cycle is None or cycle.response_complete) and cycle is self._seen:
            self.transport.close()
            return
        self._seen = cycle
        self.loop.call_later(self._seconds, self._close_if_silent)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, as a service does when it is told to: uvicorn would raise the signal again."""
        self.force_exit = self.should_exit and sig == signal.SIGINT  # Ctrl-C twice
        self.should_exit = True
