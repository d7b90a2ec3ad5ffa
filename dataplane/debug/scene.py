"""Owns where a node's packets pass, for whoever looks at them from outside of the path: devices, wire, peers.

Free of IO. Invariant: a scene says how things were at one moment and never changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Tunnel:
    """How the datagrams are told that carry inner packets: by the UDP port that they go to. `vni`: of the frames in
    them; None where the payload is the packet itself."""

    port: int
    vni: int | None


@dataclass(frozen=True, slots=True)
class Way:
    """A peer's lease: its subnet, the node's outer address, and whether packets go there without encapsulation."""

    subnet: Network
    address: Address
    direct: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """`devices`: of the overlay, by name. `subnets`: our own; a device with an address in them is the pods'."""

    devices: tuple[str, ...]
    underlay: str
    tunnel: Tunnel | None
    networks: tuple[Network, ...]
    subnets: tuple[Network, ...]
    ways: tuple[Way, ...]

    @property
    def direct(self) -> bool:
        """Whether packets go anywhere without encapsulation."""
        return any(way.direct for way in self.ways)


class Ways:
    """Which peer an address belongs to: by the longest of the leases' prefixes, or as the node's own."""

    def __init__(self, ways: Iterable[Way] = ()) -> None:
        prefixes: dict[tuple[int, int], dict[int, Way]] = {}
        self._nodes: dict[bytes, Way] = {}
        for way in ways:
            size, bits = way.subnet.max_prefixlen // 8, way.subnet.max_prefixlen - way.subnet.prefixlen
            prefixes.setdefault((bits, size), {})[int(way.subnet.network_address) >> bits] = way
            self._nodes.setdefault(way.address.packed, way)
        self._prefixes = sorted(prefixes.items(), key=lambda item: item[0])

    def of_packet(self, packet: bytes, *, sent: bool) -> Way | None:
        """The peer at the far end of an inner packet, None also where it is none."""
        version = packet[0] >> 4 if packet else 0
        source, destination = (packet[12:16], packet[16:20]) if version == 4 else (packet[8:24], packet[24:40])
        return self.of(destination if sent else source)

    def of(self, address: bytes) -> Way | None:
        """The peer that a packed address belongs to."""
        number = int.from_bytes(address)
        for (bits, size), table in self._prefixes:
            if size == len(address) and (way := table.get(number >> bits)) is not None:
                return way
        return self._nodes.get(address)
