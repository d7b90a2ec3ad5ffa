"""Owns a capture on the daemon's side: a source begun, drained by a thread of its own, sent to one client as pcapng.

The source is a tap in the path, or, where the kernel carries the packets or the client wants the wire's own headers,
packet sockets. Free of: how the client asked and what it does with it. Invariant: no packet waits for a client; what
one is too slow for is counted in the file's own statistics, and the source is ended whatever ends a capture.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import select
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from dataplane import __version__
from dataplane.backend.base import Tappable
from dataplane.debug import expression, pcapng
from dataplane.debug.peers import Peers
from dataplane.debug.source import Account, Face, Source, ending
from dataplane.errors import CaptureError, DropReason
from dataplane.path.datapath import Tap

MOST_CAPTURES = 4
"""Mirrors TAPS of ext/dataplane/_tap.pxd."""

WHOLE_PACKET = 65535
RING_MIB = (1, 1024)
LAG_NS = 20_000_000
"""A record is written once it is as old: a pump stamps a batch before it writes its records."""

LOOK_SECONDS = 0.02
STALLED_SECONDS = 30.0
"""A client that takes nothing for as long is given up: its capture holds memory."""

REBUILT, WIRE = OUTER = ("rebuilt", "wire")
"""What outer headers are: made again from what a UDP socket shows, or as a packet socket sees them on the underlay."""

AS_THE_SOCKET_SHOWS_THEM = (
    "outer datagrams as the UDP socket shows them: addresses, ports and lengths are real, and TOS and TTL of received "
    "ones; identification and checksum are rebuilt"
)


@dataclass(frozen=True, slots=True)
class Order:
    """What a client asks for. `count`: packets after which the capture ends, 0 for none; `seconds` likewise.
    `outer`: where outer headers come from, one of OUTER; empty for the first that there is."""

    filter: str = ""
    snaplen: int = WHOLE_PACKET
    count: int = 0
    seconds: float = 0.0
    ring_mib: int = 16
    outer: str = ""

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Order:
        """Read a request. Raises CaptureError for what cannot be."""
        known = {name: arguments[name] for name in cls.__dataclass_fields__ if name in arguments}
        if unknown := set(arguments) - set(known):
            raise CaptureError(f"unknown argument {min(unknown)!r}; is `loden` newer than the daemon?")
        try:
            order = cls(**{name: type(getattr(cls(), name))(value) for name, value in known.items()})
        except (TypeError, ValueError) as error:
            raise CaptureError(f"a capture cannot be asked for so: {error}") from None
        if not 1 <= order.snaplen <= WHOLE_PACKET:
            raise CaptureError(f"-s {order.snaplen}: a packet is kept from 1 to {WHOLE_PACKET} bytes of")
        if order.count < 0 or not 0 <= order.seconds < 1e9:
            raise CaptureError("-c and --for count up from 0")
        if not RING_MIB[0] <= order.ring_mib <= RING_MIB[1]:
            raise CaptureError(f"--buffer {order.ring_mib}: a ring has {RING_MIB[0]} to {RING_MIB[1]} MiB")
        if order.outer not in ("", *OUTER):
            raise CaptureError(f"--outer {order.outer}: outer headers are {' or '.join(OUTER)}")
        return order


@dataclass(frozen=True, slots=True)
class Place:
    """Where a capture is made, in words for the file."""

    node: str
    lease: str
    backend: str
    device: str


Listen = Callable[[bytes, int, int, Mapping[IPv4Address | IPv6Address, str]], Source]
"""Makes a source of packet sockets out of a filter's program, bytes kept of each packet, bytes of a ring, and names."""


class Captures:
    """All captures of one daemon."""

    def __init__(
        self, backend: Tappable | None, listen: Listen, place: Callable[[], Place], peers: Callable[[], Peers]
    ) -> None:
        """`backend`: None where the kernel carries the packets. `place` and `peers` are asked when a capture begins."""
        self._backend = backend
        self._listen = listen
        self._place = place
        self._peers = peers
        self._sources: dict[Source, bool] = {}
        """Each with whether it has begun."""
        self._taps: list[Tap] = []

    @property
    def running(self) -> list[dict[str, int]]:
        """What each capture has seen so far."""
        begun = [source for source, has_begun in self._sources.items() if has_begun]
        return [dict(zip(("matched", "missing", "delivered"), each.counts(), strict=True)) for each in begun]

    async def run(self, order: Order, client: socket.socket, begin: Callable[[], None], stop: asyncio.Event) -> None:
        """Capture until `stop`, or what the order says, and send all of it to `client`. `begin` is called once nothing
        can go wrong with the order any more. Raises CaptureError, and KernelError where the rings find no memory."""
        if len(self._sources) == MOST_CAPTURES:
            raise CaptureError(f"{MOST_CAPTURES} captures are running already; end one of them")
        peers = self._peers()
        source = self._source(order, peers)
        self._sources[source] = False
        try:
            head = header(self._place(), order, peers.names, source.faces)
            await self._send(source, order, client, head, begin, stop)
        finally:
            del self._sources[source]
            source.close()

    async def _send(
        self,
        source: Source,
        order: Order,
        client: socket.socket,
        head: bytes,
        begin: Callable[[], None],
        stop: asyncio.Event,
    ) -> None:
        drain = None
        try:
            await source.begin()
            self._sources[source] = True
            begin()
            drain = _Drain(source, order, client, head)
            await drain.until(stop)
        finally:
            await source.end()
            if drain is not None:
                await drain.finish()

    def _source(self, order: Order, peers: Peers) -> Source:
        """Where the packets of an order come from. Raises CaptureError, and ConfigError of the filter."""
        node, names = expression.parse(order.filter, peers.find), peers.names
        program = expression.compile_filter(node)
        ring = 1 << (order.ring_mib << 20).bit_length() - 1
        if self._backend is not None and order.outer != WIRE:
            return _Tapped(program, order, ring, names, self._arm)
        if self._backend is None and order.outer == REBUILT:
            raise CaptureError(
                "--outer=rebuilt: the kernel carries this node's packets, which are seen on the wire only"
            )
        if expression.asks(node, expression.Kind.DROP):
            raise CaptureError(
                "packets that are dropped are seen only where the daemon carries them itself, and without --outer=wire"
            )
        return self._listen(program, order.snaplen, ring, names)

    async def _arm(self, tap: Tap, armed: bool) -> None:
        if self._backend is not None:
            others = [other for other in self._taps if other is not tap]
            self._taps = [*others, tap] if armed else others
            await self._backend.arm(tuple(self._taps))


class _Tapped:
    """A source: a tap in the path; see dataplane.debug.source.Source."""

    def __init__(
        self,
        program: bytes,
        order: Order,
        ring: int,
        names: Mapping[IPv4Address | IPv6Address, str],
        arm: Callable[[Tap, bool], Awaitable[None]],
    ) -> None:
        """Raises CaptureError."""
        self._arm = arm
        try:
            self._tap = Tap(
                program,
                order.snaplen,
                ring,
                tuple(reason.name.encode() for reason in DropReason),
                [(address.packed, name) for address, name in names.items()],
            )
        except MemoryError:
            raise CaptureError("no memory for a capture") from None
        self.drain = self._tap.drain

    @property
    def faces(self) -> tuple[Face, Face]:
        raw = pcapng.LINKTYPE_RAW
        return Face(raw, "as the path carries them"), Face(raw, AS_THE_SOCKET_SHOWS_THEM)

    async def begin(self) -> None:
        await self._arm(self._tap, True)

    async def end(self) -> None:
        await self._arm(self._tap, False)

    def counts(self) -> tuple[int, int, int]:
        return self._tap.statistics

    def accounts(self) -> tuple[Account, Account]:
        matched, lost, delivered = self._tap.statistics
        if lost:
            comment = f"{lost} of {matched} packets found no room in the ring: a larger --buffer or a smaller -s helps"
        else:
            comment = ending(delivered, ordered=matched > delivered)
        account = Account(matched, lost, delivered, comment)
        return account, account

    def close(self) -> None:
        """The rings go with the tap, once no pump uses it."""


class _Drain:
    """The thread that makes blocks of records and sends them."""

    def __init__(self, source: Source, order: Order, client: socket.socket, head: bytes) -> None:
        self._source = source
        self._order = order
        self._client = client
        self._start = time.time_ns()
        self._head = head
        self._ended = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._work, name="loden-capture", daemon=True)

    async def until(self, stop: asyncio.Event) -> None:
        """Send, and wait for the client's wish to end, for the end that was ordered, or for the client to be gone."""
        self._thread.start()
        waits = [asyncio.create_task(stop.wait()), asyncio.create_task(self._over.wait())]
        try:
            await asyncio.wait(waits, timeout=self._order.seconds or None, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def finish(self) -> None:
        """After the source has ended: let the thread send what is left, and the statistics."""
        self._ended.set()
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        # a client that is gone has nothing to be told
        with contextlib.suppress(OSError):
            self._send(self._head)
            while self._pass_on():
                pass
            self._send(self._foot())
        with contextlib.suppress(RuntimeError):  # the loop is closed: the daemon is gone before its client
            self._loop.call_soon_threadsafe(self._over.set)

    def _pass_on(self) -> bool:
        """One look at the source; False where nothing more is to come."""
        ended = self._ended.is_set()
        most = self._order.count - self._source.counts()[2] if self._order.count else 1 << 62
        if most == 0:
            return False
        blocks = self._source.drain(time.time_ns() + (1 << 40 if ended else -LAG_NS), most)
        if blocks:
            self._send(blocks)
        elif ended:
            return False
        else:
            self._wait()
        return True

    def _wait(self) -> None:
        self._ended.wait(LOOK_SECONDS)

    def _send(self, data: bytes | memoryview) -> None:
        """The descriptor does not block, for the event loop shares it."""
        rest = memoryview(data)
        poller = select.poll()
        poller.register(self._client, select.POLLOUT)
        while rest:
            if not poller.poll(STALLED_SECONDS * 1000):
                raise TimeoutError
            with contextlib.suppress(BlockingIOError):
                rest = rest[self._client.send(rest) :]

    def _foot(self) -> bytes:
        return b"".join(
            pcapng.statistics(
                interface,
                time.time_ns(),
                start=self._start,
                received=account.received,
                dropped=account.dropped,
                delivered=account.delivered,
                comment=account.comment,
            )
            for interface, account in enumerate(self._source.accounts())
        )


def header(
    place: Place, order: Order, names: Mapping[IPv4Address | IPv6Address, str], faces: tuple[Face, Face]
) -> bytes:
    """The blocks before the first packet."""
    overlay, underlay = faces
    about = f"node {place.node}, lease {place.lease}, backend {place.backend}, device {place.device}"
    return b"".join(
        (
            pcapng.section(f"Loden {__version__}", os=f"{platform.system()} {platform.release()}", comment=about),
            pcapng.interface(
                overlay.linktype,
                order.snaplen,
                name="overlay",
                description=f"inner packets of {place.device} at {place.node}, {overlay.description}",
                filter_text=order.filter,
            ),
            pcapng.interface(
                underlay.linktype,
                order.snaplen,
                name="underlay",
                description=f"{place.backend}, {underlay.description}",
                filter_text=order.filter,
            ),
            pcapng.names(names),
        )
    )
