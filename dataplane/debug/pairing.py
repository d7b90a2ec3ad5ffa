"""Owns how a packet that was seen twice is known again: inner on a device, and within its frame on the underlay.

Free of: IO, clocks, and of where packets are seen; time is an argument, in ns. Invariant: every packet that is put in
comes out once, beside its other side where that was seen within the time of patience, else alone; the first of two
alike packets belongs to the first on the other side.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from dataplane.debug.dissect import ICMP, ICMPV6, SCTP, TCP, UDP

OVERLAY, UNDERLAY = 0, 1
PATIENCE_NS = 250_000_000
"""How long the other side of a packet is waited for: a queue before the underlay's device may hold it back."""

MOST_WAITING = 1 << 14
"""Packets that are held at most; beyond, the oldest goes as it is."""

FIRST_BYTES = 24

_DO_NOT_FRAGMENT = 0x40


@dataclass(frozen=True, slots=True)
class Sighting:
    """A packet as one side shows it. `data`: what to record, an IP packet or a frame. `vni`: None outside of VXLAN.
    `identity`: of the inner packet, empty where there is none. `superframe`: number and bytes of what it was cut from,
    (0, 0) if it was whole. `remote`: the other node's outer address, packed; empty where it is not known. `lease`: its
    subnet that the inner packet belongs to, as text."""

    ns: int
    data: bytes
    sent: bool
    vni: int | None
    identity: bytes
    superframe: tuple[int, int] = (0, 0)
    remote: bytes = b""
    lease: str = ""


@dataclass(slots=True)
class Pair:
    """Both sides of a packet, or the one that was seen."""

    sides: list[Sighting | None]

    @property
    def first(self) -> Sighting:
        """What the node saw first: inner of what it sends, outer of what it receives."""
        overlay, underlay = self.sides
        seen = overlay or underlay
        if seen is None:
            raise ValueError("a pair has at least one side")
        return underlay if underlay is not None and not seen.sent else seen


@dataclass(order=True, slots=True)
class _Waiting:
    ns: int
    order: int
    pair: Pair = field(compare=False)
    key: tuple[bool, int | None, bytes] = field(compare=False)
    side: int = field(compare=False)
    whole: bool = field(compare=False, default=False)


class Pairing:
    """Sightings of both sides in, pairs out in the order of time."""

    def __init__(self) -> None:
        self._queue: list[_Waiting] = []
        self._open: tuple[dict[object, deque[_Waiting]], ...] = ({}, {})
        self._count = 0

    def __len__(self) -> int:
        return len(self._queue)

    def take(self, side: int, sighting: Sighting) -> bool:
        """Put a sighting in; True where it is the first of its packet. One without an inner packet waits for nobody."""
        key = (sighting.sent, sighting.vni, sighting.identity)
        others = self._open[1 - side].get(key)
        if others and sighting.identity:
            entry = others.popleft()
            if not others:
                del self._open[1 - side][key]
            entry.pair.sides[side] = sighting
            entry.whole = True
            return False
        pair = Pair([sighting, None] if side == OVERLAY else [None, sighting])
        self._count += 1
        entry = _Waiting(sighting.ns, self._count, pair, key, side, whole=not sighting.identity)
        heapq.heappush(self._queue, entry)
        if sighting.identity:
            self._open[side].setdefault(key, deque()).append(entry)
        return True

    def ready(self, before: int) -> Pair | None:
        """The oldest packet that was seen before `before`, if it is whole or has waited for long enough."""
        if not self._queue:
            return None
        oldest = self._queue[0]
        crowded = len(self._queue) > MOST_WAITING
        if not crowded and oldest.ns >= before - (0 if oldest.whole else PATIENCE_NS):
            return None
        heapq.heappop(self._queue)
        if not oldest.whole:
            self._give_up(oldest)
        return oldest.pair

    def _give_up(self, entry: _Waiting) -> None:
        waiting = self._open[entry.side][entry.key]
        waiting.remove(entry)
        if not waiting:
            del self._open[entry.side][entry.key]


def identity(packet: bytes) -> bytes:
    """What stays the same of a packet from its device to the wire, and tells it from others: addresses, lengths, ports
    and the first bytes behind. Not so: TTL, ECN, checksums, and the identification of TCP packets, which merging makes
    anew (with DF it means nothing, RFC 6864 section 4.1)."""
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        at, protocol = (packet[0] & 15) * 4, packet[9]
        anew = protocol == TCP and packet[6] & _DO_NOT_FRAGMENT
        head = packet[2:4] + (packet[6:8] if anew else packet[4:8]) + packet[9:10] + packet[12:20]
    elif len(packet) >= 40 and packet[0] >> 4 == 6:
        at, protocol = 40, packet[6]
        head = packet[4:7] + packet[8:40]
    else:
        return packet[:FIRST_BYTES]
    body = packet[at : at + FIRST_BYTES]
    if protocol == TCP:
        return head + body[:12]
    if protocol == UDP:
        return head + body[:6] + body[8:]
    if protocol in (ICMP, ICMPV6):
        return head + body[:2] + body[4:]
    return head + body[:8] + body[12:] if protocol == SCTP else head + body
