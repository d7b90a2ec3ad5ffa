"""Several engines of one path, from memory to memory: what they count is summed, and each follows tables and taps.

Which queue a packet comes by is the kernel's part: tests/kernel/test_steering.py and tests/backend/test_queues.py.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP

from dataplane.errors import DropReason, KernelError
from dataplane.path.datapath import Datapath, Tap
from dataplane.path.facts import Outer, PathEvent, PathEventKind, SourceCheck
from tests.debug.test_tap import drain, make_tap, matched

QUEUES = 3
HEADER = bytes(10)  # struct virtio_net_hdr with nothing asked for
LOCAL = IPv4Address("127.0.0.1")
PEER = IPv4Address("127.0.0.2")
THEIRS = IPv4Network("10.5.2.0/24")
REASONS = tuple(reason.name.encode() for reason in DropReason)


class Rig:
    """A datapath of QUEUES queues; the pods' side of each, and a peer, who chooses the receiver by its port."""

    def __init__(self) -> None:
        self.pods, self._tuns, self._receivers = [], [], []
        for _ in range(QUEUES):
            pod, tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            receiver.bind((str(LOCAL), 0))
            tun.setblocking(False)
            receiver.setblocking(False)
            pod.settimeout(5)
            self.pods.append(pod)
            self._tuns.append(tun)
            self._receivers.append(receiver)
        self.ports = [receiver.getsockname()[1] for receiver in self._receivers]
        self.peer = self.node(PEER)
        self.events: list[PathEvent] = []
        first, *further = (tun.fileno() for tun in self._tuns)
        receivers = [receiver.fileno() for receiver in self._receivers]
        self.path = Datapath(
            first,
            Outer(receivers[0], self.ports[0], further=tuple(receivers[1:])),
            mtu=1472,
            source_check=SourceCheck.NODE,
            further=further,
            on_event=self.events.append,
        )

    def node(self, address: IPv4Address) -> socket.socket:
        node = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        node.bind((str(address), self.ports[0]))
        node.settimeout(5)
        return node

    def roundtrip(self, queue: int, number: int = 0) -> None:
        there, back = packet("10.5.1.2", "10.5.2.9", number), packet("10.5.2.9", "10.5.1.2", number)
        self.pods[queue].send(HEADER + there)
        datagram, source = self.peer.recvfrom(70000)
        assert (datagram, source) == (there, (str(LOCAL), self.ports[queue]))
        self.peer.sendto(back, source)
        assert self.pods[queue].recv(70000) == HEADER + back

    def counted(self) -> tuple[int, int]:
        (route,) = self.path.statistics().routes
        return route.tx_packets, route.rx_packets

    async def close(self) -> None:
        await self.path.stop()
        for end in (*self.pods, *self._tuns, *self._receivers, self.peer):
            end.close()


def packet(source: str, destination: str, number: int = 0) -> bytes:
    return bytes(IP(src=source, dst=destination, id=number) / UDP(sport=1000, dport=2000) / b"hello")


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    made.path.set_route(THEIRS, PEER)
    made.path.start()
    yield made
    await made.close()


async def until(what: Callable[[], bool]) -> None:
    for _ in range(1000):
        if what():
            return
        await asyncio.sleep(0.01)
    assert what()


async def test_counters_and_drops_are_those_of_all_queues(rig: Rig) -> None:
    for queue in range(QUEUES):
        for _ in range(queue + 1):
            rig.roundtrip(queue)
        rig.pods[queue].send(HEADER + packet("10.5.1.2", "10.99.0.1"))
        with rig.node(IPv4Address("127.0.0.9")) as stranger:
            stranger.sendto(packet("10.5.2.9", "10.5.1.2"), (str(LOCAL), rig.ports[queue]))
    await until(lambda: sum(rig.path.statistics().drops.values()) == 2 * QUEUES)
    statistics = rig.path.statistics()
    assert {reason: count for reason, count in statistics.drops.items() if count} == {
        DropReason.NO_ROUTE: QUEUES,
        DropReason.UNKNOWN_PEER: QUEUES,
    }
    assert (statistics.tx["packets"], statistics.rx["packets"]) == (6, 6)
    (route,) = statistics.routes
    size = len(packet("10.5.1.2", "10.5.2.9"))
    assert (route.tx_packets, route.tx_bytes, route.rx_packets, route.rx_bytes) == (6, 6 * size, 6, 6 * size)
    assert min(route.tx_last, route.rx_last) > 0
    await until(lambda: len(rig.events) == QUEUES)
    assert {(event.kind, event.queue) for event in rig.events} == {
        (PathEventKind.UNKNOWN_SOURCE, queue) for queue in range(QUEUES)
    }


async def test_a_route_that_takes_the_place_of_another_counts_from_nothing(rig: Rig) -> None:
    for _ in range(5):
        for queue in range(QUEUES):
            rig.roundtrip(queue)
        await until(lambda: rig.counted() == (QUEUES, QUEUES))
        rig.path.remove_route(THEIRS)
        rig.path.publish()
        # every pump must have left the table before the slot is free
        await until(lambda: rig.path._routes._free == [0])
        rig.path.set_route(THEIRS, PEER)
        rig.path.publish()
        assert rig.counted() == (0, 0)


async def test_a_table_reaches_every_queue(rig: Rig) -> None:
    with rig.node(IPv4Address("127.0.0.3")) as other:
        rig.path.set_route(THEIRS, IPv4Address("127.0.0.3"))
        rig.path.publish()
        for queue in range(QUEUES):
            sent = packet("10.5.1.2", "10.5.2.9", queue)
            rig.pods[queue].send(HEADER + sent)
            assert other.recv(70000) == sent


async def test_a_capture_has_what_every_queue_carries_in_the_order_of_time(rig: Rig) -> None:
    tap = make_tap()
    await rig.path.arm([tap])
    for number in range(30):
        rig.roundtrip(number % QUEUES, number)
    await matched(tap, 60)
    await rig.path.arm([])
    rig.roundtrip(1)
    found = drain(tap)
    assert tap.statistics == (60, 0, 60)
    inner = [IP(block.data).id for block in found if block.interface.name == "overlay"]
    assert inner == [number for number in range(30) for _ in range(2)]
    ports = [IP(block.data)[UDP].sport for block in found if block.interface.name == "underlay"][::2]
    assert ports == [rig.ports[number % QUEUES] for number in range(30)]


async def test_where_rings_find_no_memory_nothing_changes(rig: Rig) -> None:
    tap = make_tap()
    await rig.path.arm([tap])
    greedy = Tap(b"", 65535, 1 << 30, REASONS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    former = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), former[1]))  # two rings fit, and not six
    try:
        with pytest.raises(KernelError, match="no memory for a capture's rings"):
            await rig.path.arm([tap, greedy])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)
    for queue in range(QUEUES):
        rig.roundtrip(queue)
    await matched(tap, 2 * QUEUES)
    assert greedy.statistics == (0, 0, 0)
    rig.path.remove_route(THEIRS)
    rig.path.publish()
    await until(lambda: rig.path._routes._free == [0])
