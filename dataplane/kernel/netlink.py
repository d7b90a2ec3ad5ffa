"""Owns rtnetlink: reading and changing links, addresses and routes of the namespace in which the daemon runs.

Free of: policy. Invariant: `ensure_*` and `remove_*` say whether they changed something, and applied again they change
nothing; every refusal of the kernel leaves here as a KernelError that names operation and object.

pyroute2's synchronous socket runs an asyncio loop of its own for each request, which it cannot do in a thread where
a loop runs already; its asynchronous one does not work on uvloop. So it is made and used in one worker thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import os
import secrets
import socket
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_network,
)
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from dataplane.errors import KernelError
from dataplane.kernel import rtnetlink
from dataplane.kernel.facts import Address, Link, Route, Vxlan
from dataplane.kernel.pyroute import IFF_UP, address_of, family_of, link_of, route_of, translated
from dataplane.kernel.rtnetlink import Table

P = ParamSpec("P")
R = TypeVar("R")

RT_TABLE_MAIN = 254
RT_SCOPE_UNIVERSE = 0
RTPROT_BOOT = 3
RTN_BLACKHOLE = 6
IFA_F_NODAD = 0x02
NLM_F_DUMP_INTR = 0x10

DUMP_ATTEMPTS = 10

_SOL_NETLINK, _NETLINK_GET_STRICT_CHK = 270, 12
_RTM_LENGTH, _RTM_TYPE = 1, 7
"""Bytes of a route message that say how long the destination's prefix is, and what kind of route it is."""
_RECEIVE_BYTES = 1 << 18


def _in_worker(
    method: Callable[Concatenate[Netlink, P], R],
) -> Callable[Concatenate[Netlink, P], Coroutine[Any, Any, R]]:
    """Make a method that speaks netlink awaitable: it runs in the worker thread, one at a time, in order of calls."""

    @functools.wraps(method)
    async def call(self: Netlink, /, *args: P.args, **kwargs: P.kwargs) -> R:
        request = functools.partial(method, self, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._worker, request)

    return call


class Netlink:
    """A connection to rtnetlink: `await Netlink.open()`, then any number of calls, then `await close()`.

    Every call raises KernelError where the kernel refuses it.
    """

    def __init__(self, worker: ThreadPoolExecutor, socket: Any) -> None:
        self._worker = worker
        self._socket = socket

    @classmethod
    async def open(cls) -> Netlink:
        """Connect to the namespace of the calling thread."""
        worker = ThreadPoolExecutor(1, thread_name_prefix="netlink")
        # groups=0: nothing reads events. ext_ack: the kernel's own reason in place of strerror where it has one.
        connect = functools.partial(IPRoute, groups=0, ext_ack=True, strict_check=True)
        try:
            with translated("open rtnetlink"):
                socket = await asyncio.get_running_loop().run_in_executor(worker, connect)
        except BaseException:
            worker.shutdown(wait=False)
            raise
        return cls(worker, socket)

    async def close(self) -> None:
        """Disconnect. Safe to call twice; never raises."""
        with contextlib.suppress(RuntimeError):  # the worker is shut down: somebody closed it before
            await asyncio.get_running_loop().run_in_executor(self._worker, self._socket.close)
        self._worker.shutdown(wait=False)

    @_in_worker
    def links(self) -> tuple[Link, ...]:
        """Every device, in order of index."""
        with translated("list devices"):
            return tuple(map(link_of, self._dump(self._socket.link)))

    @_in_worker
    def link(self, name: str) -> Link | None:
        """The device of that name, if there is one."""
        return self._find(name)

    @_in_worker
    def addresses(self) -> tuple[Address, ...]:
        """Every address of both families, in the kernel's order."""
        with translated("list addresses"):
            return tuple(map(address_of, self._dump(self._socket.addr)))

    @_in_worker
    def default_routes(self, version: int = 4) -> tuple[Route, ...]:
        """Default routes of the main table for IP version 4 or 6, the preferred (lowest metric) first."""
        everything: IPv4Network | IPv6Network = ip_network("0.0.0.0/0" if version == 4 else "::/0")
        return _routes(everything)

    @_in_worker
    def route_to(self, address: IPv4Address | IPv6Address) -> Route:
        """The route that a packet to `address` would take now."""
        with translated(f"find a route to {address}"):
            return route_of(self._socket.route("get", dst=str(address), family=family_of(address.version))[0])

    @_in_worker
    def ensure_link_up(self, name: str, *, mtu: int | None = None, txqueuelen: int | None = None) -> bool:
        """Set MTU (bytes) and transmit queue (packets) where given, then the device up; True if it was otherwise."""
        with translated(f"set device {name} up"):
            message = self._socket.link("get", ifname=name)[0]
        wanted = {"mtu": mtu, "txqlen": txqueuelen}
        changes: dict[str, int | str] = {
            word: value for word, value in wanted.items() if value is not None and message.get(word) != value
        }
        if not message["flags"] & IFF_UP:
            changes["state"] = "up"
        for word, value in changes.items():
            with translated(f"set {word} {value} of device {name}"):
                self._socket.link("set", **{"index": message["index"], word: value})
        return bool(changes)

    @_in_worker
    def ensure_address(
        self,
        name: str,
        address: IPv4Interface | IPv6Interface,
        *,
        sole_within: IPv4Network | IPv6Network | None = None,
    ) -> bool:
        """Give the device that address; its other addresses inside `sole_within` go. True if something changed."""
        index = self._index(name, f"add address {address} to device {name}")
        with translated(f"list addresses of device {name}"):
            messages = self._dump(self._socket.addr, family=family_of(address.version), index=index)
            present = [address_of(message).interface for message in messages]
        stale = [a for a in present if sole_within is not None and a.ip in sole_within and a != address]
        # the stale ones first: when a primary address goes, the kernel takes the secondaries of its prefix along
        for other in stale:
            self._delete_address(name, index, other)
        missing = address not in present
        if missing:
            # IPv6: nobody else can have an address of our lease, and a check would keep it from use for a second
            flags = {} if address.version == 4 else {"flags": IFA_F_NODAD}
            length = address.network.prefixlen
            with translated(f"add address {address} to device {name}"):
                self._socket.addr("add", index=index, address=str(address.ip), prefixlen=length, **flags)
        return missing or bool(stale)

    @_in_worker
    def ensure_route(self, destination: IPv4Network | IPv6Network, name: str) -> bool:
        """Route `destination` through the device, without gateway and source; True if it was not so.

        Raises KernelError with the holder's name where the main table routes the same destination through another
        device, whatever the metric: one of the two would take packets that are meant for the other.
        """
        operation = f"add route {destination} dev {name}"
        index = self._index(name, operation)
        present = _routes(destination)
        if others := [route for route in present if route.device_index != index]:
            raise KernelError(f"cannot {operation}: {self._holder(others[0])} holds that destination already")
        if present:
            return False
        # universe scope and protocol boot, as flannel's udp backend sets it (facts 6.2)
        with translated(operation):
            self._socket.route(
                "add", dst=str(destination), oif=index, scope=RT_SCOPE_UNIVERSE, proto=RTPROT_BOOT, table=RT_TABLE_MAIN
            )
        return True

    @_in_worker
    def ensure_blackhole(self, destination: IPv4Network | IPv6Network) -> bool:
        """Let the main table drop what it has no longer route for inside `destination`; True if it did not.

        Raises KernelError where a route to just this destination stands, as that of a bridge with pods.
        """
        if _has_blackhole(destination):
            return False
        for route in _routes(destination):
            raise KernelError(
                f"cannot add route blackhole {destination}: {self._holder(route)} holds that destination already;"
                " where a bridge has it, -ip-blackhole-route is of no use"
            )
        with translated(f"add route blackhole {destination}"):
            self._socket.route(
                "add", dst=str(destination), type="blackhole", proto=RTPROT_BOOT, table=RT_TABLE_MAIN
            )
        return True

    @_in_worker
    def remove_blackhole(self, destination: IPv4Network | IPv6Network) -> bool:
        """Remove that blackhole only; False where there is none."""
        if not _has_blackhole(destination):
            return False
        with translated(f"remove route blackhole {destination}"):
            self._socket.route("del", dst=str(destination), type="blackhole", table=RT_TABLE_MAIN)
        return True

    @_in_worker
    def has_vxlan(self) -> bool:
        """Whether this kernel can make vxlan devices; its module is loaded on the way, and no device is made."""
        try:
            with translated("ask for a vxlan device"):
                self._socket.link("add", ifname="vxlan-question", kind="vxlan")
        except KernelError as error:
            if isinstance(error.__cause__, NetlinkError):
                # the driver misses the VNI; without a driver the kernel does not know the kind
                return bool(error.__cause__.code == errno.EINVAL)
            raise
        raise KernelError("the kernel made a vxlan device without a VNI, named vxlan-question: remove it")

    @_in_worker
    def ensure_vxlan(self, name: str, vxlan: Vxlan, *, mac: str, mtu: int) -> Link:
        """The device as it then is: with that MAC (empty: what it has, or a random one if it is new) and MTU.

        One that is there is changed in place, with its entries and without a gap, as far as the kernel can do that:
        underlay device and address, learning, MAC, MTU. It is made anew for another VNI, port, GBP, group or outer
        family. Raises KernelError where the name belongs to a device of another kind.
        """
        present = self._find(name)
        if present is not None and present.vxlan is None:
            kind = present.kind or "hardware"
            raise KernelError(f"cannot make vxlan device {name}: a {kind} device has that name; remove or rename it")
        if present is None or not _alike(present.vxlan, vxlan):
            mac = mac or (present.address if present else random_mac().hex(":"))
            self._make_vxlan(name, vxlan, mac, mtu, present)
        elif present.vxlan != vxlan:
            changes = {**_local(vxlan), "vxlan_link": vxlan.lower, "vxlan_learning": int(vxlan.learning)}
            with translated(f"change the underlay of vxlan device {name}"):
                self._socket.link("set", index=present.index, kind="vxlan", **changes)
        made = self._find(name)
        if made is None:
            raise KernelError(f"cannot make vxlan device {name}: somebody removed it at once")
        for word, wanted, now in (("address", mac or made.address, made.address), ("mtu", mtu, made.mtu)):
            if wanted != now:
                with translated(f"set {word} {wanted} of device {name}"):
                    self._socket.link("set", **{"index": made.index, word: wanted})
        return dataclasses.replace(made, address=mac or made.address, mtu=mtu)

    def _make_vxlan(self, name: str, vxlan: Vxlan, mac: str, mtu: int, present: Link | None) -> None:
        if present is not None:
            with translated(f"remove device {name}, which is a vxlan device of another kind than {vxlan}"):
                self._socket.link("del", index=present.index)
        properties = {
            **_local(vxlan),
            "vxlan_id": vxlan.vni,
            "vxlan_link": vxlan.lower,
            "vxlan_port": vxlan.port,
            "vxlan_learning": int(vxlan.learning),
        }
        if vxlan.gbp:
            properties["vxlan_gbp"] = True
        try:
            with translated(f"make vxlan device {name}"):
                self._socket.link("add", ifname=name, kind="vxlan", address=mac, mtu=mtu, **properties)
        except KernelError as error:
            with translated("list devices"):
                others = [link_of(message) for message in self._dump(self._socket.link)]
            taken = [o.name for o in others if o.vxlan and (o.vxlan.vni, o.vxlan.port) == (vxlan.vni, vxlan.port)]
            if not taken:
                raise
            what = f"device {taken[0]} has VNI {vxlan.vni} on port {vxlan.port} already"
            raise KernelError(f"cannot make vxlan device {name}: {what}; remove it, or use another VNI") from error

    @_in_worker
    def remove_link(self, name: str) -> bool:
        """Remove the device, and with it its addresses and routes; False where it is absent already."""
        link = self._find(name)
        if link is None:
            return False
        with translated(f"remove device {name}"):
            self._socket.link("del", index=link.index)
        return True

    def _find(self, name: str) -> Link | None:
        try:
            with translated(f"look up device {name}"):
                return link_of(self._socket.link("get", ifname=name)[0])
        except KernelError as error:
            if isinstance(error.__cause__, NetlinkError) and error.__cause__.code == errno.ENODEV:
                return None
            raise

    def _index(self, name: str, operation: str) -> int:
        link = self._find(name)
        if link is None:
            raise KernelError(f"cannot {operation}: there is no device {name}")
        return link.index

    def _delete_address(self, name: str, index: int, address: IPv4Interface | IPv6Interface) -> bool:
        length = address.network.prefixlen
        with translated(f"remove address {address} from device {name}"):
            try:
                self._socket.addr("del", index=index, address=str(address.ip), prefixlen=length)
            except NetlinkError as error:
                if error.code == errno.EADDRNOTAVAIL:
                    return False
                raise
        return True

    def _holder(self, route: Route) -> str:
        if route.device_index == 0:
            return "a route without a device (such as a blackhole)"
        with translated(f"look up device number {route.device_index}"):
            return f"device {link_of(self._socket.link('get', index=route.device_index)[0]).name}"

    def _dump(self, request: Callable[..., Any], **selection: Any) -> list[Any]:
        # the kernel marks a dump that others changed under its hands: it may lack entries or have them twice
        for _ in range(DUMP_ATTEMPTS):
            messages = list(request("dump", **selection))
            if not any(m["header"]["flags"] & NLM_F_DUMP_INTR for m in messages):
                return messages
        raise KernelError(f"the kernel's tables changed during each of {DUMP_ATTEMPTS} attempts to list them")


def _routes(destination: IPv4Network | IPv6Network) -> tuple[Route, ...]:
    return tuple(sorted((route for _, route in _listed(destination)), key=lambda route: route.metric))


def _has_blackhole(destination: IPv4Network | IPv6Network) -> bool:
    return any(body[_RTM_TYPE] == RTN_BLACKHOLE for body, _ in _listed(destination))


def _listed(destination: IPv4Network | IPv6Network) -> list[tuple[bytes, Route]]:
    """The main table's routes to it, of every kind, as the kernel shows them and as records. It can only show all there
    are: to read those of ten thousand peers takes pyroute2 a second, in which the event loop stands, and 35 MiB."""
    scope, length = rtnetlink.routes_of(destination.version, 0), destination.prefixlen
    with (
        translated(f"list routes to {destination}"),
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as asking,
    ):
        with contextlib.suppress(OSError):  # before Linux 4.20 the kernel shows every table
            asking.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        for attempt in range(1, DUMP_ATTEMPTS + 1):
            scan = rtnetlink.Scan(Table.ROUTE, {}, 0, attempt)
            asking.sendto(rtnetlink.dump_message(scope, attempt), (0, 0))
            while scan.end is None:
                scan.take(asking.recv(_RECEIVE_BYTES))
            if scan.end not in (0, errno.ENOENT):  # which says that a namespace has had no route yet
                raise OSError(scan.end, os.strerror(scan.end))
            alike = ((body, rtnetlink.route_of(body)) for body in scan.others if body[_RTM_LENGTH] == length)
            found = [each for each in alike if (each[1].destination, each[1].table) == (destination, RT_TABLE_MAIN)]
            # others that change meanwhile, as in a storm of leases one always does, put in doubt only what is missing
            if found or not scan.flags & NLM_F_DUMP_INTR:
                return found
    raise KernelError(f"the kernel's routes changed during each of {DUMP_ATTEMPTS} attempts to list them")


def _alike(present: Vxlan | None, wanted: Vxlan) -> bool:
    """Whether the one can be made into the other in place (vxlan_changelink)."""
    if present is None or present.local is None or wanted.local is None:
        return present == wanted
    same = dataclasses.replace(present, lower=wanted.lower, local=wanted.local, learning=wanted.learning) == wanted
    return same and present.local.version == wanted.local.version


def _local(vxlan: Vxlan) -> dict[str, str | int]:
    if vxlan.local is None:
        return {}
    return {"vxlan_local" if vxlan.local.version == 4 else "vxlan_local6": str(vxlan.local)}


def random_mac() -> bytes:
    """Unicast and locally administered, as flannel's (pkg/mac/mac.go). What a device is created with, udev leaves alone
    (MACAddressPolicy)."""
    first, *others = secrets.token_bytes(6)
    return bytes((first & 0xFC | 0x02, *others))


def refuse_router_advertisements(name: str) -> bool:
    """Keep others in the overlay from telling this node its routes (CVE-2020-10749); call it before the device is up.

    Returns and raises as `quiet_ipv6`.
    """
    return _set_ipv6(name, {"accept_ra": "0"})


def quiet_ipv6(name: str) -> bool:
    """Keep the kernel from sending IPv6 of its own through the device; call it before the device is up.

    Returns whether it is quiet now: True also where the kernel has no IPv6, False where /proc/sys is read-only (an
    unprivileged container). Raises KernelError where there is no such device.
    """
    return _set_ipv6(name, {"accept_ra": "0", "disable_ipv6": "1"})


def restrain_ipv6(name: str) -> bool:
    """Let the device carry IPv6, with nothing of the kernel's own: no address of its making, and nobody in the overlay
    tells this node its routes. Returns and raises as `quiet_ipv6`."""
    return _set_ipv6(name, {"accept_ra": "0", "addr_gen_mode": "1", "disable_ipv6": "0"})


def _set_ipv6(name: str, settings: Mapping[str, str]) -> bool:
    if not Path("/proc/sys/net/ipv6").exists():
        return True
    directory = Path("/proc/sys/net/ipv6/conf", name)
    for setting, value in settings.items():
        try:
            if (directory / setting).read_text().strip() != value:
                (directory / setting).write_text(value)
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                return False
            raise KernelError(f"cannot set {setting} of device {name}: {error.strerror}") from error
    return True
