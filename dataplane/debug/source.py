"""Owns what a capture needs of the place where its packets come from: taps in the path, or packet sockets.

Free of both. Invariant: a source gives enhanced packet blocks, the inner packet on interface 0 and what carried it on
interface 1, both with the same packet id where both were seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Face:
    """An interface of the file: its link type, and how its packets came by their bytes."""

    linktype: int
    description: str


@dataclass(frozen=True, slots=True)
class Account:
    """Of one interface. `received`: packets that the filter let through; `dropped`: what found no room."""

    received: int
    dropped: int
    delivered: int
    comment: str


def ending(delivered: int, *, ordered: bool) -> str:
    """The comment of an account from which nothing was dropped. `ordered`: more came than the client had asked for."""
    return f"ended after {delivered} packets, as asked" if ordered else "nothing is missing"


class Source(Protocol):
    """Begun once, drained by one thread all the while and after the end, then closed."""

    @property
    def faces(self) -> tuple[Face, Face]:
        """Overlay and underlay; known before the beginning."""

    async def begin(self) -> None:
        """Look at packets from now on. Raises CaptureError."""

    async def end(self) -> None:
        """Look at none any more. What was seen can still be drained."""

    def drain(self, before: int, most: int) -> bytes | memoryview:
        """The blocks of at most `most` packets seen before `before` (ns), by time; empty where none waits."""

    def counts(self) -> tuple[int, int, int]:
        """Packets that the filter let through, those for which there was no room, those that were drained."""

    def accounts(self) -> tuple[Account, Account]:
        """Overlay and underlay, once all is drained."""

    def close(self) -> None:
        """Give back what it holds."""
