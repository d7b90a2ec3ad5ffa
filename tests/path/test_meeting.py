"""What other threads do to pumps that carry, all at once: other tables, taps that come and go and are read, counters
that are looked at, another MTU of the pods. tests/fuzz/test_threads.py runs it below the sanitizer of data races.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from ipaddress import IPv4Network

import pytest

from dataplane.path.facts import SourceCheck
from tests.debug.test_tap import drain, make_tap
from tests.path.rig import PEER, Rig, packet, running

ROUNDS = 200
TURN = 100
"""Packets each way that are under way at most: the stand-ins for devices and sockets hold them all."""
OTHERS = [IPv4Network((0x0A640000 + (i << 8), 24)) for i in range(50)]


@pytest.fixture(params=[(0.0, 0.0), (2e-4, 1.5e-4)], ids=["sleeping", "looking again"])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    spin, moderation = request.param
    async for made in running(SourceCheck.NODE, spin=spin, moderation=moderation):
        yield made


def carry(rig: Rig, enough: threading.Event) -> int:
    """Both ways at once, and whole and in order, until it is enough. Returns the number of packets each way."""
    there = [packet("10.5.1.2", "10.5.2.9", number.to_bytes(4)) for number in range(TURN)]
    back = [packet("10.5.2.9", "10.5.1.2", number.to_bytes(4)) for number in range(TURN)]
    carried = 0
    while not enough.is_set():
        for out, answer in zip(there, back, strict=True):
            rig.send_from_pod(out)
            rig.send_from_peer(answer)
        assert [rig.peer.recv(70000) for _ in range(TURN)] == there
        assert [rig.read_at_pod() for _ in range(TURN)] == back
        carried += TURN
    return carried


async def change(rig: Rig) -> None:
    """Each round another table, and sometimes other taps; what has been counted is never less than before."""
    tap, before = make_tap(), 0
    for number in range(ROUNDS):
        rig.path.set_route(OTHERS[number % len(OTHERS)], PEER)
        rig.path.remove_route(OTHERS[(number * 7 + 20) % len(OTHERS)])
        rig.path.publish()
        rig.path.set_segment_mtu(1400 + number % 72)
        if number % 10 == 0:
            await rig.path.arm([] if number % 20 else [tap])
        drain(tap)
        statistics = rig.path.statistics()
        counted = statistics.tx["packets"] + statistics.rx["packets"] + tap.statistics[0]
        assert counted >= before
        before = counted
        await asyncio.sleep(0)


async def test_nothing_is_lost_while_everything_changes(rig: Rig) -> None:
    enough = threading.Event()
    carrying = asyncio.create_task(asyncio.to_thread(carry, rig, enough))
    try:
        await change(rig)
    finally:
        enough.set()
        carried = await carrying
    statistics = rig.path.statistics()
    assert (statistics.tx["packets"], statistics.rx["packets"]) == (carried, carried)
    assert not rig.drops()
