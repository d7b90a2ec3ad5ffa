"""Owns what a capture file says as a whole: inner packets beside their outer datagrams, and a summary of every flow.

The Python API of captures: `open_captures`, `pairs`, `flows`. Reads what Loden wrote, and what others wrote of the
underlay (udp mode and VXLAN are unwrapped). Free of the daemon. Invariant: every packet of a file is in exactly one
pair, and files are read as they come, never held.
"""

from __future__ import annotations

import contextlib
import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dataplane.debug import dissect, pcapng
from dataplane.debug.dissect import FlowKey, Seen
from dataplane.debug.pcapng import INBOUND, Packet, Statistics
from dataplane.errors import CaptureError
from dataplane.path.wire import UDP_PORT

REMEMBERED = 1 << 16
"""Packets of the other node that are kept in mind to find the same one here: a few seconds at full speed."""


@dataclass(frozen=True, slots=True)
class Pair:
    """An inner packet and the datagram that carried it. `inner` None: the datagram held none. `outer` None: none was
    made (dropped before), or the file does not have it. `file`: which file, counted from 0."""

    file: int
    inner: Packet | None
    outer: Packet | None

    @property
    def first(self) -> Packet:
        """Whichever there is, the inner one rather."""
        packet = self.inner or self.outer
        if packet is None:
            raise ValueError("a pair has at least one packet")
        return packet

    @property
    def drop(self) -> str:
        """The DropReason's name; empty where the packet was carried."""
        return dissect.words(self.first.comment).get("drop", "")

    @property
    def seen(self) -> Seen | None:
        """What the inner packet is; of a datagram from a file of the underlay alone, what it carries."""
        if self.inner is not None:
            return dissect.look(dissect.ip_of(self.inner))
        if self.outer is None:
            return None
        data = dissect.ip_of(self.outer)
        outer = dissect.look(data)
        if outer is None:
            return None
        inner = None
        if outer.protocol == dissect.UDP and outer.ports is not None:
            inner = dissect.look(dissect.inner_of(dissect.payload_of(data), outer.ports[1])[0])
        # without encapsulation the frame's packet is the inner one
        return outer if inner is None and self.outer.comment.endswith(" inner=unseen") else inner


@dataclass(slots=True)
class Flow:
    """One direction of one inner flow. `delays`: ms between the file of the sender and that of the receiver."""

    key: FlowKey
    packets: int = 0
    bytes: int = 0
    first_ns: int = 0
    last_ns: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    retransmitted: int = 0
    gaps: int = 0
    """TCP: times that a segment came which did not follow on what was seen: lost before here, or not captured."""
    sent: int = 0
    """With two files: packets seen where they are sent, ..."""
    arrived: int = 0
    """... and where they arrive."""
    delays: list[float] = field(default_factory=list)
    _next: int | None = None

    def take(self, seen: Seen, ns: int) -> None:
        """Count a packet that was carried."""
        self.first_ns = self.first_ns or ns
        self.last_ns = max(self.last_ns, ns)
        self.packets += 1
        self.bytes += seen.length
        if seen.protocol == dissect.TCP:
            self._follow(seen)

    def _follow(self, seen: Seen) -> None:
        """Sequence numbers (RFC 9293 section 3.4): 32 bits that go round."""
        length = seen.payload + bool(seen.flags & dissect.SYN) + bool(seen.flags & dissect.FIN)
        end = (seen.sequence + length) % 2**32
        if self._next is None or seen.flags & dissect.SYN:
            self._next = end
        elif length:
            ahead = (seen.sequence - self._next) % 2**32
            if ahead == 0:
                self._next = end
            elif ahead < 2**31:
                self.gaps += 1
                self._next = end
            elif seen.payload > 1 or seen.flags & (dissect.SYN | dissect.FIN):  # one byte before: a keep-alive
                self.retransmitted += 1
                if (end - self._next) % 2**32 < 2**31:
                    self._next = end


@dataclass(slots=True)
class Summary:
    """All flows in the order of their first packet, and what the files say of themselves."""

    flows: dict[FlowKey, Flow] = field(default_factory=dict)
    not_ip: int = 0
    missing: int = 0
    merged: bool = False


@contextlib.contextmanager
def open_captures(paths: Iterable[Path]) -> Iterator[Iterator[Pair | Statistics]]:
    """The pairs of one file, or of several merged by time. Raises CaptureError where a file cannot be opened."""
    with contextlib.ExitStack() as stack:
        sources = []
        for number, path in enumerate(paths):
            try:
                file = stack.enter_context(path.open("rb"))
            except OSError as error:
                raise CaptureError(f"cannot read {path}: {error.strerror}") from None
            sources.append(pairs(pcapng.Reader(file, str(path)), number))
        yield heapq.merge(*sources, key=_time) if len(sources) > 1 else iter(sources[0])


def pairs(blocks: Iterable[pcapng.Block], file: int = 0) -> Iterator[Pair | Statistics]:
    """Packets with the same packet id that follow each other are one pair. Of a file without ids, an outer datagram and
    an inner packet that is its payload."""
    waiting: Packet | None = None
    for block in blocks:
        if isinstance(block, Packet):
            if waiting is None:
                waiting = block
            elif _belong(waiting, block):
                inner, outer = (waiting, block) if _is_inner(waiting) else (block, waiting)
                yield Pair(file, inner, outer)
                waiting = None
            else:
                yield _alone(file, waiting)
                waiting = block
        elif isinstance(block, Statistics):
            if waiting is not None:
                yield _alone(file, waiting)
                waiting = None
            yield block
    if waiting is not None:
        yield _alone(file, waiting)


def _belong(one: Packet, two: Packet) -> bool:
    return one.number is not None and one.number == two.number and one.interface.number != two.interface.number


def _is_inner(packet: Packet) -> bool:
    """Of a file that is not ours, whatever is no datagram to a port of an overlay is taken for an inner packet."""
    if packet.interface.name in ("overlay", "underlay"):
        return packet.interface.name == "overlay"
    seen = dissect.look(dissect.ip_of(packet))
    return seen is None or seen.protocol != dissect.UDP or seen.ports is None or seen.ports[1] not in OVERLAY_PORTS


OVERLAY_PORTS = (UDP_PORT, 8472, 4789)


def _alone(file: int, packet: Packet) -> Pair:
    return Pair(file, packet, None) if _is_inner(packet) else Pair(file, None, packet)


def _time(item: Pair | Statistics) -> int:
    """Statistics stand at the end of their file."""
    return item.first.ns if isinstance(item, Pair) else 1 << 64


def flows(items: Iterable[Pair | Statistics], *, merged: bool = False) -> Summary:
    """Count every flow. `merged`: the files are those of the two ends, and a packet is looked for in both; it is
    counted where it was seen first."""
    summary = Summary(merged=merged)
    remembered: OrderedDict[tuple[FlowKey, bytes], Pair] = OrderedDict()
    for item in items:
        if isinstance(item, Statistics):
            summary.missing += item.dropped or 0 if item.interface.number == 0 else 0
            continue
        seen = item.seen
        if seen is None:
            summary.not_ip += 1
            continue
        flow = summary.flows.setdefault(seen.flow, Flow(seen.flow))
        if item.drop:
            flow.drops[item.drop] = flow.drops.get(item.drop, 0) + 1
        elif not merged or not _met(flow, seen, item, remembered):
            flow.take(seen, item.first.ns)
    return summary


def _met(flow: Flow, seen: Seen, item: Pair, remembered: OrderedDict[tuple[FlowKey, bytes], Pair]) -> bool:
    """Whether the same packet was seen at the other end already; remembers it otherwise."""
    inbound = item.first.direction == INBOUND
    flow.arrived += inbound
    flow.sent += not inbound
    name = (seen.flow, seen.identity)
    other = remembered.get(name)
    if other is not None and other.file != item.file:
        del remembered[name]
        delay = item.first.ns - other.first.ns
        flow.delays.append((delay if inbound else -delay) / 1e6)
        return True
    remembered[name] = item
    if len(remembered) > REMEMBERED:
        remembered.popitem(last=False)
    return False
