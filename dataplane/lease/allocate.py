"""Owns the choice of the subnet that a node asks for (facts 3.4).

Free of: IO, clocks; the source of randomness is an argument. Invariant: what is taken overlaps no key in the store that
parses, whatever stands under it, and an entry is only reused or discarded if it is this node's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import islice
from random import Random
from typing import TypeVar

from dataplane.errors import LeaseError, LeaseInvalid
from dataplane.lease.model import NO_IPV4, LeaseAttrs, LeaseKey
from dataplane.lease.store import Entry

_DRAW_FROM = 100
"""flannel gathers that many free subnets and draws one of them (pkg/subnet/etcd/local_manager.go)."""


@dataclass(frozen=True, slots=True)
class SubnetRange:
    """The subnets of one family that may be leased: those of `length` from `first` to `last`, both inclusive."""

    network: IPv4Network | IPv6Network
    length: int
    first: IPv4Address | IPv6Address
    last: IPv4Address | IPv6Address

    @property
    def step(self) -> int:
        """Addresses in one subnet."""
        return 1 << (self.network.max_prefixlen - self.length)

    @property
    def count(self) -> int:
        """How many subnets there are."""
        return (int(self.last) - int(self.first)) // self.step + 1

    def holds(self, subnet: IPv4Network | IPv6Network) -> bool:
        """Whether a node of this network may have that subnet."""
        return (
            subnet.version == self.network.version
            and subnet.prefixlen == self.length
            and int(self.first) <= int(subnet.network_address) <= int(self.last)
        )


@dataclass(frozen=True, slots=True)
class Claim:
    """Proof from our state file that an entry is ours although our public IP has changed since."""

    key: str
    create_revision: int
    public_ip: IPv4Address
    public_ipv6: IPv6Address | None = None


class Proof(Enum):
    """Why an entry is known to be ours."""

    PUBLIC_IP = "public IP"
    CLAIM = "claim"


@dataclass(frozen=True, slots=True)
class Reuse:
    """The entry is ours and fits the network: write our attributes over it."""

    entry: Entry
    key: LeaseKey
    proof: Proof


@dataclass(frozen=True, slots=True)
class Discard:
    """The entry is ours and does not fit the network: delete it, then plan again."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Take:
    """The subnet is free: create it. `previous`: we held it before."""

    key: LeaseKey
    previous: bool


@dataclass(frozen=True, slots=True)
class Wish:
    """What a node wants a lease for. `subnets` or `subnets_v6` is None where the network lacks that family."""

    subnets: SubnetRange | None
    public_ip: IPv4Address
    public_ipv6: IPv6Address | None = None
    subnets_v6: SubnetRange | None = None
    claim: Claim | None = None
    previous: LeaseKey | None = None

    @property
    def ranges(self) -> tuple[SubnetRange, ...]:
        """One for each family of the network."""
        return tuple(subnets for subnets in (self.subnets, self.subnets_v6) if subnets is not None)

    def fits(self, key: LeaseKey) -> bool:
        """Whether the network's config allows that key: one subnet of each family, and no other."""
        subnets = key.subnets
        return len(subnets) == len(self.ranges) and all(map(SubnetRange.holds, self.ranges, subnets))


def plan(entries: Sequence[Entry], wish: Wish, rng: Random) -> Reuse | Discard | Take:
    """The next step to a lease: our entry by public IP, by claim, the previous subnet, a random free one.

    `entries` are all of the store's, as they stand. Raises LeaseError if no subnet is free.
    """
    taken: list[LeaseKey] = []
    ours: list[tuple[Entry, LeaseKey, Proof]] = []
    for entry in entries:
        try:
            key = LeaseKey.parse(entry.key)
        except LeaseInvalid:
            continue
        taken.append(key)
        proof = _proof(entry, wish)
        if proof is not None:
            ours.append((entry, key, proof))
    if ours:
        entry, key, proof = min(ours, key=lambda own: _preference(own, wish))
        return Reuse(entry, key, proof) if wish.fits(key) else Discard(entry)
    blocks = [subnet for key in taken for subnet in key.subnets]
    former = () if wish.previous is None else wish.previous.subnets
    v4 = None if wish.subnets is None else _take(wish.subnets, IPv4Network, former, blocks, rng)
    v6 = None if wish.subnets_v6 is None else _take(wish.subnets_v6, IPv6Network, former, blocks, rng)
    key = LeaseKey(v4 or NO_IPV4, v6)
    return Take(key, previous=key == wish.previous)


def _proof(entry: Entry, wish: Wish) -> Proof | None:
    claim = wish.claim
    claimed = claim is not None and (claim.key, claim.create_revision) == (entry.key, entry.create_revision)
    if not claimed and not _may_name(entry.value, wish.public_ip):
        return None
    try:
        attrs = LeaseAttrs.decode(entry.value)
    except LeaseInvalid:
        return None
    if attrs.is_at(wish.public_ip, wish.public_ipv6):
        return Proof.PUBLIC_IP
    if claim is None or not claimed:
        return None
    return Proof.CLAIM if attrs.is_at(claim.public_ip, claim.public_ipv6) else None


def _may_name(value: bytes, ip: IPv4Address) -> bool:
    """False where it is certain, without reading the value, that it is not of the node at `ip`: it names another IPv4
    address. Of ten thousand leases that is known in a tenth of the time that it takes to read them."""
    return ip.is_unspecified or any(text in value for text in (str(ip).encode(), b"0.0.0.0", b"\\"))


def _preference(own: tuple[Entry, LeaseKey, Proof], wish: Wish) -> tuple[bool, bool, bool, int]:
    entry, key, proof = own
    claim = wish.claim
    claimed = claim is not None and (entry.key, entry.create_revision) == (claim.key, claim.create_revision)
    return proof is not Proof.PUBLIC_IP, not claimed, key != wish.previous, entry.create_revision


_Net = TypeVar("_Net", IPv4Network, IPv6Network)


def _take(
    subnets: SubnetRange,
    family: type[_Net],
    former: Iterable[IPv4Network | IPv6Network],
    taken: Iterable[IPv4Network | IPv6Network],
    rng: Random,
) -> _Net:
    """The subnet of one family: the former one if it is to be had, else one of the first that are free."""
    blocks = [block for block in taken if isinstance(block, family)]
    for subnet in former:
        if isinstance(subnet, family) and subnets.holds(subnet) and not any(map(subnet.overlaps, blocks)):
            return subnet
    spans = sorted((int(block.network_address), block.num_addresses) for block in blocks)
    free = list(islice(_free(subnets, spans), _DRAW_FROM))
    if not free:
        raise LeaseError(
            f"out of subnets: every /{subnets.length} from {subnets.first} to {subnets.last} overlaps one of the "
            f"{len(blocks)} leases in the store; widen Network, SubnetMin or SubnetMax in the network config, or "
            f"delete the leases of nodes that are gone"
        )
    return family((rng.choice(free), subnets.length))


def _free(subnets: SubnetRange, blocks: Iterable[tuple[int, int]]) -> Iterator[int]:
    """First addresses of the free subnets in order; `blocks` are (first address, size), sorted."""
    step, at, last = subnets.step, int(subnets.first), int(subnets.last)
    for first, size in blocks:
        while at <= last and at + step <= first:
            yield at
            at += step
        if at < first + size:
            # on to the first subnet that begins behind the block
            at += -(-(first + size - at) // step) * step
    while at <= last:
        yield at
        at += step
