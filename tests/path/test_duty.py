"""Which thread carries what: one while there is little, both under load, and nothing lost or overtaken between."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import select
import socket
import statistics
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from dataplane.kernel.underlay import UDP_SEGMENT
from dataplane.path.facts import SourceCheck
from tests.path.rig import Rig, packet, running, tcp_superframe
from tests.pumps import held_back, on_our_processor

BURSTS = 4
BURST = 3000
TURN = 300
"""Packets that are under way at most, more than four batches: the stand-ins for devices and sockets hold them all."""
REWIRED = 200
QUESTIONS = 100
UNREAD = 100
BESIDE = 50
BUSY_PACKETS = 128
"""In a millisecond: of _duty.pxd."""


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async for made in running(SourceCheck.NODE):
        yield made


def partings(rig: Rig) -> int:
    """How often TX went to its thread."""
    return rig.path.statistics().tx["partings"]


def ping(rig: Rig) -> None:
    out, back = packet("10.5.1.2", "10.5.2.9"), packet("10.5.2.9", "10.5.1.2")
    rig.send_from_pod(out)
    assert rig.peer.recv(70000) == out
    rig.send_from_peer(back)
    assert rig.read_at_pod() == back


async def test_one_thread_carries_questions_and_answers(rig: Rig) -> None:
    for _ in range(100):
        ping(rig)
    assert partings(rig) == 0


@functools.cache
def numbered(source: str, destination: str) -> list[bytes]:
    """BURST packets; made once, which takes longer than to carry them."""
    return [packet(source, destination, number.to_bytes(4)) for number in range(BURST)]


def flood(rig: Rig, pumps: Sequence[int] = ()) -> None:
    """As much as fits, both ways at once; it arrives whole and in order. `pumps` are held back until it is there."""
    there, back = numbered("10.5.1.2", "10.5.2.9"), numbered("10.5.2.9", "10.5.1.2")
    for first in range(0, BURST, TURN):
        with held_back(pumps):
            for number in range(first, first + TURN):
                rig.send_from_peer(back[number])
                rig.send_from_pod(there[number])
        assert [rig.peer.recv(70000) for _ in range(TURN)] == there[first : first + TURN]
        assert [rig.read_at_pod() for _ in range(TURN)] == back[first : first + TURN]


def crowd(rig: Rig) -> None:
    with on_our_processor() as pumps:
        flood(rig, pumps)


async def test_two_threads_carry_a_flood_and_one_what_comes_later(rig: Rig) -> None:
    for _ in range(BURSTS):
        before = partings(rig)
        await asyncio.to_thread(crowd, rig)
        assert partings(rig) > before
        await settled(rig)
        before = partings(rig)
        sleeps = rig.path.statistics().tx["wakeups"]
        ping(rig)
        assert rig.path.statistics().tx["wakeups"] == sleeps, "the TX thread had no part in it"
        assert partings(rig) == before
    assert not rig.drops()


def flood_until_busy(rig: Rig) -> None:
    """One way, 64 datagrams by each send: several times as many in a millisecond as make a pump busy."""
    back = numbered("10.5.2.9", "10.5.1.2")
    rig.peer.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, len(back[0]))
    for first in range(0, 1000 * TURN, TURN):
        some = [back[(first + number) % BURST] for number in range(TURN)]
        for at in range(0, TURN, 64):
            rig.send_from_peer(b"".join(some[at : at + 64]))
        assert [rig.read_at_pod() for _ in range(TURN)] == some
        if rig.path.statistics().rx["moderations"]:
            rig.peer.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 0)
            return
    raise AssertionError("never busy")


@pytest.fixture
async def moderated() -> AsyncIterator[Rig]:
    async for made in running(SourceCheck.NODE, spin=2e-4, moderation=1.5e-4):
        yield made


async def test_a_busy_pump_lets_packets_gather_and_one_at_leisure_does_not(moderated: Rig) -> None:
    await asyncio.to_thread(flood_until_busy, moderated)
    await asyncio.sleep(0.02)
    before = moderated.path.statistics().rx["moderations"]
    for _ in range(10):
        ping(moderated)
        await asyncio.sleep(0.02)
    assert moderated.path.statistics().rx["moderations"] == before
    assert moderated.path.statistics().tx["moderations"] == 0
    assert not moderated.drops()


async def test_a_pump_whose_looks_are_in_vain_sleeps_at_once(moderated: Rig) -> None:
    """Packets that come one by one and slowly cost two calls each, one of which finds nothing, not a hundred."""
    calls = []
    for _ in range(40):
        before = moderated.path.statistics().rx["calls"]
        moderated.send_from_peer(packet("10.5.2.9", "10.5.1.2"))
        moderated.read_at_pod()
        await asyncio.sleep(0.005)
        calls.append(moderated.path.statistics().rx["calls"] - before)
    assert statistics.median(calls[20:]) <= 3, "one pump that is woken late now and then changes nothing"


def looks_beside_a_flood(rig: Rig) -> tuple[float, float]:
    """Superframes out by the TX thread, and a packet in now and then: the receives that RX asks of the kernel for each
    of these, and how many packets TX carries in a millisecond."""
    header, whole = tcp_superframe(60000, 1000)
    back = packet("10.5.2.9", "10.5.1.2")
    with on_our_processor() as pumps:
        flood(rig, pumps)
    for number in pumps:
        os.sched_setaffinity(number, os.sched_getaffinity(0))
    before, began = rig.path.statistics(), time.monotonic()
    for _ in range(BESIDE):
        for _ in range(8):
            rig.pods.send(header.encode() + whole)
        rig.send_from_peer(back)
        rig.read_at_pod()
    after, took = rig.path.statistics(), time.monotonic() - began
    return (after.rx["calls"] - before.rx["calls"]) / BESIDE, (after.tx["packets"] - before.tx["packets"]) / took / 1000


async def test_a_pump_beside_a_busy_one_does_not_look_in_vain(moderated: Rig) -> None:
    looks = []
    for _ in range(20):
        found, pace = await asyncio.to_thread(looks_beside_a_flood, moderated)
        await settled(moderated)
        while select.select([moderated.peer], [], [], 0)[0]:
            moderated.peer.recv(70000)
        if pace >= 1.25 * BUSY_PACKETS:
            looks.append(found)
        if len(looks) == 5:
            break
    if len(looks) < 5:
        pytest.skip(f"TX carries no {1.25 * BUSY_PACKETS:.0f} packets a millisecond here: the last time {pace:.0f}")
    assert statistics.median(looks) <= 15, "25 to 70 where it looks again for 200 microseconds each time"


async def settled(rig: Rig) -> None:
    """TX has been quiet for so long that its thread has given it back."""
    async with asyncio.timeout(30):
        before = -1
        while (now := rig.path.statistics().tx["wakeups"]) != before:
            before = now
            await asyncio.sleep(0.2)


async def test_a_stop_ends_both_threads_in_either_mode(rig: Rig) -> None:
    await asyncio.to_thread(crowd, rig)
    assert partings(rig) > 0
    await rig.path.stop()


async def test_a_batch_that_a_stop_meets_is_carried_to_its_end(rig: Rig) -> None:
    """Stopped and started again under load, whoever carries what: both queues hold what comes meanwhile."""
    flooding = asyncio.create_task(asyncio.to_thread(flood, rig))
    for _ in range(REWIRED):
        await rig.path.rewire(rig.outer, 1472)
        if flooding.done():
            await flooding
            flooding = asyncio.create_task(asyncio.to_thread(flood, rig))
        await asyncio.sleep(random.uniform(0, 0.01))
    await flooding
    assert not rig.drops()


async def test_a_pod_that_does_not_read_can_send(rig: Rig) -> None:
    """The RX thread waits until it does, far longer than TX is quiet."""
    rig.tun.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)  # the least: a few packets
    there, back = numbered("10.5.1.2", "10.5.2.9")[:QUESTIONS], numbered("10.5.2.9", "10.5.1.2")[:UNREAD]
    for sent in back:
        rig.send_from_peer(sent)
    for sent in there:
        await asyncio.sleep(random.uniform(0, 0.03))
        rig.send_from_pod(sent)
        assert rig.peer.recv(70000) == sent
    assert [rig.read_at_pod() for _ in back] == back
    assert not rig.drops()
