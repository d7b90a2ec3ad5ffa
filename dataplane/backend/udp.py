"""Owns flannel's udp backend: inner packets of both IP versions as the payload of datagrams between the nodes' udp
ports.

One device, one route for each network, one socket on IPv4; peers live in the path's table only, never in the kernel's
(flannel-io/flannel pkg/backend/udp). Free of: where leases come from, and of the tunnel itself (`backend.userspace`).
Invariant: a lease that this backend cannot carry has no route, and `status().ignored` says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from dataplane.backend.base import BackendStatus, Underlay
from dataplane.backend.peers import IPNetwork, Peers, check_type
from dataplane.backend.sockets import Sockets
from dataplane.backend.userspace import OnPeers, Shape, Tuning, Tunnel, tunnels_status
from dataplane.errors import KernelError
from dataplane.kernel import underlay
from dataplane.kernel.netlink import Netlink
from dataplane.lease.model import Lease, LeaseAttrs, LeaseEvent
from dataplane.path.datapath import Tap
from dataplane.path.wire import UDP_OVERHEAD


class UdpBackend:
    """See dataplane.backend.base.Backend for the life of a backend."""

    def __init__(
        self,
        facing: Underlay,
        networks: Sequence[IPNetwork],
        port: int,
        netlink: Netlink,
        tuning: Tuning,
        *,
        device: str,
        on_device: Callable[[str], None],
        on_peers: OnPeers | None = None,
    ) -> None:
        """`networks`: of IPv4, IPv6 or both. `device`: what a former daemon of this node left, whatever its backend;
        parted by blanks. `on_device`, `on_peers`: see Tunnel."""
        self._facing = facing
        self._port = port
        self._netlink = netlink
        self._wanted = tuning.wanted
        self._tunnel = Tunnel(
            Shape("flannel%d", tuple(networks), UDP_OVERHEAD),
            [Peers(network.version, _no_mac, outer=4) for network in networks],
            self._open_sockets,
            netlink,
            tuning,
            device=next(filter(re.compile(r"flannel\d+").fullmatch, device.split()), ""),
            on_device=on_device,
            on_peers=on_peers,
        )

    @property
    def mtu(self) -> int:
        return self._facing.mtu - UDP_OVERHEAD

    async def prepare(self) -> LeaseAttrs:
        """Takes the port."""
        await self._tunnel.prepare(self._facing, self.mtu)
        return self._attrs()

    async def attach(self, lease: Lease) -> None:
        await self._tunnel.attach(lease.key.subnets)

    async def apply(self, events: Sequence[LeaseEvent]) -> None:
        await self._tunnel.apply(events)

    async def move(self, facing: Underlay) -> LeaseAttrs:
        await self._tunnel.move(facing, facing.mtu - UDP_OVERHEAD)
        self._facing = facing
        return self._attrs()

    def status(self) -> BackendStatus:
        return tunnels_status("udp", self.mtu, [self._tunnel])

    async def arm(self, taps: Sequence[Tap]) -> None:
        await self._tunnel.arm(taps)

    async def close(self) -> None:
        await self._tunnel.close()

    def _attrs(self) -> LeaseAttrs:
        return LeaseAttrs(public_ip=self._facing.public_ip, public_ipv6=self._facing.public_ipv6)

    async def _open_sockets(self, facing: Underlay, former: Sockets | None) -> Sockets:
        if facing.address.is_unspecified:
            raise KernelError(
                f"{facing.name} has no IPv4 address, and backend udp carries IPv4 and IPv6 over IPv4 only; use vxlan"
            )
        if former is not None and facing.address == self._facing.address:
            return former
        links = await self._netlink.links()
        return Sockets(
            underlay.open_udp(facing.address, self._port, interface=facing.name, links=links, wanted=self._wanted),
            self._port,
        )


def _no_mac(lease: Lease) -> bytes:
    check_type(lease, "", "udp")
    return b""
