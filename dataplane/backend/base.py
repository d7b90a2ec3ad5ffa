"""Owns what every backend must do, and the facts about the underlay that it is given.

Free of: IO. A backend turns leases into packets that arrive: it makes the device of this node and carries
traffic to the nodes that hold the other leases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, NamedTuple, Protocol, runtime_checkable

from dataplane.errors import DropReason
from dataplane.lease.model import Lease, LeaseAttrs, LeaseEvent
from dataplane.path.capability import Capability


@dataclass(frozen=True, slots=True)
class Underlay:
    """The interface that faces the other nodes. `public_ip` is what peers send to; behind NAT it is not `address`.

    A node without IPv4 has 0.0.0.0 for both, as in its lease; one without IPv6 has None for both.
    """

    name: str
    index: int
    address: IPv4Address
    public_ip: IPv4Address
    mtu: int
    address_v6: IPv6Address | None = None
    public_ipv6: IPv6Address | None = None


class PeerStatus(NamedTuple):
    """Inner packets and bytes to and from one peer. `idle`: seconds since the last packet came in, None for never. (No
    dataclass: there may be ten thousand, made while the event loop waits.)"""

    subnet: IPv4Network | IPv6Network
    public_ip: IPv4Address | IPv6Address
    tx_packets: int
    tx_bytes: int
    rx_packets: int
    rx_bytes: int
    idle: float | None
    counted: bool = True
    """False where the kernel carries the packets, which counts them for the whole device only: all counters are 0."""
    direct: bool = False
    """Packets leave without encapsulation, by the underlay's own routes (DirectRouting)."""


@dataclass(frozen=True, slots=True)
class Queues:
    """Of the device: how many were asked for, how many it has (0 before there is one), and why fewer."""

    asked: int
    used: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """What a backend tells of itself. `drops` has every reason, also at 0."""

    type: str
    device: str
    mtu: int
    peers: tuple[PeerStatus, ...]
    drops: dict[DropReason, int]
    unknown_sources: dict[IPv4Address | IPv6Address, int]
    """Datagrams by outer sources that hold no lease."""
    ignored: dict[IPv4Network | IPv6Network, str]
    """Leases of other nodes that this backend cannot carry, with the reason."""
    capabilities: dict[Capability, str]
    """`on`, or why not; empty where the kernel carries the packets."""
    dataplane: str = "userspace"
    """Who carries the packets: `userspace` (this daemon), `kernel`, or `none`."""
    repairs: int = 0
    """How often something that others had taken away from the kernel, or changed there, was put right."""
    queues: Queues | None = None
    """None where the kernel carries the packets."""
    pumps: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """What the pumps of a direction, `tx` or `rx`, have counted together since the device was opened last: `packets`
    and `bytes` of inner packets; `superframes` taken or written; `messages`, each a run of datagrams; system `calls`
    that sent or received them; `wakeups`; `moderations`, how often a busy pump let packets gather;
    `partings`, how often TX went to its thread; `icmp_errors` told to pods; inner `wrong_checksums`; `events_lost`,
    reports that nobody took in time. Empty where the kernel carries the packets."""


class Backend(Protocol):
    """The life of a backend: prepare, attach, any number of applies, close."""

    @property
    def mtu(self) -> int:
        """What a pod may send in one packet, in bytes; known from the start."""

    async def prepare(self) -> LeaseAttrs:
        """What this node's lease shall say. What can be taken by somebody else (a port, a device whose address
        stands in the lease) is taken here, so that no lease is asked for in vain. Raises KernelError."""

    async def attach(self, lease: Lease) -> None:
        """Make device, address and route for our own lease and start to carry packets. Raises KernelError,
        and then leaves nothing behind."""

    async def apply(self, events: Sequence[LeaseEvent]) -> None:
        """Follow the peers' leases. The first call brings all that there are, perhaps none: what stands in the kernel
        for others is left over. Applying the same events twice changes nothing."""

    async def move(self, facing: Underlay) -> LeaseAttrs:
        """The underlay's interface, address, public IP or MTU has changed: follow it, without losing inner connections,
        and say what the lease shall say now. Raises KernelError, and then goes on as before where it can."""

    def status(self) -> BackendStatus:
        """As of now; before attach everything is 0 and empty."""

    async def close(self) -> None:
        """Ordered stop: what attach made is gone afterwards, unless the kernel carries on by itself as it does for
        flannel. Safe to call at any point of the life."""


@runtime_checkable
class Tappable(Protocol):
    """A backend whose packets pass through our own path, where they can be looked at."""

    async def arm(self, taps: Sequence[Any]) -> None:
        """Show every packet to these taps of the path from now on, and to no others; also after the device was made
        again. Returns once the former ones are no longer written to."""
