"""Owns how long a peer is kept whose entry the store has lost.

Free of: IO, clocks; `now` is an argument (monotonic seconds). Invariant: a peer is due to be forgotten at the earliest
LINGER after the last time that it was lost, and none of those that a wiped store has lost before its grace is over.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from itertools import takewhile

LINGER = 3.0
"""Seconds for which a peer whose entry is gone is kept: its daemon puts it back within one, and no packet is lost."""

_GATHER = 0.1
"""Those that are due so soon after each other are forgotten together."""


class Losses:
    """What was lost one by one lingers; what a wiped store has lost waits for the end of a grace of its own."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._until: dict[str, float] = {}  # in the order of time
        self.grace_until: float | None = None
        """When the grace of a wiped store ends; None where none is running."""

    @property
    def next(self) -> float:
        """When something has to be forgotten; infinite for never."""
        return next(iter(self._until.values()), float("inf"))

    @property
    def lingering(self) -> AbstractSet[str]:
        return self._until.keys()

    def lost(self, keys: Iterable[str], now: float) -> None:
        for key in keys:
            self._until.pop(key, None)
            self._until[key] = now + LINGER

    def due(self, now: float) -> list[str]:
        """Those whose time is over, once each."""
        if self.next > now:
            return []
        keys = list(takewhile(lambda key: self._until[key] <= now + _GATHER, self._until))
        for key in keys:
            del self._until[key]
        return keys

    def wiped(self, now: float) -> bool:
        """The store has lost everything; True where that begins a grace."""
        if self.grace_until is not None:
            return False
        self.grace_until = now + self._grace
        self._until.clear()
        return True

    def in_grace(self, now: float) -> bool:
        return self.grace_until is not None and now < self.grace_until
