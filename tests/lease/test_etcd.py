"""What only the etcd store has: flannel's bytes, endpoints, TLS, users, a server that dies. The rest: conformance.

Held against Debian's etcd and etcdctl.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
import uvloop
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dataplane.errors import ConfigError, HistoryGone, StoreDenied, StoreError, StoreUnavailable
from dataplane.lease import etcd_endpoint
from dataplane.lease.etcd import EtcdStore
from dataplane.lease.store import Deleted, Entry
from tests.certificates import make_certificates
from tests.etcd_server import EtcdServer, TlsFiles
from tests.lease.test_store_conformance import KEY, SOON, VALUE, changes_until, make, watching

pytestmark = pytest.mark.etcd

PREFIX = "/coreos.com/network"
SECRET = "correct horse"

Opener = Callable[..., EtcdStore]


@pytest.fixture
async def opened() -> AsyncIterator[Opener]:
    stores: list[EtcdStore] = []

    def open_store(*endpoints: str, prefix: str = PREFIX, **options: str) -> EtcdStore:
        stores.append(EtcdStore(endpoints, prefix, **options))
        return stores[-1]

    yield open_store
    for store in stores:
        await store.close()


@pytest.fixture
def server() -> Iterator[EtcdServer]:
    with EtcdServer() as running:
        yield running


def refused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- what stands in the store ---------------------------------------------------------------------------------


async def test_the_store_holds_flannels_keys_and_nothing_else(server: EtcdServer, opened: Opener) -> None:
    store = opened(server.url)
    await store.write_config(b'{"Network":"10.5.0.0/16"}')
    await make(store, ttl=86_400)
    await make(store, "10.12.13.0-24&fd00:12:13::-56", ttl=None)
    await store.create(KEY, b"loser", 600)
    kvs = json.loads(server.etcdctl("get", "", "--prefix", "-w", "json"))["kvs"]
    found = {base64.b64decode(kv["key"]): base64.b64decode(kv["value"]) for kv in kvs}
    assert found == {
        b"/coreos.com/network/config": b'{"Network":"10.5.0.0/16"}',
        b"/coreos.com/network/subnets/10.5.52.0-24": VALUE,
        b"/coreos.com/network/subnets/10.12.13.0-24&fd00:12:13::-56": VALUE,
    }
    leases = json.loads(server.etcdctl("lease", "list", "-w", "json"))["leases"]
    assert len(leases) == 1  # none of the reservation, and the loser's was revoked
    held = json.loads(server.etcdctl("lease", "timetolive", f"{leases[0]['id']:x}", "--keys", "-w", "json"))
    assert held["granted-ttl"] == 86_400
    assert [base64.b64decode(key) for key in held["keys"]] == [b"/coreos.com/network/subnets/10.5.52.0-24"]


async def test_what_etcdctl_puts_is_read_as_it_is(server: EtcdServer, opened: Opener) -> None:
    store = opened(server.url)
    base = (await store.snapshot()).revision
    lease = server.etcdctl("lease", "grant", "600").split()[1]
    server.etcdctl("put", f"{PREFIX}/config", text="{}")
    server.etcdctl("put", f"{PREFIX}/subnets/{KEY}", f"--lease={lease}", text=VALUE.decode())
    server.etcdctl("put", f"{PREFIX}/subnets/10.5.53.0-24", text="{")
    server.etcdctl("put", f"{PREFIX}/subnets/not/a/subnet", text="x")
    server.etcdctl("put", f"{PREFIX}/subnets-old/10.5.54.0-24", text="x")
    server.etcdctl("del", f"{PREFIX}/subnets/10.5.53.0-24")
    expected = [
        Entry(KEY, VALUE, base + 2, base + 2),
        Entry("10.5.53.0-24", b"{", base + 3, base + 3, reserved=True),
        Entry("not/a/subnet", b"x", base + 4, base + 4, reserved=True),
        Deleted("10.5.53.0-24", base + 6),
    ]
    assert await store.read_config() == b"{}"
    assert await changes_until(store, base, 4) == expected
    assert (await store.snapshot()).entries == (expected[0], expected[2])


async def test_a_key_that_is_no_text_survives(server: EtcdServer, opened: Opener) -> None:
    store = opened(server.url)
    made = await make(store, "\udcff\udcfe")
    assert (await store.snapshot()).entries == (made,)
    kvs = json.loads(server.etcdctl("get", PREFIX, "--prefix", "-w", "json"))["kvs"]
    assert [base64.b64decode(kv["key"]) for kv in kvs] == [b"/coreos.com/network/subnets/\xff\xfe"]


@pytest.mark.parametrize("prefix", [PREFIX, f"{PREFIX}/", f"{PREFIX}//", "//coreos.com//network"])
async def test_superfluous_slashes_of_the_prefix_go(server: EtcdServer, opened: Opener, prefix: str) -> None:
    await make(opened(server.url, prefix=prefix))
    assert server.etcdctl("get", "", "--prefix", "--keys-only").split() == [f"{PREFIX}/subnets/{KEY}"]


async def test_a_transaction_is_one_batch(server: EtcdServer, opened: Opener) -> None:
    store = opened(server.url)
    base = (await store.snapshot()).revision
    puts = "".join(f"put {PREFIX}/subnets/10.5.{n}.0-24 x\n" for n in range(5))
    server.etcdctl("txn", text=f"\n{puts}\n\n")
    async with asyncio.timeout(SOON), watching(store, base) as batches:
        batch = await anext(batches)
    assert batch.revision == base + 1
    assert len(batch.changes) == 5


async def test_a_response_in_fragments_is_one_batch(server: EtcdServer, opened: Opener) -> None:
    """etcd cuts a response where it passes 1.5 MiB: here within the three changes of the second revision."""
    store = opened(server.url)
    base = (await store.snapshot()).revision
    await make(store, value=b"v" * 1_000_000, ttl=None)
    puts = "".join(f"put {PREFIX}/subnets/10.5.{n}.0-24 {'v' * 400_000}\n" for n in range(3))
    server.etcdctl("txn", text=f"\n{puts}\n\n")
    batches = []
    async with asyncio.timeout(SOON), watching(store, base) as watch:
        async for batch in watch:
            batches.append(batch)
            if batch.revision == base + 2:
                break
    assert sum(len(batch.changes) for batch in batches) == 4
    assert len(batches[-1].changes) >= 3


async def test_a_snapshot_larger_than_a_grpc_message(server: EtcdServer, opened: Opener) -> None:
    store = opened(server.url)
    count = 3000
    for start in range(0, count, 200):
        keys = (f"10.{n // 256}.{n % 256}.0-24" for n in range(start, start + 200))
        await asyncio.gather(*(make(store, key, b"v" * 2000, None) for key in keys))
    big = await make(store, "9.0.0.0-24", b"v" * 1_400_000, None)
    snapshot = await store.snapshot()
    assert len(snapshot.entries) == count + 1
    assert snapshot.entries[-1] == big
    assert sum(len(entry.value) for entry in snapshot.entries) > 6 << 20


async def test_a_value_that_etcd_refuses_is_a_store_error(server: EtcdServer, opened: Opener) -> None:
    with pytest.raises(StoreError, match="request is too large") as caught:
        await make(opened(server.url), value=b"v" * 2_000_000)
    assert not isinstance(caught.value, StoreUnavailable)
    assert server.url in str(caught.value)


# --- a server that dies ---------------------------------------------------------------------------------------


FORK = """
import asyncio, os, sys
from dataplane.lease.etcd import EtcdStore

async def main():
    store = EtcdStore([sys.argv[1]], "/x")
    await store.snapshot()
    if (child := os.fork()) == 0:
        os._exit(len(os.listdir("/proc/self/task")))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    await store.close()

asyncio.run(main())
"""


def test_a_forked_child_has_none_of_grpcs_threads(server: EtcdServer) -> None:
    """They crash it before it has become another program, iptables for instance; seen on a busy machine."""
    argv = [sys.executable, "-c", FORK, server.url]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("1\n", 0), done


async def test_a_killed_server_ends_the_watch_and_a_restarted_one_resumes_it(
    server: EtcdServer, opened: Opener
) -> None:
    store, writer = opened(server.url), opened(server.url)
    base = (await store.snapshot()).revision
    async with asyncio.timeout(60), watching(store, base) as batches:
        one = await make(writer)
        batch = await anext(batches)
        assert batch.changes == (one,)
        server.kill()
        with pytest.raises(StoreUnavailable, match=server.url):
            await anext(batches)
    with pytest.raises(StoreUnavailable, match="connection refused"):
        await store.snapshot()
    with pytest.raises(StoreUnavailable, match="connection refused"):
        await changes_until(store, batch.revision, 1)
    await asyncio.to_thread(server.restart)
    two = await make(writer, "10.5.53.0-24")  # before the watch stands again
    assert await changes_until(store, batch.revision, 1) == [two]
    assert (await store.snapshot()).entries == (one, two)


async def test_a_wiped_store_has_lost_the_history(server: EtcdServer, opened: Opener) -> None:
    store = opened(server.url)
    for n in range(5):
        made = await make(store, f"10.5.{n}.0-24")
    with EtcdServer(port=refused_port()) as other:
        moved = opened(other.url)
        with pytest.raises(HistoryGone):
            await changes_until(moved, made.mod_revision, 1)


async def test_a_server_that_hangs_is_given_up(
    server: EtcdServer, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_endpoint, "RPC_SECONDS", 1.0)
    store, fresh = opened(server.url), opened(server.url)
    await store.snapshot()
    server.pause()
    try:
        async with asyncio.timeout(SOON):
            with pytest.raises(StoreUnavailable, match=server.url):
                await store.snapshot()
            with pytest.raises(StoreUnavailable, match="unknown whether the write happened"):
                await store.delete(KEY, expected=Entry(KEY, b"", 1, 1))
            with pytest.raises(StoreUnavailable, match="no etcd answers"):
                await fresh.snapshot()
    finally:
        server.resume()
    monkeypatch.undo()
    await make(store)


async def test_a_watch_on_a_silent_server_ends(server: EtcdServer, opened: Opener) -> None:
    """Pings go unanswered as on a network that is cut: 10 s to the ping, 5 s for its answer."""
    store = opened(server.url)
    base = (await store.snapshot()).revision
    watch = asyncio.ensure_future(anext(store.watch(base)))
    await asyncio.sleep(0.5)
    server.pause()
    try:
        async with asyncio.timeout(2 * SOON):
            with pytest.raises(StoreUnavailable, match="watch broke"):
                await watch
    finally:
        server.resume()


async def test_a_dead_endpoint_is_passed_over(server: EtcdServer, opened: Opener) -> None:
    dead = f"http://127.0.0.1:{refused_port()}"
    assert await opened(dead, server.url).create("10.9.0.0-24", b"", None) is not None  # also by what is never repeated
    store = opened(dead, server.url)
    made = await make(store)
    assert await changes_until(store, made.mod_revision - 1, 1) == [made]
    server.kill()
    with pytest.raises(StoreUnavailable) as caught:
        await opened(dead, server.url).snapshot()
    assert str(caught.value).count("connection refused") == 2
    assert dead in str(caught.value)
    assert server.url in str(caught.value)


async def test_a_channel_that_failed_behind_our_back_is_made_anew(server: EtcdServer, opened: Opener) -> None:
    """gRPC would leave it alone for a second and more, while the server is there."""
    store = opened(server.url)
    (endpoint,) = store._cluster._endpoints
    server.kill()
    endpoint._channel = endpoint._open()
    failed = grpc.ChannelConnectivity.TRANSIENT_FAILURE
    async with asyncio.timeout(SOON):
        while (state := endpoint._channel.get_state(try_to_connect=True)) is not failed:
            await endpoint._channel.wait_for_state_change(state)
        await asyncio.to_thread(server.restart)
        await store.snapshot()


async def test_the_second_endpoint_takes_over(server: EtcdServer, opened: Opener) -> None:
    """Two stores of one test, not one cluster: only the way of the calls is looked at."""
    with EtcdServer() as second:
        store = opened(server.url, second.url)
        await store.write_config(b"first")
        server.kill()
        assert await store.read_config() is None
        await store.write_config(b"second")
        await asyncio.to_thread(server.restart)
        assert await store.read_config() == b"second"  # it stays with the one that works


# --- endpoints, TLS, users ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint",
    ["", "ftp://a:1", "http://", "http://a:x", "http://a:99999", "http://a/b", "http://u:p@a", "http://a b", "http://[::1"],
)
def test_a_malformed_endpoint_is_a_config_error(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="--etcd-endpoints"):
        EtcdStore([endpoint], PREFIX)


def test_no_endpoint_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="--etcd-endpoints"):
        EtcdStore([], PREFIX)


async def test_an_endpoint_needs_no_scheme(server: EtcdServer, opened: Opener) -> None:
    await make(opened(f"127.0.0.1:{server.port}"))
    await opened(f"localhost:{server.port}/").snapshot()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls_server(tls: TlsFiles) -> Iterator[EtcdServer]:
    with EtcdServer(tls=tls) as running:
        yield running


async def test_tls_with_a_client_certificate(tls_server: EtcdServer, tls: TlsFiles, opened: Opener) -> None:
    files = {"cafile": str(tls.ca), "certfile": str(tls.client_cert), "keyfile": str(tls.client_key)}
    store = opened(tls_server.url, **files)
    made = await make(store)
    assert await changes_until(store, made.mod_revision - 1, 1) == [made]
    assert (await opened(f"127.0.0.1:{tls_server.port}", **files).snapshot()).entries == (made,)


async def test_tls_without_a_client_certificate_is_denied(
    tls_server: EtcdServer, tls: TlsFiles, opened: Opener, tmp_path: Path
) -> None:
    with pytest.raises(StoreDenied, match="demands --etcd-certfile"):
        await opened(tls_server.url, cafile=str(tls.ca)).snapshot()
    other = make_certificates(tmp_path)
    strange = opened(tls_server.url, cafile=str(tls.ca), certfile=str(other.client_cert), keyfile=str(other.client_key))
    with pytest.raises(StoreDenied, match=r"refuses .*client\.pem"):
        await strange.snapshot()


async def test_tls_with_only_a_ca(tls: TlsFiles, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    files = TlsFiles(tls.ca, tls.cert, tls.key, tls.client_cert, tls.client_key, require_client=False)
    with EtcdServer(tls=files) as server:
        await make(opened(server.url, cafile=str(tls.ca)))
        with pytest.raises(StoreUnavailable, match=r"not to be trusted.*--etcd-cafile"):
            await opened(server.url).snapshot()
        monkeypatch.setattr(etcd_endpoint, "_SYSTEM_ROOTS", (str(tls.ca),))
        assert len((await opened(server.url).snapshot()).entries) == 1


async def test_a_certificate_for_another_name_is_not_trusted(
    tls_server: EtcdServer, tls: TlsFiles, opened: Opener
) -> None:
    with pytest.raises(StoreUnavailable, match=r"not to be trusted: Hostname mismatch.*localhost"):
        await opened(f"https://localhost:{tls_server.port}", cafile=str(tls.ca)).snapshot()


async def test_a_plain_client_on_a_tls_port_is_told_so(tls_server: EtcdServer, opened: Opener) -> None:
    plain = tls_server.url.replace("https", "http")
    with pytest.raises(StoreUnavailable, match=f"speaks TLS: did you mean {tls_server.url}"):
        await opened(plain).snapshot()


async def test_a_tls_client_on_a_plain_port_is_told_so(server: EtcdServer, tls: TlsFiles, opened: Opener) -> None:
    secure = server.url.replace("http", "https")
    with pytest.raises(StoreUnavailable, match=f"does not speak TLS.*did you mean {server.url}"):
        await opened(secure, cafile=str(tls.ca)).snapshot()


async def test_a_port_where_no_etcd_lives_is_told_so(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_endpoint, "RPC_SECONDS", 1.0)
    for text in (b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"):

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes = text) -> None:
            writer.write(text)
            writer.close()

        listener = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with listener:
            port = listener.sockets[0].getsockname()[1]
            with pytest.raises(StoreUnavailable, match="no etcd answers"):
                await opened(f"http://127.0.0.1:{port}").snapshot()
            with pytest.raises(StoreUnavailable, match="does not speak TLS"):
                await opened(f"https://127.0.0.1:{port}").snapshot()


def test_files_that_cannot_be_used_are_named(tls: TlsFiles, tmp_path: Path) -> None:
    missing, junk = str(tmp_path / "missing.pem"), tmp_path / "junk.pem"
    junk.write_text("junk")
    for flag in ("cafile", "certfile", "keyfile"):
        with pytest.raises(ConfigError, match=f"--etcd-{flag} {missing} cannot be read: No such file"):
            EtcdStore(["https://a"], PREFIX, **{flag: missing})
    with pytest.raises(ConfigError, match=f"--etcd-cafile {junk}"):
        EtcdStore(["https://a"], PREFIX, cafile=str(junk))
    with pytest.raises(ConfigError, match="belong together"):
        EtcdStore(["https://a"], PREFIX, certfile=str(tls.client_cert))
    for keyfile in (junk, tls.key):
        with pytest.raises(ConfigError, match=f"--etcd-keyfile {keyfile}"):
            EtcdStore(["https://a"], PREFIX, certfile=str(tls.client_cert), keyfile=str(keyfile))
    locked = tmp_path / "locked.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    protection = serialization.BestAvailableEncryption(b"secret")
    encoding, layout = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked.write_bytes(key.private_bytes(encoding, layout, protection))
    with pytest.raises(ConfigError, match="unencrypted"):
        EtcdStore(["https://a"], PREFIX, certfile=str(tls.client_cert), keyfile=str(locked))


@pytest.fixture(scope="module")
def guarded() -> Iterator[EtcdServer]:
    """etcd with users: root, and one that may touch our prefix only."""
    with EtcdServer() as running:
        running.etcdctl("user", "add", f"root:{SECRET}")
        running.etcdctl("user", "grant-role", "root", "root")
        running.etcdctl("role", "add", "flannel")
        running.etcdctl("role", "grant-permission", "flannel", "--prefix=true", "readwrite", f"{PREFIX}/")
        running.etcdctl("user", "add", f"node:{SECRET}")
        running.etcdctl("user", "grant-role", "node", "flannel")
        running.etcdctl("auth", "enable")
        yield running


def as_root(server: EtcdServer, *arguments: str) -> str:
    return server.etcdctl(f"--user=root:{SECRET}", *arguments)


async def test_a_user_with_a_role_on_the_prefix(guarded: EtcdServer, opened: Opener) -> None:
    store = opened(guarded.url, username="node", password=SECRET)
    await store.write_config(b"{}")
    assert await store.read_config() == b"{}"
    made = await make(store)
    assert await store.create(KEY, b"", 600) is None
    assert (await store.snapshot()).entries == (made,)
    assert await changes_until(store, made.mod_revision - 1, 1) == [made]
    assert await store.delete(KEY, expected=made)


async def test_another_prefix_is_denied(guarded: EtcdServer, opened: Opener) -> None:
    store = opened(guarded.url, prefix="/other", username="node", password=SECRET)
    calls = (store.snapshot(), store.read_config(), store.write_config(b""), make(store), changes_until(store, 1, 1))
    for call in calls:
        with pytest.raises(StoreDenied, match=r"'node'.*/other/.*permission denied") as caught:
            await call
        assert SECRET not in str(caught.value)


async def test_a_wrong_password_is_denied_and_never_shown(guarded: EtcdServer, opened: Opener) -> None:
    wrong = "wrong horse"
    with pytest.raises(StoreDenied, match=r"'node'.*/coreos.com/network/.*--etcd-password") as caught:
        await opened(guarded.url, username="node", password=wrong).snapshot()
    assert wrong not in repr(caught.value)
    with pytest.raises(StoreDenied, match="give --etcd-username"):
        await opened(guarded.url).snapshot()


async def test_a_token_that_is_refused_is_renewed(guarded: EtcdServer, opened: Opener) -> None:
    store = opened(guarded.url, username="node", password=SECRET)
    made = await make(store, "10.8.0.0-24")
    store._cluster._token = "garbage.1"
    assert (await store.snapshot()).entries == (made,)
    store._cluster._token = "garbage.1"
    assert await changes_until(store, made.mod_revision - 1, 1) == [made]
    as_root(guarded, "role", "add", "another")  # the token is of an older revision of the users now
    renewed = await store.replace(made.key, b"", 600, expected=made)
    assert renewed is not None
    await asyncio.to_thread(guarded.restart)  # forgets its simple tokens
    assert (await store.snapshot()).entries == (renewed,)
    assert await store.delete(made.key, expected=renewed)


async def test_a_token_of_a_later_raft_index_hangs_only_once(
    guarded: EtcdServer, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """etcd waits until it has reached the index in the token; after a restore from a backup that may be never."""
    store = opened(guarded.url, username="node", password=SECRET)
    base = await store.snapshot()
    monkeypatch.setattr(etcd_endpoint, "RPC_SECONDS", 1.0)
    store._cluster._token = f"{store._cluster._token.partition('.')[0]}.999999"
    with suppress(StoreUnavailable):  # the deadline ends the wait on both sides; either may speak first
        await store.snapshot()
    monkeypatch.undo()  # a new token takes bcrypt, and on a busy machine more than a second
    assert await store.snapshot() == base


async def test_a_user_where_nobody_is_asked(server: EtcdServer, opened: Opener) -> None:
    await make(opened(server.url, username="node", password=SECRET))


def test_it_works_under_uvloop(server: EtcdServer) -> None:
    async def main() -> None:
        store = EtcdStore([f"http://127.0.0.1:{refused_port()}", server.url], PREFIX)
        made = await make(store)
        assert await changes_until(store, 1, 1) == [made]
        server.kill()
        with pytest.raises(StoreUnavailable, match="connection refused"):
            await store.snapshot()
        await store.close()

    uvloop.run(main())


@pytest.mark.netns
def test_a_name_that_does_not_resolve_is_named() -> None:
    """In a network namespace of its own, so that no question goes out."""
    code = """
import asyncio
from dataplane.lease.etcd import EtcdStore
async def main():
    try:
        await EtcdStore(["http://etcd.invalid:2379"], "/net").snapshot()
    except Exception as error:
        print(type(error).__name__, error)
asyncio.run(main())
"""
    command = ["unshare", "--net", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    expected = "StoreUnavailable cannot reach etcd: http://etcd.invalid:2379: the name 'etcd.invalid' does not resolve"
    assert done.stdout.startswith(expected)
    assert done.stderr == ""  # gRPC itself writes nothing
