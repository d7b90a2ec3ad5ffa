"""Owns generated packets for the kernel as the oracle of segmentation: superframes, and streams that may be merged.

Free of IO. Invariants: the same `random.Random` gives the same cases; a packet's source address carries the label of
its case, so that what the kernel made of it can be told apart; checksums are right where they are finished.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

from dataplane.path import superframe
from dataplane.path.superframe import (
    ACK,
    CWR,
    ECE,
    FIN,
    GSO_ECN,
    GSO_UDP_L4,
    NEEDS_CSUM,
    PSH,
    TCP,
    UDP,
    VnetHeader,
)
from dataplane.path.wire import checksum

DESTINATION_4 = bytes([172, 16, 9, 1])
DESTINATION_6 = bytes.fromhex("fd090000000000000000000000000001")
SEGMENT = bytes.fromhex("fd0a0000000000000000000000000001")
SOURCE_6 = bytes.fromhex("fd0100000000000000000000")
HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS = 0, 43, 60
URG = 0x20
MOST_PACKET = 65535  # a device cuts by itself what is longer before it hands it over (gso_max_size)
MOST_HEADERS = 40 + 3 * 72 + 60
SKIPPED_OPTION = 0x1E  # RFC 4727: for experiments; the kernel drops more than seven bytes of padding


@dataclass(frozen=True, slots=True)
class Superframe:
    """What is written into a TUN: `header` says how `packet` is to be cut."""

    label: int
    header: VnetHeader
    packet: bytes


def label_of(packet: bytes) -> int:
    """The label in the source address."""
    return int.from_bytes(packet[13:16] if packet[0] >> 4 == 4 else packet[20:24])


def forwarded(packet: bytes) -> bytes:
    """What a router makes of a packet: one taken off its TTL or hop limit, and nothing else."""
    if packet[0] >> 4 == 6:
        return packet[:7] + bytes([packet[7] - 1]) + packet[8:]
    packet = packet[:8] + bytes([packet[8] - 1]) + packet[9:]
    return superframe.with_ip_length(packet, len(packet))


def _extensions(rng: random.Random, protocol: int) -> tuple[int, bytes]:
    """(first next header, extension headers): options to be skipped, a routing header; RFC 8200, section 4."""
    order = [k for k in (HOP_BY_HOP, DESTINATION_OPTIONS, ROUTING) if rng.random() < 0.4]
    found, following = b"", protocol
    for kind in reversed(order):
        if kind == ROUTING:  # type 4 with no segments left, which a router does not look at
            found = bytes([following, 2, 4, 0, 0, 0, 0, 0]) + SEGMENT + found
        else:
            units = rng.choice([0, 0, 1, 8])
            length = 8 * units + 4  # of the option
            found = bytes([following, units, SKIPPED_OPTION, length]) + rng.randbytes(length) + found
        following = kind
    return following, found


def _ip(rng: random.Random, version: int, label: int, protocol: int, follows: bytes, room: int) -> tuple[bytes, int]:
    """(packet, where the transport header of `room` bytes begins); the IPv4 checksum is right."""
    hops = rng.choice([2, 64, 255])
    if version == 6:
        first, extensions = _extensions(rng, protocol) if rng.random() < 0.3 else (protocol, b"")
        word = 0x60000000 | rng.getrandbits(28)
        header = struct.pack("!IHBB", word, len(extensions) + len(follows), first, hops)
        header += SOURCE_6 + struct.pack("!I", label) + DESTINATION_6 + extensions
        return header + follows, len(header)
    options = b"\x01" * (4 * rng.randint(1, 10)) if rng.random() < 0.1 else b""
    identification = rng.choice([0, 1, 0x7FFF, 0xFFFE, 0xFFFF, rng.getrandbits(16)])
    header = struct.pack(
        "!BBHHHBBHB3s4s",
        0x45 + len(options) // 4,
        rng.getrandbits(8),
        20 + len(options) + len(follows),
        identification,
        rng.choice([0, 0x4000]),
        hops,
        protocol,
        0,
        10,
        label.to_bytes(3),
        DESTINATION_4,
    )
    header += options
    header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
    return header + follows, len(header)


def _payload_length(rng: random.Random, most: int) -> int:
    kind = rng.random()
    if kind < 0.02:
        return rng.choice([most, most - 1, rng.randint(1, most)])
    return rng.randint(1, 200) if kind < 0.3 else rng.randint(1, 3000)


def _segment_size(rng: random.Random, payload: int, protocol: int) -> int:
    """Mostly a few dozen segments at most; the kernel refuses more than 128 of UDP."""
    least = -(-payload // (128 if protocol == UDP else 700))
    few = max(least, payload // 12)
    kind = rng.random()
    if kind < 0.08:
        return max(least, rng.randint(1, 19))  # below any header's length
    if kind < 0.16:
        return max(least, rng.choice([payload - 1, payload, payload + 1, payload // 2, -(-payload // 2)]))
    if kind < 0.3:  # divides: no tail
        parts = rng.randint(1, 8)
        return max(least, -(-payload // parts))
    return rng.randint(few, max(few, 1448, payload // 3))


def make_superframe(rng: random.Random, label: int) -> Superframe:
    """A superframe as a kernel would hand it over, with anything in its headers that is legal."""
    version, protocol = rng.choice([4, 6]), rng.choice([TCP, TCP, UDP])
    payload = rng.randbytes(_payload_length(rng, MOST_PACKET - MOST_HEADERS))
    if protocol == TCP:
        options = rng.randbytes(4 * rng.choice([0, 0, 3, rng.randint(0, 10)]))
        sequence = rng.choice([rng.getrandbits(32), 2**32 - rng.randint(1, 3000)])
        flags = ACK
        for flag in (FIN, PSH, URG, ECE, CWR):
            flags |= flag if rng.random() < 0.3 else 0
        offset = (5 + len(options) // 4) << 4
        ports = rng.getrandbits(32)
        numbers = (sequence, rng.getrandbits(32), offset, flags, rng.getrandbits(16), 0, rng.getrandbits(16))
        follows = struct.pack("!IIIBBHHH", ports, *numbers) + options + payload
    else:
        follows = struct.pack("!HHHH", rng.getrandbits(16), rng.randint(9000, 65535), 8 + len(payload), 0) + payload
    packet, l4 = _ip(rng, version, label, protocol, follows, len(follows) - len(payload))
    check = 16 if protocol == TCP else 6
    partial = superframe.partial_checksum(packet, protocol, len(packet) - l4)
    packet = packet[: l4 + check] + struct.pack("!H", partial) + packet[l4 + check + 2 :]
    kind = GSO_UDP_L4 if protocol == UDP else 1 if version == 4 else 4
    if protocol == TCP and rng.random() < 0.3:
        kind |= GSO_ECN
    payload_at = len(packet) - len(payload)
    size = _segment_size(rng, len(payload), protocol)
    header = VnetHeader(NEEDS_CSUM, kind, rng.choice([payload_at, payload_at, l4]), size, l4, check)
    if rng.random() < 0.1:
        packet = _with_sum_of_zero(rng, header, packet, payload_at)
    return Superframe(label, header, packet)


def _with_sum_of_zero(rng: random.Random, header: VnetHeader, packet: bytes, payload_at: int) -> bytes:
    """The same with one segment's payload such that its checksum computes to 0."""
    cut = superframe.segments(header, packet)
    assert cut is not None
    index = rng.randrange(len(cut))
    at = payload_at + index * header.gso_size
    if len(cut[index]) - payload_at < 2:
        return packet
    (found,) = struct.unpack_from("!H", cut[index], header.csum_start + header.csum_offset)
    (word,) = struct.unpack_from("!H", packet, at)
    total = word + found
    return packet[:at] + struct.pack("!H", (total & 0xFFFF) + (total >> 16)) + packet[at + 2 :]


def make_stream(rng: random.Random, label: int) -> list[bytes]:
    """Finished packets of one flow as a network delivers them: mostly what can be merged, now and then what cannot."""
    version, protocol = rng.choice([4, 6]), rng.choice([TCP, TCP, UDP])
    size, atomic = rng.choice([1, 18, 100, 536, 1448]), rng.choice([True, True, False])
    identification, sequence = rng.getrandbits(16), rng.choice([rng.getrandbits(32), 2**32 - rng.randint(1, 3000)])
    options = rng.choice([b"", b"\x01\x01\x08\x0a" + rng.randbytes(8)])
    traffic_class, flow, hops = rng.getrandbits(8), rng.getrandbits(20), 64
    found = []
    for _ in range(rng.randint(1, 20)):
        change = rng.random()
        length = size if change > 0.06 else rng.choice([size - 1, size + 1, size // 2, 0])
        payload = rng.randbytes(length)
        if 0.06 < change < 0.08:
            sequence += rng.choice([1, -1, size])  # a gap, or what came before
        if 0.08 < change < 0.1:
            hops, traffic_class = rng.choice([63, 64]), rng.getrandbits(8)
        if protocol == TCP:
            flags = ACK | (rng.choice([FIN, PSH, PSH, PSH, URG, ECE, CWR]) if 0.1 < change < 0.2 else 0)
            offset = (5 + len(options) // 4) << 4
            follows = struct.pack("!HHIIBBHHH", 7, 9999, sequence % 2**32, 1, offset, flags, 500, 0, 0) + options
        else:
            follows = struct.pack("!HHHH", 7, 9999, 8 + length, 0)
        sequence += length
        if version == 6:
            word = 0x60000000 | traffic_class << 20 | flow
            header = struct.pack("!IHBB", word, len(follows) + length, protocol, hops)
            header += SOURCE_6 + struct.pack("!I", label) + DESTINATION_6
        else:
            identification += 1 if not atomic and rng.random() < 0.95 else rng.getrandbits(16)
            header = struct.pack("!BBHH", 0x45, traffic_class, 20 + len(follows) + length, identification & 0xFFFF)
            header += struct.pack("!HBBHB", 0x4000 if atomic else 0, hops, protocol, 0, 10)
            header += label.to_bytes(3) + DESTINATION_4
            header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
        found.append(_finished(header + follows + payload, len(header), protocol))
    return found


def _finished(packet: bytes, l4: int, protocol: int) -> bytes:
    check = 16 if protocol == TCP else 6
    partial = superframe.partial_checksum(packet, protocol, len(packet) - l4)
    packet = packet[: l4 + check] + struct.pack("!H", partial) + packet[l4 + check + 2 :]
    whole = superframe.finished(VnetHeader(NEEDS_CSUM, 0, 0, 0, l4, check), packet)
    assert whole is not None
    return whole
