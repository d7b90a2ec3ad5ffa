"""sd_notify against real datagram sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.systemd import notify


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
