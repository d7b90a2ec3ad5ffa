"""Owns the gathering of what a watch brings: batches that came while the former ones were followed are one.

So whoever follows slowly, such as a kernel that is told of each change, falls behind by one round and no further.
Free of: what the changes mean. Invariant: every change comes once and in order; what ends the watch comes after all of
them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from dataplane.lease.store import Batch

MOST_CHANGES = 20_000
"""Of one round; a watch that brings more waits in its connection."""


async def gathered(stream: AsyncGenerator[Batch, None]) -> AsyncGenerator[Batch, None]:
    """The batches of a watch, as few as its follower can take. Raises what the watch raises; the caller closes both."""
    waiting: list[Batch] = []
    held = 0
    news, room = asyncio.Event(), asyncio.Event()

    async def read() -> None:
        nonlocal held
        try:
            async for batch in stream:
                waiting.append(batch)
                held += len(batch.changes)
                news.set()
                if held >= MOST_CHANGES:
                    room.clear()
                    await room.wait()
        finally:
            news.set()

    reader = asyncio.create_task(read())
    try:
        while True:
            if not reader.done():
                await news.wait()
                news.clear()
            taken, waiting[:], held = tuple(waiting), [], 0
            room.set()
            if taken:
                yield Batch(taken[-1].revision, tuple(change for batch in taken for change in batch.changes))
            elif reader.done():
                await reader
                return
    finally:
        reader.cancel()
        await asyncio.wait([reader])
