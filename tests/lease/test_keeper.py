"""dataplane/lease/{keeper,loss,journal}.py over a simulated store (fake_store.py): how the peers are followed.

What becomes of our own lease: test_own_lease.py. Faults in any order: test_ownership_model.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from ipaddress import IPv4Address

import pytest

from dataplane.errors import KernelError
from dataplane.lease.keeper import PACE, PORTION, UNRESTED, WIPED_STORE_GRACE
from dataplane.lease.loss import LINGER
from dataplane.lease.model import LeaseAttrs, LeaseEvent, LeaseKey
from dataplane.lease.store import Entry, Snapshot
from tests.lease.fake_store import SimulatedStore, settle
from tests.lease.simulated_node import DAY, MARGIN, Node, living, value, writes

pytestmark = pytest.mark.usefixtures("every_log_line")


async def test_a_start_takes_one_snapshot_and_the_watch_tells_what_came_since(store: SimulatedStore) -> None:
    gone, moved = store.put("10.5.3.0-24", value("192.0.2.3")), store.put("10.5.4.0-24", value("192.0.2.4"))
    node = Node(store, 1)
    taken: list[int] = []
    snapshot = node.client.snapshot

    async def counted() -> Snapshot:
        taken.append(store.revision)
        return await snapshot()

    node.client.snapshot = counted  # type: ignore[method-assign]
    await node.keeper.acquire()
    # while the device is made: a lease changes, one goes, one comes, and ours was written
    store.put(moved.key, value("192.0.2.44"))
    store.remove(gone.key)
    store.put("10.5.5.0-24", value("192.0.2.5"))
    node.task = asyncio.create_task(node.keeper.run())
    await store.clock.advance(LINGER + 1, store)
    assert {key: str(attrs.public_ip) for key, attrs in node.peers.items()} == {
        "10.5.4.0-24": "192.0.2.44", "10.5.5.0-24": "192.0.2.5",
    }  # fmt: skip
    assert len(taken) == 1
    assert node.keeper.synced
    assert node.keeper.healthy
    assert node.keeper.counters.put_backs == 0, "our own write, which is younger than the snapshot, is not missed"
    await node.stop()


class BusyNode(Node):
    """One that takes two milliseconds for whatever it is told."""

    async def on_events(self, events: Sequence[LeaseEvent]) -> None:
        await super().on_events(events)
        self.clock.now += 0.002


async def test_a_lone_change_is_followed_at_once_and_what_comes_soon_after_together(store: SimulatedStore) -> None:
    node = BusyNode(store, 1)
    async with living(store, node):
        await store.clock.advance(1, store)
        node.told.clear()
        for number in (3, 4, 5):
            store.put(f"10.5.{number}.0-24", value(f"192.0.2.{number}"))
            await settle()
        assert node.told == [1]
        await store.clock.advance(PACE, store)
        assert node.told == [1, 2]
        await store.clock.advance(1, store)
        store.put("10.5.6.0-24", value("192.0.2.6"))
        await settle()
        assert node.told == [1, 2, 1]


async def test_what_has_piled_up_is_followed_without_a_rest_and_very_much_with_some(store: SimulatedStore) -> None:
    node = BusyNode(store, 1)
    async with living(store, node):
        await store.clock.advance(1, store)
        node.told.clear()
        for turn in range(UNRESTED + 3):
            for number in range(100, 100 + PORTION):
                store.put(f"10.5.{number}.0-24", value(f"192.0.{turn}.{number}"))
            await settle()
        assert node.told == [PORTION] * (UNRESTED + 1), "then it rests"
        await store.clock.advance(1, store)
        assert node.told == [PORTION] * (UNRESTED + 3)


async def test_peers_are_followed_and_told_in_flannels_words(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node(store, 1, previous=LeaseKey.parse("10.5.1.0-24"))
    store.put("10.5.2.0-24", value("192.0.2.2"), DAY)
    async with living(store, node):
        assert node.said() == [("added", "10.5.2.0-24")]
        store.put("10.5.3.0-24", value("192.0.2.3"), DAY)
        store.put("10.5.2.0-24", value("192.0.2.4"), DAY)
        store.put("10.5.2.0-24", value("192.0.2.4"), DAY)
        store.put("10.5.4.0-24", b"junk", DAY)
        store.remove("10.5.3.0-24")
        await settle()
        assert node.said() == [("added", "10.5.3.0-24"), ("changed", "10.5.2.0-24")]
        await store.clock.advance(LINGER - 0.1)
        assert node.said() == []
        await store.clock.advance(0.1)
        assert node.said() == [("removed", "10.5.3.0-24")]
        assert set(node.keeper.peers) == {"10.5.2.0-24"}
        assert set(node.keeper.rejected) == {"10.5.4.0-24"}
        assert node.keeper.counters.events == 4
    for text in ("Watching for new subnet leases", "Subnet added: 10.5.3.0/24", "Subnet removed: 10.5.3.0/24"):
        assert caplog.text.count(text) == 1
    assert caplog.text.count("Lease 10.5.4.0-24 is not obeyed") == 1


async def test_a_storm_of_events_or_of_junk_is_a_few_lines(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node(store, 1, previous=LeaseKey.parse("10.5.1.0-24"))
    for number in range(20, 220):
        store.put(f"10.5.{number}.0-24", value("192.0.2.2"), DAY)
        store.put(f"junk {number}", b"", DAY)
    async with living(store, node):
        for _ in range(200):
            store.put("10.5.2.0-24", b"junk", DAY)
        await settle()
        assert len(node.peers) == 200
        store.put("j" * 1_000_000, b"", DAY)
        await settle()
        assert len(node.keeper.rejected) == 202
        assert max(map(len, node.keeper.rejected)) == 100
        assert node.keeper.counters.rejections == 401
    assert len(caplog.records) < 40


async def test_each_peer_that_is_lost_is_kept_for_its_own_time(store: SimulatedStore) -> None:
    node = Node(store, 1, previous=LeaseKey.parse("10.5.1.0-24"))
    keys = [f"10.5.{number}.0-24" for number in (2, 3, 4)]
    for number, key in enumerate(keys, 2):
        store.put(key, value(f"192.0.2.{number}"), DAY)
    async with living(store, node):
        node.said()
        store.remove(keys[0])
        await store.clock.advance(1)
        store.remove(keys[1])
        store.remove(keys[2])
        await store.clock.advance(1)
        store.put(keys[0], value("192.0.2.2"), DAY)
        store.put(keys[2], value("192.0.2.44"), DAY)
        await settle()
        assert node.said() == [("changed", keys[2])]
        store.remove(keys[0])
        await store.clock.advance(LINGER - 1.5)
        assert node.said() == []
        await store.clock.advance(0.5)
        assert node.said() == [("removed", keys[1])]
        await store.clock.advance(1)
        assert node.said() == [("removed", keys[0])]


async def test_a_lost_peer_goes_also_while_our_own_write_fails(store: SimulatedStore) -> None:
    node = Node(store, 1)
    store.put("10.5.200.0-24", value("192.0.2.2"), DAY)
    async with living(store, node):
        node.said()
        await store.clock.advance(DAY - MARGIN - 1, store)
        node.client.offline = True
        await store.clock.advance(5)  # the renewal has failed, and is tried again in a minute
        node.client.offline = False
        store.remove("10.5.200.0-24")
        await store.clock.advance(LINGER)
        assert node.said() == [("removed", "10.5.200.0-24")]


async def test_a_storm_of_small_batches_is_a_few_lines_too(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node(store, 1, previous=LeaseKey.parse("10.5.1.0-24"))
    async with living(store, node):
        for turn in range(2000):
            store.put("10.5.2.0-24", value(f"192.0.2.{turn % 2 + 10}"), DAY)
            await store.clock.advance(0.001)
        assert node.keeper.counters.events == 2000
        assert caplog.text.count("Subnet changed: 10.5.2.0/24") < 230
        await store.clock.advance(1)
        store.put("10.5.2.0-24", value("192.0.2.12"), DAY)
        await settle()
        assert caplog.text.count("Subnet changed: 10.5.2.0/24 via 192.0.2.12") == 1
        assert "lines about other subnets were left out" in caplog.text


async def test_a_watch_that_breaks_resumes_and_misses_nothing(store: SimulatedStore) -> None:
    node = Node(store, 1, previous=LeaseKey.parse("10.5.1.0-24"))
    async with living(store, node):
        for number in range(2, 6):
            node.client.cut()
            node.client.repeat = not node.client.repeat
            store.put(f"10.5.{number}.0-24", value("192.0.2.2"), DAY)
            await store.clock.advance(1)
        assert node.said() == [("added", f"10.5.{number}.0-24") for number in range(2, 6)]
        assert node.keeper.counters.resyncs == 1


async def test_a_store_that_is_away_is_asked_with_growing_patience(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node(store, 1)
    async with living(store, node):
        node.client.offline = True
        node.client.cut()
        await store.clock.advance(3600)
        assert node.keeper.counters.interruptions < 1000
        assert node.keeper.store_error != ""
        assert len(caplog.records) < 200
        node.client.offline = False
        store.put("10.5.200.0-24", value("192.0.2.2"), DAY)
        await store.clock.advance(5)
        assert node.said() == [("added", "10.5.200.0-24")]
        assert node.keeper.store_error == ""


async def test_a_quiet_store_that_is_back_is_no_trouble_any_more(store: SimulatedStore) -> None:
    node = Node(store, 1)
    async with living(store, node):
        node.client.cut()
        await settle()
        assert node.keeper.store_error == "simulated: the watch broke"
        await store.clock.advance(1)
        assert node.keeper.store_error == ""


async def test_a_store_that_was_wiped_and_counted_past_our_revision_is_found_out(store: SimulatedStore) -> None:
    node = Node(store, 1, previous=LeaseKey.parse("10.5.1.0-24"), grace=60.0)
    store.put("10.5.2.0-24", value("192.0.2.2"), DAY)
    async with living(store, node):
        node.said()
        node.client.offline = True
        node.client.cut()
        await settle()
        store.wipe(restart=True)
        for number in range(9):
            store.put("10.5.3.0-24", value(f"192.0.2.{10 + number}"), DAY)
        node.client.offline = False
        await store.clock.advance(70)
        assert store.entries["10.5.1.0-24"].value == value(node.ip)
        await store.clock.advance(130)
        assert set(node.peers) == {"10.5.3.0-24"}


async def test_after_a_compaction_a_snapshot_is_compared_by_content(store: SimulatedStore) -> None:
    node = Node(store, 1, previous=LeaseKey.parse("10.5.1.0-24"))
    for number in (2, 3, 4):
        store.put(f"10.5.{number}.0-24", value(f"192.0.2.{number}"), DAY)
    async with living(store, node):
        node.said()
        node.client.offline = True
        node.client.cut()
        await settle()
        store.put("10.5.2.0-24", value("192.0.2.2"), DAY)
        store.put("10.5.3.0-24", value("192.0.2.3", b'{"VtepMAC":"02:00:00:00:00:01"}'), DAY)
        store.remove("10.5.4.0-24")
        store.put("10.5.5.0-24", value("192.0.2.5"), DAY)
        store.compact()
        node.client.offline = False
        await store.clock.advance(6)
        said = [("changed", "10.5.3.0-24"), ("added", "10.5.5.0-24"), ("removed", "10.5.4.0-24")]
        assert node.said() == said
        assert len(writes(store, "192.0.2.1")) == 1, "our own lease was never away"


@pytest.mark.parametrize("restart", [False, True])
async def test_a_wiped_store_takes_no_peer_away_before_the_grace_is_over(
    store: SimulatedStore, restart: bool, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [Node(store, number, previous=LeaseKey.parse(f"10.5.{number}.0-24")) for number in (1, 2)]
    store.put("10.5.3.0-24", value("192.0.2.3"), DAY)
    async with living(store, *nodes):
        for node in nodes:
            node.said()
        store.wipe(restart=restart)
        await store.clock.advance(10)
        assert set(store.entries) == {"10.5.1.0-24", "10.5.2.0-24"}
        assert [node.said() for node in nodes] == [[], []]
        assert all(node.keeper.healthy for node in nodes)
        await store.clock.advance(WIPED_STORE_GRACE + 1)
        assert [node.said() for node in nodes] == [[("removed", "10.5.3.0-24")]] * 2
        assert set(nodes[0].peers) == {"10.5.2.0-24"}
    assert caplog.text.count("the 2 peers are kept for 10m0s") == 2


async def test_the_end_of_the_grace_needs_a_store_that_answers(store: SimulatedStore) -> None:
    node = Node(store, 1, grace=60.0)
    store.put("10.5.200.0-24", value("192.0.2.3"), DAY)
    async with living(store, node):
        node.said()
        store.wipe(restart=True)
        await store.clock.advance(10)
        node.client.offline = True
        await store.clock.advance(600)
        assert node.said() == []
        node.client.offline = False
        await store.clock.advance(61)
        assert node.said() == [("removed", "10.5.200.0-24")]


async def test_an_error_of_the_backend_ends_the_run_as_it_is(store: SimulatedStore) -> None:
    node = Node(store, 1)

    async def refuse(_: Sequence[LeaseEvent]) -> None:
        raise KernelError("no")

    node.keeper._on_events = refuse
    await node.keeper.acquire()
    run = asyncio.create_task(node.keeper.run())
    store.put("10.5.200.0-24", value("192.0.2.3"), DAY)
    await settle()
    with pytest.raises(KernelError, match="no"):
        await run


async def test_run_before_acquire_is_refused(store: SimulatedStore) -> None:
    with pytest.raises(RuntimeError):
        await Node(store, 1).keeper.run()


# ---- a start without the store


def remembered(store: SimulatedStore, key: str) -> tuple[Entry, Snapshot]:
    return store.entries[key], Snapshot(store.revision, tuple(store.entries.values()))


async def resumed(store: SimulatedStore, held: Entry, past: Snapshot, *, grace: float = 60.0) -> Node:
    """A daemon that begins with what a former one knew, while the store is out of reach."""
    node = Node(store, 1, grace=grace)
    node.client.offline = True
    node.keeper.resume(held, 5000.0, past)
    node.task = asyncio.create_task(node.keeper.run())
    await settle()
    return node


async def test_a_start_without_the_store_has_the_peers_at_once_and_is_not_synced(store: SimulatedStore) -> None:
    first = Node(store, 1)
    store.put("10.5.200.0-24", value("192.0.2.2"), DAY)
    async with living(store, first):
        pass
    node = await resumed(store, *remembered(store, first.key))
    try:
        assert node.peers == {"10.5.200.0-24": LeaseAttrs(IPv4Address("192.0.2.2"))}
        assert node.key == first.key
        assert (node.keeper.synced, node.keeper.healthy) == (False, True)
        await store.clock.advance(5001, store)
        assert not node.keeper.healthy, "the TTL ran out"
        node.client.offline = False
        await store.clock.advance(70, store)
        assert (node.keeper.synced, node.keeper.healthy) == (True, True)
        assert node.said() == [("added", "10.5.200.0-24")]
        assert store.entries[node.key].create_revision == first.owned[0].create_revision
    finally:
        await node.stop()


@pytest.mark.parametrize("meanwhile", ["renewed", "deleted", "taken", "twin", "nothing"])
async def test_what_happened_to_our_lease_meanwhile_is_found_out(store: SimulatedStore, meanwhile: str) -> None:
    first = Node(store, 1)
    async with living(store, first):
        pass
    held, past = remembered(store, first.key)
    node = await resumed(store, held, past)
    try:
        if meanwhile == "renewed":  # by the former daemon, which was killed before it could note it
            store.put(held.key, value(node.ip), DAY, by="192.0.2.1")
        elif meanwhile == "deleted":
            store.remove(held.key)
        elif meanwhile == "taken":
            store.put(held.key, value("192.0.2.66"), DAY)
        node.client.offline = False
        await store.clock.advance(10, store)
        if meanwhile == "twin":  # what comes after the first look is not ours
            store.put(held.key, value(node.ip), DAY)
            await settle()
        assert node.keeper.healthy == (meanwhile not in ("taken", "twin"))
        assert node.keeper.fenced == (meanwhile == "taken")
        assert node.keeper.synced
        if node.keeper.healthy:
            assert store.entries[held.key].value == value(node.ip)
            assert node.owned == [] or node.owned[-1] == store.entries[held.key]
    finally:
        await node.stop()


async def test_peers_that_changed_meanwhile_are_corrected_and_a_wiped_store_takes_none_away(
    store: SimulatedStore,
) -> None:
    first = Node(store, 1, previous=LeaseKey.parse("10.5.1.0-24"))
    for number in (2, 3, 4):
        store.put(f"10.5.{number}.0-24", value(f"192.0.2.{number}"), DAY)
    async with living(store, first):
        pass
    held, past = remembered(store, first.key)
    for wiped in (False, True):
        node = await resumed(store, held, past)
        try:
            assert len(node.said()) == 3
            if wiped:
                store.wipe(restart=True)
            else:
                store.put("10.5.2.0-24", value("192.0.2.22"), DAY)
                store.remove("10.5.3.0-24")
            node.client.offline = False
            await store.clock.advance(10, store)
            gone = [("changed", "10.5.2.0-24"), ("removed", "10.5.3.0-24")]
            assert node.said() == ([] if wiped else gone)
            assert store.entries[held.key].value == value(node.ip)
        finally:
            await node.stop()


@pytest.mark.parametrize("wiped", ["not", "emptied", "replaced"])
async def test_a_store_that_was_wiped_before_the_start_takes_no_known_peer_away(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture, wiped: str
) -> None:
    """The store answers this daemon from the first moment, and all that speaks of the peers is what the former daemon
    knew: of a store that is whole that counts nothing."""
    first = Node(store, 1, previous=LeaseKey.parse("10.5.1.0-24"))
    for number in (2, 3):
        store.put(f"10.5.{number}.0-24", value(f"192.0.2.{number}"), DAY)
    async with living(store, first):
        pass
    _, past = remembered(store, first.key)
    if wiped == "not":
        store.remove("10.5.2.0-24")
    else:
        store.wipe(restart=wiped == "replaced")
    node = Node(store, 1, previous=LeaseKey.parse("10.5.1.0-24"), grace=60.0)
    node.keeper.remember(past)
    async with living(store, node):
        assert node.key == "10.5.1.0-24"
        if wiped == "not":
            assert node.said() == [("added", "10.5.3.0-24")]
            return
        assert sorted(node.said()) == [("added", "10.5.2.0-24"), ("added", "10.5.3.0-24")]
        assert "the 2 peers are kept for 1m0s" in caplog.text
        assert (node.keeper.synced, node.keeper.healthy) == (True, True)
        store.put("10.5.2.0-24", value("192.0.2.2"), DAY)  # one of them is back
        await store.clock.advance(62)
        assert node.said() == [("removed", "10.5.3.0-24")]
        assert set(node.peers) == {"10.5.2.0-24"}


async def test_what_a_former_daemon_knew_and_what_the_store_has_are_told_together(store: SimulatedStore) -> None:
    """It was killed before it noted its own lease, so that all leases are newer than what it knew. Whoever follows
    takes away what the kernel holds for others with the first word, and nobody's packets may be lost by that."""
    past = Snapshot(store.revision, ())
    async with living(store, Node(store, 1, previous=LeaseKey.parse("10.5.1.0-24"))):
        store.put("10.5.2.0-24", value("192.0.2.2"), DAY)
    node = Node(store, 1, previous=LeaseKey.parse("10.5.1.0-24"), grace=60.0)
    node.keeper.remember(past)
    async with living(store, node):
        assert node.told == [1]
        assert node.said() == [("added", "10.5.2.0-24")]


async def test_a_start_without_the_store_at_another_address_says_so_later(store: SimulatedStore) -> None:
    first = Node(store, 7)
    async with living(store, first):
        pass
    node = await resumed(store, *remembered(store, first.key))
    try:
        node.client.offline = False
        await store.clock.advance(10, store)
        assert store.entries[first.key].value == value("192.0.2.1")
        assert node.keeper.healthy
    finally:
        await node.stop()


# ---- the end


async def test_cancelling_leaves_no_task_and_no_lock(store: SimulatedStore) -> None:
    for moment in range(0, 60, 3):
        node = Node(store, 1)
        store.put("10.5.200.0-24", value("192.0.2.3"), DAY)
        task = asyncio.create_task(node.live())
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await settle()
        assert task.cancelled()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert store.subscriptions == 0
