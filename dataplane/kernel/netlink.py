"""Owns rtnetlink: reading and changing links, addresses and routes of the namespace in which the daemon runs.

Free of: policy. Invariant: `ensure_*` and `remove_*` say whether they changed something, and applied again they change
nothing; every refusal of the kernel leaves here as a KernelError that names operation and object.

pyroute2's synchronous socket runs an asyncio loop of its own for each request, which it cannot do in a thread where
a loop runs already; its asynchronous one does not work on uvloop. So it is made and used in one worker thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import Any, Concatenate, ParamSpec, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from dataplane.errors import KernelError
from dataplane.kernel.facts import Address, Link, Route

P = ParamSpec("P")
R = TypeVar("R")

RT_TABLE_MAIN = 254
RT_SCOPE_UNIVERSE = 0
RTPROT_BOOT = 3
IFF_UP = 0x1
IFA_F_SECONDARY = 0x01
IFA_F_DEPRECATED = 0x20
IFA_F_PERMANENT = 0x80
NLM_F_DUMP_INTR = 0x10

DUMP_ATTEMPTS = 10


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
            with _translated("open rtnetlink"):
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
        with _translated("list devices"):
            return tuple(map(_link, self._dump(self._socket.link)))

    @_in_worker
    def link(self, name: str) -> Link | None:
        """The device of that name, if there is one."""
        return self._find(name)

    @_in_worker
    def addresses(self) -> tuple[Address, ...]:
        """Every address of both families, in the kernel's order."""
        with _translated("list addresses"):
            return tuple(map(_address, self._dump(self._socket.addr)))

    @_in_worker
    def default_routes(self) -> tuple[Route, ...]:
        """IPv4 default routes of the main table, the preferred (lowest metric) first."""
        return self._routes(IPv4Network("0.0.0.0/0"))

    @_in_worker
    def route_to(self, address: IPv4Address | IPv6Address) -> Route:
        """The route that a packet to `address` would take now."""
        with _translated(f"find a route to {address}"):
            return _route(self._socket.route("get", dst=str(address), family=_family(address.version))[0])

    @_in_worker
    def ensure_link_up(self, name: str, *, mtu: int | None = None, txqueuelen: int | None = None) -> bool:
        """Set MTU (bytes) and transmit queue (packets) where given, then the device up; True if it was otherwise."""
        with _translated(f"set device {name} up"):
            message = self._socket.link("get", ifname=name)[0]
        wanted = {"mtu": mtu, "txqlen": txqueuelen}
        changes: dict[str, int | str] = {
            word: value for word, value in wanted.items() if value is not None and message.get(word) != value
        }
        if not message["flags"] & IFF_UP:
            changes["state"] = "up"
        for word, value in changes.items():
            with _translated(f"set {word} {value} of device {name}"):
                self._socket.link("set", **{"index": message["index"], word: value})
        return bool(changes)

    @_in_worker
    def ensure_address(self, name: str, address: IPv4Interface, *, sole_within: IPv4Network | None = None) -> bool:
        """Give the device that address; its other addresses inside `sole_within` go. True if something changed."""
        index = self._index(name, f"add address {address} to device {name}")
        with _translated(f"list addresses of device {name}"):
            present = [_address(m).interface for m in self._dump(self._socket.addr, family=AF_INET, index=index)]
        stale = [a for a in present if sole_within is not None and a.ip in sole_within and a != address]
        # the stale ones first: when a primary address goes, the kernel takes the secondaries of its prefix along
        for other in stale:
            self._delete_address(name, index, other)
        missing = address not in present
        if missing:
            with _translated(f"add address {address} to device {name}"):
                self._socket.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
        return missing or bool(stale)

    @_in_worker
    def remove_address(self, name: str, address: IPv4Interface) -> bool:
        """Take the address from the device; False where device or address is absent already."""
        link = self._find(name)
        return link is not None and self._delete_address(name, link.index, address)

    @_in_worker
    def ensure_route(self, destination: IPv4Network, name: str) -> bool:
        """Route `destination` through the device, without gateway and source; True if it was not so.

        Raises KernelError with the holder's name where the main table routes the same destination through another
        device, whatever the metric: one of the two would take packets that are meant for the other.
        """
        operation = f"add route {destination} dev {name}"
        index = self._index(name, operation)
        present = self._routes(destination)
        if others := [route for route in present if route.device_index != index]:
            raise KernelError(f"cannot {operation}: {self._holder(others[0])} holds that destination already")
        if present:
            return False
        # universe scope and protocol boot, as flannel's udp backend sets it (facts 6.2)
        with _translated(operation):
            self._socket.route(
                "add", dst=str(destination), oif=index, scope=RT_SCOPE_UNIVERSE, proto=RTPROT_BOOT, table=RT_TABLE_MAIN
            )
        return True

    @_in_worker
    def remove_route(self, destination: IPv4Network, name: str) -> bool:
        """Remove the route through this device only; False where device or route is absent already."""
        link = self._find(name)
        if link is None or not any(route.device_index == link.index for route in self._routes(destination)):
            return False
        with _translated(f"remove route {destination} dev {name}"):
            self._socket.route("del", dst=str(destination), oif=link.index, table=RT_TABLE_MAIN)
        return True

    @_in_worker
    def remove_link(self, name: str) -> bool:
        """Remove the device, and with it its addresses and routes; False where it is absent already."""
        link = self._find(name)
        if link is None:
            return False
        with _translated(f"remove device {name}"):
            self._socket.link("del", index=link.index)
        return True

    def _find(self, name: str) -> Link | None:
        try:
            with _translated(f"look up device {name}"):
                return _link(self._socket.link("get", ifname=name)[0])
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
        with _translated(f"remove address {address} from device {name}"):
            try:
                self._socket.addr("del", index=index, address=str(address.ip), prefixlen=length)
            except NetlinkError as error:
                if error.code == errno.EADDRNOTAVAIL:
                    return False
                raise
        return True

    def _routes(self, destination: IPv4Network) -> tuple[Route, ...]:
        with _translated(f"list routes to {destination}"):
            messages = self._dump(self._socket.route, family=AF_INET, table=RT_TABLE_MAIN)
        routes = (_route(m) for m in messages if m["dst_len"] == destination.prefixlen)
        return tuple(sorted((r for r in routes if r.destination == destination), key=lambda r: r.metric))

    def _holder(self, route: Route) -> str:
        if route.device_index == 0:
            return "a route without a device (such as a blackhole)"
        with _translated(f"look up device number {route.device_index}"):
            return f"device {_link(self._socket.link('get', index=route.device_index)[0]).name}"

    def _dump(self, request: Callable[..., Any], **selection: Any) -> list[Any]:
        # the kernel marks a dump that others changed under its hands: it may lack entries or have them twice
        for _ in range(DUMP_ATTEMPTS):
            messages = list(request("dump", **selection))
            if not any(m["header"]["flags"] & NLM_F_DUMP_INTR for m in messages):
                return messages
        raise KernelError(f"the kernel's tables changed during each of {DUMP_ATTEMPTS} attempts to list them")


def quiet_ipv6(name: str) -> bool:
    """Keep the kernel from sending IPv6 of its own through the device; call it before the device is up.

    Returns whether it is quiet now: True also where the kernel has no IPv6, False where /proc/sys is read-only (an
    unprivileged container). Raises KernelError where there is no such device.
    """
    if not Path("/proc/sys/net/ipv6").exists():
        return True
    settings = Path("/proc/sys/net/ipv6/conf", name)
    for setting, value in (("accept_ra", "0"), ("disable_ipv6", "1")):
        try:
            if (settings / setting).read_text().strip() != value:
                (settings / setting).write_text(value)
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                return False
            raise KernelError(f"cannot set {setting} of device {name}: {error.strerror}") from error
    return True


@contextlib.contextmanager
def _translated(operation: str) -> Iterator[None]:
    try:
        yield
    except (NetlinkError, OSError) as error:
        code = error.code if isinstance(error, NetlinkError) else error.errno
        reason = error.args[-1] if error.args else error
        if code == errno.EPERM:
            reason = f"{reason}; run as root or with CAP_NET_ADMIN"
        raise KernelError(f"cannot {operation}: {reason}") from error


def _family(version: int) -> int:
    return int(AF_INET if version == 4 else AF_INET6)


def _link(message: Any) -> Link:
    info = message.get("linkinfo")
    kind = (info.get("kind") if info else None) or ""
    data = info.get("data") if kind == "vxlan" else None
    return Link(
        index=message["index"],
        name=message.get("ifname"),
        kind=kind,
        mtu=message.get("mtu") or 0,
        up=bool(message["flags"] & IFF_UP),
        carrier=bool(message.get("carrier")),
        address=message.get("address") or "",
        udp_port=(data.get("vxlan_port") or 0) if data else 0,
    )


def _address(message: Any) -> Address:
    # of a point-to-point link IFA_ADDRESS is the other end; IPv6 has IFA_LOCAL there only
    own = message.get("local") or message.get("address")
    flags = message.get("flags") or 0
    return Address(
        index=message["index"],
        interface=ip_interface(f"{own}/{message['prefixlen']}"),
        scope=message["scope"],
        permanent=bool(flags & IFA_F_PERMANENT),
        deprecated=bool(flags & IFA_F_DEPRECATED),
        secondary=bool(flags & IFA_F_SECONDARY),
    )


def _route(message: Any) -> Route:
    hops = message.get("multipath") or [message]
    gateway, source = hops[0].get("gateway"), message.get("prefsrc")
    nowhere = "0.0.0.0" if message["family"] == AF_INET else "::"
    destination: IPv4Network | IPv6Network = ip_network(f"{message.get('dst') or nowhere}/{message['dst_len']}")
    return Route(
        destination=destination,
        gateway=ip_address(gateway) if gateway else None,
        device_index=hops[0].get("oif") or 0,
        source=ip_address(source) if source else None,
        table=message.get("table") or 0,
        metric=message.get("priority") or 0,
        scope=message["scope"],
    )
