"""The kernel vxlan backend on one node: exactly flannel's entries, kept through whatever happens to them."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from dataplane.backend.kernel_vxlan import KernelVxlanBackend
from dataplane.errors import ConfigError, KernelError
from dataplane.kernel import events as kernel_events
from dataplane.kernel.netlink import Netlink
from dataplane.kernel.rtnetlink import Scope, Table
from dataplane.kernel.tables import Listing, Tables
from dataplane.lease.model import Lease, LeaseEvent, LeaseEventKind, LeaseKey
from dataplane.netconf import NetworkConfig, VxlanConfig
from tests.backend.one_node import (
    added,
    calm,
    facing,
    fdb,
    mac_of,
    neighbours,
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

DEVICE = "flannel.1"


def make(ns: Namespace, netlink: Netlink, config: NetworkConfig, **underlay: Any) -> KernelVxlanBackend:
    assert isinstance(config.backend, VxlanConfig)
    return KernelVxlanBackend(facing(ns, **underlay), config, config.backend, netlink)


@asynccontextmanager
async def running(
    ns: Namespace, netlink: Netlink, *peers: Lease, v6: bool = False, **options: Any
) -> AsyncIterator[KernelVxlanBackend]:
    """A backend that has its lease and knows `peers`."""
    backend = make(ns, netlink, network(v6=v6, Type="vxlan", **options))
    try:
        await backend.prepare()
        await backend.attach(own_lease(v6=v6))
        await backend.apply(added(peers))
        yield backend
    finally:
        await backend.close()
        await backend.close()


Work = Callable[[KernelVxlanBackend], Awaitable[None]]


def with_peers(ns: Namespace, work: Work, *peers: Lease, **options: Any) -> None:
    async def main(netlink: Netlink) -> None:
        async with running(ns, netlink, *peers, **options) as backend:
            await work(backend)

    on_node(ns, main)


def stands(ns: Namespace, *peers: Lease) -> bool:
    """The kernel has these IPv4 peers' entries, and no others."""
    return (
        neighbours(ns, DEVICE) == {str(p.key.subnet.network_address): mac_text(p) for p in peers}
        and fdb(ns, DEVICE) == {mac_text(p): str(p.attrs.public_ip) for p in peers}
        and routes(ns) == {str(p.key.subnet): (str(p.key.subnet.network_address), DEVICE) for p in peers}
    )


def mac_text(lease: Lease) -> str:
    return str(json.loads(lease.attrs.backend_data)["VtepMAC"])


def device(ns: Namespace, name: str = DEVICE) -> Any:
    (link,) = shown(ns, "ip", "addr", "show", name)
    return link


# --- what is made ---------------------------------------------------------------------------------------------


def test_device_lease_and_entries_are_flannels(ns: Namespace) -> None:
    async def work(netlink: Netlink) -> None:
        backend = make(ns, netlink, network(Type="vxlan"))
        assert backend.mtu == 1450
        attrs = await backend.prepare()
        mac = device(ns)["address"]
        data = f'{{"VNI":1,"VtepMAC":"{mac}"}}'
        expected = f'{{"PublicIP":"198.18.0.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{data}}}'
        assert attrs.encode().decode() == expected
        await backend.attach(own_lease())
        await backend.apply(added([peer(2), peer(3)]))
        status = backend.status()
        await backend.close()
        assert (status.type, status.dataplane, status.device, status.mtu) == ("vxlan", "kernel", DEVICE, 1450)
        assert {str(p.subnet): str(p.public_ip) for p in status.peers} == {
            "10.5.2.0/24": "198.18.0.2", "10.5.3.0/24": "198.18.0.3",
        }  # fmt: skip
        assert not any(p.counted or p.direct for p in status.peers)
        assert (status.ignored, status.repairs) == ({}, 0)

    on_node(ns, work)
    link = device(ns)
    assert (link["mtu"], "UP" in link["flags"]) == (1450, True)
    assert [(a["local"], a["prefixlen"]) for a in link["addr_info"] if a["family"] == "inet"] == [("10.5.1.0", 32)]
    data = link["linkinfo"]["info_data"]
    assert (data["id"], data["local"], data["link"], data["port"], data["learning"]) == (
        1, "198.18.0.1", "eth0", 8472, False,
    )  # fmt: skip
    assert ns.command("sysctl", "-n", f"net.ipv6.conf.{DEVICE}.accept_ra".replace(DEVICE, "flannel/1")).stdout == "0\n"
    assert stands(ns, peer(2), peer(3)), "also after an ordered stop: packets go on"


def test_options_of_the_net_conf_are_honoured(ns: Namespace) -> None:
    async def work(backend: KernelVxlanBackend) -> None:
        assert backend.mtu == 1350
        data = shown(ns, "ip", "link", "show", "flannel.7")[0]["linkinfo"]["info_data"]
        assert (data["id"], data["port"], data["learning"], data["gbp"]) == (7, 4789, True, True)

    with_peers(ns, work, VNI=7, Port=4789, MTU=1400, GBP=True, Learning=True)


def test_both_families_have_a_device_each_and_the_right_mtu(ns: Namespace) -> None:
    peers = [peer(2, v6=True), peer(3, v6=True)]

    async def work(backend: KernelVxlanBackend) -> None:
        assert backend.mtu == 1430, "what a pod may send whichever way it goes; flannel says 1450"
        assert (device(ns)["mtu"], device(ns, "flannel-v6.1")["mtu"]) == (1450, 1430)
        own = [a for a in device(ns, "flannel-v6.1")["addr_info"] if a["scope"] == "global"]
        assert [(a["local"], a["prefixlen"]) for a in own] == [("fd00:5:0:1::", 128)]
        assert stands(ns, *peers)
        assert neighbours(ns, "flannel-v6.1") == {
            "fd00:5:0:2::": mac_of(2).hex(":"), "fd00:5:0:3::": mac_of(3).hex(":"),
        }  # fmt: skip
        assert fdb(ns, "flannel-v6.1") == {
            mac_of(2).hex(":"): "fd00:198:18::2", mac_of(3).hex(":"): "fd00:198:18::3",
        }  # fmt: skip
        assert routes(ns, 6) == {
            "fd00:5:0:2::/64": ("fd00:5:0:2::", "flannel-v6.1"), "fd00:5:0:3::/64": ("fd00:5:0:3::", "flannel-v6.1"),
        }  # fmt: skip
        await backend.apply(removed(peers[0]))
        assert stands(ns, peers[1])
        assert routes(ns, 6) == {"fd00:5:0:3::/64": ("fd00:5:0:3::", "flannel-v6.1")}

    with_peers(ns, work, *peers, v6=True)


def test_ipv6_alone(ns: Namespace) -> None:
    async def work(netlink: Netlink) -> None:
        config = network(v4=False, v6=True, Type="vxlan")
        backend = make(ns, netlink, config, address=IPv4Address(0), public_ip=IPv4Address(0))
        attrs = await backend.prepare()
        assert (str(attrs.public_ip), attrs.backend_data) == ("0.0.0.0", b"")
        assert json.loads(attrs.backend_v6_data)["VtepMAC"] == device(ns, "flannel-v6.1")["address"]
        await backend.attach(own_lease(v6=True))
        await backend.apply(added([peer(2, v6=True)]))
        assert backend.mtu == 1430
        assert routes(ns) == {}
        assert routes(ns, 6) == {"fd00:5:0:2::/64": ("fd00:5:0:2::", "flannel-v6.1")}
        await backend.close()

    on_node(ns, work)


@pytest.mark.parametrize(
    ("underlay", "v6", "reason"),
    [
        ({"public_ipv6": None}, True, "IPv6 of the overlay needs an IPv6 underlay, and interface eth0 has no"),
        ({"public_ip": IPv4Address(0)}, False, "IPv4 of the overlay needs an IPv4 underlay"),
        ({"mtu": 1349}, True, "interface eth0 takes 1349 bytes: IPv6 in VXLAN needs 1350"),
        ({"mtu": 117}, False, "interface eth0 takes 117 bytes: IPv4 in VXLAN needs 118"),
    ],
)
def test_an_underlay_that_cannot_carry_it_is_refused(
    ns: Namespace, underlay: dict[str, Any], v6: bool, reason: str
) -> None:
    async def work(netlink: Netlink) -> None:
        with pytest.raises(ConfigError, match=reason):
            make(ns, netlink, network(v6=v6, Type="vxlan"), **underlay)

    on_node(ns, work)


def test_who_holds_the_port_is_named(ns: Namespace) -> None:
    async def work(netlink: Netlink) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
            holder.bind(("0.0.0.0", 8472))
            with pytest.raises(KernelError, match=r"8472: process .* \(pid \d+\) holds it"):
                await make(ns, netlink, network(Type="vxlan")).prepare()

    on_node(ns, work)


# --- following leases -----------------------------------------------------------------------------------------


def test_a_changed_mac_leaves_no_old_fdb_entry(ns: Namespace) -> None:
    async def work(backend: KernelVxlanBackend) -> None:
        changed = peer(2, mac=mac_of(77))
        await backend.apply([LeaseEvent(LeaseEventKind.CHANGED, changed, peer(2))])
        assert stands(ns, changed, peer(3))
        moved = peer(2, mac=mac_of(77), ip="198.18.9.9")
        await backend.apply([LeaseEvent(LeaseEventKind.CHANGED, moved, changed)])
        assert stands(ns, moved, peer(3))
        await backend.apply(removed(moved))
        assert stands(ns, peer(3))
        await backend.apply(removed(moved))
        assert stands(ns, peer(3))

    with_peers(ns, work, peer(2), peer(3))


def test_a_node_that_takes_another_subnet_keeps_its_fdb_entry(ns: Namespace) -> None:
    async def work(backend: KernelVxlanBackend) -> None:
        for batch in (1, 2):
            # one MAC, in a new lease: the old one goes in the same batch, before or after
            old, new = peer(1 + batch, mac=mac_of(9)), peer(2 + batch, mac=mac_of(9))
            events = [*removed(old), *added([new])]
            await backend.apply(events if batch == 1 else events[::-1])
            assert stands(ns, new)

    with_peers(ns, work, peer(2, mac=mac_of(9)))


def test_leases_that_cannot_be_obeyed_put_nothing_in(ns: Namespace) -> None:
    async def work(backend: KernelVxlanBackend) -> None:
        own = bytes.fromhex(device(ns)["address"].replace(":", ""))
        hostile = [
            peer(4, kind="host-gw"),
            peer(5, mac=own),
            peer(6, mac=bytes.fromhex("010000000006")),
            peer(7, mac=mac_of(2)),
        ]
        await backend.apply(added(hostile))
        assert stands(ns, peer(2))
        reasons = {str(subnet): reason for subnet, reason in backend.status().ignored.items()}
        assert reasons.keys() == {f"10.5.{number}.0/24" for number in (4, 5, 6, 7)}
        assert "is that of 10.5.2.0/24, which is the older lease" in reasons["10.5.7.0/24"]
        await backend.apply(removed(peer(2)))
        assert stands(ns, peer(7, mac=mac_of(2))), "the younger lease comes in when the older one goes"

    with_peers(ns, work, peer(2))


# --- a start meets what stands there --------------------------------------------------------------------------


def test_a_start_takes_over_what_is_right_and_clears_what_is_stale(ns: Namespace) -> None:
    async def first(backend: KernelVxlanBackend) -> None:
        assert stands(ns, peer(2), peer(3), peer(4))

    with_peers(ns, first, peer(2), peer(3), peer(4))
    before = device(ns)
    ns.command("ip", "route", "del", "10.5.3.0/24")
    foreign = [
        f"addr add 10.5.99.0/32 dev {DEVICE}",
        "route add 192.0.2.0/24 via 198.18.0.7",
        "route add 10.5.200.0/24 via 198.18.0.7",
        f"route add 192.0.3.0/24 dev {DEVICE}",
    ]
    for line in foreign:
        ns.command("ip", *line.split())
    monitor = ns.spawn("ip", "monitor", "route", "neigh")

    async def second(backend: KernelVxlanBackend) -> None:
        after = device(ns)
        assert (after["ifindex"], after["address"]) == (before["ifindex"], before["address"])
        assert [a["local"] for a in after["addr_info"] if a["family"] == "inet"] == ["10.5.1.0"]
        assert neighbours(ns, DEVICE).keys() == {"10.5.2.0", "10.5.3.0"}
        assert fdb(ns, DEVICE).keys() == {mac_of(2).hex(":"), mac_of(3).hex(":")}
        assert routes(ns).keys() == {
            "10.5.2.0/24", "10.5.3.0/24", "192.0.2.0/24", "10.5.200.0/24", "192.0.3.0/24",
        }, "what is not ours stays"  # fmt: skip
        assert backend.status().repairs == 0

    with_peers(ns, second, peer(2), peer(3))
    monitor.terminate()
    said = monitor.communicate(timeout=20)[0]
    assert "10.5.4.0" in said
    assert "10.5.2.0" not in said, "what was right was not touched"


def test_a_start_that_cannot_read_the_kernel_at_first_is_made_up_for(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing_more(_: KernelVxlanBackend) -> None:
        assert stands(ns, peer(2), peer(3))

    with_peers(ns, nothing_more, peer(2), peer(3))
    listing, refusals = Tables.listing, ["no buffer space"]

    async def refused(self: Tables, scope: Scope, *rest: Any) -> Listing:
        if refusals:
            raise KernelError(refusals.pop())
        return await listing(self, scope, *rest)

    async def work(backend: KernelVxlanBackend) -> None:
        assert not refusals
        await backend.apply(added([peer(4)]))
        await until("only what is wanted stands", lambda: stands(ns, peer(3), peer(4)))

    monkeypatch.setattr(Tables, "listing", refused)
    with_peers(ns, work, peer(3))


def test_before_the_peers_are_known_nothing_is_taken_away(ns: Namespace) -> None:
    async def first(backend: KernelVxlanBackend) -> None:
        assert stands(ns, peer(2))

    with_peers(ns, first, peer(2))

    async def second(netlink: Netlink) -> None:
        backend = make(ns, netlink, network(Type="vxlan"))
        await backend.prepare()
        await backend.attach(own_lease())
        ns.command("ip", "link", "set", DEVICE, "mtu", "1300")
        await until("the MTU is right", lambda: device(ns)["mtu"] == 1450)
        assert stands(ns, peer(2))
        await backend.apply([])
        assert stands(ns), "the first snapshot had no peers: they are gone"
        await backend.close()

    on_node(ns, second)


def test_a_killed_userspace_daemons_device_makes_room(ns: Namespace) -> None:
    ns.command("ip", *f"tuntap add dev {DEVICE} mode tun".split())
    ns.command("ip", *["tuntap", "add", "dev", "flannel0", "mode", "tun"])
    ns.command("ip", *["addr", "add", "10.5.1.0/32", "dev", "flannel0"])
    ns.command("ip", *["tuntap", "add", "dev", "flannel3", "mode", "tun"])

    async def work(backend: KernelVxlanBackend) -> None:
        assert stands(ns, peer(2))
        names = {link["ifname"] for link in shown(ns, "ip", "link")}
        assert names & {"flannel0", "flannel3"} == {"flannel3"}, "a device that has nothing of this network stays"

    with_peers(ns, work, peer(2))


# --- others take things away ----------------------------------------------------------------------------------

TAKEN = {
    "the device": f"ip link del {DEVICE}",
    "the device is down": f"ip link set {DEVICE} down",
    "its address": f"ip addr flush dev {DEVICE}",
    "its MAC": f"ip link set {DEVICE} address 02:00:00:00:00:99",
    "its MTU": f"ip link set {DEVICE} mtu 1300",
    "its local address": f"ip link set {DEVICE} type vxlan local 198.18.0.77 dev eth0",
    "all routes": f"ip route flush dev {DEVICE}",
    "a route is another's": "ip route replace 10.5.3.0/24 via 198.18.0.7",
    "all neighbours": f"ip neigh flush dev {DEVICE} nud permanent",
    "a neighbour has another MAC": f"ip neigh replace 10.5.3.0 lladdr 02:00:00:00:00:99 dev {DEVICE} nud permanent",
    "a neighbour is not permanent": f"ip neigh replace 10.5.3.0 lladdr 02:00:00:00:00:99 dev {DEVICE} nud reachable",
    "an FDB entry": f"bridge fdb del {mac_of(3).hex(':')} dev {DEVICE} dst 198.18.0.3 self",
    "an FDB entry leads elsewhere": f"bridge fdb replace {mac_of(3).hex(':')} dev {DEVICE} dst 198.18.0.77 self",
    "a stray FDB entry": f"bridge fdb add 02:00:00:00:00:99 dev {DEVICE} dst 198.18.0.77 self permanent",
    "a stray route": f"ip route add 10.5.99.0/24 via 10.5.99.0 dev {DEVICE} onlink",
}


@pytest.mark.parametrize("what", TAKEN)
def test_what_others_take_away_comes_back_complete(ns: Namespace, what: str) -> None:
    peers = [peer(number) for number in range(2, 12)]

    async def work(backend: KernelVxlanBackend) -> None:
        before = device(ns)
        assert stands(ns, *peers)
        await calm()
        ns.command(*TAKEN[what].split())

        def whole() -> bool:
            links = [link for link in shown(ns, "ip", "addr") if link["ifname"] == DEVICE]
            data = [(k["address"], k["mtu"], "UP" in k["flags"], k["linkinfo"]["info_data"]) for k in links]
            own = [a["local"] for k in links for a in k["addr_info"] if a["family"] == "inet"]
            expected = (before["address"], 1450, True, before["linkinfo"]["info_data"])
            return data == [expected] and own == ["10.5.1.0"] and stands(ns, *peers)

        await until(f"whole again after: {what}", whole)
        assert backend.status().repairs > 0

    with_peers(ns, work, *peers)


def test_the_ipv6_device_is_watched_too(ns: Namespace) -> None:
    peers = [peer(number, v6=True) for number in (2, 3)]

    async def work(backend: KernelVxlanBackend) -> None:
        before = device(ns, "flannel-v6.1")
        for line in (
            "ip link del flannel-v6.1",
            "ip -6 route flush proto boot",
            "ip -6 neigh flush dev flannel-v6.1 nud permanent",
        ):
            await calm()
            ns.command(*line.split())
            await until(
                f"whole again after: {line}",
                lambda: len(routes(ns, 6)) == len(neighbours(ns, "flannel-v6.1")) == len(fdb(ns, "flannel-v6.1")) == 2,
            )
        assert device(ns, "flannel-v6.1")["address"] == before["address"]

    with_peers(ns, work, *peers, v6=True)


def test_an_overrun_leads_to_an_audit_at_once(ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_events, "BUFFER_BYTES", 4096)
    peers = [peer(number) for number in range(2, 12)]

    async def work(backend: KernelVxlanBackend) -> None:
        await calm()
        # in the loop's own thread, so that nothing is read before the events of it do not fit any more
        lines = [f"route add 10.6.{number}.0/24 dev eth0" for number in range(256)]
        ns.command("ip", "-batch", "-", stdin="\n".join([*lines, f"route flush dev {DEVICE}"]))
        await until("the routes are back", lambda: len(routes(ns)) == 256 + len(peers))

    with_peers(ns, work, *peers)


def test_leases_are_followed_while_the_kernel_is_read(ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read is older than what was followed meanwhile, and undoes nothing of it; the rest is put right."""
    reading, read_on = asyncio.Event(), asyncio.Event()
    listing = Tables.listing

    async def slowly(self: Tables, scope: Scope, *rest: Any) -> Listing:
        found = await listing(self, scope, *rest)
        if scope.table is Table.ROUTE:  # the last one
            reading.set()
            await read_on.wait()
        return found

    async def work(backend: KernelVxlanBackend) -> None:
        await calm()
        monkeypatch.setattr(Tables, "listing", slowly)
        ns.command("ip", "neigh", "del", "10.5.5.0", "dev", DEVICE)
        async with asyncio.timeout(20):
            await reading.wait()
        moved = peer(2, ip="198.18.0.99", mac=mac_of(99))
        changes = [*added([moved, peer(6)]), *removed(peer(3))]
        async with asyncio.timeout(20):
            await backend.apply(changes)
        now = (moved, peer(4), peer(6))
        assert fdb(ns, DEVICE) == {mac_text(p): str(p.attrs.public_ip) for p in (*now, peer(5))}
        monkeypatch.undo()
        read_on.set()
        await until("the neighbour is back", lambda: stands(ns, *now, peer(5)))
        await calm()
        assert stands(ns, *now, peer(5))
        assert backend.status().repairs == 1

    with_peers(ns, work, *(peer(number) for number in (2, 3, 4, 5)))


def test_the_underlays_device_comes_back_as_another(ns: Namespace) -> None:
    async def work(backend: KernelVxlanBackend) -> None:
        mac = device(ns)["address"]
        ns.command("ip", "link", "del", "eth0")
        assert not [link for link in shown(ns, "ip", "link") if link["ifname"] == DEVICE], "the kernel takes it along"
        for line in ("link add eth0 type veth peer name wire", "link set wire up", "link set eth0 up"):
            ns.command("ip", *line.split())
        ns.command("ip", "addr", "add", "198.18.0.1/15", "dev", "eth0")
        attrs = await backend.move(facing(ns))
        assert json.loads(attrs.backend_data)["VtepMAC"] == mac == device(ns)["address"]
        assert stands(ns, peer(2))

    with_peers(ns, work, peer(2))


def test_the_underlays_address_and_mtu_change(ns: Namespace) -> None:
    async def work(backend: KernelVxlanBackend) -> None:
        before = device(ns)
        ns.command("ip", "addr", "add", "198.18.5.5/15", "dev", "eth0")
        ns.command("ip", "link", "set", "eth0", "mtu", "1400")
        moved = facing(ns, address=IPv4Address("198.18.5.5"), public_ip=IPv4Address("198.18.5.5"))
        attrs = await backend.move(moved)
        assert str(attrs.public_ip) == "198.18.5.5"
        after = device(ns)
        assert (after["ifindex"], after["address"]) == (before["ifindex"], before["address"])
        assert (after["mtu"], backend.mtu) == (1350, 1350)
        assert after["linkinfo"]["info_data"]["local"] == "198.18.5.5"
        assert stands(ns, peer(2))

    with_peers(ns, work, peer(2))


# --- DirectRouting --------------------------------------------------------------------------------------------


def test_direct_routing_is_remembered_and_decided_anew(ns: Namespace) -> None:
    near, far = peer(2), peer(3, ip="192.0.2.3")
    ns.command("ip", *["route", "add", "192.0.2.0/24", "via", "198.18.0.7"])

    async def work(backend: KernelVxlanBackend) -> None:
        direct = {"10.5.2.0/24": ("198.18.0.2", "eth0")}
        tunnelled = {"10.5.3.0/24": ("10.5.3.0", DEVICE)}
        underlay = {"192.0.2.0/24": ("198.18.0.7", "eth0")}
        assert routes(ns) == direct | tunnelled | underlay
        assert fdb(ns, DEVICE) == {mac_text(far): "192.0.2.3"}
        assert {str(p.subnet): p.direct for p in backend.status().peers} == {"10.5.2.0/24": True, "10.5.3.0/24": False}
        # the far one moves next door
        await calm()
        ns.command("ip", *["route", "replace", "192.0.2.0/24", "dev", "eth0"])
        await until("the far one is direct", lambda: routes(ns).get("10.5.3.0/24") == ("192.0.2.3", "eth0"))
        await until("nothing of the tunnel is left", lambda: fdb(ns, DEVICE) == neighbours(ns, DEVICE) == {})
        # and away again
        await calm()
        ns.command("ip", *["route", "replace", "192.0.2.0/24", "via", "198.18.0.7"])
        await until("the far one is in the tunnel", lambda: stands_both(near, far))
        # a direct route that others take away
        await calm()
        ns.command("ip", *["route", "del", "10.5.2.0/24"])
        await until("the direct route is back", lambda: stands_both(near, far))
        await backend.apply(removed(near, far))
        assert routes(ns) == underlay

    def stands_both(near: Lease, far: Lease) -> bool:
        return (
            routes(ns).get("10.5.2.0/24") == ("198.18.0.2", "eth0")
            and routes(ns).get("10.5.3.0/24") == ("10.5.3.0", DEVICE)
            and fdb(ns, DEVICE) == {mac_text(far): "192.0.2.3"}
            and neighbours(ns, DEVICE) == {"10.5.3.0": mac_text(far)}
        )

    with_peers(ns, work, near, far, DirectRouting=True)


def test_direct_routes_of_gone_peers_go_at_a_start(ns: Namespace) -> None:
    async def first(backend: KernelVxlanBackend) -> None:
        assert len(routes(ns)) == 2

    with_peers(ns, first, peer(2), peer(3), DirectRouting=True)

    async def second(backend: KernelVxlanBackend) -> None:
        assert routes(ns) == {"10.5.3.0/24": ("198.18.0.3", "eth0")}

    with_peers(ns, second, peer(3), DirectRouting=True)

    async def third(backend: KernelVxlanBackend) -> None:
        assert stands(ns, peer(3)), "and without DirectRouting the tunnel takes the route over"

    with_peers(ns, third, peer(3))


# --- many -----------------------------------------------------------------------------------------------------


def test_ten_thousand_peers(ns: Namespace) -> None:
    """Figures are printed, not asserted."""
    config = network(Type="vxlan")
    leases = []
    for number in range(2, 10_002):
        one = peer(2, ip=str(IPv4Address(0xC6120000 + number)), mac=mac_of(number))
        key = LeaseKey(IPv4Network((0x0A050200 + (number << 2), 30)))
        leases.append(Lease(key, one.attrs, number, number))

    async def work(netlink: Netlink) -> None:
        backend = make(ns, netlink, config)
        await backend.prepare()
        await backend.attach(own_lease())
        clock, cpu = time.perf_counter(), time.process_time()
        await backend.apply(added(leases))
        sys.stdout.write(
            f"\n{len(leases)} peers followed in {time.perf_counter() - clock:.2f} s,"
            f" {time.process_time() - cpu:.2f} s of CPU"
        )
        assert len(fdb(ns, DEVICE)) == len(neighbours(ns, DEVICE)) == len(routes(ns)) == len(leases)
        await asyncio.sleep(0.5)
        repairs = backend.status().repairs
        assert repairs == 0, "our own changes are no alarm"
        cpu = time.process_time()
        await backend._entries._look()
        sys.stdout.write(f"\naudit: {(time.process_time() - cpu) * 1000:.0f} ms of CPU")
        ns.command("ip", "route", "flush", "dev", DEVICE)
        clock = time.perf_counter()
        await until("all routes are back", lambda: len(routes(ns)) == len(leases), 60)
        sys.stdout.write(f"\n{len(leases)} routes back in less than {time.perf_counter() - clock:.2f} s\n")
        await backend.apply(removed(*leases))
        assert routes(ns) == {}
        await backend.close()

    on_node(ns, work)
