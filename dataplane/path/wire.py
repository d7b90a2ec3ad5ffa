"""Owns the plain-Python codec of every header on the packet path: the oracle that the compiled code must equal.

Free of IO and of speed. It is written to be read beside the RFCs; ext/dataplane/headers.pxd is written to be fast, and
tests/path/test_wire.py holds one against the other.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from dataplane.errors import DropReason

UDP_OVERHEAD = 28
"""Bytes that flannel's udp mode adds: outer IPv4 header 20, UDP header 8, nothing of its own."""

VXLAN_OVERHEAD = {4: 50, 6: 70}
"""Bytes that VXLAN adds, by outer IP version: IP 20 or 40, UDP 8, VXLAN 8, Ethernet 14. (Flannel's FLANNEL_MTU is 20
too large over IPv6, facts 5.2.)"""

LEAST_MTU = {4: 68, 6: 1280}
"""By IP version: what every link takes (RFC 791, RFC 8200)."""

UDP_PORT = 8285
"""flannel's default port of the udp backend (pkg/backend/udp/udp_amd64.go)."""

VXLAN_PORT = 8472
"""The kernel's default port for VXLAN, and so flannel's; IANA's is 4789."""

FRAME_HEAD = 22
"""Bytes of the VXLAN and the Ethernet header."""

TCP, UDP = 6, 17
ICMP, ICMPV6 = 1, 58
ICMP_ERROR_BYTES = 576
"""RFC 1812 section 4.3.2.3: an ICMP error quotes as much as fits into this many bytes."""

ICMPV6_ERROR_BYTES = 1280
"""RFC 4443 section 2.4 (c): the same for IPv6, its least MTU."""

_ICMP_QUERIES = frozenset({0, 8, 13, 14, 15, 16, 17, 18})
_ICMPV6_REDIRECT = 137
_ETHERTYPES = {4: 0x0800, 6: 0x86DD}
_VLAN = (0x8100, 0x88A8)
_FRAGMENT = 44
_EXTENSIONS = frozenset({0, 43, 60})
_MOST_EXTENSIONS = 8
NOT_ECT, ECT_1, ECT_0, CE = range(4)


@dataclass(frozen=True, slots=True)
class IPHeader:
    """The fields of RFC 791 or RFC 8200 that the path looks at. `length` is the total length by the header, in bytes.

    `l4` is where the header of `protocol` begins, behind options and extension headers; None where that cannot be told:
    in a later fragment, and where it lies outside the packet or behind too many extension headers.
    """

    version: int
    source: IPv4Address | IPv6Address
    destination: IPv4Address | IPv6Address
    length: int
    protocol: int
    l4: int | None
    fragment: bool


def checksum(data: bytes) -> int:
    """The Internet checksum of RFC 1071 over `data`, as the number that stands in the packet."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def pseudo_header(packet: bytes, protocol: int, l4_length: int) -> bytes:
    """RFC 9293 section 3.1, RFC 768 and RFC 8200 section 8.1; their lengths are zero-extended alike."""
    addresses = packet[12:20] if packet[0] >> 4 == 4 else packet[8:40]
    return addresses + struct.pack("!IBBH", l4_length >> 16, 0, protocol, l4_length & 0xFFFF)


def parse_ip(packet: bytes) -> IPHeader | DropReason:
    """The header of an inner packet, or why it cannot be carried. Bytes behind its total length are padding."""
    version = packet[0] >> 4 if packet else 0
    if version == 4:
        return _parse_v4(packet)
    return _parse_v6(packet) if version == 6 else DropReason.NOT_IP


def _parse_v4(packet: bytes) -> IPHeader | DropReason:
    header_length = (packet[0] & 15) * 4
    if len(packet) < 20 or header_length < 20:
        return DropReason.NOT_IP
    length, _, fragment = struct.unpack_from("!HHH", packet, 2)
    if not header_length <= length <= len(packet):
        return DropReason.LENGTH
    return IPHeader(
        version=4,
        source=IPv4Address(packet[12:16]),
        destination=IPv4Address(packet[16:20]),
        length=length,
        protocol=packet[9],
        l4=None if fragment & 0x1FFF else header_length,
        fragment=bool(fragment & 0x3FFF),
    )


def _parse_v6(packet: bytes) -> IPHeader | DropReason:
    if len(packet) < 40:
        return DropReason.NOT_IP
    length = 40 + struct.unpack_from("!H", packet, 4)[0]
    if length > len(packet):
        return DropReason.LENGTH
    protocol, l4, fragment = _upper_layer(packet[:length])
    return IPHeader(
        version=6,
        source=IPv6Address(packet[8:24]),
        destination=IPv6Address(packet[24:40]),
        length=length,
        protocol=protocol,
        l4=l4,
        fragment=fragment,
    )


def _upper_layer(packet: bytes) -> tuple[int, int | None, bool]:
    """(protocol, where its header begins, whether this is a fragment) of an IPv6 packet."""
    protocol, at = packet[6], 40
    for _ in range(_MOST_EXTENSIONS):
        if protocol == _FRAGMENT:
            return _behind_fragment_header(packet, at)
        if protocol not in _EXTENSIONS:
            return protocol, at, False
        if at + 8 > len(packet):
            return protocol, None, False
        protocol, at = packet[at], at + 8 * packet[at + 1] + 8
    return protocol, None, False


def _behind_fragment_header(packet: bytes, at: int) -> tuple[int, int | None, bool]:
    """Only of a fragment header that stands first, and only of the first fragment, is more known."""
    if at != 40 or at + 16 > len(packet) or struct.unpack_from("!H", packet, at + 2)[0] & 0xFFF8:
        return _FRAGMENT, None, True
    protocol = packet[at]
    return protocol, None if protocol in {*_EXTENSIONS, _FRAGMENT} else at + 8, True


def may_answer_with_icmp(packet: bytes, header: IPHeader, *, too_big: bool = False) -> bool:
    """RFC 1122 section 3.2.2 and RFC 4443 section 2.4 (e): which packets an ICMP error may be sent about."""
    if header.l4 is None:
        return False
    first = packet[header.l4] if header.l4 < header.length else None
    if header.version == 4:
        if header.source.packed[0] in (0, 127) or header.source.packed[0] >= 224 or header.destination.packed[0] >= 224:
            return False
        return header.protocol != ICMP or first in _ICMP_QUERIES
    source, destination = header.source.packed, header.destination.packed
    if (destination[0] == 0xFF and not too_big) or source[0] == 0xFF or int(header.source) <= 1:
        return False
    if source[:12] == bytes(10) + b"\xff\xff":
        return False
    return header.protocol != ICMPV6 or (first is not None and first >= 128 and first != _ICMPV6_REDIRECT)


def icmp_error(source: IPv4Address | IPv6Address, packet: bytes, *, mtu: int = 0) -> bytes | None:
    """The ICMP error from `source` about `packet`: longer than `mtu`, or without a route (0); None where none may be
    sent.

    RFC 792, RFC 1191 section 4; RFC 4443 sections 3.1 and 3.2.
    """
    header = parse_ip(packet)
    if isinstance(header, DropReason) or not may_answer_with_icmp(packet, header, too_big=mtu != 0):
        return None
    if header.version == 4:
        kind, code = (3, 4) if mtu else (3, 0)
        quote = packet[: min(header.length, ICMP_ERROR_BYTES - 28)]
        body = _summed(struct.pack("!BBHI", kind, code, 0, mtu) + quote, b"")
        # RFC 1812 section 5.3.2: errors are sent with the precedence of internetwork control
        addresses = source.packed + header.source.packed
        outer = struct.pack("!BBHHHBBH8s", 0x45, 0xC0, 20 + len(body), 0, 0, 64, ICMP, 0, addresses)
        return outer[:10] + struct.pack("!H", checksum(outer)) + outer[12:] + body
    quote = packet[: min(header.length, ICMPV6_ERROR_BYTES - 48)]
    body = struct.pack("!BBHI", 2 if mtu else 1, 0, 0, mtu) + quote
    outer = struct.pack("!IHBB", 6 << 28, len(body), ICMPV6, 64) + source.packed + header.source.packed
    return outer + _summed(body, pseudo_header(outer, ICMPV6, len(body)))


def _summed(body: bytes, before: bytes) -> bytes:
    return body[:2] + struct.pack("!H", checksum(before + body)) + body[4:]


def unfinished_checksum(packet: bytes) -> tuple[int, int] | None:
    """Where the checksum of a TCP or UDP packet begins to count, and its offset from there, if it holds the sum of the
    pseudo-header only: a kernel VTEP leaves the rest to the next device. None where it is finished, or wrong."""
    header = parse_ip(packet)
    if isinstance(header, DropReason) or header.l4 is None or header.fragment:
        return None
    offset, least = {TCP: (16, 20), UDP: (6, 8)}.get(header.protocol, (0, 0))
    if not least or header.l4 + least > header.length:
        return None
    l4 = packet[header.l4 : header.length]
    pseudo = pseudo_header(packet, header.protocol, len(l4))
    (found,) = struct.unpack_from("!H", l4, offset)
    unfinished = found == ~checksum(pseudo) & 0xFFFF and checksum(pseudo + l4) != 0
    return (header.l4, offset) if unfinished else None


# --- VXLAN: RFC 7348 section 5 --------------------------------------------------------------------------------


def frame_head(vni: int, mac: bytes, to: bytes, version: int) -> bytes:
    """What stands between the UDP header and a packet of IP version `version`: from our `mac` to the peer's."""
    return struct.pack("!BxxxI6s6sH", 0x08, vni << 8, to, mac, _ETHERTYPES[version])


def inspect_frame(datagram: bytes, vni: int, mac: bytes, version: int) -> DropReason | None:
    """Why the frame in a datagram is dropped; None where a packet for us follows. First in the order of the kernel's
    device (drivers/net/vxlan/vxlan_core.c, vxlan_rcv), then what the host behind it would not take."""
    if len(datagram) < 8:
        return DropReason.LENGTH
    flags, last = struct.unpack_from("!II", datagram)
    if not flags >> 24 & 0x08:
        return DropReason.NO_VNI
    if last >> 8 != vni:
        return DropReason.FOREIGN_VNI
    if flags != 0x08000000 or last & 0xFF:
        return DropReason.RESERVED_BITS
    if len(datagram) < FRAME_HEAD:
        return DropReason.LENGTH
    to, source, ethertype = struct.unpack_from("!6s6sH", datagram, 8)
    if source == mac:
        return DropReason.OWN_MAC
    if to != mac:
        return DropReason.OTHER_MAC
    if ethertype in _VLAN:
        return DropReason.VLAN
    return None if ethertype == _ETHERTYPES[version] else DropReason.ETHERTYPE


# --- ECN across the tunnel ------------------------------------------------------------------------------------


def inner_ecn(packet: bytes) -> int:
    """The ECN field of a packet's own header (RFC 3168 section 5)."""
    return packet[1] & 3 if packet[0] >> 4 == 4 else packet[1] >> 4 & 3


def outer_ecn(packet: bytes) -> int:
    """The ECN field of the outer header, as the kernel's tunnels write it (include/net/inet_ecn.h,
    INET_ECN_encapsulate): RFC 3168 section 9.1.1, full functionality."""
    return ECT_0 if inner_ecn(packet) == CE else inner_ecn(packet)


_DECAP: dict[int, dict[int, int | None]] = {
    NOT_ECT: {CE: None},
    ECT_1: {CE: CE},
    ECT_0: {CE: CE, ECT_1: ECT_1},
    CE: {},
}
"""RFC 6040 section 4.2, figure 4: what becomes of the inner field (row) where the outer one (column) changes it."""


def with_outer_ecn(packet: bytes, outer: int) -> bytes | None:
    """The packet as it leaves a tunnel whose outer header had that ECN field; None where it has to be dropped."""
    inner = inner_ecn(packet)
    ecn = _DECAP[inner].get(outer, inner)
    if ecn is None or ecn == inner:
        return None if ecn is None else packet
    if packet[0] >> 4 == 6:
        return packet[:1] + bytes([packet[1] & 0xCF | ecn << 4]) + packet[2:]
    changed = packet[:1] + bytes([packet[1] & 0xFC | ecn])
    (old,) = struct.unpack_from("!H", packet, 10)
    # RFC 1624 section 3: a checksum that was wrong stays wrong
    (former,), (now,) = struct.unpack("!H", packet[:2]), struct.unpack("!H", changed)
    total = (~old & 0xFFFF) + (~former & 0xFFFF) + now
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return changed + packet[2:10] + struct.pack("!H", ~total & 0xFFFF) + packet[12:]
