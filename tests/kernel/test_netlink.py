"""Netlink against the real kernel, with iproute2 as the oracle."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import Any, TypeVar

import pytest
import uvloop

from dataplane.errors import KernelError
from dataplane.kernel import rtnetlink
from dataplane.kernel.facts import Vxlan
from dataplane.kernel.netlink import Netlink, quiet_ipv6, refuse_router_advertisements
from tests.namespaces import Namespace, open_namespace

pytestmark = pytest.mark.netns

R = TypeVar("R")
NETWORK = IPv4Network("10.5.0.0/16")


@pytest.fixture
def ns() -> Iterator[Namespace]:
    """A node with an underlay device `v0` that has a cable, and a TUN device that nobody holds."""
    with open_namespace() as namespace:
        namespace.command("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        namespace.command("ip", "tuntap", "add", "dev", "flannel0", "mode", "tun")
        namespace.command("ip", "link", "set", "v1", "up")
        yield namespace


def ask(ns: Namespace, work: Callable[[Netlink], Awaitable[R]]) -> R:
    """Run `work` on uvloop inside the namespace, with a connection of its own."""

    async def main() -> R:
        netlink = await Netlink.open()
        try:
            return await work(netlink)
        finally:
            await netlink.close()
            await netlink.close()

    return ns.run(uvloop.run, main())


def shown(ns: Namespace, *argv: str) -> Any:
    return json.loads(ns.command("ip", "-d", "-j", *argv).stdout or "[]")


def test_links_are_those_that_iproute2_lists(ns: Namespace) -> None:
    ns.command("ip", "link", "add", "flannel.1", "type", "vxlan", "id", "1", "dstport", "8472", "dev", "v0")
    ns.command("ip", "link", "set", "v0", "up", "mtu", "1432")
    links = ask(ns, lambda n: n.links())
    for link, oracle in zip(links, shown(ns, "link"), strict=True):
        assert (link.index, link.name, link.mtu) == (oracle["ifindex"], oracle["ifname"], oracle["mtu"])
        assert link.kind == oracle.get("linkinfo", {}).get("info_kind", "")
        assert link.up == ("UP" in oracle["flags"])
        assert link.address == oracle.get("address", "")
    by_name = {link.name: link for link in links}
    assert by_name["v0"].carrier
    assert not by_name["flannel0"].carrier
    assert by_name["flannel.1"].udp_port == 8472
    assert by_name["v0"].udp_port == 0


def test_works_on_the_standard_loop_too(ns: Namespace) -> None:
    async def main() -> str:
        netlink = await Netlink.open()
        try:
            found = await netlink.link("v0")
            assert await netlink.link("none") is None
            return "" if found is None else found.name
        finally:
            await netlink.close()

    assert ns.run(asyncio.run, main()) == "v0"


def test_addresses_tell_family_scope_and_flags(ns: Namespace) -> None:
    ns.command("ip", "addr", "add", "198.18.0.1/24", "dev", "v0")
    ns.command("ip", "addr", "add", "198.18.0.2/24", "dev", "v0")
    ns.command("ip", "addr", "add", "198.18.5.1/24", "dev", "v0", "valid_lft", "600", "preferred_lft", "0")
    ns.command("ip", "addr", "add", "198.18.6.1", "peer", "198.18.6.2/32", "dev", "flannel0", "scope", "link")
    ns.command("ip", "addr", "add", "fd00::1/64", "dev", "v0", "nodad")
    found = {str(a.interface): a for a in ask(ns, lambda n: n.addresses())}
    index = {link["ifname"]: link["ifindex"] for link in shown(ns, "link")}
    first, second = found["198.18.0.1/24"], found["198.18.0.2/24"]
    assert (first.index, first.scope, first.permanent, first.secondary) == (index["v0"], 0, True, False)
    assert second.secondary
    assert found["198.18.5.1/24"].deprecated
    assert not found["198.18.5.1/24"].permanent
    assert (found["198.18.6.1/32"].index, found["198.18.6.1/32"].scope) == (index["flannel0"], 253)
    assert found["fd00::1/64"].interface == IPv6Interface("fd00::1/64")
    assert found["127.0.0.1/8"].scope == 254


def test_default_routes_come_preferred_first(ns: Namespace) -> None:
    assert ask(ns, lambda n: n.default_routes()) == ()
    ns.command("ip", "link", "set", "v0", "up")
    ns.command("ip", "addr", "add", "198.18.0.1/24", "dev", "v0")
    ns.command("ip", "route", "add", "default", "via", "198.18.0.9", "metric", "200")
    ns.command("ip", "route", "add", "default", "nexthop", "via", "198.18.0.7", "nexthop", "via", "198.18.0.8")
    ns.command("ip", "route", "add", "default", "via", "198.18.0.6", "table", "77")
    routes = ask(ns, lambda n: n.default_routes())
    assert [(str(r.gateway), r.metric, r.table) for r in routes] == [("198.18.0.7", 0, 254), ("198.18.0.9", 200, 254)]
    v0 = shown(ns, "link", "show", "v0")[0]["ifindex"]
    assert {r.device_index for r in routes} == {v0}


def test_route_to_asks_the_kernel(ns: Namespace) -> None:
    with pytest.raises(KernelError, match=r"cannot find a route to 198\.18\.0\.9: Network is unreachable"):
        ask(ns, lambda n: n.route_to(IPv4Address("198.18.0.9")))
    ns.command("ip", "link", "set", "v0", "up")
    ns.command("ip", "addr", "add", "198.18.0.1/24", "dev", "v0")
    route = ask(ns, lambda n: n.route_to(IPv4Address("198.18.0.9")))
    assert route.source == IPv4Address("198.18.0.1")
    assert route.gateway is None
    assert route.device_index == shown(ns, "link", "show", "v0")[0]["ifindex"]


def test_a_device_is_set_up_once(ns: Namespace) -> None:
    async def work(netlink: Netlink) -> list[bool]:
        return [await netlink.ensure_link_up("flannel0", mtu=1472, txqueuelen=1000) for _ in range(2)]

    assert ask(ns, work) == [True, False]
    (link,) = shown(ns, "link", "show", "flannel0")
    assert (link["mtu"], link["txqlen"], "UP" in link["flags"]) == (1472, 1000, True)
    assert ask(ns, lambda n: n.ensure_link_up("flannel0", mtu=1400))
    with pytest.raises(KernelError, match="cannot set mtu 10 of device v0: mtu less than device minimum"):
        ask(ns, lambda n: n.ensure_link_up("v0", mtu=10))
    with pytest.raises(KernelError, match="cannot set device none up: No such device"):
        ask(ns, lambda n: n.ensure_link_up("none"))


def test_an_address_is_the_only_one_inside_the_network(ns: Namespace) -> None:
    for stale in ("10.5.7.0/32", "10.5.8.1/24", "10.5.8.2/24", "198.18.0.1/24"):
        ns.command("ip", "addr", "add", stale, "dev", "flannel0")
    wanted = IPv4Interface("10.5.8.2/32")

    async def work(netlink: Netlink) -> list[bool]:
        return [await netlink.ensure_address("flannel0", wanted, sole_within=NETWORK) for _ in range(2)]

    assert ask(ns, work) == [True, False]
    (link,) = shown(ns, "-4", "addr", "show", "flannel0")
    assert [(a["local"], a["prefixlen"], a["scope"]) for a in link["addr_info"]] == [
        ("198.18.0.1", 24, "global"),
        ("10.5.8.2", 32, "global"),
    ]
    # without a network, others stay; with it they go, also where the wanted one is there already
    assert ask(ns, lambda n: n.ensure_address("flannel0", IPv4Interface("10.5.9.0/32")))
    assert ask(ns, lambda n: n.ensure_address("flannel0", wanted, sole_within=NETWORK))
    assert "10.5.9.0" not in ns.command("ip", "addr").stdout
    with pytest.raises(KernelError, match=r"cannot add address 10\.5\.8\.2/32 to device none: there is no device none"):
        ask(ns, lambda n: n.ensure_address("none", wanted))


def test_the_route_of_the_network_is_flannels(ns: Namespace) -> None:
    async def work(netlink: Netlink) -> list[bool]:
        await netlink.ensure_link_up("flannel0")
        return [await netlink.ensure_route(NETWORK, "flannel0") for _ in range(2)]

    assert ask(ns, work) == [True, False]
    (route,) = shown(ns, "route", "show", str(NETWORK))
    assert (route["dev"], route["scope"], route["protocol"]) == ("flannel0", "global", "boot")
    assert not {"via", "prefsrc", "metric"} & route.keys()


def test_a_route_set_by_hand_is_taken_as_it_is(ns: Namespace) -> None:
    ns.command("ip", "link", "set", "flannel0", "up")
    ns.command("ip", "route", "add", str(NETWORK), "dev", "flannel0", "scope", "link")
    before = ns.command("ip", "route").stdout
    assert not ask(ns, lambda n: n.ensure_route(NETWORK, "flannel0"))
    assert ns.command("ip", "route").stdout == before


@pytest.mark.parametrize("metric", ["0", "100"])
def test_a_route_held_by_another_device_is_named_and_stays(ns: Namespace, metric: str) -> None:
    ns.command("ip", "link", "set", "flannel0", "up")
    ns.command("ip", "link", "set", "v0", "up")
    ns.command("ip", "route", "add", str(NETWORK), "dev", "v0", "metric", metric)
    before = ns.command("ip", "route").stdout
    with pytest.raises(KernelError, match=r"cannot add route 10\.5\.0\.0/16 dev flannel0: device v0 holds"):
        ask(ns, lambda n: n.ensure_route(NETWORK, "flannel0"))
    assert ns.command("ip", "route").stdout == before
    # a longer or shorter prefix, or another table, is no conflict
    ns.command("ip", "route", "del", str(NETWORK))
    ns.command("ip", "route", "add", "10.5.0.0/17", "dev", "v0")
    ns.command("ip", "route", "add", "10.0.0.0/8", "dev", "v0")
    ns.command("ip", "route", "add", str(NETWORK), "dev", "v0", "table", "99")
    assert ask(ns, lambda n: n.ensure_route(NETWORK, "flannel0"))


def test_a_route_is_found_while_others_change(ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disturbed(rtnetlink.Scan):
        """Each list says that others changed the table meanwhile."""

        def take(self, buffer: bytes) -> None:
            super().take(buffer)
            self.flags |= rtnetlink.NLM_F_DUMP_INTR

    ns.command("ip", "link", "set", "flannel0", "up")
    assert ask(ns, lambda n: n.ensure_route(NETWORK, "flannel0"))
    monkeypatch.setattr(rtnetlink, "Scan", Disturbed)
    assert not ask(ns, lambda n: n.ensure_route(NETWORK, "flannel0"))
    with pytest.raises(KernelError, match="changed during each of 10 attempts"):
        ask(ns, lambda n: n.ensure_route(IPv4Network("10.6.0.0/16"), "flannel0"))


def test_a_blackhole_in_the_way_is_named(ns: Namespace) -> None:
    ns.command("ip", "link", "set", "flannel0", "up")
    ns.command("ip", "route", "add", "blackhole", str(NETWORK))
    with pytest.raises(KernelError, match="blackhole"):
        ask(ns, lambda n: n.ensure_route(NETWORK, "flannel0"))


def test_a_route_is_found_among_those_of_thousands_of_peers(ns: Namespace) -> None:
    ns.command("ip", "addr", "add", "198.18.0.2/15", "dev", "v0")
    ns.command("ip", "link", "set", "v0", "up")
    ns.command("ip", "link", "set", "flannel0", "up")
    peers = [f"route add 10.5.{n >> 2}.{(n & 3) << 6}/26 via 198.18.0.{3 + n % 4} dev v0" for n in range(1000)]
    others = [
        "route add 10.5.0.0/16 dev flannel0 metric 7",
        "route add 10.5.0.0/16 dev v0 table 9",
        "route add default via 198.18.0.9",
        "route add blackhole 10.6.0.0/16",
    ]
    ns.command("ip", "-batch", "-", stdin="\n".join(peers + others))

    async def work(n: Netlink) -> None:
        assert not await n.ensure_route(NETWORK, "flannel0")
        assert not await n.ensure_blackhole(IPv4Network("10.6.0.0/16"))
        assert await n.ensure_blackhole(IPv4Network("10.7.0.0/16"))
        assert [str(route.gateway) for route in await n.default_routes()] == ["198.18.0.9"]
        assert await n.default_routes(6) == ()

    ask(ns, work)
    assert [route["metric"] for route in shown(ns, "route", "show", "10.5.0.0/16")] == [7]


def test_a_device_that_is_down_takes_no_route(ns: Namespace) -> None:
    with pytest.raises(KernelError, match=r"cannot add route 10\.5\.0\.0/16 dev flannel0: .*nexthop is not up"):
        ask(ns, lambda n: n.ensure_route(NETWORK, "flannel0"))


def test_a_device_is_removed_once(ns: Namespace) -> None:
    assert ask(ns, lambda n: n.remove_link("flannel0"))
    assert not ask(ns, lambda n: n.remove_link("flannel0"))
    with pytest.raises(KernelError, match="cannot remove device lo: "):
        ask(ns, lambda n: n.remove_link("lo"))


def test_a_quiet_device_has_no_ipv6(ns: Namespace) -> None:
    assert ns.run(quiet_ipv6, "flannel0")
    assert ns.run(quiet_ipv6, "flannel0")
    ns.command("ip", "link", "set", "flannel0", "up")
    ns.command("ip", "link", "set", "v0", "up")
    assert shown(ns, "-6", "addr", "show", "flannel0") in ([], [{}])
    assert shown(ns, "-6", "addr", "show", "v0")[0]["addr_info"]  # where nobody asked, the kernel makes one
    with pytest.raises(KernelError, match="cannot set accept_ra of device none: No such file"):
        ns.run(quiet_ipv6, "none")


def test_a_read_only_proc_sys_is_told_and_is_no_error(ns: Namespace) -> None:
    code = "from dataplane.kernel.netlink import quiet_ipv6; print(quiet_ipv6('flannel0'))"
    process = ns.spawn_python(code, read_only=("/proc/sys",))
    stdout, _ = process.communicate(timeout=60)
    assert stdout.strip() == "False"


def test_calls_of_many_tasks_do_not_disturb_each_other(ns: Namespace) -> None:
    async def work(netlink: Netlink) -> list[object]:
        return list(await asyncio.gather(*(netlink.link(name) for name in ["v0", "v1", "none", "lo"] * 25)))

    found = ask(ns, work)
    assert [getattr(link, "name", None) for link in found] == ["v0", "v1", None, "lo"] * 25


def test_the_kernel_is_asked_whether_it_has_vxlan(ns: Namespace) -> None:
    before = shown(ns, "link")
    assert ask(ns, lambda n: n.has_vxlan())
    assert shown(ns, "link") == before


def vxlan_over(ns: Namespace, **changes: Any) -> Vxlan:
    lower = shown(ns, "link", "show", "v0")[0]["ifindex"]
    return dataclasses.replace(Vxlan(1, lower, IPv4Address("198.18.0.1"), 8472), **changes)


def test_a_vxlan_device_is_flannels(ns: Namespace) -> None:
    wanted = vxlan_over(ns)
    made = ask(ns, lambda n: n.ensure_vxlan("flannel.1", wanted, mac="", mtu=1400))
    assert (made.vxlan, made.mtu, made.udp_port) == (wanted, 1400, 8472)
    (link,) = shown(ns, "link", "show", "flannel.1")
    assert (link["mtu"], link["address"]) == (1400, made.address)
    assert int(made.address[:2], 16) & 3 == 2, "unicast, and locally administered"
    data = link["linkinfo"]["info_data"]
    assert (data["id"], data["local"], data["link"], data["port"]) == (1, "198.18.0.1", "v0", 8472)
    assert (data["learning"], data["udp_csum"], data["ttl"]) == (False, True, 0)
    assert not {"group", "remote", "gbp", "tos", "proxy", "rsc", "l2miss", "l3miss"} & data.keys()
    assert ask(ns, lambda n: n.ensure_vxlan("flannel.1", wanted, mac="", mtu=1400)) == made
    gbp = ask(ns, lambda n: n.ensure_vxlan("gbp", vxlan_over(ns, vni=2, gbp=True), mac="", mtu=1450))
    assert gbp.vxlan == vxlan_over(ns, vni=2, gbp=True)


def test_a_vxlan_device_is_changed_in_place_as_far_as_the_kernel_can(ns: Namespace) -> None:
    made = ask(ns, lambda n: n.ensure_vxlan("flannel.1", vxlan_over(ns), mac="", mtu=1450))
    ns.command("ip", "link", "set", "flannel.1", "up")
    fdb = "bridge fdb replace 0a:00:00:00:00:01 dev flannel.1 dst 198.18.0.9 self permanent"
    ns.command(*fdb.split())
    other = shown(ns, "link", "show", "v1")[0]["ifindex"]
    moved = vxlan_over(ns, lower=other, local=IPv4Address("198.18.0.2"), learning=True)
    changed = ask(ns, lambda n: n.ensure_vxlan("flannel.1", moved, mac="02:00:00:00:00:07", mtu=1300))
    assert (changed.index, changed.vxlan, changed.mtu, changed.address) == (
        made.index, moved, 1300, "02:00:00:00:00:07",
    )  # fmt: skip
    (link,) = shown(ns, "link", "show", "flannel.1")
    assert (link["mtu"], link["address"], "UP" in link["flags"]) == (1300, "02:00:00:00:00:07", True)
    assert ask(ns, lambda n: n.link("flannel.1")) == changed
    assert "198.18.0.9" in ns.command("bridge", "fdb", "show", "dev", "flannel.1").stdout, "entries stay"


@pytest.mark.parametrize(
    "changes", [{"vni": 2}, {"port": 4789}, {"gbp": True}, {"local": IPv6Address("fd00:198:18::1")}]
)
def test_another_kind_of_vxlan_is_made_anew_with_the_same_mac(ns: Namespace, changes: dict[str, Any]) -> None:
    made = ask(ns, lambda n: n.ensure_vxlan("flannel.1", vxlan_over(ns), mac="", mtu=1400))
    wanted = vxlan_over(ns, **changes)
    again = ask(ns, lambda n: n.ensure_vxlan("flannel.1", wanted, mac="", mtu=1400))
    assert again.index != made.index
    assert (again.vxlan, again.address) == (wanted, made.address)


def test_one_with_a_multicast_group_is_not_ours(ns: Namespace) -> None:
    line = "ip link add flannel.1 type vxlan id 1 dstport 8472 group 239.1.1.1 dev v0"
    ns.command(*line.split())
    wanted = vxlan_over(ns)
    assert ask(ns, lambda n: n.ensure_vxlan("flannel.1", wanted, mac="", mtu=1400)).vxlan == wanted


def test_who_is_in_the_way_of_a_vxlan_device_is_named(ns: Namespace) -> None:
    line = "ip link add other type vxlan id 1 dstport 8472 local 198.18.0.9 dev v0"
    ns.command(*line.split())
    with pytest.raises(KernelError, match="device other has VNI 1 on port 8472 already; remove it, or use another VNI"):
        ask(ns, lambda n: n.ensure_vxlan("flannel.1", vxlan_over(ns), mac="", mtu=1400))
    with pytest.raises(KernelError, match="a tun device has that name"):
        ask(ns, lambda n: n.ensure_vxlan("flannel0", vxlan_over(ns, vni=2), mac="", mtu=1400))
    assert ask(ns, lambda n: n.link("flannel.1")) is None


def test_addresses_and_routes_of_ipv6(ns: Namespace) -> None:
    async def work(netlink: Netlink) -> None:
        await netlink.ensure_link_up("v0")
        for stale in ("fd00:5:7::/128", "fd00:5:8::1/64"):
            await netlink.ensure_address("v0", IPv6Interface(stale))
        wanted, network = IPv6Interface("fd00:5:8::/128"), IPv6Network("fd00:5::/32")
        assert await netlink.ensure_address("v0", wanted, sole_within=network)
        assert not await netlink.ensure_address("v0", wanted, sole_within=network)
        own = [a.interface for a in await netlink.addresses() if a.interface.ip in network]
        assert own == [wanted]
        assert await netlink.ensure_route(IPv6Network("fd00:6::/48"), "v0")
        assert not await netlink.ensure_route(IPv6Network("fd00:6::/48"), "v0")
        assert await netlink.default_routes(6) == ()

    ask(ns, work)
    (address,) = [a for a in shown(ns, "-6", "addr", "show", "v0")[0]["addr_info"] if a["scope"] == "global"]
    assert (address["local"], address["prefixlen"], "tentative" in address) == ("fd00:5:8::", 128, False)
    ns.command("ip", *["-6", "route", "add", "default", "via", "fe80::1", "dev", "v0", "metric", "7"])
    (route,) = ask(ns, lambda n: n.default_routes(6))
    assert (str(route.gateway), route.metric) == ("fe80::1", 7)


def test_router_advertisements_are_refused_and_ipv6_stays(ns: Namespace) -> None:
    assert ns.run(refuse_router_advertisements, "v0")
    settings = ns.command("sysctl", "net.ipv6.conf.v0.accept_ra", "net.ipv6.conf.v0.disable_ipv6").stdout.split()
    assert settings[2::3] == ["0", "0"]


def test_without_the_privilege_the_error_says_what_to_do(ns: Namespace) -> None:
    code = """
import asyncio
from dataplane.kernel.netlink import Netlink
async def main():
    await (await Netlink.open()).ensure_link_up("v0")
asyncio.run(main())
"""
    process = ns.spawn_python(code)
    process.communicate(timeout=60)
    assert process.returncode == 0  # the same with the privilege works

    ns.command("ip", "link", "set", "v0", "down")
    process = ns.spawn_python(code, dropped=("net_admin",))
    _, stderr = process.communicate(timeout=60)
    assert "cannot set state up of device v0: Operation not permitted; run as root or with CAP_NET_ADMIN" in stderr
