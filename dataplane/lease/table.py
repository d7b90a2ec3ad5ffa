"""Owns the question whom this node obeys: which entries of the store are leases, and which of those are peers.

Free of: IO, clocks, logging. Invariant: the sum of all events handed out equals `peers`, and `peers` is what a new
table makes of the same entries, apart from two memories: the last good value of a key whose value went bad, and the
peers that the store has lost and that nobody told the table to `forget` yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from types import MappingProxyType

from dataplane.errors import LeaseInvalid
from dataplane.lease.model import NO_IPV4, Lease, LeaseAttrs, LeaseEvent, LeaseEventKind, LeaseKey
from dataplane.lease.overlap import OverlapIndex
from dataplane.lease.store import Batch, Deleted, Entry, Snapshot

_BROADCAST = IPv4Address("255.255.255.255")
_NOWHERE = IPv4Address(0)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A key whose present entry is not obeyed. `mod_revision`: of the write that was looked at. `again`: an earlier
    write of that key was rejected for the same reason."""

    key: str
    mod_revision: int
    reason: str
    again: bool = False


@dataclass(frozen=True, slots=True)
class Update:
    """What one snapshot or batch changed. `own` is the latest fact about our own key, None where it did not occur.
    `lost`: peers whose entries are gone, which are kept until `LeaseTable.forget`.

    A snapshot's events come as Removed, Changed, Added; a batch's in the order of the store's changes.
    """

    events: tuple[LeaseEvent, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    own: Entry | Deleted | None = None
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Record:
    """One key of the store. `digest` is the value's hash, None to read it anew. `good` is the last value of this
    incarnation that can be obeyed; `fault` says why the present one cannot. `missing`: kept although the store has
    lost it."""

    create_revision: int
    mod_revision: int
    digest: int | None
    key: LeaseKey | None
    good: Lease | None
    fault: str | None
    missing: bool = False

    def same_claim(self, other: _Record) -> bool:
        """Whether both claim the same subnets with the same right; what they say of their node may differ."""
        if self.good is None or other.good is None or self.good.key != other.good.key:
            return False
        return (self.create_revision, self.missing) == (other.create_revision, other.missing)


class LeaseTable:
    """Turns snapshots and batches of one network into events about peers.

    The leases that it hands out name subnets of the network's own families only: of a lease with both, a network of
    IPv4 alone sees the IPv4 half, and one of IPv6 alone is none of its peers'.

    Two leases that overlap: the lower create revision is obeyed (at a tie the lower key), the other is rejected and
    comes in when the winner goes. What overlaps our own lease is rejected whatever its age. A peer whose entry is gone
    stays, behind every other lease that needs its subnet, until it is forgotten: its daemon may put it back. A snapshot
    costs O(n log n), a change O(log n) plus the leases that it overlaps.
    """

    def __init__(
        self,
        network: IPv4Network | None,
        network_v6: IPv6Network | None = None,
        *,
        own_ip: IPv4Address = _NOWHERE,
        own_ipv6: IPv6Address | None = None,
    ) -> None:
        self._network = network
        self._network_v6 = network_v6
        self._networks = [block for block in (network, network_v6) if block is not None]
        self._own_ips: set[IPv4Address | IPv6Address | None] = {own_ip, own_ipv6} - {_NOWHERE, None}
        self._own_text: str | None = None
        self._own_key: LeaseKey | None = None
        self._records: dict[str, _Record] = {}
        self._missing: set[str] = set()
        self._contenders: dict[str, Lease] = {}
        self._index = OverlapIndex({})
        self._peers: dict[str, Lease] = {}
        self._rejected: dict[str, Rejection] = {}
        self.revision = 0
        """The store is known up to here; watch from it."""
        self.rejections = 0
        """How many rejections were reported since the start."""

    @property
    def peers(self) -> Mapping[str, Lease]:
        """Every lease that is obeyed, by its key's text; never our own."""
        return MappingProxyType(self._peers)

    @property
    def rejected(self) -> dict[str, str]:
        """Reason by key's text, for every key that is not obeyed as it stands in the store."""
        return {text: rejection.reason for text, rejection in self._rejected.items()}

    @property
    def missing(self) -> AbstractSet[str]:
        """The peers that are kept although the store has lost them."""
        return self._missing

    def set_own(self, text: str | None) -> Update:
        """Say which key is ours from now on; it leaves the peers, and what overlaps it is rejected."""
        self._own_text = text
        self._own_key = None if text is None else LeaseKey.parse(text)
        return self._settle_all()

    def move(self, own_ip: IPv4Address, own_ipv6: IPv6Address | None) -> bool:
        """Say that this node is at other addresses now. True where that is news: the next snapshot is then read as if
        no value in it were known."""
        ips = {own_ip, own_ipv6} - {_NOWHERE, None}
        if ips == self._own_ips:
            return False
        self._own_ips = ips
        self._records = {text: replace(record, digest=None) for text, record in self._records.items()}
        return True

    def reset(self, snapshot: Snapshot, *, restarted: bool = False) -> Update:
        """Follow a snapshot. One older than the table is ignored, unless the store's history has `restarted`."""
        if snapshot.revision < self.revision and not restarted:
            return Update()
        before = self._records
        self.revision = snapshot.revision
        self._records = {
            entry.key: self._read(entry, None if restarted else before.get(entry.key)) for entry in snapshot.entries
        }
        lost = self._peers.keys() - self._records.keys() - {self._own_text}
        for text in lost:
            self._records[text] = replace(before[text], missing=True)
        lost, self._missing = lost - self._missing, lost
        own: Entry | Deleted | None = None
        if self._own_text is not None:
            there = (entry for entry in snapshot.entries if entry.key == self._own_text)
            own = next(there, Deleted(self._own_text, snapshot.revision))
        return replace(self._settle_all(), own=own, lost=tuple(sorted(lost)))

    def forget(self, texts: Iterable[str]) -> Update:
        """Let go of those among `texts` that the store has lost."""
        updates = [self._put(text, None) for text in sorted(self._missing.intersection(texts))]
        return Update(
            tuple(event for update in updates for event in update.events),
            tuple(rejection for update in updates for rejection in update.rejections),
        )

    def apply(self, batch: Batch) -> Update:
        """Follow a batch of changes; those that the table has seen already are ignored."""
        known, self.revision = self.revision, max(self.revision, batch.revision)
        events: list[LeaseEvent] = []
        rejections: list[Rejection] = []
        lost: list[str] = []
        own: Entry | Deleted | None = None
        for change in batch.changes:
            if (change.revision if isinstance(change, Deleted) else change.mod_revision) <= known:
                continue
            known_lost = change.key in self._missing
            update = self._put(change.key, self._after(change))
            if change.key in self._missing and not known_lost:
                lost.append(change.key)
            events += update.events
            rejections += update.rejections
            if change.key == self._own_text:
                own = change
        return Update(tuple(events), tuple(rejections), own, tuple(lost))

    def _after(self, change: Entry | Deleted) -> _Record | None:
        """What there is to know of a key after a change; nothing of one that was no peer's and is gone."""
        before = self._records.get(change.key)
        if isinstance(change, Entry):
            return self._read(change, before)
        return replace(before, missing=True) if before is not None and change.key in self._peers else None

    def _put(self, text: str, record: _Record | None) -> Update:
        before = self._records.get(text)
        if record is not None and before is not None and text in self._peers and record.same_claim(before):
            # by far the most frequent change: nobody else's subnet is touched by it, and a peer's never overlaps ours
            self._records[text] = record
            if record.good is not None:
                self._contenders[text] = record.good
                return Update(tuple(self._events([text], {text})), tuple(self._rejections([text], {})))
        contender = self._contenders.pop(text, None)
        touched = {text}
        if contender is not None:
            self._index.remove(text, contender.key.subnets)
            touched |= self._touching(contender.key)
        self._records.pop(text, None)
        self._missing.discard(text)
        if record is not None:
            self._records[text] = record
            if record.missing:
                self._missing.add(text)
            contender = self._contender(text)
            if contender is not None:
                self._contenders[text] = contender
                self._index.add(text, contender.key.subnets)
                touched |= self._touching(contender.key)
        return self._settle(touched)

    def _read(self, entry: Entry, before: _Record | None) -> _Record:
        same = before is not None and before.create_revision == entry.create_revision
        digest = hash(entry.value)
        # the value is compared too: a store that was wiped may count up to the same revisions again
        if before is not None and same and (before.mod_revision, before.digest) == (entry.mod_revision, digest):
            return replace(before, missing=False) if before.missing else before
        key, good, fault = before.key if before is not None else None, None, None
        try:
            key = key or LeaseKey.parse(entry.key)
            attrs = LeaseAttrs.decode(entry.value)
            obeyed = before.good.key if before is not None and before.good is not None else self._obeyed(key)
            self._check_public_ips(obeyed, attrs)
            good = Lease(obeyed, attrs, entry.create_revision, entry.mod_revision, entry.reserved)
        except LeaseInvalid as error:
            fault = str(error)
            if before is not None and before.good is not None and same and not self._is_here(before.good.attrs):
                good = before.good
        return _Record(entry.create_revision, entry.mod_revision, digest, key, good, fault)

    def _obeyed(self, key: LeaseKey) -> LeaseKey:
        """The key, cut to the network's families. Raises LeaseInvalid for one that cannot be obeyed."""
        if key.subnets == ():
            raise LeaseInvalid("the key names no subnet: routing to it would make a peer the default route")
        obeyed = key.within(ipv4=self._network is not None, ipv6=self._network_v6 is not None)
        if obeyed.subnets == ():
            lacks = 4 if self._network is None else 6
            raise LeaseInvalid(f"it leases {key.subnets[0]} alone, and this network has no IPv{lacks}")
        v4, v6 = obeyed.subnet, obeyed.subnet_v6
        if self._network is not None and v4 != NO_IPV4 and not _holds(self._network, v4):
            raise LeaseInvalid(f"subnet {v4} lies outside the network {self._network}")
        if self._network_v6 is not None and v6 is not None and not _holds(self._network_v6, v6):
            raise LeaseInvalid(f"subnet {v6} lies outside the network {self._network_v6}")
        return obeyed

    def _check_public_ips(self, obeyed: LeaseKey, attrs: LeaseAttrs) -> None:
        if obeyed.subnet != NO_IPV4 or attrs.public_ipv6 is None or attrs.public_ip != _NOWHERE:
            self._check_public_ip(attrs.public_ip)
        if attrs.public_ipv6 is not None:
            self._check_public_ip(attrs.public_ipv6)

    def _check_public_ip(self, ip: IPv4Address | IPv6Address) -> None:
        nobody = ip.is_unspecified or ip.is_loopback or ip.is_multicast or ip == _BROADCAST
        if nobody or (ip.version == 6 and (ip.is_link_local or ip.ipv4_mapped is not None)):
            raise LeaseInvalid(f"public IP {ip} is not the address of a node")
        if any(ip in network for network in self._networks):
            raise LeaseInvalid(f"public IP {ip} lies inside the overlay's own network")
        if ip in self._own_ips:
            raise LeaseInvalid(f"public IP {ip} is that of this node")

    def _is_here(self, attrs: LeaseAttrs) -> bool:
        return not self._own_ips.isdisjoint((attrs.public_ip, attrs.public_ipv6))

    def _contender(self, text: str) -> Lease | None:
        """The lease by which `text` takes part in the question who holds an address."""
        record = self._records[text]
        return None if text == self._own_text or self._overlaps_own(record) else record.good

    def _overlaps_own(self, record: _Record) -> bool:
        return self._own_key is not None and record.key is not None and record.key.overlaps(self._own_key)

    def _touching(self, key: LeaseKey) -> set[str]:
        """Every contender that `key` overlaps, and what those overlap, and so on."""
        found: set[str] = set()
        todo = [key]
        while todo:
            new = self._index.overlapping(todo.pop().subnets) - found
            found |= new
            todo += [self._contenders[text].key for text in new]
        return found

    def _settle_all(self) -> Update:
        everyone = ((text, self._contender(text)) for text in self._records)
        self._contenders = {text: lease for text, lease in everyone if lease is not None}
        self._index = OverlapIndex({text: lease.key.subnets for text, lease in self._contenders.items()})
        return self._settle(self._records.keys() | self._peers.keys() | self._rejected.keys())

    def _settle(self, texts: Iterable[str]) -> Update:
        """Decide anew who is obeyed among `texts`; no contender outside of them overlaps one of them."""
        texts = sorted(texts)
        winners: set[str] = set()
        lost: dict[str, str] = {}
        for text in sorted((text for text in texts if text in self._contenders), key=self._precedence):
            better = self._index.overlapping(self._contenders[text].key.subnets) & winners
            if better:
                lost[text] = min(better, key=self._precedence)
            else:
                winners.add(text)
        return Update(tuple(self._events(texts, winners)), tuple(self._rejections(texts, lost)))

    def _precedence(self, text: str) -> tuple[bool, int, str]:
        record = self._records[text]
        return record.missing, record.create_revision, text

    def _events(self, texts: Iterable[str], winners: set[str]) -> Iterator[LeaseEvent]:
        removed, changed, added = [], [], []
        for text in texts:
            old = self._peers.get(text)
            if text not in winners:
                if old is not None:
                    removed.append(LeaseEvent(LeaseEventKind.REMOVED, self._peers.pop(text)))
                continue
            new = self._peers[text] = self._contenders[text]
            if old is None:
                added.append(LeaseEvent(LeaseEventKind.ADDED, new))
            elif old.attrs != new.attrs:
                changed.append(LeaseEvent(LeaseEventKind.CHANGED, new, previous=old))
        yield from removed
        yield from changed
        yield from added

    def _rejections(self, texts: Iterable[str], lost: Mapping[str, str]) -> Iterator[Rejection]:
        """The rejections among `texts` that were not reported yet, the same write for the same reason."""
        for text in texts:
            record = self._records.get(text)
            reason = None if record is None or text == self._own_text else record.fault
            apart = text == self._own_text or text in self._peers
            if reason is None and record is not None and not apart and self._overlaps_own(record):
                reason = f"subnet overlaps {self._own_text}, which is our own lease"
            if reason is None and text in lost:
                reason = f"subnet overlaps {lost[text]}, which is the older lease"
            if record is None or reason is None:
                self._rejected.pop(text, None)
                continue
            before = self._rejected.get(text)
            if before is None or (before.mod_revision, before.reason) != (record.mod_revision, reason):
                again = before is not None and before.reason == reason
                self._rejected[text] = Rejection(text, record.mod_revision, reason, again)
                self.rejections += 1
                yield self._rejected[text]


def _holds(network: IPv4Network | IPv6Network, subnet: IPv4Network | IPv6Network) -> bool:
    """Of one IP version. As `subnet_of`, which makes and keeps the last address of each."""
    return subnet.prefixlen >= network.prefixlen and subnet.network_address in network
