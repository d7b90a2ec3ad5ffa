"""Owns what a candidate tells of the path that it has brought up, and the far leases that fill a table.

Free of: making paths and sending over them. Invariant: far leases are worked out from their numbers alone, so that
whoever puts them and whoever sends to them mean the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple, Protocol

FAR_SUBNETS = (IPv4Network("10.192.0.0/11"), IPv4Network("10.224.0.0/12"))
"""Of the stand's network, below the subnets of its own nodes."""
FAR_ADDRESSES = (IPv4Network("198.19.0.0/17"), IPv4Network("198.19.128.0/17"))
"""Public addresses of the nodes that hold far leases, before and after a change of all of them."""
MOST_FAR = 10_000


@dataclass(frozen=True, slots=True)
class FarLease:
    """A lease of a node that is not there: the second node takes what is sent to it (see far.py)."""

    subnet: IPv4Network
    address: IPv4Address
    mac: str


def far_leases(count: int, generation: int = 0) -> list[FarLease]:
    """`count` leases; each is at another address and MAC in the other `generation` (0 or 1)."""
    first_subnet = int(FAR_SUBNETS[0].network_address)
    first_address = int(FAR_ADDRESSES[generation].network_address) + 1
    return [
        FarLease(
            IPv4Network((first_subnet + 256 * number, 24)),
            IPv4Address(first_address + number),
            f"0e:{generation + 1:02x}:00:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}",
        )
        for number in range(count)
    ]


class Interval(NamedTuple):
    """When something was done, CLOCK_MONOTONIC in seconds."""

    began: float
    ended: float


class Disturbed(Protocol):
    """The first node's daemon, as it is disturbed from within. Raises LodenError."""

    def hold(self, seconds: float) -> Interval:
        """Let a thread sleep so long with the GIL held."""

    def move(self, count: int) -> Interval | None:
        """Publish that `count` routes, to subnets of far leases, lead to another peer; None where the kernel has the
        routes."""


class Leases(Protocol):
    """A candidate's way to leases besides those of its two nodes."""

    def put(self, leases: Sequence[FarLease]) -> None:
        """Add them, or change what stands under their subnets. Raises LodenError."""

    def rehearse(self, leases: Sequence[FarLease]) -> None:
        """Do the work of writing them where no node of this network looks."""

    def clear(self) -> None:
        """Remove all that were put."""


@dataclass(frozen=True, slots=True)
class Ends:
    """Where traffic goes in and comes out: members of the stand, the far one's address, and the MTU between them.

    `processes`: those of the tunnel, on both nodes. `leases`: None where the harness can put none, and `why_no_leases`.
    `disturbed`: None where there is no daemon of ours. `starts`: how often it took until the path
    carried. `control`: the socket at which the first node's daemon captures; empty where none does."""

    source: str
    target: str
    address: str
    mtu: int
    processes: tuple[int, ...] = ()
    leases: Leases | None = None
    why_no_leases: str = "it has no table of leases"
    disturbed: Disturbed | None = None
    starts: int = 1
    control: str = ""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a sample: what is thrown away first, and what is counted."""

    warmup: float
    seconds: float

    @property
    def flags(self) -> list[str]:
        return [f"--warmup={self.warmup}", f"--seconds={self.seconds}"]
