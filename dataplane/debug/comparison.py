"""Owns the comparison of one packet of a capture with the same packet as the path makes it today.

Free of IO and of the path. Invariant: what a capture cannot hold truly is not compared: an outer header's
identification, TTL, flags and checksums are those of a socket, not of the path, and VXLAN's source port is drawn.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

from dataplane.debug import dissect, fields
from dataplane.debug.pcapng import INBOUND, Packet
from dataplane.path.wire import FRAME_HEAD

MOST = 0xFFFF
"""Bytes of a packet."""

_SUPERFRAME = re.compile(r"(\d{1,20})/(\d{1,10})")
_SHOWN = 8
"""Bytes from the first that differs on."""

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Outer:
    """An outer datagram: `data` from the IP header on, as much as was kept; `length`: bytes of its payload."""

    source: Address
    destination: Address
    ports: tuple[int, int]
    tos: int
    ttl: int
    data: bytes
    length: int

    @classmethod
    def of(cls, packet: Packet | None) -> Outer | None:
        """None where it is no UDP datagram with all of its header."""
        data = dissect.ip_of(packet) if packet is not None else b""
        seen = dissect.look(data)
        if seen is None or seen.protocol != dissect.UDP or seen.ports is None or seen.fragment:
            return None
        four = seen.source.version == 4
        if seen.length < dissect.header_length(data) + 8:
            return None
        tos, ttl = (data[1], data[8]) if four else (int.from_bytes(data[:2]) >> 4 & 0xFF, data[7])
        return cls(seen.source, seen.destination, seen.ports, tos, ttl, data[: seen.length], seen.payload)

    @property
    def payload(self) -> bytes:
        return dissect.payload_of(self.data)

    def comparable(self, *, frames: bool) -> bytes:
        """What the path decides; the rest is zero."""
        made, four = bytearray(self.data), self.source.version == 4
        udp = dissect.header_length(self.data)
        if four:
            made[1] &= 3
            made[4:9] = bytes(5)
            made[10:12] = bytes(2)
        else:
            made[0:4] = (int.from_bytes(made[0:4]) & 0xF0300000).to_bytes(4)
            made[7] = 0
        if frames:
            made[udp : udp + 2] = bytes(2)
        made[udp + 6 : udp + 8] = bytes(2)
        return bytes(made)


@dataclass(frozen=True, slots=True)
class Record:
    """One packet as a capture tells of it. `number` is its packet id, or its place in a file without ids."""

    number: int
    inner: Packet | None
    outer: Outer | None
    words: dict[str, str]
    first: Packet

    @classmethod
    def of(cls, number: int, inner: Packet | None, outer: Packet | None) -> Record | None:
        """None where there is neither."""
        first = inner or outer
        if first is None:
            return None
        words = dissect.words(first.comment)
        return cls(number if first.number is None else first.number, inner, Outer.of(outer), words, first)

    @property
    def received(self) -> bool:
        return self.first.direction == INBOUND if self.first.direction else self.words.get("dir") == "rx"

    @property
    def drop(self) -> str:
        return self.words.get("drop", "")

    @property
    def lease(self) -> Network | None:
        with contextlib.suppress(ValueError):
            return ip_network(self.words.get("lease", ""))
        return None

    @property
    def superframe(self) -> tuple[int, int] | None:
        """Its number, and its bytes."""
        found = _SUPERFRAME.fullmatch(self.words.get("superframe", ""))
        return (int(found[1]), int(found[2])) if found else None

    @property
    def verdict(self) -> str:
        return f"drop={self.drop}" if self.drop else "carried"

    @property
    def packet(self) -> bytes:
        """The inner packet, as much as was kept."""
        return dissect.ip_of(self.inner) if self.inner is not None else b""

    @property
    def length(self) -> int:
        """Bytes of the inner packet."""
        return min(self.inner.length, MOST) if self.inner is not None else 0

    @property
    def cut(self) -> bool:
        """Whether not all of it was kept."""
        inner = self.inner is not None and len(self.packet) < self.length
        return inner or (self.outer is not None and len(self.outer.payload) < self.outer.length)

    def whole_packet(self) -> bytes:
        """The inner packet with zeros for what was not kept."""
        return self.packet.ljust(self.length, b"\0")

    def whole_payload(self, head: int) -> bytes:
        """The outer payload likewise; the inner block may hold more of it, behind `head` bytes."""
        if self.outer is None:
            return b""
        kept = self.outer.payload
        if len(kept) >= head:
            kept += self.packet[len(kept) - head :]
        return kept[: self.outer.length].ljust(min(self.outer.length, MOST), b"\0")

    def __str__(self) -> str:
        shown = self.packet or (self.outer.data if self.outer else self.first.data)
        way = "rx" if self.received else "tx"
        comment = " ".join(f"{word}={value}" for word, value in self.words.items() if value and word != "dir")
        return f"{way} {dissect.what(shown, self.first.length)}  {comment}".rstrip()


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs of one packet: its verdict, its lease, or a byte of the inner packet, of the outer datagram or of
    what is written to the device. `at`: the first byte that differs, counted from the IP header."""

    record: Record
    what: str
    recorded: str
    comes_out: str
    at: int | None = None
    field: str = ""


def compare(recorded: Record, made: Record, *, frames: bool) -> Difference | None:
    """What differs, as far as bytes were kept; None where nothing does. `frames`: the wire is VXLAN's."""
    if recorded.verdict != made.verdict and recorded.drop != "SEND_FAILED":
        return Difference(recorded, "verdict", _where(recorded), _where(made))
    if (found := _compare_lease(recorded, made)) is not None:
        return found
    if recorded.inner is not None:
        pair = (recorded.packet, recorded.length), (made.packet, made.length)
        if (found := compare_bytes(recorded, "inner packet", *pair)) is not None:
            return found
    return None if recorded.received else compare_outer(recorded, made, frames=frames)


def compare_outer(recorded: Record, made: Record, *, frames: bool) -> Difference | None:
    """What differs of two datagrams, where there are two."""
    here, there = recorded.outer, made.outer
    if here is None or there is None:
        return None
    pair = (here.comparable(frames=frames), here.length), (there.comparable(frames=frames), there.length)
    found = compare_bytes(recorded, "outer datagram", *pair, outer=True, frames=frames)
    if found is None or found.at is None:
        return found
    at = found.at
    return replace(found, recorded=_shown(here.data, here.length, at), comes_out=_shown(there.data, there.length, at))


def _where(record: Record) -> str:
    if record.drop or record.outer is None:
        return record.verdict
    return "accepted" if record.received else f"carried to {record.outer.destination}"


def _compare_lease(recorded: Record, made: Record) -> Difference | None:
    """Of a packet that lies in its lease: another node's address, or a dropped packet, bears the first of several."""
    seen, lease = dissect.look(recorded.packet), recorded.lease
    if seen is None or lease is None or recorded.drop:
        return None
    if (seen.source if recorded.received else seen.destination) not in lease or made.lease == lease:
        return None
    return Difference(recorded, "lease", str(lease), str(made.lease))


def compare_bytes(
    record: Record,
    what: str,
    recorded: tuple[bytes, int],
    made: tuple[bytes, int],
    *,
    outer: bool = False,
    frames: bool = False,
) -> Difference | None:
    """Bytes as far as both have them, then lengths."""
    (here, length), (there, made_length) = recorded, made
    most = min(len(here), len(there))
    if here[:most] != there[:most]:
        at = next(i for i in range(most) if here[i] != there[i])
        name = fields.field_of(here, at, outer=outer, vxlan=frames)
        return Difference(record, what, _shown(here, length, at), _shown(there, made_length, at), at, name)
    if length != made_length:
        return Difference(record, what, f"{length} bytes", f"{made_length} bytes")
    return None


def _shown(data: bytes, length: int, at: int) -> str:
    return f"{dissect.what(data, length)}: {data[at : at + _SHOWN].hex(' ')}"


def head_of(frames: bool) -> int:
    """Bytes of the outer payload before the inner packet."""
    return FRAME_HEAD if frames else 0
