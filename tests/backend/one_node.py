"""One node of an overlay for the tests of kernel backends: a namespace with an underlay, and leases made by hand.

Free of: stores and daemons; a backend is driven as the keeper would drive it. iproute2 shows what stands in the kernel.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, TypeVar

import uvloop

from dataplane import netconf
from dataplane.backend.base import Underlay
from dataplane.backend.peers import encode_vtep
from dataplane.kernel.netlink import Netlink
from dataplane.lease.model import Lease, LeaseAttrs, LeaseEvent, LeaseEventKind, LeaseKey
from dataplane.netconf import NetworkConfig
from tests.namespaces import Namespace, open_namespace

R = TypeVar("R")

OWN_V4, OWN_V6 = IPv4Network("10.5.1.0/24"), IPv6Network("fd00:5:0:1::/64")


@contextmanager
def open_node() -> Iterator[Namespace]:
    """`eth0`, 198.18.0.1/15 and fd00:198:18::1/64, whose cable is plugged in. No IPv6 address comes late."""
    with open_namespace() as namespace:
        settings = [f"net.ipv6.conf.{where}.accept_dad=0" for where in ("all", "default")]
        namespace.command("sysctl", "-qw", *settings)
        for line in (
            "link add eth0 type veth peer name wire",
            "link set wire up",
            "link set eth0 up",
            "addr add 198.18.0.1/15 dev eth0",
            "addr add fd00:198:18::1/64 dev eth0 nodad",
        ):
            namespace.command("ip", *line.split())
        yield namespace


def facing(ns: Namespace, **changes: Any) -> Underlay:
    (link,) = shown(ns, "ip", "link", "show", "eth0")
    address, v6 = IPv4Address("198.18.0.1"), IPv6Address("fd00:198:18::1")
    usual = {
        "address": address, "public_ip": address, "mtu": link["mtu"], "address_v6": v6, "public_ipv6": v6,
    }  # fmt: skip
    return Underlay(name="eth0", index=link["ifindex"], **{**usual, **changes})


def network(*, v6: bool = False, v4: bool = True, **backend: Any) -> NetworkConfig:
    members: dict[str, Any] = {"Network": "10.5.0.0/16", "SubnetLen": 24, "EnableIPv4": v4, "Backend": backend}
    if v6:
        members |= {"EnableIPv6": True, "IPv6Network": "fd00:5::/48", "IPv6SubnetLen": 64}
    return netconf.parse(json.dumps(members).encode(), origin="test")


def own_lease(*, v6: bool = False) -> Lease:
    return Lease(LeaseKey(OWN_V4, OWN_V6 if v6 else None), LeaseAttrs(IPv4Address("198.18.0.1")), 1, 1)


def mac_of(number: int) -> bytes:
    return (0x020000000000 + number).to_bytes(6, "big")


def peer(number: int, *, v6: bool = False, kind: str = "vxlan", ip: str = "", mac: bytes = b"") -> Lease:
    """Node `number` from 2 on, with subnet 10.5.N.0/24 at 198.18.0.N."""
    data = encode_vtep(1, mac or mac_of(number)) if kind == "vxlan" else b""
    key = LeaseKey(IPv4Network(f"10.5.{number}.0/24"), IPv6Network(f"fd00:5:0:{number:x}::/64") if v6 else None)
    attrs = LeaseAttrs(
        IPv4Address(ip or f"198.18.0.{number}"),
        IPv6Address(f"fd00:198:18::{number:x}") if v6 else None,
        kind,
        data,
        data if v6 else b"",
    )
    return Lease(key, attrs, number, number)


def added(leases: Iterable[Lease]) -> list[LeaseEvent]:
    return [LeaseEvent(LeaseEventKind.ADDED, lease) for lease in leases]


def removed(*leases: Lease) -> list[LeaseEvent]:
    return [LeaseEvent(LeaseEventKind.REMOVED, lease) for lease in leases]


def on_node(ns: Namespace, work: Callable[[Netlink], Awaitable[R]]) -> R:
    """Run `work` on uvloop inside the namespace."""

    async def main() -> R:
        netlink = await Netlink.open()
        try:
            return await work(netlink)
        finally:
            await netlink.close()

    return ns.run(uvloop.run, main())


def shown(ns: Namespace, tool: str, *argv: str) -> Any:
    return json.loads(ns.command(tool, "-d", "-j", *argv).stdout or "[]")


def neighbours(ns: Namespace, device: str) -> dict[str, str]:
    """MAC by address, of permanent entries."""
    if not _exists(ns, device):
        return {}
    entries = shown(ns, "ip", "neigh", "show", "dev", device)
    return {entry["dst"]: entry["lladdr"] for entry in entries if entry["state"] == ["PERMANENT"]}


def fdb(ns: Namespace, device: str) -> dict[str, str]:
    """Outer address by MAC."""
    if not _exists(ns, device):
        return {}
    return {entry["mac"]: entry["dst"] for entry in shown(ns, "bridge", "fdb", "show", "dev", device)}


def routes(ns: Namespace, version: int = 4) -> dict[str, tuple[str, str]]:
    """Gateway and device by destination, of routes of protocol boot."""
    entries = shown(ns, "ip", f"-{version}", "route", "show", "proto", "boot")
    return {entry["dst"]: (entry.get("gateway", ""), entry["dev"]) for entry in entries}


def _exists(ns: Namespace, device: str) -> bool:
    return any(link["ifname"] == device for link in shown(ns, "ip", "link"))


async def calm() -> None:
    """Until a backend looks no more after what was done so far: what is done next has to make it look by itself."""
    await asyncio.sleep(0.4)


async def until(what: str, check: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Ask again, in a thread, until the answer is true; fails after a bound."""
    deadline = time.monotonic() + seconds
    while not (answer := await asyncio.to_thread(check)):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        await asyncio.sleep(0.02)
    return answer
