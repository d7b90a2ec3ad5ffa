"""sd_notify against real datagram sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.systemd import notify, watchdog_seconds, watched


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """What systemd does: a datagram socket, and its address as NOTIFY_SOCKET names it."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@loden-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        server.settimeout(5)
        yield address, server


def test_fields_arrive_in_one_datagram(manager: tuple[str, socket.socket]) -> None:
    address, server = manager
    assert notify({"NOTIFY_SOCKET": address}, READY="1", STATUS="3 peers, größer")
    assert server.recv(4096).decode() == "READY=1\nSTATUS=3 peers, größer"


def test_a_value_cannot_make_up_a_field(manager: tuple[str, socket.socket]) -> None:
    address, server = manager
    assert notify({"NOTIFY_SOCKET": address}, STATUS="bad\nSTOPPING=1\udcff")
    assert server.recv(4096) == b"STATUS=bad STOPPING=1\\udcff"


def test_a_full_queue_never_holds_the_daemon_up(manager: tuple[str, socket.socket]) -> None:
    address, _ = manager
    sent = [notify({"NOTIFY_SOCKET": address}, STATUS="x") for _ in range(5000)]
    assert sent[0] is True
    assert sent[-1] is False


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1", "/nowhere/notify", "@", "/" + "x" * 200, "/a\0b"])
def test_no_listener_is_no_error(address: str) -> None:
    assert notify({"NOTIFY_SOCKET": address} if address else {}, READY="1") is False


# --- watchdog -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "7"}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "5", "WATCHDOG_PID": ""}, None),
        ({}, None),
    ],
)
def test_who_the_watchdog_waits_for(environ: dict[str, str], seconds: float | None) -> None:
    assert watchdog_seconds(environ, 7) == seconds


async def test_the_watchdog_is_fed_while_the_loop_turns_and_no_longer(
    manager: tuple[str, socket.socket],
) -> None:
    address, server = manager
    environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "40000"}
    with watched(environ):
        for _ in range(3):
            assert await asyncio.to_thread(server.recv, 100) == b"WATCHDOG=1"
        time.sleep(0.2)  # noqa: ASYNC251 - the loop hangs: that is the point
        server.setblocking(False)
        while True:
            try:
                server.recv(100)  # what was sent before it hung, if anything
            except BlockingIOError:
                break
        time.sleep(0.2)  # noqa: ASYNC251 - the same
        with pytest.raises(BlockingIOError):
            server.recv(100)
    await asyncio.sleep(0.1)
    with pytest.raises(BlockingIOError):
        server.recv(100)


async def test_without_a_watchdog_nothing_is_sent(manager: tuple[str, socket.socket]) -> None:
    address, server = manager
    server.setblocking(False)
    with watched({"NOTIFY_SOCKET": address}):
        await asyncio.sleep(0.05)
        with pytest.raises(BlockingIOError):
            server.recv(100)
