"""A simulation: a lease store in memory, with a clock that only moves when it is told to, and faults on demand.

It follows the contract in dataplane/lease/store.py; the real stores are held against that contract elsewhere. What a
test gets besides: several clients with faults of their own, compaction, a wipe, and a record of every write.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from dataplane.errors import HistoryGone, StoreUnavailable
from dataplane.lease.store import Batch, Deleted, Entry, Snapshot


async def settle() -> None:
    """Until nothing is left to do but to wait for the clock."""
    loop = asyncio.get_running_loop()
    for _ in range(10_000):
        await asyncio.sleep(0)
        if not loop._ready:  # type: ignore[attr-defined]  # the one exact answer to "is anything left to run"
            return
    raise AssertionError("the tasks never come to rest while the clock stands still")


class ManualClock:
    """Seconds since the start of the test, and the sleepers that wait for them."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._sleepers, (self.now + seconds, self._count, wake))
        await wake

    async def advance(self, seconds: float, *stores: SimulatedStore) -> None:
        """Let that time pass, every sleeper and every expiry at its moment."""
        end = self.now + seconds
        await settle()
        while True:
            self._sleepers = [sleeper for sleeper in self._sleepers if not sleeper[2].done()]
            heapq.heapify(self._sleepers)
            moments = [sleeper[0] for sleeper in self._sleepers[:1]]
            moments += [at for store in stores for at in store.expiries.values()]
            moment = min((at for at in moments if at <= end), default=None)
            if moment is None:
                break
            self.now = max(self.now, moment)
            for store in stores:
                store.expire()
            while self._sleepers and self._sleepers[0][0] <= self.now:
                wake = heapq.heappop(self._sleepers)[2]
                if not wake.done():
                    wake.set_result(None)
            await settle()
        self.now = end
        await settle()


@dataclass(frozen=True, slots=True)
class Write:
    """One change that a client made. `before`: the entry that stood under the key."""

    client: str
    key: str
    before: Entry | None
    after: Entry | None


@dataclass
class SimulatedStore:
    """What all clients share. `history_hidden`: watches stay silent, as if their answers were under way."""

    clock: ManualClock
    revision: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    expiries: dict[str, float] = field(default_factory=dict)
    history: list[tuple[int, Entry | Deleted]] = field(default_factory=list)
    compacted: int = 0
    config: bytes | None = None
    writes: list[Write] = field(default_factory=list)
    history_hidden: bool = False
    _changed: list[asyncio.Event] = field(default_factory=list)

    @property
    def subscriptions(self) -> int:
        """How many watches are open."""
        return len(self._changed)

    def put(self, key: str, value: bytes, ttl: float | None = None, *, by: str = "hand") -> Entry:
        """A put as etcdctl makes it: whatever is there is replaced."""
        self.revision += 1
        before = self.entries.get(key)
        created = self.revision if before is None else before.create_revision
        entry = self.entries[key] = Entry(key, value, created, self.revision, reserved=ttl is None)
        self.expiries.pop(key, None)
        if ttl is not None:
            self.expiries[key] = self.clock.now + ttl
        self._record(entry, Write(by, key, before, entry))
        return entry

    def remove(self, key: str, *, by: str = "hand") -> None:
        before = self.entries.pop(key, None)
        self.expiries.pop(key, None)
        if before is not None:
            self.revision += 1
            self._record(Deleted(key, self.revision), Write(by, key, before, None))

    def expire(self) -> None:
        for key in [key for key, at in self.expiries.items() if at <= self.clock.now]:
            self.remove(key, by="expiry")

    def compact(self) -> None:
        """Forget the history: a watch that is not up to date gets HistoryGone."""
        self.compacted = self.revision
        self.history.clear()

    def wipe(self, *, restart: bool) -> None:
        """Lose everything without a trace; `restart`: the revisions begin anew too."""
        self.entries.clear()
        self.expiries.clear()
        self.history.clear()
        self.revision = 1 if restart else self.revision + 1
        self.compacted = self.revision
        self.notify()

    def notify(self) -> None:
        for changed in self._changed:
            changed.set()

    def subscribe(self) -> asyncio.Event:
        changed = asyncio.Event()
        self._changed.append(changed)
        return changed

    def unsubscribe(self, changed: asyncio.Event) -> None:
        self._changed.remove(changed)

    def _record(self, change: Entry | Deleted, write: Write) -> None:
        self.history.append((self.revision, change))
        self.writes.append(write)
        self.notify()


class SimulatedClient:
    """One daemon's connection. `offline`: every call fails; `lose_answers`: that many writes happen and fail all the
    same; `repeat`: each batch of a watch comes twice."""

    def __init__(self, store: SimulatedStore, label: str) -> None:
        self.store = store
        self.label = label
        self.offline = False
        self.lose_answers = 0
        self.repeat = False
        self.calls = 0
        self._running = asyncio.Event()
        self._running.set()
        self._cuts = 0

    @property
    def name(self) -> str:
        return "the simulated store"

    def cut(self) -> None:
        """Break the watches that are open now."""
        self._cuts += 1
        self.store.notify()

    def pause(self) -> None:
        """No call comes or goes until `resume`."""
        self._running.clear()

    def resume(self) -> None:
        self._running.set()
        self.store.notify()

    async def read_config(self) -> bytes | None:
        await self._reach()
        return self.store.config

    async def write_config(self, text: bytes) -> None:
        await self._reach()
        self.store.config = text

    async def snapshot(self) -> Snapshot:
        await self._reach()
        snapshot = Snapshot(self.store.revision, tuple(self.store.entries.values()))
        await self._answer(written=False)
        return snapshot

    async def create(self, key: str, value: bytes, ttl: int | None) -> Entry | None:
        await self._reach()
        entry = None if key in self.store.entries else self.store.put(key, value, ttl, by=self.label)
        await self._answer(written=entry is not None)
        return entry

    async def replace(self, key: str, value: bytes, ttl: int | None, *, expected: Entry) -> Entry | None:
        await self._reach()
        entry = self.store.put(key, value, ttl, by=self.label) if self._stands(key, expected) else None
        await self._answer(written=entry is not None)
        return entry

    async def delete(self, key: str, *, expected: Entry) -> bool:
        await self._reach()
        stands = self._stands(key, expected)
        if stands:
            self.store.remove(key, by=self.label)
        await self._answer(written=stands)
        return stands

    async def watch(self, after: int) -> AsyncGenerator[Batch, None]:
        cuts, store = self._cuts, self.store
        changed = store.subscribe()
        try:
            while True:
                await self._running.wait()
                changed.clear()
                if self.offline or cuts != self._cuts:
                    raise StoreUnavailable("simulated: the watch broke")
                if after < store.compacted or after > store.revision:
                    raise HistoryGone(store.compacted)
                history = [] if store.history_hidden else store.history
                news = [(revision, change) for revision, change in history if revision > after]
                for revision, change in news:
                    for _ in range(2 if self.repeat else 1):
                        yield Batch(revision, (change,))
                    after = revision
                if not news:
                    await changed.wait()
        finally:
            store.unsubscribe(changed)

    async def close(self) -> None:
        self.offline = True

    def _stands(self, key: str, expected: Entry) -> bool:
        entry = self.store.entries.get(key)
        return entry is not None and (entry.mod_revision, entry.value) == (expected.mod_revision, expected.value)

    async def _reach(self) -> None:
        self.calls += 1
        await asyncio.sleep(0)
        await self._running.wait()
        if self.offline:
            raise StoreUnavailable("simulated: offline")

    async def _answer(self, *, written: bool) -> None:
        await asyncio.sleep(0)
        await self._running.wait()
        if written and self.lose_answers:
            self.lose_answers -= 1
            raise StoreUnavailable("simulated: the answer was lost")
