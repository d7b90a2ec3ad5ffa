"""When a move is made, and when not: the rhythm of following, with stand-ins for node, backend and keeper.

What the stand-ins stand for is in tests/netns/test_following.py, with real packets.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from ipaddress import IPv4Address, ip_interface
from random import Random

import pytest

from dataplane.backend.base import Underlay
from dataplane.errors import ConfigError, KernelError
from dataplane.following import CONFIRM_SECONDS, SETTLE_SECONDS, Following
from dataplane.kernel.facts import Address, AddressEvent, KernelEvent, LinkEvent, Overrun, RouteEvent
from dataplane.lease.model import LeaseAttrs

A = Underlay("eth0", 2, IPv4Address("198.18.0.1"), IPv4Address("198.18.0.1"), 1500)
B = replace(A, address=IPv4Address("198.18.0.2"), public_ip=IPv4Address("198.18.0.2"))
NEWS = AddressEvent(gone=False, address=Address(2, ip_interface("198.18.0.2/24"), 0, True, False, False))


class Node:
    """Surveyor, backend, keeper and file in one; `looks` are answered in order, the last one for ever."""

    minds_routes = False

    def __init__(self) -> None:
        self.sleeps: list[float] = []
        self.looks: list[Underlay | Exception] = [A]
        self.asked = 0
        self.moved: list[Underlay] = []
        self.published: list[LeaseAttrs] = []
        self.written = 0
        self.failures: list[str] = []

    async def again(self, _current: Underlay) -> Underlay:
        self.asked += 1
        answer = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def has(self, _address: object) -> bool:
        return True

    async def move(self, facing: Underlay) -> LeaseAttrs:
        self._fail("move")
        self.moved.append(facing)
        return LeaseAttrs(public_ip=facing.public_ip)

    async def publish(self, attrs: LeaseAttrs) -> None:
        self.published.append(attrs)

    def rewrite(self) -> None:
        self._fail("rewrite")
        self.written += 1

    def close(self) -> None:
        """As the listener that is never asked for anything else."""

    def _fail(self, what: str) -> None:
        if what in self.failures:
            self.failures.remove(what)
            raise KernelError(f"cannot {what}")


@pytest.fixture
def node() -> Node:
    return Node()


def follow(node: Node) -> Following:
    """Waits are a twentieth of the real ones; the kernel's events are the tests' own calls of `_on_event`."""

    async def sleep(seconds: float) -> None:
        node.sleeps.append(seconds)
        await asyncio.sleep(min(seconds, 1.0) / 20)

    return Following(
        node,
        A,
        node,
        publish=node.publish,
        rewrite=node.rewrite,
        rng=Random(1),
        sleep=sleep,
        listen=lambda _on_event: node,
    )


@contextlib.asynccontextmanager
async def running(followed: Following) -> AsyncIterator[None]:
    task = asyncio.create_task(followed.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(check: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not check():  # noqa: ASYNC110 - what is waited for is a state, whoever brings it about
            await asyncio.sleep(0.005)


async def test_a_change_that_stays_is_followed_in_order(node: Node) -> None:
    followed = follow(node)
    node.looks = [B]
    async with running(followed):
        await until(lambda: node.written == 1)
    assert node.moved == [B]
    assert node.published == [LeaseAttrs(public_ip=B.public_ip)]
    assert followed.facing == B
    assert followed.moves == 1


async def test_a_change_that_two_looks_do_not_agree_on_is_none(node: Node) -> None:
    node.looks = [B, A]
    async with running(follow(node)):
        await until(lambda: node.asked >= 3)
    assert node.moved == []


async def test_no_way_out_keeps_what_there_was(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    followed = follow(node)
    node.looks = [ConfigError("nothing fits"), B]
    async with running(followed):
        await until(lambda: node.asked == 1)
        await asyncio.sleep(0.1)
        assert node.asked == 1, "the address's return is an event; nothing is polled"
        assert followed.facing == A
        followed._on_event(NEWS)
        await until(lambda: node.moved == [B])
    assert "No interface faces the underlay now, keeping the old one: nothing fits" in caplog.text


async def test_a_move_that_fails_is_tried_again(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    node.looks, node.failures = [B], ["move", "move"]
    async with running(follow(node)):
        await until(lambda: node.published)
    assert node.moved == [B]
    assert "Cannot follow the change of this node's underlay: cannot move" in caplog.text


async def test_a_file_that_cannot_be_written_does_not_keep_the_lease_old(node: Node) -> None:
    node.looks, node.failures = [B], ["rewrite"]
    followed = follow(node)
    async with running(followed):
        await until(lambda: node.published)
        assert not followed.file_stands
        await until(lambda: followed.file_stands)
    assert node.moved == [B]
    assert node.written == 1


async def test_a_file_that_cannot_be_written_at_start_is_tried_again(node: Node) -> None:
    node.failures = ["rewrite"]
    followed = follow(node)
    async with running(followed):
        followed.write_file()
        assert not followed.file_stands
        await until(lambda: followed.file_stands)


async def test_what_goes_back_and_forth_is_followed_ever_more_slowly(node: Node) -> None:
    followed = follow(node)
    async with running(followed):
        for moves in range(1, 7):
            node.looks = [B if moves % 2 else A]
            followed._on_event(NEWS)
            await until(lambda moves=moves: followed.moves >= moves)  # type: ignore[misc]  # bound early
        await until(lambda: node.sleeps[-1] > CONFIRM_SECONDS)
    pauses = [seconds for seconds in node.sleeps if seconds not in (SETTLE_SECONDS, CONFIRM_SECONDS)]
    assert len(pauses) == 6
    assert pauses[-1] > 16 * pauses[0]
    assert sum(pauses[:3]) < 1, "whoever moves three times in a row is not kept waiting"


@pytest.mark.parametrize(
    ("event", "looks"),
    [
        (NEWS, True),
        (Overrun(), True),
        (LinkEvent(False, 2, "eth0", True, True, 1400, ""), True),
        (LinkEvent(False, 9, "eth0", True, True, 1500, ""), True),
        (LinkEvent(False, 77, "veth1234", True, True, 1500, ""), False),
        (RouteEvent(False, 0), True),
        (RouteEvent(False, 24), False),
    ],
)
async def test_a_pods_device_and_a_peers_route_cost_no_look(node: Node, event: KernelEvent, looks: bool) -> None:
    followed = follow(node)
    async with running(followed):
        await until(lambda: node.asked == 1)
        followed._on_event(event)
        await asyncio.sleep(0.2)
    assert (node.asked > 1) == looks
