"""Owns the micro-benchmarks of the compiled packet path, under pytest-benchmark: `pytest bench/micro.py`.

Each call of `_micro.PathBench` or `_fib.Fib` carries out thousands of operations in C, so that Python's cost of a call
does not count; what one operation cost stands below pytest-benchmark's own table. It reads compiled modules past
path.datapath, as their tests do. Free of networks and descriptors. Invariant: tests/bench/test_micro.py has held the
results for this very traffic against the functions that take one packet.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest

from dataplane import _engine, _fib
from dataplane.bench._micro import MOST_PACKETS, PathBench
from dataplane.path import superframe
from dataplane.path.superframe import GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, TCP, UDP, VnetHeader

Wire = Literal["udp", "vxlan"]

SEED = 1
LOOKUPS = 1 << 18
SEGMENTS, SIZE = 44, 1400  # what a superframe of 64 KiB has
SUPERFRAMES = 8  # of a batch
SMALL = 64  # payload bytes
NODES = 1000
PEER = 7
VNI, OURS, THEIRS = 1, bytes.fromhex("0a0000000001"), bytes.fromhex("0a0000000002")
MAPPED = bytes(10) + b"\xff\xff"
PLAIN = VnetHeader().encode()

# ------------------------------------------------------------------------------------------------------- traffic


def outer_of(node: int) -> bytes:
    return MAPPED + bytes([198, 18, node >> 8, node & 255])


def inner_of(version: int, node: int) -> bytes:
    """A pod's address in a node's subnet, 10.N.N.0/24 or fd00:10:0:N::/64."""
    if version == 4:
        return bytes([10, node >> 8, node & 255, 9])
    return bytes.fromhex("fd0000100000") + node.to_bytes(2) + bytes(7) + b"\x09"


def route(subnet: bytes, length: int, node: int) -> bytes:
    """A change record of `_fib.Fib`: an IPv4 subnet has 4 bytes, and its length is out of 32."""
    if len(subnet) == 4:
        subnet, length = MAPPED + subnet, length + 96
    return struct.pack("=16s16sIHBB6s2x", subnet, outer_of(node % 65_536), node, 0, length, 0, THEIRS)


def cluster() -> _fib.Fib:
    """1,000 nodes, each with a subnet of both versions; the counters of PEER are those of its IPv4 subnet."""
    v4 = (route(inner_of(4, node)[:3] + b"\0", 24, node) for node in range(NODES))
    v6 = (route(inner_of(6, node)[:8] + bytes(8), 64, node) for node in range(NODES))
    return _fib.Fib(b"".join((*v4, *v6)))


def path_of(wire: Wire, version: int) -> PathBench:
    head = _engine.frame_head(VNI, OURS, THEIRS, version) if wire == "vxlan" else b""
    return PathBench(cluster(), slots=NODES, head=head)


def packet(version: int, protocol: int, payload: bytes, *, sequence: int = 0, inwards: bool = False) -> bytes:
    """One packet between our pod (of node 1) and the peer's, its TCP or UDP checksum unfinished."""
    source, to = inner_of(version, 1), inner_of(version, PEER)
    if inwards:
        source, to = to, source
    if protocol == TCP:
        l4 = struct.pack("!HHIIBBHHH", 40_000, 5301, sequence, 1, 0x50, superframe.ACK, 500, 0, 0)
    else:
        l4 = struct.pack("!HHHH", 40_000, 5301, 8 + len(payload), 0)
    if version == 4:
        ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0x4000, 63, protocol, 0, source, to)
    else:
        ip = struct.pack("!IHBB16s16s", 6 << 28, 0, protocol, 63, source, to)
    made = superframe.with_ip_length(ip + l4 + payload, len(ip + l4 + payload))
    at = len(ip) + (16 if protocol == TCP else 6)
    partial = superframe.partial_checksum(made, protocol, len(made) - len(ip))
    return made[:at] + struct.pack("!H", partial) + made[at + 2 :]


def unfinished(version: int, protocol: int, size: int = 0) -> VnetHeader:
    """How a packet, or a superframe with payloads of `size`, is to be finished."""
    l4 = 20 if version == 4 else 40
    kind = 0 if size == 0 else GSO_UDP_L4 if protocol == UDP else GSO_TCPV4 if version == 4 else GSO_TCPV6
    tcp = protocol == TCP
    return VnetHeader(NEEDS_CSUM, kind, l4 + (20 if tcp else 8) if size else 0, size, l4, 16 if tcp else 6)


def small_packets(version: int, *, inwards: bool = False) -> list[bytes]:
    """UDP of 64 bytes, as many as a batch has."""
    one = superframe.finished(unfinished(version, UDP), packet(version, UDP, bytes(SMALL), inwards=inwards))
    assert one is not None
    return [one] * MOST_PACKETS


def superframes(version: int, protocol: int, *, inwards: bool = False) -> list[tuple[bytes, bytes]]:
    """What a pod's bulk traffic gives to the TUN: superframes that follow each other."""
    header = unfinished(version, protocol, SIZE).encode()
    payloads = [random.Random(SEED + i).randbytes(SEGMENTS * SIZE) for i in range(SUPERFRAMES)]
    return [
        (header, packet(version, protocol, payload, sequence=i * SEGMENTS * SIZE, inwards=inwards))
        for i, payload in enumerate(payloads)
    ]


def segments(version: int, protocol: int, *, inwards: bool = False) -> list[list[bytes]]:
    """The packets of each of these."""
    cut = [superframe.segments(VnetHeader.decode(h), p) for h, p in superframes(version, protocol, inwards=inwards)]
    return [packets for packets in cut if packets]


def messages(wire: Wire, version: int, groups: list[list[bytes]]) -> list[tuple[bytes, int, bytes]]:
    """Each group of packets as the kernel hands it over: datagrams from the peer, merged into one message."""
    head = _engine.frame_head(VNI, THEIRS, OURS, version) if wire == "vxlan" else b""
    return [(outer_of(PEER), len(head + group[0]), b"".join(head + one for one in group)) for group in groups]


# ------------------------------------------------------------------------------------------------------- measuring

Measure = Callable[..., None]
_figures: list[tuple[str, float, float, str]] = []


@pytest.fixture(scope="module", autouse=True)
def _told(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    plugins = request.config.pluginmanager
    out, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    if out is None or capture is None or not _figures:
        return
    with capture.global_and_fixture_disabled():
        out.write_line(f"\n\n{'':44}{'least':>9}{'median':>9}   ns for each")
        for name, least, median, unit in _figures:
            out.write_line(f"{name:44}{least:9.2f}{median:9.2f}   {unit}")


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Measure:
    """measure(operations, unit, function, *arguments): `operations` are those of one call."""

    def run(operations: int, unit: str, function: Callable[..., object], *arguments: object) -> None:
        benchmark.extra_info["operations"] = operations
        benchmark(function, *arguments)
        if benchmark.stats is not None:  # it is with --benchmark-disable
            took = benchmark.stats.stats
            name = request.node.name.removeprefix("test_")
            _figures.append((name, took.min / operations * 1e9, took.median / operations * 1e9, unit))

    return run


# -------------------------------------------------------------------------------------------------- forwarding table


def _beside(version: int, count: int) -> list[tuple[int, int]]:
    """(subnet, length): /24s beside each other from 10.0.0.0 on, or /64s from fd00:10::."""
    if version == 4:
        return [(0x0A00_0000 + (number << 8), 24) for number in range(count)]
    return [(0xFD00_0010 << 96 | number << 64, 64) for number in range(count)]


def _mixed(version: int, count: int) -> list[tuple[int, int]]:
    """As they lie in a large table: most are /24 or /64, some are around and inside others."""
    bits = 32 if version == 4 else 128
    lengths = (12, 16, 20, 22, 24, 28, 32) if version == 4 else (44, 48, 52, 56, 64, 96, 128)
    base = 0 if version == 4 else 0xFD00_0010 << 96
    generator = random.Random(SEED)
    found: dict[tuple[int, int], None] = {}
    while len(found) < count:
        length = generator.choices(lengths, (1, 4, 10, 15, 50, 15, 5))[0]
        drawn = length if version == 4 else length - 32
        found[base | generator.getrandbits(drawn) << (bits - length), length] = None
    return list(found)


@pytest.mark.parametrize("kind", ["65,536 beside each other", "1,000,000 mixed"])
@pytest.mark.parametrize("version", [4, 6])
def test_lookup(measure: Measure, benchmark: Any, version: int, kind: str) -> None:
    """Random hits in C: of IPv4 with the next ones fetched ahead, of IPv6 one by one, as the pumps look up."""
    prefixes = _beside(version, 65_536) if kind.startswith("65") else _mixed(version, 1_000_000)
    bits = 32 if version == 4 else 128
    fib = _fib.Fib(b"".join(route(s.to_bytes(bits // 8), length, slot) for slot, (s, length) in enumerate(prefixes)))
    generator = random.Random(SEED)
    chosen = generator.choices(prefixes, k=LOOKUPS)
    hits = [subnet | generator.getrandbits(bits) >> length for subnet, length in chosen]
    lookup = fib.lookup_many if version == 4 else fib.lookup_many_v6
    destinations = struct.pack(f"={LOOKUPS}I", *hits) if version == 4 else b"".join(hit.to_bytes(16) for hit in hits)
    each = fib.lookup_bytes[0 if version == 4 else 1] / len(prefixes)
    benchmark.extra_info["bytes a prefix"] = each
    measure(LOOKUPS, f"lookup; {each:.1f} bytes a prefix", lookup, destinations)


# -------------------------------------------------------------------------------------------------------- packets

versions = pytest.mark.parametrize("version", [4, 6])
protocols = pytest.mark.parametrize("protocol", [TCP, UDP], ids=["tcp", "udp"])
wires = pytest.mark.parametrize("wire", ["udp", "vxlan"])


@versions
def test_parse(measure: Measure, version: int) -> None:
    path = path_of("udp", version)
    path.load([(PLAIN, one) for one in small_packets(version)])
    measure(1000 * MOST_PACKETS, "packet", path.parse, 1000)


@pytest.mark.parametrize("size", [64, 1440])
def test_checksum(measure: Measure, size: int) -> None:
    path = path_of("udp", 4)
    path.load([(PLAIN, random.Random(SEED).randbytes(size))] * MOST_PACKETS)
    measure(1000 * MOST_PACKETS, f"sum over {size} bytes", path.checksum, 1000)


@versions
@wires
def test_encap(measure: Measure, wire: Wire, version: int) -> None:
    path = path_of(wire, version)
    path.load([(PLAIN, one) for one in small_packets(version)])
    measure(1000 * MOST_PACKETS, "packet", path.encap, 1000)


@versions
@protocols
def test_segment(measure: Measure, protocol: int, version: int) -> None:
    path = path_of("udp", version)
    path.load(superframes(version, protocol))
    measure(10 * SUPERFRAMES * SEGMENTS, f"packet with {SIZE} bytes", path.segment, 10)


@versions
@protocols
def test_coalesce(measure: Measure, protocol: int, version: int) -> None:
    path = path_of("udp", version)
    path.load([(PLAIN, one) for one in segments(version, protocol)[0]])
    measure(100 * SEGMENTS, f"packet with {SIZE} bytes", path.coalesce, 100)


@versions
@wires
@pytest.mark.parametrize("what", ["small", "bulk"])
def test_transmit(measure: Measure, what: str, wire: Wire, version: int) -> None:
    """64 packets of 64 bytes, or 8 TCP superframes, from the TUN's buffers into the messages of a send."""
    path = path_of(wire, version)
    bulk = what == "bulk"
    path.load(superframes(version, TCP) if bulk else [(PLAIN, one) for one in small_packets(version)])
    rounds, packets = (10, SUPERFRAMES * SEGMENTS) if bulk else (1000, MOST_PACKETS)
    measure(rounds * packets, f"packet with {SIZE if bulk else SMALL} bytes", path.transmit, rounds)
    assert path.drops == 0


@versions
@wires
@pytest.mark.parametrize("what", ["small", "bulk"])
def test_receive(measure: Measure, what: str, wire: Wire, version: int) -> None:
    """64 messages of one packet each, or 8 of 44, from the sockets' buffers into the superframes of a write."""
    path = path_of(wire, version)
    bulk = what == "bulk"
    groups = segments(version, TCP, inwards=True) if bulk else [[one] for one in small_packets(version, inwards=True)]
    path.load_messages(messages(wire, version, groups))
    rounds, packets = (10, SUPERFRAMES * SEGMENTS) if bulk else (1000, MOST_PACKETS)
    measure(rounds * packets, f"packet with {SIZE if bulk else SMALL} bytes", path.receive, rounds)
    assert path.drops == 0
