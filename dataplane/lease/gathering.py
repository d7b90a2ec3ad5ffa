"""Owns in which pieces a watch is followed: many small batches as one portion, a large batch as several.

A portion has a price of its own, a new table for the pumps or a way to the kernel and back, which thousands of small
batches a second would pay each; and whoever follows ten thousand changes in one go gives nobody else a turn.
Free of: what the changes mean. Invariant: every change comes once and in order; a portion's revision is that of the
last batch which has come wholly; what ends the watch comes after all of them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from dataplane.lease.store import Batch

MOST_CHANGES = 20_000
"""That wait here; a watch that brings more waits in its connection."""


async def in_portions(stream: AsyncGenerator[Batch, None], known: int, size: int) -> AsyncGenerator[Batch, None]:
    """What a watch has brought since the last portion, at most `size` changes at a time, for one who knows the store up
    to `known`. Raises what the watch raises; the caller closes both."""
    waiting = _Waiting(known)
    news, room = asyncio.Event(), asyncio.Event()

    async def read() -> None:
        try:
            async for batch in stream:
                waiting.add(batch)
                news.set()
                while waiting.changes >= MOST_CHANGES:
                    room.clear()
                    await room.wait()
        finally:
            news.set()

    reader = asyncio.create_task(read())
    try:
        while True:
            if not waiting and not reader.done():
                await news.wait()
            news.clear()
            if waiting:
                yield waiting.take(size)
                room.set()
            elif reader.done():
                await reader
                return
    finally:
        reader.cancel()
        await asyncio.wait([reader])


class _Waiting:
    """Batches in order, and how many `changes` they have together."""

    def __init__(self, known: int) -> None:
        self._batches: deque[Batch] = deque()
        self._known = known
        self.changes = 0

    def __bool__(self) -> bool:
        return bool(self._batches)

    def add(self, batch: Batch) -> None:
        self._batches.append(batch)
        self.changes += len(batch.changes)

    def take(self, size: int) -> Batch:
        """The first changes. Whoever breaks off within a batch has to resume from before it."""
        taken = 0
        parts = []
        while self._batches and (taken < size or not self._batches[0].changes):
            batch = self._batches.popleft()
            parts.append(batch.changes[: size - taken])
            rest = batch.changes[size - taken :]
            taken += len(parts[-1])
            if rest:
                self._batches.appendleft(Batch(batch.revision, rest))
            else:
                self._known = batch.revision
        self.changes -= taken
        return Batch(self._known, tuple(change for part in parts for change in part))
