"""Owns the backend that only takes a lease: subnet.env is written, and whoever reads it does the rest.

Free of: the kernel and of peers. Invariant: nothing on this node is changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from dataplane.backend.base import BackendStatus, Underlay
from dataplane.errors import DropReason
from dataplane.lease.model import Lease, LeaseAttrs, LeaseEvent
from dataplane.netconf import NetworkConfig


class AllocBackend:
    """See dataplane.backend.base.Backend for the life of a backend."""

    def __init__(self, facing: Underlay, network: NetworkConfig) -> None:
        self._facing = facing
        self._network = network

    @property
    def mtu(self) -> int:
        return self._facing.mtu

    async def prepare(self) -> LeaseAttrs:
        """As flannel writes it: without a backend type."""
        return LeaseAttrs(self._facing.public_ip, self._facing.public_ipv6 if self._network.enable_ipv6 else None)

    async def attach(self, lease: Lease) -> None:
        """There is nothing to make."""

    async def apply(self, events: Sequence[LeaseEvent]) -> None:
        """Nobody is carried anywhere."""

    async def move(self, facing: Underlay) -> LeaseAttrs:
        self._facing = facing
        return await self.prepare()

    def status(self) -> BackendStatus:
        return BackendStatus(
            type="alloc",
            device="",
            mtu=self.mtu,
            peers=(),
            drops=dict.fromkeys(DropReason, 0),
            unknown_sources={},
            ignored={},
            capabilities={},
            dataplane="none",
        )

    async def close(self) -> None:
        """Nothing was made."""
