"""Owns one node of a replay: its path without pumps, the routes that it believes, and superframes made whole again.

Free of files. Invariant: a superframe or message is made only of packets that cutting gives back byte for byte, so that
what is fed in one piece is what was there.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dataplane.debug import comparison, pcapng, reading
from dataplane.debug.comparison import Address, Difference, Network, Record
from dataplane.debug.reading import Pair
from dataplane.errors import DropReason
from dataplane.path import superframe, wire
from dataplane.path.datapath import Tap
from dataplane.path.facts import SourceCheck, Vxlan
from dataplane.path.rehearsal import Message, OuterHeader, Rehearsal
from dataplane.path.superframe import NEEDS_CSUM, VnetHeader

_RING_BYTES = 1 << 22
_EVER = 1 << 63
_REASONS = tuple(reason.name.encode() for reason in DropReason)
_HEAD = pcapng.section("replay") + b"".join(
    pcapng.interface(pcapng.LINKTYPE_RAW, 0, name=name) for name in ("overlay", "underlay")
)
_MOST_MERGED = 64
"""Datagrams of one message (net/ipv4/udp_offload.c: UDP_GRO_CNT_MAX)."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file tells of a node: its outer address, where peers listen, and of VXLAN the VNI and its MAC."""

    local: Address
    port: int
    vxlan: tuple[int, bytes] | None


class Actor:
    """A node's path, and the routes that the file has told of so far."""

    def __init__(self, facts: Facts, check: SourceCheck) -> None:
        self.frames = facts.vxlan is not None
        self.head = comparison.head_of(self.frames)
        self._tap = Tap(b"", comparison.MOST, _RING_BYTES, _REASONS)
        vxlan = None if facts.vxlan is None else Vxlan(*facts.vxlan, facts.local.version)
        self._path = Rehearsal(self._tap, OuterHeader(facts.local, facts.port), source_check=check, vxlan=vxlan)
        self._routes: dict[Network, tuple[Address, bytes]] = {}
        self._doubts: dict[Network, tuple[Address | None, bytes]] = {}

    def close(self) -> None:
        self._path.close()

    # --- routes -----------------------------------------------------------------------------------------------

    def covering(self, address: Address) -> list[Network]:
        return [subnet for subnet in self._routes if address in subnet]

    def held_by(self, address: Address) -> list[Network]:
        return [subnet for subnet, (holder, _) in self._routes.items() if holder == address]

    def believes(self, subnet: Network, address: Address | None, mac: bytes) -> bool:
        """Whether this changes the routes: at once where nothing was known, else if it is told twice in a row."""
        known = self._routes.get(subnet)
        if known is None:
            return address is not None
        told = address, mac or known[1]
        if told == known:
            self._doubts.pop(subnet, None)
            return False
        if self._doubts.get(subnet) == told:
            return True
        self._doubts[subnet] = told
        return False

    def adopt(self, subnet: Network, address: Address | None, mac: bytes) -> None:
        """Raises KernelError for a subnet that no path can have."""
        self._doubts.pop(subnet, None)
        if address is None:
            del self._routes[subnet]
            self._path.remove_route(subnet)
        else:
            former = self._routes.get(subnet)
            self.set_route(subnet, address, mac or (former[1] if former else b""))

    def set_route(self, subnet: Network, address: Address, mac: bytes) -> None:
        """Raises KernelError."""
        mac = mac[:6].ljust(6, b"\0")
        if self._routes.get(subnet) != (address, mac):
            self._path.set_route(subnet, address, mac)
            self._routes[subnet] = address, mac

    # --- packets ----------------------------------------------------------------------------------------------

    def transmit_plain(self, packet: bytes) -> list[Record]:
        """What becomes of a finished packet from the TUN."""
        return self.transmit(VnetHeader(), packet)

    def transmit(self, header: VnetHeader, packet: bytes) -> list[Record]:
        """What becomes of a packet or superframe from the TUN."""
        self._path.transmit(header, packet)
        return list(self._seen())

    def receive(self, messages: Sequence[Message]) -> tuple[list[Record], list[tuple[VnetHeader, bytes]]]:
        """What becomes of the datagrams of a batch, and what is written to the TUN."""
        written = self._path.receive(messages)
        return list(self._seen()), written

    def _seen(self) -> Iterator[Record]:
        data = bytearray(_HEAD)
        while blocks := self._tap.drain(_EVER, 1 << 62):
            data += blocks
        for item in reading.pairs(pcapng.Reader(io.BytesIO(bytes(data)), "replay")):
            if isinstance(item, Pair) and (record := Record.of(0, item.inner, item.outer)) is not None:
                yield record

    def delivered(
        self, accepted: Iterable[tuple[Record, Record]], written: list[tuple[VnetHeader, bytes]]
    ) -> Iterator[tuple[Record, Difference]]:
        """What differs between accepted packets and what is written to the TUN, superframes cut again. `accepted`: as
        recorded, and as the path shows them."""
        cut = [packet for header, whole in written for packet in _cut(header, whole)]
        left = Counter(cut)
        lost = []
        for record, made in accepted:
            packet = _trimmed(made.packet)
            for form in (packet, _finished(packet)):
                if left[form]:
                    left[form] -= 1
                    break
            else:
                lost.append((record, packet))
        others = [packet for packet in cut if left[packet]]
        for number, (record, packet) in enumerate(lost):
            other = others[number] if number < len(others) else b""
            pair = (packet, len(packet)), (other, len(other))
            difference = comparison.compare_bytes(record, "written to the device", *pair)
            if difference is not None:
                yield record, difference


def _trimmed(packet: bytes) -> bytes:
    header = wire.parse_ip(packet)
    return packet if isinstance(header, DropReason) else packet[: header.length]


def _finished(packet: bytes) -> bytes:
    """A kernel VTEP leaves checksums unfinished; the segments of a superframe have them finished."""
    place = wire.unfinished_checksum(packet)
    if place is None:
        return packet
    return superframe.finished(VnetHeader(NEEDS_CSUM, 0, 0, 0, *place), packet) or packet


def _cut(header: VnetHeader, whole: bytes) -> list[bytes]:
    if header.gso_type == superframe.GSO_NONE:
        return [whole]
    return superframe.segments(header, whole) or [whole]


def join_segments(records: Sequence[Record]) -> tuple[VnetHeader, bytes] | None:
    """The superframe that these packets were cut out of; None where they are not all of it, whole and unaltered."""
    first = records[0]
    if len(records) < 2 or first.superframe is None or any(record.cut for record in records):
        return None
    packets = [record.packet for record in records]
    joined = _joined(packets)
    if joined is None or len(joined[1]) != first.superframe[1] or superframe.segments(*joined) != packets:
        return None
    return joined


def _joined(packets: Sequence[bytes]) -> tuple[VnetHeader, bytes] | None:
    head = wire.parse_ip(packets[0])
    if isinstance(head, DropReason) or head.l4 is None or head.protocol not in (wire.TCP, wire.UDP):
        return None
    tcp, l4 = head.protocol == wire.TCP, head.l4
    if len(packets[0]) < l4 + (20 if tcp else 8):
        return None
    payload_at = l4 + ((packets[0][l4 + 12] >> 4) * 4 if tcp else 8)
    payload = b"".join(packet[payload_at:] for packet in packets)
    size = len(packets[0]) - payload_at
    if size < 1 or payload_at + len(payload) > comparison.MOST:
        return None
    made = bytearray(packets[0][:payload_at])
    length = payload_at - l4 + len(payload)
    if tcp:
        made[l4 + 13] |= packets[-1][l4 + 13] if len(packets[-1]) > l4 + 13 else 0
    else:
        made[l4 + 4 : l4 + 6] = length.to_bytes(2)
    offset = 16 if tcp else 6
    partial = superframe.partial_checksum(packets[0], head.protocol, length)
    made[l4 + offset : l4 + offset + 2] = partial.to_bytes(2)
    kind = (superframe.GSO_TCPV4 if head.version == 4 else superframe.GSO_TCPV6) if tcp else superframe.GSO_UDP_L4
    header = VnetHeader(NEEDS_CSUM, kind, payload_at, size, l4, offset)
    return header, superframe.with_ip_length(bytes(made) + payload, payload_at + len(payload))


def join_messages(records: Sequence[Record], head: int) -> list[Message]:
    """The messages as which these datagrams came; one for each that was not merged, or not wholly captured. `head`: see
    `comparison.head_of`."""
    found: list[Message] = []
    at = 0
    while at < len(records):
        count = _merged(records, at)
        group = records[at : at + count]
        outer = group[0].outer
        if outer is None:
            raise ValueError("only datagrams are received")
        data = b"".join(record.whole_payload(head) for record in group)
        found.append(Message(outer.source, outer.ports[0], outer.tos, outer.ttl, outer.length, data))
        at += count
    return found


def _merged(records: Sequence[Record], at: int) -> int:
    """How many datagrams from there on came in one message."""
    first = records[at]
    if first.superframe is None or first.outer is None:
        return 1
    group = []
    for record in records[at : at + _MOST_MERGED]:
        if record.superframe != first.superframe or record.outer is None or record.outer.source != first.outer.source:
            break
        group.append(record.outer)
    sizes = [outer.length for outer in group]
    alike = all(size == sizes[0] for size in sizes[:-1]) and 0 < sizes[-1] <= sizes[0]
    return len(group) if alike and sum(sizes) == first.superframe[1] else 1
