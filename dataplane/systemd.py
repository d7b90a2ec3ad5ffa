"""Owns what systemd is told: the sd_notify datagram (sd_notify(3)).

Free of: the process environment (it is an argument) and any dependence on systemd: without NOTIFY_SOCKET nothing
happens. Invariant: a daemon never fails or waits because of whoever started it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


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
