"""Owns the names of what the kernel may do for the path beyond plain packets. Free of: how each is asked for.

Invariant: a capability is used only if it is switched on, was granted at start, and was not refused since.
"""

from __future__ import annotations

from enum import IntEnum


class Capability(IntEnum):
    """Mirrors the CAPABILITY_ constants of ext/dataplane/abi.pxd. `word` names it in flags, logs and status."""

    UDP_SEGMENT = 0
    """The socket cuts one large send into datagrams (UDP_SEGMENT)."""
    TUN_TSO = 1
    """TCP superframes pass the TUN, both ways."""
    TUN_USO = 2
    """UDP superframes pass the TUN, both ways."""
    UDP_GRO = 3
    """The socket hands over several datagrams as one message (UDP_GRO)."""

    @property
    def word(self) -> str:
        return self.name.lower().replace("_", "-")


EVERYTHING = frozenset(Capability)
