"""Owns the talk with the lease store for one network: get a lease, keep it, follow those of the peers.

Free of: decisions. What is a peer decides `table`, how a subnet is got `acquire`, what to do about our own key
`ownership`, how much is said of it all `journal`; here is when to ask the store. Invariant: every write of our own and
every look at what the store says happens under one lock, so facts reach table and ownership in an order that the store
could tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from dataplane.errors import HistoryGone, StoreError, StoreUnavailable
from dataplane.lease import texts
from dataplane.lease.acquire import Acquired, Acquisition
from dataplane.lease.allocate import Claim, Wish
from dataplane.lease.config import Clock, Sleep, range_v4, range_v6
from dataplane.lease.gathering import in_portions
from dataplane.lease.journal import Journal
from dataplane.lease.loss import Losses
from dataplane.lease.model import LEASE_TTL, Lease, LeaseAttrs, LeaseEvent, LeaseKey
from dataplane.lease.ownership import Ownership, Standing
from dataplane.lease.retry import Backoff
from dataplane.lease.store import Entry, LeaseStore, Snapshot
from dataplane.lease.table import LeaseTable, Update
from dataplane.netconf import NetworkConfig

log = logging.getLogger(__name__)

WIPED_STORE_GRACE = 600.0
"""Seconds for which the peers that a wiped store has lost are kept: their daemons put them back."""

PORTION = 50
"""Leases that are followed at once: about 5 ms of work."""

MOST_REST = 0.005
"""Seconds of rest after a full portion: with more, who tells the kernel of each lease falls behind a storm of them."""

UNRESTED = 5
"""Full portions in a row after none of which there is a rest: what has gathered in a moment in which others had the
processor is followed within 50 ms. Whoever has more behind it than that is late already."""

PACE = 0.01
"""Seconds between the beginnings of two portions that are not full. Each costs a way to the kernel or a new table of
the path, whatever is in it; so a storm of small changes is followed in a hundred steps a second, not in a thousand."""

_RENEWAL_RETRY = 60.0
_RACE_PAUSE = 0.5
_AUDIT_AFTER = 60.0


@dataclass(slots=True)
class KeeperCounters:
    """Since the start of the keeper."""

    events: int = 0
    resyncs: int = 0
    interruptions: int = 0
    renewals: int = 0
    changes: int = 0
    put_backs: int = 0
    lost_races: int = 0
    rejections: int = 0


class LeaseKeeper:
    """One node's lease and its view of the others. `acquire` once, then `run` once, until it is cancelled.

    `on_events` is awaited with peer events in order, at first with all there are, perhaps none; whatever it raises ends
    `run`. `on_own` is called with each new state of our own entry, and the seconds that its TTL still runs (None:
    reserved). A stop revokes nothing (facts 1.5). `grace`: see WIPED_STORE_GRACE. `rest`: see MOST_REST; 0 where nobody
    carries packets on the processors that follow leases.
    """

    def __init__(
        self,
        store: LeaseStore,
        config: NetworkConfig,
        attrs: LeaseAttrs,
        *,
        claim: Claim | None = None,
        previous: LeaseKey | None = None,
        renew_margin: float,
        on_events: Callable[[Sequence[LeaseEvent]], Awaitable[None]],
        on_own: Callable[[Entry, float | None], None],
        rng: Random,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
        grace: float = WIPED_STORE_GRACE,
        rest: float = MOST_REST,
    ) -> None:
        self._store = store
        self._attrs = attrs
        self._wish = Wish(
            range_v4(config), attrs.public_ip, attrs.public_ipv6, range_v6(config), claim=claim, previous=previous
        )
        self._renew_margin = renew_margin
        self._on_events = on_events
        self._on_own = on_own
        self._rng = rng
        self._clock = clock
        self._sleep = sleep
        self._losses = Losses(grace)
        self._rest = rest
        self._audit_at: float | None = None
        self._table = LeaseTable(
            config.network, config.ipv6_network, own_ip=attrs.public_ip, own_ipv6=attrs.public_ipv6
        )
        self._own: Ownership | None = None
        self._remembered: Snapshot | None = None
        self._former: Snapshot | None = None
        self._seen: Snapshot | None = None
        self._turn = asyncio.Lock()
        self._wake = asyncio.Event()
        self._journal = Journal(store.name, clock)
        self.synced = False
        """Whether the peers were delivered, once at least."""
        self.counters = KeeperCounters()

    @property
    def store_error(self) -> str:
        """The trouble with the store at this moment, empty when there is none."""
        return self._journal.store_error

    @property
    def own(self) -> Lease | None:
        """Our lease as we last held it."""
        return None if self._own is None else self._own.lease

    @property
    def fenced(self) -> bool:
        """Another node has our key: nothing is written until it is free again."""
        return self._own is not None and self._own.standing is Standing.TAKEN

    @property
    def healthy(self) -> bool:
        """Our lease's TTL still runs, and no other daemon writes our key: see Ownership for what ends a TWIN."""
        if self._own is None or self._own.standing in (Standing.TAKEN, Standing.TWIN):
            return False
        return self._own.expires_at is None or self._clock() < self._own.expires_at

    @property
    def expires_at(self) -> float | None:
        """Clock value at which our last write runs out; None for a reservation or without a lease."""
        return None if self._own is None else self._own.expires_at

    @property
    def peers(self) -> Mapping[str, Lease]:
        """The leases that are obeyed, by key text."""
        return self._table.peers

    @property
    def rejected(self) -> dict[str, str]:
        """Why keys in the store are not obeyed, by key text, of which no more is shown than a line holds."""
        return {text[:100]: reason for text, reason in self._table.rejected.items()}

    @property
    def revision(self) -> int:
        """The store is known up to here."""
        return self._table.revision

    def resume(self, held: Entry, left: float | None, snapshot: Snapshot) -> Lease:
        """In place of `acquire`, where the store cannot be asked: begin with what a former daemon here knew.

        `held`: our entry, whose TTL still runs for `left` seconds (None: reserved). `run` delivers the peers of
        `snapshot` first, and holds all of it against the store as soon as that answers.
        """
        written = self._clock() + (left or 0.0) - LEASE_TTL
        key = LeaseKey.parse(held.key)
        self._own = Ownership(
            held, key, self._attrs, renew_margin=self._renew_margin, written=written, inherited=True
        )
        self._table.set_own(held.key)
        self._remembered = snapshot
        return self._own.lease

    def remember(self, snapshot: Snapshot) -> None:
        """Before `run`: what a former daemon here knew of this store. It counts only where the first look shows that
        the store was wiped since; else that look says all there is."""
        self._former = snapshot

    async def acquire(self) -> Lease:
        """Get a lease, however long the store or a race takes. Raises LeaseError when no subnet is free."""
        backoff = Backoff(1.0, 5.0, self._rng, growth=1.1)
        acquisition = Acquisition(self._store, self._wish, self._attrs, rng=self._rng, clock=self._clock)
        while True:
            try:
                acquired = await acquisition.attempt()
            except StoreError as error:
                self._journal.trouble("Couldn't acquire lease", error)
                await self._sleep(backoff.next())
                continue
            self._journal.fine()
            self.counters.lost_races = acquisition.lost_races
            if acquired is not None:
                return self._begin(acquired)
            await self._sleep(self._rng.uniform(0.0, _RACE_PAUSE))

    def _begin(self, acquired: Acquired) -> Lease:
        self._seen = acquired.snapshot
        entry, margin = acquired.entry, self._renew_margin
        self._own = Ownership(entry, acquired.key, self._attrs, renew_margin=margin, written=acquired.started)
        self._table.set_own(entry.key)
        self._tell_own(self._own)
        return self._own.lease

    async def change_attrs(self, attrs: LeaseAttrs) -> None:
        """Say `attrs` in our lease from now on, by compare-and-put, with its subnet and kind of TTL as they are.
        `run` writes it, at once or as soon as the store takes it; this call does not wait for that."""
        self._attrs = attrs
        if self._table.move(attrs.public_ip, attrs.public_ipv6):
            self._audit_at = self._clock()  # who has our new address, or our old one, is another question now
        if self._own is not None:
            self._own.change(attrs)
        self._wake.set()

    async def run(self) -> None:
        """Keep the lease and deliver the peers' until cancelled. Only an error of `on_events` ends it otherwise."""
        if self._own is None:
            raise RuntimeError("acquire or resume comes before run")
        if self._remembered is not None:
            await self._deliver(self._own, self._table.reset(self._remembered), certain=False)
            self._remembered = None
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow(self._own))
                tasks.create_task(self._upkeep(self._own))
        except ExceptionGroup as group:
            raise group.exceptions[0] from group

    async def _follow(self, own: Ownership) -> None:
        backoff = Backoff(0.1, 5.0, self._rng)
        look = True
        while True:
            try:
                if look:
                    async with self._turn:
                        await self._resync(own)
                    look = False
                    log.info("Watching for new subnet leases")
                else:
                    # a watch on a quiet store says nothing: only an answer tells that the store is back
                    await self._store.read_config()
                    self._journal.fine()
                await self._watch(own, backoff)
            except HistoryGone as error:
                look = True
                log.info("Taking a new snapshot of the leases: %s", error)
            except StoreError as error:
                self._journal.trouble("The watch of the leases was interrupted", error)
            self.counters.interruptions += 1
            if self._audit_at is None:
                # a store that was wiped meanwhile may have counted past our revision: a snapshot shows it
                self._audit_at = self._clock() + _AUDIT_AFTER
                self._wake.set()
            await self._sleep(backoff.next())

    async def _watch(self, own: Ownership, backoff: Backoff) -> None:
        """Follow the changes; where very many wait, rest after each portion for about as long as it has taken: packets
        want the processor too, and everybody else on this loop. Where few come at a time, let some gather."""
        known, full = self._table.revision, 0
        async with (
            contextlib.aclosing(self._store.watch(known)) as stream,
            contextlib.aclosing(in_portions(stream, known, PORTION)) as portions,
        ):
            async for portion in portions:
                backoff.reset()
                began = self._clock()
                async with self._turn:
                    self._journal.fine()
                    await self._deliver(own, self._table.apply(portion), certain=False)
                spent = self._clock() - began
                full = full + 1 if len(portion.changes) >= PORTION else 0
                rest = min(spent, self._rest) if full else min(9 * spent, PACE - spent)
                if 0 < full <= UNRESTED:
                    await asyncio.sleep(0)  # others on this loop have a turn in any case
                elif rest > 0:
                    await self._sleep(rest)
        raise StoreUnavailable(f"{self._store.name} ended the watch")

    async def _resync(self, own: Ownership) -> None:
        """Follow a snapshot; the turn is ours. A wiped store takes no peer away before the grace is over.

        The first is the one by which our lease was chosen: what has changed since, our own write too, the watch tells.
        """
        seen, self._seen = self._seen, None
        snapshot = seen or await self._store.snapshot()
        self._journal.fine()
        self.counters.resyncs += 1
        former, self._former = self._former, None
        kept: tuple[LeaseEvent, ...] = ()
        if former is not None and _is_wiped(snapshot, former.revision):
            # told together with what the store has now: whoever follows sees no moment with the one and not the other
            kept = self._table.reset(former).events
        # reads are linearizable, so a revision below a known one is the start of another history
        restarted = snapshot.revision < max(self._table.revision, 0 if seen else own.revision)
        wiped = restarted or _is_wiped(snapshot, self._table.revision)
        losses, now = self._losses, self._clock()
        if wiped and self._table.peers and losses.wiped(now):
            self._wake.set()
            log.error("%s", texts.wiped(self._store.name, len(self._table.peers), (losses.grace_until or now) - now))
        update = self._table.reset(snapshot, restarted=restarted)
        update = replace(update, events=kept + update.events)
        self._audit_at = None
        await self._deliver(own, replace(update, lost=()) if losses.in_grace(now) else update, certain=seen is None)
        if losses.grace_until is not None and not losses.in_grace(now):
            await self._deliver(own, self._table.forget(self._table.missing - losses.lingering), certain=True)
        if not losses.in_grace(now) or not self._table.missing:
            losses.grace_until = None
        self.synced = True

    async def _deliver(self, own: Ownership, update: Update, *, certain: bool) -> None:
        if update.own is not None:
            before = own.entry
            finding = own.observe(update.own, self._clock(), certain=certain)
            if finding is not None:
                self._wake.set()
                self._journal.finding(own, finding)
            if own.entry != before:
                self._tell_own(own)
        if update.lost:
            if not self._losses.lingering:
                self._wake.set()
            self._losses.lost(update.lost, self._clock())
        self.counters.rejections += len(update.rejections)
        self._journal.rejections(update.rejections)
        self.counters.events += len(update.events)
        # the first snapshot is told also where it has no peers: what the kernel holds for some is left over
        if update.events or not self.synced:
            await self._on_events(update.events)
        self._journal.events(update.events)

    async def _upkeep(self, own: Ownership) -> None:
        """Write our lease when that is due; look at all leases when a grace ends, or some time after a break."""
        backoff = Backoff(0.1, 5.0, self._rng)
        announced: float | None = None
        while True:
            due, now = self._due(own), self._clock()
            if due is None or due > now:
                backoff.reset()
                renewal = own.due()
                if renewal is not None and renewal != announced:
                    announced = renewal
                    log.info("Waiting for %s to renew lease", texts.duration(renewal - now))
                await self._pause(None if due is None else due - now)
                continue
            urgent = own.due() == float("-inf")
            try:
                async with self._turn:
                    await self._act(own)
            except StoreError as error:
                if not urgent:
                    if own.due() == due:
                        self._journal.renewal_failed(error)
                    else:
                        self._journal.trouble("Couldn't look at the leases", error)
                    await self._pause(min(_RENEWAL_RETRY, self._losses.next - self._clock()))
                    continue
                wish = "change our lease" if own.changing else "put our lease back"
                self._journal.trouble(f"Couldn't {wish}", error)
            if self._due(own) == due:
                await self._pause(backoff.next())

    def _due(self, own: Ownership) -> float | None:
        due = [self._losses.next, *self._times(own)]
        return None if min(due) == float("inf") else min(due)

    def _times(self, own: Ownership) -> list[float]:
        """When the store has to be asked."""
        return [at for at in (own.due(), self._losses.grace_until, self._audit_at) if at is not None]

    async def _act(self, own: Ownership) -> None:
        """Do what is due; the turn is ours."""
        now = self._clock()
        if forgotten := self._losses.due(now):
            await self._deliver(own, self._table.forget(forgotten), certain=False)
        due = own.due()
        if due is not None and due <= now:
            await self._put(own)
        elif any(at <= now for at in self._times(own)):
            await self._resync(own)

    async def _put(self, own: Ownership) -> None:
        started, back, changed, value = self._clock(), own.standing is Standing.FREE, own.changing, own.value
        try:
            if own.expected is None:
                written = await self._store.create(own.text, value, own.ttl)
            else:
                written = await self._store.replace(own.text, value, own.ttl, expected=own.expected)
        except StoreError:
            own.in_doubt(value, started)
            raise
        self._journal.fine()
        if written is None:
            self.counters.lost_races += 1
            await self._resync(own)
            return
        own.wrote(written, started)
        if back:
            self.counters.put_backs += 1
            log.warning("Lease %s was put back", own.text)
        elif changed:
            self.counters.changes += 1
            log.info("Lease %s now says that this node is at %s", own.text, own.lease.attrs.node)
        else:
            self.counters.renewals += 1
            self._journal.renewed(own)
        self._tell_own(own)

    def _tell_own(self, own: Ownership) -> None:
        self._on_own(own.entry, None if own.expires_at is None else own.expires_at - self._clock())

    async def _pause(self, seconds: float | None) -> None:
        """Until the time is over, or something about our lease is news."""
        waits: list[asyncio.Future[object]] = [asyncio.ensure_future(self._wake.wait())]
        if seconds is not None:
            waits.append(asyncio.ensure_future(self._sleep(seconds)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self._wake.clear()


def _is_wiped(snapshot: Snapshot, known: int) -> bool:
    """Nothing in it is as old as what was known, even if some nodes have put theirs back already."""
    return snapshot.revision < known or all(entry.create_revision > known for entry in snapshot.entries)
