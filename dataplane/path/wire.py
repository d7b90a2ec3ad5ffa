"""Owns the plain-Python codec of every header on the packet path: the oracle that the compiled code must equal.

Free of IO and of speed. It is written to be read beside the RFCs; ext/dataplane/headers.pxd is written to be fast, and
tests/path/test_wire.py holds one against the other.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address

from dataplane.errors import DropReason

UDP_OVERHEAD = 28
"""Bytes that flannel's udp mode adds: outer IPv4 header 20, UDP header 8, nothing of its own."""

UDP_PORT = 8285
"""flannel's default port of the udp backend (pkg/backend/udp/udp_amd64.go)."""

ICMP = 1
ICMP_UNREACHABLE = 3
ICMP_ERROR_BYTES = 576
"""RFC 1812 section 4.3.2.3: an ICMP error quotes as much as fits into this many bytes."""

_ICMP_QUERIES = frozenset({0, 8, 13, 14, 15, 16, 17, 18})


@dataclass(frozen=True, slots=True)
class IPv4Header:
    """The fields of RFC 791 that the path looks at. `length` is the total length by the header, in bytes."""

    source: IPv4Address
    destination: IPv4Address
    length: int
    header_length: int
    protocol: int
    fragment_offset: int


def checksum(data: bytes) -> int:
    """The Internet checksum of RFC 1071 over `data`, as the number that stands in the packet."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def parse_ipv4(packet: bytes) -> IPv4Header | DropReason:
    """The header of an inner packet, or why it cannot be carried. Bytes behind its total length are padding."""
    if len(packet) < 20 or packet[0] >> 4 != 4:
        return DropReason.NOT_IP
    header_length = (packet[0] & 15) * 4
    if header_length < 20:
        return DropReason.NOT_IP
    (length,) = struct.unpack_from("!H", packet, 2)
    if not header_length <= length <= len(packet):
        return DropReason.LENGTH
    (fragment,) = struct.unpack_from("!H", packet, 6)
    return IPv4Header(
        source=IPv4Address(packet[12:16]),
        destination=IPv4Address(packet[16:20]),
        length=length,
        header_length=header_length,
        protocol=packet[9],
        fragment_offset=fragment & 0x1FFF,
    )


def may_answer_with_icmp(packet: bytes, header: IPv4Header) -> bool:
    """RFC 1122 section 3.2.2: which packets an ICMP error may be sent about."""
    if header.fragment_offset:
        return False
    if int(header.destination) >> 28 >= 14 or int(header.source) >> 28 >= 14:
        return False
    if header.source.packed[0] in (0, 127):
        return False
    if header.protocol == ICMP:
        return header.length > header.header_length and packet[header.header_length] in _ICMP_QUERIES
    return True


def icmp_unreachable(source: IPv4Address, packet: bytes) -> bytes | None:
    """The ICMP "network unreachable" (RFC 792) from `source` about `packet`; None where none may be sent."""
    header = parse_ipv4(packet)
    if isinstance(header, DropReason) or not may_answer_with_icmp(packet, header):
        return None
    quote = packet[: min(header.length, ICMP_ERROR_BYTES - 28)]
    body = struct.pack("!BBHI", ICMP_UNREACHABLE, 0, 0, 0) + quote
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    # RFC 1812 section 5.3.2: errors are sent with the precedence of internetwork control
    outer = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0xC0, 20 + len(body), 0, 0, 64, ICMP, 0, source.packed, header.source.packed
    )
    outer = outer[:10] + struct.pack("!H", checksum(outer)) + outer[12:]
    return outer + body
