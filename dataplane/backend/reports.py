"""Owns what becomes of the path's reports about other nodes: who sends without a lease, who cannot be sent to, and
whose path takes less than ours.

Free of: the device, and of leases. Invariant: what strangers send can make no table here grow without bound, and the
same complaint is not logged again and again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

from dataplane.kernel import underlay
from dataplane.path.facts import Address, PathEvent, PathEventKind

log = logging.getLogger(__name__)

K = TypeVar("K")
V = TypeVar("V")

PATH_MTU_SECONDS = 600.0
"""As long as the kernel keeps what it has learnt of a path (net.ipv4.route.mtu_expires)."""

LEAST_PATH_MTU = {4: 576, 6: 1280}
"""By IP version: every path takes that much (RFC 791, RFC 8200); one that claims less is somebody's forgery."""

REPEAT_SECONDS = 60.0
"""The same complaint about the same address is logged no more often."""

MOST_STRANGERS = 256
"""Outer sources without a lease, and complaints, that are remembered: forged ones come without end."""


class Reports:
    """`take` what the path tells of other nodes."""

    def __init__(self, overhead: int, set_path_mtu: Callable[[Address, int], None]) -> None:
        """`overhead`: bytes that the outer headers take. `set_path_mtu`: how long inner packets to an outer address may
        be, 0 for as long as ours."""
        self._overhead = overhead
        self._set_path_mtu = set_path_mtu
        self._unknown: dict[tuple[Address, int], int] = {}  # by queue: its pump counts by itself
        self._complaints: dict[tuple[PathEventKind, Address, int], float] = {}
        self._path_mtus: dict[Address, asyncio.TimerHandle] = {}

    @property
    def unknown_sources(self) -> dict[Address, int]:
        """Datagrams by outer sources that hold no lease."""
        found: dict[Address, int] = {}
        for (address, _), datagrams in self._unknown.items():
            found[address] = found.get(address, 0) + datagrams
        return found

    def take(self, event: PathEvent, mtu: int) -> None:
        """UNKNOWN_SOURCE, TOO_LONG or SEND_FAILED. `mtu`: of our inner packets."""
        if event.kind is PathEventKind.UNKNOWN_SOURCE:
            _remember(self._unknown, (event.address, event.queue), event.value)
            self._complain(
                event,
                "Dropping datagrams from %s: no lease names it. If it is a node, its -public-ip differs from the "
                "address it sends from (see --source-check)",
                event.address,
            )
        elif event.kind is PathEventKind.TOO_LONG:
            self._learn_path_mtu(event.address, mtu)
        else:
            self._complain(event, "Cannot send to peer %s: %s", event.address, os.strerror(event.value))

    def forget_path_mtus(self) -> None:
        """They were learnt of an underlay, or for a path, that is no more."""
        for peer in list(self._path_mtus):
            self._path_mtus[peer].cancel()
            self._forget_path_mtu(peer)

    def _learn_path_mtu(self, peer: Address, ours: int) -> None:
        """Ask the kernel what it has learnt, and forget it when the kernel does."""
        whole = underlay.path_mtu(peer)
        mtu = whole - self._overhead
        if whole < LEAST_PATH_MTU[peer.version] or mtu >= ours or peer in self._path_mtus:
            return
        log.warning("The path to %s takes inner packets of %d bytes, not %d", peer, mtu, ours)
        self._set_path_mtu(peer, mtu)
        loop = asyncio.get_running_loop()
        self._path_mtus[peer] = loop.call_later(PATH_MTU_SECONDS, self._forget_path_mtu, peer)

    def _forget_path_mtu(self, peer: Address) -> None:
        del self._path_mtus[peer]
        self._set_path_mtu(peer, 0)

    def _complain(self, event: PathEvent, text: str, *arguments: object) -> None:
        about = (event.kind, event.address, event.value if event.kind is PathEventKind.SEND_FAILED else 0)
        now = time.monotonic()
        if now - self._complaints.get(about, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            _remember(self._complaints, about, now)
            log.warning(text, *arguments)


def _remember(table: dict[K, V], key: K, value: V) -> None:
    """As the newest entry; the oldest goes where there are too many."""
    table.pop(key, None)
    table[key] = value
    if len(table) > MOST_STRANGERS:
        del table[next(iter(table))]
