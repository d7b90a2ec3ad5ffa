"""TX changes hands hundreds of times under load, between the two threads of a queue, and no packet tells.

Who holds it when, and that a stop or a full device harms nothing, is looked at from memory to memory in
tests/path/test_duty.py.
"""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections import Counter

import pytest

from tests.backend.test_queues import settled, two_nodes
from tests.backend.tunnels import UDP_SEGMENT, Node, ping, wait_until
from tests.pumps import held_back, on_our_processor

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

CHANGES = 300
"""On both nodes together: so often TX goes to its thread, and comes back before it goes again."""
PORT = 6000
FLOWS = 8
SINGLE = 40
"""Datagrams of each flow in a burst: together more than four batches. Each is longer than the one before, so that each
is a message of its own for the other node; and that they come one by one."""
TOGETHER = 30
"""And as many of one size behind them, by one call."""
QUIET = 0.02
"""Seconds between bursts at most. TX comes back after half of that without a packet: often a burst comes just then."""
SO_RCVBUFFORCE = 33


class Flow:
    """Numbered datagrams from a pod to another."""

    def __init__(self, source: Node, target: Node, port: int) -> None:
        self._incoming = target.pod.run(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        self._incoming.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        self._incoming.bind((target.pod_address(4), port))
        self._incoming.settimeout(20)
        self._outgoing = source.pod.run(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        self._outgoing.connect((target.pod_address(4), port))
        self._sent = self._received = 0

    def send(self, words: int) -> None:
        """The next one, of 4 * `words` bytes."""
        self._outgoing.send(self._sent.to_bytes(4) * words)
        self._sent += 1

    def send_together(self, words: int) -> None:
        numbers = range(self._sent, self._sent + TOGETHER)
        self._outgoing.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 4 * words)
        self._outgoing.send(b"".join(number.to_bytes(4) * words for number in numbers))
        self._outgoing.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 0)
        self._sent += TOGETHER

    def receive_all(self) -> None:
        """What was sent, all of it, once, in order."""
        while self._received < self._sent:
            got = self._incoming.recv(2048)
            assert got == self._received.to_bytes(4) * (len(got) // 4)
            self._received += 1

    def close(self) -> None:
        self._incoming.setblocking(False)
        with pytest.raises(BlockingIOError):
            self._incoming.recv(2048)
        self._incoming.close()
        self._outgoing.close()


def dropped(*nodes: Node) -> Counter[str]:
    return sum((Counter(node.drops()) for node in nodes), Counter())


def burst(flows: list[Flow], queues: int) -> None:
    for number in range(SINGLE * queues):
        for position, flow in enumerate(flows):
            flow.send(1 + (number * len(flows) + position) // queues % 300)
    for flow in flows:
        flow.send_together(random.randrange(1, 300))


def changes(node: Node) -> int:
    """How often TX went to its thread, in whatever queue."""
    tunnel = getattr(node.backend, "_tunnel", None) or node.backend._tunnels[4]
    return sum(engine.counters()["tx"]["partings"] for engine in tunnel._path._engines)


@pytest.mark.parametrize(("wire", "queues"), [("udp", 1), ("vxlan", 1), ("vxlan", 2)])
def test_nothing_is_lost_doubled_or_overtaken_while_tx_changes_hands(wire: str, queues: int) -> None:
    with two_nodes(wire, queues, queues) as (one, two), contextlib.ExitStack() as stack:
        wait_until("the pods reach each other", lambda: ping(one, two, 4).returncode == 0)
        before = dropped(one, two)  # by the node that knew the other last
        flows = [Flow(*way, PORT + number) for number in range(FLOWS) for way in ((one, two), (two, one))]
        for flow in flows:
            stack.callback(flow.close)
        pumps = stack.enter_context(on_our_processor())
        deadline = time.monotonic() + 200
        while changes(one) + changes(two) < CHANGES:
            assert time.monotonic() < deadline, (changes(one), changes(two))
            with held_back(pumps):
                burst(flows, queues)
            for flow in flows:
                flow.receive_all()
            time.sleep(random.uniform(0, QUIET))
        assert min(changes(one), changes(two)) > 0
        settled(one, two)
        assert set(dropped(one, two) - before) <= {"NO_ROUTE"}
