"""The kernel as the judge of VXLAN: our receive path and a vxlan device get the same mutated datagrams and agree about
each; what we write around a packet is what the device writes.

LODEN_VXLAN_CASES says how many cases (100,000), LODEN_VXLAN_SEED repeats a run.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

import pytest
from scapy.layers import inet

from dataplane.errors import DropReason
from dataplane.kernel import underlay
from dataplane.path.datapath import Datapath
from dataplane.path.facts import Outer, SourceCheck, Vxlan
from dataplane.path.wire import FRAME_HEAD, UDP, checksum, pseudo_header
from tests.namespaces import Namespace, open_namespace
from tests.netns.kernel_vtep import (
    HOST,
    HOST_MAC,
    HOST_V6,
    PEER,
    PEER_MAC,
    PEER_V6,
    PORT,
    VNI,
    KernelVtep,
    open_vtep,
)
from tests.netns.vxlan_cases import (
    HOST_SUBNET,
    HOST_SUBNET_V6,
    PEER_SUBNET,
    PEER_SUBNET_V6,
    Case,
    make_case,
    make_packet,
)

pytestmark = pytest.mark.netns

CASES = int(os.environ.get("LODEN_VXLAN_CASES", "100000"))
SEED = int(os.environ.get("LODEN_VXLAN_SEED", "0")) or secrets.randbits(32)
ROUND, BATCH = 5000, 64
IP_RECVTOS = 13
RECEIVER, SENDER = "127.0.0.1", "127.0.0.2"
NOTHING_ASKED = bytes(10)

ERRORS = {DropReason.RESERVED_BITS, DropReason.ECN}
SILENT = {DropReason.NO_VNI, DropReason.FOREIGN_VNI, DropReason.OWN_MAC}
STRICTER = {
    *(DropReason.OTHER_MAC, DropReason.PEER_MAC, DropReason.VLAN, DropReason.ETHERTYPE),
    *(DropReason.NOT_IP, DropReason.LENGTH, DropReason.SPOOFED_SOURCE),
}
"""Where the device hands a frame on that the host behind it would not take, or not from that peer."""

Verdict = DropReason | None


class Ours:
    """Our receive path for frames with one IP version inside, between a socket on loopback and a memory TUN."""

    def __init__(self, namespace: Namespace, version: int) -> None:
        self._pods, self._tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (self._pods, self._tun):
            end.setblocking(False)
        self._receiver, self._sender = namespace.run(_open_udp, RECEIVER), namespace.run(_open_udp, SENDER)
        self._to = self._receiver.getsockname()
        self.path = Datapath(
            self._tun.fileno(),
            Outer(self._receiver.fileno(), self._to[1]),
            mtu=1450,
            source_check=SourceCheck.NODE,
            vxlan=Vxlan(VNI, _mac(HOST_MAC), version),
            spin=0.01,
            on_event=lambda _event: None,
        )
        subnet = IPv4Network(PEER_SUBNET) if version == 4 else IPv6Network(PEER_SUBNET_V6)
        self.path.set_route(subnet, IPv4Address(SENDER), _mac(PEER_MAC))
        self.path.start()
        self._dropped = Counter[DropReason]()

    def verdict(self, case: Case) -> tuple[Verdict, bytes]:
        """What becomes of one datagram: the packet that is delivered, or why none is."""
        payload, tos = case
        control = [(socket.IPPROTO_IP, socket.IP_TOS, tos.to_bytes(4, "little"))]
        self._sender.sendmsg([payload], control, 0, self._to)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            try:
                written = self._pods.recv(70000)
            except BlockingIOError:
                pass
            else:
                return None, written[len(NOTHING_ASKED) :]
            dropped = Counter(self.path.statistics().drops)
            if dropped != self._dropped:
                (reason,) = (dropped - self._dropped).elements()
                self._dropped = dropped
                return reason, b""
        raise AssertionError(f"neither delivered nor counted: {_show(case)}")

    async def close(self) -> None:
        await self.path.stop()
        for end in (self._pods, self._tun, self._receiver, self._sender):
            end.close()


@pytest.fixture
async def ours() -> AsyncIterator[dict[int, Ours]]:
    with open_namespace() as namespace:
        paths = {version: Ours(namespace, version) for version in (4, 6)}
        try:
            yield paths
        finally:
            for path in paths.values():
                await path.close()


@pytest.fixture
def device() -> Iterator[KernelVtep]:
    with open_vtep() as made:
        yield made


@pytest.mark.timeout(600)
async def test_our_receive_path_agrees_with_the_device(ours: dict[int, Ours], device: KernelVtep) -> None:
    rng = random.Random(SEED)
    seen = Counter[Verdict]()
    for first in range(0, CASES, ROUND):
        groups: dict[Verdict, list[tuple[Case, bytes]]] = defaultdict(list)
        for _ in range(first, min(CASES, first + ROUND)):
            case = make_case(rng)
            verdict, packet = ours[6 if case[0][FRAME_HEAD : FRAME_HEAD + 1] >= b"\x60" else 4].verdict(case)
            groups[verdict].append((case, packet))
            seen[verdict] += 1
        for verdict, judged in groups.items():
            for at in range(0, len(judged), BATCH):
                _compare(device, verdict, judged[at : at + BATCH])
    assert set(seen) == {None, *ERRORS, *SILENT, *STRICTER}


def _compare(device: KernelVtep, verdict: Verdict, judged: list[tuple[Case, bytes]]) -> None:
    cases = [case for case, _ in judged]
    found, frames = device.judge(cases)
    if verdict is None:
        wanted = (len(cases), 0)
    elif verdict in ERRORS:
        wanted = (0, len(cases))
    elif verdict in SILENT or (verdict is DropReason.LENGTH and all(len(p) < FRAME_HEAD for p, _ in cases)):
        wanted = (0, 0)
    else:
        assert verdict in STRICTER
        return
    if (found.accepted, found.errors) != wanted:
        one = next((c for c in cases if device.judge([c])[0] != device.judge(cases[:1])[0]), cases[0])
        pytest.fail(f"we say {verdict!r} of {len(cases)}, the device {found}; one of them: {_show(one)}")
    if verdict is None:
        for (case, packet), frame in zip(judged, frames, strict=True):
            assert _one_zero(frame[14 : 14 + len(packet)]) == _one_zero(packet), _show(case)


def _one_zero(packet: bytes) -> bytes:
    """Zero has two forms in ones' complement. Where a CE mark changes an IPv4 header, ours is that of RFC 1624 section
    3; the kernel adds (include/net/inet_ecn.h, IP_ECN_set_ce) and may come to the other."""
    return packet[:10] + bytes(2) + packet[12:] if packet[:1] < b"\x60" and packet[10:12] == b"\xff\xff" else packet


def _show(case: Case) -> str:
    payload, tos = case
    return f"repeat with LODEN_VXLAN_SEED={SEED} LODEN_VXLAN_CASES={CASES}; outer TOS {tos}, payload {payload.hex()}"


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _open_udp(address: str) -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
    opened.bind((address, 0))
    opened.setblocking(False)
    return opened


@pytest.mark.parametrize("outer", [4, 6])
async def test_our_outer_header_equals_the_devices(device: KernelVtep, outer: int) -> None:
    """All of it but the IP ID, the source port and the two checksums, which are checked for themselves."""
    rng = random.Random(SEED)
    async with open_encapsulation(device, outer) as encapsulate:
        for _ in range(400):
            packet = make_packet(rng)
            ours, kernels = encapsulate(packet), device.encapsulate(packet, outer)
            assert _masked(ours) == _masked(kernels), f"LODEN_VXLAN_SEED={SEED} {packet.hex()}"
            assert ours.endswith(packet)
            if outer == 4:
                assert checksum(ours[:20]) == 0
            l4 = ours[20 if outer == 4 else 40 :]
            assert checksum(pseudo_header(ours, UDP, len(l4)) + l4) == 0


async def test_flows_leave_by_several_ports_and_each_by_one(device: KernelVtep) -> None:
    """So that ECMP and RSS on the way see them apart, and keep each in order."""
    first, last = device.host.run(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text).split()
    ports: dict[int, set[int]] = defaultdict(set)
    async with open_encapsulation(device, 4) as encapsulate:
        for flow in [*range(64), *range(64)]:
            datagram = encapsulate(bytes(inet.IP(src="10.9.1.1", dst="10.9.2.2") / inet.UDP(sport=flow, dport=53)))
            ports[flow].add(int.from_bytes(datagram[20:22]))
    assert all(len(found) == 1 for found in ports.values())
    used = set.union(*ports.values())
    assert 4 < len(used) <= 8
    assert all(int(first) <= port <= int(last) for port in used)


@contextlib.asynccontextmanager
async def open_encapsulation(device: KernelVtep, outer: int) -> AsyncIterator[Callable[[bytes], bytes]]:
    """What our path sends in the device's place: a function from an inner packet to the outer IP packet."""
    local, peer = (IPv4Address(HOST), IPv4Address(PEER)) if outer == 4 else (IPv6Address(HOST_V6), IPv6Address(PEER_V6))
    async with contextlib.AsyncExitStack() as stack:
        senders = device.host.run(underlay.open_senders, local, 8)
        receiver = device.host.run(_open_udp, "127.0.0.1")
        for sender in (*senders, receiver):
            stack.callback(sender.close)
        pods = {version: _start_encapsulation(stack, receiver, senders, peer, version) for version in (4, 6)}

        def encapsulate(packet: bytes) -> bytes:
            pods[packet[0] >> 4].send(NOTHING_ASKED + packet)
            return device.next_datagram(outer)

        yield encapsulate


def _start_encapsulation(
    stack: contextlib.AsyncExitStack,
    receiver: socket.socket,
    senders: tuple[socket.socket, ...],
    peer: IPv4Address | IPv6Address,
    version: int,
) -> socket.socket:
    pods, tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    tun.setblocking(False)
    path = Datapath(
        tun.fileno(),
        Outer(receiver.fileno(), PORT, tuple(sender.fileno() for sender in senders)),
        mtu=1450,
        source_check=SourceCheck.NODE,
        vxlan=Vxlan(VNI, _mac(HOST_MAC), version),
        on_event=lambda _event: None,
    )
    path.set_route(IPv4Network(HOST_SUBNET) if version == 4 else IPv6Network(HOST_SUBNET_V6), peer, _mac(PEER_MAC))
    path.start()
    stack.callback(pods.close)
    stack.callback(tun.close)
    stack.push_async_callback(path.stop)
    return pods


def _masked(datagram: bytes) -> bytes:
    """Without IP ID, header checksum, source port and UDP checksum."""
    masked = bytearray(datagram)
    l4 = 20 if datagram[0] >> 4 == 4 else 40
    for at in ((4, 10) if l4 == 20 else ()) + (l4, l4 + 6):
        masked[at : at + 2] = b"\0\0"
    return bytes(masked)
