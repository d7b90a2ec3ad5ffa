"""Owns what this node believes about its own lease, and when it has to write it.

Free of: IO, clocks, logging; `now` is an argument (monotonic seconds). Invariant: a write that this file asks for can
only make the key where it is absent, or replace the very entry that it last knew to be this node's own.
"""

from __future__ import annotations

from enum import Enum

from dataplane.errors import LeaseInvalid
from dataplane.lease.model import LEASE_TTL, Lease, LeaseAttrs, LeaseKey
from dataplane.lease.store import Deleted, Entry

_LEAST_TTL_BEFORE_RENEWAL = 60.0
"""Whatever the margin, a fresh lease rests that long: a margin near the TTL must not become a storm of writes."""


class Standing(Enum):
    """How our key stands in the store, as far as we know."""

    HELD = "held"
    """By us, or by an entry that we adopted."""
    FREE = "free"
    """Deleted or expired: it has to be put back."""
    TAKEN = "taken"
    """The entry names another node, or nothing that can be read: we are fenced and never write over it."""
    TWIN = "twin"
    """The entry names our public IP, has a TTL, and is not our write: another live daemon runs at our address."""


class Finding(Enum):
    """What a fact about our key has changed; worth a line in the log."""

    GONE = "gone"
    FREED = "freed"
    """It was another's, and is free again."""
    TAKEN = "taken"
    TWIN = "twin"
    ADOPTED = "adopted"
    """The entry is not our write, and ours all the same: a reservation, or what a store brought back from a backup."""


class Ownership:
    """Facts in (`observe`, `wrote`, `in_doubt`), the wish of this node (`change`); standing and the time of the next
    write out.

    The watch's echo of our own write, however late, changes nothing. TWIN lasts until the foreign entry is gone
    (deleted, or expired because its writer stopped) or this daemon is started again, which takes the entry over by its
    public IP; until then this daemon does not write, so that two daemons never fight over one key.
    """

    def __init__(
        self,
        entry: Entry,
        key: LeaseKey,
        attrs: LeaseAttrs,
        *,
        renew_margin: float,
        written: float,
        inherited: bool = False,
    ) -> None:
        """`inherited`: the entry is what a former daemon here knew of it, not what the store has just said."""
        self.key = key
        self.text = entry.key
        self.attrs = attrs
        """What our lease shall say; `lease` has what it says."""
        self.value = attrs.encode()
        self.standing = Standing.HELD
        self.holder = ""
        """Who has our key while it is TAKEN: a public IP, or what is wrong with the value."""
        self.expires_at: float | None = None
        """When the TTL of our last write runs out; None for a reservation."""
        self.revision = 0
        """The newest that is known about our key."""
        self._margin = min(renew_margin, LEASE_TTL - _LEAST_TTL_BEFORE_RENEWAL)
        self.entry = entry
        """Ours, as we last held it; `lease` is what it says."""
        self._said = attrs
        self._doubts: dict[bytes, float] = {}
        self._rewrite = False
        self._inherited = inherited
        self.wrote(entry, written)

    @property
    def lease(self) -> Lease:
        """Our lease as we last held it."""
        entry = self.entry
        return Lease(self.key, self._said, entry.create_revision, entry.mod_revision, entry.reserved)

    @property
    def expected(self) -> Entry | None:
        """What the next write replaces: our entry, or None for an absent key."""
        return self.entry if self.standing is Standing.HELD else None

    @property
    def ttl(self) -> int | None:
        """TTL of the next write: a reservation stays one."""
        return None if self.standing is Standing.HELD and self.entry.reserved else LEASE_TTL

    @property
    def changing(self) -> bool:
        """We hold our key, and its value is not yet what it shall be."""
        return self.standing is Standing.HELD and self._rewrite

    def due(self) -> float | None:
        """When the next write is to be made, -inf for at once; None while there is none to make."""
        if self.standing is Standing.FREE or self.changing:
            return float("-inf")
        if self.standing is Standing.HELD and self.expires_at is not None:
            return self.expires_at - self._margin
        return None

    def change(self, attrs: LeaseAttrs) -> None:
        """Our lease shall say `attrs` from now on. Until that is written, what names our former address is ours too."""
        self.attrs, self.value = attrs, attrs.encode()
        self._rewrite = self._said != attrs

    def wrote(self, entry: Entry, started: float) -> None:
        """Our write that was begun at `started` succeeded."""
        self._hold(entry, None if entry.reserved else started + LEASE_TTL)

    def in_doubt(self, value: bytes, started: float) -> None:
        """Our write of `value` that was begun at `started` failed, and the store may have made it all the same."""
        self._doubts[value] = started

    def observe(self, fact: Entry | Deleted, now: float, *, certain: bool) -> Finding | None:
        """Follow what the store says about our key.

        `certain`: it is so at this moment, from a snapshot that no write of ours has overtaken. Otherwise it comes from
        a watch, and is old if its revision is not above what is known.
        """
        revision = fact.revision if isinstance(fact, Deleted) else fact.mod_revision
        known = self.revision
        if revision <= known and not certain:
            return None
        inherited, self._inherited = self._inherited, self._inherited and not certain
        if self.standing is Standing.HELD and fact == self.entry:
            return None
        self.revision = revision
        if isinstance(fact, Deleted):
            return self._gone()
        try:
            attrs = LeaseAttrs.decode(fact.value)
        except LeaseInvalid as error:
            return self._taken(str(error))
        ours = (self.attrs, self._said, *(LeaseAttrs.decode(value) for value in self._doubts))
        if not any(attrs.is_at(known.public_ip, known.public_ipv6) for known in ours):
            return self._taken(str(attrs.node))
        # An entry that is certain and older than what was known: the store lives in another history, from a backup. One
        # that a former daemon here may have written is ours, as a start with a store would take it.
        return self._named(fact, now, restored=revision <= known or inherited)

    def _gone(self) -> Finding | None:
        before, self.standing = self.standing, Standing.FREE
        if before is Standing.FREE:
            return None
        return Finding.GONE if before is Standing.HELD else Finding.FREED

    def _taken(self, holder: str) -> Finding | None:
        same = self.standing is Standing.TAKEN and self.holder == holder
        self.standing, self.holder = Standing.TAKEN, holder
        return None if same else Finding.TAKEN

    def _named(self, entry: Entry, now: float, *, restored: bool) -> Finding | None:
        """The entry names our public IP, and is not our last write."""
        doubt = self._doubts.get(entry.value)
        if doubt is not None:
            self._hold(entry, None if entry.reserved else doubt + LEASE_TTL)
            return None
        if entry.reserved:
            # rewritten at the step from lease to reservation only: else two daemons at one address would rewrite each
            # other's for ever
            wanted = self._rewrite or not self.entry.reserved
            self._hold(entry, None)
            self._rewrite = self._rewrite and wanted
            return Finding.ADOPTED
        if restored and self.standing is not Standing.TWIN:
            self._hold(entry, now)
            return Finding.ADOPTED
        before, self.standing = self.standing, Standing.TWIN
        return None if before is Standing.TWIN else Finding.TWIN

    def _hold(self, entry: Entry, expires_at: float | None) -> None:
        self.standing = Standing.HELD
        self.revision = entry.mod_revision
        self.expires_at = expires_at
        self.entry = entry
        self._said = LeaseAttrs.decode(entry.value)
        self._doubts.clear()
        self._rewrite = self._said != self.attrs
