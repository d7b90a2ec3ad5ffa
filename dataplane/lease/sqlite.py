"""Owns the embedded lease store: one SQLite file that many daemons on one machine share.

Free of: the meaning of lease values; the transactions (`sqlite_database`). Invariant: the database is touched by one
thread of the store's own.

Waking watches: a writer touches `<database>-notify` after its commit, and inotify wakes everyone who watches. The
database itself cannot serve for that: its WAL is written before the commit is visible. A writer that is killed
between commit and touch is made good by a look at the revision every `safety_period`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import struct
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, TypeVarTuple
from urllib.parse import unquote, urlsplit

from dataplane.errors import ConfigError, StoreUnavailable
from dataplane.lease.sqlite_database import Database, touch
from dataplane.lease.store import Batch, Entry, Snapshot

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class SqliteStore:
    """A LeaseStore in one file. Made by `open`; every database call runs on one thread of the store's own."""

    def __init__(self, database: Database, executor: ThreadPoolExecutor, safety_period: float) -> None:
        self._database = database
        self._executor = executor
        self._safety_period = safety_period
        self._notices = _Notices(database.notify_path)
        self._closed = False

    @classmethod
    async def open(
        cls, url: str, *, safety_period: float = 2.0, history: int = 10_000, busy_timeout: float = 5.0
    ) -> SqliteStore:
        """Open or create the database at `sqlite:///path` or a plain path.

        `safety_period`: seconds after which a watch looks even if nobody woke it; the two seconds of the store
        contract bound it, and a test that must prove the wake-up itself makes it long. `history`: how many revisions
        are kept for watches. `busy_timeout`: seconds to wait for another process's transaction.
        Raises ConfigError for a URL that names no file, StoreError for a file that cannot be used.
        """
        database = Database(_path_of(url), history, busy_timeout)
        store = cls(database, ThreadPoolExecutor(1, thread_name_prefix="lease-store"), safety_period)
        try:
            await store._call(database.connect)
        except BaseException:
            await store.close()
            raise
        return store

    @property
    def name(self) -> str:
        return f"lease database {self._database.path}"

    async def read_config(self) -> bytes | None:
        return await self._call(self._database.read_config)

    async def write_config(self, text: bytes) -> None:
        await self._call(self._database.write_config, text)

    async def snapshot(self) -> Snapshot:
        return await self._call(self._database.snapshot)

    async def create(self, key: str, value: bytes, ttl: int | None) -> Entry | None:
        return await self._call(self._database.create, key, value, ttl)

    async def replace(self, key: str, value: bytes, ttl: int | None, *, expected: Entry) -> Entry | None:
        return await self._call(self._database.replace, key, value, ttl, expected)

    async def delete(self, key: str, *, expected: Entry) -> bool:
        return await self._call(self._database.delete, key, expected)

    async def compact(self, revision: int) -> None:
        """Forget the history before `revision`, as etcd's compaction does."""
        await self._call(self._database.compact, revision)

    async def watch(self, after: int) -> AsyncGenerator[Batch, None]:
        with self._notices.subscribed() as noticed:
            while True:
                # cleared before the look: what is written during the look wakes the wait after it
                noticed.clear()
                look = await self._call(self._database.changes, after)
                if look.batch.revision > after:
                    after = look.batch.revision
                    yield look.batch
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(self._safety_period, look.seconds_to_deadline)):
                        await noticed.wait()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._notices.close()
        closing = asyncio.get_running_loop().run_in_executor(self._executor, self._database.close)
        self._executor.shutdown(wait=False)
        await closing

    async def _call(self, operation: Callable[[*Ts], T], *arguments: *Ts) -> T:
        if self._closed:
            raise StoreUnavailable(f"{self.name} was closed by this process")
        return await asyncio.get_running_loop().run_in_executor(self._executor, operation, *arguments)


class _Notices:
    """One inotify descriptor for all watches of a store, made with the first of them.

    Where the kernel gives none (fs.inotify.max_user_instances), the watches live by their safety period.
    """

    _IN_ATTRIB, _IN_IGNORED = 0x4, 0x8000  # linux/inotify.h
    _EVENT = struct.Struct("iIII")  # struct inotify_event: wd, mask, cookie, len; a watch on a file brings no name

    def __init__(self, path: Path) -> None:
        self._path = path
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = -1
        self._subscribers: set[asyncio.Event] = set()

    @contextlib.contextmanager
    def subscribed(self) -> Iterator[asyncio.Event]:
        """An event that is set after each commit of any process."""
        event = asyncio.Event()
        self._subscribers.add(event)
        if self._fd < 0:
            self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if self._fd >= 0:
                self._arm()
                asyncio.get_running_loop().add_reader(self._fd, self._wake)
        try:
            yield event
        finally:
            self._subscribers.discard(event)

    def close(self) -> None:
        """Wake every watch for the last time."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        for event in self._subscribers:
            event.set()

    def _arm(self) -> None:
        touch(self._path)
        self._libc.inotify_add_watch(self._fd, os.fsencode(self._path), self._IN_ATTRIB)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            events = os.read(self._fd, 256 * self._EVENT.size)
            if any(mask & self._IN_IGNORED for _, mask, _, _ in self._EVENT.iter_unpack(events)):
                self._arm()  # the file was removed, and the watch with it
        for event in self._subscribers:
            event.set()


def _path_of(url: str) -> Path:
    if "://" not in url:
        path = url
    else:
        parts = urlsplit(url)
        if parts.scheme != "sqlite" or parts.netloc or parts.query or parts.fragment:
            raise ConfigError(f"lease store {url!r} is not of the form sqlite:///path/to/leases.db")
        path = unquote(parts.path)
    if not path or path.endswith("/"):
        raise ConfigError(f"lease store {url!r} names no file: write sqlite:///path/to/leases.db")
    return Path(path).absolute()
