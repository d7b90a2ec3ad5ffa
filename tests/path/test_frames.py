"""VXLAN through the pumps, from memory to memory: every verdict, and what kernel VTEPs leave unfinished or uncut.

As in rig.py a datagram socket pair stands for the TUN and loopback for the underlay; a kernel's device is
asked in tests/backend.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6

from dataplane.errors import DropReason
from dataplane.path import superframe, wire
from dataplane.path.capability import EVERYTHING, Capability
from dataplane.path.datapath import Datapath
from dataplane.path.facts import Outer, PathEvent, PathEventKind, SourceCheck, Vxlan

VNI, MTU = 7, 1450
OURS, THEIRS = bytes.fromhex("0a0000000001"), bytes.fromhex("0a0000000002")
LOCAL = {4: "127.0.0.1", 6: "::1"}
PEER: dict[int, IPv4Address | IPv6Address] = {4: IPv4Address("127.0.0.2"), 6: IPv6Address("::1")}
SUBNET: dict[int, IPv4Network | IPv6Network] = {4: IPv4Network("10.5.2.0/24"), 6: IPv6Network("fd00:5:0:2::/64")}
POD = {4: ("10.5.1.2", "10.5.2.9"), 6: ("fd00:5:0:1::2", "fd00:5:0:2::9")}
IP_RECVTOS_ECN = {4: (socket.IPPROTO_IP, socket.IP_RECVTOS), 6: (socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS)}


class Rig:
    """One datapath of frames, the pods' side of its TUN, and one peer's socket."""

    def __init__(self, version: int, capabilities: Collection[Capability] = EVERYTHING, senders: int = 1) -> None:
        self.version = version
        self.pods, self._tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (self.pods, self._tun):
            end.setsockopt(socket.SOL_SOCKET, 32, 8 << 20)  # SO_SNDBUFFORCE: room for superframes
        self._tun.setblocking(False)
        self.pods.settimeout(5)
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        self._udp = socket.socket(family, socket.SOCK_DGRAM)
        self._udp.setsockopt(*IP_RECVTOS_ECN[version], 1)
        self._udp.setblocking(False)
        self._udp.bind((LOCAL[version], 0))
        self.port = self._udp.getsockname()[1]
        self.senders = [socket.socket(family, socket.SOCK_DGRAM) for _ in range(senders)]
        for sender in self.senders:
            sender.bind((LOCAL[version], 0))
        self.peer = socket.socket(family, socket.SOCK_DGRAM)
        self.peer.setsockopt(*IP_RECVTOS_ECN[version], 1)
        self.peer.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        self.peer.settimeout(5)
        # of IPv6 there is one address on loopback, so the peer's port is not ours; ours are sent to it
        self.peer.bind((str(PEER[version]), self.port if version == 4 else 0))
        self.events: list[PathEvent] = []
        self.path = Datapath(
            self._tun.fileno(),
            Outer(self._udp.fileno(), self.peer.getsockname()[1], tuple(s.fileno() for s in self.senders)),
            mtu=MTU,
            source_check=SourceCheck.NODE,
            vxlan=Vxlan(VNI, OURS, version),
            capabilities=capabilities,
            run_datagrams=128,
            on_event=self.events.append,
        )
        self.path.set_route(SUBNET[version], PEER[version], THEIRS)

    def out(self, payload: bytes = b"hello", *, ecn: int = 0, sport: int = 1000) -> bytes:
        """A packet from our pod to theirs."""
        source, target = POD[self.version]
        ip = IP(src=source, dst=target, tos=ecn) if self.version == 4 else IPv6(src=source, dst=target, tc=ecn)
        return bytes(ip / UDP(sport=sport, dport=2000) / payload)

    def back(self, payload: bytes = b"hello", *, ecn: int = 0) -> bytes:
        target, source = POD[self.version]
        ip = IP(src=source, dst=target, tos=ecn) if self.version == 4 else IPv6(src=source, dst=target, tc=ecn)
        return bytes(ip / UDP(sport=1000, dport=2000) / payload)

    def frame(self, packet: bytes) -> bytes:
        """As the peer sends it."""
        return wire.frame_head(VNI, THEIRS, OURS, self.version) + packet

    def send_from_peer(self, datagram: bytes, *, ecn: int = 0) -> None:
        level, option = (
            (socket.IPPROTO_IP, socket.IP_TOS) if self.version == 4 else (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
        )
        self.peer.setsockopt(level, option, ecn)
        self.peer.sendto(datagram, (LOCAL[self.version], self.port))

    def read_at_pod(self) -> tuple[superframe.VnetHeader, bytes]:
        got = self.pods.recv(70000)
        return superframe.VnetHeader.decode(got[:10]), got[10:]

    def receive_at_peer(self) -> tuple[bytes, int, int]:
        """(datagram, outer ECN, source port)"""
        datagram, control, _, address = self.peer.recvmsg(70000, 64)
        return datagram, int.from_bytes(control[0][2], "little") & 3, address[1]

    def drops(self) -> dict[DropReason, int]:
        return {reason: count for reason, count in self.path.statistics().drops.items() if count}

    async def close(self) -> None:
        await self.path.stop()
        for end in (self.pods, self._tun, self._udp, self.peer, *self.senders):
            end.close()


@pytest.fixture(params=[4, 6])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    made = Rig(request.param)
    made.path.start()
    yield made
    await made.close()


@pytest.fixture(params=[4, 6])
async def waiting(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """Its pumps have not started, so that what is sent is met in one batch."""
    made = Rig(request.param)
    yield made
    await made.close()


async def test_a_packet_leaves_in_a_frame_and_comes_out_of_one(rig: Rig) -> None:
    rig.pods.send(bytes(10) + rig.out())
    datagram, _, _ = rig.receive_at_peer()
    assert datagram == wire.frame_head(VNI, OURS, THEIRS, rig.version) + rig.out()
    rig.send_from_peer(rig.frame(rig.back()))
    assert rig.read_at_pod() == (superframe.VnetHeader(), rig.back())
    await asyncio.sleep(0.05)
    (route,) = rig.path.statistics().routes
    assert (route.tx_packets, route.tx_bytes) == (1, len(rig.out())), "the frame's head is not the pods'"
    assert (route.rx_packets, route.rx_bytes) == (1, len(rig.back()))


@pytest.mark.parametrize("inner", range(4))
async def test_congestion_marks_leave_as_with_the_kernel(rig: Rig, inner: int) -> None:
    rig.pods.send(bytes(10) + rig.out(ecn=0xB8 | inner))
    datagram, outer, _ = rig.receive_at_peer()
    assert outer == (0, 1, 2, 2)[inner]
    assert datagram[22:] == rig.out(ecn=0xB8 | inner)


async def test_a_run_has_one_mark_and_order_is_kept(waiting: Rig) -> None:
    marks = [0, 0, 1, 2, 3, 2, 0]
    sent = [waiting.out(bytes([i]) * 50, ecn=mark) for i, mark in enumerate(marks)]
    for packet in sent:
        waiting.pods.send(bytes(10) + packet)
    waiting.path.start()
    got = [waiting.receive_at_peer() for _ in sent]
    assert [datagram[22:] for datagram, _, _ in got] == sent
    assert [outer for _, outer, _ in got] == [0, 0, 1, 2, 2, 2, 0]
    await asyncio.sleep(0.05)
    assert waiting.path.statistics().tx["messages"] == 4


@pytest.mark.parametrize(("inner", "outer"), [(i, o) for i in range(4) for o in range(4)])
async def test_congestion_marks_arrive_by_the_table(rig: Rig, inner: int, outer: int) -> None:
    sent = rig.back(ecn=inner)
    expected = wire.with_outer_ecn(sent, outer)
    rig.send_from_peer(rig.frame(sent), ecn=outer)
    rig.send_from_peer(rig.frame(rig.back(b"longer, so never merged")))
    got = [rig.read_at_pod()[1] for _ in range(1 if expected is None else 2)]
    assert got == [packet for packet in (expected, rig.back(b"longer, so never merged")) if packet is not None]
    assert rig.drops() == ({DropReason.ECN: 1} if expected is None else {})


def changed(at: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda frame: frame[:at] + value + frame[at + len(value) :]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda frame: frame[:0], DropReason.LENGTH),
        (lambda frame: frame[:7], DropReason.LENGTH),
        (lambda frame: frame[:21], DropReason.LENGTH),
        (lambda frame: frame[:22], DropReason.NOT_IP),
        (lambda frame: frame[:-1], DropReason.LENGTH),
        (changed(0, b"\0"), DropReason.NO_VNI),
        (changed(0, b"\x88"), DropReason.RESERVED_BITS),
        (changed(3, b"\1"), DropReason.RESERVED_BITS),
        (changed(7, b"\1"), DropReason.RESERVED_BITS),
        (changed(6, b"\x08"), DropReason.FOREIGN_VNI),
        (changed(8, THEIRS), DropReason.OTHER_MAC),
        (changed(8, b"\xff" * 6), DropReason.OTHER_MAC),
        (changed(14, OURS), DropReason.OWN_MAC),
        (changed(14, bytes.fromhex("0a0000000003")), DropReason.PEER_MAC),
        (changed(20, b"\x81\0"), DropReason.VLAN),
        (changed(20, b"\x08\x06"), DropReason.ETHERTYPE),
    ],
)
async def test_each_bad_frame_has_its_reason(rig: Rig, spoil: Callable[[bytes], bytes], reason: DropReason) -> None:
    rig.send_from_peer(spoil(rig.frame(rig.back())))
    rig.send_from_peer(rig.frame(rig.back(b"after")))
    assert rig.read_at_pod()[1] == rig.back(b"after")
    assert rig.drops() == {reason: 1}


async def test_a_frame_of_the_other_ip_version_is_not_carried(rig: Rig) -> None:
    other = Rig(10 - rig.version)
    frame = wire.frame_head(VNI, THEIRS, OURS, other.version) + other.back()
    rig.send_from_peer(frame)
    rig.send_from_peer(rig.frame(other.back()))
    rig.send_from_peer(rig.frame(rig.back(b"after")))
    assert rig.read_at_pod()[1] == rig.back(b"after")
    assert sum(rig.drops().values()) == 2
    assert rig.drops()[DropReason.ETHERTYPE] == 1
    await other.close()


async def test_trailing_bytes_are_trimmed(rig: Rig) -> None:
    rig.send_from_peer(rig.frame(rig.back()) + bytes(9))
    assert rig.read_at_pod()[1] == rig.back()


# --- what kernel VTEPs hand over ------------------------------------------------------------------------------


def tcp(version: int, size: int, *, seq: int = 1000, flags: str = "A") -> bytes:
    target, source = POD[version]
    ip = IP(src=source, dst=target, flags="DF", id=seq // 500) if version == 4 else IPv6(src=source, dst=target)
    return bytes(ip / TCP(sport=1, dport=2, seq=seq, flags=flags) / os.urandom(size))


def unfinished(packet: bytes) -> bytes:
    header = wire.parse_ip(packet)
    assert not isinstance(header, DropReason)
    assert header.l4 is not None
    at = header.l4 + (16 if header.protocol == wire.TCP else 6)
    partial = superframe.partial_checksum(packet, header.protocol, header.length - header.l4)
    return packet[:at] + partial.to_bytes(2) + packet[at + 2 :]


@pytest.mark.parametrize("size", [0, 1, 1000])
async def test_an_unfinished_checksum_is_handed_on_as_such(rig: Rig, size: int) -> None:
    """A SYN and a small UDP packet too: the kernel leaves every one so."""
    for packet in (tcp(rig.version, size, flags="S"), rig.back(os.urandom(size))):
        rig.send_from_peer(rig.frame(unfinished(packet)))
        header, got = rig.read_at_pod()
        assert got == unfinished(packet)
        assert header.flags == superframe.NEEDS_CSUM
        assert header.gso_type == superframe.GSO_NONE
        assert superframe.finished(header, got) == packet


async def test_unfinished_packets_are_merged(waiting: Rig) -> None:
    sent = [tcp(waiting.version, 500, seq=1000 + 500 * i) for i in range(10)]
    for i, packet in enumerate(sent):
        waiting.send_from_peer(waiting.frame(unfinished(packet) if i % 2 else packet))
    await asyncio.sleep(0.05)
    waiting.path.start()
    header, whole = waiting.read_at_pod()
    assert superframe.segments(header, whole) == sent


async def test_a_wrong_checksum_is_handed_on_unmerged_and_counted(waiting: Rig) -> None:
    sent = [tcp(waiting.version, 500, seq=1000 + 500 * i) for i in range(3)]
    sent[1] = sent[1][:-1] + bytes([sent[1][-1] ^ 1])
    for packet in sent:
        waiting.send_from_peer(waiting.frame(packet))
    await asyncio.sleep(0.05)
    waiting.path.start()
    assert [waiting.read_at_pod() for _ in sent] == [(superframe.VnetHeader(), packet) for packet in sent]
    assert waiting.path.statistics().rx["wrong_checksums"] == 1


@pytest.mark.parametrize("off", [frozenset(), EVERYTHING])
@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize("version", [4, 6])
async def test_a_tcp_superframe_is_cut_to_the_pods_mtu(version: int, finish: bool, off: frozenset[Capability]) -> None:
    rig = Rig(version, EVERYTHING - off)
    rig.path.set_segment_mtu(1300)
    rig.path.start()
    whole = tcp(version, 20_000, flags="PA")
    size = 1300 - 20 - (20 if version == 4 else 40)
    kind = superframe.GSO_TCPV4 if version == 4 else superframe.GSO_TCPV6
    header = superframe.VnetHeader(1, kind, 1300 - size, size, 1300 - size - 20, 16)
    rig.send_from_peer(rig.frame(whole if finish else unfinished(whole)))
    expected = superframe.segments(header, unfinished(whole))
    assert expected is not None
    if off:
        assert [rig.read_at_pod() for _ in expected] == [(superframe.VnetHeader(), packet) for packet in expected]
    else:
        assert rig.read_at_pod() == (header, unfinished(whole))
    await asyncio.sleep(0.05)
    assert rig.path.statistics().rx["packets"] == len(expected)
    (event,) = rig.events
    assert (event.kind, event.address, event.value) == (PathEventKind.SUPERFRAME, PEER[version], len(whole))
    await rig.close()


async def test_a_superframe_with_a_wrong_checksum_is_handed_on_as_it_is(rig: Rig) -> None:
    whole = tcp(rig.version, 20_000)
    broken = whole[:-1] + bytes([whole[-1] ^ 1])
    rig.send_from_peer(rig.frame(broken))
    assert rig.read_at_pod() == (superframe.VnetHeader(), broken)


async def test_a_long_packet_that_is_no_superframe_is_delivered_whole(rig: Rig) -> None:
    """The kernel answers or fragments, as behind a device of its own."""
    packet = rig.back(os.urandom(5000))
    rig.send_from_peer(rig.frame(packet))
    assert rig.read_at_pod() == (superframe.VnetHeader(), packet)


async def test_flows_are_spread_over_the_sockets_and_each_keeps_its_own() -> None:
    rig = Rig(4, senders=8)
    rig.path.start()
    ports: dict[int, set[int]] = {}
    for sport in [*range(1000, 1064)] * 2:
        rig.pods.send(bytes(10) + rig.out(sport=sport))
        ports.setdefault(sport, set()).add(rig.receive_at_peer()[2])
    assert all(len(found) == 1 for found in ports.values())
    used = {port for found in ports.values() for port in found}
    assert used <= {sender.getsockname()[1] for sender in rig.senders}
    assert len(used) >= 6
    fragments = [
        bytes(IP(src=POD[4][0], dst=POD[4][1], frag=frag, flags=flags, proto=17) / os.urandom(64))
        for frag, flags in ((0, "MF"), (8, "MF"), (16, 0))
    ]
    for fragment in fragments:
        rig.pods.send(bytes(10) + fragment)
    assert len({rig.receive_at_peer()[2] for _ in fragments}) == 1, "fragments have no ports, and one way"
    await rig.close()
