"""Owns the plain-Python form of segmentation and coalescing: the oracle that _segment.pyx and _coalesce.pyx in ext/
must equal.

Free of IO and of speed. A superframe is one large TCP or UDP packet with a virtio_net_hdr that says how to cut it
(include/uapi/linux/virtio_net.h; Documentation/networking/segmentation-offloads.rst in the kernel's sources).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from dataplane.path.wire import ICMPV6, checksum, pseudo_header, unfinished_checksum
from dataplane.path.wire import TCP as TCP
from dataplane.path.wire import UDP as UDP

FIN, PSH, ACK, ECE, CWR = 0x01, 0x08, 0x10, 0x40, 0x80
NEEDS_CSUM = 1
RSC_INFO = 4
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 0, 1, 4, 5, 0x80
CHAIN_PACKETS = 64
MOST_PACKET = 65535
TUNNEL_PORTS = frozenset({4789, 4790, 6081, 8472})


@dataclass(frozen=True, slots=True)
class VnetHeader:
    """struct virtio_net_hdr: what is unfinished in the packet behind it."""

    flags: int = 0
    gso_type: int = GSO_NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    def encode(self) -> bytes:
        """In the machine's byte order, as a TUN wants it."""
        return struct.pack(
            "=BBHHHH", self.flags, self.gso_type, self.hdr_len, self.gso_size, self.csum_start, self.csum_offset
        )

    @classmethod
    def decode(cls, data: bytes) -> VnetHeader:
        return cls(*struct.unpack("=BBHHHH", data))


def partial_checksum(packet: bytes, protocol: int, l4_length: int) -> int:
    """What stands in an unfinished checksum: the pseudo-header's sum, not complemented."""
    return ~checksum(pseudo_header(packet, protocol, l4_length)) & 0xFFFF


def with_ip_length(packet: bytes, length: int) -> bytes:
    """The packet with its IP length set to `length` and, for IPv4, a right header checksum."""
    if packet[0] >> 4 == 6:
        return packet[:4] + struct.pack("!H", length - 40) + packet[6:]
    header = (packet[0] & 15) * 4
    packet = packet[:2] + struct.pack("!H", length) + packet[4:10] + b"\0\0" + packet[12:]
    return packet[:10] + struct.pack("!H", checksum(packet[:header])) + packet[12:]


def finished(header: VnetHeader, packet: bytes) -> bytes | None:
    """The packet with its unfinished checksum completed; None where the header points outside it."""
    at = header.csum_start + header.csum_offset
    if at + 2 > len(packet) or header.flags & RSC_INFO:
        return None
    value = checksum(packet[header.csum_start :])
    if value == 0 and header.csum_offset == 6:
        value = 0xFFFF
    return packet[:at] + struct.pack("!H", value) + packet[at + 2 :]


def segments(header: VnetHeader, packet: bytes) -> list[bytes] | None:
    """The packets that the kernel would cut a superframe into; None where it is none that can be cut."""
    layout = _layout(header, packet)
    if layout is None:
        return None
    protocol, l4, payload_at = layout
    payload = packet[payload_at:]
    check_at = l4 + header.csum_offset
    (partial,) = struct.unpack_from("!H", packet, check_at)
    found = []
    for start in range(0, len(payload), header.gso_size):
        data = payload[start : start + header.gso_size]
        cut = bytearray(packet[:payload_at])
        if cut[0] >> 4 == 4:
            (identification,) = struct.unpack_from("!H", cut, 4)
            struct.pack_into("!H", cut, 4, (identification + start // header.gso_size) & 0xFFFF)
        if protocol == TCP:
            (sequence,) = struct.unpack_from("!I", cut, l4 + 4)
            struct.pack_into("!I", cut, l4 + 4, (sequence + start) & 0xFFFFFFFF)
            if start:
                cut[l4 + 13] &= ~CWR
            if start + header.gso_size < len(payload):
                cut[l4 + 13] &= ~(FIN | PSH)
        else:
            struct.pack_into("!H", cut, l4 + 4, 8 + len(data))
        length = payload_at - l4 + len(data)
        # the pseudo-header's sum with the length of this segment in place of the length of all
        sum_of_pseudo = partial - (len(packet) - l4) + length
        struct.pack_into("!H", cut, check_at, sum_of_pseudo % 0xFFFF)
        value = checksum(bytes(cut[l4:]) + data)
        if value == 0 and protocol == UDP:
            value = 0xFFFF
        struct.pack_into("!H", cut, check_at, value)
        found.append(with_ip_length(bytes(cut) + data, payload_at + len(data)))
    return found


def _layout(header: VnetHeader, packet: bytes) -> tuple[int, int, int] | None:
    """(protocol, where L4 begins, where the payload begins) of a superframe that can be cut."""
    kind = header.gso_type & ~GSO_ECN
    l4 = header.csum_start
    if not packet or header.flags & (NEEDS_CSUM | RSC_INFO) != NEEDS_CSUM:
        return None
    if header.gso_size == 0 or len(packet) > MOST_PACKET:
        return None
    version = packet[0] >> 4
    if version == 4 and kind in (GSO_TCPV4, GSO_UDP_L4):
        if l4 < 20 or l4 != (packet[0] & 15) * 4:
            return None
    elif not (version == 6 and kind in (GSO_TCPV6, GSO_UDP_L4) and l4 >= 40):
        return None
    protocol = UDP if kind == GSO_UDP_L4 else TCP
    if l4 + (8 if protocol == UDP else 20) > len(packet):
        return None
    l4_header = 8 if protocol == UDP else (packet[l4 + 12] >> 4) * 4
    if l4_header < (8 if protocol == UDP else 20) or header.csum_offset != (6 if protocol == UDP else 16):
        return None
    if l4 + l4_header >= len(packet):
        return None
    return protocol, l4, l4 + l4_header


@dataclass(frozen=True, slots=True)
class _Member:
    """A packet of a TCP or UDP flow."""

    packet: bytes
    protocol: int
    l4: int
    payload_at: int
    mergeable: bool
    unfinished: bool = False

    @property
    def payload(self) -> bytes:
        return self.packet[self.payload_at :]

    @property
    def flow(self) -> tuple[bytes, int]:
        start = 12 if self.l4 == 20 else 8
        return self.packet[start : self.l4 + 4], self.protocol

    @property
    def flags(self) -> int:
        return self.packet[self.l4 + 13] if self.protocol == TCP else 0

    @property
    def sequence(self) -> int:
        return int.from_bytes(self.packet[self.l4 + 4 : self.l4 + 8])

    def right(self) -> bool:
        if self.l4 == 20 and checksum(self.packet[:20]) != 0:
            return False
        if self.unfinished:
            return True
        l4_length = len(self.packet) - self.l4
        return checksum(pseudo_header(self.packet, self.protocol, l4_length) + self.packet[self.l4 :]) == 0

    def ends_chain(self, first: _Member) -> bool:
        return len(self.payload) < len(first.payload) or bool(self.flags & PSH)


class _Sealer:
    """A packet that could be of any flow: nothing may be merged across it."""


def _look(packet: bytes, *, tcp: bool, udp: bool) -> _Member | _Sealer | None:
    """None: of no flow that could be merged."""
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        protocol, l4 = packet[9], 20
        fragment, length = struct.unpack_from("!H", packet, 6)[0] & 0x3FFF, struct.unpack_from("!H", packet, 2)[0]
        if fragment or packet[0] != 0x45 or length != len(packet):
            return _Sealer()
    elif len(packet) >= 40 and packet[0] >> 4 == 6:
        protocol, l4 = packet[6], 40
        if protocol not in (TCP, UDP, ICMPV6) or struct.unpack_from("!H", packet, 4)[0] + 40 != len(packet):
            return _Sealer()
    else:
        return _Sealer()
    if protocol == TCP:
        if l4 + 20 > len(packet) or not 20 <= (packet[l4 + 12] >> 4) * 4 <= len(packet) - l4:
            return _Sealer()
        payload_at = l4 + (packet[l4 + 12] >> 4) * 4
        plain = packet[l4 + 13] & ~(PSH | ECE) == ACK and not packet[l4 + 12] & 15
        return _Member(packet, TCP, l4, payload_at, mergeable=tcp and plain and payload_at < len(packet))
    if protocol == UDP:
        if l4 + 8 > len(packet):
            return _Sealer()
        _, port, length, check = struct.unpack_from("!HHHH", packet, l4)
        sound = length == len(packet) - l4 and length > 8 and check != 0 and port not in TUNNEL_PORTS
        return _Member(packet, UDP, l4, l4 + 8, mergeable=udp and sound)
    return None


class _Chain:
    """A stretch of packets of one flow that leave as one superframe."""

    def __init__(self, packet: bytes, member: _Member | None, unfinished: tuple[int, int] | None) -> None:
        self.packets = [packet]
        self.unfinished = unfinished
        self.members = [member] if member else []
        self.open = member is not None and member.mergeable and not member.ends_chain(member)

    def takes(self, member: _Member) -> bool:
        first, sent = self.members[0], sum(len(m.payload) for m in self.members)
        if not self.open or len(self.members) == CHAIN_PACKETS or len(member.payload) > len(first.payload):
            return False
        if first.payload_at + sent + len(member.payload) > MOST_PACKET:
            return False
        if member.protocol == TCP and member.sequence != (first.sequence + sent) % 2**32:
            return False
        if not _alike(first, member, len(self.members)):
            return False
        if not first.right():
            self.open = False
            return False
        return member.right()

    def superframe(self) -> tuple[VnetHeader, bytes]:
        if len(self.packets) == 1:
            plain = VnetHeader(NEEDS_CSUM, GSO_NONE, 0, 0, *self.unfinished) if self.unfinished else VnetHeader()
            return plain, self.packets[0]
        first, payload = self.members[0], b"".join(m.payload for m in self.members)
        l4_length = first.payload_at - first.l4 + len(payload)
        whole = bytearray(first.packet[: first.payload_at])
        if first.protocol == TCP:
            whole[first.l4 + 13] |= self.members[-1].flags & PSH
        else:
            struct.pack_into("!H", whole, first.l4 + 4, l4_length)
        offset = 16 if first.protocol == TCP else 6
        partial = partial_checksum(first.packet, first.protocol, l4_length)
        struct.pack_into("!H", whole, first.l4 + offset, partial)
        kind = GSO_UDP_L4 if first.protocol == UDP else GSO_TCPV4 if first.l4 == 20 else GSO_TCPV6
        header = VnetHeader(NEEDS_CSUM, kind, first.payload_at, len(first.payload), first.l4, offset)
        return header, with_ip_length(bytes(whole) + payload, first.payload_at + len(payload))


def _alike(first: _Member, other: _Member, count: int) -> bool:
    """Everything agrees but lengths, checksums, sequence numbers and PSH."""
    a, b, l4 = first.packet, other.packet, first.l4
    if (l4, first.payload_at) != (other.l4, other.payload_at):
        return False
    if l4 == 20:
        if (a[0:2], a[6:10]) != (b[0:2], b[6:10]):
            return False
        atomic = a[6] & 0x40
        if not atomic and int.from_bytes(b[4:6]) != (int.from_bytes(a[4:6]) + count) % 2**16:
            return False
    elif (a[0:4], a[6:8]) != (b[0:4], b[6:8]):
        return False
    if first.protocol == UDP:
        return True
    fixed = [slice(l4 + 8, l4 + 13), slice(l4 + 14, l4 + 16), slice(l4 + 18, first.payload_at)]
    return all(a[part] == b[part] for part in fixed) and first.flags | PSH == other.flags | PSH


def superframes(
    packets: list[bytes], *, tcp: bool = True, udp: bool = True, unfinished: bool = False
) -> list[tuple[VnetHeader, bytes]]:
    """Arrange packets in superframes, in the order in which these leave; `tcp`, `udp`: what may be merged.
    `unfinished`: a checksum that holds the pseudo-header's sum is one, and says nothing against its packet."""
    chains: list[_Chain] = []
    flows: dict[tuple[bytes, int], _Chain] = {}
    for packet in packets:
        kin = _look(packet, tcp=tcp, udp=udp)
        at = unfinished_checksum(packet) if unfinished else None
        if at is not None and isinstance(kin, _Member):
            kin = replace(kin, unfinished=True)
        if isinstance(kin, _Sealer):
            flows.clear()
        elif kin is not None:
            chain = flows.get(kin.flow)
            if kin.mergeable and chain is not None and chain.takes(kin):
                chain.packets.append(packet)
                chain.members.append(kin)
                chain.open = not kin.ends_chain(chain.members[0])
                continue
            flows.pop(kin.flow, None)
        chain = _Chain(packet, kin if isinstance(kin, _Member) else None, at)
        chains.append(chain)
        if isinstance(kin, _Member) and kin.mergeable:
            flows[kin.flow] = chain
    return [chain.superframe() for chain in chains]
