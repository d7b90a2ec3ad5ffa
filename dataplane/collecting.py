"""Owns how long this process may stop for itself: when cyclic garbage is looked for, and who waits for the interpreter.

References alone free what a lease leaves behind, and cycles are few here. CPython looks for them once more objects
were made than freed. In a storm of changes, each of which makes as many as it frees, that is never for seconds, and
then everything new is looked at in one go: with ten thousand leases the event loop stands for 200 ms, and for longer
where the old objects have their turn. Here the new ones are looked at some times a second, and all of them now and
then, in a quiet moment.
Free of: what the daemon does. Invariant: everything is collected once an hour at least.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable

YOUNG_SECONDS = 0.5
"""Between two looks at what is new."""

BUSY_SECONDS = 0.1
"""The same while something happens: of 2,000 changes a second a look takes some milliseconds after half a second, of
which packets to a former owner have fifty, and on busy processors many more."""

DUE_SECONDS, LATEST_SECONDS = 600.0, 3600.0
"""After which all objects are looked at: in a quiet moment, and in any case."""

QUIET_SECONDS = 10.0
"""In which nothing has happened."""

SWITCH_SECONDS = 0.0005
"""For which the event loop waits for a thread of ours that computes: 5 ms, CPython's own value, would come with every
single step while peers are put into the kernel."""


def prepare() -> None:
    """Nothing is collected from here on but by `run`."""
    gc.disable()
    sys.setswitchinterval(SWITCH_SECONDS)


async def run(happened: Callable[[], int]) -> None:
    """Collect until cancelled. `happened` counts what must not be delayed."""
    loop = asyncio.get_running_loop()
    known = happened()
    calm_since = collected = loop.time()
    busy = False
    while True:
        await asyncio.sleep(BUSY_SECONDS if busy else YOUNG_SECONDS)
        now, count = loop.time(), happened()
        busy = count != known
        if busy:
            known, calm_since = count, now
        due = DUE_SECONDS if now - calm_since >= QUIET_SECONDS else LATEST_SECONDS
        if now - collected >= due:
            gc.collect()
            collected = now
        else:
            gc.collect(0)
