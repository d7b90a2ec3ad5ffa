"""Entries in bulk, against the real kernel; iproute2 shows what stands there."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, TypeVar

import pytest
import uvloop

from dataplane.kernel import rtnetlink
from dataplane.kernel.rtnetlink import Entry, Scope, Table, describe, destination_of, entry_of, fdb, neighbour, route
from dataplane.kernel.tables import Tables
from tests.namespaces import Namespace, open_namespace

pytestmark = pytest.mark.netns

R = TypeVar("R")
MAC = bytes.fromhex("0a0000000001")
MANY = 10_000


@pytest.fixture
def ns() -> Iterator[Namespace]:
    """An underlay `v0` and two vxlan devices over it, `x4` and `x6`, all up."""
    with open_namespace() as namespace:
        for line in (
            "link add v0 type veth peer name v1",
            "link set v1 up",
            "link set v0 up",
            "addr add 198.18.0.1/15 dev v0",
            "addr add fd00:198:18::1/64 dev v0 nodad",
            "link add x4 type vxlan id 1 dstport 8472 local 198.18.0.1 dev v0 nolearning",
            "link add x6 type vxlan id 1 dstport 8472 local fd00:198:18::1 dev v0 nolearning",
            "link set x4 up",
            "link set x6 up",
        ):
            namespace.command("ip", *line.split())
        yield namespace


def ask(ns: Namespace, work: Callable[[Tables], Awaitable[R]]) -> R:
    async def main() -> R:
        tables = await Tables.open()
        try:
            return await work(tables)
        finally:
            await tables.close()
            await tables.close()

    return ns.run(uvloop.run, main())


def indexes(ns: Namespace) -> dict[str, int]:
    return {link["ifname"]: link["ifindex"] for link in json.loads(ns.command("ip", "-j", "link").stdout)}


def shown(ns: Namespace, tool: str, *argv: str) -> Any:
    return json.loads(ns.command(tool, "-j", *argv).stdout or "[]")


def of_both_families(ns: Namespace) -> list[Entry]:
    index = indexes(ns)
    return [
        fdb(index["x4"], MAC, IPv4Address("198.18.0.9")),
        neighbour(index["x4"], IPv4Address("10.5.9.0"), MAC),
        route(IPv4Network("10.5.9.0/24"), index["x4"], IPv4Address("10.5.9.0"), onlink=True),
        route(IPv4Network("10.5.8.0/24"), index["v0"], IPv4Address("198.18.0.8"), onlink=False),
        fdb(index["x6"], MAC, IPv6Address("fd00:198:18::9")),
        neighbour(index["x6"], IPv6Address("fd00:5:9::"), MAC),
        route(IPv6Network("fd00:5:9::/64"), index["x6"], IPv6Address("fd00:5:9::"), onlink=True),
        route(IPv6Network("fd00:5:8::/64"), index["v0"], IPv6Address("fd00:198:18::8"), onlink=False),
    ]


async def stand(tables: Tables, entries: Sequence[Entry]) -> list[bool]:
    """Whether each is recognised in the kernel's list without being parsed."""
    found = []
    for entry in entries:
        listing = await tables.listing(entry.scope, {entry.body: entry})
        found.append(listing.present == [entry])
    return found


def test_entries_of_both_families_are_those_that_iproute2_shows(ns: Namespace) -> None:
    entries = of_both_families(ns)

    async def work(tables: Tables) -> None:
        assert await tables.put(entries) == []
        assert await tables.put(entries) == [], "the same again is no fault"
        assert await stand(tables, entries) == [True] * len(entries)

    ask(ns, work)
    for device, subnet, outer, length in (
        ("x4", "10.5.9.0", "198.18.0.9", 24),
        ("x6", "fd00:5:9::", "fd00:198:18::9", 64),
    ):
        (entry,) = [e for e in shown(ns, "ip", "neigh", "show", "dev", device) if "PERMANENT" in e["state"]]
        assert (entry["dst"], entry["lladdr"], entry["state"]) == (subnet, MAC.hex(":"), ["PERMANENT"])
        (entry,) = shown(ns, "bridge", "fdb", "show", "dev", device)
        assert (entry["mac"], entry["dst"], entry["flags"], entry["state"]) == (
            MAC.hex(":"), outer, ["self"], "permanent",
        )  # fmt: skip
        family = "-4" if device == "x4" else "-6"
        (entry,) = shown(ns, "ip", family, "-d", "route", "show", f"{subnet}/{length}")
        assert (entry["gateway"], entry["dev"], entry["flags"]) == (subnet, device, ["onlink"])
        assert (entry["protocol"], entry["scope"], entry["type"]) == ("boot", "global", "unicast")
    (entry,) = shown(ns, "ip", "route", "show", "10.5.8.0/24")
    assert (entry["gateway"], entry["dev"], entry["flags"]) == ("198.18.0.8", "v0", [])


@pytest.mark.parametrize("version", [4, 6])
def test_a_route_changes_its_device_there_and_back(ns: Namespace, version: int) -> None:
    """As with DirectRouting. By iproute2's `replace` the kernel refuses it for IPv6."""
    direct, tunnelled = of_both_families(ns)[3 if version == 4 else 7], of_both_families(ns)[2 if version == 4 else 6]
    subnet, first = destination_of(tunnelled), destination_of(tunnelled).network_address
    outer = ip_address("198.18.0.8" if version == 4 else "fd00:198:18::8")
    direct = route(subnet, direct.scope.index, outer, onlink=False)
    other = route(ip_network("10.5.7.0/24" if version == 4 else "fd00:5:7::/64"), 999, first, onlink=True)

    async def work(tables: Tables) -> None:
        for entry, gone in ((direct, tunnelled), (tunnelled, direct), (direct, tunnelled)):
            refused = await tables.put([other, entry])
            assert [refusal.entry for refusal in refused] == [other], "one without a device"
            assert await stand(tables, [entry, gone]) == [True, False]

    ask(ns, work)


def test_what_flannels_own_commands_make_is_recognised(ns: Namespace) -> None:
    """The equivalent commands of facts 7.2, by iproute2 in place of flannel."""
    for line in (
        "ip neigh replace 10.5.9.0 lladdr 0a:00:00:00:00:01 dev x4 nud permanent",
        "bridge fdb replace 0a:00:00:00:00:01 dev x4 dst 198.18.0.9 self permanent",
        "ip route replace 10.5.9.0/24 via 10.5.9.0 dev x4 onlink",
        "ip route replace fd00:5:9::/64 via fd00:5:9:: dev x6 onlink",
    ):
        ns.command(*line.split())
    wanted = of_both_families(ns)

    async def work(tables: Tables) -> set[Entry | None]:
        found = set[Entry | None]()
        for entry in wanted:
            listing = await tables.listing(entry.scope, {})
            found |= {entry_of(entry.scope.table, body) for body in listing.others}
        return found

    assert set(wanted[:3]) | {wanted[6]} <= ask(ns, work)


def test_putting_replaces_and_deleting_is_exact(ns: Namespace) -> None:
    entries = of_both_families(ns)
    index = indexes(ns)
    other_mac = bytes.fromhex("0a0000000002")
    later = [
        fdb(index["x4"], MAC, IPv4Address("198.18.0.10")),
        neighbour(index["x4"], IPv4Address("10.5.9.0"), other_mac),
        route(IPv4Network("10.5.9.0/24"), index["v0"], IPv4Address("198.18.0.9"), onlink=False),
        route(IPv6Network("fd00:5:9::/64"), index["v0"], IPv6Address("fd00:198:18::9"), onlink=False),
    ]
    assert {entry.key for entry in later} <= {entry.key for entry in entries}

    async def work(tables: Tables) -> None:
        await tables.put(entries)
        assert await tables.put(later) == []
        assert await stand(tables, later) == [True] * len(later)
        assert await stand(tables, [entries[i] for i in (0, 1, 2, 6)]) == [False] * 4
        # what was replaced is not there, so its deletion must leave the new one alone
        assert await tables.delete([entries[0], entries[2], entries[6]]) == []
        assert await stand(tables, later) == [True] * len(later)
        assert await tables.delete([*later, *entries]) == []
        assert await tables.delete([*later, *entries]) == [], "what is not there costs nothing"
        assert not any(await stand(tables, [*later, *entries]))

    ask(ns, work)


def test_entries_of_a_device_that_is_gone_are_gone(ns: Namespace) -> None:
    entries = of_both_families(ns)

    async def work(tables: Tables) -> None:
        await tables.put(entries)
        ns.command("ip", "link", "del", "x4")
        assert await tables.delete(entries[:3]) == []
        assert await stand(tables, entries[:3]) == [False] * 3
        refused = await tables.put(entries)
        assert {refusal.entry for refusal in refused} == set(entries[:3]), "and the others are put all the same"

    ask(ns, work)


def test_a_refusal_has_the_kernels_reason(ns: Namespace) -> None:
    index = indexes(ns)
    good = route(IPv4Network("10.5.7.0/24"), index["v0"], IPv4Address("198.18.0.7"), onlink=False)
    far = route(IPv4Network("10.5.6.0/24"), index["v0"], IPv4Address("192.0.2.1"), onlink=False)

    async def work(tables: Tables) -> None:
        (refused,) = await tables.put([far, good])
        assert (refused.entry, refused.reason) == (far, "Nexthop has invalid gateway")
        assert await stand(tables, [good, far]) == [True, False]

    ask(ns, work)
    assert describe(far) == f"route 10.5.6.0/24 via 192.0.2.1 on device number {index['v0']}"
    assert destination_of(far) == IPv4Network("10.5.6.0/24")
    assert describe(of_both_families(ns)[0]) == f"FDB entry {MAC.hex(':')} to 198.18.0.9 on device number {index['x4']}"
    assert describe(of_both_families(ns)[5]).startswith(f"neighbour fd00:5:9:: at {MAC.hex(':')}")


def test_routes_of_every_device_and_what_is_not_ours(ns: Namespace) -> None:
    index = indexes(ns)
    ns.command("ip", "link", "set", "v1", "up")
    for line in (
        "10.6.0.0/24 via 198.18.0.7 metric 5",
        "10.6.1.0/24 via 198.18.0.7 proto static",
        "10.6.2.0/24 via 198.18.0.7 src 198.18.0.1",
        "10.6.3.0/24 dev v0",
        "blackhole 10.6.4.0/24",
        "10.6.5.0/24 nexthop via 198.18.0.7 nexthop via 198.18.0.8",
        "10.6.6.0/24 via inet6 fd00:198:18::7 dev v0",
        "10.6.7.0/24 via 198.18.0.7 table 99",
    ):
        ns.command("ip", "route", "add", *line.split())
    ours = [
        route(IPv4Network("10.5.9.0/24"), index["x4"], IPv4Address("10.5.9.0"), onlink=True),
        route(IPv4Network("10.5.8.0/24"), index["v0"], IPv4Address("198.18.0.8"), onlink=False),
    ]

    async def work(tables: Tables) -> list[Entry | None]:
        await tables.put(ours)
        listing = await tables.listing(rtnetlink.routes_of(4, 0), {})
        return [entry_of(Table.ROUTE, body) for body in listing.others]

    found = ask(ns, work)
    assert sorted((e for e in found if e is not None), key=lambda e: e.key) == sorted(ours, key=lambda e: e.key)


def test_who_is_reached_without_a_gateway(ns: Namespace) -> None:
    ns.command("ip", *["route", "add", "192.0.2.0/24", "via", "198.18.0.7"])
    ns.command("ip", *["route", "add", "blackhole", "192.0.3.0/24"])
    ns.command("ip", *["route", "add", "192.0.4.0/24", "via", "inet6", "fd00:198:18::7", "dev", "v0"])
    near = [ip_address(text) for text in ("198.18.0.9", "198.19.255.254", "fd00:198:18::9")]
    far = [
        ip_address(text)
        for text in ("192.0.2.1", "192.0.3.1", "192.0.4.1", "192.0.9.1", "198.18.0.1", "127.0.0.1", "fd01::1")
    ]
    v0 = indexes(ns)["v0"]
    assert ask(ns, lambda tables: tables.neighbouring([*near, *far])) == dict.fromkeys(near, v0)
    many = [IPv4Address(0xC6120000 + number) for number in range(2, 2002)]
    assert ask(ns, lambda tables: tables.neighbouring(many)) == dict.fromkeys(many, v0)


def test_ten_thousand_peers_are_put_in_and_listed(ns: Namespace) -> None:
    index = indexes(ns)["x4"]
    subnets = [ip_network((0x0A000000 + (number << 8), 24)) for number in range(MANY)]
    macs = [(0x020000000000 + number).to_bytes(6, "big") for number in range(MANY)]
    entries = [
        *(fdb(index, mac, IPv4Address(0xC6120100 + number)) for number, mac in enumerate(macs)),
        *(neighbour(index, subnet.network_address, mac) for subnet, mac in zip(subnets, macs, strict=True)),
        *(route(subnet, index, subnet.network_address, onlink=True) for subnet in subnets),
    ]
    by_scope: dict[Scope, dict[bytes, Entry]] = {}
    for entry in entries:
        by_scope.setdefault(entry.scope, {})[entry.body] = entry

    async def work(tables: Tables) -> None:
        clock = time.perf_counter()
        assert await tables.put(entries) == []
        put = time.perf_counter() - clock
        cpu = time.process_time()
        for scope, wanted in by_scope.items():
            listing = await tables.listing(scope, wanted)
            assert len(listing.present) == MANY == len({entry.key for entry in listing.present})
            assert listing.others == []
        audit = time.process_time() - cpu
        sys.stdout.write(f"\n{MANY} peers: put in {put:.2f} s, listed with {audit * 1000:.0f} ms of CPU\n")
        assert await tables.delete(entries) == []

    ask(ns, work)
    assert "10.0.0.0" not in ns.command("ip", "neigh").stdout


@pytest.mark.parametrize("table", list(Table))
@pytest.mark.parametrize("cut", range(0, 80, 3))
def test_a_cut_body_is_no_entry(table: Table, cut: int) -> None:
    """What the kernel would never send; the parsers of attributes must not run past the end."""
    whole = route(IPv4Network("10.5.9.0/24"), 4, IPv4Address("10.5.9.0"), onlink=True).body
    body = (whole if table is Table.ROUTE else fdb(4, MAC, IPv4Address("198.18.0.9")).body)[:cut]
    if cut >= 12:
        entry = entry_of(table, body)
        assert entry is None or entry.body.startswith(body) or body == entry.body
