"""Owns VXLAN in userspace: the wire of the kernel's device, so that nobody can tell the two apart.

As flannel has it, one tunnel for each IP version, inner IPv4 over outer IPv4 and inner IPv6 over outer IPv6: devices
`flannel.<VNI>` and `flannel-v6.<VNI>`. Free of: where leases come from, and of the tunnels themselves
(`backend.userspace`). Invariant: the VtepMAC that our lease names is the one that we answer to, also after a restart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from dataplane.backend.base import BackendStatus, Underlay
from dataplane.backend.peers import IPNetwork, Peers, check_type, decode_vtep, encode_vtep
from dataplane.backend.sockets import Sockets
from dataplane.backend.userspace import OnPeers, Shape, Tuning, Tunnel, tunnels_status
from dataplane.errors import KernelError
from dataplane.kernel import underlay
from dataplane.kernel.netlink import Netlink, random_mac
from dataplane.lease.model import Lease, LeaseAttrs, LeaseEvent
from dataplane.path.datapath import Tap
from dataplane.path.facts import Vxlan
from dataplane.path.wire import VXLAN_OVERHEAD

log = logging.getLogger(__name__)

_EVERYWHERE: dict[int, IPv4Address | IPv6Address] = {4: IPv4Address(0), 6: IPv6Address(0)}


@dataclass(frozen=True, slots=True)
class VxlanWire:
    """`underlay_mtu`: the one to reckon with instead of the interface's, 0 for that; `source_ports`: by how many ports
    the flows leave, for ECMP and RSS on the way."""

    vni: int
    port: int
    underlay_mtu: int = 0
    source_ports: int = 8


class VxlanBackend:
    """See dataplane.backend.base.Backend for the life of a backend."""

    def __init__(
        self,
        facing: Underlay,
        networks: Sequence[IPNetwork],
        wire: VxlanWire,
        netlink: Netlink,
        tuning: Tuning,
        *,
        macs: Mapping[int, bytes],
        on_macs: Callable[[Mapping[int, bytes]], None],
        on_device: Callable[[str], None],
        on_peers: OnPeers | None = None,
    ) -> None:
        """`networks`: of IPv4, IPv6 or both. `macs`: what a former daemon of this node was known by, by IP version;
        `on_macs` is told what to keep for the next start. `on_device` is told the devices in use, parted by blanks.
        `on_peers`: see Tunnel."""
        self._facing = facing
        self._wire = wire
        self._netlink = netlink
        self._tuning = tuning
        self._on_macs = on_macs
        self._on_device = on_device
        self._on_peers = on_peers
        self._networks: dict[int, IPNetwork] = {network.version: network for network in networks}
        self._macs = {version: mac for version, mac in macs.items() if version in self._networks}
        self._devices: dict[int, str] = {}
        self._tunnels: dict[int, Tunnel] = {}

    @property
    def mtu(self) -> int:
        """What pods may send, whichever IP version they speak."""
        return min(self._mtu_of(version, self._facing) for version in self._networks)

    async def prepare(self) -> LeaseAttrs:
        """Takes the port, and the place of a kernel device that this node had for the same network."""
        for version in self._networks:
            known_as = await self._replace_kernel_device(version)
            self._macs.setdefault(version, known_as or random_mac())
        self._on_macs(self._macs)
        for version, network in self._networks.items():
            tunnel = self._tunnels[version] = self._make_tunnel(version, network)
            await tunnel.prepare(self._facing, self._mtu_of(version, self._facing))
        return self._attrs()

    async def attach(self, lease: Lease) -> None:
        try:
            for tunnel in self._tunnels.values():
                await tunnel.attach(lease.key.subnets)
        except BaseException:
            await self.close()
            raise

    async def apply(self, events: Sequence[LeaseEvent]) -> None:
        for tunnel in self._tunnels.values():
            await tunnel.apply(events)

    async def move(self, facing: Underlay) -> LeaseAttrs:
        for version, tunnel in self._tunnels.items():
            await tunnel.move(facing, self._mtu_of(version, facing))
        self._facing = facing
        return self._attrs()

    def status(self) -> BackendStatus:
        return tunnels_status("vxlan", self.mtu, self._tunnels.values())

    async def arm(self, taps: Sequence[Tap]) -> None:
        for number, tunnel in enumerate(self._tunnels.values()):
            await tunnel.arm(taps, number)

    async def close(self) -> None:
        for tunnel in self._tunnels.values():
            await tunnel.close()

    def _attrs(self) -> LeaseAttrs:
        vteps = {version: encode_vtep(self._wire.vni, mac) for version, mac in self._macs.items()}
        return LeaseAttrs(
            public_ip=self._facing.public_ip,
            public_ipv6=self._facing.public_ipv6,
            backend_type="vxlan",
            backend_data=vteps.get(4, b""),
            backend_v6_data=vteps.get(6, b""),
        )

    def _mtu_of(self, version: int, facing: Underlay) -> int:
        return (self._wire.underlay_mtu or facing.mtu) - VXLAN_OVERHEAD[version]

    def _name_of(self, version: int) -> str:
        return f"flannel.{self._wire.vni}" if version == 4 else f"flannel-v6.{self._wire.vni}"

    def _make_tunnel(self, version: int, network: IPNetwork) -> Tunnel:
        name, mac = self._name_of(version), self._macs[version]

        def mac_of(lease: Lease) -> bytes:
            check_type(lease, "vxlan")
            data = lease.attrs.backend_data if version == 4 else lease.attrs.backend_v6_data
            return decode_vtep(data, self._wire.vni, mac)

        def on_device(device: str) -> None:
            self._devices[version] = device
            self._on_device(" ".join(filter(None, self._devices.values())))

        async def open_sockets(facing: Underlay, former: Sockets | None) -> Sockets:
            return await self._open_sockets(version, facing, former)

        return Tunnel(
            Shape(name, (network,), VXLAN_OVERHEAD[version], Vxlan(self._wire.vni, mac, version)),
            [Peers(version, mac_of, shared_macs=True)],
            open_sockets,
            self._netlink,
            self._tuning,
            device=name,  # there is one that can be ours, so it needs no remembering
            on_device=on_device,
            on_peers=self._on_peers,
        )

    async def _open_sockets(self, version: int, facing: Underlay, former: Sockets | None) -> Sockets:
        """Like the kernel's device: it listens on every address, and sends from the one that peers know."""
        address = facing.address if version == 4 else facing.address_v6
        if address is None or address.is_unspecified:
            raise KernelError(f"{facing.name} has no IPv{version} address, over which VXLAN carries IPv{version}")
        receiver = former.receiver if former else None
        if receiver is None:
            receiver = underlay.open_udp(
                _EVERYWHERE[version],
                self._wire.port,
                links=await self._netlink.links(),
                wanted=self._tuning.wanted,
            )
        try:
            senders = underlay.open_senders(address, self._wire.source_ports, interface=facing.name)
        except KernelError:
            if former is None:
                receiver.close()
            raise
        return Sockets(receiver, self._wire.port, senders)

    async def _replace_kernel_device(self, version: int) -> bytes:
        """Where this node's dataplane was the kernel's until now, its device is in the way; its MAC is what peers
        know."""
        name = self._name_of(version)
        link = await self._netlink.link(name)
        if link is None or link.kind == "tun":
            return b""
        ours = self._facing.public_ip if version == 4 else self._facing.public_ipv6
        if link.vxlan is None or link.vxlan.vni != self._wire.vni or link.vxlan.local != ours:
            raise KernelError(
                f"cannot make device {name}: a {link.kind or 'hardware'} device has that name, and it is not one that "
                "a daemon of this node made; remove or rename it"
            )
        log.info("Removing the kernel's device %s: this node carries VXLAN in userspace now", name)
        await self._netlink.remove_link(name)
        return bytes.fromhex(link.address.replace(":", ""))
