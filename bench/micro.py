"""Owns the micro-benchmarks of the compiled parts, under pytest-benchmark: `pytest bench/micro.py`.

Lookups are measured many to a call, so that Python's cost of a call does not count. Segmentation and coalescing go
through their entry points for tests, which make a Python object of each packet: compare them with themselves over time,
not with the packet path. `extra_info` says how many operations one call has. It reads compiled modules past
path.datapath, as their tests do. Free of: networks. Invariant: each result is checked once before it is timed.
"""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

from dataplane import _fib, _offload
from dataplane.path import superframe
from dataplane.path.superframe import GSO_TCPV4, NEEDS_CSUM, TCP, VnetHeader
from dataplane.path.wire import checksum

LOOKUPS = 1 << 18
SEGMENTS, MSS = 44, 1432
_SEED = 1
MAPPED = bytes(10) + b"\xff\xff"


def _change(subnet: int, length: int, slot: int) -> bytes:
    mask = 0xFFFF_FFFF << (32 - length) & 0xFFFF_FFFF
    prefix, peer = MAPPED + (subnet & mask).to_bytes(4), MAPPED + (0xC612_0000 + slot % 65_536).to_bytes(4)
    record = struct.pack("=16s16sIHBB6s2x", prefix, peer, slot, 0, 96 + length, 0, bytes(6))
    assert len(record) == _fib.CHANGE_BYTES
    return record


def _subnets(count: int) -> list[tuple[int, int]]:
    """`count` /24s beside each other from 10.0.0.0 on."""
    return [(0x0A00_0000 + (number << 8), 24) for number in range(count)]


def _mixed(count: int) -> list[tuple[int, int]]:
    """Prefixes of 8 to 32 bits as they lie in a large table: most are /24, some are around and inside others."""
    generator = random.Random(_SEED)
    found: dict[tuple[int, int], None] = {}
    while len(found) < count:
        length = generator.choices((12, 16, 20, 22, 24, 28, 32), (1, 4, 10, 15, 50, 15, 5))[0]
        found[generator.getrandbits(length) << (32 - length), length] = None
    return list(found)


@pytest.fixture(scope="module", params=["65,536 of /24", "1,000,000 mixed"])
def table(request: pytest.FixtureRequest) -> tuple[_fib.Fib, bytes]:
    """A table, and destinations that hit it at random."""
    prefixes = _subnets(65_536) if request.param.startswith("65") else _mixed(1_000_000)
    fib = _fib.Fib(b"".join(_change(subnet, length, slot) for slot, (subnet, length) in enumerate(prefixes)))
    generator = random.Random(_SEED)
    hits = []
    for _ in range(LOOKUPS):
        subnet, length = generator.choice(prefixes)
        hits.append(subnet | generator.getrandbits(32 - length) if length < 32 else subnet)
    assert fib.lookup(hits[0].to_bytes(4)) is not None
    return fib, struct.pack(f"={LOOKUPS}I", *hits)


def test_fib_lookup(benchmark: Any, table: tuple[_fib.Fib, bytes]) -> None:
    fib, destinations = table
    wanted = 0
    for destination in struct.unpack("=1000I", destinations[:4000]):
        hit = fib.lookup(destination.to_bytes(4))
        assert hit is not None
        wanted += hit[3]
    assert fib.lookup_many(destinations[:4000]) == wanted
    benchmark.extra_info["operations"] = LOOKUPS
    benchmark(fib.lookup_many, destinations)


@pytest.fixture(scope="module")
def superframe_of_tcp() -> tuple[VnetHeader, bytes]:
    """What a pod's bulk TCP gives to the TUN: 44 full segments."""
    payload = random.Random(_SEED).randbytes(SEGMENTS * MSS)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 7, 0x4000, 63, TCP, 0, bytes([10, 244, 1, 2]), bytes([10, 244, 2, 2]))
    tcp = struct.pack("!HHIIBBHHH", 40_000, 5301, 1, 1, 0x50, 0x10, 500, 0, 0)
    packet = superframe.with_ip_length(ip + tcp + payload, 40 + len(payload))
    partial = superframe.partial_checksum(packet, TCP, len(packet) - 20)
    packet = packet[:36] + struct.pack("!H", partial) + packet[38:]
    return VnetHeader(NEEDS_CSUM, GSO_TCPV4, 40, MSS, 20, 16), packet


def test_checksum(benchmark: Any, superframe_of_tcp: tuple[VnetHeader, bytes]) -> None:
    """One sum over 63 KB, with the two copies that the entry point makes."""
    _, packet = superframe_of_tcp
    plain = VnetHeader(NEEDS_CSUM, 0, 0, 0, 20, 16).encode()
    assert _offload.finished(plain, packet) == superframe.finished(VnetHeader.decode(plain), packet)
    assert checksum(packet[:20]) == 0
    benchmark.extra_info["bytes"] = len(packet) - 20
    benchmark(_offload.finished, plain, packet)


def test_segment(benchmark: Any, superframe_of_tcp: tuple[VnetHeader, bytes]) -> None:
    header, packet = superframe_of_tcp
    assert _offload.segments(header.encode(), packet) == superframe.segments(header, packet)
    benchmark.extra_info["operations"] = SEGMENTS
    benchmark(_offload.segments, header.encode(), packet)


def test_coalesce(benchmark: Any, superframe_of_tcp: tuple[VnetHeader, bytes]) -> None:
    packets = _offload.segments(superframe_of_tcp[0].encode(), superframe_of_tcp[1])
    assert packets is not None
    assert len(_offload.superframes(packets)) == 1
    benchmark.extra_info["operations"] = SEGMENTS
    benchmark(_offload.superframes, packets)
