"""Owns what every lease store must do, and the records that cross that boundary.

Free of: IO. The conformance contract, which tests/lease/test_store_conformance.py holds against every store:

* One revision counter for the store; each successful write raises it, and a key's `mod_revision` is the
  revision of its last write, `create_revision` of the write that made it.
* `create` succeeds only where the key is absent; of any number of concurrent callers exactly one wins.
* `replace` and `delete` succeed only where the key's `mod_revision` and value are the expected ones: a store that was
  wiped counts its revisions anew, so that the number alone could mean another's write.
* A key written with a TTL is gone, and its deletion is seen by every watch, at most two seconds after the TTL has
  passed without another write; a key written without one (`ttl=None`) stays, and its entries say `reserved`.
* `snapshot` returns every entry as of one revision, however many there are, and never an older state than was true
  when it was called.
* A `None` or False is certain: the write did not happen. A store that cannot know whether it did raises
  StoreUnavailable, and never writes again by itself.
* `watch(after)` yields every change with a revision above `after`, once, in order of revision, until it is
  closed; changes of one transaction arrive in one batch. If the store no longer holds that history it raises
  HistoryGone; if the store cannot be reached it raises StoreUnavailable, and a new watch may be opened from the
  last batch's revision. An `after` above the store's newest revision is another history: HistoryGone.
* After `close`, calls and open watches end with StoreUnavailable.
* A store never interprets a lease value: any bytes can be stored and come back as they were.
* Every other failure is StoreUnavailable, StoreDenied or StoreError, with the endpoint in its text.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Entry:
    """One lease as it stands in the store, uninterpreted. `key` is the part behind `<prefix>/subnets/`."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    reserved: bool = False


@dataclass(frozen=True, slots=True)
class Deleted:
    """A lease went away at `revision`: removed or expired."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every entry as of `revision`."""

    revision: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes in order; resume a watch from `revision`. Empty where the store only reports its progress."""

    revision: int
    changes: tuple[Entry | Deleted, ...]


class LeaseStore(Protocol):
    """One network: its config and its leases. See the contract at the top of this file."""

    @property
    def name(self) -> str:
        """For logs and errors: which store this is, without secrets."""

    async def read_config(self) -> bytes | None:
        """The net-conf JSON, or None where nobody has written one."""

    async def write_config(self, text: bytes) -> None:
        """Put the net-conf JSON in place of whatever is there."""

    async def snapshot(self) -> Snapshot:
        """Every entry, as no earlier than the moment of the call."""

    def watch(self, after: int) -> AsyncGenerator[Batch, None]:
        """Changes above revision `after`, until the generator is closed."""

    async def create(self, key: str, value: bytes, ttl: int | None) -> Entry | None:
        """Put a lease for `ttl` seconds if the key is absent; None if it is there already."""

    async def replace(self, key: str, value: bytes, ttl: int | None, *, expected: Entry) -> Entry | None:
        """Put a lease for a new `ttl` if it stands as `expected`; None if it does not."""

    async def delete(self, key: str, *, expected: Entry) -> bool:
        """Remove a lease if it stands as `expected`."""

    async def close(self) -> None:
        """Release connections; the store is not used afterwards. Never raises."""
