"""Owns a userspace tunnel, which the udp and vxlan backends have in common: when its device, its sockets and the path
between them are made, follow leases and underlay, and end.

Free of: what a lease says of its node (`backend.peers`), what the outer wire looks like (the backend's `Shape`), how
the device is kept (`backend.device`), and what becomes of reports on other nodes (`backend.reports`). Invariant: a
device that somebody deletes is made again, and after `close` nothing stands that `attach` has made.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dataplane.backend.attention import Attention
from dataplane.backend.base import BackendStatus, PeerStatus, Queues, Underlay
from dataplane.backend.device import Device
from dataplane.backend.peers import IPAddress, IPNetwork, Peer, Peers
from dataplane.backend.reports import Reports
from dataplane.backend.sockets import OpenSockets, Sockets
from dataplane.errors import DropReason, KernelError
from dataplane.kernel import tun, underlay
from dataplane.kernel.events import UNDERLAY, KernelEvents
from dataplane.kernel.facts import KernelEvent, holders
from dataplane.kernel.netlink import Netlink
from dataplane.lease.model import LeaseEvent
from dataplane.path.capability import Capability
from dataplane.path.datapath import Datapath, Tap
from dataplane.path.facts import (
    IcmpSender,
    PathEvent,
    PathEventKind,
    PathStatistics,
    RouteCounters,
    SourceCheck,
    Vxlan,
    totals,
)
from dataplane.path.wire import LEAST_MTU

log = logging.getLogger(__name__)

LEAST_POD_MTU = 576
"""Every host takes packets of so many bytes (RFC 791): an interface that claims less is no pods' bridge."""

REBUILD_SECONDS = (0.0, 0.2, 1.0, 5.0)
"""Waits before each try to make the device again; the last one repeats."""

OnPeers = Callable[[Mapping[IPNetwork, Peer | None]], Awaitable[None]]
"""Who else follows the peers by subnet, such as the routes of DirectRouting; None for one that is gone."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """What flags and net-conf say. `wanted`: the capabilities to use where the kernel grants them; `spin`,
    `moderation`: see Datapath; `queues`: of each device, with pumps and a receiving socket for each."""

    source_check: SourceCheck
    wanted: frozenset[Capability]
    spin: float
    moderation: float
    queues: int = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """What distinguishes a tunnel. `device`: its name, or a template such as flannel%d; `networks`: what is routed
    into it, at most one of each IP version; `overhead`: bytes that the outer headers take."""

    device: str
    networks: tuple[IPNetwork, ...]
    overhead: int
    vxlan: Vxlan | None = None


class Tunnel:
    """Open the sockets (`prepare`), make the device (`attach`), follow peers and underlay, `close`."""

    def __init__(
        self,
        shape: Shape,
        peers: Sequence[Peers],
        open_sockets: OpenSockets,
        netlink: Netlink,
        tuning: Tuning,
        *,
        device: str,
        on_device: Callable[[str], None],
        on_peers: OnPeers | None = None,
    ) -> None:
        """`device`: what a former daemon of this node left, to be taken over; empty for none. `on_device` is told the
        name of the device in use, so that it can be kept for the next start, and "" once there is none."""
        self._shape = shape
        self._peers = peers
        self._open_sockets = open_sockets
        self._netlink = netlink
        self._tuning = tuning
        self._on_peers = on_peers
        self._subnets: tuple[IPNetwork, ...] = ()
        self._mtu = 0
        self._sockets: Sockets | None = None
        self._icmp: dict[int, socket.socket] = {}
        self._device = Device(shape.device, shape.networks, netlink, adopt=device, on_device=on_device)
        self._path: Datapath | None = None
        self._reports = Reports(shape.overhead, self._set_path_mtu)
        self._lost = frozenset[Capability]()
        self._refused: dict[IPNetwork, str] = {}
        self._rebuild: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._events: KernelEvents | None = None
        self._attention = Attention(self._look)
        self._taps: Sequence[Tap] = ()
        self._number = 0

    # --- what a backend asks --------------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """Empty while there is none."""
        return self._device.name if self._device.tun else ""

    @property
    def repairs(self) -> int:
        """How often the device was found otherwise than it should be, and was made right."""
        return self._device.repairs

    @property
    def unknown_sources(self) -> Mapping[IPAddress, int]:
        return self._reports.unknown_sources

    @property
    def queues(self) -> Queues:
        asked, device = self._tuning.queues, self._device.tun
        return Queues(asked, len(device.queues), device.note) if device else Queues(asked, 0)

    @property
    def ignored(self) -> dict[IPNetwork, str]:
        """Subnets that are not reached, with the reason."""
        return {subnet: why for peers in self._peers for subnet, why in peers.ignored.items()} | self._refused

    def statistics(self) -> PathStatistics | None:
        return self._path.statistics() if self._path else None

    def state_of(self, capability: Capability) -> str:
        """`on`, or why not."""
        if capability not in self._tuning.wanted:
            return "off: switched off"
        if capability in self._lost:
            return "off: the kernel refused it at work"
        return "on" if capability in self._granted() else "off: the kernel does not have it"

    async def prepare(self, facing: Underlay, mtu: int) -> None:
        """Open the sockets. `mtu`: the device's to be. Raises KernelError."""
        self._check_mtu(facing, mtu)
        self._sockets = await self._open_sockets(facing, None)
        self._mtu = mtu
        for note in self._sockets.receiver.notes:
            log.warning("%s", note)
        for network in self._shape.networks:
            self._icmp[network.version] = underlay.open_icmp(network.version)

    async def attach(self, subnets: Iterable[IPNetwork]) -> None:
        """Make the device for those of our subnets that are of its networks. Raises KernelError, and then leaves
        nothing."""
        versions = {network.version for network in self._shape.networks}
        self._subnets = tuple(subnet for subnet in subnets if subnet.version in versions)
        try:
            self._events = KernelEvents.open(UNDERLAY, self._on_news)
            async with self._turn:
                await self._open()
        except BaseException:
            await self.close()
            raise
        self._attention.start()

    async def apply(self, events: Sequence[LeaseEvent]) -> None:
        """Follow the peers: they are reached through the path before anybody else hears of them, and after."""
        before = self.ignored
        changes = {subnet: peer for peers in self._peers for subnet, peer in peers.follow(events).items()}
        for peer in changes.values():
            if peer is not None:
                self._set_route(peer)
        for subnet, why in self.ignored.items():
            if before.get(subnet) != why:
                log.warning("Ignoring lease %s: %s", subnet, why)
        if self._on_peers is not None:
            await self._on_peers(changes)
        for subnet, peer in changes.items():
            if peer is None:
                self._refused.pop(subnet, None)
                if self._path is not None:
                    self._path.remove_route(subnet)

    async def move(self, facing: Underlay, mtu: int) -> None:
        """Follow the underlay: the device and its address stay, packets wait while the pumps change sockets. Raises
        KernelError and goes on as before where the new ones cannot be opened."""
        self._check_mtu(facing, mtu)
        async with self._turn:
            former = self._sockets
            self._sockets = (await self._open_sockets(facing, former)).as_wide_as(former)
            self._mtu = mtu
            self._reports.forget_path_mtus()
            if self._path is not None:
                await self._path.rewire(self._sockets.outer, mtu)
                await self._arm_again()
                await self._look_at_pods()
            if former is not None:
                former.close(kept=self._sockets)
            await self._device.resize(mtu)

    async def arm(self, taps: Sequence[Tap], number: int = 0) -> None:
        """Show packets to these taps and no others, also after the path was made again. `number`: see Datapath.arm."""
        self._taps, self._number = taps, number
        if self._path is not None:
            await self._path.arm(taps, number)

    async def close(self) -> None:
        """Device, address and routes go. Safe to call at any point of the life."""
        await self._attention.close()
        if self._events is not None:
            self._events.close()
        tasks = [task for task in (self._rebuild, self._looking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._rebuild = self._looking = None
        async with self._turn:
            await self._close_device()
            if self._sockets is not None:
                self._sockets.close()
                self._sockets = None
            for icmp in self._icmp.values():
                icmp.close()
            self._icmp.clear()

    # --- device and path ------------------------------------------------------------------------------------------

    def _check_mtu(self, facing: Underlay, mtu: int) -> None:
        least = max(LEAST_MTU[network.version] for network in self._shape.networks)
        if mtu < least:
            overhead = self._shape.overhead
            raise KernelError(
                f"the MTU of {facing.name} leaves {mtu} bytes for a packet, and the overlay needs {least}: "
                f"raise it to {least + overhead} or more"
            )

    async def _open(self) -> None:
        """Device, address, routes and pumps, in this order; every step may meet what a killed daemon left."""
        if not self._subnets or self._sockets is None:
            raise RuntimeError("prepare and a lease come before the device")
        device = await self._device.open(self._subnets, self._mtu, self._tuning.wanted, self._tuning.queues)
        self._sockets = self._sockets.widened(len(device.queues))
        self._start_path(device, self._sockets)
        await self._arm_again()
        await self._look_at_pods()
        carried = " and ".join(str(network) for network, _ in self._device.routed)
        log.info("Carrying %s through %s, MTU %d, port %d", carried, device.name, self._mtu, self._sockets.port)
        if self._tuning.queues > 1:
            log.info("Queues of %s: %s", device.name, device.note or len(device.queues))
        log.info("Capabilities: %s", ", ".join(f"{c.word} {self.state_of(c)}" for c in Capability))

    def _on_news(self, event: KernelEvent) -> None:
        """Look at once where the kernel tells that something of the device may be gone."""
        if self._device.is_touched_by(event):
            self._attention.alarm()

    async def _look(self) -> None:
        async with self._turn:
            await self._device.put_right()

    async def _look_at_pods(self) -> None:
        """Kernel VTEPs hand over TCP superframes without a word of how to cut them: so that they fit the bridge of the
        pods, which has an address of our subnets (as every CNI plugin gives it), and may take less than our device."""
        if self._shape.vxlan is None or self._path is None:
            return
        pods = holders(await self._netlink.addresses(), self._subnets)
        mtus = [link.mtu for link in await self._netlink.links() if link.index in pods and link.name != self.device]
        self._path.set_segment_mtu(min([mtu for mtu in mtus if mtu >= LEAST_POD_MTU] + [self._mtu]))

    async def _look_again(self) -> None:
        try:
            await self._look_at_pods()
        except KernelError as error:
            log.warning("Cannot see the MTU of the pods: %s", error)

    def _start_path(self, device: tun.Tun, sockets: Sockets) -> None:
        self._path = Datapath(
            device.fd,
            sockets.outer,
            [IcmpSender(self._icmp[s.version].fileno(), s.network_address) for s in self._subnets],
            mtu=self._mtu,
            source_check=self._tuning.source_check,
            vxlan=self._shape.vxlan,
            capabilities=self._granted() - self._lost,
            run_datagrams=sockets.receiver.run_datagrams,
            spin=self._tuning.spin,
            moderation=self._tuning.moderation,
            further=device.further,
            on_event=self._on_event,
        )
        for peers in self._peers:
            for peer in peers.obeyed.values():
                self._set_route(peer)
        self._path.start()

    async def _arm_again(self) -> None:
        """With what the sockets of now say of the outer headers."""
        if self._taps and self._path is not None:
            await self._path.arm(self._taps, self._number)

    def _set_route(self, peer: Peer) -> None:
        self._refused.pop(peer.subnet, None)
        if self._path is None:
            return
        try:
            self._path.set_route(peer.subnet, peer.address, peer.mac)
        except KernelError as error:
            self._path.remove_route(peer.subnet)
            self._refused[peer.subnet] = str(error)

    def _granted(self) -> frozenset[Capability]:
        granted = self._device.tun.granted if self._device.tun else frozenset()
        return granted | (self._sockets.receiver.granted if self._sockets else frozenset())

    async def _close_device(self) -> None:
        self._reports.forget_path_mtus()
        if self._path is not None:
            await self._path.stop()
            self._path = None
        self._device.release()

    async def _rebuild_device(self) -> None:
        """Somebody deleted the device under us: make it again, with its address and routes."""
        log.error("Device %s is gone; making it again", self._device.name)
        async with self._turn:
            await self._close_device()
        for attempt in itertools.count():
            await asyncio.sleep(REBUILD_SECONDS[min(attempt, len(REBUILD_SECONDS) - 1)])
            async with self._turn:
                try:
                    await self._open()
                except KernelError as error:
                    log.error("Cannot make device %s again: %s", self._device.name, error)  # the text says it all
                    await self._close_device()
                else:
                    return

    # --- what the path reports ------------------------------------------------------------------------------------

    def _on_event(self, event: PathEvent) -> None:
        if event.kind is PathEventKind.DEVICE_GONE:
            if self._rebuild is None or self._rebuild.done():
                self._rebuild = asyncio.create_task(self._rebuild_device())
        elif event.kind is PathEventKind.CAPABILITY_LOST:
            self._lost |= {Capability(event.value)}
            log.warning("The kernel refused %s at work: going on without it", Capability(event.value).word)
        elif event.kind is PathEventKind.SUPERFRAME:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look_again())
        else:
            self._reports.take(event, self._mtu)

    def _set_path_mtu(self, peer: IPAddress, mtu: int) -> None:
        if self._path is not None:
            self._path.set_path_mtu(peer, mtu)


def tunnels_status(kind: str, mtu: int, tunnels: Collection[Tunnel]) -> BackendStatus:
    """What the tunnels of a backend tell together, before there are any as well."""
    found = [statistics for tunnel in tunnels if (statistics := tunnel.statistics()) is not None]
    now = time.monotonic() * 1000
    return BackendStatus(
        type=kind,
        device=" ".join(tunnel.device for tunnel in tunnels if tunnel.device),
        mtu=mtu,
        peers=tuple(peer for statistics in found for peer in _peers(statistics.routes, now)),
        drops={reason: sum(statistics.drops[reason] for statistics in found) for reason in DropReason},
        unknown_sources={address: n for tunnel in tunnels for address, n in tunnel.unknown_sources.items()},
        ignored={subnet: why for tunnel in tunnels for subnet, why in tunnel.ignored.items()},
        capabilities={c: next((t.state_of(c) for t in tunnels), "off: no device yet") for c in Capability},
        repairs=sum(tunnel.repairs for tunnel in tunnels),
        queues=min((tunnel.queues for tunnel in tunnels), key=lambda queues: queues.used, default=None),
        pumps={"tx": totals(each.tx for each in found), "rx": totals(each.rx for each in found)},
    )


def _peers(routes: Iterable[RouteCounters], now: float) -> Iterator[PeerStatus]:
    """Taken apart by place: there may be ten thousand, and the event loop waits."""
    for subnet, address, tx_packets, tx_bytes, _, rx_packets, rx_bytes, heard in routes:
        idle = max(0.0, now - heard) / 1000 if heard else None
        yield PeerStatus(subnet, address, tx_packets, tx_bytes, rx_packets, rx_bytes, idle)
