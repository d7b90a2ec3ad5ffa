"""Owns the names of a packet's bytes: which field of which header a byte belongs to.

Free of IO. Invariant: whatever the bytes are, asking for one ends in a name, never in an exception.
"""

from __future__ import annotations

from collections.abc import Iterator

Fields = tuple[tuple[str, int], ...]

_V4: Fields = (
    ("version and header length", 1),
    ("TOS", 1),
    ("total length", 2),
    ("identification", 2),
    ("flags and fragment offset", 2),
    ("TTL", 1),
    ("protocol", 1),
    ("header checksum", 2),
    ("source", 4),
    ("destination", 4),
)
_V6: Fields = (
    ("version, traffic class and flow label", 4),
    ("payload length", 2),
    ("next header", 1),
    ("hop limit", 1),
    ("source", 16),
    ("destination", 16),
)
_TCP: Fields = (
    ("source port", 2),
    ("destination port", 2),
    ("sequence number", 4),
    ("acknowledgement number", 4),
    ("header length", 1),
    ("flags", 1),
    ("window", 2),
    ("checksum", 2),
    ("urgent pointer", 2),
)
_UDP: Fields = (("source port", 2), ("destination port", 2), ("length", 2), ("checksum", 2))
_ICMP: Fields = (("type", 1), ("code", 1), ("checksum", 2), ("identifier", 2), ("sequence number", 2))
_VXLAN: Fields = (("flags", 1), ("reserved bits", 3), ("VNI", 3), ("reserved bits", 1))
_ETHERNET: Fields = (("destination", 6), ("source", 6), ("ethertype", 2))
_BEHIND = {6: ("TCP", _TCP), 17: ("UDP", _UDP), 1: ("ICMP", _ICMP), 58: ("ICMPv6", _ICMP)}


def field_of(data: bytes, at: int, *, outer: bool = False, vxlan: bool = False) -> str:
    """The name of the field that holds byte `at` of an IP packet. `outer`: a datagram of an overlay, whose payload is a
    packet, or a frame of VXLAN."""
    end = 0
    name = "payload"
    for field, size in _outer(data, vxlan=vxlan) if outer else _packet(data, ""):
        end += size
        name = field
        if at < end:
            return name
    return name


def _packet(data: bytes, prefix: str) -> Iterator[tuple[str, int]]:
    yield from _ip(data, prefix)
    four = _is_v4(data)
    later = four and int.from_bytes(data[6:8]) & 0x1FFF
    protocol = data[9:10] if four else data[6:7]
    if protocol and not later and protocol[0] in _BEHIND:
        yield from _named(prefix + _BEHIND[protocol[0]][0], _BEHIND[protocol[0]][1])
    yield f"{prefix}payload", len(data)


def _outer(data: bytes, *, vxlan: bool) -> Iterator[tuple[str, int]]:
    yield from _ip(data, "outer ")
    yield from _named("outer UDP", _UDP)
    at = sum(size for _, size in _ip(data, "")) + 8
    if vxlan:
        yield from _named("VXLAN", _VXLAN)
        yield from _named("inner Ethernet", _ETHERNET)
        at += 22
    yield from _packet(data[at:], "inner ")


def _ip(data: bytes, prefix: str) -> Iterator[tuple[str, int]]:
    """The fields of the IP header."""
    name = f"{prefix}{'IPv4' if _is_v4(data) else 'IPv6'}"
    yield from _named(name, _V4 if _is_v4(data) else _V6)
    if _is_v4(data) and (data[0] & 15) * 4 > 20:
        yield f"{name} options", (data[0] & 15) * 4 - 20


def _is_v4(data: bytes) -> bool:
    return data[:1] != b"" and data[0] >> 4 == 4


def _named(prefix: str, fields: Fields) -> Iterator[tuple[str, int]]:
    for name, size in fields:
        yield f"{prefix} {name}", size
