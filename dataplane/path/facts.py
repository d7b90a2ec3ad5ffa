"""Owns the records in which the path is told what to do, and tells what it has done.

Free of: IO, descriptors' lives, the engine. Invariant: a record never changes, and says nothing of how packets are
carried; the numbers that mirror the compiled code's are named here and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple, TypedDict

from dataplane.errors import DropReason

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class SourceCheck(IntEnum):
    """How much of a datagram's claim is checked. Mirrors the CHECK_ constants of ext/dataplane/abi.pxd."""

    OFF = 0
    """Nothing, as flannel's udp backend."""
    NODE = 1
    """The outer source holds a lease; the inner source is in its subnet or is its public IP."""
    STRICT = 2
    """The outer source holds a lease; the inner source is in its subnet."""


class PathEventKind(IntEnum):
    """What the pumps report. Mirrors the EVENT_ constants of ext/dataplane/abi.pxd."""

    DEVICE_GONE = 0
    UNKNOWN_SOURCE = 1
    SEND_FAILED = 2
    TOO_LONG = 3
    CAPABILITY_LOST = 4
    SUPERFRAME = 5


@dataclass(frozen=True, slots=True)
class PathEvent:
    """`address` is the outer address it is about; `value` an errno; a number of datagrams for UNKNOWN_SOURCE,
    bytes of a datagram for TOO_LONG, a Capability for CAPABILITY_LOST, bytes of the packet for SUPERFRAME.
    `queue`: whose pumps tell it; each counts by itself."""

    kind: PathEventKind
    address: Address
    value: int
    queue: int = 0


class RouteCounters(NamedTuple):
    """Inner packets and bytes to and from one peer; `*_last` in monotonic milliseconds, 0 for never. (No dataclass: ten
    thousand of those take five times as long to make.)"""

    subnet: Network
    address: Address
    tx_packets: int
    tx_bytes: int
    tx_last: int
    rx_packets: int
    rx_bytes: int
    rx_last: int


class PumpCounters(TypedDict):
    """Of one direction, since its pumps were made. `drops`: by DropReason."""

    packets: int
    bytes: int
    superframes: int
    messages: int
    calls: int
    wakeups: int
    moderations: int
    partings: int
    icmp_errors: int
    wrong_checksums: int
    events_lost: int
    drops: tuple[int, ...]


def totals(pumps: Iterable[Mapping[str, object]]) -> dict[str, int]:
    """The sums of what pumps of one direction have counted; drops are summed by reason elsewhere."""
    total: Counter[str] = Counter()
    for pump in pumps:
        total.update({name: count for name, count in pump.items() if isinstance(count, int)})
    return dict(total)


@dataclass(frozen=True, slots=True)
class PathStatistics:
    """One reading of every counter. `drops` has every reason, also at 0."""

    tx: PumpCounters
    rx: PumpCounters
    drops: dict[DropReason, int]
    routes: tuple[RouteCounters, ...]


@dataclass(frozen=True, slots=True)
class Outer:
    """The UDP sockets, as descriptors: where datagrams come in, and those that they leave by (none: the same one).

    `port`: where peers listen. `further`: more sockets where datagrams come in, one for each further queue of the TUN;
    they share the address and port of `receiver`.
    """

    receiver: int
    port: int
    senders: tuple[int, ...] = ()
    further: tuple[int, ...] = ()

    @property
    def receivers(self) -> tuple[int, ...]:
        return (self.receiver, *self.further)

    def senders_of(self, queue: int) -> tuple[int, ...]:
        """By which datagrams of a queue's packets leave."""
        return self.senders or (self.receivers[queue],)


@dataclass(frozen=True, slots=True)
class IcmpSender:
    """A raw socket that takes whole packets, and our address in the errors that leave by it."""

    fd: int
    source: Address


@dataclass(frozen=True, slots=True)
class Vxlan:
    """Packets travel in VXLAN frames: our network's number, our VTEP's MAC, and the one IP version inside."""

    vni: int
    mac: bytes
    version: int


def wide(address: Address) -> bytes:
    """As the path's tables have it: 16 bytes, IPv4 as ::ffff:a.b.c.d (RFC 4291 section 2.5.5.2)."""
    return bytes(10) + b"\xff\xff" + address.packed if address.version == 4 else address.packed


def narrow(address: bytes) -> Address:
    """The address that `wide` has made 16 bytes of."""
    found = IPv6Address(address)
    return found.ipv4_mapped or found
