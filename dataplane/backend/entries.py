"""Owns the kernel entries that stand for peers: putting them in, following peers and underlay, keeping them there.

Free of: devices, and of which entries a peer needs (a backend's `Plan`). Invariant: after `follow` and after each look
the kernel has exactly what the present peers need, but for what it refuses (`refused`). What a peer needs now stands
before what it needed is taken away, and FDB and neighbour stand before the route: no route leads nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import islice

from dataplane.backend.attention import Attention
from dataplane.backend.base import BackendStatus, PeerStatus
from dataplane.backend.peers import IPAddress, IPNetwork, Peer, Peers
from dataplane.errors import DropReason, KernelError
from dataplane.kernel import rtnetlink
from dataplane.kernel.events import Group, KernelEvents
from dataplane.kernel.facts import AddressEvent, KernelEvent, LinkEvent, Overrun, RouteEvent
from dataplane.kernel.rtnetlink import Entry, Scope, Table
from dataplane.kernel.tables import DUMP_ATTEMPTS, Listing, Refused, Tables
from dataplane.lease.model import LeaseEvent

log = logging.getLogger(__name__)

MANY = 10_000
"""Entries in one go of which the kernel's own news are rather not heard: at a start. A storm of leases comes in rounds
of some thousand, and a look at everything after each of them would only make the next one longer."""

_ORDER = {Table.FDB: 0, Table.NEIGHBOUR: 1, Table.ROUTE: 2}

Plan = Callable[[Peer, int], tuple[Entry, ...]]
"""The entries of a peer. The number: the device through which its address is reached without a gateway; 0 where there
is none, or where nobody asked."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found: entries that were right, were missing and are put in, were ours, useless, and are gone."""

    kept: int
    put: int
    removed: int


def follow_leases(families: Iterable[Peers], events: Sequence[LeaseEvent]) -> dict[IPNetwork, Peer | None]:
    """What lease events mean for the peers of every family; a lease that is not obeyed is logged, with the reason."""
    changes: dict[IPNetwork, Peer | None] = {}
    for peers in families:
        known = dict(peers.ignored)
        changes |= peers.follow(events)
        for subnet, reason in peers.ignored.items():
            if known.get(subnet) != reason:
                log.warning("Ignoring lease %s: %s", subnet, reason)
    return changes


class PeerEntries:
    """The entries of one backend: `open`, `follow` any number of times, `start` once there is a lease, `close`; what is
    in the kernel then stays there.

    Nothing is written before the first `follow`, which brings every peer there is and thereby shows what a former
    daemon left: entries that are right stay untouched.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        stale: Callable[[Entry], bool],
        scopes: Callable[[], Collection[Scope]],
        direct: bool,
        is_own: Callable[[LinkEvent | AddressEvent], bool],
        put_right: Callable[[], Awaitable[bool]],
    ) -> None:
        """`stale`: whether an entry that no peer needs is one of ours. `scopes`: where the first audit looks for such.
        `direct`: find out for each peer whether its address is reached without a gateway, remember it, and decide anew
        when the underlay's routes change. `is_own`: whether an event is about what the backend has besides entries;
        `put_right` then sees to that, and says whether the plan gives other entries now."""
        self._plan = plan
        self._stale = stale
        self._scopes = scopes
        self._direct = direct
        self._is_own = is_own
        self._put_right = put_right
        self._peers: dict[IPNetwork, Peer] = {}
        self._ways: dict[IPAddress, int] = {}  # 0 for one that was asked for and is not reached directly
        self._needs: dict[IPNetwork, tuple[Entry, ...]] = {}
        self._wanted: dict[bytes, Entry] = {}
        self._by_scope: dict[Scope, dict[bytes, Entry]] = {}
        self._refused: dict[bytes, Refused] = {}
        self._kernel: Tables | None = None
        self._asking: Tables | None = None  # beside it, so that leases are followed while an audit reads
        self._touched: set[bytes] | None = None  # keys that were changed while an audit reads
        self._groups = frozenset[Group]()
        self._events: KernelEvents | None = None
        self._attention = Attention(self._look)
        self._turn = asyncio.Lock()
        self._known = False
        self._planned = True
        self._doubtful = False
        self._audited = False
        self.repairs = 0
        """Entries that an audit after the first one had to put in or take away."""

    # --- life -----------------------------------------------------------------------------------------------------

    async def open(self, groups: frozenset[Group]) -> None:
        """Connect to the kernel and hear of changes, before anything is made. Raises KernelError."""
        self._groups = groups
        self._kernel = await Tables.open()
        self._asking = await Tables.open()
        self._events = self._listen()

    def start(self) -> None:
        """Look after everything from now on."""
        self._attention.start()

    async def remove(self) -> None:
        """Take away every entry that the kernel lets us; for a backend that leaves nothing. Then comes `close`."""
        await self._attention.close()
        if self._kernel is not None:
            async with self._turn:
                gone, self._peers = list(self._needs), {}
                with contextlib.suppress(KernelError):
                    await self._replan(gone)

    async def close(self) -> None:
        """Safe to call at any point of the life, and twice."""
        await self._attention.close()
        if self._events is not None:
            self._events.close()
        for connection in (self._kernel, self._asking):
            if connection is not None:
                await connection.close()

    # --- what a backend asks --------------------------------------------------------------------------------------

    @property
    def peers(self) -> Mapping[IPNetwork, Peer]:
        return self._peers

    def status(
        self, kind: str, device: str, mtu: int, families: Iterable[Peers], *, repairs: int = 0
    ) -> BackendStatus:
        """What a backend tells whose packets the kernel carries, which counts them for whole devices only. `families`:
        who read the leases; `repairs`: of other things than entries."""
        ignored = {subnet: why for peers in families for subnet, why in peers.ignored.items()}
        return BackendStatus(
            type=kind,
            device=device,
            mtu=mtu,
            peers=tuple(
                PeerStatus(p.subnet, p.address, 0, 0, 0, 0, None, counted=False, direct=self.is_direct(p.subnet))
                for p in self._peers.values()
            ),
            drops=dict.fromkeys(DropReason, 0),
            unknown_sources={},
            ignored=ignored | self.refused,
            capabilities={},
            dataplane="kernel",
            repairs=self.repairs + repairs,
        )

    def is_direct(self, subnet: IPNetwork) -> bool:
        """Whether packets to that peer leave without encapsulation, by DirectRouting."""
        peer = self._peers.get(subnet)
        return peer is not None and self._way_to(peer) != 0

    @property
    def refused(self) -> dict[IPNetwork, str]:
        """Peers of whom the kernel refuses an entry, with its reason."""
        if not self._refused:
            return {}
        return {
            subnet: f"the kernel refuses its {refused.entry.scope.table.value}: {refused.reason}"
            for subnet, entries in self._needs.items()
            for entry in entries
            if (refused := self._refused.get(entry.key)) is not None
        }

    # --- following ------------------------------------------------------------------------------------------------

    async def follow(self, changes: Mapping[IPNetwork, Peer | None]) -> None:
        """Peers that appeared, changed, or (None) are gone. What fails is logged, and tried again soon."""
        try:
            async with self._turn:
                self._known = True
                await self._follow(changes)
                if not self._audited:
                    audit = await self._first_audit()
                    log.info(
                        "%d peers: %d entries stood already, %d were put in, %d of gone peers were taken away",
                        *(len(self._peers), audit.kept, audit.put, audit.removed),
                    )
        except KernelError as error:
            log.error("Cannot follow the peers' leases: %s", error)
            self._planned = False
            self._attention.alarm()

    async def moved(self) -> None:
        """The underlay, or a device, is another: work every peer's entries out again. Raises KernelError."""
        async with self._turn:
            self.doubt()
            await self._replan(self._peers)
        self._attention.alarm()

    def doubt(self) -> bool:
        """The ways to the peers may have changed: the next look decides anew. Returns whether anybody cares."""
        self._doubtful = self._direct
        return self._direct

    async def _follow(self, changes: Mapping[IPNetwork, Peer | None]) -> None:
        for subnet, peer in changes.items():
            if peer is None:
                self._peers.pop(subnet, None)
            else:
                self._peers[subnet] = peer
        if self._direct:
            if len(self._ways) > len(self._peers):  # of addresses that no peer has any more; seldom, since it is long
                present = {peer.address for peer in self._peers.values()}
                self._ways = {address: way for address, way in self._ways.items() if address in present}
            asked = {peer.address for peer in changes.values() if peer is not None}
            await self._decide(asked if self._doubtful else asked - self._ways.keys())
        await self._replan(changes)

    async def _decide(self, addresses: Collection[IPAddress]) -> set[IPAddress]:
        """Look up how addresses are reached now; those for which that is news. It stays so until it is doubtful: the
        kernel tells of every route that comes or goes."""
        if not addresses:
            return set()
        found = await self._tables.neighbouring(list(addresses))
        news = {address for address in addresses if self._ways.get(address, 0) != found.get(address, 0)}
        self._ways.update((address, found.get(address, 0)) for address in addresses)
        return news

    def _way_to(self, peer: Peer) -> int:
        """The second argument of the plan. IPv6 for a node at an IPv4 address, as in udp, has no way but the tunnel."""
        return self._ways.get(peer.address, 0) if peer.subnet.version == peer.address.version else 0

    async def _replan(self, subnets: Iterable[IPNetwork]) -> None:
        old: dict[bytes, Entry] = {}
        new: dict[bytes, Entry] = {}
        for subnet in subnets:
            old.update((entry.key, entry) for entry in self._needs.pop(subnet, ()))
            peer = self._peers.get(subnet)
            if peer is not None:
                self._needs[subnet] = self._plan(peer, self._way_to(peer))
                new.update((entry.key, entry) for entry in self._needs[subnet])
        put = [entry for key, entry in new.items() if old.get(key) != entry]
        drop = [entry for key, entry in old.items() if key not in new]
        if self._touched is not None:
            self._touched.update(entry.key for entry in (*put, *drop))
        # known before the kernel is changed, so that its events about it are recognised
        for entry in (*drop, *(old[entry.key] for entry in put if entry.key in old)):
            del self._wanted[entry.key]
            del self._by_scope[entry.scope][entry.body]
        for entry in put:
            self._wanted[entry.key] = entry
            self._by_scope.setdefault(entry.scope, {})[entry.body] = entry
        if self._audited:
            await self._change(put, drop)

    # --- looking after it -----------------------------------------------------------------------------------------

    def _on_event(self, event: KernelEvent) -> None:
        if self._concerns(event):
            self._attention.alarm()

    def _concerns(self, event: KernelEvent) -> bool:
        """Whether we have to look now: something of ours is gone or another, or the underlay's routes have changed."""
        if isinstance(event, Overrun):
            self.doubt()
            return True
        if isinstance(event, LinkEvent | AddressEvent):
            # a device that goes down takes its IPv4 routes along without a word
            return self._is_own(event) or self.doubt()
        table = Table.ROUTE if isinstance(event, RouteEvent) else Table.FDB if event.fdb else Table.NEIGHBOUR
        key = rtnetlink.key_of(table, event.body)
        wanted = None if key is None else self._wanted.get(key)
        if wanted is not None and event.body.startswith(wanted.body):
            return event.gone
        if wanted is None and event.gone and table is not Table.ROUTE:
            return False
        entry = rtnetlink.entry_of(table, event.body)
        if wanted is not None:
            return event.gone or entry != wanted
        if entry is not None and self._stale(entry):
            return not event.gone
        return table is Table.ROUTE and self.doubt()

    async def _look(self) -> None:
        """Whoever follows leases has a turn while the kernel is read: to read thirty thousand entries takes the better
        part of the time in which no packet may go to a replaced owner, and on busy processors more."""
        async with self._turn:
            self._planned &= not await self._put_right()
            if not self._known:
                return  # who the peers are is not known yet: everything that stands there may be theirs
            if not self._planned:
                self.doubt()
                await self._replan(self._peers)
                self._planned = True
            if not self._audited:
                self._say_repaired(await self._first_audit())
                return
            await self._decide_anew()
            scopes = list(self._by_scope)
            self._touched = set()
        try:
            found = await self._list_in_turns(scopes)
            async with self._turn:
                self._say_repaired(await self._audit(found))
        finally:
            self._touched = None

    async def _first_audit(self) -> Audit:
        """Before it nothing is written; what a former daemon left may stand elsewhere, too. The turn is ours."""
        await self._decide_anew()
        return await self._audit(await self._list(dict.fromkeys((*self._by_scope, *self._scopes()))))

    async def _decide_anew(self) -> None:
        if self._doubtful:
            news = await self._decide({peer.address for peer in self._peers.values()})
            self._doubtful = False
            await self._replan([subnet for subnet, peer in self._peers.items() if peer.address in news])

    async def _list(self, scopes: Iterable[Scope], attempts: int = DUMP_ATTEMPTS) -> dict[Scope, Listing]:
        """What stands in each scope. Raises KernelError."""
        if self._asking is None:
            raise RuntimeError("open comes first")
        # copies: these change with every lease
        return {
            scope: await self._asking.listing(scope, dict(self._by_scope.get(scope, {})), attempts) for scope in scopes
        }

    async def _list_in_turns(self, scopes: Iterable[Scope]) -> dict[Scope, Listing]:
        """The same while leases are followed; where that disturbs the kernel's list of a table, they wait for it."""
        found: dict[Scope, Listing] = {}
        for scope in scopes:
            try:
                found |= await self._list([scope], attempts=1)
            except KernelError:
                async with self._turn:
                    found |= await self._list([scope])
        return found

    async def _audit(self, found: Mapping[Scope, Listing]) -> Audit:
        """Put in what is missing, take away what is ours and useless; what was changed since the kernel was read is
        right. The turn is ours. Raises KernelError, and then everything is as doubtful as before."""
        touched: AbstractSet[bytes] = self._touched or frozenset()
        missing: dict[bytes, Entry] = {}
        stale: dict[bytes, Entry] = {}
        for scope, listing in found.items():
            present = {entry.key for entry in listing.present} | touched
            for body in listing.others:
                entry = rtnetlink.entry_of(scope.table, body)
                if entry is not None and entry.key not in touched:
                    self._judge(entry, present, stale)
            wanted = self._by_scope.get(scope, {}).values()
            missing.update((entry.key, entry) for entry in wanted if entry.key not in present)
        put = len(missing) - await self._change(list(missing.values()), list(stale.values()))
        if self._audited:
            self.repairs += put + len(stale)
            self._say_recovered(missing.values())
        self._audited = True
        return Audit(len(self._wanted) - len(missing), put, len(stale))

    def _say_repaired(self, audit: Audit) -> None:
        if audit.put or audit.removed:
            log.warning(
                "Others had changed what stands for peers in the kernel: %d entries were put back, %d taken away",
                *(audit.put, audit.removed),
            )

    def _say_recovered(self, entries: Iterable[Entry]) -> None:
        """In flannel's words, which scripts look for; of very many the first."""
        there = (each for each in entries if each.scope.table is Table.ROUTE and each.key not in self._refused)
        for route in map(rtnetlink.route_of, (entry.body for entry in islice(there, 10))):
            log.info("Route recovered %s : %s", route.destination, route.gateway)

    def _judge(self, entry: Entry, present: set[bytes], stale: dict[bytes, Entry]) -> None:
        """What the kernel shows otherwise than we write it, or what is none of the entries that are wanted there."""
        wanted = self._wanted.get(entry.key)
        if wanted == entry:
            present.add(entry.key)
        elif wanted is None and self._stale(entry):
            stale[entry.key] = entry

    # --- the kernel -----------------------------------------------------------------------------------------------

    @property
    def _tables(self) -> Tables:
        if self._kernel is None:
            raise RuntimeError("open comes first")
        return self._kernel

    async def _change(self, put: list[Entry], drop: list[Entry]) -> int:
        """Put in, then take away; returns how many to be put in were refused."""
        if not put and not drop:
            return 0
        put.sort(key=lambda entry: _ORDER[entry.scope.table])
        drop.sort(key=lambda entry: -_ORDER[entry.scope.table])
        with self._undisturbed(len(put) + len(drop)):
            refusals, stuck = await self._tables.change(put, drop)
        if refusals or self._refused:
            self._remember_refused(put, {refusal.entry.key: refusal for refusal in refusals})
            for entry in drop:
                self._refused.pop(entry.key, None)
        for refusal in stuck:
            log.warning("The kernel does not take %s away: %s", rtnetlink.describe(refusal.entry), refusal.reason)
        return len(refusals)

    def _remember_refused(self, put: Iterable[Entry], refused: Mapping[bytes, Refused]) -> None:
        for entry in put:
            before, now = self._refused.pop(entry.key, None), refused.get(entry.key)
            if now is not None:
                self._refused[entry.key] = now
                if before is None or before.code != now.code:
                    log.warning("The kernel refuses %s: %s", rtnetlink.describe(entry), now.reason)

    def _listen(self) -> KernelEvents:
        """To everybody's changes but our own, of which a storm of leases makes thousands a second."""
        return KernelEvents.open(self._groups, self._on_event, but=self._tables.port)

    @contextlib.contextmanager
    def _undisturbed(self, changes: int) -> Iterator[None]:
        """Do not listen to thousands of events about our own changes, which take longer to hear than to cause; look
        once afterwards instead."""
        if changes < MANY or self._events is None:
            yield
            return
        self._events.close()
        try:
            yield
        finally:
            self._events = self._listen()
            self._on_event(Overrun())
