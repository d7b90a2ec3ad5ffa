"""Owns checked traffic of many flows between two pods: numbered datagrams, some of them sent as superframes.

A plain program, `python -m tests.backend.flows sink|source ADDRESS`. The source sends from a socket for each flow, so
that each has a port of its own, and never has more than WINDOW datagrams under way: nothing overflows but what others
fill. The sink looks at each flow's numbers and answers on a TCP connection how many datagrams it has had; at last, what
was wrong.

Invariant: a datagram that comes after a later one of its flow is counted as `reordered`, whatever else happens.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
from dataclasses import asdict, dataclass, field

PORT = 6000
WINDOW = 512
STALL = 3.0
"""Seconds without any acknowledgement after which what is under way counts as lost."""
FLOWS = 48
BURST = 8
SO_RCVBUFFORCE = 33
UDP_SEGMENT = 103
HEAD = struct.Struct("!HIH")  # flow, number, length
ACK = struct.Struct("!Q")


@dataclass
class Tally:
    received: int = 0
    altered: int = 0
    reordered: int = 0
    duplicated: int = 0
    seen: dict[int, set[int]] = field(default_factory=dict)
    highest: dict[int, int] = field(default_factory=dict)

    def take(self, datagram: bytes) -> None:
        flow, number, length = HEAD.unpack_from(datagram)
        if length != len(datagram) or datagram[HEAD.size :] != body(flow, number, length):
            self.altered += 1
            return
        seen = self.seen.setdefault(flow, set())
        self.duplicated += number in seen
        self.reordered += number < self.highest.get(flow, -1)
        self.highest[flow] = max(number, self.highest.get(flow, -1))
        self.received += number not in seen
        seen.add(number)


def body(flow: int, number: int, length: int) -> bytes:
    return bytes(((flow * 7 + number) & 0xFF,)) * (length - HEAD.size)


def size_of(flow: int, number: int) -> int:
    return 20 + (flow * 131 + number * 977) % 1300


def sink(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        socket.create_server((address, PORT), family=family) as listener,
        socket.socket(family, socket.SOCK_DGRAM) as incoming,
    ):
        incoming.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
        incoming.bind((address, PORT))
        incoming.setblocking(False)
        print("ready", flush=True)  # noqa: T201 - a program of its own, whose output is read
        control, _ = listener.accept()
        control.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tally, came = Tally(), 0
        while True:
            readable, _, _ = select.select([incoming, control], [], [], 30)
            if incoming in readable:
                try:
                    for _ in range(64):
                        tally.take(incoming.recv(2048))
                        came += 1
                except BlockingIOError:
                    pass
                control.sendall(ACK.pack(came))
            elif control in readable or not readable:
                break
        verdict = {name: value for name, value in asdict(tally).items() if name not in ("seen", "highest")}
        control.sendall(ACK.pack(0) + json.dumps(verdict).encode())
        control.close()


def source(address: str, rounds: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    control = socket.create_connection((address, PORT), timeout=30)
    flows = []
    for _ in range(FLOWS):
        flow = socket.socket(family, socket.SOCK_DGRAM)
        flow.connect((address, PORT))
        flows.append(flow)
    window, sent = Window(control), 0
    for turn in range(rounds):
        for number, flow in enumerate(flows):
            window.wait(sent + BURST - WINDOW)
            _send_burst(flow, number, turn)
            sent += BURST
    # the end of the connection is a flow of its own, which may overtake the others
    window.wait(sent)
    control.shutdown(socket.SHUT_WR)
    print(json.dumps({"sent": sent, **window.verdict()}), flush=True)  # noqa: T201 - the same


class Window:
    """The source's side of the acknowledgements."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._pending = b""
        self._arrived = self._lost = 0

    def wait(self, number: int) -> None:
        """Until so many datagrams have arrived; what is missing after a stall counts as lost."""
        while self._arrived + self._lost < number:
            readable, _, _ = select.select([self._control], [], [], STALL)
            if not readable:
                self._lost = number - self._arrived
                return
            got = self._control.recv(65536)
            assert got, "the sink has ended"
            self._pending += got
            whole = len(self._pending) // ACK.size * ACK.size
            if whole:
                (self._arrived,) = ACK.unpack_from(self._pending, whole - ACK.size)
                self._pending = self._pending[whole:]

    def verdict(self) -> dict[str, int]:
        while got := self._control.recv(65536):
            self._pending += got
        verdict: dict[str, int] = json.loads(self._pending[self._pending.index(bytes(8) + b"{") + 8 :])
        return verdict


def _send_burst(flow: socket.socket, number: int, turn: int) -> None:
    """Every third as one superframe of datagrams of one size."""
    first = turn * BURST
    if (turn + number) % 3:
        for each in range(first, first + BURST):
            length = size_of(number, each)
            flow.send(HEAD.pack(number, each, length) + body(number, each, length))
        return
    length = size_of(number, first)
    whole = b"".join(
        HEAD.pack(number, each, length) + body(number, each, length) for each in range(first, first + BURST)
    )
    flow.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, length)
    flow.send(whole)
    flow.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 0)


if __name__ == "__main__":
    if sys.argv[1] == "sink":
        sink(sys.argv[2])
    else:
        source(sys.argv[2], int(sys.argv[3]))
