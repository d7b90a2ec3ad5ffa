"""Owns flannel's udp backend: inner packets as the payload of datagrams between the nodes' udp ports.

One TUN device, one route for the whole network, one socket; peers live in the path's table only, never in the
kernel's (flannel-io/flannel pkg/backend/udp). Free of: where leases come from. Invariant: a lease that this
backend cannot carry has no route, and `status().ignored` says why.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Network

from dataplane.backend.base import BackendStatus, PeerStatus, Underlay
from dataplane.errors import DropReason, KernelError
from dataplane.kernel import tun, underlay
from dataplane.kernel.netlink import Netlink, quiet_ipv6
from dataplane.lease.model import Lease, LeaseAttrs, LeaseEvent, LeaseEventKind
from dataplane.path.capability import Capability
from dataplane.path.datapath import Datapath, PathEvent, PathEventKind, RouteCounters, SourceCheck
from dataplane.path.wire import UDP_OVERHEAD

log = logging.getLogger(__name__)

TX_QUEUE_PACKETS = 1000
"""Packets that the TUN holds while the pump is busy; with 500, the kernel's default, short bursts are lost."""

PATH_MTU_SECONDS = 600.0
"""As long as the kernel keeps what it has learnt of a path (net.ipv4.route.mtu_expires)."""

SMALLEST_MTU = 576 - UDP_OVERHEAD
"""A path that claims less is somebody's forgery (RFC 791: every node takes 576 bytes)."""

REPEAT_SECONDS = 60.0
"""The same complaint about the same address is logged no more often."""

REBUILD_SECONDS = (0.0, 0.2, 1.0, 5.0)
"""Waits before each try to make the device again; the last one repeats."""


class UdpBackend:
    """See dataplane.backend.base.Backend for the life of a backend."""

    def __init__(
        self,
        facing: Underlay,
        network: IPv4Network,
        port: int,
        netlink: Netlink,
        *,
        source_check: SourceCheck,
        wanted: frozenset[Capability],
        spin: float,
        device: str,
        on_device: Callable[[str], None],
    ) -> None:
        """`wanted`: the capabilities to use where the kernel grants them. `spin`: see Datapath. `device`: what a former
        daemon of this node left, to be adopted; empty for none. `on_device` is told the name of the device in use, so
        that it can be kept for the next start, and "" once there is none."""
        self._facing = facing
        self._network = network
        self._port = port
        self._netlink = netlink
        self._source_check = source_check
        self._wanted = wanted
        self._lost = frozenset[Capability]()
        self._spin = spin
        self._device = device
        self._on_device = on_device
        self._subnet: IPv4Network | None = None
        self._socket: underlay.UdpSocket | None = None
        self._icmp: socket.socket | None = None
        self._tun: tun.Tun | None = None
        self._path: Datapath | None = None
        self._routes: dict[IPv4Network, IPv4Address] = {}
        self._ignored: dict[IPv4Network | IPv6Network, str] = {}
        self._unknown: dict[IPv4Address | IPv6Address, int] = {}
        self._complaints: dict[tuple[PathEventKind, IPv4Address, int], float] = {}
        self._path_mtus: dict[IPv4Address, asyncio.TimerHandle] = {}
        self._rebuild: asyncio.Task[None] | None = None

    @property
    def mtu(self) -> int:
        return self._facing.mtu - UDP_OVERHEAD

    async def prepare(self) -> LeaseAttrs:
        """Takes the port."""
        self._socket = await self._bind(self._facing)
        self._icmp = underlay.open_icmp()
        return LeaseAttrs(public_ip=self._facing.public_ip)

    async def _bind(self, facing: Underlay) -> underlay.UdpSocket:
        links = await self._netlink.links()
        bound = underlay.open_udp(
            facing.address, self._port, interface=facing.name, links=links, wanted=self._wanted
        )
        for note in bound.notes:
            log.warning("%s", note)
        return bound

    async def attach(self, lease: Lease) -> None:
        self._subnet = lease.key.subnet
        try:
            await self._open()
        except BaseException:
            await self.close()
            raise

    async def apply(self, events: Sequence[LeaseEvent]) -> None:
        for event in events:
            subnet = event.lease.key.subnet
            reason = self._unfit(event)
            if reason:
                self._ignored[subnet] = reason
                log.warning("Ignoring lease %s: %s", subnet, reason)
            else:
                self._ignored.pop(subnet, None)
            if reason or event.kind is LeaseEventKind.REMOVED:
                self._remove_route(subnet)
            else:
                self._set_route(subnet, event.lease.attrs.public_ip)

    async def move(self, facing: Underlay) -> LeaseAttrs:
        """Device, address and route stay, so inner connections lose what comes while the pumps change sockets."""
        if facing.address != self._facing.address:
            fresh = await self._bind(facing)
            if self._path is not None:
                await self._path.stop()
            if self._socket is not None:
                self._socket.close()
            self._socket = fresh
            if self._path is not None:
                self._start_path()
        self._facing = facing
        if self._tun is not None:
            await self._netlink.ensure_link_up(self._tun.name, mtu=self.mtu)
        return LeaseAttrs(public_ip=facing.public_ip)

    def status(self) -> BackendStatus:
        statistics = self._path.statistics() if self._path else None
        now = time.monotonic() * 1000
        return BackendStatus(
            type="udp",
            device=self._tun.name if self._tun else "",
            mtu=self.mtu,
            peers=tuple(_peer_status(route, now) for route in statistics.routes) if statistics else (),
            drops=statistics.drops if statistics else dict.fromkeys(DropReason, 0),
            unknown_sources=dict(self._unknown),
            ignored=dict(self._ignored),
            capabilities={capability: self._state_of(capability) for capability in Capability},
        )

    async def close(self) -> None:
        if self._rebuild is not None:
            self._rebuild.cancel()
            await asyncio.gather(self._rebuild, return_exceptions=True)
            self._rebuild = None
        await self._close_device()
        for descriptor in (self._socket, self._icmp):
            if descriptor is not None:
                descriptor.close()
        self._socket = self._icmp = None

    def _unfit(self, event: LeaseEvent) -> str:
        """Why packets cannot be carried to the node that holds this lease; empty where they can."""
        kind = event.lease.attrs.backend_type
        if event.kind is LeaseEventKind.REMOVED or kind in ("", "udp"):
            return ""
        return f"its node uses backend {kind!r}, this one udp"

    def _set_route(self, subnet: IPv4Network, address: IPv4Address) -> None:
        self._routes[subnet] = address
        if self._path is None:
            return
        try:
            self._path.set_route(subnet, address)
        except KernelError as error:
            self._ignored[subnet] = str(error)
            log.error("Cannot reach subnet %s: %s", subnet, error)

    def _remove_route(self, subnet: IPv4Network) -> None:
        self._routes.pop(subnet, None)
        if self._path is not None:
            self._path.remove_route(subnet)

    async def _open(self) -> None:
        """Device, address, route and pumps, in this order; every step may meet what a killed daemon left."""
        if self._subnet is None or self._socket is None or self._icmp is None:
            raise RuntimeError("prepare and a lease come before the device")
        await self._remove_leftovers()
        self._tun = tun.open_tun(adopt=self._device, wanted=self._wanted)
        self._device = self._tun.name
        self._on_device(self._device)
        address = IPv4Interface((self._subnet.network_address, 32))
        quiet_ipv6(self._device)
        await self._netlink.ensure_address(self._device, address, sole_within=self._network)
        await self._netlink.ensure_link_up(self._device, mtu=self.mtu, txqueuelen=TX_QUEUE_PACKETS)
        self._tun = dataclasses.replace(self._tun, granted=tun.takes_superframes(self._tun))
        await self._netlink.ensure_route(self._network, self._device)
        self._start_path()
        log.info("Carrying %s through %s, MTU %d, port %d", self._network, self._device, self.mtu, self._port)
        log.info("Capabilities: %s", ", ".join(f"{c.word} {self._state_of(c)}" for c in Capability))

    def _start_path(self) -> None:
        if self._tun is None or self._socket is None or self._icmp is None or self._subnet is None:
            raise RuntimeError("the device comes before the path")
        self._path = Datapath(
            self._tun.fd,
            self._socket.fd,
            self._icmp.fileno(),
            port=self._port,
            icmp_source=self._subnet.network_address,
            source_check=self._source_check,
            capabilities=self._granted() - self._lost,
            run_datagrams=self._socket.run_datagrams,
            spin=self._spin,
            on_event=self._on_event,
        )
        for subnet, peer in self._routes.items():
            self._set_route(subnet, peer)
        self._path.start()

    def _granted(self) -> frozenset[Capability]:
        return (self._tun.granted if self._tun else frozenset()) | (
            self._socket.granted if self._socket else frozenset()
        )

    def _state_of(self, capability: Capability) -> str:
        if capability not in self._wanted:
            return "off: switched off"
        if capability in self._lost:
            return "off: the kernel refused it at work"
        return "on" if capability in self._granted() else "off: the kernel does not have it"

    async def _remove_leftovers(self) -> None:
        """A device of a killed daemon whose state is lost would keep the network's route for itself."""
        links = await self._netlink.links()
        ours = {a.index for a in await self._netlink.addresses() if a.interface.ip in self._network}
        stale = {link.name for link in links if link.index in ours} & set(tun.leftovers(links)) - {self._device}
        for name in sorted(stale):
            log.warning(
                "Removing device %s: a killed daemon left it, and it holds an address of %s", name, self._network
            )
            await self._netlink.remove_link(name)

    async def _close_device(self) -> None:
        for timer in self._path_mtus.values():
            timer.cancel()
        self._path_mtus.clear()
        if self._path is not None:
            await self._path.stop()
            self._path = None
        if self._tun is not None:
            tun.release(self._tun)
            self._tun = None
            self._on_device("")

    def _on_event(self, event: PathEvent) -> None:
        if event.kind is PathEventKind.DEVICE_GONE:
            if self._rebuild is None or self._rebuild.done():
                self._rebuild = asyncio.create_task(self._rebuild_device())
        elif event.kind is PathEventKind.UNKNOWN_SOURCE:
            self._unknown[event.address] = event.value
            self._complain(
                event,
                "Dropping datagrams from %s: no lease names it. If it is a node, its -public-ip differs from the "
                "address it sends from (see --source-check)",
                event.address,
            )
        elif event.kind is PathEventKind.CAPABILITY_LOST:
            self._lost |= {Capability(event.value)}
            log.warning("The kernel refused %s at work: going on without it", Capability(event.value).word)
        elif event.kind is PathEventKind.TOO_LONG:
            self._learn_path_mtu(event.address)
        else:
            self._complain(event, "Cannot send to peer %s: %s", event.address, os.strerror(event.value))

    def _learn_path_mtu(self, peer: IPv4Address) -> None:
        """Ask the kernel what it has learnt, and forget it when the kernel does."""
        mtu = underlay.path_mtu(peer) - UDP_OVERHEAD
        if self._path is None or not SMALLEST_MTU <= mtu < self.mtu or peer in self._path_mtus:
            return
        log.warning("The path to %s takes inner packets of %d bytes, not %d", peer, mtu, self.mtu)
        self._path.set_path_mtu(peer, mtu)
        loop = asyncio.get_running_loop()
        self._path_mtus[peer] = loop.call_later(PATH_MTU_SECONDS, self._forget_path_mtu, peer)

    def _forget_path_mtu(self, peer: IPv4Address) -> None:
        del self._path_mtus[peer]
        if self._path is not None:
            self._path.set_path_mtu(peer, 0)

    def _complain(self, event: PathEvent, text: str, *arguments: object) -> None:
        about = (event.kind, event.address, event.value if event.kind is PathEventKind.SEND_FAILED else 0)
        now = time.monotonic()
        if now - self._complaints.get(about, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            self._complaints[about] = now
            log.warning(text, *arguments)

    async def _rebuild_device(self) -> None:
        """Somebody deleted the device under us: make it again, with its address and route."""
        log.error("Device %s is gone; making it again", self._device)
        await self._close_device()
        for attempt in itertools.count():
            await asyncio.sleep(REBUILD_SECONDS[min(attempt, len(REBUILD_SECONDS) - 1)])
            try:
                await self._open()
            except KernelError as error:
                log.error("Cannot make device %s again: %s", self._device, error)  # the text says it all
                await self._close_device()
            else:
                return


def _peer_status(route: RouteCounters, now: float) -> PeerStatus:
    return PeerStatus(
        subnet=route.subnet,
        public_ip=route.address,
        tx_packets=route.tx_packets,
        tx_bytes=route.tx_bytes,
        rx_packets=route.rx_packets,
        rx_bytes=route.rx_bytes,
        idle=max(0.0, now - route.rx_last) / 1000 if route.rx_last else None,
    )
