"""Owns the way to a lease: one look at the store and one write, as often as others are faster.

Free of: which subnet (`allocate`), what to do while the store is away (`keeper`). Invariant: every write is a
compare-and-put on the snapshot that it was chosen by; a write whose answer was lost is repeated for the same key.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from dataplane.lease import texts
from dataplane.lease.allocate import Discard, Proof, Reuse, Take, Wish, plan
from dataplane.lease.model import LEASE_TTL, LeaseAttrs, LeaseKey
from dataplane.lease.store import Entry, LeaseStore, Snapshot

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Acquired:
    """Our entry, the clock when its write was begun, and what the store said just before."""

    entry: Entry
    key: LeaseKey
    started: float
    snapshot: Snapshot


class Acquisition:
    """`attempt` until it has something. `lost_races`: how often another node wrote first."""

    def __init__(
        self, store: LeaseStore, wish: Wish, attrs: LeaseAttrs, *, rng: Random, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._wish = wish
        self._attrs = attrs
        self._rng = rng
        self._clock = clock
        self.lost_races = 0

    async def attempt(self) -> Acquired | None:
        """One look and one write; None if the look has to be repeated. Raises StoreError, and LeaseError when no
        subnet is free."""
        snapshot = await self._store.snapshot()
        step = plan(snapshot.entries, self._wish, self._rng)
        started = self._clock()
        match step:
            case Discard(entry):
                log.warning("Found lease %s of this node that does not fit the network config, deleting it", entry.key)
                await self._store.delete(entry.key, expected=entry)
                return None
            case Reuse(entry, key, proof):
                words = "current IP" if proof is Proof.PUBLIC_IP else "this node under its former IP, now"
                log.info("Found lease (%s) for %s (%s), reusing", texts.families(key), words, self._attrs.node)
                ttl = None if entry.reserved else LEASE_TTL
                written = await self._store.replace(entry.key, self._attrs.encode(), ttl, expected=entry)
            case Take(key, previous):
                if previous:
                    log.info("Found previously leased subnet (%s), reusing", texts.subnets(key))
                else:
                    for subnets in self._wish.ranges:
                        log.info("Picking subnet in range %s ... %s", subnets.first, subnets.last)
                # should the answer be lost, the next attempt asks for the same key, not for a second one
                self._wish = replace(self._wish, previous=key)
                written = await self._store.create(str(key), self._attrs.encode(), LEASE_TTL)
        if written is None:
            self.lost_races += 1
            log.warning("Another node was faster with lease %s, trying again", key)
            return None
        if isinstance(step, Take):
            log.info("Allocated lease (%s) to current node (%s)", texts.families(key), self._attrs.node)
        return Acquired(written, key, started, snapshot)
