"""Owns the few packets that are sent to find a fault: ICMP echoes and one empty datagram.

Free of judgement: what was answered is told, not what it means. Used when somebody asks, in the caller's thread.
Invariant: at most ECHOES packets go to each target, and a target that says nothing costs SECONDS.
"""

from __future__ import annotations

import errno
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from dataplane.path.wire import checksum

ECHOES = 3
SECONDS = 1.0
GAP_SECONDS = 0.05
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_PROBE = 10, 23, 3
"""PROBE: set DF, and do not look at what was learnt of the path before (linux/in.h)."""

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Echo:
    """What to send: an ICMP echo in an IP packet of `size` bytes that forbids fragmentation; `source` None for the
    kernel's choice."""

    target: Address
    size: int
    source: Address | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """How many came back, and the shortest round trip in ms. `error`: why the kernel did not even send."""

    sent: int
    received: int
    ms: float | None
    error: str = ""


def echo(wanted: Sequence[Echo]) -> list[Answer]:
    """Send to all targets at once and wait until all have answered, or SECONDS. In order of `wanted`."""
    probes = [_Probe(each) for each in wanted]
    try:
        for _ in range(ECHOES):
            for probe in probes:
                probe.send()
            _collect(probes, time.monotonic() + GAP_SECONDS)
        _collect(probes, time.monotonic() + SECONDS)
        return [probe.answer() for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def poke(target: Address, port: int) -> str:
    """What an empty datagram to a UDP port meets: `refused` (nobody listens), `silent` (a listener, or a filter),
    else the kernel's reason for not sending it. A node that listens drops and counts it."""
    family = socket.AF_INET if target.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as poking:
        poking.settimeout(SECONDS)
        try:
            poking.connect((str(target), port))
            poking.send(b"")
            poking.recv(1)
        except TimeoutError:
            return "silent"
        except OSError as error:
            return "refused" if error.errno == errno.ECONNREFUSED else error.strerror or str(error)
    return "silent"


def _collect(probes: Sequence[_Probe], end: float) -> None:
    open_ones = {probe.fileno(): probe for probe in probes if probe.waits}
    while open_ones and (left := end - time.monotonic()) > 0:
        for descriptor in select.select(list(open_ones), [], [], left)[0]:
            open_ones[descriptor].receive()
            if not open_ones[descriptor].waits:
                del open_ones[descriptor]


class _Probe:
    """One target's raw socket. Others' echoes come to it as well and are told apart by identifier and cookie."""

    def __init__(self, wanted: Echo) -> None:
        self._wanted = wanted
        self._six = wanted.target.version == 6
        self._identifier = secrets.randbelow(1 << 16)
        self._cookie = secrets.token_bytes(8)
        self._sent: dict[int, float] = {}
        self._times: dict[int, float] = {}
        self._error = ""
        self._socket: socket.socket | None = None
        try:
            self._socket = self._open()
        except OSError as error:
            self._error = error.strerror or str(error)

    def _open(self) -> socket.socket:
        family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if self._six else (socket.AF_INET, 1)
        opened = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
        try:
            level, option = (
                (socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER) if self._six else (socket.IPPROTO_IP, IP_MTU_DISCOVER)
            )
            opened.setsockopt(level, option, PMTUDISC_PROBE)
            if self._wanted.source is not None:
                opened.bind((str(self._wanted.source), 0))
        except OSError:
            opened.close()
            raise
        return opened

    def fileno(self) -> int:
        return -1 if self._socket is None else self._socket.fileno()

    @property
    def waits(self) -> bool:
        return self._socket is not None and len(self._times) < len(self._sent)

    def send(self) -> None:
        if self._socket is None:
            return
        number = len(self._sent) + 1
        header = 40 if self._six else 20
        fill = self._cookie + bytes(max(0, self._wanted.size - header - 8 - len(self._cookie)))
        packet = struct.pack("!BBHHH", 128 if self._six else 8, 0, 0, self._identifier, number) + fill
        if not self._six:  # the kernel makes ICMPv6's, which covers the addresses
            packet = packet[:2] + struct.pack("!H", checksum(packet)) + packet[4:]
        try:
            self._socket.sendto(packet, (str(self._wanted.target), 0))
            self._error = ""
        except OSError as error:
            self._error = os.strerror(error.errno or 0)
        self._sent[number] = time.monotonic()

    def receive(self) -> None:
        if self._socket is None:
            return
        try:
            packet, (source, *_) = self._socket.recvfrom(65535)
        except OSError as error:  # an ICMP error about one of ours
            self._error = os.strerror(error.errno or 0)
            return
        at = 0 if self._six else (packet[0] & 15) * 4
        if len(packet) < at + 16 or source != str(self._wanted.target) or packet[at + 8 : at + 16] != self._cookie:
            return
        kind, _, _, identifier, number = struct.unpack_from("!BBHHH", packet, at)
        if kind == (129 if self._six else 0) and identifier == self._identifier and number in self._sent:
            self._times.setdefault(number, (time.monotonic() - self._sent[number]) * 1000)

    def answer(self) -> Answer:
        best = min(self._times.values(), default=None)
        return Answer(len(self._sent), len(self._times), best, "" if self._times else self._error)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
