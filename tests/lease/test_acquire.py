"""dataplane/lease/acquire.py: which lease a node gets, over a simulated store (fake_store.py)."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address, IPv6Address

import pytest

from dataplane.errors import LeaseError, StoreUnavailable
from dataplane.lease.allocate import Claim
from dataplane.lease.model import LeaseAttrs, LeaseKey
from dataplane.lease.store import Entry
from tests.lease.fake_store import SimulatedStore, settle
from tests.lease.simulated_node import DAY, DUAL_CONFIG, V6_CONFIG, Node, living, value, writes

pytestmark = pytest.mark.usefixtures("every_log_line")


async def test_a_new_node_draws_a_subnet_and_writes_flannels_value(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node(store, 1)
    async with living(store, node):
        assert store.entries[node.key].value == b'{"PublicIP":"192.0.2.1","PublicIPv6":null}'
        assert store.expiries[node.key] == DAY
        assert node.owned == [store.entries[node.key]]
        assert node.keeper.healthy
        assert node.keeper.expires_at == DAY
    assert "Picking subnet in range 10.5.1.0 ... 10.5.6.0" in caplog.text
    subnet = node.key.replace("-", "/")
    assert f"Allocated lease (ip: {subnet} ipv6: ::/0) to current node (192.0.2.1)" in caplog.text
    assert node.key in store.entries, "a stop does not give the lease back"


async def test_a_lease_of_our_address_is_reused_with_fresh_attributes(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.put("10.5.3.0-24", b'{"publicip":"192.0.2.1","BackendType":"vxlan"}', 100)
    node = Node(store, 1)
    async with living(store, node):
        assert store.entries["10.5.3.0-24"].value == value(node.ip)
        assert store.expiries == {"10.5.3.0-24": DAY}
    assert "Found lease (ip: 10.5.3.0/24 ipv6: ::/0) for current IP (192.0.2.1), reusing" in caplog.text


async def test_a_claim_moves_the_lease_to_our_new_address(store: SimulatedStore) -> None:
    old = store.put("10.5.3.0-24", value("192.0.2.77"), DAY)
    claim = Claim(old.key, old.create_revision, IPv4Address("192.0.2.77"))
    node, watcher = Node(store, 1, claim=claim), Node(store, 2)
    async with living(store, watcher, node):
        assert node.key == old.key
        assert watcher.said() == [("added", old.key), ("changed", old.key)]
        assert watcher.peers[old.key].public_ip == node.ip


async def test_the_previous_subnet_is_taken_again(store: SimulatedStore, caplog: pytest.LogCaptureFixture) -> None:
    node = Node(store, 1, previous=LeaseKey.parse("10.5.6.0-24"))
    async with living(store, node):
        assert node.key == "10.5.6.0-24"
    assert "Found previously leased subnet (10.5.6.0/24), reusing" in caplog.text


async def test_a_lease_that_does_not_fit_is_deleted_first(store: SimulatedStore) -> None:
    store.put("10.5.3.0-25", value("192.0.2.1"), DAY)
    store.put("10.5.0.0-24", value("192.0.2.1"))
    node = Node(store, 1)
    async with living(store, node):
        await store.clock.advance(2)
        assert list(store.entries) == [node.key]


async def test_a_reservation_stays_without_ttl_and_is_never_renewed(store: SimulatedStore) -> None:
    store.put("10.5.3.0-24", value("192.0.2.1"))
    node = Node(store, 1)
    async with living(store, node):
        await store.clock.advance(3 * DAY, store)
        assert store.entries["10.5.3.0-24"].reserved
        assert (node.keeper.expires_at, node.keeper.healthy) == (None, True)
        assert len(writes(store, "192.0.2.1")) == 1


async def test_nodes_that_start_at_once_all_get_a_subnet(store: SimulatedStore) -> None:
    nodes = [Node(store, 1 + number) for number in range(6)]
    for node in nodes:
        node.task = asyncio.create_task(node.live())
    try:
        await store.clock.advance(20)
        assert len({node.key for node in nodes}) == len(store.entries) == 6
        assert sum(node.keeper.counters.lost_races for node in nodes) > 0
        for node in nodes:
            assert set(node.peers) == store.entries.keys() - {node.key}
        late = Node(store, 7)
        with pytest.raises(LeaseError, match=r"out of subnets.*6 leases"):
            await late.keeper.acquire()
    finally:
        for node in nodes:
            await node.stop()


async def test_a_store_that_is_away_at_the_start_is_waited_for(store: SimulatedStore) -> None:
    node = Node(store, 1)
    node.client.offline = True
    async with living(store, node):
        await store.clock.advance(30)
        assert node.keeper.own is None
        assert node.keeper.store_error == "simulated: offline"
        node.client.offline = False
        await store.clock.advance(6)
        assert node.key in store.entries
        assert node.keeper.store_error == ""


async def test_a_first_write_whose_answer_was_lost_costs_no_second_subnet(store: SimulatedStore) -> None:
    node = Node(store, 1)
    node.client.lose_answers = 1
    async with living(store, node):
        await store.clock.advance(6)
        assert list(store.entries) == [node.key]
        assert node.keeper.healthy


async def test_a_first_write_that_may_still_arrive_is_repeated_for_the_same_subnet(
    store: SimulatedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(store, 1)
    asked: list[str] = []
    create = node.client.create

    async def fail_first(key: str, content: bytes, ttl: int | None) -> Entry | None:
        asked.append(key)
        if len(asked) < 4:
            raise StoreUnavailable("simulated: whether the write happened is unknown")
        return await create(key, content, ttl)

    monkeypatch.setattr(node.client, "create", fail_first)
    async with living(store, node):
        await store.clock.advance(20)
        assert asked == [node.key] * 4


# ---- IPv6


def v6_only(number: int) -> LeaseAttrs:
    return LeaseAttrs(IPv4Address(0), IPv6Address(f"fd00:198:18::{number:x}"))


def both(number: int) -> LeaseAttrs:
    return LeaseAttrs(IPv4Address(f"192.0.2.{number}"), IPv6Address(f"fd00:198:18::{number:x}"))


async def test_nodes_without_ipv4_each_have_a_lease_of_their_own(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [Node(store, number, attrs=v6_only(number), config=V6_CONFIG) for number in (1, 2, 3)]
    async with living(store, *nodes):
        assert len({node.key for node in nodes}) == len(store.entries) == 3
        for node in nodes:
            assert node.key.startswith("0.0.0.0-0&fd00:0:0:")
            assert set(node.peers) == store.entries.keys() - {node.key}
    again = Node(store, 1, attrs=v6_only(1), config=V6_CONFIG)
    async with living(store, again, nodes[1]):
        assert again.key == nodes[0].key
        assert store.entries[again.key].value == b'{"PublicIP":"0.0.0.0","PublicIPv6":"fd00:198:18::1"}'
        subnet = again.key.partition("&")[2].replace("-", "/")
        assert f"Found lease (ip: 0.0.0.0/0 ipv6: {subnet}) for current IP (fd00:198:18::1), reusing" in caplog.text
        assert f"Subnet added: {subnet} via fd00:198:18::1" in caplog.text
        store.put(again.key, LeaseAttrs(IPv4Address(0), IPv6Address("fd00:198:18::99")).encode(), DAY)
        await settle()
        assert again.keeper.fenced
        assert "now names fd00:198:18::99, not this node (fd00:198:18::1)" in caplog.text


async def test_a_lease_of_two_families_is_drawn_kept_and_found_again(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    node, peer = (Node(store, number, attrs=both(number), config=DUAL_CONFIG) for number in (1, 2))
    async with living(store, node, peer):
        v4, v6 = node.key.split("&")
        assert store.entries[node.key].value == b'{"PublicIP":"192.0.2.1","PublicIPv6":"fd00:198:18::1"}'
        assert set(peer.peers) == {node.key}
        store.remove(node.key)
        await store.clock.advance(1, store)
        assert node.key in store.entries
        assert f"Subnet added: {v4.replace('-', '/')}, {v6.replace('-', '/')} via 192.0.2.1" in caplog.text
    assert "Picking subnet in range 10.5.1.0 ... 10.5.255.0" in caplog.text
    assert "Picking subnet in range fd00:0:0:1:: ... fd00:0:0:ffff::" in caplog.text
    again = Node(store, 1, attrs=both(1), config=DUAL_CONFIG)
    async with living(store, again):
        assert again.key == node.key


async def test_nodes_of_either_family_share_a_store(store: SimulatedStore) -> None:
    """As while a network is moved from one family to the other, node by node."""
    v4 = Node(store, 1)
    dual = Node(store, 2, attrs=both(2), config=DUAL_CONFIG)
    v6 = Node(store, 3, attrs=v6_only(3), config=V6_CONFIG)
    async with living(store, v4, dual, v6):
        assert set(dual.peers) == {v4.key, v6.key}
        assert {str(event.lease.key) for event in v4.events} == {dual.key.partition("&")[0]}
        assert {str(event.lease.key) for event in v6.events} == {f"0.0.0.0-0&{dual.key.partition('&')[2]}"}
        assert set(v4.keeper.rejected) == {v6.key}
        assert set(v6.keeper.rejected) == {v4.key}


async def test_a_node_that_gets_a_second_family_keeps_its_subnet(store: SimulatedStore) -> None:
    before = Node(store, 1)
    async with living(store, before):
        key = LeaseKey.parse(before.key)
    after = Node(store, 1, attrs=both(1), config=DUAL_CONFIG, previous=key)
    async with living(store, after):
        await store.clock.advance(1)
        assert list(store.entries) == [after.key]
        assert after.key.startswith(f"{key}&")
