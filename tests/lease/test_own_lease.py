"""dataplane/lease/{keeper,ownership}.py over a simulated store (fake_store.py): what becomes of our own lease."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address

import pytest

from dataplane.lease.model import LeaseAttrs, LeaseKey
from tests.lease.fake_store import SimulatedStore, settle
from tests.lease.simulated_node import DAY, MARGIN, Node, living, value, writes

pytestmark = pytest.mark.usefixtures("every_log_line")


async def test_the_lease_is_renewed_before_it_expires_and_peers_hear_nothing(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    node, peer = Node(store, 1), Node(store, 2)
    async with living(store, node, peer):
        peer.said()
        await store.clock.advance(DAY - MARGIN - 1, store)
        assert len(writes(store, "192.0.2.1")) == 1
        await store.clock.advance(2, store)
        assert len(writes(store, "192.0.2.1")) == 2
        assert store.expiries[node.key] == 2 * DAY - MARGIN
        await store.clock.advance(10 * DAY, store)
        assert node.keeper.healthy
        assert node.keeper.counters.renewals == 11
        assert peer.said() == []
        assert len(node.owned) == 12
    assert "Waiting for 23h0m0s to renew lease" in caplog.text
    assert "Lease renewed, new expiration: 2" in caplog.text


async def test_a_margin_near_the_ttl_is_no_storm(store: SimulatedStore) -> None:
    node = Node(store, 1, renew_margin=DAY)
    async with living(store, node):
        await store.clock.advance(3600, store)
        assert 55 <= node.keeper.counters.renewals <= 60


async def test_a_failing_renewal_is_tried_again_each_minute(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node(store, 1)
    async with living(store, node):
        await store.clock.advance(DAY - MARGIN - 1, store)
        node.client.offline = True
        calls = node.client.calls
        await store.clock.advance(10 * 60, store)
        assert 9 <= node.client.calls - calls <= 11
        node.client.offline = False
        await store.clock.advance(60, store)
        assert node.keeper.counters.renewals == 1
        assert node.keeper.store_error == ""
    assert "Error renewing lease (trying again in 1 min): simulated: offline" in caplog.text


@pytest.mark.parametrize("watching", [True, False])
async def test_a_renewal_whose_answer_was_lost_is_no_second_daemon(store: SimulatedStore, watching: bool) -> None:
    node = Node(store, 1)
    async with living(store, node):
        node.client.lose_answers = 1
        if not watching:
            store.history_hidden = True
        await store.clock.advance(DAY - MARGIN + 300, store)
        store.history_hidden = False
        store.notify()
        await store.clock.advance(300, store)
        assert node.keeper.healthy
        assert len(writes(store, "192.0.2.1")) == 2
        await store.clock.advance(5 * DAY, store)
        assert node.keeper.healthy
        assert node.keeper.counters.put_backs == 0


@pytest.mark.parametrize("how", ["deleted", "expired", "wiped"])
async def test_a_lost_lease_is_put_back_within_a_second(
    store: SimulatedStore, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    node, peer = Node(store, 1), Node(store, 2)
    async with living(store, node, peer):
        peer.said()
        if how == "deleted":
            store.remove(node.key)
        elif how == "expired":
            store.expiries[node.key] = store.clock.now + 1
            await store.clock.advance(1, store)
        else:
            store.entries.pop(node.key)
            store.revision += 1
            store.compact()
            node.client.cut()
        await store.clock.advance(1, store)
        assert store.entries[node.key].value == value(node.ip)
        assert store.expiries[node.key] > DAY - 2
        assert (node.keeper.fenced, node.keeper.healthy) == (False, True)
        assert node.keeper.counters.put_backs == 1
        assert node.owned[-1].create_revision == store.entries[node.key].create_revision
        assert set(peer.peers) == {node.key}
        assert peer.said() == [], "the peer was never without it"
        await store.clock.advance(3 * DAY, store)
        assert node.keeper.counters.put_backs == 1
    assert "is gone from the simulated store" in caplog.text
    assert "Error" not in caplog.text


async def test_a_put_back_whose_answer_was_lost_is_no_second_daemon(store: SimulatedStore) -> None:
    node = Node(store, 1)
    async with living(store, node):
        node.client.lose_answers = 1
        store.remove(node.key)
        await store.clock.advance(30, store)
        assert node.keeper.healthy
        assert node.owned[-1].create_revision == store.entries[node.key].create_revision
        await store.clock.advance(3 * DAY, store)
        assert node.keeper.healthy


async def test_a_lease_that_expired_while_the_store_was_away_is_put_back(store: SimulatedStore) -> None:
    node = Node(store, 1)
    async with living(store, node):
        node.client.offline = True
        node.client.cut()
        await store.clock.advance(DAY + 10, store)
        assert not node.keeper.healthy, "the TTL ran out, and nobody could say what happened since"
        node.client.offline = False
        await store.clock.advance(70, store)
        assert node.key in store.entries
        assert node.keeper.healthy


@pytest.mark.parametrize("content", [value("192.0.2.66"), b"junk", b""])
@pytest.mark.parametrize("away", [False, True])
async def test_a_taken_lease_fences_us_until_it_is_free(
    store: SimulatedStore, content: bytes, away: bool, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node(store, 1)
    async with living(store, node):
        if away:
            node.client.offline = True
            node.client.cut()
            await store.clock.advance(DAY + 10, store)
        store.put(node.key, content, 3 * DAY)
        node.client.offline = False
        await store.clock.advance(2 * DAY, store)
        assert (node.keeper.fenced, node.keeper.healthy) == (True, False)
        assert len(writes(store, "192.0.2.1")) == 1
        assert node.events == []
        store.put(node.key, content, 100.0)
        await store.clock.advance(50, store)
        assert caplog.text.count("This node is fenced") == 1
        await store.clock.advance(51, store)
        assert (node.keeper.fenced, node.keeper.healthy) == (False, True)
        assert store.entries[node.key].value == value(node.ip)


async def test_a_key_that_is_taken_while_it_is_put_back_stays_the_others(store: SimulatedStore) -> None:
    node = Node(store, 1)
    async with living(store, node):
        calls = node.client.calls
        store.remove(node.key)
        for _ in range(100):
            if node.client.calls > calls:
                break
            await asyncio.sleep(0)
        theirs = store.put(node.key, value("192.0.2.66"), DAY)
        await store.clock.advance(DAY - 1, store)
        assert store.entries[node.key] == theirs
        assert node.keeper.fenced
        assert node.keeper.counters.lost_races == 1


async def test_a_second_daemon_at_our_address_is_told_and_not_fought(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    node, twin = Node(store, 1), Node(store, 1)
    async with living(store, node):
        await store.clock.advance(100, store)
        async with living(store, twin):
            assert twin.key == node.key
            assert (node.keeper.healthy, node.keeper.fenced) == (False, False)
            assert twin.keeper.healthy
            await store.clock.advance(3 * DAY, store)
            assert node.keeper.counters.renewals == 0
            assert twin.keeper.counters.renewals == 3
            assert caplog.text.count("Another live daemon has our public IP 192.0.2.1") == 1
        await store.clock.advance(DAY + 1, store)
        assert node.keeper.healthy, "the other stopped, its entry expired, ours was put back"
        assert node.keeper.counters.put_backs == 1


async def test_a_reservation_put_by_hand_is_adopted(store: SimulatedStore) -> None:
    node = Node(store, 1)
    async with living(store, node):
        store.put(node.key, value(node.ip))
        await store.clock.advance(3 * DAY, store)
        assert store.entries[node.key].reserved
        assert (node.keeper.expires_at, node.keeper.healthy, node.keeper.counters.renewals) == (None, True, 0)
        assert node.owned[-1].reserved
        store.remove(node.key)
        await store.clock.advance(1, store)
        assert not store.entries[node.key].reserved
        assert node.keeper.healthy


async def test_a_reservation_with_other_attributes_gets_ours_once(store: SimulatedStore) -> None:
    node = Node(store, 1)
    theirs = value(node.ip, b'{"VNI":7}')
    async with living(store, node):
        store.put(node.key, theirs)
        await store.clock.advance(1, store)
        assert store.entries[node.key].value == value(node.ip)
        assert store.entries[node.key].reserved
        for _ in range(3):
            store.put(node.key, theirs)
            await store.clock.advance(60, store)
        assert len(writes(store, "192.0.2.1")) == 2
        assert node.keeper.healthy


async def test_a_store_restored_from_a_backup_gives_our_lease_back_and_it_is_renewed_at_once(
    store: SimulatedStore,
) -> None:
    node = Node(store, 1)
    store.revision = 100
    async with living(store, node):
        store.wipe(restart=True)
        store.put(node.key, value(node.ip), 50.0)
        await store.clock.advance(2, store)
        assert node.keeper.healthy
        assert store.expiries[node.key] > DAY - 10
        assert node.owned[-1].mod_revision == store.entries[node.key].mod_revision < 100


# ---- our lease says something else


def moved(number: int, mac: int = 1) -> LeaseAttrs:
    data = b'{"VtepMAC":"02:00:00:00:00:%02x"}' % mac
    return LeaseAttrs(IPv4Address(f"192.0.2.{number}"), backend_type="vxlan", backend_data=data)


async def test_a_change_is_written_in_place_at_once(store: SimulatedStore, caplog: pytest.LogCaptureFixture) -> None:
    node, peer = Node(store, 1), Node(store, 2)
    async with living(store, node, peer):
        peer.said()
        before = store.entries[node.key]
        await store.clock.advance(3600, store)
        await node.keeper.change_attrs(moved(101))
        await settle()
        after = store.entries[node.key]
        assert (after.create_revision, after.value) == (before.create_revision, moved(101).encode())
        assert store.expiries[node.key] == store.clock.now + DAY
        assert peer.said() == [("changed", node.key)]
        assert peer.peers[node.key] == moved(101)
        assert node.owned[-1].value == moved(101).encode()
        assert (node.keeper.healthy, node.keeper.counters.changes, node.keeper.counters.renewals) == (True, 1, 0)
        await node.keeper.change_attrs(moved(101))
        await store.clock.advance(DAY - MARGIN + 1, store)
        assert (node.keeper.counters.changes, node.keeper.counters.renewals) == (1, 1)
        assert store.entries[node.key].value == moved(101).encode()
        assert peer.said() == []
    assert f"Lease {node.key} now says that this node is at 192.0.2.101" in caplog.text


async def test_changes_while_the_store_is_away_are_written_when_it_is_back(store: SimulatedStore) -> None:
    node = Node(store, 1)
    async with living(store, node):
        node.client.offline = True
        node.client.cut()
        for number in (101, 102, 103):
            await node.keeper.change_attrs(moved(number))
            await store.clock.advance(20, store)
        assert node.keeper.own is not None
        assert node.keeper.own.attrs == LeaseAttrs(node.ip), "what the store still says"
        calls = node.client.calls
        await store.clock.advance(3600, store)
        assert node.client.calls - calls < 2200
        node.client.offline = False
        await store.clock.advance(6, store)
        assert store.entries[node.key].value == moved(103).encode()
        assert node.keeper.healthy
        assert len(writes(store, "192.0.2.1")) == 2


@pytest.mark.parametrize("again", [101, 102, 1])
async def test_a_change_whose_answer_was_lost_is_no_second_daemon_and_no_thief(
    store: SimulatedStore, again: int
) -> None:
    """The store has made the first change, which nobody could tell, and our address changes once more."""
    node = Node(store, 1)
    async with living(store, node):
        node.client.lose_answers = 1
        store.history_hidden = True
        await node.keeper.change_attrs(moved(101))
        await settle()
        assert store.entries[node.key].value == moved(101).encode()
        node.client.offline = True
        await node.keeper.change_attrs(moved(again))
        await store.clock.advance(10, store)
        node.client.offline = False
        store.history_hidden = False
        store.notify()
        await store.clock.advance(10, store)
        assert store.entries[node.key].value == moved(again).encode()
        assert (node.keeper.healthy, node.keeper.fenced) == (True, False)
        await store.clock.advance(3 * DAY, store)
        assert node.keeper.healthy


async def test_a_change_of_a_reservation_leaves_it_one(store: SimulatedStore) -> None:
    store.put("10.5.3.0-24", value("192.0.2.1"))
    node = Node(store, 1)
    async with living(store, node):
        node.client.offline = True
        await node.keeper.change_attrs(moved(101))
        await settle()
        store.put(node.key, value(node.ip))  # by hand, and still of our former address
        node.client.offline = False
        await store.clock.advance(10, store)
        assert store.entries[node.key].value == moved(101).encode()
        assert store.entries[node.key].reserved
        assert node.keeper.healthy


async def test_a_fenced_node_changes_nothing_and_comes_back_with_what_it_is_then(store: SimulatedStore) -> None:
    node = Node(store, 1)
    async with living(store, node):
        theirs = store.put(node.key, value("192.0.2.66"), 3 * DAY)
        await settle()
        await node.keeper.change_attrs(moved(101))
        await store.clock.advance(DAY, store)
        assert store.entries[node.key] == theirs
        assert node.keeper.fenced
        store.remove(node.key)
        await store.clock.advance(1, store)
        assert store.entries[node.key].value == moved(101).encode()
        assert node.keeper.healthy


async def test_who_has_our_address_is_asked_anew_when_it_changes(store: SimulatedStore) -> None:
    node = Node(store, 1, previous=LeaseKey.parse("10.5.1.0-24"))
    store.put("10.5.2.0-24", value("192.0.2.1"), DAY)
    store.put("10.5.3.0-24", value("192.0.2.101"), DAY)
    store.remove("10.5.2.0-24")
    async with living(store, node):
        store.put("10.5.2.0-24", value("192.0.2.1"), DAY)
        await settle()
        assert set(node.peers) == {"10.5.3.0-24"}
        await node.keeper.change_attrs(moved(101))
        await store.clock.advance(1, store)
        assert set(node.peers) == {"10.5.2.0-24"}
        assert node.keeper.rejected == {"10.5.3.0-24": "public IP 192.0.2.101 is that of this node"}
