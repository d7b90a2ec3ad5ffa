"""Owns the rhythm of trying again: how long to wait, and which failures are worth a line in the log.

Free of: IO, clocks; `now` and randomness are arguments. Invariant: waits and lines become rarer up to a limit, and
never stop.
"""

from __future__ import annotations

from random import Random

_MOST_TEXTS = 100
_PROMPT_LINES = 5


class Backoff:
    """Seconds before the next try: `first`, then `growth` times more each time, at most `cap`; less up to a quarter."""

    def __init__(self, first: float, cap: float, rng: Random, *, growth: float = 2.0) -> None:
        self._first = first
        self._cap = cap
        self._rng = rng
        self._growth = growth
        self._next = first

    def next(self) -> float:
        delay, self._next = self._next, min(self._cap, self._next * self._growth)
        return delay * self._rng.uniform(0.75, 1.0)

    def reset(self) -> None:
        self._next = self._first


class LogGate:
    """Lets the first lines of a trouble through, a second apart, then fewer: `cap` seconds apart in the end.

    A text that was not said in this trouble is said at once, but never more than a line a second comes through. What
    comes and goes is one trouble: only a calm of twice `cap` ends it.
    """

    def __init__(self, cap: float = 30.0) -> None:
        self._cap = cap
        self._texts: set[str] = set()
        self._last = float("-inf")
        self._interval = 1.0
        self._lines = 0
        self._spoke = False

    def passes(self, text: str, now: float) -> bool:
        if now - self._last > 2 * self._cap or len(self._texts) > _MOST_TEXTS:
            self._texts.clear()
            self._interval = 1.0
            self._lines = 0
        # a try that comes a little early for its line still gets it: waits are shortened by jitter
        if now - self._last < 0.7 * (self._interval if text in self._texts else 1.0):
            return False
        self._texts.add(text)
        self._last, self._spoke = now, True
        self._lines += 1
        if self._lines >= _PROMPT_LINES:
            self._interval = min(self._cap, self._interval * 1.5)
        return True

    def calm(self) -> bool:
        """The trouble is over; says whether a line about it had passed since the last calm."""
        spoke, self._spoke = self._spoke, False
        return spoke


class LogBudget:
    """A bounded number of lines about things that others cause: `lines` at once, then one each `seconds`."""

    def __init__(self, lines: int, seconds: float) -> None:
        self._lines = lines
        self._seconds = seconds
        self._left = float(lines)
        self._last = float("-inf")

    def passes(self, now: float) -> bool:
        self._left = min(self._lines, self._left + (now - self._last) / self._seconds)
        self._last = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
