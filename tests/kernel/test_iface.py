"""The choice of the underlay: flannel's order of preference, and what the operator reads when nothing fits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.backend.base import Underlay
from dataplane.errors import ConfigError
from dataplane.kernel.facts import Address, Link, Route
from dataplane.kernel.iface import Surroundings, Wanted, choose, stay
from dataplane.kernel.netlink import Netlink
from tests.namespaces import open_namespace

LO = Link(1, "lo", "", 65536, True, True, "00:00:00:00:00:00")
ETH0 = Link(2, "eth0", "", 1500, True, True, "02:00:00:00:00:01")
ETH1 = Link(3, "eth1", "veth", 9000, True, True, "02:00:00:00:00:02")
MISSING_ADDRESS = "error looking up interface 198.18.9.9: No interface with given IP found"
LINKS = [LO, ETH0, ETH1]


def address(
    link: Link, text: str, *, permanent: bool = True, deprecated: bool = False, secondary: bool = False
) -> Address:
    return Address(link.index, ip_interface(text), 0, permanent, deprecated, secondary)


ADDRESSES = [
    address(LO, "127.0.0.1/8"),
    address(ETH0, "198.18.0.1/24"),
    address(ETH0, "fd00::1/64"),
    address(ETH1, "198.18.1.1/24"),
    address(ETH1, "198.18.1.2/24", secondary=True),
]


def default_route(link: Link, metric: int = 0) -> Route:
    return Route(IPv4Network("0.0.0.0/0"), IPv4Address("198.18.0.254"), link.index, None, 254, metric, 0)


def default_route_v6(link: Link) -> Route:
    return Route(IPv6Network("::/0"), IPv6Address("fe80::1"), link.index, None, 254, 1024, 0)


def pick(
    *names: str,
    public_ip: str = "",
    public_ipv6: str = "",
    patterns: tuple[str, ...] = (),
    can_reach: str = "",
    reach: Route | None = None,
    families: tuple[int, ...] = (4,),
    links: list[Link] = LINKS,
    addresses: list[Address] = ADDRESSES,
    routes: tuple[Route, ...] = (default_route(ETH1), default_route(ETH0, 100)),
    routes_v6: tuple[Route, ...] = (),
) -> Underlay:
    wanted = Wanted(
        names,
        patterns,
        ip_address(can_reach) if can_reach else None,
        IPv4Address(public_ip) if public_ip else None,
        IPv6Address(public_ipv6) if public_ipv6 else None,
        v4=4 in families,
        v6=6 in families,
    )
    return choose(wanted, Surroundings(links, addresses, routes, routes_v6, reach))


def test_without_flags_the_first_default_route_decides() -> None:
    assert pick() == Underlay("eth1", 3, IPv4Address("198.18.1.1"), IPv4Address("198.18.1.1"), 9000)
    assert pick(routes=(default_route(ETH0),)).name == "eth0"


def test_a_public_ip_that_is_configured_here_decides_before_the_route() -> None:
    chosen = pick(public_ip="198.18.0.1")
    assert (chosen.name, chosen.address, chosen.public_ip) == ("eth0", *[IPv4Address("198.18.0.1")] * 2)
    assert pick(public_ip="198.18.1.2").address == IPv4Address("198.18.1.2")
    assert pick(public_ip="198.18.1.2", routes=()).name == "eth1"


def test_a_public_ip_that_the_named_interface_has_is_the_one_to_send_from() -> None:
    chosen = pick("eth1", public_ip="198.18.1.2")
    assert (chosen.name, *map(str, (chosen.address, chosen.public_ip))) == ("eth1", "198.18.1.2", "198.18.1.2")
    chosen = pick("198.18.1.1", public_ip="198.18.1.2")
    assert tuple(map(str, (chosen.address, chosen.public_ip))) == ("198.18.1.1", "198.18.1.2"), "said otherwise"
    behind_nat = pick("eth0", public_ip="198.18.1.2")
    around = Surroundings(LINKS, [*ADDRESSES, address(ETH0, "198.18.1.2/24", secondary=True)])
    configured = pick("eth0", public_ip="198.18.1.2", addresses=[*around.addresses[:3], around.addresses[-1]])
    assert stay(behind_nat, configured, around) == behind_nat, "what is published does not change with it"


def test_behind_nat_the_public_ip_is_only_published() -> None:
    chosen = pick(public_ip="198.19.0.1")
    assert (chosen.name, str(chosen.address), str(chosen.public_ip)) == ("eth1", "198.18.1.1", "198.19.0.1")
    chosen = pick("eth0", public_ip="198.19.0.1")
    assert (chosen.name, str(chosen.address), str(chosen.public_ip)) == ("eth0", "198.18.0.1", "198.19.0.1")
    # a flag decides, also where another interface has that address
    assert pick("eth0", public_ip="198.18.1.1").name == "eth0"


def test_names_and_addresses_are_tried_in_order(caplog: pytest.LogCaptureFixture) -> None:
    assert pick("eth0", "eth1").name == "eth0"
    assert str(pick("198.18.1.2").address) == "198.18.1.2"
    with caplog.at_level(logging.INFO):
        assert pick("eth7", "198.18.9.9", "198.18.0.1", "eth1").name == "eth0"
    assert [record.getMessage() for record in caplog.records] == [
        "Could not find valid interface matching eth7: error looking up interface eth7: no such network interface",
        "Searching for interface using 198.18.9.9",
        f"Could not find valid interface matching 198.18.9.9: {MISSING_ADDRESS}",
        "Searching for interface using 198.18.0.1",
        "Using interface with name eth0 and address 198.18.0.1",
        "Defaulting external address to interface address (198.18.0.1)",
    ]


def test_the_steps_without_flags_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        pick(public_ip="198.19.0.1")
    assert [record.getMessage() for record in caplog.records] == [
        "Determining IP address of default interface",
        "Using interface with name eth1 and address 198.18.1.1",
        "Using 198.19.0.1 as external address",
    ]


def test_nothing_that_fits_the_flags_lists_what_was_looked_at() -> None:
    with pytest.raises(ConfigError) as caught:
        pick("eth7", "198.18.9.9", "fd00::1")
    text = str(caught.value)
    assert text.startswith(
        "Failed to find interface to use that matches the interfaces and/or regexes provided: "
        "error looking up interface eth7: no such network interface; "
    )
    assert f"; {MISSING_ADDRESS}; " in text
    assert "error looking up v6 interface fd00::1: the net-conf does not enable IPv6" in text
    assert text.endswith("this node has lo (127.0.0.1), eth0 (198.18.0.1), eth1 (198.18.1.1, 198.18.1.2)")


def test_no_default_route_says_what_to_do() -> None:
    with pytest.raises(ConfigError) as caught:
        pick(routes=())
    assert str(caught.value).startswith(
        "Failed to find any valid interface to use: failed to get default interface: Unable to find default route; "
        "name one with -iface; this node has lo (127.0.0.1), "
    )
    with pytest.raises(ConfigError, match="Found default route but could not determine interface"):
        pick(routes=(replace(default_route(ETH0), device_index=0),))


def test_an_interface_without_mtu_or_address_is_no_hit() -> None:
    with pytest.raises(ConfigError, match=r"failed to determine MTU for 198\.18\.0\.1 interface"):
        pick("eth0", links=[LO, replace(ETH0, mtu=0), ETH1])
    with pytest.raises(ConfigError, match=r"failed to determine MTU for 198\.18\.1\.1 interface"):
        pick(links=[LO, ETH0, replace(ETH1, mtu=0)])
    assert pick("eth0", "eth1", links=[LO, replace(ETH0, mtu=0), ETH1]).name == "eth1"
    with pytest.raises(ConfigError, match=r"failed to find IPv4 address for interface eth0;.*eth0 \(no address\)"):
        pick("eth0", addresses=[address(ETH0, "fd00::1/64")])
    for unusable in ("127.0.0.1/8", "0.0.0.0/0", "224.0.0.5/32", "255.255.255.255/32"):
        with pytest.raises(ConfigError, match="failed to find IPv4 address for interface eth0"):
            pick("eth0", addresses=[address(ETH0, unusable)])
    with pytest.raises(ConfigError, match="failed to find IPv4 address for interface eth0"):
        pick("eth0", addresses=[address(ETH0, "198.18.0.1/24", deprecated=True)])


# --- patterns and can-reach -----------------------------------------------------------------------------------


def test_a_pattern_is_searched_in_addresses_before_names() -> None:
    assert str(pick(patterns=(r"198\.18\.1",)).address) == "198.18.1.1"
    assert str(pick(patterns=(r"1\.2$",)).address) == "198.18.1.2"
    assert pick(patterns=("th1",)).name == "eth1"
    assert pick(patterns=("eth[[:digit:]]",)).name == "eth0"
    # "18" stands in addresses of both: the kernel's order decides; "0" stands in eth0's name and in an address of lo
    assert pick(patterns=("18",)).name == "eth0"
    assert pick(patterns=("^$", "wlan", "eth1")).name == "eth1"


def test_patterns_come_after_names_and_can_reach_comes_last(caplog: pytest.LogCaptureFixture) -> None:
    way = Route(IPv4Network("203.0.113.0/24"), None, ETH1.index, IPv4Address("198.18.1.2"), 254, 0, 0)
    assert pick("eth0", patterns=("eth1",)).name == "eth0"
    assert pick("eth7", patterns=("eth1",)).name == "eth1"
    assert pick("eth1", can_reach="203.0.113.9", reach=None).name == "eth1"
    with caplog.at_level(logging.INFO):
        assert str(pick("eth7", patterns=("wlan",), can_reach="203.0.113.9", reach=way).address) == "198.18.1.2"
    assert "Determining interface to use based on given ifcanreach: 203.0.113.9" in caplog.text
    assert "Could not match pattern wlan to any of the available network interfaces" in caplog.text
    with pytest.raises(ConfigError, match=r"failed to get ifcanreach based interface: there is no route to 203"):
        pick(can_reach="203.0.113.9")


# --- two families ---------------------------------------------------------------------------------------------

BOTH = (4, 6)
V6_ADDRESSES = [
    *ADDRESSES,
    address(ETH1, "fe80::5/64"),
    address(ETH1, "fd00:1::7/64", secondary=True),
    address(ETH1, "fd00:1::5/64", permanent=False),
    address(ETH1, "fd00:1::6/64"),
]


def test_two_families_need_an_address_of_each_on_one_interface() -> None:
    chosen = pick("eth1", families=BOTH, addresses=V6_ADDRESSES)
    assert (str(chosen.address), str(chosen.address_v6)) == ("198.18.1.1", "fd00:1::6")
    assert chosen.public_ipv6 == chosen.address_v6
    with pytest.raises(ConfigError, match="failed to find IPv6 address for interface eth1"):
        pick("eth1", families=BOTH)


def test_both_default_routes_must_leave_by_one_interface() -> None:
    both = (default_route_v6(ETH1),)
    assert pick(families=BOTH, addresses=V6_ADDRESSES, routes_v6=both).name == "eth1"
    with pytest.raises(ConfigError, match="v6 default route interface eth0 must be the same with v4 default route"):
        pick(families=BOTH, addresses=V6_ADDRESSES, routes_v6=(default_route_v6(ETH0),))
    with pytest.raises(ConfigError, match="failed to get default v6 interface: Unable to find default route"):
        pick(families=BOTH, addresses=V6_ADDRESSES)


def test_a_node_of_ipv6_alone_publishes_no_ipv4() -> None:
    chosen = pick(families=(6,), addresses=V6_ADDRESSES, routes=(), routes_v6=(default_route_v6(ETH1),))
    nowhere = IPv4Address("0.0.0.0")
    assert (chosen.address, chosen.public_ip, str(chosen.address_v6)) == (nowhere, nowhere, "fd00:1::6")
    assert pick("fd00::1", families=(6,)).name == "eth0"
    with pytest.raises(ConfigError, match="the net-conf does not enable IPv4"):
        pick("198.18.0.1", families=(6,))


def test_a_public_ipv6_that_is_configured_pins_the_address() -> None:
    assert str(pick("eth1", families=BOTH, addresses=V6_ADDRESSES, public_ipv6="fd00:1::7").address_v6) == "fd00:1::7"
    behind_nat = pick("eth1", families=BOTH, addresses=V6_ADDRESSES, public_ipv6="2001:db8::1")
    assert (str(behind_nat.address_v6), str(behind_nat.public_ipv6)) == ("fd00:1::6", "2001:db8::1")
    with pytest.raises(ConfigError, match="v6 interface eth0 must be the same with v4 interface eth1"):
        pick("eth1", families=BOTH, addresses=V6_ADDRESSES, public_ipv6="fd00::1")
    assert pick(families=(6,), addresses=V6_ADDRESSES, public_ipv6="fd00:1::7", routes=()).name == "eth1"


def test_a_pattern_matches_an_address_of_each_family_or_the_name() -> None:
    assert str(pick(families=BOTH, addresses=V6_ADDRESSES, patterns=("7$|1.1$",)).address_v6) == "fd00:1::7"
    # no interface has both, so the name decides
    chosen = pick(families=BOTH, addresses=V6_ADDRESSES, patterns=("^198|eth1",))
    assert (chosen.name, str(chosen.address_v6)) == ("eth1", "fd00:1::6")


# --- staying --------------------------------------------------------------------------------------------------


def test_an_address_that_is_still_good_is_kept() -> None:
    around = Surroundings(LINKS, V6_ADDRESSES)
    now = pick("198.18.1.2", families=BOTH, addresses=V6_ADDRESSES)
    better = pick("eth1", families=BOTH, addresses=V6_ADDRESSES)
    assert now.address != better.address
    assert stay(now, better, around) == now
    assert stay(now, replace(better, mtu=1400), around) == replace(now, mtu=1400)
    published = IPv4Address("198.19.0.1")
    assert stay(replace(now, public_ip=published), replace(better, public_ip=published), around).public_ip == published
    gone = Surroundings(LINKS, [a for a in V6_ADDRESSES if str(a.interface.ip) != "198.18.1.2"])
    assert stay(now, better, gone) == better
    elsewhere = pick("eth0", families=BOTH)
    assert stay(now, elsewhere, around) == elsewhere


ordinary = st.builds(
    lambda host, kind, permanent, deprecated, secondary: Address(
        ETH0.index, IPv4Interface(f"{kind}.{host}/32"), 0, permanent, deprecated, secondary
    ),
    st.integers(1, 254),
    st.sampled_from(["198.18.0", "169.254.7", "10.0.0", "127.0.0"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


@given(st.lists(ordinary, max_size=8))
def test_no_address_left_out_is_better_than_the_chosen_one(own: list[Address]) -> None:
    """Rank by flannel's rules, spelled out one after another as an oracle."""
    candidates = [a for a in own if not a.deprecated and not str(a.interface).startswith("127.")]
    rules: list[Callable[[Address], bool]] = [
        lambda a: not str(a.interface).startswith("169.254."),
        lambda a: a.permanent,
        lambda a: not a.secondary,
    ]
    for better in rules:  # each chooses among what the one before has left
        candidates = list(filter(better, candidates)) or candidates
    others = [address(ETH0, "fd00::5/64"), address(ETH1, "198.18.1.1/24")]
    if not candidates:
        with pytest.raises(ConfigError):
            pick("eth0", addresses=others + own)
    else:
        assert pick("eth0", addresses=others + own).address == candidates[0].interface.ip


@pytest.mark.netns
def test_on_a_real_node() -> None:
    async def look(*names: str) -> Underlay:
        netlink = await Netlink.open()
        try:
            facts = await netlink.links(), await netlink.addresses(), await netlink.default_routes()
        finally:
            await netlink.close()
        return choose(Wanted(names), Surroundings(*facts))

    with open_namespace() as ns:
        for name, mtu, number in (("eth0", "1432", 1), ("eth1", "9000", 2)):
            ns.command("ip", "link", "add", name, "mtu", mtu, "type", "veth", "peer", "name", f"{name}p")
            ns.command("ip", "link", "set", name, "up")
            ns.command("ip", "link", "set", f"{name}p", "up")
            ns.command("ip", "addr", "add", f"169.254.0.{number}/16", "dev", name, "scope", "link")
            leased = ["valid_lft", "999", "preferred_lft", "99"]
            ns.command("ip", "addr", "add", f"198.18.{number}.9/24", "dev", name, *leased)
            ns.command("ip", "addr", "add", f"198.18.{number}.1/24", "dev", name)
            ns.command("ip", "addr", "add", f"198.18.{number}.2/24", "dev", name)
        ns.command("ip", "route", "add", "default", "via", "198.18.1.254", "metric", "50")
        ns.command("ip", "route", "add", "default", "via", "198.18.2.254", "metric", "10")
        index = int(ns.command("cat", "/sys/class/net/eth1/ifindex").stdout)
        chosen = ns.run(asyncio.run, look())
        # permanent before leased counts more than primary before secondary
        expected = IPv4Address("198.18.2.1")
        assert chosen == Underlay("eth1", index, expected, expected, 9000)
        assert ns.run(asyncio.run, look("eth9", "eth0")).mtu == 1432
        assert str(ns.run(asyncio.run, look("198.18.1.2")).address) == "198.18.1.2"
