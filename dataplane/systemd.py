"""Owns what systemd is told: the sd_notify datagram (sd_notify(3)) and the watchdog's food (sd_watchdog_enabled(3)).

Free of: the process environment (it is an argument) and any dependence on systemd: without NOTIFY_SOCKET nothing
happens. Invariant: a daemon never fails or waits because of whoever started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator, Mapping


def notify(environ: Mapping[str, str], **fields: str) -> bool:
    """Send fields such as READY="1", STATUS="..." or STOPPING="1" in one datagram.

    Returns whether it was sent; never raises and never waits.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    # the manager's other address families (vsock) are for virtual machines
    if not address.startswith(("/", "@")):
        return False
    # a field ends at its line's end, so a value that has one would make up another field
    text = "\n".join(f"{name}={' '.join(value.splitlines())}" for name, value in fields.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as client:
            path = os.fsencode(address)
            client.connect(b"\0" + path[1:] if address.startswith("@") else path)
            client.send(text.encode(errors="backslashreplace"))
    except (OSError, ValueError):
        return False
    return True


def watchdog_seconds(environ: Mapping[str, str], pid: int) -> float | None:
    """How often the manager wants to hear of this process; None where it does not."""
    try:
        seconds = int(environ.get("WATCHDOG_USEC", "")) / 1e6
        meant = int(environ.get("WATCHDOG_PID", pid))
    except ValueError:
        return None
    return seconds if seconds > 0 and meant == pid else None


@contextlib.contextmanager
def watched(environ: Mapping[str, str]) -> Iterator[None]:
    """Feed the manager's watchdog from the running loop, twice in each of its intervals, while the block lasts.

    A loop that hangs, or spins in one place, feeds nothing: then systemd ends the process and starts it again, and
    the next one adopts what this one left.
    """
    seconds = watchdog_seconds(environ, os.getpid())
    if seconds is None:
        yield
        return
    feeding = asyncio.get_running_loop().create_task(_feed(environ, seconds / 2))
    try:
        yield
    finally:
        feeding.cancel()


async def _feed(environ: Mapping[str, str], seconds: float) -> None:
    while True:
        notify(environ, WATCHDOG="1")
        await asyncio.sleep(seconds)
