"""Owns the control socket: how the `loden` command asks a running daemon.

A Unix stream socket of mode 0600. One JSON object a line goes in (`{"verb": "status", ...arguments}`), one comes out;
`{"error": "..."}` where the daemon refuses. A verb that streams takes the connection over: its line is followed by
bytes until either side ends. Free of what the verbs do. Invariant: nobody but root and the daemon's own user is
answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from dataplane.errors import KernelError, LodenError

log = logging.getLogger(__name__)

MAX_LINE = 64 * 1024
ANSWER_SECONDS = 5.0
HUNG_UP = "it closed the connection; only root and its own user are answered"

Verb = Callable[[dict[str, Any]], dict[str, Any] | Awaitable[dict[str, Any]]]
"""What a verb does with a request's arguments; LodenError refuses."""

Stream = Callable[[dict[str, Any], socket.socket, Callable[[], None], asyncio.Event], Awaitable[None]]
"""A verb that streams: arguments, the client's socket (which does not block), what to call before the first byte, and
an event that is set when the client says or sends no more. LodenError before that call refuses."""


class ControlServer:
    """Answers requests until it is closed; `verbs` maps a name to what it does with the request's arguments."""

    def __init__(self, path: Path, server: asyncio.Server) -> None:
        self._path = path
        self._server = server

    @classmethod
    async def start(
        cls, path: Path, verbs: Mapping[str, Verb], streams: Mapping[str, Stream] | None = None
    ) -> ControlServer:
        """Listen at `path`; a socket that a killed daemon left there is replaced. The caller's lock says that no
        other daemon owns the place. Raises KernelError."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await _serve(reader, writer, verbs, streams or {})
            except (ConnectionError, TimeoutError, ValueError, asyncio.LimitOverrunError) as error:
                log.debug("Control connection ended: %s", error)
            finally:
                writer.close()

        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path):
                _remove_socket(path)
            os.fchmod(listener.fileno(), 0o600)  # the file that bind makes takes its mode from the socket
            listener.bind(str(path))
            server = await asyncio.start_unix_server(serve, sock=listener, limit=MAX_LINE)
        except OSError as error:
            listener.close()
            raise KernelError(f"cannot listen on control socket {path}: {error.strerror or error}") from None
        return cls(path, server)

    async def close(self) -> None:
        """Stop answering and remove the socket."""
        self._server.close()
        self._path.unlink(missing_ok=True)


def request(path: str, verb: str, seconds: float = ANSWER_SECONDS, **arguments: Any) -> dict[str, Any]:
    """Ask the daemon behind `path` and wait for its answer. Raises LodenError where none comes, or it refuses."""
    with _ask(path, verb, seconds, arguments) as (_, answer):
        return answer


@contextlib.contextmanager
def stream(path: str, verb: str, **arguments: Any) -> Iterator[socket.socket]:
    """Ask for a verb that streams: the connection, once the daemon has agreed; blocking, at its first byte. Raises
    LodenError."""
    with _ask(path, verb, ANSWER_SECONDS, arguments) as (connection, _):
        connection.settimeout(None)
        yield connection


@contextlib.contextmanager
def _ask(
    path: str, verb: str, seconds: float, arguments: dict[str, Any]
) -> Iterator[tuple[socket.socket, dict[str, Any]]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        try:
            connection.connect(path)
            connection.sendall(msgspec.json.encode({"verb": verb, **arguments}) + b"\n")
            line = _read_line(connection)
        except OSError as error:
            raise LodenError(f"no daemon answers at {path}: {_why(error)}") from None
        if not line.endswith(b"\n"):
            raise LodenError(f"no daemon answers at {path}: {HUNG_UP}")
        answer = msgspec.json.decode(line, type=dict[str, Any])
        if "error" in answer:
            raise LodenError(f"the daemon at {path} refuses {verb}: {answer['error']}")
        yield connection, answer


def _read_line(connection: socket.socket) -> bytes:
    """Up to the end of a line and not a byte more: what follows belongs to the stream."""
    line = bytearray()
    while not line.endswith(b"\n"):
        waiting = connection.recv(1 << 16, socket.MSG_PEEK)
        if not waiting:
            break
        line += connection.recv(waiting.find(b"\n") + 1 or len(waiting))
    return bytes(line)


async def _serve(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    verbs: Mapping[str, Verb],
    streams: Mapping[str, Stream],
) -> None:
    if _peer_uid(writer) not in (0, os.geteuid()):
        return
    while True:
        async with asyncio.timeout(ANSWER_SECONDS):
            line = await reader.readline()
        if not line:
            return
        try:
            arguments = _arguments(line)
            name = str(arguments.pop("verb", ""))
            if name in streams:
                await _stream(reader, writer, streams[name], arguments)
                return
            answer = await _answer(name, arguments, verbs, streams)
        except LodenError as error:
            answer = {"error": str(error)}
        writer.write(msgspec.json.encode(answer) + b"\n")
        await writer.drain()


def _arguments(line: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise LodenError(f"the request is no JSON object: {error}") from None


async def _answer(
    name: str, arguments: dict[str, Any], verbs: Mapping[str, Verb], streams: Mapping[str, Stream]
) -> dict[str, Any]:
    if name not in verbs:
        raise LodenError(f"unknown verb; known: {', '.join(sorted([*verbs, *streams]))}")
    answer = verbs[name](arguments)
    return await answer if inspect.isawaitable(answer) else answer


async def _stream(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, verb: Stream, arguments: dict[str, Any]
) -> None:
    """Hand the connection's descriptor over. The client's end of sending, or anything it sends, ends the stream."""
    stop = asyncio.Event()

    async def listen() -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read(1)
        stop.set()

    def begin() -> None:
        # nothing else was written to this connection, so that the line leaves at once and whole
        client.send(b"{}\n")

    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as client:
        client.setblocking(False)
        listening = asyncio.create_task(listen())
        try:
            await verb(arguments, client, begin, stop)
        finally:
            listening.cancel()


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    credentials = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    uid: int = struct.unpack("3i", credentials)[1]
    return uid


def _remove_socket(path: Path) -> None:
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise FileExistsError(errno.EEXIST, "something that is no socket is there already")
    path.unlink()


def _why(error: OSError) -> str:
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return "is flanneld running, and with this --control-socket or --subnet-file?"
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return HUNG_UP
    return "it took too long" if isinstance(error, TimeoutError) else (error.strerror or str(error))
