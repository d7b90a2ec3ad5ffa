"""The contract at the top of dataplane/lease/store.py, held against every store there is."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from dataplane.errors import HistoryGone, StoreUnavailable
from dataplane.lease.etcd import EtcdStore
from dataplane.lease.sqlite import SqliteStore
from dataplane.lease.store import Batch, Deleted, Entry, LeaseStore
from tests.etcd_server import EtcdServer

KEY = "10.5.52.0-24"
VALUE = b'{"PublicIP":"192.0.2.11","PublicIPv6":null}'
SOON = 30
"""Seconds after which a test that waits for something has failed."""

_prefixes = (f"/conformance/{number}" for number in itertools.count())


class Compactable(LeaseStore, Protocol):
    async def compact(self, revision: int) -> None: ...


Opener = Callable[[], Awaitable[Compactable]]


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("etcd", marks=pytest.mark.etcd)])
async def opener(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Opener]:
    """Opens further instances of one and the same store, as other daemons would."""
    prefix = next(_prefixes)
    async with AsyncExitStack() as stack:

        async def open_store() -> Compactable:
            store: Compactable
            if request.param == "sqlite":
                store = await SqliteStore.open(f"sqlite://{tmp_path}/leases.db")
            else:
                store = EtcdStore([request.getfixturevalue("etcd").url], prefix)
            stack.push_async_callback(store.close)
            return store

        yield open_store


@pytest.fixture
async def store(opener: Opener) -> Compactable:
    return await opener()


async def make(store: LeaseStore, key: str = KEY, value: bytes = VALUE, ttl: int | None = 600) -> Entry:
    entry = await store.create(key, value, ttl)
    assert entry is not None
    return entry


def watching(store: LeaseStore, after: int) -> aclosing[AsyncGenerator[Batch, None]]:
    """A watch that ends with the block and not with the next garbage collection."""
    return aclosing(store.watch(after))


async def changes_until(store: LeaseStore, after: int, count: int) -> list[Entry | Deleted]:
    """The first `count` changes above `after`; each batch must end above the one before."""
    found: list[Entry | Deleted] = []
    async with asyncio.timeout(SOON), watching(store, after) as batches:
        async for batch in batches:
            assert batch.revision > after
            after = batch.revision
            found += batch.changes
            if len(found) >= count:
                break
    assert len(found) == count
    return found


async def test_config_is_absent_then_written_then_replaced(opener: Opener) -> None:
    one, other = await opener(), await opener()
    assert await one.read_config() is None
    await one.write_config(b'{"Network":"10.5.0.0/16"}')
    assert await other.read_config() == b'{"Network":"10.5.0.0/16"}'
    await other.write_config(b"{}")
    assert await one.read_config() == b"{}"


async def test_each_write_raises_the_revision(store: Compactable) -> None:
    before = (await store.snapshot()).revision
    made = await make(store)
    changed = await store.replace(KEY, b"2", 600, expected=made)
    assert changed is not None
    other = await make(store, "10.5.53.0-24")
    assert before < made.mod_revision < changed.mod_revision < other.mod_revision
    assert made == Entry(KEY, VALUE, made.mod_revision, made.mod_revision, reserved=False)
    assert changed == Entry(KEY, b"2", made.create_revision, changed.mod_revision, reserved=False)
    snapshot = await store.snapshot()
    assert snapshot.entries == (changed, other)
    assert snapshot.revision == other.mod_revision


async def test_a_key_made_anew_has_a_new_create_revision(store: Compactable) -> None:
    first = await make(store)
    assert await store.delete(KEY, expected=first)
    again = await make(store)
    assert again.create_revision == again.mod_revision > first.mod_revision


async def test_create_on_a_key_that_is_there_changes_nothing(store: Compactable) -> None:
    made = await make(store)
    before = await store.snapshot()
    assert await store.create(KEY, b"other", 600) is None
    assert await store.create(KEY, b"other", None) is None
    assert await store.snapshot() == before
    assert before.entries == (made,)


async def test_of_64_creators_exactly_one_wins(opener: Opener) -> None:
    stores = [await opener() for _ in range(8)]
    results = await asyncio.gather(*(stores[n % 8].create(KEY, b"%d" % n, 600) for n in range(64)))
    winners = [entry for entry in results if entry is not None]
    assert len(winners) == 1
    assert (await stores[0].snapshot()).entries == tuple(winners)


async def test_of_16_replacers_exactly_one_wins(opener: Opener) -> None:
    stores = [await opener() for _ in range(4)]
    made = await make(stores[0])
    calls = (stores[n % 4].replace(KEY, b"%d" % n, 600, expected=made) for n in range(16))
    winners = [entry for entry in await asyncio.gather(*calls) if entry is not None]
    assert len(winners) == 1
    assert (await stores[0].snapshot()).entries == tuple(winners)


async def test_replace_and_delete_want_the_expected_entry(store: Compactable) -> None:
    made = await make(store)
    before, after = (replace(made, mod_revision=made.mod_revision + step) for step in (-1, 1))
    for wrong in (before, after, replace(made, value=b"another's")):
        assert await store.replace(KEY, b"2", 600, expected=wrong) is None
        assert await store.delete(KEY, expected=wrong) is False
    assert (await store.snapshot()).entries == (made,)
    assert await store.delete(KEY, expected=made) is True
    assert await store.delete(KEY, expected=made) is False
    assert await store.replace(KEY, b"2", 600, expected=made) is None
    assert (await store.snapshot()).entries == ()


async def test_an_expired_lease_is_gone_and_every_watch_sees_it(opener: Opener) -> None:
    writer, watcher = await opener(), await opener()
    made = await make(writer, ttl=2)
    kept = await make(writer, "10.5.53.0-24")
    started = time.monotonic()
    seen = await asyncio.gather(
        changes_until(writer, kept.mod_revision, 1), changes_until(watcher, kept.mod_revision, 1)
    )
    assert time.monotonic() - started > 1  # it was there for its time
    for (change,) in seen:
        assert isinstance(change, Deleted)
        assert change.key == KEY
        assert change.revision > kept.mod_revision > made.mod_revision
    assert (await writer.snapshot()).entries == (kept,)


async def test_an_expired_key_can_be_created_again_without_any_watch(store: Compactable) -> None:
    made = await make(store, ttl=1)
    async with asyncio.timeout(SOON):
        while (again := await store.create(KEY, b"2", 600)) is None:  # noqa: ASYNC110 - without a watch, nobody wakes us
            await asyncio.sleep(0.1)
    gone, back = await changes_until(store, made.mod_revision, 2)
    assert isinstance(gone, Deleted)
    assert back == again


async def test_replace_starts_the_ttl_anew(store: Compactable) -> None:
    made = await make(store, ttl=2)
    renewed = await store.replace(KEY, VALUE, 600, expected=made)
    assert renewed is not None
    await asyncio.sleep(4.5)
    assert (await store.snapshot()).entries == (renewed,)


async def test_a_reservation_stays_and_says_so(store: Compactable) -> None:
    await make(store, "10.5.53.0-24", ttl=1)
    reserved = await make(store, ttl=None)
    assert reserved.reserved
    (expired,) = await changes_until(store, reserved.mod_revision, 1)
    assert isinstance(expired, Deleted)
    assert (await store.snapshot()).entries == (reserved,)
    leased = await store.replace(KEY, VALUE, 600, expected=reserved)
    assert leased is not None
    assert not leased.reserved
    back = await store.replace(KEY, VALUE, None, expected=leased)
    assert back is not None
    assert back.reserved
    assert await changes_until(store, expired.revision, 2) == [leased, back]


@pytest.mark.parametrize("key", [KEY, "10.5.52.0-24&fd00:5:52::-64", "0.0.0.0-0&fd00:5:52::-64", "notes"])
async def test_any_key_comes_back_as_it_is(store: Compactable, key: str) -> None:
    made = await make(store, key)
    assert (await store.snapshot()).entries == (made,)
    renewed = await store.replace(key, b"2", 600, expected=made)
    assert renewed is not None
    assert await store.delete(key, expected=renewed)
    gone = Deleted(key, renewed.mod_revision + 1)
    assert await changes_until(store, made.mod_revision - 1, 3) == [made, renewed, gone]


@pytest.mark.parametrize("value", [b"", b"\0", bytes(range(256)), b"\xff\xfe{", b'{"PublicIP":', b"x" * 100_000])
async def test_any_bytes_are_a_value(store: Compactable, value: bytes) -> None:
    made = await make(store, value=value)
    assert made.value == value
    assert (await store.snapshot()).entries == (made,)
    assert await changes_until(store, made.mod_revision - 1, 1) == [made]


async def test_a_snapshot_of_more_than_a_page_is_one_revision(opener: Opener) -> None:
    """A writer moves a marker from the last key to the first and back, so a torn snapshot has none or two."""
    store, writer = await opener(), await opener()
    count = 2100
    keys = [f"10.{n // 256}.{n % 256}.0-24" for n in range(count)]
    for start in range(0, count, 100):
        await asyncio.gather(*(make(store, key) for key in keys[start : start + 100]))
    first, last = "10.0.0.0-23", "11.0.0.0-24"
    marker = await make(writer, first)

    async def move() -> None:
        here, entry = first, marker
        while True:
            there = last if here == first else first
            moved = await make(writer, there)  # for one revision there are two, never none
            assert await writer.delete(here, expected=entry)
            here, entry = there, moved

    async with asyncio.timeout(60):
        moving = asyncio.ensure_future(move())
        try:
            revisions = set()
            for _ in range(10):
                snapshot = await store.snapshot()
                markers = [entry for entry in snapshot.entries if entry.key in (first, last)]
                assert len(markers) in (1, 2)
                assert len(snapshot.entries) == count + len(markers)
                newest = max(entry.mod_revision for entry in snapshot.entries)
                # a marker that is alone was left behind by the deletion of the other
                assert snapshot.revision == newest + (len(markers) == 1 and newest != marker.mod_revision)
                revisions.add(snapshot.revision)
            assert len(revisions) > 1
        finally:
            moving.cancel()
            with suppress(asyncio.CancelledError):
                await moving


async def test_a_watch_from_a_revision_catches_up_after_a_gap(store: Compactable) -> None:
    base = await store.snapshot()
    one = await make(store)
    two = await store.replace(KEY, b"2", 600, expected=one)
    assert two is not None
    assert await store.delete(KEY, expected=two)
    three = await make(store, "10.5.53.0-24")
    gone = Deleted(KEY, two.mod_revision + 1)
    assert await changes_until(store, base.revision, 4) == [one, two, gone, three]
    assert await changes_until(store, one.mod_revision, 3) == [two, gone, three]
    assert await changes_until(store, gone.revision, 1) == [three]


async def test_a_watch_from_its_last_batch_loses_and_repeats_nothing(opener: Opener) -> None:
    """Two nodes that start in the same instant: a watch begins while the other writes, ends at any batch, goes on."""
    writer, watcher = await opener(), await opener()
    base = await watcher.snapshot()
    count = 300

    async def write() -> list[Entry]:
        return [await make(writer, f"10.{n // 256}.{n % 256}.0-24") for n in range(count)]

    writing = asyncio.ensure_future(write())
    seen: list[Entry | Deleted] = []
    after = base.revision
    async with asyncio.timeout(60):
        while len(seen) < count:
            async with watching(watcher, after) as batches:
                batch = await anext(batches)
                after = batch.revision
                seen += batch.changes
    assert seen == await writing


async def test_more_than_a_thousand_changes_come_in_order(store: Compactable) -> None:
    base = (await store.snapshot()).revision
    entry = await make(store)
    expected: list[Entry | Deleted] = [entry]
    for n in range(1500):
        changed = await store.replace(KEY, b"%d" % n, None, expected=entry)
        assert changed is not None
        entry = changed
        expected.append(changed)
    assert await changes_until(store, base, len(expected)) == expected


async def test_config_is_no_lease_change(store: Compactable) -> None:
    base = (await store.snapshot()).revision
    await store.write_config(b"{}")
    made = await make(store)
    assert await changes_until(store, base, 1) == [made]


async def test_two_watches_see_the_same(opener: Opener) -> None:
    one, other = await opener(), await opener()
    base = (await one.snapshot()).revision
    watches = [asyncio.ensure_future(changes_until(store, base, 3)) for store in (one, one, other)]
    await asyncio.sleep(0.2)
    made = [await make(other, f"10.5.{n}.0-24") for n in range(3)]
    assert await asyncio.gather(*watches) == [made, made, made]


async def test_compacted_history_is_gone(store: Compactable) -> None:
    base = (await store.snapshot()).revision
    one = await make(store)
    two = await store.replace(KEY, b"2", 600, expected=one)
    assert two is not None
    three = await store.replace(KEY, b"3", 600, expected=two)
    assert three is not None
    await store.compact(three.mod_revision)
    for after in (base, one.mod_revision):
        with pytest.raises(HistoryGone) as gone:
            await changes_until(store, after, 1)
        assert gone.value.revision == three.mod_revision
    # what the compaction kept is still to be had, and so is the present
    assert await changes_until(store, two.mod_revision, 1) == [three]
    assert (await store.snapshot()).entries == (three,)


async def test_a_store_younger_than_the_watch_has_lost_its_history(store: Compactable) -> None:
    newest = (await make(store)).mod_revision
    with pytest.raises(HistoryGone):
        await changes_until(store, newest + 1000, 1)


async def test_closing_ends_a_watch_and_every_call(opener: Opener) -> None:
    store = await opener()
    base = (await store.snapshot()).revision
    watch = asyncio.ensure_future(changes_until(store, base, 1))
    await asyncio.sleep(0.2)
    assert not watch.done()
    await store.close()
    with pytest.raises(StoreUnavailable):
        await watch
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.snapshot()
    await store.close()


async def test_a_cancelled_watch_leaves_the_store_usable(store: Compactable) -> None:
    base = (await store.snapshot()).revision
    watch = asyncio.ensure_future(changes_until(store, base, 1))
    await asyncio.sleep(0.2)
    watch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watch
    made = await make(store)
    assert await changes_until(store, base, 1) == [made]


async def test_the_name_says_where(store: Compactable, tmp_path: Path) -> None:
    assert str(tmp_path) in store.name or "127.0.0.1" in store.name
