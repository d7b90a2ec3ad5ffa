"""Packet sockets beside the kernel that fills them: what a filter shows, what a ring holds and what it loses."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from ipaddress import ip_network

import pytest

from dataplane.kernel import packet_ring
from dataplane.kernel.packet_filter import NETWORK_HEADER, Wanted
from dataplane.kernel.packet_ring import LEAST_BLOCKS, Frame, PacketRing
from tests.namespaces import Namespace, open_namespace

pytestmark = pytest.mark.netns

PORT = 8472
NETWORKS = (ip_network("127.9.0.0/16"), ip_network("fd00:9:8::/45"), ip_network("127.77.7.7/32"))


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with open_namespace() as made:
        for address in ("fd00:9:8::1/128", "fd00:9:f::1/128", "fd00:9:10::1/128"):
            made.command("ip", "addr", "add", address, "dev", "lo", "nodad")
        made.command("ip", "link", "set", "lo", "mtu", "1500")
        yield made


@pytest.fixture
def ring(ns: Namespace) -> Iterator[PacketRing]:
    made = ns.run(PacketRing.open, 0)
    yield made
    made.close()


def send(ns: Namespace, to: str, port: int, payload: bytes = b"x") -> None:
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    with (
        ns.run(socket.socket, family, socket.SOCK_DGRAM) as sender,
        ns.run(socket.socket, family, socket.SOCK_DGRAM) as sink,
    ):
        sink.bind((to, port))  # so that no ICMP error answers
        sender.sendto(payload, (to, port))


def shown(ring: PacketRing, seconds: float = 0.3) -> list[Frame]:
    """What was sent; over loopback each frame is seen coming back as well."""
    found: list[Frame] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found += ring.take(20) or []
    return [frame for frame in found if frame.sent]


@pytest.mark.parametrize("base", [14, NETWORK_HEADER])
def test_a_filter_shows_the_port_and_the_networks(ns: Namespace, ring: PacketRing, base: int) -> None:
    lo = ns.run(socket.if_nametoindex, "lo")
    ring.show(Wanted(some_of=frozenset({lo, 4711}), port=PORT, networks=NETWORKS, base=base))
    wanted = ["127.0.0.1 8472", "::1 8472", "127.9.255.1 53", "127.77.7.7 53", "fd00:9:8::1 53", "fd00:9:f::1 53"]
    others = ["127.0.0.1 8473", "::1 8473", "127.10.0.1 53", "127.77.7.8 53", "fd00:9:10::1 53"]
    for number, end in enumerate(wanted + others):
        to, port = end.split()
        send(ns, to, int(port), b"%03d" % number)
    frames = shown(ring)
    assert [int(frame.data[-3:]) for frame in frames] == list(range(len(wanted)))
    assert {frame.device for frame in frames} == {lo}
    assert {frame.network for frame in frames} == {14}
    assert all(abs(time.time_ns() - frame.ns) < 60 * 10**9 for frame in frames)
    assert [frame.ns for frame in frames] == sorted(frame.ns for frame in frames)


def test_all_of_a_device_or_nothing(ns: Namespace, ring: PacketRing) -> None:
    send(ns, "127.0.0.1", 1)
    assert shown(ring, 0.1) == []
    ring.show(Wanted(all_of=frozenset(range(1, 300))))
    send(ns, "127.0.0.1", 2)
    send(ns, "::1", 3)
    assert len(shown(ring)) == 2
    ring.show(Wanted(all_of=frozenset({4711})))
    send(ns, "127.0.0.1", 2)
    assert shown(ring, 0.1) == []


def test_of_a_datagram_in_fragments_the_first_is_shown(ns: Namespace, ring: PacketRing) -> None:
    ring.show(Wanted(some_of=frozenset({ns.run(socket.if_nametoindex, "lo")}), port=PORT))
    send(ns, "127.0.0.1", PORT, bytes(4000))
    (frame,) = shown(ring)
    assert len(frame.data) == 14 + 1500


def test_a_full_ring_counts_and_goes_on(ns: Namespace, ring: PacketRing) -> None:
    ring.show(Wanted(all_of=frozenset({ns.run(socket.if_nametoindex, "lo")})))
    count = LEAST_BLOCKS * packet_ring.BLOCK_BYTES // 1400
    with ns.run(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(count):
            sender.sendto(bytes(1400), ("127.0.0.1", 9))
    time.sleep(0.1)
    ring.hush()
    time.sleep(0.1)
    kept = 0
    while (frames := ring.take()) is not None:
        kept += len(frames)
    assert 0 < kept < 2 * count
    # each datagram is seen twice, and so is the ICMP error to it where the limit of errors lets one be sent
    assert ring.dropped + kept >= 2 * count
    assert ring.dropped == ring.dropped > 0
    ring.show(Wanted(all_of=frozenset({ns.run(socket.if_nametoindex, "lo")})))
    send(ns, "127.0.0.1", 2)
    assert len(shown(ring)) == 1


def test_devices_with_an_ethernet_header_are_told(ns: Namespace) -> None:
    ns.command("ip", "tuntap", "add", "t0", "mode", "tun")
    assert [ns.run(packet_ring.has_ethernet_header, name) for name in ("lo", "t0", "none")] == [True, False, False]
