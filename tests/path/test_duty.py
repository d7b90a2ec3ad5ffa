"""Which thread carries what: one while there is little, both under load, and nothing lost or overtaken between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from dataplane.path.facts import SourceCheck
from tests.path.rig import Rig, packet, running

BURSTS = 4
BURST = 3000
TURN = 200
"""Packets that are under way at most: the stand-ins for devices and sockets hold them all."""


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async for made in running(SourceCheck.NODE):
        yield made


def tx_sleeps(rig: Rig) -> int:
    return rig.path.statistics().tx["wakeups"]


def ping(rig: Rig) -> None:
    out, back = packet("10.5.1.2", "10.5.2.9"), packet("10.5.2.9", "10.5.1.2")
    rig.send_from_pod(out)
    assert rig.peer.recv(70000) == out
    rig.send_from_peer(back)
    assert rig.read_at_pod() == back


async def test_one_thread_carries_questions_and_answers(rig: Rig) -> None:
    for _ in range(100):
        ping(rig)
    assert tx_sleeps(rig) <= 1  # until it is called, which it never is


def flood(rig: Rig) -> None:
    """As much as fits, both ways at once; it arrives whole and in order."""
    there = [packet("10.5.1.2", "10.5.2.9", number.to_bytes(4)) for number in range(BURST)]
    back = [packet("10.5.2.9", "10.5.1.2", number.to_bytes(4)) for number in range(BURST)]
    for first in range(0, BURST, TURN):
        for number in range(first, first + TURN):
            rig.send_from_peer(back[number])
            rig.send_from_pod(there[number])
        assert [rig.peer.recv(70000) for _ in range(TURN)] == there[first : first + TURN]
        assert [rig.read_at_pod() for _ in range(TURN)] == back[first : first + TURN]


async def test_two_threads_carry_a_flood_and_one_what_comes_later(rig: Rig) -> None:
    for _ in range(BURSTS):
        before = tx_sleeps(rig)
        async with asyncio.timeout(60):
            while tx_sleeps(rig) == before:  # a batch may always have met an empty queue
                await asyncio.to_thread(flood, rig)
        ping(rig)
        await settled(rig)
        sleeps = tx_sleeps(rig)
        ping(rig)
        assert tx_sleeps(rig) == sleeps
    assert not rig.drops()


async def settled(rig: Rig) -> None:
    """TX has been quiet for so long that its thread has given it back."""
    async with asyncio.timeout(30):
        before = -1
        while (now := tx_sleeps(rig)) != before:
            before = now
            await asyncio.sleep(0.2)


async def test_a_stop_ends_both_threads_in_either_mode(rig: Rig) -> None:
    before = tx_sleeps(rig)
    async with asyncio.timeout(60):
        while tx_sleeps(rig) == before:
            await asyncio.to_thread(flood, rig)
        await rig.path.stop()
