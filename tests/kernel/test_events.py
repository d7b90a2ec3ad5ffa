"""The kernel's own events, caused by iproute2 in a namespace and heard on uvloop."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Interface, IPv6Network

import pytest
import uvloop

from dataplane.kernel import events as events_module
from dataplane.kernel import rtnetlink
from dataplane.kernel.events import UNDERLAY, Group, KernelEvents
from dataplane.kernel.facts import (
    AddressEvent,
    KernelEvent,
    LinkEvent,
    NeighbourEvent,
    Overrun,
    RouteEvent,
)
from dataplane.kernel.tables import Tables
from tests.namespaces import Namespace, open_namespace

pytestmark = pytest.mark.netns

EVERYTHING = frozenset(Group)


class Heard(list[KernelEvent]):
    """Events as they come, and waiting for one."""

    async def wait_for(self, check: Callable[[KernelEvent], bool]) -> KernelEvent:
        async with asyncio.timeout(20):
            while True:
                for event in self:
                    if check(event):
                        return event
                await asyncio.sleep(0.01)


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with open_namespace() as namespace:
        namespace.command("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        namespace.command("ip", "link", "set", "v1", "up")
        yield namespace


def listen(
    ns: Namespace,
    work: Callable[[Heard], Awaitable[None]],
    groups: frozenset[Group] = EVERYTHING,
    run: Callable[..., None] = uvloop.run,
) -> None:
    async def main() -> None:
        heard = Heard()
        listener = KernelEvents.open(groups, heard.append)
        try:
            await work(heard)
        finally:
            listener.close()
            listener.close()

    ns.run(run, main())


async def ip(ns: Namespace, line: str) -> None:
    await asyncio.to_thread(ns.command, "ip", *line.split())


def index_of(ns: Namespace, name: str) -> int:
    return int(json.loads(ns.command("ip", "-j", "link", "show", name).stdout)[0]["ifindex"])


def test_a_link_is_told_as_it_changes_and_goes(ns: Namespace) -> None:
    async def work(heard: Heard) -> None:
        index = index_of(ns, "v0")
        await ip(ns, "link set v0 up mtu 1400 address 02:00:00:00:00:07")
        event = await heard.wait_for(
            lambda e: isinstance(e, LinkEvent) and (e.name, e.up, e.mtu, e.carrier) == ("v0", True, 1400, True)
        )
        assert isinstance(event, LinkEvent)
        assert (event.index, event.address, event.gone) == (index, "02:00:00:00:00:07", False)
        await ip(ns, "link del v0")
        await heard.wait_for(lambda e: isinstance(e, LinkEvent) and e.gone and e.index == index)

    listen(ns, work)


def test_leaving_a_bridge_is_not_the_end_of_a_device(ns: Namespace) -> None:
    async def work(heard: Heard) -> None:
        await ip(ns, "link add br0 type bridge")
        await ip(ns, "link set v0 master br0")
        await ip(ns, "link set v0 nomaster")
        await ip(ns, "link set v0 mtu 1234")
        await heard.wait_for(lambda e: isinstance(e, LinkEvent) and e.mtu == 1234)
        assert not [e for e in heard if isinstance(e, LinkEvent) and e.gone]

    listen(ns, work)


def test_addresses_and_routes_of_both_families(ns: Namespace) -> None:
    async def work(heard: Heard) -> None:
        index = index_of(ns, "v0")
        await ip(ns, "link set v0 up")
        await ip(ns, "addr add 198.18.0.1/24 dev v0")
        await ip(ns, "addr add fd00:198:18::1/64 dev v0 nodad")
        await ip(ns, "addr del 198.18.0.1/24 dev v0")
        await ip(ns, "addr add 198.18.0.2/24 dev v0")
        await ip(ns, "route add 10.5.9.0/24 via 198.18.0.9 metric 7")
        await ip(ns, "route add fd00:5::/64 via fd00:198:18::9")
        await ip(ns, "route del 10.5.9.0/24")
        for gone in (False, True):
            event = await heard.wait_for(
                lambda e, gone=gone: isinstance(e, AddressEvent)  # type: ignore[misc]  # a lambda with a default
                and e.gone is gone
                and e.address.interface == IPv4Interface("198.18.0.1/24")
            )
            assert isinstance(event, AddressEvent)
            assert event.address.index == index
        v6 = IPv6Interface("fd00:198:18::1/64")
        await heard.wait_for(lambda e: isinstance(e, AddressEvent) and e.address.interface == v6)
        event = await heard.wait_for(
            lambda e: isinstance(e, RouteEvent) and e.gone and destination_of(e) == IPv4Network("10.5.9.0/24")
        )
        assert isinstance(event, RouteEvent)
        route = rtnetlink.route_of(event.body)
        assert (route.gateway, route.device_index) == (IPv4Address("198.18.0.9"), index)
        assert (route.metric, route.table, event.length) == (7, 254, 24)
        await heard.wait_for(
            lambda e: isinstance(e, RouteEvent) and destination_of(e) == IPv6Network("fd00:5::/64") and not e.gone
        )

    listen(ns, work, UNDERLAY)


def destination_of(event: RouteEvent) -> IPv4Network | IPv6Network:
    return rtnetlink.route_of(event.body).destination


def test_neighbours_and_the_fdb_in_the_bytes_of_our_entries(ns: Namespace) -> None:
    async def work(heard: Heard) -> None:
        await ip(ns, "link add vx type vxlan id 7 dstport 8472 local 198.18.0.1")
        await ip(ns, "link set vx up")
        index, mac = index_of(ns, "vx"), bytes.fromhex("0a0000000001")
        await ip(ns, "neigh replace 10.5.9.0 lladdr 0a:00:00:00:00:01 dev vx nud permanent")
        fdb = "fdb replace 0a:00:00:00:00:01 dev vx dst 198.18.0.9 self permanent"
        await asyncio.to_thread(ns.command, "bridge", *fdb.split())
        await ip(ns, "neigh del 10.5.9.0 dev vx")
        wanted = {
            rtnetlink.neighbour(index, IPv4Address("10.5.9.0"), mac),
            rtnetlink.fdb(index, mac, IPv4Address("198.18.0.9")),
        }
        for entry in wanted:
            await heard.wait_for(
                lambda e, entry=entry: isinstance(e, NeighbourEvent)  # type: ignore[misc]  # as above
                and not e.gone
                and rtnetlink.entry_of(entry.scope.table, e.body) == entry
            )
        await heard.wait_for(lambda e: isinstance(e, NeighbourEvent) and e.gone and not e.fdb and e.index == index)

    listen(ns, work)


@pytest.mark.parametrize("version", [4, 6])
def test_changes_by_one_port_are_left_out_and_others_of_the_same_entries_are_not(ns: Namespace, version: int) -> None:
    far = IPv4Address("10.5.9.1") if version == 4 else IPv6Interface("fd00:5:9::1").ip
    subnet = IPv4Network("10.5.9.0/24") if version == 4 else IPv6Network("fd00:5:9::/64")
    gateway = IPv4Address("198.18.0.9") if version == 4 else IPv6Interface("fd00:198:18::9").ip

    async def main() -> None:
        for line in ("link set v0 up", "addr add 198.18.0.1/15 dev v0", "addr add fd00:198:18::1/64 dev v0 nodad"):
            await ip(ns, line)
        index, heard = index_of(ns, "v0"), Heard()
        entries = [
            rtnetlink.neighbour(index, far, bytes.fromhex("0a0000000001")),
            rtnetlink.route(subnet, index, gateway, onlink=False),
        ]
        ours, others = await Tables.open(), await Tables.open()
        listener = KernelEvents.open(EVERYTHING, heard.append, but=ours.port)
        try:
            assert await ours.change(entries, ()) == ([], [])
            assert await ours.change((), entries) == ([], [])
            assert await others.change(entries, ()) == ([], [])
            for entry in entries:
                await heard.wait_for(lambda e, entry=entry: shows(e, entry))  # type: ignore[misc]  # bound at once
            await others.delete(entries)
            for entry in entries:
                await heard.wait_for(lambda e, entry=entry: shows(e, entry, gone=True))  # type: ignore[misc]  # as above
            neighbour, route = entries
            told = [shows(e, route) for e in heard if shows(e, route) or shows(e, route, gone=True)]
            assert told == [True, False], "once put and once deleted, by the other port"
            told = [shows(e, neighbour) for e in heard if shows(e, neighbour) or shows(e, neighbour, gone=True)]
            assert told[:2] == [False, True], "who deletes a neighbour is not told, who puts one is"
        finally:
            listener.close()
            await ours.close()
            await others.close()

    ns.run(uvloop.run, main())


def shows(event: KernelEvent, entry: rtnetlink.Entry, *, gone: bool = False) -> bool:
    if not isinstance(event, RouteEvent | NeighbourEvent) or event.gone is not gone:
        return False
    if isinstance(event, RouteEvent) is not (entry.scope.table is rtnetlink.Table.ROUTE):
        return False
    return rtnetlink.key_of(entry.scope.table, event.body) == entry.key


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_an_overrun_is_told_and_hearing_goes_on(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch, run: Callable[..., None]
) -> None:
    monkeypatch.setattr(events_module, "BUFFER_BYTES", 16_384)

    async def work(heard: Heard) -> None:
        ns.command("ip", "link", "set", "v0", "up")
        lines = [f"route add 10.6.{n}.0/24 dev v0" for n in range(256)]
        # in the loop's own thread: nothing is read meanwhile
        ns.command("ip", "-batch", "-", stdin="\n".join(lines))
        await heard.wait_for(lambda e: isinstance(e, Overrun))
        for mtu in (1300, 1301):
            await ip(ns, f"link set v1 mtu {mtu}")
            # a buffer this small may overrun again
            await heard.wait_for(lambda e, mtu=mtu: isinstance(e, LinkEvent) and e.mtu == mtu)  # type: ignore[misc]

    listen(ns, work, run=run)


def test_a_handler_that_fails_does_not_end_the_hearing(ns: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        heard = Heard()

        def handler(event: KernelEvent) -> None:
            heard.append(event)
            raise ValueError("a handler's fault")

        listener = KernelEvents.open(UNDERLAY, handler)
        try:
            for mtu in (1300, 1301):
                await ip(ns, f"link set v0 mtu {mtu}")
                await heard.wait_for(lambda e, mtu=mtu: isinstance(e, LinkEvent) and e.mtu == mtu)  # type: ignore[misc]
        finally:
            listener.close()

    with caplog.at_level(logging.ERROR):
        ns.run(asyncio.run, main())
    assert "a handler's fault" in caplog.text


def test_what_another_process_sends_is_not_believed(ns: Namespace) -> None:
    async def main() -> None:
        heard = Heard()
        listener = KernelEvents.open(frozenset({Group.LINK}), heard.append)
        forger = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        try:
            body = b"\0" * 16
            message = rtnetlink.HEADER.pack(32, events_module.RTM_DELLINK, 0, 0, 0) + body
            forger.sendto(message, (listener._socket.getsockname()[0], 0))
            await ip(ns, "link set v0 mtu 1300")
            await heard.wait_for(lambda e: isinstance(e, LinkEvent) and e.mtu == 1300)
            assert not [e for e in heard if isinstance(e, LinkEvent) and e.gone]
        finally:
            forger.close()
            listener.close()

    ns.run(uvloop.run, main())


@pytest.mark.parametrize("kind", [16, 20, 24, 28, 17, 99])
@pytest.mark.parametrize("length", range(24))
def test_a_cut_message_is_no_event_and_no_error(kind: int, length: int) -> None:
    event = events_module.event_of(kind, b"\2" * length)
    assert event is None or isinstance(event, KernelEvent)
