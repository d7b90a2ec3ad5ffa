"""The health server over real sockets on loopback, with clients that behave and clients that do not."""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections.abc import AsyncIterator, Callable, Coroutine

import pytest
import uvloop

from dataplane import health
from dataplane.errors import KernelError
from dataplane.health import HealthServer


class Ready:
    """What the daemon would answer."""

    now = False

    def __call__(self) -> bool:
        return self.now


@pytest.fixture
def ready() -> Ready:
    return Ready()


@pytest.fixture
async def server(ready: Ready) -> AsyncIterator[HealthServer]:
    started = await HealthServer.start("127.0.0.1", 0, ready)
    yield started
    await started.close()


async def ask(server: HealthServer, method: str, path: str) -> tuple[int, str, dict[str, str]]:
    """The oracle for our HTTP: the standard library's client."""

    def talk() -> tuple[int, str, dict[str, str]]:
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        client.request(method, path)
        answer = client.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        result = answer.status, answer.read().decode(), headers
        client.close()
        return result

    return await asyncio.to_thread(talk)


async def raw(server: HealthServer, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request)
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


async def test_healthz(server: HealthServer) -> None:
    status, body, headers = await ask(server, "GET", "/healthz")
    assert (status, body) == (200, "flanneld is running")
    assert headers["connection"] == "close"
    assert headers["content-length"] == str(len(body))


async def test_readyz_follows_the_daemon(server: HealthServer, ready: Ready) -> None:
    assert (await ask(server, "GET", "/readyz"))[:2] == (503, "flanneld is not ready yet")
    ready.now = True
    assert (await ask(server, "GET", "/readyz"))[:2] == (200, "flanneld is ready")
    ready.now = False
    assert (await ask(server, "GET", "/readyz?verbose"))[:2] == (503, "flanneld is not ready yet")


async def test_head_has_the_length_but_no_body(server: HealthServer) -> None:
    status, body, headers = await ask(server, "HEAD", "/healthz")
    assert (status, body, headers["content-length"]) == (200, "", "19")
    answer = await raw(server, b"HEAD /readyz HTTP/1.0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/healthz/", 404),
        ("POST", "/x", 404),
        ("POST", "/healthz", 405),
        ("PUT", "/readyz", 405),
    ],
)
async def test_other_pages_and_methods(server: HealthServer, method: str, path: str, status: int) -> None:
    found, _, headers = await ask(server, method, path)
    assert found == status
    assert headers.get("allow") == ("GET, HEAD" if status == 405 else None)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n",
        b"GET /healthz\r\n\r\n",
        b"GET /healthz HTTP/2\r\n\r\n",
        b"get /healthz HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n",
        b"GET /health\x00z HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nno header\r\n\r\n",
    ],
)
async def test_garbage_is_a_bad_request(server: HealthServer, request_bytes: bytes) -> None:
    assert (await raw(server, request_bytes)).startswith(b"HTTP/1.1 400 Bad Request\r\n")


async def test_bare_newlines_are_taken(server: HealthServer) -> None:
    assert (await raw(server, b"GET /healthz HTTP/1.1\nHost: x\n\n")).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    "header",
    [b"X: " + b"y" * health.MAX_LINE, b"X: y\r\n" * health.MAX_HEADER_LINES],
    ids=["long line", "many lines"],
)
async def test_a_header_has_limits(server: HealthServer, header: bytes) -> None:
    assert (await raw(server, b"GET /healthz HTTP/1.1\r\n" + header)).startswith(b"HTTP/1.1 431 ")


async def test_a_silent_client_is_dropped_and_holds_nobody_up(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "READ_TIMEOUT", 0.3)
    silent = asyncio.create_task(raw(server, b"GET /healthz HTTP/1.1\r\n"))
    assert (await ask(server, "GET", "/healthz"))[0] == 200
    assert await silent == b""


async def test_a_client_that_vanishes_leaves_the_server_up(server: HealthServer) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            # an abortive close: the server sees a reset instead of an end
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.send(b"GET /healthz HTTP/1.1\r\n\r\n")
    assert (await ask(server, "GET", "/healthz"))[0] == 200


async def test_a_flood_of_connections_is_bounded(server: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_CONNECTIONS", 3)
    held = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
    for _, writer in held:
        writer.write(b"GET /healthz HTTP/1.1\r\n")
    await asyncio.sleep(0.1)
    assert await raw(server, b"") == b""
    for reader, writer in held:
        writer.write(b"\r\n")
        async with asyncio.timeout(10):
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_close_ends_open_connections_and_frees_the_port(
    ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "CLOSE_GRACE", 0.2)
    monkeypatch.setattr(health, "READ_TIMEOUT", 60)
    first = await HealthServer.start("127.0.0.1", 0, ready)
    port = first.port
    open_one = asyncio.create_task(raw(first, b"GET /healthz HTTP/1.1\r\n"))
    await asyncio.sleep(0.1)
    async with asyncio.timeout(5):
        await first.close()
    await first.close()
    assert await open_one == b""
    second = await HealthServer.start("127.0.0.1", port, ready)
    assert (await ask(second, "GET", "/healthz"))[0] == 200
    await second.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_nothing_is_left_to_complain_about_on_either_loop(
    run: Callable[[Coroutine[None, None, None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "CLOSE_GRACE", 0.1)
    monkeypatch.setattr(health, "READ_TIMEOUT", 60)
    complaints: list[dict[str, object]] = []

    async def scene() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        server = await HealthServer.start("127.0.0.1", 0, Ready())
        assert (await raw(server, b"GET /healthz HTTP/1.1\r\n\r\n")).endswith(b"flanneld is running")
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET")
        await asyncio.sleep(0.1)
        await server.close()
        assert await reader.read() == b""
        writer.close()

    run(scene())
    assert complaints == []


async def test_a_taken_port_is_named(server: HealthServer, ready: Ready) -> None:
    with pytest.raises(KernelError, match=rf"127\.0\.0\.1 port {server.port}: another process") as caught:
        await HealthServer.start("127.0.0.1", server.port, ready)
    assert f"ss -ltnp 'sport = :{server.port}'" in str(caught.value)


@pytest.mark.parametrize(("ip", "advice"), [("198.18.255.254", "no such address"), ("not an address", "-healthz-ip")])
async def test_an_address_that_is_not_ours_is_named(ip: str, advice: str, ready: Ready) -> None:
    with pytest.raises(KernelError, match=f"{ip} port 18081: .*{advice}"):
        await HealthServer.start(ip, 18081, ready)
