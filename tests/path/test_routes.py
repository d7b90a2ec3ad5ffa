"""The bookkeeping of routes and slots, held against the compiled table that is made of its changes."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Network

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dataplane._fib import Fib
from dataplane.errors import KernelError
from dataplane.path import routes
from dataplane.path.facts import Network, narrow
from dataplane.path.routes import Routes

SUBNETS: list[Network] = [
    *(IPv4Network(f"10.5.{number}.0/24") for number in range(4)),
    *(IPv6Network(f"fd00:5:0:{number}::/64") for number in range(2)),
]
ADDRESSES = [IPv4Address("198.18.0.1"), IPv4Address("198.18.0.2")]


class Publishing(RuleBasedStateMachine):
    """Two pumps that stay in older tables for a while, as `Engine.oldest_generation` tells of them."""

    def __init__(self) -> None:
        super().__init__()
        self.routes = Routes()
        self.expected: dict[Network, tuple[IPv4Address, bytes, int]] = {}
        self.generation = 1
        self.tables = {1: Fib()}
        self.named: dict[int, set[int]] = {1: set()}  # slots, by the generation of the table that names them
        self.oldest = 1

    @rule(subnet=st.sampled_from(SUBNETS), address=st.sampled_from(ADDRESSES), mac=st.binary(min_size=6, max_size=6))
    def set(self, subnet: Network, address: IPv4Address, mac: bytes) -> None:
        former = self.expected.get(subnet)
        self.routes.set(subnet, address, mac)
        self.expected[subnet] = address, mac, former[2] if former and former[0] == address else 0
        if former is None:
            slot = dict(self.routes)[subnet].slot
            assert slot not in self.visible(), "a pump may still count for another route there"

    @rule(subnet=st.sampled_from(SUBNETS))
    def remove(self, subnet: Network) -> None:
        self.routes.remove(subnet)
        self.expected.pop(subnet, None)

    @rule(address=st.sampled_from(ADDRESSES), mtu=st.sampled_from([0, 1300]))
    def learn(self, address: IPv4Address, mtu: int) -> None:
        self.routes.set_path_mtu(address, mtu)
        for subnet, (there, mac, _) in self.expected.items():
            if there == address:
                self.expected[subnet] = there, mac, mtu

    @rule()
    def publish(self) -> None:
        table = self.tables[self.generation].updated(self.routes.pending)
        self.generation += 1
        self.tables[self.generation] = table
        self.named[self.generation] = {route.slot for _, route in self.routes}
        self.routes.published(self.generation)
        assert self.routes.pending == b""
        self.agrees(table)

    @rule(steps=st.integers(0, 3))
    def move_on(self, steps: int) -> None:
        self.oldest = min(self.generation, self.oldest + steps)
        freed = self.routes.free(self.oldest)
        assert len(freed) == len(set(freed))
        assert not self.visible() & {*freed}

    def visible(self) -> frozenset[int]:
        """The slots of every table in which a pump may look."""
        return frozenset().union(*(self.named[each] for each in range(self.oldest, self.generation + 1)))

    def agrees(self, table: Fib) -> None:
        """The table of all changes so far has just these routes."""
        known = dict(self.routes)
        assert len(table) == len(self.expected) == len(known)
        for subnet, (address, mac, mtu) in self.expected.items():
            found = table.lookup(subnet[1].packed)
            assert found is not None
            assert (narrow(found[2]), found[3], found[4]) == (address, known[subnet].slot, mac)
            assert known[subnet].mtu == mtu

    @invariant()
    def no_two_routes_share_a_slot(self) -> None:
        slots = [route.slot for _, route in self.routes]
        assert len(slots) == len(set(slots))


TestPublishing = Publishing.TestCase


def test_there_is_room_for_so_many_routes_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_ROUTES", 2)
    made = Routes()
    for subnet in SUBNETS[:2]:
        made.set(subnet, ADDRESSES[0], b"")
    with pytest.raises(KernelError, match=r"no room for a route to 10\.5\.2\.0/24: the path holds 2 routes already"):
        made.set(SUBNETS[2], ADDRESSES[0], b"")
    assert [subnet for subnet, _ in made] == SUBNETS[:2]
    made.remove(SUBNETS[0])
    made.published(2)
    assert made.free(1) == []
    assert made.free(2) == [0]
    made.set(SUBNETS[2], ADDRESSES[0], b"")
