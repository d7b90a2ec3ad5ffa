"""Owns keepers that run on a real store, for tests: one task each, what they were told, and waiting for agreement."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from random import Random

from dataplane.lease.etcd import EtcdStore
from dataplane.lease.keeper import LeaseKeeper
from dataplane.lease.model import LeaseAttrs, LeaseEvent, LeaseEventKind
from dataplane.lease.store import Entry
from dataplane.netconf import NetworkConfig


class LiveKeeper:
    """One node: a connection of its own, its keeper, and the peers as a backend would have them."""

    def __init__(
        self, url: str, prefix: str, config: NetworkConfig, attrs: LeaseAttrs, seed: int, **options: object
    ) -> None:
        self.attrs = attrs
        self.store = EtcdStore([url], prefix)
        self.peers: dict[str, LeaseAttrs] = {}
        self.events: list[LeaseEvent] = []
        self.owned: list[Entry] = []
        self.keeper = LeaseKeeper(
            self.store, config, attrs, on_events=self.on_events, on_own=lambda entry, _: self.owned.append(entry),
            rng=Random(seed), **({"renew_margin": 3600.0} | options),  # type: ignore[arg-type]  # named by each test
        )  # fmt: skip

    async def on_events(self, events: Sequence[LeaseEvent]) -> None:
        for event in events:
            self.peers[str(event.lease.key)] = event.lease.attrs
            if event.kind is LeaseEventKind.REMOVED:
                del self.peers[str(event.lease.key)]
        self.events += events

    @property
    def key(self) -> str:
        return "" if self.keeper.own is None else str(self.keeper.own.key)

    async def live(self, delay: float = 0.0) -> None:
        await asyncio.sleep(delay)
        await self.keeper.acquire()
        await self.keeper.run()


@asynccontextmanager
async def living(*nodes: LiveKeeper, within: float = 0.0, rng: Random | None = None) -> AsyncIterator[None]:
    """Nodes that start in the same moment, or spread over `within` seconds, and end with the block."""
    delays = [rng.uniform(0.0, within) if rng else 0.0 for _ in nodes]
    tasks = [asyncio.create_task(node.live(delay)) for node, delay in zip(nodes, delays, strict=True)]
    try:
        yield
        failed = [task for task in tasks if task.done()]
        assert not failed, failed[0].exception()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(node.store.close() for node in nodes))


async def until(what: str, check: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        await asyncio.sleep(0.005)


def all_known(nodes: Sequence[LiveKeeper]) -> bool:
    """Whether each node has a lease of its own, and each knows every other's."""
    keys = {node.key for node in nodes}
    return "" not in keys and len(keys) == len(nodes) and all(node.peers.keys() == keys - {node.key} for node in nodes)


def attrs_of(number: int) -> LeaseAttrs:
    return LeaseAttrs(IPv4Address("198.18.0.0") + number)
