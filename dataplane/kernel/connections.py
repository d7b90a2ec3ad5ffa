"""Owns ending this process's TCP connections from an address that the node no longer has.

Free of: who holds them. Such a connection hears nothing any more, not even that it is dead: without this a store's
client waits for its own pings to time out, seconds after the node has a new address. Invariant: only connections of
this process are touched, and each holder learns of it as of a peer that hung up.
"""

from __future__ import annotations

import contextlib
import os
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path


def hang_up(address: IPv4Address | IPv6Address) -> int:
    """Shut down the connections whose own end is that address; returns how many there were."""
    ended = 0
    for entry in list(Path("/proc/self/fd").iterdir()):
        # descriptors come and go in other threads, and most of them are no connection
        with contextlib.suppress(OSError, ValueError):
            if entry.readlink().name.startswith("socket:") and _end(int(entry.name), address):
                ended += 1
    return ended


def _end(descriptor: int, address: IPv4Address | IPv6Address) -> bool:
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
            return False
        own = ip_address(connection.getsockname()[0])
        if address not in (own, getattr(own, "ipv4_mapped", None)):
            return False
        connection.getpeername()  # OSError for a listener, which may hear of the address again
        connection.shutdown(socket.SHUT_RDWR)
        return True
