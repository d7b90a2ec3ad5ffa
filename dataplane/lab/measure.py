"""Owns what a lab reports about its network: round trips, checked traffic, and the tables that people read.

Free of: where pods are and how they are entered; the caller starts the processes.
Invariant: what was not measured shows as lost, never as good.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dataplane.errors import LodenError

_TRAFFIC = (sys.executable, "-P", "-m", "dataplane.lab.traffic")
_BEAT = (sys.executable, "-P", "-m", "dataplane.lab.beat")

_COUNTS = re.compile(r"(\d+) packets transmitted, (\d+) received")
_TIME = re.compile(r"time=([\d.]+) ms(?!.*DUP)")


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """Answered pings from one pod to another. `p50` in milliseconds, None where none came back."""

    source: str
    target: str
    sent: int
    received: int
    p50: float | None
    address: str = ""

    @property
    def loss(self) -> float:
        """Share of pings without an answer, 0 to 1."""
        return 1.0 - self.received / self.sent if self.sent else 1.0

    @property
    def whole(self) -> bool:
        """Whether every ping was answered, and there was one."""
        return 0 < self.sent == self.received

    @classmethod
    def parse(cls, source: str, target: str, text: str, address: str = "") -> RoundTrips:
        """Read what iputils' `ping` prints; anything else counts as nothing sent and nothing answered."""
        counts = _COUNTS.search(text)
        sent, received = (int(counts[1]), int(counts[2])) if counts else (0, 0)
        times = [float(time) for time in _TIME.findall(text)]
        return cls(source, target, sent, received, statistics.median(times) if times else None, address)


@contextmanager
def exchange(
    start: Callable[[str, Sequence[str]], subprocess.Popen[str]],
    listener: tuple[str, Sequence[str]],
    caller: tuple[str, Sequence[str]],
) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str]]]:
    """Two programs that talk, each as (member, command line): the caller is started once the listener has printed
    `ready`. Both end with the block. Raises LodenError where the listener does not start."""
    with start(*listener) as there:
        try:
            if there.stdout is None or there.stdout.readline() != "ready\n":
                raise LodenError(f"{listener[0]}: `{' '.join(listener[1])}` does not start")
            with start(*caller) as here:
                try:
                    yield there, here
                finally:
                    here.kill()
        finally:
            there.kill()


@contextmanager
def traffic(
    start: Callable[[str, Sequence[str]], subprocess.Popen[str]],
    kind: str,
    source: str,
    target: str,
    address: str,
    flags: Sequence[str],
) -> Iterator[subprocess.Popen[str]]:
    """Checked traffic (`tcp`, `udp`, `beat`) from pod to pod; what is yielded is the source, whose result is its
    `verdict`. A `beat` has begun then. Raises LodenError where it does not."""
    program = _BEAT if kind == "beat" else _TRAFFIC
    sink = target, [*program, f"{kind}-sink", address]
    with exchange(start, sink, (source, [*program, f"{kind}-source", address, *flags])) as (_, run):
        if kind == "beat" and (run.stdout is None or run.stdout.readline() != "ready\n"):
            raise LodenError(f"`{_words(run)}` does not start")
        yield run


def verdict(run: subprocess.Popen[str], timeout: float) -> dict[str, Any]:
    """Close the input of a program, wait for its end, and give the line of JSON that it prints last. Raises
    LodenError."""
    try:
        output, _ = run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise LodenError(f"`{_words(run)}` has not ended after {timeout:.0f} s") from None
    try:
        result: dict[str, Any] = json.loads(output)
    except ValueError:
        raise LodenError(f"`{_words(run)}` ended with {run.returncode} and without a result: {output!r}") from None
    return result


def _words(run: subprocess.Popen[str]) -> str:
    """The command line, without what every program here begins with."""
    words = [str(word) for word in run.args] if isinstance(run.args, (list, tuple)) else [str(run.args)]
    return " ".join(words[words.index("-m") + 1 :] if "-m" in words else words)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns; numbers to the right, words to the left."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(header), *cells]) for column in range(len(header))]
    right = [all(re.fullmatch(r"\d+(\.\d+)?%?|-", row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()

    return "\n".join([line(list(header)), *(line(row) for row in cells)])


def drops_text(drops: dict[str, int]) -> str:
    """`NO_ROUTE 3, LENGTH 1`, or 0 where nothing was dropped."""
    return ", ".join(f"{reason} {count}" for reason, count in drops.items() if count) or "0"
