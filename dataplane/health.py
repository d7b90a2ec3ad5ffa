"""Owns the two health pages of flanneld, /healthz and /readyz, and Prometheus' /metrics, on a small HTTP/1 server.

Free of: what "ready" means and what is measured (callables answer). Invariant: whatever a client sends or leaves
unsent, it holds one connection for at most a few seconds and never reaches the daemon's other work.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from dataplane.errors import KernelError

READ_TIMEOUT = 5.0
"""Seconds in which a whole request must have come."""

CLOSE_GRACE = 3.0
"""Seconds that open connections have at the end, as with flanneld."""

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus' text format."""

MAX_LINE = 4096
MAX_HEADER_LINES = 64
MAX_CONNECTIONS = 64

_REQUEST = re.compile(rb"([A-Z]+) (/[!-~]*) HTTP/1\.[01]\r?\n")


class HealthServer:
    """Answers GET and HEAD with flanneld's status codes and texts (facts 1.7); every connection carries one request."""

    def __init__(self, ready: Callable[[], bool], metrics: Callable[[], Awaitable[str]] | None) -> None:
        self._ready = ready
        self._metrics = metrics
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @classmethod
    async def start(
        cls, ip: str, port: int, ready: Callable[[], bool], metrics: Callable[[], Awaitable[str]] | None = None
    ) -> HealthServer:
        """Listen at `ip`, or at any free port if `port` is 0. `metrics` makes the page /metrics; without it there is
        none. Raises KernelError that names the address."""
        health = cls(ready, metrics)
        try:
            health._server = await asyncio.start_server(health._serve, ip, port, limit=MAX_LINE)
        except (OSError, ValueError) as error:
            raise KernelError(_cannot_listen(ip, port, error)) from error
        return health

    @property
    def port(self) -> int:
        """The port that is listened on."""
        if self._server is None:
            return 0
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """Stop listening and end the open connections, after at most CLOSE_GRACE. Never raises."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        if self._connections:
            _, late = await asyncio.wait(self._connections, timeout=CLOSE_GRACE)
            # not by cancelling them: asyncio's streams of Python 3.11 report that as an error
            for connection in late:
                self._connections[connection].transport.abort()
            await asyncio.gather(*late, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._connections) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._connections[task] = writer
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                answer = await self._answer(await _request(reader))
                if not writer.is_closing():  # uvloop refuses to write where asyncio drops it
                    writer.write(answer)
                    await writer.drain()
        except (TimeoutError, OSError):
            pass  # a client that is gone or says nothing is owed no answer
        finally:
            del self._connections[task]
            writer.close()

    async def _answer(self, request: re.Match[bytes] | HTTPStatus) -> bytes:
        if isinstance(request, HTTPStatus):
            return _response(request, request.phrase)
        method, target = request.groups()
        head = method == b"HEAD"
        page = target.partition(b"?")[0]
        pages = (b"/healthz", b"/readyz", *((b"/metrics",) if self._metrics else ()))
        if page not in pages:
            return _response(HTTPStatus.NOT_FOUND, "404 page not found", head=head)
        if method not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, "use GET or HEAD")
        if page == b"/metrics" and self._metrics is not None:
            return _response(HTTPStatus.OK, await self._metrics(), head=head, kind=METRICS_TYPE)
        if page == b"/healthz":
            return _response(HTTPStatus.OK, "flanneld is running", head=head)
        if self._ready():
            return _response(HTTPStatus.OK, "flanneld is ready", head=head)
        return _response(HTTPStatus.SERVICE_UNAVAILABLE, "flanneld is not ready yet", head=head)


async def _request(reader: asyncio.StreamReader) -> re.Match[bytes] | HTTPStatus:
    """The request line, once the header is read to its end, or the status that refuses it."""
    try:
        request = _REQUEST.fullmatch(await reader.readline())
        if request is None:
            return HTTPStatus.BAD_REQUEST
        for _ in range(MAX_HEADER_LINES):
            line = await reader.readline()
            if line in (b"\r\n", b"\n"):
                return request
            if b":" not in line:  # no header, or the connection's end
                return HTTPStatus.BAD_REQUEST
    except ValueError:  # a line longer than the reader's limit
        pass
    return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE


def _response(
    status: HTTPStatus, body: str, *, head: bool = False, kind: str = "text/plain; charset=utf-8"
) -> bytes:
    allow = "Allow: GET, HEAD\r\n" if status is HTTPStatus.METHOD_NOT_ALLOWED else ""
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n{allow}Content-Type: {kind}\r\n"
        f"Content-Length: {len(body.encode())}\r\nConnection: close\r\n\r\n{'' if head else body}"
    ).encode()


def _cannot_listen(ip: str, port: int, error: OSError | ValueError) -> str:
    text = f"the health server cannot listen at {ip} port {port}: "
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return f"{text}another process does; find it with `ss -ltnp 'sport = :{port}'`, or change -healthz-port"
    if number == errno.EADDRNOTAVAIL:
        return f"{text}this machine has no such address; change -healthz-ip"
    if number == errno.EACCES:
        return f"{text}this user may not use ports below 1024; change -healthz-port"
    reason = os.strerror(number) if number and number > 0 else str(error)
    return f"{text}{reason}; check -healthz-ip and -healthz-port"
