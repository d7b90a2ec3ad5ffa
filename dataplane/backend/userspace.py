"""Owns a userspace tunnel, which the udp and vxlan backends have in common: one TUN device with its address and routes,
its sockets, and the path between them.

Free of: what a lease says of its node (`backend.peers`), and what the outer wire looks like (the backend's `Shape`).
Invariant: a device that a kill has left is taken over, what others take away of it comes back, and after `close`
nothing stands that `attach` has made; what strangers send can make no table here grow without bound.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network, ip_interface
from typing import TypeVar

from dataplane.backend.attention import Attention
from dataplane.backend.base import BackendStatus, PeerStatus, Queues, Underlay
from dataplane.backend.peers import Peer, Peers
from dataplane.errors import DropReason, KernelError
from dataplane.kernel import tun, underlay
from dataplane.kernel.events import UNDERLAY, KernelEvents
from dataplane.kernel.facts import AddressEvent, KernelEvent, LinkEvent, Overrun, RouteEvent
from dataplane.kernel.netlink import Netlink, quiet_ipv6, restrain_ipv6
from dataplane.lease.model import LeaseEvent
from dataplane.path.capability import Capability
from dataplane.path.datapath import Datapath, Tap
from dataplane.path.facts import (
    IcmpSender,
    Outer,
    PathEvent,
    PathEventKind,
    PathStatistics,
    RouteCounters,
    SourceCheck,
    Vxlan,
)

log = logging.getLogger(__name__)

_K = TypeVar("_K")
_V = TypeVar("_V")
IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

TX_QUEUE_PACKETS = 3000
"""Packets that the TUN holds while the pump is not scheduled: 90 ms of 34,000 a second. The kernel's own 500 lose short
bursts; what waits may be superframes, so that this bounds memory too."""

PATH_MTU_SECONDS = 600.0
"""As long as the kernel keeps what it has learnt of a path (net.ipv4.route.mtu_expires)."""

LEAST_MTU = {4: 576, 6: 1280}
"""By IP version: every path takes that much (RFC 791, RFC 8200); one that claims less is somebody's forgery."""

REPEAT_SECONDS = 60.0
"""The same complaint about the same address is logged no more often."""

MOST_STRANGERS = 256
"""Outer sources without a lease, and complaints, that are remembered: forged ones come without end."""

REBUILD_SECONDS = (0.0, 0.2, 1.0, 5.0)
"""Waits before each try to make the device again; the last one repeats."""

OnPeers = Callable[[Mapping[IPNetwork, Peer | None]], Awaitable[None]]
"""Who else follows the peers by subnet, such as the routes of DirectRouting; None for one that is gone."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """What flags and net-conf say. `wanted`: the capabilities to use where the kernel grants them; `spin`: see
    Datapath; `queues`: of each device, with pumps and a receiving socket for each."""

    source_check: SourceCheck
    wanted: frozenset[Capability]
    spin: float
    queues: int = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """What distinguishes a tunnel. `device`: its name, or a template such as flannel%d; `networks`: what is routed
    into it, at most one of each IP version; `overhead`: bytes that the outer headers take."""

    device: str
    networks: tuple[IPNetwork, ...]
    overhead: int
    vxlan: Vxlan | None = None


@dataclass(frozen=True, slots=True)
class Sockets:
    """Open sockets to the other nodes; without `senders` those that receive send too. `further`: what the receiver was
    widened by, for further queues of the device."""

    receiver: underlay.UdpSocket
    port: int
    senders: tuple[socket.socket, ...] = ()
    further: tuple[underlay.UdpSocket, ...] = ()

    @property
    def outer(self) -> Outer:
        senders = tuple(sender.fileno() for sender in self.senders)
        return Outer(self.receiver.fd, self.port, senders, tuple(each.fd for each in self.further))

    def widened(self, queues: int) -> Sockets:
        """With as many receivers as the device has queues. Raises KernelError."""
        if len(self.further) == queues - 1:
            return self
        for each in self.further:
            each.close()
        further = underlay.widen(self.receiver, queues - 1) if queues > 1 else ()
        return dataclasses.replace(self, further=further)

    def as_wide_as(self, former: Sockets | None) -> Sockets:
        """With as many receivers as those in whose place they come. Raises KernelError, and then closes what is new."""
        if former is None or former is self:
            return self
        if former.receiver is self.receiver:
            return dataclasses.replace(self, further=former.further)
        try:
            return self.widened(len(former.further) + 1)
        except KernelError:
            self.close(kept=former)
            raise

    def close(self, *, kept: Sockets | None = None) -> None:
        """Close what `kept` does not share."""
        if kept is None or kept.receiver is not self.receiver:
            for each in (self.receiver, *self.further):
                each.close()
        for sender in self.senders:
            if kept is None or sender not in kept.senders:
                sender.close()


OpenSockets = Callable[[Underlay, "Sockets | None"], Awaitable[Sockets]]
"""For an underlay, given what is open for the former one, which may be used on."""


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
        self._device = device
        self._on_device = on_device
        self._on_peers = on_peers
        self._subnets: tuple[IPNetwork, ...] = ()
        self._mtu = 0
        self._sockets: Sockets | None = None
        self._icmp: dict[int, socket.socket] = {}
        self._tun: tun.Tun | None = None
        self._path: Datapath | None = None
        self._lost = frozenset[Capability]()
        self._refused: dict[IPNetwork, str] = {}
        self._unknown: dict[tuple[IPAddress, int], int] = {}  # by queue: its pump counts by itself
        self._complaints: dict[tuple[PathEventKind, IPAddress, int], float] = {}
        self._path_mtus: dict[IPAddress, asyncio.TimerHandle] = {}
        self._rebuild: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._events: KernelEvents | None = None
        self._attention = Attention(self._look)
        self.repairs = 0
        """How often the device was found otherwise than it should be, and was made right."""
        self._taps: Sequence[Tap] = ()
        self._number = 0

    # --- what a backend asks --------------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """Empty while there is none."""
        return self._tun.name if self._tun else ""

    @property
    def unknown_sources(self) -> Mapping[IPAddress, int]:
        found: dict[IPAddress, int] = {}
        for (address, _), datagrams in self._unknown.items():
            found[address] = found.get(address, 0) + datagrams
        return found

    @property
    def queues(self) -> Queues:
        asked = self._tuning.queues
        return Queues(asked, len(self._tun.queues), self._tun.note) if self._tun else Queues(asked, 0)

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
            for peer in list(self._path_mtus):
                self._path_mtus.pop(peer).cancel()
                self._forget(peer)
            if self._path is not None:
                await self._path.rewire(self._sockets.outer, mtu)
                await self._arm_again()
                await self._look_at_pods()
            if former is not None:
                former.close(kept=self._sockets)
            if self._tun is not None:
                await self._netlink.ensure_link_up(self._tun.name, mtu=mtu)

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
        least = max(LEAST_MTU[network.version] if network.version == 6 else 68 for network in self._shape.networks)
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
        await self._remove_leftovers()
        self._tun = tun.open_tun(
            self._shape.device, adopt=self._device, wanted=self._tuning.wanted, queues=self._tuning.queues
        )
        self._device = self._tun.name
        self._on_device(self._device)
        versions = {subnet.version for subnet in self._subnets}
        (restrain_ipv6 if 6 in versions else quiet_ipv6)(self._device)
        await self._furnish()
        self._tun = dataclasses.replace(self._tun, granted=tun.takes_superframes(self._tun))
        self._sockets = self._sockets.widened(len(self._tun.queues))
        self._start_path(self._tun, self._sockets)
        await self._arm_again()
        await self._look_at_pods()
        carried = " and ".join(str(network) for network, _ in self._routed())
        log.info("Carrying %s through %s, MTU %d, port %d", carried, self._device, self._mtu, self._sockets.port)
        if self._tuning.queues > 1:
            log.info("Queues of %s: %s", self._device, self._tun.note or len(self._tun.queues))
        log.info("Capabilities: %s", ", ".join(f"{c.word} {self.state_of(c)}" for c in Capability))

    def _routed(self) -> list[tuple[IPNetwork, IPv4Interface | IPv6Interface]]:
        """The networks that we have a subnet of, each with the address of our device in it."""
        networks = {network.version: network for network in self._shape.networks}
        return [(networks[s.version], ip_interface((s.network_address, s.max_prefixlen))) for s in self._subnets]

    async def _furnish(self) -> bool:
        """Addresses, MTU, queue and routes of the device; True if something was otherwise. Raises KernelError."""
        changed = False
        for network, address in self._routed():
            changed |= await self._netlink.ensure_address(self._device, address, sole_within=network)
        changed |= await self._netlink.ensure_link_up(self._device, mtu=self._mtu, txqueuelen=TX_QUEUE_PACKETS)
        for network, _ in self._routed():
            changed |= await self._netlink.ensure_route(network, self._device)
        return changed

    def _on_news(self, event: KernelEvent) -> None:
        """Look at once where the kernel tells that something of the device may be gone."""
        match event:
            case LinkEvent(name=name):
                concerns = name == self._device
            case AddressEvent(gone=True, address=address):
                concerns = any(address.interface == ours for _, ours in self._routed())
            case RouteEvent(gone=True, route=route):
                concerns = any(route.destination == ours for ours, _ in self._routed())
            case _:
                concerns = isinstance(event, Overrun)
        if concerns:
            self._attention.alarm()

    async def _look(self) -> None:
        """Put right what others did to the device; one that is gone is for the path to tell."""
        async with self._turn:
            if self._tun is None or await self._netlink.link(self._device) is None:
                return
            if await self._furnish():
                self.repairs += 1
                log.warning("Others had changed device %s, its addresses or routes: made right", self._device)

    async def _look_at_pods(self) -> None:
        """Kernel VTEPs hand over TCP superframes without a word of how to cut them: so that they fit the bridge of the
        pods, which has an address of our subnets (as every CNI plugin gives it), and may take less than our device."""
        if self._shape.vxlan is None or self._path is None:
            return
        addresses = await self._netlink.addresses()
        ours = {a.index for a in addresses if any(a.interface.ip in subnet for subnet in self._subnets)}
        links = await self._netlink.links()
        mtus = [link.mtu for link in links if link.index in ours and link.name != self._device]
        self._path.set_segment_mtu(min([mtu for mtu in mtus if mtu >= LEAST_MTU[4]] + [self._mtu]))

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
        granted = self._tun.granted if self._tun else frozenset()
        return granted | (self._sockets.receiver.granted if self._sockets else frozenset())

    async def _remove_leftovers(self) -> None:
        """A device of a killed daemon whose state is lost would keep the network's route for itself."""
        links = await self._netlink.links()
        ours = {
            address.index
            for address in await self._netlink.addresses()
            if any(address.interface.ip in network for network in self._shape.networks)
        }
        kept = {self._device, self._shape.device}
        for name in sorted({link.name for link in links if link.index in ours} & set(tun.leftovers(links)) - kept):
            log.warning("Removing device %s: a killed daemon left it, and it holds an address of our network", name)
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

    async def _rebuild_device(self) -> None:
        """Somebody deleted the device under us: make it again, with its address and routes."""
        log.error("Device %s is gone; making it again", self._device)
        async with self._turn:
            await self._close_device()
        for attempt in itertools.count():
            await asyncio.sleep(REBUILD_SECONDS[min(attempt, len(REBUILD_SECONDS) - 1)])
            async with self._turn:
                try:
                    await self._open()
                except KernelError as error:
                    log.error("Cannot make device %s again: %s", self._device, error)  # the text says it all
                    await self._close_device()
                else:
                    return

    # --- what the path reports ------------------------------------------------------------------------------------

    def _on_event(self, event: PathEvent) -> None:
        if event.kind is PathEventKind.DEVICE_GONE:
            if self._rebuild is None or self._rebuild.done():
                self._rebuild = asyncio.create_task(self._rebuild_device())
        elif event.kind is PathEventKind.UNKNOWN_SOURCE:
            _remember(self._unknown, (event.address, event.queue), event.value)
            self._complain(
                event,
                "Dropping datagrams from %s: no lease names it. If it is a node, its -public-ip differs from the "
                "address it sends from (see --source-check)",
                event.address,
            )
        elif event.kind is PathEventKind.CAPABILITY_LOST:
            self._lost |= {Capability(event.value)}
            log.warning("The kernel refused %s at work: going on without it", Capability(event.value).word)
        elif event.kind is PathEventKind.SUPERFRAME:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look_again())
        elif event.kind is PathEventKind.TOO_LONG:
            self._learn_path_mtu(event.address)
        else:
            self._complain(event, "Cannot send to peer %s: %s", event.address, os.strerror(event.value))

    def _learn_path_mtu(self, peer: IPAddress) -> None:
        """Ask the kernel what it has learnt, and forget it when the kernel does."""
        whole = underlay.path_mtu(peer)
        mtu = whole - self._shape.overhead
        if self._path is None or whole < LEAST_MTU[peer.version] or mtu >= self._mtu or peer in self._path_mtus:
            return
        log.warning("The path to %s takes inner packets of %d bytes, not %d", peer, mtu, self._mtu)
        self._path.set_path_mtu(peer, mtu)
        loop = asyncio.get_running_loop()
        self._path_mtus[peer] = loop.call_later(PATH_MTU_SECONDS, self._forget_path_mtu, peer)

    def _forget_path_mtu(self, peer: IPAddress) -> None:
        del self._path_mtus[peer]
        self._forget(peer)

    def _forget(self, peer: IPAddress) -> None:
        if self._path is not None:
            self._path.set_path_mtu(peer, 0)

    def _complain(self, event: PathEvent, text: str, *arguments: object) -> None:
        about = (event.kind, event.address, event.value if event.kind is PathEventKind.SEND_FAILED else 0)
        now = time.monotonic()
        if now - self._complaints.get(about, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            _remember(self._complaints, about, now)
            log.warning(text, *arguments)


def _remember(table: dict[_K, _V], key: _K, value: _V) -> None:
    """As the newest entry; the oldest goes where there are too many."""
    table.pop(key, None)
    table[key] = value
    if len(table) > MOST_STRANGERS:
        del table[next(iter(table))]


def tunnels_status(kind: str, mtu: int, tunnels: Collection[Tunnel]) -> BackendStatus:
    """What the tunnels of a backend tell together, before there are any as well."""
    found = [statistics for tunnel in tunnels if (statistics := tunnel.statistics()) is not None]
    now = time.monotonic() * 1000
    return BackendStatus(
        type=kind,
        device=" ".join(tunnel.device for tunnel in tunnels if tunnel.device),
        mtu=mtu,
        peers=tuple(_peer_status(route, now) for statistics in found for route in statistics.routes),
        drops={reason: sum(statistics.drops[reason] for statistics in found) for reason in DropReason},
        unknown_sources={address: n for tunnel in tunnels for address, n in tunnel.unknown_sources.items()},
        ignored={subnet: why for tunnel in tunnels for subnet, why in tunnel.ignored.items()},
        capabilities={c: next((t.state_of(c) for t in tunnels), "off: no device yet") for c in Capability},
        repairs=sum(tunnel.repairs for tunnel in tunnels),
        queues=min((tunnel.queues for tunnel in tunnels), key=lambda queues: queues.used, default=None),
    )


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
