"""Owns a replay: the packets of a capture through the path as it is today, and what then differs from what was
recorded.

Of a capture of ours, TX packets are encapsulated and RX datagrams decapsulated, in superframes and messages as they
were. Of a file of the underlay alone each datagram is decapsulated by its receiver and encapsulated again by its
sender. Routes, MACs and the VNI are what the file tells; a change of them is believed once two packets in a row tell
it, so that a single altered packet differs. Free of sockets and devices. Invariant: the same file gives the same
answers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_network

from dataplane.debug import comparison, dissect
from dataplane.debug.comparison import Address, Difference, Network, Record
from dataplane.debug.pcapng import Statistics
from dataplane.debug.reading import OVERLAY_PORTS, Pair
from dataplane.debug.rehearsing import Actor, Facts, join_messages, join_segments
from dataplane.errors import CaptureError, DropReason, KernelError
from dataplane.path.facts import SourceCheck
from dataplane.path.rehearsal import MOST_MESSAGES, MOST_SEGMENTS
from dataplane.path.wire import UDP_PORT

MOST_NODES = 64
"""That a file of the underlay may name: each is a path of its own."""

_BATCH_BYTES = 1 << 20
_NOT_OF_THE_PATH = {reason.name for reason in (DropReason.PATH_MTU, DropReason.SUPERFRAME, DropReason.TUN_WRITE)}
"""Drops that the kernel or the state of the network decided, of packets without an outer datagram."""

_BEFORE_ITS_MAC = {reason.name for reason in (DropReason.NO_VNI, DropReason.FOREIGN_VNI, DropReason.RESERVED_BITS)}
_WRONG_MAC = {reason.name for reason in (DropReason.OWN_MAC, DropReason.OTHER_MAC, DropReason.PEER_MAC)}


@dataclass(slots=True)
class Tally:
    """What was done. `undecided`: packets whose verdict the path does not make by itself, by reason. `cut`: fed with
    zeros for what the capture left out; `unfit`: not fed, too little of them was kept or they are of no overlay."""

    tx: int = 0
    rx: int = 0
    differ: int = 0
    undecided: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    unfit: int = 0
    superframes: int = 0
    missing: int = 0


@dataclass(frozen=True, slots=True)
class Wire:
    """Where peers listen, and whether datagrams are frames of VXLAN; None for what the file and the port say."""

    port: int | None = None
    frames: bool | None = None


class Replay:
    """One replay of one file."""

    def __init__(self, again: Callable[[], Iterable[Pair | Statistics]], check: SourceCheck, wire: Wire) -> None:
        """`again` opens the file anew."""
        self.tally = Tally()
        self._again = again
        self._check = check
        self._wire = wire
        self._actors: dict[tuple[Address | int, bool], Actor] = {}
        self._segments: list[Record] = []
        self._datagrams: list[Record] = []
        self._receiver: Actor | None = None
        self._round_trip = False

    def close(self) -> None:
        """Give the paths' memory back."""
        for actor in self._actors.values():
            actor.close()

    def run(self, items: Iterable[Pair | Statistics]) -> Iterator[Difference]:
        """Feed every packet; what differs, in the order of the file. Raises CaptureError where nothing can be fed, or
        the file is broken: what came before has been given by then."""
        any_packet, broken = False, None
        try:
            for number, item in enumerate(items, 1):
                if isinstance(item, Statistics):
                    self.tally.missing += (item.dropped or 0) if item.interface.number == 0 else 0
                    continue
                any_packet = True
                self._round_trip = item.first.interface.name not in ("overlay", "underlay")
                inner, outer = (None, item.first) if self._round_trip else (item.inner, item.outer)
                record = Record.of(number, inner, outer)
                if record is not None:
                    yield from self._take(record)
        except CaptureError as error:
            broken = error
        yield from self._flush()
        if broken is not None:
            raise broken
        if not any_packet:
            raise CaptureError("there is no packet in it")

    # --- what is fed ------------------------------------------------------------------------------------------

    def _take(self, record: Record) -> Iterator[Difference]:
        if not self._fit(record):
            self.tally.unfit += 1
        elif record.drop in _NOT_OF_THE_PATH and record.outer is None:
            self.tally.undecided[record.drop] += 1
        elif record.received or self._round_trip:
            yield from self._take_received(record)
        else:
            yield from self._take_sent(record)

    def _fit(self, record: Record) -> bool:
        """Whether enough of it is there, and it is of an overlay: packets of host-gw have no datagram."""
        if record.outer is None:
            told = record.drop and (not record.received or record.drop in _NOT_OF_THE_PATH)
            return bool(told) and not self._round_trip and _head_kept(record.packet, record.length)
        head = comparison.head_of(self._frames(record))
        if self._round_trip:
            if record.outer.ports[1] not in (OVERLAY_PORTS if self._wire.port is None else (self._wire.port,)):
                return False
        elif record.inner is not None and record.outer.length < head + record.length:
            return False
        if not (record.received or self._round_trip):
            return _head_kept(record.packet, record.length)
        payload = record.whole_payload(head)
        kept = max(len(record.outer.payload), head + len(record.packet))
        return kept >= len(payload) or _head_kept(payload[head:kept], len(payload) - head)

    def _frames(self, record: Record) -> bool:
        if self._wire.frames is not None:
            return self._wire.frames
        if not self._round_trip:
            return "vni" in record.words or record.drop == DropReason.NO_VNI.name
        return record.outer is not None and record.outer.ports[1] not in (UDP_PORT, self._wire.port)

    def _take_sent(self, record: Record) -> Iterator[Difference]:
        yield from self._flush_datagrams()
        pending = self._segments
        if pending and (record.superframe is None or record.superframe != pending[0].superframe):
            yield from self._flush()
        actor = self._actor(record, sent=True)
        yield from self._learn(actor, record)
        if record.superframe is not None and record.outer is not None and len(self._segments) < MOST_SEGMENTS:
            self._segments.append(record)
        else:
            yield from self._flush()
            yield from self._send(actor, [record])

    def _take_received(self, record: Record) -> Iterator[Difference]:
        yield from self._flush_segments()
        actor = self._actor(record, sent=False)
        if actor is not self._receiver or len(self._datagrams) == MOST_MESSAGES or self._filled() > _BATCH_BYTES:
            yield from self._flush()
        yield from self._learn(actor, record)
        self._receiver = actor
        self._datagrams.append(record)

    def _filled(self) -> int:
        return sum(record.outer.length for record in self._datagrams if record.outer is not None)

    def _flush(self) -> Iterator[Difference]:
        yield from self._flush_segments()
        yield from self._flush_datagrams()

    def _flush_segments(self) -> Iterator[Difference]:
        records, self._segments = self._segments, []
        if records:
            yield from self._send(self._actor(records[0], sent=True), records)

    def _flush_datagrams(self) -> Iterator[Difference]:
        records, self._datagrams = self._datagrams, []
        if not records or self._receiver is None:
            return
        actor = self._receiver
        messages = join_messages(records, actor.head)
        made, written = actor.receive(messages)
        if len(made) != len(records):  # a message was taken for something else than the datagrams that it was
            yield from self._receive_singly(actor, records)
            return
        self.tally.rx += len(records)
        self.tally.superframes += sum(message.size < len(message.data) for message in messages)
        both = list(zip(records, made, strict=True))
        found = {id(one): comparison.compare(one, two, frames=actor.frames) for one, two in both}
        for record, difference in actor.delivered([pair for pair in both if not pair[1].drop], written):
            found[id(record)] = found[id(record)] or difference
        for record in records:
            again = found[id(record)]
            if again is None and self._round_trip:
                again = self._encapsulated_again(record)
            yield from self._told(record, again)

    def _receive_singly(self, actor: Actor, records: list[Record]) -> Iterator[Difference]:
        self.tally.rx += len(records)
        for record in records:
            made, _ = actor.receive(join_messages([record], actor.head))
            nothing = Difference(record, "verdict", record.verdict, "nothing")
            yield from self._told(record, comparison.compare(record, made[0], frames=actor.frames) if made else nothing)

    def _send(self, actor: Actor, records: list[Record]) -> Iterator[Difference]:
        made: list[Record] = []
        whole = join_segments(records)
        if whole is not None:
            made = actor.transmit(*whole)
            self.tally.superframes += 1
        if len(made) != len(records):
            made = [two for one in records for two in actor.transmit_plain(one.whole_packet())]
        self.tally.tx += len(records)
        for one, two in zip(records, made, strict=True):
            if one.drop == DropReason.SEND_FAILED.name:
                self.tally.undecided[one.drop] += 1
            yield from self._told(one, comparison.compare(one, two, frames=actor.frames))

    def _encapsulated_again(self, record: Record) -> Difference | None:
        """What differs where the sender of a foreign datagram sends its packet once more."""
        actor = self._actor(record, sent=True)
        head = comparison.head_of(actor.frames)
        packet = record.whole_payload(head)[head:]
        seen = dissect.look(packet)
        if seen is None or record.outer is None:
            return None
        packet = packet[: seen.length]
        with suppress(KernelError):
            mac = record.outer.payload[8:14] if actor.frames else b""
            actor.set_route(ip_network(seen.destination), record.outer.destination, mac)
        made = actor.transmit_plain(packet)[0]
        if made.outer is None:
            return Difference(record, "verdict", "carried", made.verdict)
        return comparison.compare_outer(record, made, frames=actor.frames)

    def _told(self, record: Record, difference: Difference | None) -> Iterator[Difference]:
        self.tally.cut += record.cut
        if difference is not None:
            self.tally.differ += 1
            yield difference

    # --- what the file tells of the node ----------------------------------------------------------------------

    def _actor(self, record: Record, *, sent: bool) -> Actor:
        """The path that has carried it: of a capture of ours one for each IP version outside, of others one for each
        node. Raises CaptureError where these are too many."""
        frames = self._frames(record)
        key: tuple[Address | int, bool]
        if self._round_trip and record.outer is not None:
            key = (record.outer.source if sent else record.outer.destination), frames
        else:
            key = self._version(record), frames
        if key not in self._actors:
            if len(self._actors) == MOST_NODES:
                raise CaptureError(f"it has datagrams of more than {MOST_NODES} nodes: cut it to fewer")
            facts = _facts(record, sent, frames) if self._round_trip else self._survey(record, frames)
            self._actors[key] = Actor(facts, self._check)
        return self._actors[key]

    def _version(self, record: Record) -> int:
        if record.outer is not None:
            return record.outer.source.version
        return 6 if record.packet[:1] != b"" and record.packet[0] >> 4 == 6 and self._frames(record) else 4

    def _survey(self, record: Record, frames: bool) -> Facts:
        """What the first packet that tells it tells of this node."""
        version, best = self._version(record), _nothing_known(record, frames)
        with suppress(CaptureError):  # it is told when the packets themselves are read
            for item in self._again():
                one = Record.of(0, item.inner, item.outer) if isinstance(item, Pair) else None
                if one is None or one.outer is None or self._version(one) != version or self._frames(one) != frames:
                    continue
                if not frames or (one.drop not in _BEFORE_ITS_MAC | _WRONG_MAC and len(one.outer.payload) >= 22):
                    return _facts(one, not one.received, frames)
        return best

    def _learn(self, actor: Actor, record: Record) -> Iterator[Difference]:
        """Take over what the packet tells of its lease; what waits belongs to the former routes."""
        for change in list(_told_routes(actor, record, sent=not (self._round_trip or record.received))):
            if actor.believes(*change):
                yield from self._flush()
                with suppress(KernelError):  # a subnet that no path can have: the packet will differ
                    actor.adopt(*change)


def _told_routes(actor: Actor, record: Record, *, sent: bool) -> Iterator[tuple[Network, Address | None, bytes]]:
    """(subnet, address, MAC) that a packet tells; address None: nobody has it. An empty MAC: it is not told."""
    outer, seen = record.outer, dissect.look(record.packet)
    if record.drop == DropReason.NO_ROUTE.name and seen is not None:
        yield from ((subnet, None, b"") for subnet in actor.covering(seen.destination))
    elif record.drop == DropReason.UNKNOWN_PEER.name and outer is not None:
        yield from ((subnet, None, b"") for subnet in actor.held_by(outer.source))
    elif outer is not None:
        lease = record.lease
        if lease is None:
            inner = dissect.look(record.whole_payload(actor.head)[actor.head :])
            if inner is None:
                return
            lease = ip_network(inner.destination if sent else inner.source)
        mac = b""
        if actor.frames and record.drop not in _BEFORE_ITS_MAC | _WRONG_MAC:
            mac = outer.payload[8:14] if sent else outer.payload[14:20]
        peer = outer.destination if sent else outer.source
        yield lease, peer, mac


def _facts(record: Record, sent: bool, frames: bool) -> Facts:
    outer = record.outer
    if outer is None:
        raise ValueError("only a datagram tells of its node")
    local = outer.source if sent else outer.destination
    payload = outer.payload
    vxlan = None
    if frames:
        mac = payload[14:20] if sent else payload[8:14]
        vxlan = (int.from_bytes(payload[4:7]), mac.ljust(6, b"\0"))
    return Facts(local, outer.ports[1], vxlan)


def _nothing_known(record: Record, frames: bool) -> Facts:
    """Of a file in which nothing was carried: a node that has nobody's address."""
    local: Address = (
        IPv6Address("::") if record.outer is not None and record.outer.source.version == 6 else IPv4Address(0)
    )
    vni = record.words.get("vni", "")
    number = int(vni) & 0xFFFFFF if re.fullmatch(r"\d{1,8}", vni) else 1
    if record.drop == DropReason.FOREIGN_VNI.name:
        number ^= 1
    mac = (
        record.outer.payload[14:20] if record.outer is not None and record.drop == DropReason.OWN_MAC.name else bytes(6)
    )
    return Facts(local, UDP_PORT, (number, mac.ljust(6, b"\0")) if frames else None)


def _head_kept(data: bytes, length: int) -> bool:
    """Whether an IP header is whole, or the packet is."""
    if len(data) >= length:
        return True
    return len(data) >= (20 if data[:1] != b"" and data[0] >> 4 == 4 else 40)
