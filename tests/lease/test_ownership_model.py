"""Who owns a subnet, whatever happens: several keepers over a simulated store, with faults in any order.

The store breaks, repeats, delays and forgets what it says, leases expire, entries are deleted, stolen, reserved and
wiped by hand, daemons are killed, come back with or without the store, move to another address, and are replaced. Two
things hold at each step: no keeper writes over an entry that was not its own, and, unless somebody put hand on the
store, no two keepers believe at one time that they hold overlapping subnets. And once everything is reachable, all
agree with the store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from itertools import combinations
from math import inf

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dataplane import netconf
from dataplane.lease.model import LEASE_TTL, LeaseAttrs
from dataplane.lease.store import Entry, Snapshot
from tests.lease.fake_store import ManualClock, SimulatedStore
from tests.lease.simulated_node import Node, value

STEPS = 100_000
STEPS_EACH = 100
DAY = float(LEASE_TTL)
CONFIG = netconf.parse(b'{"Network":"10.5.0.0/16","SubnetMax":"10.5.60.0"}', origin="this test")


class Daemon:
    """What stays of a node when its daemon is started again: its addresses, and what its state file says."""

    def __init__(self, store: SimulatedStore, number: int) -> None:
        self.store, self.number, self.moves = store, number, 0
        self.addresses: set[str] = set()
        self.past: tuple[Entry, float, Snapshot] | None = None
        self.node = self._make()

    @property
    def attrs(self) -> LeaseAttrs:
        data = b'{"VtepMAC":"02:00:00:00:00:%02x"}' % (self.moves % 256)
        # every fourth move is another MAC at the same address
        ip = IPv4Address("192.0.0.0") + 256 * self.number + self.moves // 4 * 4
        return LeaseAttrs(ip, backend_type="vxlan", backend_data=data)

    def _make(self) -> Node:
        node = Node(self.store, self.number, attrs=self.attrs, config=CONFIG, grace=60.0)
        self.addresses.add(str(self.attrs.public_ip))
        return node

    def remember(self) -> None:
        """What the state file has at this moment, where a reservation's time is never over."""
        keeper = self.node.keeper
        own = keeper._own
        if own is not None:
            peers = (
                Entry(text, lease.attrs.encode(), lease.create_revision, lease.mod_revision, lease.reserved)
                for text, lease in keeper.peers.items()
            )
            until = inf if own.expires_at is None else own.expires_at
            self.past = own.entry, until, Snapshot(keeper.revision, (*peers, own.entry))

    async def restart(self, *, without_store: bool) -> None:
        self.remember()
        await self.node.stop()
        offline = self.node.client.offline
        self.node = self._make()
        self.node.client.offline = offline
        if without_store and self.past is not None and self.past[1] > self.store.clock.now:
            held, until, snapshot = self.past
            left = None if held.reserved else until - self.store.clock.now
            self.node.keeper.resume(held, left, snapshot)
            self.node.task = asyncio.create_task(self.node.keeper.run())
        else:
            self.node.task = asyncio.create_task(self.node.live())

    async def move(self) -> None:
        self.moves += 1
        self.addresses.add(str(self.attrs.public_ip))
        await self.node.keeper.change_attrs(self.attrs)


class Keepers(RuleBasedStateMachine):
    """Several daemons, one store."""

    steps = 0

    @initialize(count=st.integers(2, 4))
    def begin(self, count: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.store = SimulatedStore(ManualClock())
        self.daemons = [Daemon(self.store, 1 + number) for number in range(count)]
        self.made = count
        self.checked = 0
        self.tampered = False
        for daemon in self.daemons:
            self.loop.run_until_complete(daemon.node.start())

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            for daemon in self.daemons:
                self.loop.run_until_complete(daemon.node.stop())
            self.loop.close()

    def pick(self, number: int) -> Daemon:
        return self.daemons[number % len(self.daemons)]

    def pass_time(self, seconds: float) -> None:
        self.loop.run_until_complete(self.store.clock.advance(seconds, self.store))

    numbers = st.integers(0, 3)

    # ---- time and the ways to the store

    @rule(seconds=st.sampled_from([0.0, 0.3, 1.0, 2.0, 4.0, 70.0]))
    def wait(self, seconds: float) -> None:
        self.pass_time(seconds)

    @precondition(lambda self: not any(daemon.node.client.offline for daemon in self.daemons))
    @rule(seconds=st.sampled_from([DAY - 3600.0, DAY + 1]))
    def wait_long(self, seconds: float) -> None:
        for daemon in self.daemons:
            daemon.node.client.resume()
        self.pass_time(seconds)

    @rule(number=numbers)
    def part(self, number: int) -> None:
        self.pick(number).node.client.offline = True
        self.pick(number).node.client.cut()

    @rule(number=numbers)
    def heal(self, number: int) -> None:
        self.pick(number).node.client.offline = False

    @rule(number=numbers)
    def cut(self, number: int) -> None:
        self.pick(number).node.client.cut()

    @rule(number=numbers)
    def pause(self, number: int) -> None:
        self.pick(number).node.client.pause()

    @rule(number=numbers)
    def resume(self, number: int) -> None:
        self.pick(number).node.client.resume()

    @rule(number=numbers, repeat=st.booleans())
    def repeat(self, number: int, repeat: bool) -> None:
        self.pick(number).node.client.repeat = repeat

    @rule(number=numbers)
    def lose_an_answer(self, number: int) -> None:
        self.pick(number).node.client.lose_answers = 1

    @rule(hidden=st.booleans())
    def delay_the_watches(self, hidden: bool) -> None:
        self.store.history_hidden = hidden
        self.store.notify()

    @rule()
    def compact(self) -> None:
        self.store.compact()

    # ---- daemons

    @rule(number=numbers, without_store=st.booleans())
    def restart(self, number: int, without_store: bool) -> None:
        self.loop.run_until_complete(self.pick(number).restart(without_store=without_store))

    @rule(number=numbers)
    def move(self, number: int) -> None:
        self.loop.run_until_complete(self.pick(number).move())

    @precondition(lambda self: self.made < 30)
    @rule(number=numbers)
    def replace(self, number: int) -> None:
        """A node is gone for ever, and another one comes while its lease still stands."""
        index = number % len(self.daemons)
        self.loop.run_until_complete(self.daemons[index].node.stop())
        self.made += 1
        self.daemons[index] = Daemon(self.store, self.made)
        self.loop.run_until_complete(self.daemons[index].node.start())

    # ---- hands on the store

    def change(self, number: int, change: Callable[[str], object]) -> None:
        own = self.pick(number).node.keeper.own
        if own is not None:
            self.tampered = True
            change(str(own.key))

    @rule(restart=st.booleans())
    def wipe(self, restart: bool) -> None:
        self.tampered = True
        self.store.wipe(restart=restart)

    @rule(number=numbers)
    def delete(self, number: int) -> None:
        self.change(number, self.store.remove)

    @rule(number=numbers)
    def expire(self, number: int) -> None:
        """The store believes that our TTL is over, as after a jump of its clock."""
        self.change(number, lambda key: self.store.expiries.update({key: self.store.clock.now + 0.1}))

    @rule(number=numbers, content=st.sampled_from([b"junk", value("198.51.100.9")]), ttl=st.sampled_from([50.0, DAY]))
    def steal(self, number: int, content: bytes, ttl: float) -> None:
        self.change(number, lambda key: self.store.put(key, content, ttl))

    @rule(number=numbers)
    def reserve(self, number: int) -> None:
        self.change(number, lambda key: self.store.put(key, self.pick(number).attrs.encode()))

    # ---- what must hold

    @invariant()
    def nobody_writes_over_what_is_not_its_own(self) -> None:
        Keepers.steps += 1
        if not hasattr(self, "store"):
            return
        owners = {str(daemon.node.ip): daemon for daemon in self.daemons}
        for write in self.store.writes[self.checked :]:
            if write.client in owners and write.before is not None:
                assert str(LeaseAttrs.decode(write.before.value).public_ip) in owners[write.client].addresses
        self.checked = len(self.store.writes)
        for daemon in self.daemons:
            task = daemon.node.task
            assert task is not None
            assert not task.done(), task.exception()

    @invariant()
    def no_two_hold_overlapping_subnets(self) -> None:
        if not hasattr(self, "store") or self.tampered:
            return
        live = [node.keeper for daemon in self.daemons if (node := daemon.node).keeper.healthy]
        for one, two in combinations(live, 2):
            assert one.own is not None
            assert two.own is not None
            assert not one.own.key.overlaps(two.own.key)

    @rule()
    def converge(self) -> None:
        """Everything reachable, and more time than any back-off, grace or TTL of a foreign entry takes."""
        self.delay_the_watches(False)
        for daemon in self.daemons:
            client = daemon.node.client
            client.offline, client.lose_answers = False, 0
            client.resume()
            client.cut()
        self.pass_time(200.0)
        holders = {}
        for daemon in self.daemons:
            keeper, key = daemon.node.keeper, daemon.node.key
            holder = self.store.entries.get(key)
            assert holder is not None, "a free key is put back"
            ours = holder.value == daemon.attrs.encode()
            assert keeper.synced
            assert keeper.store_error == ""
            if keeper.healthy:
                assert ours or holder.reserved, "what our lease says is written"
                holders[key] = daemon
        live = [daemon.node.keeper.own for daemon in holders.values()]
        assert not any(one and two and one.key.overlaps(two.key) for one, two in combinations(live, 2))
        for daemon in self.daemons:
            node = daemon.node
            assert node.peers == {key: lease.attrs for key, lease in node.keeper.peers.items()}
            assert node.peers.keys() <= self.store.entries.keys()
            for key, other in holders.items():
                if key != node.key:
                    assert node.peers[key] == LeaseAttrs.decode(self.store.entries[key].value), other.number
        self.tampered = self.tampered and len(holders) < len(self.daemons)


@pytest.fixture
def silence() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(900)
def test_a_hundred_thousand_steps_of_faults(silence: None) -> None:
    before = Keepers.steps
    run_state_machine_as_test(
        Keepers,
        settings=settings(
            max_examples=STEPS // STEPS_EACH * 5 // 4,  # some end early
            stateful_step_count=STEPS_EACH,
            deadline=None,
            phases=[Phase.reuse, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
    count = Keepers.steps - before
    print(f"{count} steps")  # noqa: T201 - the figure is part of the result
    assert count >= STEPS
