"""Owns the control socket: how the `loden` command asks a running daemon.

A Unix stream socket of mode 0600. One JSON object a line goes in (`{"verb": "status", ...arguments}`), one comes out;
`{"error": "..."}` where the daemon refuses. Free of what the verbs do. Invariant: nobody but root and the daemon's own
user is answered.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from dataplane.errors import KernelError, LodenError

log = logging.getLogger(__name__)

MAX_LINE = 64 * 1024
ANSWER_SECONDS = 5.0
HUNG_UP = "it closed the connection; only root and its own user are answered"

Verb = Callable[[dict[str, Any]], dict[str, Any]]


class ControlServer:
    """Answers requests until it is closed; `verbs` maps a name to what it does with the request's arguments."""

    def __init__(self, path: Path, server: asyncio.Server) -> None:
        self._path = path
        self._server = server

    @classmethod
    async def start(cls, path: Path, verbs: Mapping[str, Verb]) -> ControlServer:
        """Listen at `path`; a socket that a killed daemon left there is replaced. The caller's lock says that no
        other daemon owns the place. Raises KernelError."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await _serve(reader, writer, verbs)
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


def request(path: str, verb: str, **arguments: Any) -> dict[str, Any]:
    """Ask the daemon behind `path` and wait for its answer. Raises LodenError where none comes, or it refuses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_SECONDS)
        try:
            connection.connect(path)
            connection.sendall(msgspec.json.encode({"verb": verb, **arguments}) + b"\n")
            with connection.makefile("rb") as lines:
                line = lines.readline()
        except OSError as error:
            raise LodenError(f"no daemon answers at {path}: {_why(error)}") from None
    if not line.endswith(b"\n"):
        raise LodenError(f"no daemon answers at {path}: {HUNG_UP}")
    answer = msgspec.json.decode(line, type=dict[str, Any])
    if "error" in answer:
        raise LodenError(f"the daemon at {path} refuses {verb}: {answer['error']}")
    return answer


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, verbs: Mapping[str, Verb]) -> None:
    if _peer_uid(writer) not in (0, os.geteuid()):
        return
    while line := await asyncio.wait_for(reader.readline(), ANSWER_SECONDS):
        writer.write(msgspec.json.encode(_answer(line, verbs)) + b"\n")
        await writer.drain()


def _answer(line: bytes, verbs: Mapping[str, Verb]) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        return {"error": f"the request is no JSON object: {error}"}
    verb = verbs.get(str(arguments.pop("verb", "")))
    if verb is None:
        return {"error": f"unknown verb; known: {', '.join(sorted(verbs))}"}
    try:
        return verb(arguments)
    except LodenError as error:
        return {"error": str(error)}


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
