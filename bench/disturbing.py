"""Owns a flanneld that can be disturbed from within: `python -m dataplane.bench.disturbing SOCKET FLAGS...`.

It is our daemon, with one thread more, which waits at a Unix socket. `hold SECONDS`: it sleeps so long without giving
the GIL back, as an extension module with a fault would. `move COUNT`: it has the event loop give so many routes another
peer each and publish them together. Free of: when that happens. Invariant: until it is asked the thread waits in
accept(2) and costs nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import sys
import threading
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from dataplane import daemon
from dataplane.bench.ends import Interval, far_leases
from dataplane.lab import LabError
from dataplane.path.datapath import Datapath

_SECONDS = 10.0
"""What a disturbance may take beyond its own time."""


class Disturbance:
    """What can be done to the daemon behind `path`. Raises LabError where that does not answer."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def hold(self, seconds: float) -> Interval:
        """Let a thread sleep so long with the GIL held: when it did."""
        return self._interval(self._ask(f"hold {seconds}", seconds))

    def move(self, count: int) -> Interval | None:
        """Give `count` routes, to subnets of far leases, another peer: when they were published, None where the daemon
        has no routes of its own."""
        answer = self._ask(f"move {count}", 0)
        return None if answer == "nothing" else self._interval(answer)

    def _interval(self, answer: str) -> Interval:
        try:
            began, ended = answer.split()
            return Interval(float(began), float(ended))
        except ValueError:
            raise LabError(f"the daemon at {self._path} answers {answer!r}") from None

    def _ask(self, words: str, seconds: float) -> str:
        try:
            with socket.socket(socket.AF_UNIX) as asking:
                asking.settimeout(seconds + _SECONDS)
                asking.connect(str(self._path))
                asking.sendall(f"{words}\n".encode())
                return asking.recv(200).decode().strip()
        except OSError as error:
            raise LabError(f"the daemon at {self._path} does not {words}: {error}") from None


def _hold(seconds: float) -> Interval:
    # PyDLL, unlike CDLL, does not release the GIL around a call.
    usleep = ctypes.PyDLL(None).usleep
    began = time.monotonic()
    usleep(ctypes.c_uint(round(seconds * 1e6)))
    return Interval(began, time.monotonic())


class _Routes:
    """The routes of the path that the daemon has started; a daemon whose packets the kernel carries has none."""

    def __init__(self) -> None:
        self._running: tuple[Datapath, asyncio.AbstractEventLoop] | None = None
        self._generations = cycle((0, 1))

    def started(self, path: Datapath) -> None:
        self._running = path, asyncio.get_running_loop()

    def move(self, count: float) -> Interval | None:
        if self._running is None:
            return None
        path, loop = self._running
        return asyncio.run_coroutine_threadsafe(self._moved(path, int(count)), loop).result(_SECONDS)

    async def _moved(self, path: Datapath, count: int) -> Interval:
        for lease in far_leases(count, next(self._generations)):
            path.set_route(lease.subnet, lease.address, bytes.fromhex(lease.mac.replace(":", "")))
        began = time.monotonic()
        path.publish()
        return Interval(began, time.monotonic())


def _serve(listener: socket.socket, routes: _Routes) -> None:
    disturbances: dict[str, Callable[[float], Interval | None]] = {"hold": _hold, "move": routes.move}
    while True:
        connection, _ = listener.accept()
        with connection:
            word, number = connection.recv(100).decode().split()
            done = disturbances[word](float(number))
            connection.sendall(b"nothing\n" if done is None else f"{done.began} {done.ended}\n".encode())


def main() -> int:
    path, flags = Path(sys.argv[1]), sys.argv[2:]
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    routes, start = _Routes(), Datapath.start

    def start_and_tell(path: Datapath) -> None:
        start(path)
        routes.started(path)

    Datapath.start = start_and_tell  # type: ignore[method-assign, assignment]
    threading.Thread(target=_serve, args=(listener, routes), name="disturbance", daemon=True).start()
    return daemon.main(flags)


if __name__ == "__main__":
    sys.exit(main())
