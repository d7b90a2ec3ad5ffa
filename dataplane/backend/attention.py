"""Owns when a backend looks after what it has in the kernel: at once after an alarm, and now and then without one.

Free of: what is looked at. Invariant: an alarm that comes while a look is under way leads to another look; looks leave
most of the time to others, however many alarms there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from dataplane.errors import KernelError
from dataplane.lease.retry import LogGate

log = logging.getLogger(__name__)

AUDIT_SECONDS = 30.0
RETRY_SECONDS = (0.1, 0.2, 1.0, 5.0)
"""Waits after a look that failed; the last one repeats."""
REST_SECONDS = 0.01
"""At least this long, and twice as long as a look took, nothing is looked at: a flush of many entries is one repair."""
MOST_REST_SECONDS = 0.5
"""No longer than this, however long a look took: the kernel needs more than a second for ten thousand routes, and what
is taken away just then shall not wait three more."""


def rest_after(seconds: float) -> float:
    """How long nothing is looked at after a look that took so long."""
    return min(max(REST_SECONDS, 2 * seconds), MOST_REST_SECONDS)


class Attention:
    """`start` once; `alarm` at any time, also before; `close` at the end. Trouble of a look is logged once."""

    def __init__(self, look: Callable[[], Awaitable[None]]) -> None:
        self._look = look
        self._alarm = asyncio.Event()
        self._gate = LogGate()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def alarm(self) -> None:
        """Look at once."""
        self._alarm.set()

    async def close(self) -> None:
        """Let no further look begin, and none be left half-way. Safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        failures = 0
        while True:
            wait = RETRY_SECONDS[min(failures, len(RETRY_SECONDS)) - 1] if failures else AUDIT_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._alarm.wait()
            self._alarm.clear()
            began = time.monotonic()
            try:
                await self._look()
            except KernelError as error:
                failures += 1
                if self._gate.passes(str(error), time.monotonic()):
                    log.error("Cannot keep this node's part of the overlay as it should be: %s", error)
            else:
                failures = 0
                if self._gate.calm():
                    log.info("This node's part of the overlay is as it should be again")
            await asyncio.sleep(rest_after(time.monotonic() - began))
