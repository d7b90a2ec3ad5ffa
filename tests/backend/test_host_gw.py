"""host-gw and alloc on one node: routes that come back, refusals that say what to do instead."""

from __future__ import annotations

import logging
from ipaddress import IPv4Address, IPv6Address

import pytest

from dataplane.backend.alloc import AllocBackend
from dataplane.backend.host_gw import HostGwBackend
from dataplane.errors import ConfigError
from dataplane.kernel.netlink import Netlink
from tests.backend.one_node import (
    added,
    calm,
    facing,
    network,
    on_node,
    own_lease,
    peer,
    removed,
    routes,
    shown,
    until,
)
from tests.namespaces import Namespace

pytestmark = pytest.mark.netns

CONFIG = network(Type="host-gw")



def test_routes_follow_the_leases_and_come_back(ns: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def work(_: Netlink) -> None:
        backend = HostGwBackend(facing(ns), CONFIG)
        attrs = await backend.prepare()
        assert attrs.encode() == b'{"PublicIP":"198.18.0.1","PublicIPv6":null,"BackendType":"host-gw"}'
        await backend.attach(own_lease())
        two, three = peer(2, kind="host-gw"), peer(3, kind="host-gw")
        await backend.apply(added([two, three, peer(4)]))
        both = {"10.5.2.0/24": ("198.18.0.2", "eth0"), "10.5.3.0/24": ("198.18.0.3", "eth0")}
        assert routes(ns) == both
        (entry,) = shown(ns, "ip", "route", "show", "10.5.2.0/24")
        assert (entry["flags"], entry["scope"], entry["type"]) == ([], "global", "unicast")
        assert backend.mtu == 1500
        assert "this one host-gw" in next(iter(backend.status().ignored.values()))
        for taken in (
            "route del 10.5.2.0/24",
            "route replace 10.5.2.0/24 via 198.18.0.77",
            "route flush proto boot",
        ):
            await calm()
            caplog.clear()
            ns.command("ip", *taken.split())
            await until(f"whole again after: {taken}", lambda: routes(ns) == both)
            await until("it is said", lambda: "Route recovered 10.5.2.0/24 : 198.18.0.2" in caplog.text)
        # a device that goes down takes the routes along without a word, and has no room for them meanwhile
        ns.command("ip", "link", "set", "eth0", "down")
        assert routes(ns) == {}
        ns.command("ip", "link", "set", "eth0", "up")
        await until("whole again after the device was down", lambda: routes(ns) == both)
        assert backend.status().repairs > 0
        await backend.apply(removed(two))
        await backend.close()
        assert routes(ns) == {"10.5.3.0/24": ("198.18.0.3", "eth0")}, "after a stop packets go on"

    on_node(ns, work)


def test_a_start_clears_what_is_stale_and_nothing_else(ns: Namespace) -> None:
    foreign = {"192.0.2.0/24": ("198.18.0.7", "eth0"), "10.5.128.0/20": ("198.18.0.7", "eth0")}
    for destination in (*foreign, "10.5.7.0/24"):
        ns.command("ip", "route", "add", destination, "via", "198.18.0.7")

    async def work(_: Netlink) -> None:
        backend = HostGwBackend(facing(ns), CONFIG)
        await backend.prepare()
        await backend.attach(own_lease())
        await backend.apply(added([peer(2, kind="host-gw")]))
        await backend.close()

    on_node(ns, work)
    assert routes(ns) == {**foreign, "10.5.2.0/24": ("198.18.0.2", "eth0")}


def test_a_peer_that_is_not_on_the_wire_is_told_and_tried_again(ns: Namespace) -> None:
    async def work(_: Netlink) -> None:
        backend = HostGwBackend(facing(ns), CONFIG)
        await backend.prepare()
        await backend.attach(own_lease())
        await backend.apply(added([peer(2, kind="host-gw", ip="192.0.2.2"), peer(3, kind="host-gw")]))
        (reason,) = backend.status().ignored.values()
        assert reason == "the kernel refuses its route: Nexthop has invalid gateway"
        assert routes(ns).keys() == {"10.5.3.0/24"}
        ns.command("ip", "addr", "add", "192.0.2.1/24", "dev", "eth0")
        await until("it is reached", lambda: routes(ns).get("10.5.2.0/24") == ("192.0.2.2", "eth0"))
        assert backend.status().ignored == {}
        await backend.close()

    on_node(ns, work)


def test_both_families(ns: Namespace) -> None:
    async def work(_: Netlink) -> None:
        backend = HostGwBackend(facing(ns), network(Type="host-gw", v6=True))
        attrs = await backend.prepare()
        assert attrs.public_ipv6 == IPv6Address("fd00:198:18::1")
        await backend.attach(own_lease(v6=True))
        await backend.apply(added([peer(2, kind="host-gw", v6=True)]))
        assert routes(ns, 6) == {"fd00:5:0:2::/64": ("fd00:198:18::2", "eth0")}
        ns.command("ip", *["-6", "route", "flush", "proto", "boot"])
        await until("the route is back", lambda: routes(ns, 6) == {"fd00:5:0:2::/64": ("fd00:198:18::2", "eth0")})
        await backend.close()

    on_node(ns, work)


def test_the_underlays_address_changes(ns: Namespace) -> None:
    async def work(_: Netlink) -> None:
        backend = HostGwBackend(facing(ns), CONFIG)
        await backend.prepare()
        await backend.attach(own_lease())
        await backend.apply(added([peer(2, kind="host-gw")]))
        ns.command("ip", *["link", "add", "eth1", "type", "veth", "peer", "name", "wire1"])
        for line in ("link set wire1 up", "link set eth1 up", "addr del 198.18.0.1/15 dev eth0"):
            ns.command("ip", *line.split())
        ns.command("ip", *["addr", "add", "198.18.0.5/15", "dev", "eth1"])
        own = IPv4Address("198.18.0.5")
        index = shown(ns, "ip", "link", "show", "eth1")[0]["ifindex"]
        changed = facing(ns, address=own, public_ip=own)
        attrs = await backend.move(type(changed)("eth1", index, own, own, 1500))
        assert attrs.public_ip == own
        await until("the route goes the new way", lambda: routes(ns) == {"10.5.2.0/24": ("198.18.0.2", "eth1")})
        await backend.close()

    on_node(ns, work)


def test_behind_nat_it_says_what_to_use_instead(ns: Namespace) -> None:
    text = r"your PublicIP 203\.0\.113\.1 differs from interface IP 198\.18\.0\.1, .*: use vxlan"
    with pytest.raises(ConfigError, match=text):
        HostGwBackend(facing(ns, public_ip=IPv4Address("203.0.113.1")), CONFIG)
    with pytest.raises(ConfigError, match="eth0 has no address of an IP version that the net-conf enables"):
        HostGwBackend(facing(ns, address_v6=None, public_ipv6=None), network(Type="host-gw", v6=True))


def test_alloc_takes_a_lease_and_touches_nothing(ns: Namespace) -> None:
    before = [ns.command("ip", word).stdout for word in ("link", "addr", "route", "neigh")]

    async def work(_: Netlink) -> None:
        backend = AllocBackend(facing(ns), network(Type="alloc"))
        assert (await backend.prepare()).encode() == b'{"PublicIP":"198.18.0.1","PublicIPv6":null}'
        await backend.attach(own_lease())
        await backend.apply(added([peer(2)]))
        assert (backend.mtu, backend.status().dataplane) == (1500, "none")
        assert (await backend.move(facing(ns, mtu=1400))).public_ip == IPv4Address("198.18.0.1")
        assert backend.mtu == 1400
        await backend.close()

    on_node(ns, work)
    assert [ns.command("ip", word).stdout for word in ("link", "addr", "route", "neigh")] == before
