"""Owns the kernel's neighbour, FDB and route tables in bulk: putting, deleting and listing many entries at once.

Free of: which entries there should be, and of devices. Invariant: putting what is there and deleting what is not there
are no faults, and cost one message; one entry that the kernel refuses keeps no other out.

Messages are packed here, some hundred to a system call, and only refusals are answered (pyroute2 needs 15 s for what
takes half a second so). All of it runs in a worker thread; the loop is never held.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from dataplane.errors import KernelError
from dataplane.kernel import rtnetlink
from dataplane.kernel.rtnetlink import Entry, IPAddress, Scope, Table

R = TypeVar("R")

BATCH = 32
"""Messages of one system call. The kernel answers all of them before it returns, so that their answers must fit the
receive buffer, and lets nothing else have that processor: of ten thousand new routes through one device the last ones
take it a third of a millisecond each."""
BUFFER_BYTES = 4 << 20
RECEIVE_BYTES = 1 << 18
DUMP_ATTEMPTS = 10

_SOL_NETLINK = 270
_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 10, 11, 12
_SO_RCVBUFFORCE = 33

ABSENT = frozenset({errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENXIO})
"""What the kernel says when there was nothing to delete; also where the device is gone, and its entries with it."""


@dataclass(frozen=True, slots=True)
class Refused:
    """An entry that the kernel would not take."""

    entry: Entry
    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What stands in a scope: entries that were asked about, and the bodies of all other messages as they came."""

    present: list[Entry]
    others: list[bytes]


class Tables:
    """A connection: `await Tables.open()`, any number of calls, `await close()`. Calls run one after the other."""

    def __init__(self, worker: ThreadPoolExecutor, netlink: socket.socket) -> None:
        self._worker = worker
        self._socket = netlink
        self._sequence = 0

    @classmethod
    async def open(cls) -> Tables:
        """Connect to the namespace of the calling thread. Raises KernelError."""
        try:
            netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        except OSError as error:
            raise KernelError(f"cannot open rtnetlink: {error.strerror}") from error
        try:
            for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
                netlink.setsockopt(_SOL_NETLINK, option, 1)
            with contextlib.suppress(PermissionError):  # whoever may not have it may not change tables either
                netlink.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER_BYTES)
            netlink.bind((0, 0))
        except OSError as error:
            netlink.close()
            raise KernelError(f"cannot open rtnetlink: {error.strerror}") from error
        return cls(ThreadPoolExecutor(1, thread_name_prefix="tables"), netlink)

    async def close(self) -> None:
        """Disconnect, after calls that are under way. Safe to call twice."""
        with contextlib.suppress(RuntimeError):  # the worker is shut down: somebody closed it before
            await self._run(self._socket.close)
        self._worker.shutdown(wait=False)

    @property
    def port(self) -> int:
        """By which the kernel's news name whoever changed a route or put a neighbour. Of the FDB they never do (vxlan's
        driver says 0), nor of a neighbour that is deleted."""
        return int(self._socket.getsockname()[0])

    async def put(self, entries: Sequence[Entry]) -> list[Refused]:
        """Put every entry in, in this order, in place of one with the same key. Returns those that were refused."""
        return (await self.change(entries, ()))[0]

    async def delete(self, entries: Sequence[Entry]) -> list[Refused]:
        """Delete exactly these entries; what is not there is no refusal."""
        return (await self.change((), entries))[1]

    async def change(self, put: Sequence[Entry], drop: Sequence[Entry]) -> tuple[list[Refused], list[Refused]]:
        """Put the one, then delete the other; what was refused of each. In a storm of changes the way to the worker and
        back costs more than what it does there: so both go together."""
        return await self._run(lambda: (self._put(put), self._delete(drop)))

    async def listing(
        self, scope: Scope, wanted: Mapping[bytes, Entry], attempts: int = DUMP_ATTEMPTS
    ) -> Listing:
        """What stands in one table of one device; `wanted`: entries of that scope by their bodies. A device that is
        not there has nothing. Raises KernelError, also where the table changes during each of the `attempts`."""
        return await self._run(lambda: self._listing(scope, wanted, attempts))

    async def neighbouring(self, addresses: Sequence[IPAddress]) -> dict[IPAddress, int]:
        """Those of the addresses to which the kernel would send a packet without a gateway, now, and the index of the
        device through which it would. An address of our own is none of them."""
        return await self._run(lambda: self._look_up(addresses))

    async def _run(self, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def _put(self, entries: Sequence[Entry]) -> list[Refused]:
        """IPv6 looks for a gateway within the route's own destination by the route that is to be replaced, and refuses
        it on another device (net/ipv6/route.c, ip6_route_check_nh_onlink): there the old one has to go first."""
        refused = self._change(entries, rtnetlink.set_message)
        blocked = [refusal.entry for refusal in refused if refusal.code == errno.EINVAL and _is_route_v6(refusal.entry)]
        if not blocked:
            return refused
        self._change(blocked, rtnetlink.clearing_message)
        again = {entry.key for entry in blocked}
        others = [refusal for refusal in refused if refusal.entry.key not in again]
        return others + self._change(blocked, rtnetlink.set_message)

    def _delete(self, entries: Sequence[Entry]) -> list[Refused]:
        refused = self._change(entries, rtnetlink.delete_message)
        return [refusal for refusal in refused if refusal.code not in ABSENT]

    def _change(self, entries: Sequence[Entry], pack: Callable[[Entry, int], bytes]) -> list[Refused]:
        refused = []
        for batch in _batches(entries):
            first = self._sequence + 1
            self._sequence += len(batch)
            requests = [pack(entry, first + place) for place, entry in enumerate(batch)]
            requests[-1] = rtnetlink.with_acknowledgement(requests[-1])
            for sequence, code, words in self._ask(requests, first):
                if code:
                    entry = batch[sequence - first]
                    refused.append(Refused(entry, code, words or os.strerror(code)))
        return refused

    def _ask(self, requests: Iterable[bytes], first: int) -> list[tuple[int, int, str]]:
        """Send one batch; sequence, errno and words of each answer up to that of the last request."""
        try:
            self._socket.sendto(b"".join(requests), (0, 0))
            answers = []
            while True:
                for kind, flags, sequence, body in rtnetlink.messages(self._socket.recv(RECEIVE_BYTES)):
                    if kind == rtnetlink.NLMSG_ERROR and sequence >= first:
                        answers.append((sequence, *rtnetlink.refusal(body, flags)))
                        if sequence == self._sequence:
                            return answers
        except OSError as error:
            raise KernelError(f"cannot change the kernel's tables: {error.strerror}") from error

    def _listing(self, scope: Scope, wanted: Mapping[bytes, Entry], attempts: int) -> Listing:
        width = len(next(iter(wanted))) if wanted else 0
        for _ in range(attempts):
            listing = self._dump(scope, wanted, width)
            if listing is not None:
                return listing
        raise KernelError(f"the kernel's tables changed during each of {attempts} attempts to list them")

    def _dump(self, scope: Scope, wanted: Mapping[bytes, Entry], width: int) -> Listing | None:
        """None where others changed the table under the kernel's hands: it may lack entries or have them twice."""
        self._sequence += 1
        request = rtnetlink.dump_message(scope, self._sequence)
        scan = rtnetlink.Scan(scope.table, wanted, width, self._sequence)
        try:
            self._socket.sendto(request, (0, 0))
            while scan.end is None:
                scan.take(self._socket.recv(RECEIVE_BYTES))
        except OSError as error:
            raise KernelError(f"cannot list the kernel's {scope.table.value} table: {error.strerror}") from error
        if scan.end not in (0, *ABSENT):
            raise KernelError(f"cannot list the kernel's {scope.table.value} table: {os.strerror(scan.end)}")
        return None if scan.flags & rtnetlink.NLM_F_DUMP_INTR else Listing(scan.present, scan.others)

    def _look_up(self, addresses: Sequence[IPAddress]) -> dict[IPAddress, int]:
        found: dict[IPAddress, int] = {}
        for batch in _batches(addresses):
            first = self._sequence + 1
            self._sequence += len(batch)
            requests = [rtnetlink.lookup_message(address, first + place) for place, address in enumerate(batch)]
            left = len(batch)
            try:
                self._socket.sendto(b"".join(requests), (0, 0))
                while left:
                    for kind, _, sequence, body in rtnetlink.messages(self._socket.recv(RECEIVE_BYTES)):
                        if sequence < first:
                            continue  # the rest of a call that an error has cut short
                        left -= 1
                        device = rtnetlink.neighbouring_device(body) if kind == rtnetlink.RTM_NEWROUTE else 0
                        if device:
                            found[batch[sequence - first]] = device
            except OSError as error:
                raise KernelError(f"cannot look routes up: {error.strerror}") from error
        return found


def _is_route_v6(entry: Entry) -> bool:
    return entry.scope.table is Table.ROUTE and entry.scope.family == rtnetlink.AF_INET6


T = TypeVar("T")


def _batches(items: Sequence[T]) -> Iterable[Sequence[T]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))
