"""Owns the checked traffic of the lab: a TCP stream and numbered UDP datagrams whose every byte is compared.

Free of: namespaces and daemons; it is a plain program for two pods, `python -m dataplane.lab.traffic VERB ...`.
A sink prints `ready` once it listens, a source prints one line of JSON and ends with 0 only if nothing was wrong.

TCP: the source sends a pseudo-random stream and shuts its side down; the sink answers with length, SHA-256 and
seconds of what arrived. UDP: each datagram's bytes follow from (size, number), its first bytes are the low bytes of
the number. Nothing is ever sent twice. A TCP connection beside it carries the sink's acknowledgements, so that at
most WINDOW datagrams are under way and no socket buffer can overflow: what is missing was lost on the path.

Invariant: a source that ends with 0 has had every byte that it sent counted and found equal at the sink.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

PORT = 5201
WINDOW = 64
"""Datagrams under way. Below 128, so that the one number byte of a 1-byte datagram names it without doubt."""
_BYTES_UNDER_WAY = 96 * 1024
"""Large ones wait for each other earlier: the fragments of all must fit the queues on the way."""
_SO_RCVBUFFORCE = 33
_RECEIVE_BUFFER = 4 << 20
"""The kernel charges a fragmented datagram three times its size, and gives it back late (net/ipv4/udp.c)."""
_STALL = 2.0
"""Seconds without any acknowledgement after which what is under way counts as lost."""
_BLOCK = 64 * 1024
_POOL = 1 << 20
_ACK = struct.Struct("!IQ")  # size, numbers seen so far: highest + 1


class _Pool:
    """A megabyte of pseudo-random bytes, read in windows; equal on both sides of a run."""

    def __init__(self, seed: int) -> None:
        data = random.Random(seed).randbytes(_POOL)
        self._bytes = memoryview(data + data[:_BLOCK])

    def block(self, number: int, size: int) -> memoryview:
        """Bytes for one number; the start wanders so that neighbours and far numbers differ."""
        start = (number * 7919 + size * 104_729) % _POOL
        return self._bytes[start : start + size]


def window_of(size: int) -> int:
    """How many datagrams of that size may be under way."""
    return max(1, min(WINDOW, _BYTES_UNDER_WAY // size))


def content(pool: _Pool, size: int, number: int) -> bytes:
    """The payload of datagram `number` among those of this size."""
    head = number.to_bytes(8, "little")[: min(size, 8)]
    return head + pool.block(number, size)[len(head) :]


# --- TCP ------------------------------------------------------------------------------------------------------


def tcp_sink(arguments: argparse.Namespace) -> int:
    """Take one connection, hash what comes, answer with what came."""
    with _listener(arguments) as listener:
        _ready()
        connection, _ = listener.accept()
    buffer = memoryview(bytearray(1 << 20))
    digest, total, began = hashlib.sha256(), 0, 0.0
    with connection:
        while got := connection.recv_into(buffer):
            began = began or time.perf_counter()
            digest.update(buffer[:got])
            total += got
        seconds = time.perf_counter() - began if began else 0.0
        connection.sendall(json.dumps({"bytes": total, "sha256": digest.hexdigest(), "seconds": seconds}).encode())
    return 0


def tcp_source(arguments: argparse.Namespace) -> int:
    """Send at least `--bytes`, then compare hashes."""
    pool, digest, total = _Pool(arguments.seed), hashlib.sha256(), 0
    with _connect(arguments.host, arguments.port) as connection:
        number = 0
        while total < arguments.bytes or (arguments.until_eof and not _stdin_closed()):
            block = pool.block(number, _BLOCK)
            if total < arguments.bytes < total + _BLOCK:
                block = block[: arguments.bytes - total]
            digest.update(block)
            connection.sendall(block)
            total += len(block)
            number += 1
        connection.shutdown(socket.SHUT_WR)
        answer = json.loads(_read_to_end(connection) or b"{}")
    sent = digest.hexdigest()
    equal = answer.get("bytes") == total and answer.get("sha256") == sent
    print(json.dumps({"bytes": total, "sha256": sent, "sink": answer, "equal": equal}), flush=True)
    return 0 if equal else 1


# --- UDP ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """What the sink saw. `altered` counts datagrams whose bytes are not what any number gives: those are lost too."""

    received: int = 0
    altered: int = 0
    duplicated: int = 0
    reordered: int = 0
    seen: dict[int, bytearray] = field(default_factory=dict)
    """Per size: one byte per number, 1 where it came."""
    following: dict[int, int] = field(default_factory=dict)
    """Per size: highest number that came, plus 1."""
    unreported: set[int] = field(default_factory=set)
    """Sizes whose `following` has grown since the last acknowledgement."""

    def take(self, pool: _Pool, datagram: bytes) -> None:
        size = len(datagram)
        number = self._number(datagram, self.following.get(size, 0))
        if datagram != content(pool, size, number):
            self.altered += 1
            return
        seen = self.seen.setdefault(size, bytearray())
        if number >= len(seen):
            seen.extend(bytes(number + 1 - len(seen)))
        if seen[number]:
            self.duplicated += 1
            return
        seen[number] = 1
        self.received += 1
        if number < self.following.get(size, 0):
            self.reordered += 1
        else:
            self.following[size] = number + 1
            self.unreported.add(size)

    @staticmethod
    def _number(datagram: bytes, expected: int) -> int:
        """The number whose low bytes stand in the datagram and which lies nearest to the expected one."""
        width = 1 << (8 * min(len(datagram), 8))
        low = int.from_bytes(datagram[:8], "little")
        number = expected - expected % width + low
        if number - expected > width // 2 and number >= width:
            return number - width
        return number + width if expected - number > width // 2 else number


def udp_sink(arguments: argparse.Namespace) -> int:
    """Check datagrams until the source ends its side of the connection, then answer with the tally."""
    with (
        _listener(arguments) as listener,
        socket.socket(_family(arguments.host), socket.SOCK_DGRAM) as incoming,
    ):
        incoming.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        incoming.bind((arguments.host, arguments.port))
        incoming.setblocking(False)
        _ready()
        control, _ = listener.accept()
        with control:
            control.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pool, tally, unacknowledged = _Pool(arguments.seed), Tally(), 0
            while True:
                readable, _, _ = select.select([incoming, control], [], [], 0.02)
                for datagram in _drain(incoming) if incoming in readable else ():
                    tally.take(pool, datagram)
                    unacknowledged += 1
                    if unacknowledged >= -(-window_of(len(datagram)) // 4):
                        _acknowledge(control, tally)
                        unacknowledged = 0
                if unacknowledged and not readable:  # nothing more under way: the rest of a window
                    _acknowledge(control, tally)
                    unacknowledged = 0
                if control in readable and control.recv(64) == b"":
                    break
            for datagram in _drain(incoming):
                tally.take(pool, datagram)
            sizes = {size: sum(seen) for size, seen in tally.seen.items()}
            counts = {name: getattr(tally, name) for name in ("received", "altered", "duplicated", "reordered")}
            control.sendall(_ACK.pack(0, 0) + json.dumps({**counts, "sizes": sizes}).encode())
    return 0


def udp_source(arguments: argparse.Namespace) -> int:
    """Send `--count` datagrams of each size, in rounds until standard input closes if asked to."""
    pool = _Pool(arguments.seed)
    sent: dict[int, int] = dict.fromkeys(arguments.sizes, 0)
    stalls: list[int] = []
    began = time.perf_counter()
    with (
        _connect(arguments.host, arguments.port) as control,
        socket.socket(_family(arguments.host), socket.SOCK_DGRAM) as outgoing,
    ):
        outgoing.connect((arguments.host, arguments.port))
        window = _Window(control)
        while True:
            for size in arguments.sizes:
                for number in range(sent[size], sent[size] + arguments.count):
                    outgoing.send(content(pool, size, number))
                    stalls += [size] if not window.wait(size, number + 1 - window_of(size)) else []
                sent[size] += arguments.count
                stalls += [size] if not window.wait(size, sent[size]) else []
            if not arguments.until_eof or _stdin_closed():
                break
            time.sleep(arguments.pause)
        control.shutdown(socket.SHUT_WR)
        answer = window.verdict()
    arrived = {int(size): count for size, count in answer["sizes"].items()}
    lost = {size: sent[size] - arrived.get(size, 0) for size in sent if sent[size] != arrived.get(size, 0)}
    result = {
        "sent": sum(sent.values()),
        **{name: answer[name] for name in ("received", "altered", "duplicated", "reordered")},
        "lost": sum(lost.values()),
        "lost_by_size": lost,
        "stalls": stalls,
        "seconds": time.perf_counter() - began,
    }
    print(json.dumps(result), flush=True)
    return 1 if lost or answer["altered"] or answer["duplicated"] else 0


class _Window:
    """The source's side of the acknowledgements."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._pending = b""
        self._following: dict[int, int] = {}

    def wait(self, size: int, number: int) -> bool:
        """Until the sink has seen `number` datagrams of this size; False after a stall, which is then forgiven."""
        while self._following.get(size, 0) < number:
            readable, _, _ = select.select([self._control], [], [], _STALL)
            if not readable:
                self._following[size] = number
                return False
            self._read()
        return True

    def _read(self) -> None:
        received = self._control.recv(4096)
        if not received:
            raise SystemExit("the sink closed the connection")
        self._pending += received
        while len(self._pending) >= _ACK.size:
            size, following = _ACK.unpack_from(self._pending)
            if size == 0:
                return
            self._pending = self._pending[_ACK.size :]
            self._following[size] = max(following, self._following.get(size, 0))

    def verdict(self) -> dict[str, dict[str, int]]:
        """The tally that the sink sends after its last acknowledgement."""
        self._pending += _read_to_end(self._control)
        while _ACK.unpack_from(self._pending)[0]:
            self._pending = self._pending[_ACK.size :]
        verdict: dict[str, dict[str, int]] = json.loads(self._pending[_ACK.size :])
        return verdict


def _acknowledge(control: socket.socket, tally: Tally) -> None:
    control.sendall(b"".join(_ACK.pack(size, tally.following[size]) for size in sorted(tally.unreported)))
    tally.unreported.clear()


def _drain(incoming: socket.socket) -> Iterator[bytes]:
    for _ in range(WINDOW):
        try:
            yield incoming.recv(65_535)
        except BlockingIOError:
            return


# --- both -----------------------------------------------------------------------------------------------------


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _listener(arguments: argparse.Namespace) -> socket.socket:
    return socket.create_server((arguments.host, arguments.port), family=_family(arguments.host), backlog=1)


def _connect(host: str, port: int) -> socket.socket:
    connection = socket.create_connection((host, port), timeout=20)
    connection.settimeout(60)  # a path that is dead for a minute is a failure, not a wait
    return connection


def _read_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def _stdin_closed() -> bool:
    readable, _, _ = select.select([sys.stdin], [], [], 0)
    return bool(readable) and os.read(sys.stdin.fileno(), 1) == b""


def _ready() -> None:
    print("ready", flush=True)


def parse_sizes(text: str) -> list[int]:
    """`1,5-7,1444` -> [1, 5, 6, 7, 1444]. Raises ValueError."""
    sizes: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        sizes.extend(range(int(first), int(last if dash else first) + 1))
    if not sizes or min(sizes) < 1 or max(sizes) > 65_507:
        raise ValueError(f"sizes are from 1 to 65507, not {text!r}")
    return sizes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dataplane.lab.traffic", description="Checked traffic of two pods.")
    verbs = parser.add_subparsers(required=True)
    for run in (tcp_sink, tcp_source, udp_sink, udp_source):
        name = run.__name__.replace("_", "-")
        verb = verbs.add_parser(name, help=(run.__doc__ or "").splitlines()[0])
        verb.set_defaults(run=run)
        verb.add_argument("--port", type=int, default=PORT)
        verb.add_argument("--seed", type=int, default=1, help="UDP: the same on both sides")
        verb.add_argument("host", nargs="?" if name.endswith("-sink") else None, default="", help="the sink's address")
        if name.endswith("-source"):
            verb.add_argument("--until-eof", action="store_true", help="go on until standard input closes")
        if name == "tcp-source":
            verb.add_argument("--bytes", type=int, required=True)
        if name == "udp-source":
            verb.add_argument("--sizes", type=parse_sizes, required=True, help="payload bytes, as in 1,2,100-120,1444")
            verb.add_argument("--count", type=int, default=1000, help="datagrams of each size")
            verb.add_argument("--pause", type=float, default=0.0, help="seconds between two rounds")
    arguments = parser.parse_args()
    run = arguments.run
    return int(run(arguments))


if __name__ == "__main__":
    sys.exit(main())
