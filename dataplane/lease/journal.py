"""Owns how much the log says of what others do while a lease is kept: the store's troubles, peers' leases, our key.

Free of: the longer sentences (`texts`), and IO other than the log. Invariant: no store, however broken, and no peer,
however busy, gets more than some lines a second in the long run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta

from dataplane.errors import StoreError
from dataplane.lease import texts
from dataplane.lease.model import LeaseEvent
from dataplane.lease.ownership import Finding, Ownership
from dataplane.lease.retry import LogBudget, LogGate
from dataplane.lease.table import Rejection

log = logging.getLogger(__name__)


class Journal:
    """One keeper's. `store` is the store's name."""

    def __init__(self, store: str, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._gate = LogGate()
        self._rejection_lines = LogBudget(20, seconds=3.0)
        self._event_lines = LogBudget(200, seconds=0.1)
        self._events_unsaid = 0
        self.store_error = ""
        """The trouble with the store at this moment, empty when there is none."""

    def trouble(self, what: str, error: StoreError) -> None:
        self.store_error = str(error)
        if self._gate.passes(str(error), self._clock()):
            log.warning("%s: %s", what, error)

    def renewal_failed(self, error: StoreError) -> None:
        self.store_error = str(error)
        log.error("Error renewing lease (trying again in 1 min): %s", error)

    def fine(self) -> None:
        """The store has answered."""
        self.store_error = ""
        if self._gate.calm():
            log.info("The lease store %s answers again", self._store)

    def events(self, events: Sequence[LeaseEvent]) -> None:
        """A line for each, in flannel's words; in a storm of them a few lines a second, and how many were left out."""
        for line in texts.event_lines(events):
            if not self._event_lines.passes(self._clock()):
                self._events_unsaid += 1
                continue
            if self._events_unsaid:
                log.info("%d lines about other subnets were left out", self._events_unsaid)
                self._events_unsaid = 0
            log.info("%s", line)

    def rejections(self, rejections: Iterable[Rejection]) -> None:
        for rejection in rejections:
            if not rejection.again and self._rejection_lines.passes(self._clock()):
                log.warning("Lease %.80s is not obeyed: %s", rejection.key, rejection.reason)

    def finding(self, own: Ownership, finding: Finding) -> None:
        key, store, ip = own.text, self._store, own.attrs.node
        match finding:
            case Finding.GONE:
                log.error("Our lease %s is gone from %s (deleted or expired): putting it back", key, store)
            case Finding.FREED:
                log.warning("Our lease %s is free again in %s: putting it back", key, store)
            case Finding.TAKEN:
                log.error("%s", texts.taken(key, store, own.holder, ip))
            case Finding.TWIN:
                log.error("%s", texts.twin(key, store, ip))
            case Finding.ADOPTED:
                kind = "a reservation without expiry" if own.expires_at is None else "what the store brought back"
                log.warning("Our lease %s was written by others and names this node (%s): kept as %s", key, ip, kind)

    def renewed(self, own: Ownership) -> None:
        log.info("Lease renewed, new expiration: %s", self._wall_time(own.expires_at))

    def _wall_time(self, at: float | None) -> str:
        if at is None:
            return "never (a reservation)"
        return (datetime.now(UTC) + timedelta(seconds=at - self._clock())).strftime("%Y-%m-%d %H:%M:%S +0000 UTC")
