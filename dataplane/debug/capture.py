"""Owns a capture on the daemon's side: a tap armed, drained by a thread of its own, sent to one client as pcapng.

Free of: how the client asked and what it does with it. Invariant: the pumps never wait for a client; what one is too
slow for is counted in the file's own statistics, and the taps are disarmed whatever ends a capture.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from dataplane import __version__
from dataplane.backend.base import Tappable
from dataplane.debug import expression, pcapng
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

OVERLAY, UNDERLAY = 0, 1
REBUILT = (
    "outer datagrams as the UDP socket shows them: addresses, ports and lengths are real, and TOS and TTL of received "
    "ones; identification and checksum are rebuilt"
)


@dataclass(frozen=True, slots=True)
class Order:
    """What a client asks for. `count`: packets after which the capture ends, 0 for none; `seconds` likewise."""

    filter: str = ""
    snaplen: int = WHOLE_PACKET
    count: int = 0
    seconds: float = 0.0
    ring_mib: int = 16

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
        return order


@dataclass(frozen=True, slots=True)
class Place:
    """Where a capture is made, in words for the file."""

    node: str
    lease: str
    backend: str
    device: str


class Captures:
    """All captures of one daemon."""

    def __init__(self, backend: Tappable, place: Callable[[], Place], peers: Callable[[], list[str]]) -> None:
        """`place` and `peers` (outer addresses) are asked when a capture begins."""
        self._backend = backend
        self._place = place
        self._peers = peers
        self._taps: list[Tap] = []

    @property
    def running(self) -> list[dict[str, int]]:
        """What each capture has seen so far."""
        return [dict(zip(("matched", "missing", "delivered"), tap.statistics, strict=True)) for tap in self._taps]

    async def run(self, order: Order, client: socket.socket, begin: Callable[[], None], stop: asyncio.Event) -> None:
        """Capture until `stop`, or what the order says, and send all of it to `client`. `begin` is called once nothing
        can go wrong with the order any more. Raises CaptureError, and KernelError where the rings find no memory."""
        program = expression.compile_filter(expression.parse(order.filter))
        if len(self._taps) == MOST_CAPTURES:
            raise CaptureError(f"{MOST_CAPTURES} captures are running already; end one of them")
        names = host_names([ip_address(peer) for peer in self._peers()])
        try:
            tap = Tap(
                program,
                order.snaplen,
                1 << (order.ring_mib << 20).bit_length() - 1,
                tuple(reason.name.encode() for reason in DropReason),
                [(address.packed, name) for address, name in names.items()],
            )
        except MemoryError:
            raise CaptureError("no memory for a capture") from None
        drain = _Drain(tap, order, client, header(self._place(), order, names))
        try:
            await self._arm([*self._taps, tap])
            begin()
            await drain.until(stop)
        finally:
            await self._arm([other for other in self._taps if other is not tap])
            await drain.finish()

    async def _arm(self, taps: list[Tap]) -> None:
        self._taps = taps
        await self._backend.arm(tuple(taps))


class _Drain:
    """The thread that makes blocks of records and sends them."""

    def __init__(self, tap: Tap, order: Order, client: socket.socket, head: bytes) -> None:
        self._tap = tap
        self._order = order
        self._client = client
        self._start = time.time_ns()
        self._head = head
        self._disarmed = threading.Event()
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
        """After disarming: let the thread send what is left, and the statistics."""
        self._disarmed.set()
        if self._thread.ident is not None:  # it was started
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
        """One look at the rings; False where nothing more is to come."""
        disarmed = self._disarmed.is_set()
        most = self._order.count - self._tap.statistics[2] if self._order.count else 1 << 62
        if most == 0:
            return False
        blocks = self._tap.drain(time.time_ns() + (1 << 40 if disarmed else -LAG_NS), most)
        if blocks:
            self._send(blocks)
        elif disarmed:
            return False
        else:
            self._wait()
        return True

    def _wait(self) -> None:
        self._disarmed.wait(LOOK_SECONDS)

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
        matched, lost, delivered = self._tap.statistics
        unseen = matched - lost - delivered
        if lost:
            comment = f"{lost} of {matched} packets found no room in the ring: a larger --buffer or a smaller -s helps"
        elif unseen:
            comment = f"ended after {delivered} packets, as asked"
        else:
            comment = "nothing is missing"
        counts = {"received": matched, "dropped": lost, "delivered": delivered}
        return b"".join(
            pcapng.statistics(interface, time.time_ns(), start=self._start, comment=comment, **counts)
            for interface in (OVERLAY, UNDERLAY)
        )


def header(place: Place, order: Order, names: Mapping[IPv4Address | IPv6Address, str]) -> bytes:
    """The blocks before the first packet."""
    about = f"node {place.node}, lease {place.lease}, backend {place.backend}, device {place.device}"
    return b"".join(
        (
            pcapng.section(f"Loden {__version__}", os=f"{platform.system()} {platform.release()}", comment=about),
            pcapng.interface(
                pcapng.LINKTYPE_RAW,
                order.snaplen,
                name="overlay",
                description=f"inner packets of {place.device} at {place.node}",
                filter_text=order.filter,
            ),
            pcapng.interface(
                pcapng.LINKTYPE_RAW,
                order.snaplen,
                name="underlay",
                description=f"{place.backend}, {REBUILT}",
                filter_text=order.filter,
            ),
            pcapng.names(names),
        )
    )


def host_names(addresses: list[IPv4Address | IPv6Address]) -> dict[IPv4Address | IPv6Address, str]:
    """What /etc/hosts calls these addresses. No name server is asked: that would be traffic of our own."""
    wanted = set(addresses)
    found: dict[IPv4Address | IPv6Address, str] = {}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in Path("/etc/hosts").read_text().splitlines():
            words = line.partition("#")[0].split()
            with contextlib.suppress(ValueError):
                if len(words) > 1 and (address := ip_address(words[0])) in wanted:
                    found.setdefault(address, words[1])
    return found
