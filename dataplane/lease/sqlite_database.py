"""Owns the transactions of the embedded lease store: one SQLite file, and what stands in it.

Free of: asyncio; each call blocks, and all come on one thread. Invariants: one write transaction gives each of its
changes a revision of its own and leaves a history row for it, so a reader sees whole transactions; a database appears
complete or not at all.

Time: deadlines are CLOCK_BOOTTIME (it goes on in suspend and knows no jumps) and count for one boot id only; the
first open after a reboot starts every TTL anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataplane.errors import HistoryGone, StoreDenied, StoreError, StoreUnavailable
from dataplane.lease.store import Batch, Deleted, Entry, Snapshot

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_APPLICATION_ID = 0x4C6F6465  # "Lode", in the database's header: nobody else's database is taken for ours
_SCHEMA_VERSION = 1
_HEADER = f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {_SCHEMA_VERSION};"
_SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE meta (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    revision INTEGER NOT NULL,  -- of the last write
    compacted INTEGER NOT NULL, -- history holds this revision and later ones
    boot_id TEXT NOT NULL,      -- the boot in which the deadlines count
    config BLOB
);
CREATE TABLE leases (
    key TEXT PRIMARY KEY,
    value BLOB NOT NULL,
    create_revision INTEGER NOT NULL,
    mod_revision INTEGER NOT NULL,
    ttl INTEGER,  -- seconds; NULL: reserved
    deadline REAL -- seconds of CLOCK_BOOTTIME; NULL: reserved
) WITHOUT ROWID;
CREATE INDEX leases_by_deadline ON leases (deadline);
CREATE TABLE history (
    revision INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    value BLOB, -- NULL: deleted
    create_revision INTEGER NOT NULL,
    reserved INTEGER NOT NULL
);
INSERT INTO meta VALUES (1, 0, 0, '', NULL);
"""

_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}
_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_REFUSED = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_CANTOPEN}


@dataclass(frozen=True, slots=True)
class Look:
    """What a watch found, and how long it may sleep until a lease expires (infinite where none can)."""

    batch: Batch
    seconds_to_deadline: float


class Database:
    """The transactions, all of them called on one thread."""

    def __init__(self, path: Path, history: int, busy_timeout: float) -> None:
        self.path = path
        self.notify_path = path.with_name(f"{path.name}-notify")
        self._history = history
        self._busy_timeout = busy_timeout
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None

    # --- operations -------------------------------------------------------------------------------------------

    def read_config(self) -> bytes | None:
        with self._reading() as db:
            config: bytes | None = db.execute("SELECT config FROM meta").fetchone()[0]
            return config

    def write_config(self, text: bytes) -> None:
        with self._writing() as db:
            _next_revision(db)
            db.execute("UPDATE meta SET config = ?", (text,))

    def snapshot(self) -> Snapshot:
        self._expire_if_due()
        with self._reading() as db:
            rows = db.execute("SELECT key, value, create_revision, mod_revision, ttl IS NULL FROM leases ORDER BY key")
            entries = tuple(Entry(key, value, made, changed, bool(free)) for key, value, made, changed, free in rows)
            return Snapshot(_meta(db, "revision"), entries)

    def create(self, key: str, value: bytes, ttl: int | None) -> Entry | None:
        with self._writing() as db:
            if _find(db, key) is not None:
                return None
            return _put(db, key, value, ttl, create_revision=None)

    def replace(self, key: str, value: bytes, ttl: int | None, expected: Entry) -> Entry | None:
        with self._writing() as db:
            found = _find(db, key)
            if found is None or not _same_write(found, expected):
                return None
            return _put(db, key, value, ttl, create_revision=found.create_revision)

    def delete(self, key: str, expected: Entry) -> bool:
        with self._writing() as db:
            found = _find(db, key)
            if found is None or not _same_write(found, expected):
                return False
            _remove(db, key)
            return True

    def compact(self, revision: int) -> None:
        with self._writing() as db:
            newest = _meta(db, "revision")
            if revision > newest:
                raise StoreError(f"lease database {self.path}: revision {revision} lies in the future of {newest}")
            _forget(db, revision)

    def changes(self, after: int) -> Look:
        """The changes above `after`. Raises HistoryGone, also where the store is younger than `after`: another
        database stands in its place."""
        self._expire_if_due()
        with self._reading() as db:
            revision, compacted = _meta(db, "revision"), _meta(db, "compacted")
            if after + 1 < compacted or after > revision:
                raise HistoryGone(max(compacted, 1))
            rows = db.execute(
                "SELECT revision, key, value, create_revision, reserved FROM history "
                "WHERE revision > ? ORDER BY revision",
                (after,),
            )
            changes = tuple(
                Deleted(key, at) if value is None else Entry(key, value, made, at, bool(reserved))
                for at, key, value, made, reserved in rows
            )
            deadline = db.execute("SELECT min(deadline) FROM leases").fetchone()[0]
        seconds = float("inf") if deadline is None else max(0.0, deadline - _now())
        return Look(Batch(revision, changes), seconds)

    # --- connection -------------------------------------------------------------------------------------------

    def connect(self) -> None:
        with self._translated():
            self._make_file()
            status = self.path.stat()
            connection = sqlite3.connect(
                f"{self.path.as_uri()}?mode=rw", uri=True, timeout=self._busy_timeout, isolation_level=None
            )
            try:
                self._adopt(connection)
            except BaseException:
                connection.close()
                raise
            self._connection, self._inode = connection, (status.st_dev, status.st_ino)

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _make_file(self) -> None:
        """Put a complete database in place unless there is one; the lock lets one of many processes do it."""
        if self.path.exists():
            return
        self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with open(os.open(self.notify_path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.path.exists():
                return
            draft = self.path.with_name(f"{self.path.name}.new")
            # The WAL of a database that was removed would be replayed into the new one.
            for leftover in (draft, *(self.path.with_name(self.path.name + end) for end in ("-wal", "-shm"))):
                leftover.unlink(missing_ok=True)
            os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            with contextlib.closing(sqlite3.connect(draft)) as db:
                db.executescript(_HEADER + _SCHEMA)
            draft.rename(self.path)

    def _adopt(self, db: sqlite3.Connection) -> None:
        """Check that the database is ours and can be written; after a reboot start its TTLs anew."""
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if application != _APPLICATION_ID:
            raise StoreError(f"{self.path} is no lease database: name another file, or move this one away")
        if version != _SCHEMA_VERSION:
            raise StoreError(
                f"lease database {self.path} has format {version}, this daemon knows {_SCHEMA_VERSION}: "
                "upgrade the older of the two, or move the file away once every daemon is stopped"
            )
        db.execute("PRAGMA synchronous = FULL")  # a net-conf that was accepted survives a power cut
        boot_id = _BOOT_ID.read_text().strip()
        db.execute("BEGIN IMMEDIATE")
        with db:
            if db.execute("SELECT boot_id FROM meta").fetchone()[0] != boot_id:
                db.execute("UPDATE leases SET deadline = ? + ttl WHERE ttl IS NOT NULL", (_now(),))
                db.execute("UPDATE meta SET boot_id = ?", (boot_id,))

    def _connected(self) -> sqlite3.Connection:
        """The connection to the file that now bears our name: SQLite would go on with a removed one for ever."""
        try:
            status = self.path.stat()
            standing = (status.st_dev, status.st_ino)
        except FileNotFoundError:
            standing = None
        if self._connection is None or standing != self._inode:
            self.close()
            self.connect()
        assert self._connection is not None  # noqa: S101 - connect() sets it or raises
        return self._connection

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view of the store."""
        with self._translated():
            db = self._connected()
            db.execute("BEGIN")
            with db:
                yield db

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """The only writer of the machine, for as long as it lasts; what was due has expired before."""
        with self._translated():
            db = self._connected()
            db.execute("BEGIN IMMEDIATE")
            with db:
                before = _meta(db, "revision")
                due = db.execute("SELECT key FROM leases WHERE deadline <= ? ORDER BY deadline, key", (_now(),))
                for (key,) in due.fetchall():
                    _remove(db, key)
                yield db
                after = _meta(db, "revision")
                _forget(db, after - self._history)
        if after != before:
            touch(self.notify_path)

    def _expire_if_due(self) -> None:
        with self._reading() as db:
            due = db.execute("SELECT 1 FROM leases WHERE deadline <= ? LIMIT 1", (_now(),)).fetchone()
        if due:
            with self._writing():
                pass

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _store_error(self.path, error) from error
        except OSError as error:
            kind = StoreDenied if isinstance(error, PermissionError) else StoreError
            raise kind(f"lease database {self.path} cannot be used: {error.strerror} ({error.filename})") from error


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _meta(db: sqlite3.Connection, column: str) -> int:
    number: int = db.execute(f"SELECT {column} FROM meta").fetchone()[0]  # noqa: S608 - a column of ours
    return number


def _next_revision(db: sqlite3.Connection) -> int:
    db.execute("UPDATE meta SET revision = revision + 1")
    return _meta(db, "revision")


def _find(db: sqlite3.Connection, key: str) -> Entry | None:
    query = "SELECT value, create_revision, mod_revision, ttl IS NULL FROM leases WHERE key = ?"
    for value, made, changed, free in db.execute(query, (key,)):
        return Entry(key, value, made, changed, bool(free))
    return None


def _same_write(found: Entry, expected: Entry) -> bool:
    return (found.mod_revision, found.value) == (expected.mod_revision, expected.value)


def _put(db: sqlite3.Connection, key: str, value: bytes, ttl: int | None, *, create_revision: int | None) -> Entry:
    revision = _next_revision(db)
    entry = Entry(key, value, create_revision or revision, revision, reserved=ttl is None)
    deadline = None if ttl is None else _now() + ttl
    made = entry.create_revision
    db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?)", (key, value, made, revision, ttl, deadline))
    db.execute("INSERT INTO history VALUES (?, ?, ?, ?, ?)", (revision, key, value, made, entry.reserved))
    return entry


def _remove(db: sqlite3.Connection, key: str) -> None:
    db.execute("DELETE FROM leases WHERE key = ?", (key,))
    db.execute("INSERT INTO history VALUES (?, ?, NULL, 0, 0)", (_next_revision(db), key))


def _forget(db: sqlite3.Connection, before: int) -> None:
    if before > _meta(db, "compacted"):
        db.execute("DELETE FROM history WHERE revision < ?", (before,))
        db.execute("UPDATE meta SET compacted = ?", (before,))


def touch(path: Path) -> None:
    """Wake the watches. A failure costs them the safety period and nothing else, and the commit stands."""
    with contextlib.suppress(OSError):
        try:
            os.utime(path)
        except FileNotFoundError:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))


def _store_error(path: Path, error: sqlite3.Error) -> StoreError:
    code = getattr(error, "sqlite_errorcode", 0)
    primary = code & 0xFF  # https://sqlite.org/rescode.html: the low byte is the primary code
    if primary in _LOCKED:
        return StoreUnavailable(f"lease database {path} is locked: another process holds a transaction for too long")
    if primary in _DAMAGED:
        return StoreError(
            f"{path} is damaged or no database ({error}): stop the daemons that use it and move it away; "
            "they make a new one and put their leases back"
        )
    if primary in _REFUSED:
        reason = "it is a directory" if path.is_dir() else str(error)
        return StoreDenied(
            f"lease database {path} cannot be opened for writing: {reason}; check owner and mode of file and directory"
        )
    return StoreError(f"lease database {path}: {error}")
