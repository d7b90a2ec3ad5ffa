"""Owns the records in which the kernel's links, addresses, routes and events are told to the rest of the house.

Free of: IO, netlink. Invariant: a record says what the kernel said at one moment and never changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)


@dataclass(frozen=True, slots=True)
class Vxlan:
    """What makes a kernel vxlan device what it is (drivers/net/vxlan)."""

    vni: int
    lower: int
    """Index of the underlay device; 0 for none."""
    local: IPv4Address | IPv6Address | None
    """The outer source address."""
    port: int
    """Where it listens and what it sends to."""
    learning: bool = False
    gbp: bool = False
    group: IPv4Address | IPv6Address | None = None
    """The multicast group or remote of the default FDB entry; ours have none."""


@dataclass(frozen=True, slots=True)
class Link:
    """A device. `kind` is the kernel's word (`tun`, `veth`, `vxlan`), empty for hardware and loopback."""

    index: int
    name: str
    kind: str
    mtu: int
    up: bool
    """Set up by somebody; says nothing of a cable."""
    carrier: bool
    """Somebody is at the other end; for a TUN device: a process holds it."""
    address: str
    """MAC as `aa:bb:cc:dd:ee:ff`; empty for a device without one, such as a TUN (a TAP has one)."""
    udp_port: int = 0
    """The UDP port on which a kernel vxlan device listens; 0 for every other device."""
    vxlan: Vxlan | None = None
    """Of a kernel vxlan device only."""


@dataclass(frozen=True, slots=True)
class Address:
    """An address of this node, with the prefix length that it was given."""

    index: int
    """Of the device that has it."""
    interface: IPv4Interface | IPv6Interface
    scope: int
    """The kernel's number: 0 everywhere, 253 this link, 254 this node."""
    permanent: bool
    """Not from DHCP or router advertisements: it has no lifetime."""
    deprecated: bool
    secondary: bool
    """IPv4: another address of the same prefix came first. IPv6: a temporary (privacy) address."""


def holders(addresses: Iterable[Address], networks: Collection[IPv4Network | IPv6Network]) -> frozenset[int]:
    """The devices, by index, that have an address in one of these networks."""
    return frozenset(each.index for each in addresses if any(each.interface.ip in network for network in networks))


@dataclass(frozen=True, slots=True)
class Route:
    """A route. Of several next hops, the first is told."""

    destination: IPv4Network | IPv6Network
    gateway: IPv4Address | IPv6Address | None
    device_index: int
    """0 for a route without a device, such as a blackhole."""
    source: IPv4Address | IPv6Address | None
    table: int
    metric: int
    scope: int


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """A device is there, as it is now, or is `gone`."""

    gone: bool
    index: int
    name: str
    up: bool
    carrier: bool
    mtu: int
    address: str
    """MAC, as in Link."""


@dataclass(frozen=True, slots=True)
class AddressEvent:
    """A device has an address, or it is `gone`."""

    gone: bool
    address: Address


@dataclass(frozen=True, slots=True)
class RouteEvent:
    """A route is there, or is `gone`. One that replaced another comes alone: nothing tells of the old one.

    `length`: of the destination's prefix. `body`: the kernel's own bytes (rtmsg and attributes), which `route_of` of
    kernel.rtnetlink reads: in a storm of changes that is more work than all the rest of listening.
    """

    gone: bool
    length: int
    body: bytes = field(default=b"", repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class NeighbourEvent:
    """A neighbour, or an entry of the FDB, of the device `index` is there as `body` says, or is `gone`."""

    gone: bool
    index: int
    fdb: bool
    body: bytes = field(default=b"", repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Overrun:
    """The kernel had more to tell than we could hold: anything may have changed, look at everything at once."""


KernelEvent = LinkEvent | AddressEvent | RouteEvent | NeighbourEvent | Overrun
