"""Owns the lease store in etcd v3: flannel's keys, spoken over grpc.aio with the bytes of `etcd_wire`.

Free of: the meaning of lease values; waiting and trying again (the caller paces that). Invariants: a write whose
outcome is unknown is never sent a second time; a channel that fails to connect is thrown away, so gRPC's own
back-off never keeps us from a server that is back.

etcd's client rules: https://etcd.io/docs/v3.4/learning/api/
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

# gRPC writes each refused connection to stderr in its own words; our errors say it once. Read when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio

from dataplane.errors import ConfigError, HistoryGone, StoreDenied, StoreError, StoreUnavailable
from dataplane.lease import etcd_wire as wire
from dataplane.lease.store import Batch, Deleted, Entry, Snapshot

T = TypeVar("T")

RPC_SECONDS = 5.0
"""How long one endpoint may take to connect, and again to answer."""
DIAGNOSIS_SECONDS = 1.0
PAGE = 1000
"""Leases per range request: with flannel's 300 bytes each, far below the 4 MiB that a message may have."""
SNAPSHOT_ATTEMPTS = 3

_DEFAULT_PORT = 2379
_SYSTEM_ROOTS = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_OPTIONS = [
    # A silently cut network ends a watch after 15 s. etcd forbids pings more often than every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),  # for the kernel's unacknowledged bytes
    ("grpc.http2.ping_timeout_ms", 5_000),  # for the ping's answer; 60 s by default, whatever the line above says
    ("grpc.http2.max_pings_without_data", 0),  # 0: a quiet watch may be pinged for ever
    ("grpc.use_local_subchannel_pool", 1),  # a channel made anew inherits no back-off
    ("grpc.enable_http_proxy", 0),  # as etcd's own client: the proxy variables are for the web
    ("grpc.enable_retries", 0),
]
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
        self._cluster = _Cluster(endpoints, _TlsFiles(keyfile, certfile, cafile), username, password, base)
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
        return await self._put_if(wire.CompareTarget.VERSION, 0, key, value, ttl)

    async def replace(self, key: str, value: bytes, ttl: int | None, *, expected: int) -> Entry | None:
        return await self._put_if(wire.CompareTarget.MOD, expected, key, value, ttl)

    async def delete(self, key: str, *, expected: int) -> bool:
        full = self._full(key)
        steps = [wire.delete_op(wire.delete_request(full))]
        return (await self._txn(wire.txn_request(wire.CompareTarget.MOD, full, expected, success=steps))).succeeded

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

    async def _put_if(
        self, target: wire.CompareTarget, equals: int, key: str, value: bytes, ttl: int | None
    ) -> Entry | None:
        full, lease = self._full(key), 0
        if ttl is not None:
            granted = await self._cluster.call("Lease/LeaseGrant", wire.lease_grant_request(ttl))
            lease = wire.decode_lease_grant_response(granted)
        # read back in the same transaction: the answer to a put has no create_revision
        steps = [wire.put_op(wire.put_request(full, value, lease=lease)), wire.range_op(wire.range_request(full))]
        answer = await self._txn(wire.txn_request(target, full, equals, success=steps))
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


class _Lost(Exception):
    """This endpoint gave no answer; another may. The text is the server's, empty where no connection was made."""


class _Cluster:
    """The endpoints as one: a call goes to the one that worked last, then to the others in turn."""

    def __init__(self, endpoints: Sequence[str], tls: _TlsFiles, username: str, password: str, base: str) -> None:
        if not endpoints:
            raise ConfigError("--etcd-endpoints names no endpoint: write http://host:2379 or https://host:2379")
        tls.context()
        self._endpoints = [_Endpoint.parse(text, tls) for text in endpoints]
        self._current = 0
        self._username, self._password, self._token = username, password, ""
        self._base = base
        self._closed = False

    def __str__(self) -> str:
        return ",".join(endpoint.url for endpoint in self._endpoints)

    async def call(self, method: str, request: bytes, *, repeatable: bool = True) -> bytes:
        """One unary call. Not `repeatable`: once sent to an endpoint, it is sent to no other."""

        async def attempt(_: _Endpoint, channel: Any) -> bytes:
            rpc = channel.unary_unary(f"/etcdserverpb.{method}")
            answer: bytes = await rpc(request, timeout=RPC_SECONDS, metadata=self._metadata())
            return answer

        return await self._authenticated(attempt, repeatable=repeatable)

    async def watch(self, request: bytes) -> AsyncGenerator[wire.WatchResponse, None]:
        """The answers of one watch, the first of which says that it stands. Ends by an error only."""

        async def attempt(endpoint: _Endpoint, channel: Any) -> tuple[_Endpoint, Any, wire.WatchResponse]:
            # without a leader, a member would keep the watch open and silent
            stream = channel.stream_stream("/etcdserverpb.Watch/Watch")(
                metadata=(*self._metadata(), ("hasleader", "true"))
            )
            try:
                async with asyncio.timeout(RPC_SECONDS):
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
        except _Lost as error:
            raise StoreUnavailable(f"etcd {endpoint.url}: the watch broke: {error}") from None
        finally:
            stream.cancel()

    async def close(self) -> None:
        self._closed = True
        for endpoint in self._endpoints:
            await endpoint.drop()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("token", self._token),) if self._token else ()

    async def _authenticated(self, attempt: Callable[[_Endpoint, Any], Awaitable[T]], *, repeatable: bool) -> T:
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

        async def attempt(_: _Endpoint, channel: Any) -> str:
            rpc = channel.unary_unary("/etcdserverpb.Auth/Authenticate")
            return wire.decode_authenticate_response(await rpc(request, timeout=RPC_SECONDS))

        self._token = ""
        with contextlib.suppress(_AuthenticationOff):
            self._token = await self._somewhere(attempt, repeatable=True)

    async def _somewhere(self, attempt: Callable[[_Endpoint, Any], Awaitable[T]], *, repeatable: bool) -> T:
        failures: list[tuple[_Endpoint, str]] = []
        start, count = self._current, len(self._endpoints)
        for index in (*range(start, count), *range(start)):
            endpoint, sent = self._endpoints[index], False
            try:
                if self._closed:
                    raise StoreUnavailable(f"etcd {self} was closed by this process")
                channel = await endpoint.connected()
                sent = True
                answer = await self._translated(attempt(endpoint, channel), endpoint)
            except _Lost as error:
                self._current = (index + 1) % count
                if sent and not repeatable:
                    text = f"etcd {endpoint.url}: {error}; it is unknown whether the write happened"
                    raise StoreUnavailable(text) from None
                failures.append((endpoint, str(error)))
            else:
                self._current = index
                return answer
        raise await _unavailable(failures)

    async def _translated(self, answer: Awaitable[T], endpoint: _Endpoint) -> T:
        """The one place where gRPC's errors become ours."""
        try:
            return await answer
        except grpc.aio.AioRpcError as error:
            self._raise(error.code(), error.details() or "no reason given", endpoint)
        except TimeoutError:
            raise _Lost(f"no answer within {RPC_SECONDS:g} s") from None
        except (grpc.aio.UsageError, asyncio.InvalidStateError):
            raise _Lost("the connection was closed") from None
        except asyncio.CancelledError:
            # grpc.aio cancels the calls of a channel that is closed, whatever task waits for them
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise _Lost("the connection was closed") from None

    def _raise(self, code: grpc.StatusCode, details: str, endpoint: _Endpoint) -> NoReturn:
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
            raise _Lost(details)
        raise StoreError(f"{at}: {details} ({code.name})")

    def _watch_answer(self, data: Any, endpoint: _Endpoint) -> wire.WatchResponse:
        if data is grpc.aio.EOF:
            raise _Lost("the server ended it")
        response = wire.decode_watch_response(data)
        if response.compact_revision:
            raise HistoryGone(response.compact_revision)
        if response.canceled:
            self._raise(grpc.StatusCode.CANCELLED, response.cancel_reason or "the server canceled it", endpoint)
        return response


@dataclass(frozen=True, slots=True)
class _TlsFiles:
    keyfile: str
    certfile: str
    cafile: str

    def __bool__(self) -> bool:
        return bool(self.keyfile or self.certfile or self.cafile)

    def context(self) -> ssl.SSLContext:
        """What a connection of ours would show and believe. Raises ConfigError that names flag and file."""
        for flag, path in (("keyfile", self.keyfile), ("certfile", self.certfile), ("cafile", self.cafile)):
            if path:
                _read(f"--etcd-{flag}", path)
        if bool(self.keyfile) != bool(self.certfile):
            raise ConfigError("--etcd-keyfile and --etcd-certfile belong together: give both or none")
        try:
            context = ssl.create_default_context(cafile=self.cafile or None)
        except ssl.SSLError as error:
            raise ConfigError(f"--etcd-cafile {self.cafile}: no PEM certificate in it ({error.reason})") from None
        try:
            if self.certfile:
                # a password would be asked for at the terminal; an empty one makes an encrypted key an error
                context.load_cert_chain(self.certfile, self.keyfile, password="")
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(
                f"--etcd-certfile {self.certfile} and --etcd-keyfile {self.keyfile}: "
                f"no PEM certificate with its own, unencrypted key ({error})"
            ) from None
        context.set_alpn_protocols(["h2"])
        return context

    def credentials(self) -> Any:
        """gRPC's form of the same, read anew each time, so renewed files are taken up with the next connection."""
        roots = self.cafile or next((path for path in _SYSTEM_ROOTS if Path(path).exists()), "")
        return grpc.ssl_channel_credentials(
            root_certificates=_read("--etcd-cafile", roots) if roots else None,
            private_key=_read("--etcd-keyfile", self.keyfile) if self.keyfile else None,
            certificate_chain=_read("--etcd-certfile", self.certfile) if self.certfile else None,
        )


def _read(flag: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}") from None


@dataclass(slots=True)
class _Endpoint:
    """One server: its address, and the channel to it while there is one. `tls` is None for plain HTTP/2."""

    host: str
    port: int
    tls: _TlsFiles | None
    _channel: Any = field(default=None, init=False)

    @classmethod
    def parse(cls, text: str, tls: _TlsFiles) -> _Endpoint:
        try:
            parts = urlsplit(text if "://" in text else f"{'https' if tls else 'http'}://{text}")
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"--etcd-endpoints: {text!r} is no endpoint: {error}") from None
        superfluous = parts.path.strip("/") or parts.query or parts.fragment or parts.username
        if parts.scheme not in ("http", "https") or not host or superfluous or any(map(str.isspace, text)):
            raise ConfigError(f"--etcd-endpoints: {text!r} is not of the form http://host:2379 or https://host:2379")
        return cls(host, port or _DEFAULT_PORT, tls if parts.scheme == "https" else None)

    @property
    def target(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http{'' if self.tls is None else 's'}://{self.target}"

    async def connected(self) -> Any:
        """A channel whose connection stands. Raises _Lost, and then the channel is gone."""
        ready, failed = grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE
        if self._channel is not None and self._channel.get_state() is failed:
            await self.drop()  # it failed behind our back, and now waits for gRPC's back-off
        if self._channel is None:
            self._channel = self._open()
        channel = self._channel
        try:
            async with asyncio.timeout(RPC_SECONDS):
                while (state := channel.get_state(try_to_connect=True)) is not ready:
                    if state is failed:
                        raise TimeoutError
                    await channel.wait_for_state_change(state)
        except (TimeoutError, grpc.aio.UsageError):
            if self._channel is channel:
                await self.drop()
            raise _Lost from None
        return channel

    async def drop(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _open(self) -> Any:
        if self.tls is None:
            return grpc.aio.insecure_channel(self.target, options=_OPTIONS)
        try:
            return grpc.aio.secure_channel(self.target, self.tls.credentials(), options=_OPTIONS)
        except ConfigError as error:
            raise StoreUnavailable(str(error)) from None

    async def why_down(self) -> tuple[str, bool]:
        """Why no connection was made, and whether it is our certificate: gRPC does not say."""
        try:
            async with asyncio.timeout(DIAGNOSIS_SECONDS):
                if self.tls is not None:
                    return await self._why_tls_fails(self.tls.context())
                await self._connect(None)
                if await self._speaks_tls():
                    return f"it speaks TLS: did you mean https://{self.target}?", False
                return "connections are taken, but no etcd answers", False
        except TimeoutError:
            return f"no answer within {DIAGNOSIS_SECONDS:g} s", False
        except ConfigError as error:
            return str(error), False
        except (socket.gaierror, UnicodeError) as error:
            return f"the name {self.host!r} does not resolve: {error}", False
        except ConnectionRefusedError:
            return "connection refused: no etcd listens there", False
        except OSError as error:
            return f"no connection: {error}", False

    async def _connect(self, context: ssl.SSLContext | None) -> bytes:
        """Connect, and with TLS wait for the first byte: TLS 1.3 refuses a client only after the handshake."""
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=context)
        try:
            return await reader.read(1) if context else b""
        finally:
            writer.transport.abort()

    async def _speaks_tls(self) -> bool:
        anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
        try:
            async with asyncio.timeout(DIAGNOSIS_SECONDS / 2):
                await self._connect(anyone)
        except TimeoutError:
            return False
        except ssl.SSLError as error:
            return "ALERT" in (error.reason or "")
        except OSError:
            return False
        return True

    async def _why_tls_fails(self, context: ssl.SSLContext) -> tuple[str, bool]:
        try:
            await self._connect(context)
        except ssl.SSLCertVerificationError as error:
            hint = "" if self.tls and self.tls.cafile else "; name its CA with --etcd-cafile"
            return f"its certificate is not to be trusted: {error.verify_message}{hint}", False
        except ssl.SSLError as error:
            if "ALERT" in (error.reason or ""):
                shown = f"refuses {self.tls.certfile}" if self.tls and self.tls.certfile else "demands --etcd-certfile"
                return f"it {shown}: {(error.reason or '').replace('_', ' ').lower()}", True
            return f"it does not speak TLS ({error.reason}): did you mean http://{self.target}?", False
        except ConnectionResetError:
            return f"it does not speak TLS: did you mean http://{self.target}?", False
        return "connections are taken, but no etcd answers", False


async def _unavailable(failures: Sequence[tuple[_Endpoint, str]]) -> StoreError:
    async def explain(endpoint: _Endpoint, reason: str) -> tuple[str, bool]:
        text, denied = (reason, False) if reason else await endpoint.why_down()
        return f"{endpoint.url}: {text}", denied

    found = await asyncio.gather(*(explain(endpoint, reason) for endpoint, reason in failures))
    kind = StoreDenied if all(denied for _, denied in found) else StoreUnavailable
    return kind(f"cannot reach etcd: {'; '.join(text for text, _ in found)}")
