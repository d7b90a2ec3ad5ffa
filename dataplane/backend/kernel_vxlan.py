"""Owns VXLAN as flannel does it: a device of the kernel, and a neighbour, an FDB entry and a route for each peer.

Free of: packets; the kernel carries them, also while no daemon runs. Invariant: the device keeps its MAC, which stands
in our lease, through every change of the underlay and every re-creation, so that peers need not hear of either; device
and entries are what flannel makes (facts 7), so that either daemon takes over the other's without losing a packet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Interface

from dataplane.backend.base import BackendStatus, Underlay
from dataplane.backend.entries import PeerEntries, follow_leases
from dataplane.backend.peers import IPAddress, IPNetwork, Peer, Peers, check_type, decode_vtep, encode_vtep
from dataplane.errors import ConfigError, KernelError
from dataplane.kernel import rtnetlink, tun, underlay
from dataplane.kernel.events import UNDERLAY, Group
from dataplane.kernel.facts import AddressEvent, Link, LinkEvent, Vxlan, holders
from dataplane.kernel.netlink import Netlink, refuse_router_advertisements
from dataplane.kernel.rtnetlink import Entry, Scope, Table
from dataplane.lease.model import Lease, LeaseAttrs, LeaseEvent
from dataplane.netconf import NetworkConfig, VxlanConfig
from dataplane.path.wire import LEAST_MTU, VXLAN_OVERHEAD

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Family:
    """One IP version, inner and outer alike, with a device of its own. Index and MAC are 0 and empty before it is."""

    version: int
    device: str
    network: IPNetwork
    peers: Peers
    address: IPv4Interface | IPv6Interface | None = None
    index: int = 0
    mac: str = ""


class KernelVxlanBackend:
    """See dataplane.backend.base.Backend for the life of a backend. An ordered stop leaves everything in the kernel,
    as flannel's does: packets go on, and the next start takes it over."""

    def __init__(self, facing: Underlay, network: NetworkConfig, config: VxlanConfig, netlink: Netlink) -> None:
        """Raises ConfigError where the underlay cannot carry what the network asks for."""
        self._facing = facing
        self._config = config
        self._netlink = netlink
        self._network = network
        subnets = ((4, f"flannel.{config.vni}", network.network), (6, f"flannel-v6.{config.vni}", network.ipv6_network))
        self._families = [
            _Family(version, device, within, Peers(version, self._mac_of(version)))
            for version, device, within in subnets
            if within is not None
        ]
        self._check(facing)
        self._entries = PeerEntries(
            self._plan,
            stale=self._is_stale,
            scopes=self._scopes,
            direct=config.direct_routing,
            is_own=self._is_own,
            put_right=self._put_right,
        )
        self._repairs = 0

    @property
    def mtu(self) -> int:
        return min(self._device_mtu(family.version) for family in self._families)

    # --- life -----------------------------------------------------------------------------------------------------

    async def prepare(self) -> LeaseAttrs:
        """Makes the devices, or takes over those that are there: their MACs stand in the lease."""
        c = self._config
        log.info(
            "VXLAN config: VNI=%d Port=%d GBP=%s Learning=%s DirectRouting=%s",
            *(c.vni, c.port, *(str(flag).lower() for flag in (c.gbp, c.learning, c.direct_routing))),
        )
        try:
            await self._entries.open(UNDERLAY | {Group.NEIGHBOUR})
            await self._remove_leftovers()
            for family in self._families:
                await self._make(family)
        except BaseException:
            await self.close()
            raise
        return self._attrs()

    async def attach(self, lease: Lease) -> None:
        try:
            for family in self._families:
                subnet = next((s for s in lease.key.subnets if s.version == family.version), None)
                if subnet is not None:
                    family.address = _address_of(subnet)
                    await self._make(family)
        except BaseException:
            await self.close()
            raise
        self._entries.start()
        log.info("The kernel carries %s, MTU %d", self._text(), self.mtu)

    async def apply(self, events: Sequence[LeaseEvent]) -> None:
        await self._entries.follow(follow_leases([family.peers for family in self._families], events))

    async def move(self, facing: Underlay) -> LeaseAttrs:
        self._check(facing)
        before, self._facing = self._facing, facing
        try:
            for family in self._families:
                await self._make(family)
        except KernelError:
            self._facing = before
            raise
        await self._entries.moved()
        return self._attrs()

    async def close(self) -> None:
        """Devices and entries stay: packets go on."""
        await self._entries.close()

    def status(self) -> BackendStatus:
        device = " ".join(family.device for family in self._families if family.index)
        families = [family.peers for family in self._families]
        return self._entries.status("vxlan", device, self.mtu, families, repairs=self._repairs)

    # --- what stands for whom -------------------------------------------------------------------------------------

    def _mac_of(self, version: int) -> Callable[[Lease], bytes]:
        def read(lease: Lease) -> bytes:
            check_type(lease, "vxlan")
            data = lease.attrs.backend_data if version == 4 else lease.attrs.backend_v6_data
            own = next(family.mac for family in self._families if family.version == version)
            return decode_vtep(data, self._config.vni, _mac(own))

        return read

    def _plan(self, peer: Peer, direct: int) -> tuple[Entry, ...]:
        if direct:
            return (rtnetlink.route(peer.subnet, direct, peer.address, onlink=False),)
        index = next(family.index for family in self._families if family.version == peer.subnet.version)
        gateway = peer.subnet.network_address
        return (
            rtnetlink.fdb(index, peer.mac, peer.address),
            rtnetlink.neighbour(index, gateway, peer.mac),
            rtnetlink.route(peer.subnet, index, gateway, onlink=True),
        )

    def _scopes(self) -> list[Scope]:
        scopes = []
        for family in self._families:
            kind = rtnetlink.AF_INET if family.version == 4 else rtnetlink.AF_INET6
            scopes.append(Scope(Table.FDB, rtnetlink.AF_BRIDGE, family.index))
            scopes.append(Scope(Table.NEIGHBOUR, kind, family.index))
            # by DirectRouting, routes of ours may go through any device
            scopes.append(rtnetlink.routes_of(family.version, 0 if self._config.direct_routing else family.index))
        return scopes

    def _is_stale(self, entry: Entry) -> bool:
        """On our own devices all entries are ours, of routes those of the overlay; elsewhere a direct route to a whole
        subnet is."""
        own = next((family for family in self._families if family.index == entry.scope.index), None)
        if entry.scope.table is not Table.ROUTE:
            return own is not None
        destination = rtnetlink.destination_of(entry)
        if own is not None:
            return destination.network_address in own.network
        return self._config.direct_routing and self._network.is_subnet(destination)

    # --- devices --------------------------------------------------------------------------------------------------

    def _check(self, facing: Underlay) -> None:
        for family in self._families:
            if _outer_of(facing, family.version) is None:
                what = f"IPv{family.version} of the overlay needs an IPv{family.version} underlay"
                raise ConfigError(f"{what}, and interface {facing.name} has no such address")
            mtu = min(self._config.mtu or facing.mtu, facing.mtu) - VXLAN_OVERHEAD[family.version]
            if mtu < LEAST_MTU[family.version]:
                least = LEAST_MTU[family.version] + VXLAN_OVERHEAD[family.version]
                raise ConfigError(
                    f"interface {facing.name} takes {facing.mtu} bytes: IPv{family.version} in VXLAN needs {least}"
                )

    def _device_mtu(self, version: int) -> int:
        # a larger Backend.MTU than the underlay's would be refused by the kernel
        return min(self._config.mtu or self._facing.mtu, self._facing.mtu) - VXLAN_OVERHEAD[version]

    def _wanted(self, family: _Family) -> Vxlan:
        config = self._config
        local = _outer_of(self._facing, family.version)
        return Vxlan(config.vni, self._facing.index, local, config.port, config.learning, config.gbp)

    async def _make(self, family: _Family) -> None:
        """The device as it shall be, with its address once there is a lease. Raises KernelError."""
        wanted, mtu = self._wanted(family), self._device_mtu(family.version)
        link = await self._netlink.ensure_vxlan(family.device, wanted, mac=family.mac, mtu=mtu)
        family.index, family.mac = link.index, link.address
        refuse_router_advertisements(family.device)
        if family.address is not None:
            await self._netlink.ensure_address(family.device, family.address, sole_within=family.network)
        try:
            await self._netlink.ensure_link_up(family.device)
        except KernelError as error:
            raise await self._named(error) from error

    async def _named(self, error: KernelError) -> KernelError:
        """The error with the name of whoever holds our port, if that is the trouble."""
        try:
            underlay.open_udp(IPv4Address(0), self._config.port, links=await self._netlink.links()).close()
        except KernelError as reason:
            return KernelError(f"{error}: {reason}")
        return error

    async def _remove_leftovers(self) -> None:
        """TUN devices of a killed daemon that carried this network, or under our name, in userspace."""
        links = await self._netlink.links()
        ours = holders(await self._netlink.addresses(), [family.network for family in self._families])
        names = {family.device for family in self._families}
        left = tun.leftovers(links)
        for link in links:
            unheld = link.kind == "tun" and not link.carrier
            if (unheld and link.name in names) or (link.name in left and link.index in ours):
                log.warning("Removing device %s: a daemon that is gone carried this network through it", link.name)
                await self._netlink.remove_link(link.name)

    def _attrs(self) -> LeaseAttrs:
        data = {family.version: encode_vtep(self._config.vni, _mac(family.mac)) for family in self._families}
        return LeaseAttrs(
            public_ip=self._facing.public_ip,
            public_ipv6=self._facing.public_ipv6 if 6 in data else None,
            backend_type="vxlan",
            backend_data=data.get(4, b""),
            backend_v6_data=data.get(6, b""),
        )

    # --- looking after them ---------------------------------------------------------------------------------------

    def _is_own(self, event: LinkEvent | AddressEvent) -> bool:
        if isinstance(event, AddressEvent):
            return any(event.address.index == family.index for family in self._families)
        return any(event.index == family.index or event.name == family.device for family in self._families)

    async def _put_right(self) -> bool:
        """Make devices again, or right, if need be; True where one is another than before."""
        before = [family.index for family in self._families]
        for family in self._families:
            link = await self._netlink.link(family.device)
            if not self._is_right(link, family):
                what = "gone" if link is None else "not as it was"
                log.warning("Device %s is %s: making it right", family.device, what)
                await self._make(family)
                self._repairs += 1
            elif family.address is not None and await self._netlink.ensure_address(
                family.device, family.address, sole_within=family.network
            ):
                log.warning("Device %s had lost its address %s", family.device, family.address)
                self._repairs += 1
        return before != [family.index for family in self._families]

    def _is_right(self, link: Link | None, family: _Family) -> bool:
        if link is None or not link.up:
            return False
        wanted = (family.index, self._wanted(family), family.mac, self._device_mtu(family.version))
        return (link.index, link.vxlan, link.address, link.mtu) == wanted

    def _text(self) -> str:
        return " and ".join(f"{family.network} through {family.device}" for family in self._families)


def _outer_of(facing: Underlay, version: int) -> IPAddress | None:
    if version == 6:
        return facing.public_ipv6
    return facing.public_ip if int(facing.public_ip) else None


def _address_of(subnet: IPNetwork) -> IPv4Interface | IPv6Interface:
    """The subnet's own address, alone (facts 7.1)."""
    if subnet.version == 4:
        return IPv4Interface((subnet.network_address, 32))
    return IPv6Interface((subnet.network_address, 128))


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))
