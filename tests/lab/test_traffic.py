"""The checked traffic finds each kind of damage, and none where there is none."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.lab import traffic

TRAFFIC = [sys.executable, "-m", "dataplane.lab.traffic"]


def free_port() -> int:
    """A port that is free for TCP and UDP on loopback."""
    with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        port: int = tcp.getsockname()[1]
        udp.bind(("127.0.0.1", port))
        return port


def run(kind: str, port: int, *flags: str, source_port: int | None = None) -> tuple[int, dict[str, object]]:
    sink = subprocess.Popen([*TRAFFIC, f"{kind}-sink", f"--port={port}"], stdout=subprocess.PIPE, text=True)
    with sink:
        assert sink.stdout is not None
        assert sink.stdout.readline() == "ready\n"
        argv = [*TRAFFIC, f"{kind}-source", "127.0.0.1", f"--port={source_port or port}", *flags]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
        sink.kill()
    return done.returncode, json.loads(done.stdout)


def test_a_tcp_stream_is_counted_and_compared() -> None:
    code, result = run("tcp", free_port(), "--bytes=3000001")
    assert code == 0
    assert result["equal"] is True
    assert result["bytes"] == 3_000_001


def test_numbered_datagrams_of_every_kind_of_size_arrive() -> None:
    code, result = run("udp", free_port(), "--sizes=1-9,64,1444", "--count=600")
    assert code == 0
    assert (result["sent"], result["received"], result["lost"], result["altered"]) == (11 * 600, 11 * 600, 0, 0)


class Spoiler:
    """A path on loopback between source and sink that treats each datagram as it is told."""

    def __init__(self, sink_port: int, treat: Callable[[int, bytes], list[bytes]]) -> None:
        self.sink = ("127.0.0.1", sink_port)
        self.treat = treat
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.tcp.getsockname()[1]
        self.udp.bind(("127.0.0.1", self.port))
        threading.Thread(target=self.carry_datagrams, daemon=True).start()
        threading.Thread(target=self.carry_control, daemon=True).start()

    def carry_datagrams(self) -> None:
        out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for number in range(1_000_000):
            for datagram in self.treat(number, self.udp.recv(65_535)):
                out.sendto(datagram, self.sink)

    def carry_control(self) -> None:
        near, _ = self.tcp.accept()
        far = socket.create_connection(self.sink)
        threading.Thread(target=self.pump, args=(near, far), daemon=True).start()
        self.pump(far, near)

    @staticmethod
    def pump(here: socket.socket, there: socket.socket) -> None:
        while data := here.recv(65_536):
            there.sendall(data)
        there.shutdown(socket.SHUT_WR)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("treat", "expected"),
    [
        (lambda n, d: [] if n == 37 else [d], {"lost": 1, "altered": 0, "duplicated": 0}),
        (lambda n, d: [flipped(d)] if n == 37 else [d], {"lost": 1, "altered": 1, "duplicated": 0}),
        (lambda n, d: [d[:-1]] if n == 37 else [d], {"lost": 1, "altered": 1, "duplicated": 0}),
        (lambda n, d: [d, d] if n == 37 else [d], {"lost": 0, "altered": 0, "duplicated": 1}),
        (lambda n, d: [] if n >= 90 else [d], {"lost": 10, "altered": 0, "duplicated": 0}),
    ],
    ids=["lost", "altered", "cut", "duplicated", "tail lost"],
)
def test_each_kind_of_damage_is_found(
    treat: Callable[[int, bytes], list[bytes]], expected: dict[str, int]
) -> None:
    port = free_port()
    code, result = run("udp", port, "--sizes=500", "--count=100", source_port=Spoiler(port, treat).port)
    assert code == 1
    assert {name: result[name] for name in expected} == expected


@given(st.integers(1, 1500), st.integers(0, 1 << 40), st.integers(-100, 100))
def test_a_number_is_read_back_from_its_low_bytes(size: int, expected: int, offset: int) -> None:
    number = max(0, expected + offset)
    datagram = traffic.content(traffic._Pool(1), size, number)
    assert len(datagram) == size
    assert traffic.Tally._number(datagram, expected) == number


@pytest.mark.parametrize(("text", "sizes"), [("1", [1]), ("1,5-7,1444", [1, 5, 6, 7, 1444])])
def test_sizes_are_lists_of_numbers_and_ranges(text: str, sizes: list[int]) -> None:
    assert traffic.parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "0", "1-", "x", "5-2", "70000"])
def test_sizes_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        traffic.parse_sizes(text)
