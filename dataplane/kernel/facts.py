"""Owns the records in which the kernel's links, addresses and routes are told to the rest of the house.

Free of: IO, netlink. Invariant: a record says what the kernel said at one moment and never changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)


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
