"""Owns what this daemon remembers for its next start, while it runs: its device and MAC, its network, lease and peers.

Free of: the file's format (kernel.subnetfile). Invariant: the file says what was last told here, or an older whole
truth; that it cannot be written is logged and never ends a daemon. What is remembered of one network config is
forgotten with it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataplane.errors import KernelError, LeaseInvalid
from dataplane.kernel import subnetfile
from dataplane.lease.allocate import Claim
from dataplane.lease.model import Lease, LeaseAttrs
from dataplane.lease.store import Entry, Snapshot

log = logging.getLogger(__name__)

_UNICAST_MAC = re.compile("(?!0{12})[0-9a-f][02468ace][0-9a-f]{10}")

PEERS_INTERVAL = 5.0
"""Seconds between two writes of the peers, which may be megabytes; a change after a quiet time is written at once."""
PEERS_A_SECOND = 1000
"""Peers that are written at most on the average: ten thousand, of whom some change all the time, every ten seconds."""
_SLICE, _PAUSE = 50, 0.01
"""Peers that are encoded at once, in half a millisecond, and the seconds that others then have to themselves."""
_GATHER = 0.1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Past:
    """What a daemon needs to forward packets without a store. `left`: seconds of our lease's TTL, None: reserved."""

    config: bytes
    own: Entry
    left: float | None
    snapshot: Snapshot


class Memory:
    """What the former daemon at this place left word of, then what this one adds to it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._state = subnetfile.read_state(path)
        self._boot_id = _BOOT_ID.read_text().strip()
        self._writing = threading.Lock()
        self._known: Callable[[], tuple[int, Mapping[str, Lease]]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._next = float("-inf")

    @property
    def device(self) -> str:
        """The devices that are ours, parted by blanks; empty for none."""
        return self._state.device

    @property
    def macs(self) -> dict[int, bytes]:
        """What our VTEPs were known by, by IP version."""
        kept = {4: self._state.mac, 6: self._state.mac_v6}
        return {version: bytes.fromhex(mac) for version, mac in kept.items() if _UNICAST_MAC.fullmatch(mac)}

    def claim(self) -> Claim | None:
        """The lease that is provably ours, whatever this node's address is now."""
        own = self._state.own
        if own is None:
            return None
        try:
            attrs = LeaseAttrs.decode(own.value)
        except LeaseInvalid:
            return None
        return Claim(own.key, own.create_revision, attrs.public_ip, attrs.public_ipv6)

    def past(self, store: str) -> Past | None:
        """What was true in that store when the former daemon ended; None once our lease must have expired."""
        state = self._state
        if state.own is None or state.store != store or not state.config:
            return None
        left = None
        if not state.own.reserved:
            now = _boot_time() if state.boot_id == self._boot_id else time.time()
            left = (state.expires_boot if state.boot_id == self._boot_id else state.expires) - now
            if left <= 0:
                return None
        return Past(state.config, state.own, left, Snapshot(state.revision, (*state.peers, state.own)))

    def keep_device(self, name: str) -> None:
        self._keep(device=name)

    def keep_macs(self, macs: Mapping[int, bytes]) -> None:
        self._keep(mac=macs.get(4, b"").hex(), mac_v6=macs.get(6, b"").hex())

    def keep_network(self, store: str, config: bytes) -> None:
        """The network that the daemon is about to join; leases of another one are forgotten."""
        if (store, config) != (self._state.store, self._state.config):
            self._keep(store=store, config=config, own=None, peers=(), revision=0)

    def keep_lease(self, own: Entry, left: float | None) -> None:
        """Our own lease, whose TTL runs for `left` more seconds (None: reserved)."""
        expires = (0.0, 0.0) if left is None else (_boot_time() + left, time.time() + left)
        self._keep(own=own, boot_id=self._boot_id, expires_boot=expires[0], expires=expires[1])

    def keep_peers(self, known: Callable[[], tuple[int, Mapping[str, Lease]]]) -> None:
        """The peers have changed. `known` is asked for the store's revision and them when they are written, in a moment
        or some seconds after the last time."""
        self._known = known
        if self._task is None:
            self._task = asyncio.create_task(self._write_peers())

    async def close(self) -> None:
        """Leave a write of the peers that waits; the next start takes the older ones for a beginning."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _write_peers(self) -> None:
        """Until everything is written that was told meanwhile."""
        while self._known is not None:
            await asyncio.sleep(max(_GATHER, self._next - time.monotonic()))
            (revision, leases), self._known = self._known(), None
            copied = list(leases.items())
            self._next = time.monotonic() + max(PEERS_INTERVAL, len(copied) / PEERS_A_SECOND)
            peers: list[Entry] = []
            # Not in the thread: whatever it does in Python keeps the loop from its turn for milliseconds, each time.
            for start in range(0, len(copied), _SLICE):
                peers += [_entry(text, lease) for text, lease in copied[start : start + _SLICE]]
                if start + _SLICE < len(copied):
                    await asyncio.sleep(_PAUSE)
            await asyncio.to_thread(self._keep, revision=revision, peers=tuple(peers))
        self._task = None

    def _keep(self, **changes: Any) -> None:
        with self._writing:
            state = dataclasses.replace(self._state, **changes)
            if state == self._state:
                return
            try:
                subnetfile.write_state(self._path, state)
            except KernelError as error:
                log.error("Cannot keep the state for the next start: %s", error)
            self._state = state


def _entry(text: str, lease: Lease) -> Entry:
    return Entry(text, lease.attrs.encode(), lease.create_revision, lease.mod_revision, lease.reserved)


def _boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
