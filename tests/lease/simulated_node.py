"""Owns one daemon's keeper over a simulated store (fake_store.py), for the tests that ask what it does.

Free of: assertions about the store. Invariant: what it was told is checked as it comes, and adds up to its `peers`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from random import Random

from dataplane import netconf
from dataplane.lease.keeper import LeaseKeeper
from dataplane.lease.model import LEASE_TTL, LeaseAttrs, LeaseEvent, LeaseEventKind
from dataplane.lease.store import Entry
from tests.lease.fake_store import SimulatedClient, SimulatedStore, Write, settle

CONFIG = netconf.parse(b'{"Network":"10.5.0.0/16","SubnetMax":"10.5.6.0"}', origin="this test")
V6_CONFIG = netconf.parse(b'{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48"}', origin="this test")
DUAL_CONFIG = netconf.parse(
    b'{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}', origin="this test"
)
MARGIN = 3600.0
DAY = float(LEASE_TTL)


def value(ip: str | IPv4Address, data: bytes = b"") -> bytes:
    return LeaseAttrs(IPv4Address(ip), backend_data=data).encode()


class Node:
    """One daemon's keeper, what it was told, and the sum of that."""

    def __init__(
        self,
        store: SimulatedStore,
        number: int,
        *,
        attrs: LeaseAttrs | None = None,
        config: netconf.NetworkConfig = CONFIG,
        **arguments: object,
    ) -> None:
        self.store, self.clock = store, store.clock
        self.ip = IPv4Address(f"192.0.2.{number}")
        self.client = SimulatedClient(store, str(self.ip))
        self.events: list[LeaseEvent] = []
        self.told: list[int] = []
        """How many events came each time."""
        self.peers: dict[str, LeaseAttrs] = {}
        self.owned: list[Entry] = []
        self.task: asyncio.Task[None] | None = None
        self.keeper = LeaseKeeper(
            self.client, config, attrs or LeaseAttrs(self.ip), on_events=self.on_events,
            on_own=lambda entry, _: self.owned.append(entry), rng=Random(number), clock=self.clock,
            sleep=self.clock.sleep,
            **({"renew_margin": MARGIN} | arguments),  # type: ignore[arg-type]  # named by each test
        )  # fmt: skip

    async def on_events(self, events: Sequence[LeaseEvent]) -> None:
        await asyncio.sleep(0)
        for event in events:
            key = str(event.lease.key)
            assert (key in self.peers) != (event.kind is LeaseEventKind.ADDED)
            self.peers[key] = event.lease.attrs
            if event.kind is LeaseEventKind.REMOVED:
                del self.peers[key]
        self.events += events
        self.told.append(len(events))

    @property
    def key(self) -> str:
        assert self.keeper.own is not None
        return str(self.keeper.own.key)

    def said(self) -> list[tuple[str, str]]:
        """The events since the last look."""
        said = [(event.kind.value, str(event.lease.key)) for event in self.events]
        self.events.clear()
        return said

    async def start(self) -> None:
        self.task = asyncio.create_task(self.live())
        await settle()

    async def live(self) -> None:
        await self.keeper.acquire()
        await self.keeper.run()

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
            await settle()
            assert self.task.cancelled(), self.task.exception()


@asynccontextmanager
async def living(store: SimulatedStore, *nodes: Node) -> AsyncIterator[None]:
    """Nodes that run, and end whatever happens."""
    open_before = store.subscriptions
    try:
        for node in nodes:
            await node.start()
        yield
    finally:
        for node in nodes:
            await node.stop()
        assert store.subscriptions == open_before, "a watch was left open"


def writes(store: SimulatedStore, client: str) -> list[Write]:
    return [write for write in store.writes if write.client == client]
