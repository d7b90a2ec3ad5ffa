"""Owns DirectRouting for the userspace backends: peers on our own wire get a route of their own, and no encapsulation.

Free of: how the other packets are carried. Invariant: a peer has a direct route exactly while the kernel reaches its
address without a gateway; it is longer than the overlay's own, so there is never a choice between the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dataplane.backend.base import Backend, BackendStatus, Tappable, Underlay
from dataplane.backend.entries import PeerEntries
from dataplane.backend.peers import IPNetwork, Peer
from dataplane.kernel import rtnetlink
from dataplane.kernel.events import UNDERLAY
from dataplane.kernel.facts import AddressEvent, LinkEvent
from dataplane.kernel.rtnetlink import Entry, Scope, Table
from dataplane.lease.model import Lease, LeaseAttrs, LeaseEvent
from dataplane.netconf import NetworkConfig


class DirectRoutes:
    """The routes. `follow` is what a userspace backend tells of its peers."""

    def __init__(self, network: NetworkConfig) -> None:
        self._network = network
        self.entries = PeerEntries(
            _plan, stale=self._is_stale, scopes=self._scopes, direct=True, is_own=_is_own, put_right=_put_right
        )

    async def follow(self, changes: Mapping[IPNetwork, Peer | None]) -> None:
        await self.entries.follow(changes)

    def _scopes(self) -> list[Scope]:
        return [rtnetlink.routes_of(network.version, 0) for network in self._network.networks]

    def _is_stale(self, entry: Entry) -> bool:
        return entry.scope.table is Table.ROUTE and self._network.is_subnet(rtnetlink.destination_of(entry))


class UserspaceBackend(Backend, Tappable, Protocol):
    """What is left to carry the other packets."""


class DirectlyRouted:
    """A backend, and direct routes beside it. See dataplane.backend.base.Backend for the life of both."""

    def __init__(self, inner: UserspaceBackend, routes: DirectRoutes) -> None:
        """`inner` was made with `routes.follow`."""
        self._inner = inner
        self._routes = routes.entries

    @property
    def mtu(self) -> int:
        return self._inner.mtu

    async def prepare(self) -> LeaseAttrs:
        try:
            await self._routes.open(UNDERLAY)
            return await self._inner.prepare()
        except BaseException:
            await self.close()
            raise

    async def attach(self, lease: Lease) -> None:
        await self._inner.attach(lease)
        self._routes.start()

    async def apply(self, events: Sequence[LeaseEvent]) -> None:
        await self._inner.apply(events)

    async def move(self, facing: Underlay) -> LeaseAttrs:
        attrs = await self._inner.move(facing)
        await self._routes.moved()
        return attrs

    async def arm(self, taps: Sequence[Any]) -> None:
        """Packets that go directly pass by the taps: the kernel carries them."""
        await self._inner.arm(taps)

    def status(self) -> BackendStatus:
        status = self._inner.status()
        peers = tuple(p._replace(direct=self._routes.is_direct(p.subnet)) for p in status.peers)
        ignored = status.ignored | self._routes.refused
        return dataclasses.replace(
            status, peers=peers, ignored=ignored, repairs=status.repairs + self._routes.repairs
        )

    async def close(self) -> None:
        """The routes go with the device: what leads to peers shall not outlive what leads back."""
        await self._routes.remove()
        await self._routes.close()
        await self._inner.close()


def _plan(peer: Peer, direct: int) -> tuple[Entry, ...]:
    if not direct:
        return ()
    return (rtnetlink.route(peer.subnet, direct, peer.address, onlink=False),)


def _is_own(_event: LinkEvent | AddressEvent) -> bool:
    return False


async def _put_right() -> bool:
    return False
