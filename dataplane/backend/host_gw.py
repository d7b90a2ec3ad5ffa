"""Owns the overlay without encapsulation: a route to each peer's subnet through the peer, on a wire that all share.

Free of: devices; the routes go through the underlay's own. Invariant: a route that stands for a peer is flannel's
(facts 8.1) and comes back as soon as somebody takes it away. Of other routes only those are taken away that flannel's
host-gw would have made: through a gateway, to a whole subnet of the overlay.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dataplane.backend.base import BackendStatus, Underlay
from dataplane.backend.entries import PeerEntries, follow_leases
from dataplane.backend.peers import Peer, Peers, check_type
from dataplane.errors import ConfigError
from dataplane.kernel import rtnetlink
from dataplane.kernel.events import UNDERLAY
from dataplane.kernel.facts import AddressEvent, LinkEvent
from dataplane.kernel.rtnetlink import Entry, Scope, Table
from dataplane.lease.model import Lease, LeaseAttrs, LeaseEvent
from dataplane.netconf import NetworkConfig

log = logging.getLogger(__name__)

TYPE = "host-gw"


class HostGwBackend:
    """See dataplane.backend.base.Backend for the life of a backend. An ordered stop leaves the routes, as flannel's
    does; the next start takes them over."""

    def __init__(self, facing: Underlay, network: NetworkConfig) -> None:
        """Raises ConfigError where the public IP is not the interface's."""
        self._network = network
        self._facing = facing
        self._check(facing)
        self._families = [Peers(within.version, _no_mac) for within in network.networks]
        self._entries = PeerEntries(
            self._plan,
            stale=self._is_stale,
            scopes=self._scopes,
            direct=False,
            is_own=self._is_own,
            put_right=self._put_right,
        )

    @property
    def mtu(self) -> int:
        return self._facing.mtu

    async def prepare(self) -> LeaseAttrs:
        try:
            await self._entries.open(UNDERLAY)
        except BaseException:
            await self.close()
            raise
        return self._attrs()

    async def attach(self, lease: Lease) -> None:
        self._entries.start()
        log.info("Routing between %s and the other nodes' subnets through %s", lease.key, self._facing.name)

    async def apply(self, events: Sequence[LeaseEvent]) -> None:
        await self._entries.follow(follow_leases(self._families, events))

    async def move(self, facing: Underlay) -> LeaseAttrs:
        self._check(facing)
        self._facing = facing
        await self._entries.moved()
        return self._attrs()

    def status(self) -> BackendStatus:
        return self._entries.status(TYPE, self._facing.name, self.mtu, self._families)

    async def close(self) -> None:
        """The routes stay: packets go on."""
        await self._entries.close()

    def _check(self, facing: Underlay) -> None:
        """Peers route through the address that our lease names, so it must be one that answers on the wire."""
        pairs: list[tuple[object, object]] = []
        if self._network.network is not None:
            pairs.append((facing.public_ip, facing.address))
        if self._network.ipv6_network is not None:
            pairs.append((facing.public_ipv6, facing.address_v6))
        for public, own in pairs:
            if own is None or str(own) == "0.0.0.0":
                raise ConfigError(f"interface {facing.name} has no address of an IP version that the net-conf enables")
            if public != own:
                raise ConfigError(
                    f"your PublicIP {public} differs from interface IP {own}, meaning that probably you're on a NAT,"
                    " which is not supported by host-gw backend: use vxlan or udp"
                )

    def _attrs(self) -> LeaseAttrs:
        v6 = self._facing.public_ipv6 if self._network.ipv6_network is not None else None
        return LeaseAttrs(self._facing.public_ip, v6, TYPE)

    def _plan(self, peer: Peer, _direct: int) -> tuple[Entry, ...]:
        return (rtnetlink.route(peer.subnet, self._facing.index, peer.address, onlink=False),)

    def _scopes(self) -> list[Scope]:
        # a former daemon may have had another interface
        return [rtnetlink.routes_of(within.version, 0) for within in self._network.networks]

    def _is_stale(self, entry: Entry) -> bool:
        return entry.scope.table is Table.ROUTE and self._network.is_subnet(rtnetlink.destination_of(entry))

    def _is_own(self, event: LinkEvent | AddressEvent) -> bool:
        """The kernel takes routes along with the device or its address, IPv4's without a word."""
        index = event.address.index if isinstance(event, AddressEvent) else event.index
        return index == self._facing.index

    async def _put_right(self) -> bool:
        """There is nothing besides routes."""
        return False


def _no_mac(lease: Lease) -> bytes:
    check_type(lease, TYPE)
    return b""
