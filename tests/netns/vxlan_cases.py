"""Owns generated VXLAN datagrams: right ones, and ones that one or two mutations have spoilt.

Free of: IO and of any verdict about them. Invariant: the same random source gives the same cases.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, MutableSequence

from tests.netns.kernel_vtep import HOST_MAC, PEER_MAC, VNI

PEER_SUBNET, PEER_SUBNET_V6 = "10.9.1.0/24", "fd00:9:1::/64"
HOST_SUBNET, HOST_SUBNET_V6 = "10.9.2.0/24", "fd00:9:2::/64"
HEADER = 8 + 14
_OURS, _PEERS = (bytes.fromhex(mac.replace(":", "")) for mac in (HOST_MAC, PEER_MAC))

Case = tuple[bytes, int]
"""The payload of the outer datagram, and the outer TOS."""


def make_case(rng: random.Random) -> Case:
    """A datagram from the peer: whole, or spoilt in a way that some rule of RFC 7348 or of the kernel is about."""
    inner = make_packet(rng) if rng.random() < 0.94 else rng.randbytes(rng.randrange(80))
    ethertype = 0x0800 if inner[:1] and inner[0] >> 4 == 4 else 0x86DD
    payload = bytearray(struct.pack("!BxxxI", 0x08, VNI << 8) + _OURS + _PEERS + struct.pack("!H", ethertype) + inner)
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2))):
        payload = rng.choice(_MUTATIONS)(rng, payload)
    return bytes(payload), rng.choice((0, 0, 1, 2, 3, rng.randrange(256)))


def make_packet(rng: random.Random) -> bytes:
    """A packet from the peer's subnet to the host's, of either IP version."""
    return _ipv4(rng) if rng.random() < 0.7 else _ipv6(rng)


def _ipv4(rng: random.Random) -> bytes:
    body = _udp(rng)
    options = b"\x01" * 4 * rng.choice((0, 0, 0, 1, 10))
    tos = rng.choice((0, 1, 2, 3, rng.randrange(256)))
    head = struct.pack(
        "!BBHHHBBH4s4s",
        *(0x45 + len(options) // 4, tos, 20 + len(options) + len(body), rng.randrange(1 << 16)),
        *(rng.choice((0, 0x4000)), 64, 17, 0, bytes((10, 9, 1, rng.randrange(256))), bytes((10, 9, 2, 7))),
    )
    head += options
    return head[:10] + _complement(head) + head[12:] + body


def _ipv6(rng: random.Random) -> bytes:
    body = _udp(rng)
    word = 6 << 28 | rng.choice((0, 1, 2, 3)) << 20 | rng.randrange(1 << 20)
    source, destination = (bytes.fromhex(f"fd0000090{subnet:03x}") + bytes(9) + b"\x07" for subnet in (1, 2))
    return struct.pack("!IHBB", word, len(body), 17, 64) + source + destination + body


def _udp(rng: random.Random) -> bytes:
    data = rng.randbytes(rng.choice((0, 1, 18, 64, rng.randrange(1400))))
    return struct.pack("!HHHH", 40000, 7, 8 + len(data), 0) + data


def _complement(head: bytes) -> bytes:
    total = sum(struct.unpack(f"!{len(head) // 2}H", head))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", total ^ 0xFFFF)


def _flip(first: int, last: int) -> Callable[[random.Random, bytearray], bytearray]:
    """One bit of the bytes `first` to `last`, both inclusive."""

    def flip(rng: random.Random, payload: bytearray) -> bytearray:
        at = rng.randint(first, last)
        if at < len(payload):
            payload[at] ^= 1 << rng.randrange(8)
        return payload

    return flip


def _put(at: int, *values: bytes) -> Callable[[random.Random, bytearray], bytearray]:
    def put(rng: random.Random, payload: bytearray) -> bytearray:
        value = rng.choice(values)
        payload[at : at + len(value)] = value
        return payload

    return put


def _truncate(rng: random.Random, payload: bytearray) -> bytearray:
    return payload[: rng.choice((rng.randrange(HEADER + 2), rng.randrange(len(payload) + 1)))]


def _pad(rng: random.Random, payload: bytearray) -> bytearray:
    return payload + rng.randbytes(rng.choice((1, 2, 26, 46)))


def _tag(_rng: random.Random, payload: bytearray) -> bytearray:
    return payload[:20] + b"\x81\x00\x00\x05" + payload[20:]


_MUTATIONS: MutableSequence[Callable[[random.Random, bytearray], bytearray]] = [
    _flip(0, 0),  # flags, the I flag among them
    _flip(1, 3),  # reserved
    _flip(4, 6),  # VNI
    _flip(7, 7),  # reserved
    _put(14, _OURS),  # looped back
    _flip(8, 19),  # either MAC
    _put(8, b"\xff" * 6, bytes.fromhex("01005e000001")),
    _put(20, b"\x08\x06", b"\x08\x00", b"\x86\xdd", b"\x00\x20"),
    _flip(22, 41),  # inner header
    _truncate,
    _pad,
    _tag,
]
