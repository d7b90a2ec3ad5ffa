"""Owns a flanneld that can be made to hold its own GIL: `python -m dataplane.bench.holding SOCKET FLAGS...`.

It is our daemon, with one thread more: that waits at a Unix socket for a number of seconds and sleeps so long without
giving the GIL back, as an extension module with a fault would. Free of: when that happens. Invariant: until it is asked
the thread waits in accept(2) and costs nothing. """

from __future__ import annotations

import ctypes
import socket
import sys
import threading
import time
from pathlib import Path

from dataplane import daemon
from dataplane.lab import LabError


def hold(path: Path, seconds: float) -> tuple[float, float]:
    """Ask the daemon behind `path`: begin and end of its sleep, CLOCK_MONOTONIC. Raises LabError."""
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(seconds + 10)
            asking.connect(str(path))
            asking.sendall(f"{seconds}\n".encode())
            began, ended = asking.recv(200).split()
            return float(began), float(ended)
    except (OSError, ValueError) as error:
        raise LabError(f"the daemon at {path} does not hold its GIL: {error}") from None


def _serve(listener: socket.socket) -> None:
    # PyDLL, unlike CDLL, does not release the GIL around a call.
    usleep = ctypes.PyDLL(None).usleep
    while True:
        connection, _ = listener.accept()
        with connection:
            seconds = float(connection.recv(100))
            began = time.monotonic()
            usleep(ctypes.c_uint(round(seconds * 1e6)))
            connection.sendall(f"{began} {time.monotonic()}\n".encode())


def main() -> int:
    path, flags = Path(sys.argv[1]), sys.argv[2:]
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    threading.Thread(target=_serve, args=(listener,), name="holder of the GIL", daemon=True).start()
    return daemon.main(flags)


if __name__ == "__main__":
    sys.exit(main())
