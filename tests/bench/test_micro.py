"""The batches that the micro-benchmarks measure against the functions that take one packet, for the same traffic. One
round and three leave the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings

from dataplane import _coalesce, _engine, _segment
from dataplane.bench import micro
from dataplane.bench._micro import MOST_MESSAGES, MOST_PACKETS
from dataplane.bench.micro import PLAIN, Wire
from dataplane.path import superframe
from dataplane.path import wire as oracle
from dataplane.path.superframe import TCP, UDP, VnetHeader
from tests.path.test_superframe import flow_packets

versions = pytest.mark.parametrize("version", [4, 6])
protocols = pytest.mark.parametrize("protocol", [TCP, UDP])
wires = pytest.mark.parametrize("wire", ["udp", "vxlan"])
rounds = pytest.mark.parametrize("rounds", [1, 3])


def head_of(wire: Wire, version: int) -> bytes:
    return oracle.frame_head(micro.VNI, micro.OURS, micro.THEIRS, version) if wire == "vxlan" else b""


def low(address: bytes) -> int:
    return int.from_bytes(address[-8:])


@settings(max_examples=100, deadline=None)
@given(flow_packets())
def test_parsing_and_summing(packets: list[bytes]) -> None:
    path = micro.path_of("udp", 4)
    path.load([(PLAIN, packet) for packet in packets])
    carried = [seen for seen in map(_engine.inspect_ip, packets) if seen[0] is None]
    total = sum(length + low(source) + low(to) for _, source, to, length in carried if source and to and length)
    for rounds in (1, 3):
        assert path.parse(rounds) == (len(carried), total % 2**64)
        assert path.checksum(rounds) == sum(map(oracle.checksum, packets))


@settings(max_examples=100, deadline=None)
@given(flow_packets())
def test_coalescing_whatever_comes(packets: list[bytes]) -> None:
    path = micro.path_of("udp", 4)
    path.load([(PLAIN, packet) for packet in packets])
    for rounds in (1, 3):
        path.coalesce(rounds)
        assert path.superframes() == _coalesce.superframes(packets)


@versions
@protocols
@rounds
def test_coalescing_merges_what_is_measured(protocol: int, version: int, rounds: int) -> None:
    path = micro.path_of("udp", version)
    packets = micro.segments(version, protocol)[0]
    path.load([(PLAIN, packet) for packet in packets])
    path.coalesce(rounds)
    assert len(path.superframes()) == 1
    assert path.superframes() == _coalesce.superframes(packets)


@versions
@wires
@rounds
def test_encapsulation(wire: Wire, version: int, rounds: int) -> None:
    path = micro.path_of(wire, version)
    packets = micro.small_packets(version)
    path.load([(PLAIN, packet) for packet in packets])
    path.encap(rounds)
    assert path.datagrams() == [(micro.outer_of(micro.PEER), head_of(wire, version) + packet) for packet in packets]


@versions
@protocols
@rounds
def test_segmentation(protocol: int, version: int, rounds: int) -> None:
    path = micro.path_of("udp", version)
    superframes = micro.superframes(version, protocol)
    path.load(superframes)
    heads = b"".join(
        packet[: -micro.SIZE] for header, whole in superframes for packet in _segment.segments(header, whole) or ()
    )
    assert path.segment(rounds) == heads
    head = (20 if version == 4 else 40) + (20 if protocol == TCP else 8)
    assert len(heads) == micro.SUPERFRAMES * micro.SEGMENTS * head


@versions
@wires
@rounds
def test_whole_transmission(wire: Wire, version: int, rounds: int) -> None:
    """Superframes, then small packets: in one batch they would end each other's runs."""
    path = micro.path_of(wire, version)
    superframes = micro.superframes(version, TCP)
    small = micro.small_packets(version)
    head, to = head_of(wire, version), micro.outer_of(micro.PEER)
    path.load(superframes)
    path.transmit(rounds)
    cut = [packet for header, whole in superframes for packet in _segment.segments(header, whole) or ()]
    assert path.datagrams() == [(to, head + packet) for packet in cut]
    path.load([(PLAIN, packet) for packet in small])
    path.transmit(rounds)
    assert path.datagrams() == [(to, head + packet) for packet in small]
    assert path.drops == 0


@versions
def test_transmission_finishes_a_checksum(version: int) -> None:
    path = micro.path_of("udp", version)
    header, packet = micro.unfinished(version, UDP), micro.packet(version, UDP, b"hello")
    path.load([(header.encode(), packet)])
    path.transmit(1)
    assert [datagram for _, datagram in path.datagrams()] == [superframe.finished(header, packet)]


@versions
@wires
@rounds
@pytest.mark.parametrize("what", ["small", "bulk"])
def test_whole_reception(what: str, wire: Wire, version: int, rounds: int) -> None:
    path = micro.path_of(wire, version)
    if what == "bulk":
        groups = micro.segments(version, TCP, inwards=True)
    else:
        groups = [[packet] for packet in micro.small_packets(version, inwards=True)]
    path.load_messages(micro.messages(wire, version, groups))
    path.receive(rounds)
    packets = [packet for group in groups for packet in group]
    assert path.superframes() == _coalesce.superframes(packets)
    assert len(path.superframes()) < len(packets) / 20
    assert path.drops == 0


@wires
def test_what_a_pump_would_drop_is_dropped(wire: Wire) -> None:
    """Neither direction goes another way because nobody is there to send to."""
    path = micro.path_of(wire, 4)
    own = micro.packet(4, UDP, b"hello")
    path.load([(PLAIN, own[:16] + bytes([11, 0, 0, 1]) + own[20:])])
    path.transmit(1)
    assert path.datagrams() == []
    assert path.drops == 1
    with pytest.raises(ValueError, match="without a route"):
        path.encap(1)
    path = micro.path_of(wire, 4)
    path.load_messages(micro.messages(wire, 4, [[own]]))  # of our own subnet, from the peer
    path.receive(1)
    assert path.superframes() == []
    assert path.drops == 1


REFUSED: list[tuple[str, Any]] = [
    ("load", [(PLAIN, b"")] * (MOST_PACKETS + 1)),
    ("load", [(PLAIN[1:], b"")]),
    ("load", [(PLAIN, bytes(65_537))]),
    ("load_messages", [(bytes(16), 1, b"")] * (MOST_MESSAGES + 1)),
    ("load_messages", [(bytes(16), 1, bytes(1025))]),
    ("load_messages", [(bytes(15), 1, b"1")]),
    ("load_messages", [(bytes(16), 65_537, bytes(65_537))]),
]


@pytest.mark.parametrize(("method", "traffic"), REFUSED)
def test_what_a_batch_cannot_hold_is_refused(method: str, traffic: list[Any]) -> None:
    load = getattr(micro.path_of("udp", 4), method)
    with pytest.raises(ValueError, match=r"more|not what"):
        load(traffic)


def test_a_packet_is_not_cut() -> None:
    path = micro.path_of("udp", 4)
    path.load([(VnetHeader().encode(), micro.small_packets(4)[0])])
    with pytest.raises(ValueError, match="superframe"):
        path.segment(1)
