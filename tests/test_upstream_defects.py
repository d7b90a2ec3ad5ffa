"""The defects that flannel has and this daemon must not have, one test each, by the numbers of the list in
docs/upstream-defects.md. Those of a data plane or of the firewall are tested where these are.
"""

from __future__ import annotations

import asyncio
import json
from ipaddress import IPv4Address, IPv6Address
from random import Random

import pytest

from dataplane import netconf
from dataplane.daemon import main
from dataplane.lease.keeper import LeaseKeeper
from dataplane.lease.model import LEASE_TTL, LeaseAttrs, LeaseEventKind, LeaseKey
from tests.etcd_server import EtcdServer
from tests.lease.fake_store import ManualClock, SimulatedClient, SimulatedStore
from tests.lease.real_keepers import LiveKeeper, all_known, attrs_of, living, until

CONFIG = netconf.parse(b'{"Network":"10.5.0.0/16","SubnetMax":"10.5.6.0"}', origin="this test")
V6_CONFIG = netconf.parse(b'{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48"}', origin="this test")
on_etcd = pytest.mark.etcd


class Network:
    """Nodes of one prefix in etcd, and that prefix as etcdctl sees it."""

    def __init__(self, server: EtcdServer, name: str) -> None:
        self.server, self.prefix = server, f"/{name}"

    def node(self, number: int, **options: object) -> LiveKeeper:
        config = options.pop("config", CONFIG)
        attrs = options.pop("attrs", attrs_of(number))
        return LiveKeeper(self.server.url, self.prefix, config, attrs, number, **options)  # type: ignore[arg-type]  # named by each test

    def put(self, key: str, text: str) -> None:
        self.server.etcdctl("put", f"{self.prefix}/subnets/{key}", text=text)

    def entry(self, key: str) -> dict[str, int]:
        """The key's numbers; `lease` is missing where it has no TTL."""
        entry: dict[str, int] = json.loads(self.server.etcdctl("get", f"{self.prefix}/subnets/{key}", "-w", "json"))[
            "kvs"
        ][0]
        return entry


@pytest.fixture
def network(server: EtcdServer, request: pytest.FixtureRequest) -> Network:
    return Network(server, request.node.name)


def lease(number: int) -> str:
    return attrs_of(number).encode().decode()


@on_etcd
async def test_defect_01_a_lost_allocation_race_is_tried_again(network: Network) -> None:
    """Six nodes want the six subnets there are at once: upstream's losers end with `subnet already exists`."""
    nodes = [network.node(number) for number in range(1, 7)]
    async with living(*nodes):
        await until("every node has a subnet and knows the others", lambda: all_known(nodes))
    assert sum(node.keeper.counters.lost_races for node in nodes) > 0


@on_etcd
async def test_defect_02_a_reservation_stays_one_in_the_hands_of_its_node(network: Network) -> None:
    network.put("10.5.3.0-24", lease(1))
    node = network.node(1)
    async with living(node):
        await until("the node has its reservation", lambda: node.keeper.synced)
        assert node.key == "10.5.3.0-24"
        assert "lease" not in network.entry(node.key)
        network.put(node.key, lease(1))  # again by hand, below a running node
        await until(
            "the node has seen it", lambda: node.owned[-1].mod_revision == network.entry(node.key)["mod_revision"]
        )
        assert "lease" not in network.entry(node.key)
        assert node.keeper.expires_at is None


@on_etcd
async def test_defect_03_one_junk_key_takes_no_peer_away(network: Network) -> None:
    nodes = [network.node(number) for number in (1, 2)]
    async with living(*nodes):
        await until("the nodes know each other", lambda: all_known(nodes))
        for key, text in (("junk", "{"), ("10.5.5.0-24", "not JSON"), (nodes[1].key, "{"), ("10.5.9.0-99", lease(9))):
            network.put(key, text)
        network.put("10.5.6.0-24", lease(6))
        await until("a lease behind the junk is seen", lambda: "10.5.6.0-24" in nodes[0].peers)
        assert nodes[0].peers.keys() == {nodes[1].key, "10.5.6.0-24"}
        assert {"junk", "10.5.5.0-24", nodes[1].key} <= nodes[0].keeper.rejected.keys()


@on_etcd
async def test_defect_04_a_second_snapshot_shows_changed_attributes_and_spares_our_own_subnet(
    network: Network,
) -> None:
    network.put("10.5.3.0-24", lease(3))
    node = network.node(1)
    async with living(node):
        await until("the peer is known", lambda: node.peers)
        node.events.clear()
        network.put("10.5.3.0-24", lease(33))
        before = node.keeper.counters.resyncs
        async with node.keeper._turn:
            assert node.keeper._own is not None
            await node.keeper._resync(node.keeper._own)
        assert node.keeper.counters.resyncs == before + 1
        await until("the change is told", lambda: node.events)
        assert [(event.kind, str(event.lease.key)) for event in node.events] == [
            (LeaseEventKind.CHANGED, "10.5.3.0-24")
        ]
        assert node.peers["10.5.3.0-24"] == attrs_of(33)


async def test_defect_05_a_node_whose_first_watches_fail_renews_its_lease(caplog: pytest.LogCaptureFixture) -> None:
    """Over a simulated store, whose day passes in a moment."""
    clock = ManualClock()
    store = SimulatedStore(clock)
    client = SimulatedClient(store, "n1")

    async def ignore(_: object) -> None:
        pass

    keeper = LeaseKeeper(
        client, CONFIG, attrs_of(1), renew_margin=3600.0, on_events=ignore, on_own=lambda *_: None, rng=Random(1),
        clock=clock, sleep=clock.sleep,
    )  # fmt: skip
    await keeper.acquire()
    client.offline = True
    run = asyncio.create_task(keeper.run())
    await clock.advance(600)
    assert "The watch of the leases was interrupted" in caplog.text
    client.offline = False
    await clock.advance(3.0 * LEASE_TTL, store)
    assert keeper.counters.renewals == 3
    assert keeper.counters.put_backs == 0
    run.cancel()
    await asyncio.wait([run])


@pytest.mark.parametrize("argv", [["-ifac=eth0"], ["-ip-masq=perhaps"], ["-subnet-lease-renew-margin=1440"]])
def test_defect_06_a_mistyped_flag_is_no_success(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert argv[0].partition("=")[0].strip("-") in capsys.readouterr().err


@on_etcd
async def test_defect_06_a_lost_lease_ends_no_daemon(network: Network) -> None:
    """Upstream ends with code 0, which no supervisor takes for a failure."""
    node = network.node(1)
    async with living(node):
        await until("the node has its lease", lambda: node.keeper.synced)
        first = network.entry(node.key)["create_revision"]
        network.server.etcdctl("del", f"{network.prefix}/subnets/{node.key}")
        await until("the lease is put back", lambda: node.keeper.counters.put_backs == 1)
        assert network.entry(node.key)["create_revision"] > first
        assert node.keeper.healthy


@on_etcd
async def test_defect_13_nodes_of_ipv6_alone_each_get_a_lease_of_their_own(network: Network) -> None:
    addresses = [IPv6Address(f"fd00:198:18::{number:x}") for number in range(1, 5)]
    nodes = [
        network.node(number, attrs=LeaseAttrs(IPv4Address(0), address), config=V6_CONFIG)
        for number, address in enumerate(addresses)
    ]
    async with living(*nodes):
        await until("each node knows the others", lambda: all_known(nodes))
        keys = [LeaseKey.parse(node.key) for node in nodes]
        assert all(str(key).startswith("0.0.0.0-0&fd00:0:0:") for key in keys)
        assert not any(one.overlaps(two) for one in keys for two in keys if one is not two)
    again = network.node(0, attrs=LeaseAttrs(IPv4Address(0), addresses[0]), config=V6_CONFIG)
    async with living(again):
        await until("it has a lease", lambda: again.key)
        assert again.key == nodes[0].key
