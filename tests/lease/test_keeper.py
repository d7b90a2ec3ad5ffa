"""dataplane/lease/{keeper,ownership,loss,retry}.py over a simulated store (fake_store.py), behaviour by behaviour.

Faults in any order: test_ownership_model.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from random import Random

import pytest

from dataplane import netconf
from dataplane.errors import KernelError, LeaseError, StoreUnavailable
from dataplane.lease.allocate import Claim
from dataplane.lease.config import fetch_config
from dataplane.lease.keeper import WIPED_STORE_GRACE, LeaseKeeper
from dataplane.lease.loss import LINGER
from dataplane.lease.model import LEASE_TTL, LeaseAttrs, LeaseEvent, LeaseEventKind, LeaseKey
from dataplane.lease.store import Entry, Snapshot
from tests.lease.fake_store import ManualClock, SimulatedClient, SimulatedStore, Write, settle

CONFIG = netconf.parse(b'{"Network":"10.5.0.0/16","SubnetMax":"10.5.6.0"}', origin="this test")
V6_CONFIG = netconf.parse(b'{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48"}', origin="this test")
DUAL_CONFIG = netconf.parse(
    b'{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}', origin="this test"
)
MARGIN = 3600.0
DAY = float(LEASE_TTL)


def value(ip: str | IPv4Address, data: bytes = b"") -> bytes:
    return LeaseAttrs(IPv4Address(ip), backend_data=data).encode()


class Node:
    """One daemon's keeper, what it was told, and the sum of that."""

    def __init__(
        self,
        store: SimulatedStore,
        number: int,
        *,
        attrs: LeaseAttrs | None = None,
        config: netconf.NetworkConfig = CONFIG,
        **arguments: object,
    ) -> None:
        self.store, self.clock = store, store.clock
        self.ip = IPv4Address(f"192.0.2.{number}")
        self.client = SimulatedClient(store, str(self.ip))
        self.events: list[LeaseEvent] = []
        self.told: list[int] = []
        """How many events came each time."""
        self.peers: dict[str, LeaseAttrs] = {}
        self.owned: list[Entry] = []
        self.task: asyncio.Task[None] | None = None
        self.keeper = LeaseKeeper(
            self.client, config, attrs or LeaseAttrs(self.ip), on_events=self.on_events,
            on_own=lambda entry, _: self.owned.append(entry), rng=Random(number), clock=self.clock,
            sleep=self.clock.sleep,
            **({"renew_margin": MARGIN} | arguments),  # type: ignore[arg-type]  # named by each test
        )  # fmt: skip

    async def on_events(self, events: Sequence[LeaseEvent]) -> None:
        await asyncio.sleep(0)
        for event in events:
            key = str(event.lease.key)
            assert (key in self.peers) != (event.kind is LeaseEventKind.ADDED)
            self.peers[key] = event.lease.attrs
            if event.kind is LeaseEventKind.REMOVED:
                del self.peers[key]
        self.events += events
        self.told.append(len(events))

    @property
    def key(self) -> str:
        assert self.keeper.own is not None
        return str(self.keeper.own.key)

    def said(self) -> list[tuple[str, str]]:
        """The events since the last look."""
        said = [(event.kind.value, str(event.lease.key)) for event in self.events]
        self.events.clear()
        return said

    async def start(self) -> None:
        self.task = asyncio.create_task(self.live())
        await settle()

    async def live(self) -> None:
        await self.keeper.acquire()
        await self.keeper.run()

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
            await settle()
            assert self.task.cancelled(), self.task.exception()


@asynccontextmanager
async def living(store: SimulatedStore, *nodes: Node) -> AsyncIterator[None]:
    """Nodes that run, and end whatever happens."""
    open_before = store.subscriptions
    try:
        for node in nodes:
            await node.start()
        yield
    finally:
        for node in nodes:
            await node.stop()
        assert store.subscriptions == open_before, "a watch was left open"


@pytest.fixture
def store() -> SimulatedStore:
    return SimulatedStore(ManualClock())


@pytest.fixture(autouse=True)
def every_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def writes(store: SimulatedStore, client: str) -> list[Write]:
    return [write for write in store.writes if write.client == client]


# ---- the network config


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


async def test_the_config_is_waited_for_and_each_trouble_is_told(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    clock, client = store.clock, SimulatedClient(store, "me")
    client.offline = True
    parse = partial(netconf.parse, origin="here")
    fetch = asyncio.create_task(fetch_config(client, parse, rng=Random(1), clock=clock, sleep=clock.sleep))
    await clock.advance(3)
    client.offline = False
    await clock.advance(10)
    store.config = b'{"Network":"10.5.0.0/33"}'
    await clock.advance(10)
    store.config = b'{"EnableIPv4":false}'
    await clock.advance(10)
    assert not fetch.done()
    store.config = b'{"Network":"10.5.0.0/16"}'
    await clock.advance(6)
    assert (await fetch).network == IPv4Network("10.5.0.0/16")
    assert "Couldn't fetch network config: simulated: offline" in caplog.text
    assert "flannel config not found in etcd store. Did you create your config using etcdv3 API?" in caplog.text
    assert "10.5.0.0/33" in caplog.text
    assert "none defined stack: EnableIPv4 and EnableIPv6 are both false" in caplog.text


async def test_an_endless_trouble_is_told_each_second_first_and_rarely_later(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    clock, client = store.clock, SimulatedClient(store, "me")
    client.offline = True
    fetch = asyncio.create_task(fetch_config(client, bytes, rng=Random(1), clock=clock, sleep=clock.sleep))
    await clock.advance(4.5)
    assert 3 <= len(caplog.records) <= 5
    await clock.advance(600)
    caplog.clear()
    calls = client.calls
    await clock.advance(600)
    assert 15 <= len(caplog.records) <= 40
    assert 120 <= client.calls - calls <= 170
    fetch.cancel()
    await asyncio.wait([fetch])


# ---- getting a lease


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


# ---- peers


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


# ---- our own lease


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
