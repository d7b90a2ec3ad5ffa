"""Owns the lease store in etcd v3: flannel's keys, spoken over grpc.aio with the bytes of `etcd_wire`.

Free of: the meaning of lease values; one server's connection (`etcd_endpoint`); waiting and trying again (the caller
paces that). Invariant: a write whose outcome is unknown is never sent a second time.

etcd's client rules: https://etcd.io/docs/v3.4/learning/api/
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, NoReturn, TypeVar

from dataplane.errors import ConfigError, HistoryGone, StoreDenied, StoreError, StoreUnavailable
from dataplane.lease import etcd_endpoint
from dataplane.lease import etcd_wire as wire
from dataplane.lease.etcd_endpoint import Endpoint, Lost, TlsFiles, grpc
from dataplane.lease.store import Batch, Deleted, Entry, Snapshot

T = TypeVar("T")

PAGE = 1000
"""Leases per range request: with flannel's 300 bytes each, far below the 4 MiB that a message may have."""
SNAPSHOT_ATTEMPTS = 3

_DENIED = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}
_DENIED_WORDS = ("permission denied", "invalid auth token", "auth store is old")  # where the code says less
_ELSEWHERE = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}


class EtcdStore:
    """A LeaseStore in etcd, beneath `prefix`. Connects on first use.

    `endpoints`: URLs, or host:port, which means https where a TLS file is given. Raises ConfigError for an endpoint
    or a file that cannot be.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        prefix: str,
        *,
        keyfile: str = "",
        certfile: str = "",
        cafile: str = "",
        username: str = "",
        password: str = "",
    ) -> None:
        # superfluous slashes go, as in flannel's path.Join
        base = "/" * prefix.startswith("/") + "".join(f"{part}/" for part in prefix.split("/") if part)
        self._cluster = _Cluster(endpoints, TlsFiles(keyfile, certfile, cafile), username, password, base)
        self._config_key = f"{base}config".encode()
        self._subnets = f"{base}subnets/".encode()
        self.name = f"etcd {self._cluster} prefix {base}"

    async def read_config(self) -> bytes | None:
        kvs = (await self._range(wire.range_request(self._config_key))).kvs
        return kvs[0].value if kvs else None

    async def write_config(self, text: bytes) -> None:
        await self._cluster.call("KV/Put", wire.put_request(self._config_key, text))

    async def snapshot(self) -> Snapshot:
        for _ in range(SNAPSHOT_ATTEMPTS - 1):
            with contextlib.suppress(_Compacted):
                return await self._pages()
        return await self._pages()

    async def create(self, key: str, value: bytes, ttl: int | None) -> Entry | None:
        absent = wire.compare(wire.CompareTarget.VERSION, self._full(key), 0)
        return await self._put_if([absent], key, value, ttl)

    async def replace(self, key: str, value: bytes, ttl: int | None, *, expected: Entry) -> Entry | None:
        return await self._put_if(self._as_it_was(key, expected), key, value, ttl)

    async def delete(self, key: str, *, expected: Entry) -> bool:
        steps = [wire.delete_op(wire.delete_request(self._full(key)))]
        return (await self._txn(wire.txn_request(self._as_it_was(key, expected), success=steps))).succeeded

    async def compact(self, revision: int) -> None:
        """Forget the history before `revision`: that of the whole etcd, not of this prefix only."""
        await self._cluster.call("KV/Compact", wire.compact_request(revision))

    async def watch(self, after: int) -> AsyncGenerator[Batch, None]:
        request = wire.watch_create_request(self._subnets, end=wire.prefix_end(self._subnets), start_revision=after + 1)
        events: list[wire.WatchEvent] = []
        async with contextlib.aclosing(self._cluster.watch(request)) as responses:
            async for response in responses:
                if response.created and response.revision < after:
                    await self._refuse_future(after)
                events += response.events
                if response.fragment or response.created:
                    continue
                # While a watch catches up, the header is ahead of the events: only the last event is certain.
                revision = events[-1].kv.mod_revision if events else response.revision
                changes, events = tuple(map(self._change, events)), []
                yield Batch(revision, changes)

    async def close(self) -> None:
        await self._cluster.close()

    async def _refuse_future(self, after: int) -> None:
        """Raise HistoryGone if the store was wiped: it would be silent until it reaches `after` again. A member that
        only lags (or still applies the very write) has reached it when it answers a linearizable read."""
        newest = (await self._range(wire.range_request(self._config_key))).revision
        if newest < after:
            raise HistoryGone(newest)

    async def _pages(self) -> Snapshot:
        """Every entry at the revision of the first page. Raises _Compacted where the later pages are gone."""
        start, end = self._subnets, wire.prefix_end(self._subnets)
        limit, revision = PAGE, 0
        entries: list[Entry] = []
        while True:
            try:
                page = await self._range(wire.range_request(start, end=end, limit=limit, revision=revision))
            except _TooLarge:
                if limit == 1:
                    raise
                limit //= 2
                continue
            revision = revision or page.revision
            entries += map(self._entry, page.kvs)
            if not page.more or not page.kvs:
                return Snapshot(revision, tuple(entries))
            start = page.kvs[-1].key + b"\0"

    async def _range(self, request: bytes) -> wire.RangeResponse:
        return wire.decode_range_response(await self._cluster.call("KV/Range", request))

    async def _txn(self, request: bytes) -> wire.TxnResponse:
        return wire.decode_txn_response(await self._cluster.call("KV/Txn", request, repeatable=False))

    def _as_it_was(self, key: str, entry: Entry) -> list[bytes]:
        full = self._full(key)
        return [
            wire.compare(wire.CompareTarget.MOD, full, entry.mod_revision),
            wire.compare(wire.CompareTarget.VALUE, full, entry.value),
        ]

    async def _put_if(self, conditions: Sequence[bytes], key: str, value: bytes, ttl: int | None) -> Entry | None:
        full, lease = self._full(key), 0
        if ttl is not None:
            granted = await self._cluster.call("Lease/LeaseGrant", wire.lease_grant_request(ttl))
            lease = wire.decode_lease_grant_response(granted)
        # read back in the same transaction: the answer to a put has no create_revision
        steps = [wire.put_op(wire.put_request(full, value, lease=lease)), wire.range_op(wire.range_request(full))]
        answer = await self._txn(wire.txn_request(conditions, success=steps))
        if answer.succeeded:
            if not answer.ranges or not answer.ranges[0].kvs:
                raise StoreError(f"{self.name}: the answer to a transaction lacks the key {key!r} that it put")
            return self._entry(answer.ranges[0].kvs[0])
        if lease:
            # one that cannot be revoked lapses by itself
            with contextlib.suppress(StoreError):
                await self._cluster.call("Lease/LeaseRevoke", wire.lease_revoke_request(lease))
        return None

    def _full(self, key: str) -> bytes:
        return self._subnets + key.encode("utf-8", "surrogateescape")

    def _short(self, full: bytes) -> str:
        return full.removeprefix(self._subnets).decode("utf-8", "surrogateescape")

    def _entry(self, kv: wire.KeyValue) -> Entry:
        return Entry(self._short(kv.key), kv.value, kv.create_revision, kv.mod_revision, reserved=kv.lease == 0)

    def _change(self, event: wire.WatchEvent) -> Entry | Deleted:
        return Deleted(self._short(event.kv.key), event.kv.mod_revision) if event.deleted else self._entry(event.kv)


class _TokenRefused(StoreDenied):
    """The token is too old, or the user may not: worth one more try with a new token."""


class _AuthenticationOff(StoreError):
    """The server asks nobody for a password."""


class _Compacted(StoreError):
    """The revision of a read is gone."""


class _TooLarge(StoreError):
    """The answer is larger than a message may be."""


class _Cluster:
    """The endpoints as one: a call goes to the one that worked last, then to the others in turn."""

    def __init__(self, endpoints: Sequence[str], tls: TlsFiles, username: str, password: str, base: str) -> None:
        if not endpoints:
            raise ConfigError("--etcd-endpoints names no endpoint: write http://host:2379 or https://host:2379")
        tls.context()
        self._endpoints = [Endpoint.parse(text, tls) for text in endpoints]
        self._current = 0
        self._username, self._password, self._token = username, password, ""
        self._base = base
        self._closed = False

    def __str__(self) -> str:
        return ",".join(endpoint.url for endpoint in self._endpoints)

    async def call(self, method: str, request: bytes, *, repeatable: bool = True) -> bytes:
        """One unary call. Not `repeatable`: once sent to an endpoint, it is sent to no other."""

        async def attempt(_: Endpoint, channel: Any) -> bytes:
            rpc = channel.unary_unary(f"/etcdserverpb.{method}")
            answer: bytes = await rpc(request, timeout=etcd_endpoint.RPC_SECONDS, metadata=self._metadata())
            return answer

        return await self._authenticated(attempt, repeatable=repeatable)

    async def watch(self, request: bytes) -> AsyncGenerator[wire.WatchResponse, None]:
        """The answers of one watch, the first of which says that it stands. Ends by an error only."""

        async def attempt(endpoint: Endpoint, channel: Any) -> tuple[Endpoint, Any, wire.WatchResponse]:
            # without a leader, a member would keep the watch open and silent
            stream = channel.stream_stream("/etcdserverpb.Watch/Watch")(
                metadata=(*self._metadata(), ("hasleader", "true"))
            )
            try:
                async with asyncio.timeout(etcd_endpoint.RPC_SECONDS):
                    await stream.write(request)
                    return endpoint, stream, self._watch_answer(await stream.read(), endpoint)
            except BaseException:
                stream.cancel()
                raise

        endpoint, stream, response = await self._authenticated(attempt, repeatable=True)
        try:
            while True:
                yield response
                answer = await self._translated(stream.read(), endpoint)
                response = self._watch_answer(answer, endpoint)
        except Lost as error:
            raise StoreUnavailable(f"etcd {endpoint.url}: the watch broke: {error}") from None
        finally:
            stream.cancel()

    async def close(self) -> None:
        self._closed = True
        for endpoint in self._endpoints:
            await endpoint.drop()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("token", self._token),) if self._token else ()

    async def _authenticated(self, attempt: Callable[[Endpoint, Any], Awaitable[T]], *, repeatable: bool) -> T:
        if not self._username:
            return await self._somewhere(attempt, repeatable=repeatable)
        if not self._token:
            await self._authenticate()
        try:
            return await self._somewhere(attempt, repeatable=repeatable)
        except _TokenRefused:
            await self._authenticate()
            return await self._somewhere(attempt, repeatable=repeatable)
        except StoreUnavailable:
            # A server that was restored from a backup holds calls with a token of its former future for ever.
            self._token = ""
            raise

    async def _authenticate(self) -> None:
        request = wire.authenticate_request(self._username, self._password)

        async def attempt(_: Endpoint, channel: Any) -> str:
            rpc = channel.unary_unary("/etcdserverpb.Auth/Authenticate")
            return wire.decode_authenticate_response(await rpc(request, timeout=etcd_endpoint.RPC_SECONDS))

        self._token = ""
        with contextlib.suppress(_AuthenticationOff):
            self._token = await self._somewhere(attempt, repeatable=True)

    async def _somewhere(self, attempt: Callable[[Endpoint, Any], Awaitable[T]], *, repeatable: bool) -> T:
        failures: list[tuple[Endpoint, str]] = []
        start, count = self._current, len(self._endpoints)
        for index in (*range(start, count), *range(start)):
            endpoint, sent = self._endpoints[index], False
            try:
                if self._closed:
                    raise StoreUnavailable(f"etcd {self} was closed by this process")
                channel = await endpoint.connected()
                sent = True
                answer = await self._translated(attempt(endpoint, channel), endpoint)
            except Lost as error:
                self._current = (index + 1) % count
                if sent and not repeatable:
                    text = f"etcd {endpoint.url}: {error}; it is unknown whether the write happened"
                    raise StoreUnavailable(text) from None
                failures.append((endpoint, str(error)))
            else:
                self._current = index
                return answer
        raise await _unavailable(failures)

    async def _translated(self, answer: Awaitable[T], endpoint: Endpoint) -> T:
        """The one place where gRPC's errors become ours."""
        try:
            return await answer
        except grpc.aio.AioRpcError as error:
            self._raise(error.code(), error.details() or "no reason given", endpoint)
        except TimeoutError:
            raise Lost(f"no answer within {etcd_endpoint.RPC_SECONDS:g} s") from None
        except (grpc.aio.UsageError, asyncio.InvalidStateError):
            raise Lost("the connection was closed") from None
        except asyncio.CancelledError:
            # grpc.aio cancels the calls of a channel that is closed, whatever task waits for them
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise Lost("the connection was closed") from None

    def _raise(self, code: grpc.StatusCode, details: str, endpoint: Endpoint) -> NoReturn:
        at = f"etcd {endpoint.url}"
        if "authentication is not enabled" in details:
            raise _AuthenticationOff(f"{at}: {details}")
        if "authentication failed" in details:
            raise StoreDenied(
                f"{at} refuses the user {self._username!r} or the password for prefix {self._base}: "
                "check --etcd-username and --etcd-password"
            )
        if "user name is empty" in details:
            raise StoreDenied(f"{at} demands a user for prefix {self._base}: give --etcd-username and --etcd-password")
        if code in _DENIED or any(words in details for words in _DENIED_WORDS):
            who = f"the user {self._username!r}" if self._username else "us (no --etcd-username is given)"
            raise _TokenRefused(f"{at} denies {who} the keys beneath {self._base}: {details}")
        if "has been compacted" in details:
            raise _Compacted(f"{at}: {details}")
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise _TooLarge(f"{at}: {details}")
        if code in _ELSEWHERE:
            raise Lost(details)
        raise StoreError(f"{at}: {details} ({code.name})")

    def _watch_answer(self, data: Any, endpoint: Endpoint) -> wire.WatchResponse:
        if data is grpc.aio.EOF:
            raise Lost("the server ended it")
        response = wire.decode_watch_response(data)
        if response.compact_revision:
            raise HistoryGone(response.compact_revision)
        if response.canceled:
            self._raise(grpc.StatusCode.CANCELLED, response.cancel_reason or "the server canceled it", endpoint)
        return response


async def _unavailable(failures: Sequence[tuple[Endpoint, str]]) -> StoreError:
    async def explain(endpoint: Endpoint, reason: str) -> tuple[str, bool]:
        text, denied = (reason, False) if reason else await endpoint.why_down()
        return f"{endpoint.url}: {text}", denied

    found = await asyncio.gather(*(explain(endpoint, reason) for endpoint, reason in failures))
    kind = StoreDenied if all(denied for _, denied in found) else StoreUnavailable
    return kind(f"cannot reach etcd: {'; '.join(text for text, _ in found)}")
