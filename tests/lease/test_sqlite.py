"""What only the embedded store has: one file, many processes, kills, reboots, damage. The rest: conformance."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

from dataplane.errors import ConfigError, HistoryGone, StoreError, StoreUnavailable
from dataplane.lease.sqlite import SqliteStore
from dataplane.lease.store import Deleted, Entry
from tests.lease.test_store_conformance import KEY, SOON, changes_until, make, watching

HOUR = 3600.0
NOBODY = 65534

CREATOR = """
import asyncio, sys
from dataplane.lease.sqlite import SqliteStore
async def main():
    sys.stdin.readline()
    store = await SqliteStore.open(sys.argv[1])
    won = await store.create("10.5.52.0-24", sys.argv[2].encode(), 600)
    own = await store.create(f"10.6.{sys.argv[2]}.0-24", b"", None)
    await store.close()
    print("won" if won else "lost", "own" if own else "none")
asyncio.run(main())
"""

WRITER = """
import asyncio, sys
from dataplane.lease.sqlite import SqliteStore
async def main():
    store = await SqliteStore.open(sys.argv[1])
    entry = (await store.snapshot()).entries[0]
    print("ready", flush=True)
    while True:
        entry = await store.replace(entry.key, entry.value + b".", 600, expected=entry)
        await store.create("10.9.0.0-24", b"", 600)
        other = [e for e in (await store.snapshot()).entries if e.key == "10.9.0.0-24"]
        await store.delete("10.9.0.0-24", expected=other[0])
asyncio.run(main())
"""

INTRUDER = """
import asyncio, os, sys
from dataplane.errors import StoreDenied
from dataplane.lease.sqlite import SqliteStore
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
async def main():
    try:
        await SqliteStore.open(sys.argv[1])
    except StoreDenied as error:
        print("denied:", error)
asyncio.run(main())
"""

Opener = Callable[..., Awaitable[SqliteStore]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "leases.db"


@pytest.fixture
async def opened(path: Path) -> AsyncIterator[Opener]:
    stores: list[SqliteStore] = []

    async def open_store(**options: Any) -> SqliteStore:
        stores.append(await SqliteStore.open(f"sqlite://{path}", **options))
        return stores[-1]

    yield open_store
    for store in stores:
        await store.close()


def python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def sql(path: Path, statement: str) -> list[Any]:
    """Look at the file, or change it, behind the store's back."""
    with closing(sqlite3.connect(path, timeout=SOON)) as db, db:
        return db.execute(statement).fetchall()


def test_of_many_processes_that_make_the_file_at_once_one_wins(path: Path) -> None:
    count = 12
    creators = [python(CREATOR, path, n) for n in range(count)]
    for creator in creators:
        assert creator.stdin is not None
        creator.stdin.write("\n")
        creator.stdin.flush()
    outputs = [creator.communicate(timeout=60)[0].split() for creator in creators]
    assert sorted(output[0] for output in outputs) == ["lost"] * (count - 1) + ["won"]
    assert [output[1] for output in outputs] == ["own"] * count
    assert sql(path, "SELECT count(*), max(mod_revision) FROM leases") == [(count + 1, count + 1)]
    assert sql(path, "SELECT revision FROM meta") == [(count + 1,)]


async def test_the_file_is_private_and_its_directory_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "leases.db"
    store = await SqliteStore.open(str(path))
    await make(store)
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    await store.close()
    assert modes == dict.fromkeys(("leases.db", "leases.db-notify", "leases.db-wal", "leases.db-shm"), 0o600)
    assert path.parent.stat().st_mode & 0o777 == 0o755
    assert {file.name for file in path.parent.iterdir()} == {"leases.db", "leases.db-notify"}


@pytest.mark.parametrize(
    "url", ["sqlite://host/leases.db", "sqlite:///", "sqlite://", "sqlite:///a?mode=ro", "", "postgres:///x", "/a/dir/"]
)
async def test_a_url_that_names_no_file_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match="sqlite:///path"):
        await SqliteStore.open(url)


async def test_a_url_is_unquoted_and_odd_names_work(tmp_path: Path) -> None:
    store = await SqliteStore.open(f"sqlite://{tmp_path}/a%20b%3F%23.db")
    await store.close()
    assert (tmp_path / "a b?#.db").is_file()


async def test_entries_survive_a_close(opened: Opener) -> None:
    first = await opened()
    await first.write_config(b"{}")
    made = await make(first)
    await first.close()
    again = await opened()
    assert (await again.snapshot()).entries == (made,)
    assert await again.read_config() == b"{}"


async def test_a_write_of_another_process_wakes_a_watch(opened: Opener, path: Path) -> None:
    """With a safety period of an hour only inotify can do it."""
    store = await opened(safety_period=HOUR)
    base = (await store.snapshot()).revision
    watch = asyncio.ensure_future(changes_until(store, base, 2))
    await asyncio.sleep(0.3)
    writer = python(CREATOR, path, 1)
    await asyncio.to_thread(writer.communicate, "\n", 60)
    assert [change.key for change in await watch] == [KEY, "10.6.1.0-24"]


async def test_a_removed_notify_file_is_made_anew(opened: Opener, path: Path) -> None:
    store, writer = await opened(safety_period=HOUR), await opened()
    notify = path.with_name("leases.db-notify")
    base = (await store.snapshot()).revision
    watch = asyncio.ensure_future(changes_until(store, base, 1))
    await asyncio.sleep(0.2)
    notify.unlink()
    await asyncio.sleep(0.2)
    assert notify.exists()
    made = await make(writer)
    assert await watch == [made]


async def test_a_commit_without_a_touch_is_seen_by_the_safety_look(opened: Opener, path: Path) -> None:
    """What a writer leaves that is killed between its commit and its touch."""
    store = await opened(safety_period=0.2)
    made = await make(store)
    watch = asyncio.ensure_future(changes_until(store, made.mod_revision, 1))
    await asyncio.sleep(0.1)
    sql(path, "DELETE FROM leases")
    sql(path, "UPDATE meta SET revision = revision + 1")
    sql(path, f"INSERT INTO history VALUES ({made.mod_revision + 1}, '{KEY}', NULL, 0, 0)")
    assert await watch == [Deleted(KEY, made.mod_revision + 1)]


async def test_a_watch_sleeps_until_the_next_deadline(opened: Opener) -> None:
    """Nobody writes and the safety look is an hour away: the watch itself must expire the lease."""
    store = await opened(safety_period=HOUR)
    made = await make(store, ttl=1)
    assert await changes_until(store, made.mod_revision, 1) == [Deleted(KEY, made.mod_revision + 1)]


async def test_an_idle_watch_does_not_poll(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await opened(safety_period=HOUR)
    made = await make(store)
    looks = 0
    changes = store._database.changes

    def counted(after: int) -> Any:
        nonlocal looks
        looks += 1
        return changes(after)

    monkeypatch.setattr(store._database, "changes", counted)
    watch = asyncio.ensure_future(changes_until(store, made.mod_revision, 3))
    await asyncio.sleep(0.5)
    assert looks == 1
    for n in range(2):
        await make(store, f"10.6.{n}.0-24")
        await asyncio.sleep(0.5)
    assert looks <= 5  # a wake-up costs one look that finds something, and one that finds nothing
    await make(store, "10.6.2.0-24")
    await watch


async def test_leases_that_fall_due_together_come_in_one_batch(opened: Opener) -> None:
    store = await opened()
    for n in range(5):
        last = await make(store, f"10.5.{n}.0-24", ttl=1)
    await asyncio.sleep(1.2)
    async with asyncio.timeout(SOON), watching(store, last.mod_revision) as batches:
        batch = await anext(batches)
    assert [type(change) for change in batch.changes] == [Deleted] * 5
    assert batch.revision == last.mod_revision + 5


async def test_history_is_bounded(opened: Opener, path: Path) -> None:
    store = await opened(history=10)
    entry = await make(store)
    for _ in range(30):
        changed = await store.replace(KEY, b"", 600, expected=entry)
        assert changed is not None
        entry = changed
    assert sql(path, "SELECT count(*) FROM history")[0][0] <= 11
    with pytest.raises(HistoryGone):
        await changes_until(store, 1, 1)
    assert len(await changes_until(store, entry.mod_revision - 10, 10)) == 10


async def test_a_reboot_starts_each_ttl_anew(opened: Opener, path: Path) -> None:
    first = await opened()
    made = await make(first, ttl=600)
    kept = await make(first, "10.5.53.0-24", ttl=None)
    await first.close()
    # the clock of an earlier boot was far behind or far ahead; both must not matter
    for stale in (1.0, 1e12):
        sql(path, f"UPDATE leases SET deadline = {stale} WHERE ttl IS NOT NULL")
        sql(path, "UPDATE meta SET boot_id = 'an-earlier-boot'")
        store = await opened()
        assert (await store.snapshot()).entries == (made, kept)
        left = sql(path, "SELECT deadline FROM leases WHERE ttl")[0][0] - time.clock_gettime(time.CLOCK_BOOTTIME)
        assert 500 < left <= 600
        await store.close()
    # within one boot a deadline that has passed is one
    sql(path, "UPDATE leases SET deadline = 1 WHERE ttl IS NOT NULL")
    assert (await (await opened()).snapshot()).entries == (kept,)


async def test_the_wall_clock_is_not_asked(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await opened()
    made = await make(store, ttl=60)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert (await store.snapshot()).entries == (made,)


async def test_a_killed_writer_leaves_a_whole_database(opened: Opener, path: Path) -> None:
    store = await opened()
    await make(store, value=b"", ttl=600)
    dice = random.Random(7)
    after = (await store.snapshot()).revision
    for _ in range(12):
        writer = python(WRITER, path)
        assert writer.stdout is not None
        assert await asyncio.to_thread(writer.stdout.readline) == "ready\n"
        await asyncio.sleep(dice.uniform(0, 0.08))
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        assert sql(path, "PRAGMA integrity_check") == [("ok",)]
        snapshot = await store.snapshot()
        (entry,) = [entry for entry in snapshot.entries if entry.key == KEY]
        # every revision has one history row, and replaying them gives the snapshot
        replayed: dict[str, Entry] = {}
        if snapshot.revision > after:
            changes = await changes_until(store, after, snapshot.revision - after)
            for change in changes:
                if isinstance(change, Entry):
                    replayed[change.key] = change
                else:
                    replayed.pop(change.key)
            assert replayed.get("10.9.0.0-24") in (None, *snapshot.entries)
            assert replayed.get(KEY, entry) == entry
        for other in snapshot.entries:
            if other.key != KEY:
                await store.delete(other.key, expected=other)
        after = (await store.snapshot()).revision
    assert len(entry.value) > 0


async def test_a_removed_database_is_made_anew_and_its_history_is_gone(opened: Opener, path: Path) -> None:
    store, other = await opened(), await opened()
    await make(store)
    entry = (await make(store, "10.5.53.0-24")).mod_revision
    path.unlink()  # the WAL stays, as after a careless `rm leases.db`
    assert (await store.snapshot()).entries == ()
    made = await make(other, "10.7.0.0-24")
    assert (await store.snapshot()).entries == (made,)
    with pytest.raises(HistoryGone):
        await changes_until(store, entry, 1)
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]


async def test_files_that_are_no_lease_database(tmp_path: Path) -> None:
    text, empty, foreign, newer = (tmp_path / name for name in ("text", "empty", "foreign", "newer"))
    text.write_bytes(b"this is no database at all, but long enough to have a header of one hundred bytes" * 3)
    empty.touch()
    sql(foreign, "CREATE TABLE t (x)")
    store = await SqliteStore.open(str(newer))
    await store.close()
    sql(newer, "PRAGMA user_version = 9")
    words = {text: "move it away", empty: "no lease database", foreign: "no lease database", newer: "format 9"}
    for file, said in words.items():
        before = file.read_bytes()
        with pytest.raises(StoreError, match=said) as caught:
            await SqliteStore.open(str(file))
        assert str(file) in str(caught.value)
        assert file.read_bytes() == before
    with pytest.raises(StoreError, match="is a directory"):
        await SqliteStore.open(str(tmp_path))
    with pytest.raises(StoreError, match="text"):
        await SqliteStore.open(str(text / "leases.db"))


async def test_a_damaged_database_says_what_to_do(opened: Opener, path: Path) -> None:
    store = await opened()
    for n in range(200):
        await make(store, f"10.5.{n}.0-24", value=b"x" * 200)
    await store.close()
    data = bytearray(path.read_bytes())
    data[4096:] = random.Random(1).randbytes(len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"leases\.db is damaged.*move it away"):
        await (await opened()).snapshot()


def test_a_file_that_we_may_not_write_is_denied() -> None:
    """Root may write anything, so another user tries; python is loaded before the change of user."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = Path(directory) / "leases.db"

        def attempt() -> str:
            return python(INTRUDER, path, NOBODY).communicate(timeout=60)[0]

        assert f"denied: lease database {path} cannot be used: Permission denied" in attempt()
        asyncio.run(close_again(path))
        assert f"denied: lease database {path} cannot be opened" in attempt()
        path.chmod(0o444)
        assert f"denied: lease database {path} cannot be opened" in attempt()


async def close_again(path: Path) -> None:
    await (await SqliteStore.open(str(path))).close()


async def test_a_lock_that_is_held_too_long(opened: Opener, path: Path) -> None:
    store = await opened(busy_timeout=0.2)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match=rf"{path} is locked"):
            await make(store)
        assert (await store.snapshot()).entries == ()  # readers do not wait for writers
        other.execute("ROLLBACK")
    await make(store)


def test_everything_works_under_uvloop(path: Path) -> None:
    async def main() -> None:
        store = await SqliteStore.open(str(path), safety_period=HOUR)
        other = await SqliteStore.open(str(path))
        watch = asyncio.ensure_future(changes_until(store, 0, 1))
        await asyncio.sleep(0.2)
        made = await make(other)
        assert await watch == [made]
        await store.close()
        await other.close()

    uvloop.run(main())


async def test_nothing_is_left_open_after_close(path: Path) -> None:
    before = open_files()
    store = await SqliteStore.open(str(path))
    watch = asyncio.ensure_future(changes_until(store, 0, 1))
    await make(store)
    await watch
    assert open_files() != before
    await store.close()
    assert open_files() == before


def open_files() -> list[str]:
    """What this process holds open of databases and inotify."""
    targets = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of this very listing
            targets.append(str(descriptor.readlink()))
    return sorted(target for target in targets if "leases" in target or "inotify" in target)
