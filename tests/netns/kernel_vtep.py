"""Owns the kernel as a judge of VXLAN datagrams: a vxlan device as flannel makes it, what its counters say of a
datagram, and the frames that come out behind it.

Free of: our own decapsulation. Invariant: everything lives in two namespaces that go with the judge; datagrams come
from the address that `PEER` names, one at a time, neither merged nor cut on their way.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.namespaces import Namespace, open_namespaces

PEER, HOST = "198.18.9.1", "198.18.9.2"
PEER_V6, HOST_V6 = "fd00:198:18:9::1", "fd00:198:18:9::2"
PORT = 8472
VNI = 1
HOST_MAC, PEER_MAC = "02:00:00:00:09:02", "02:00:00:00:09:01"
SO_RCVBUFFORCE = 33
ETH_P_ALL = 3
PACKET_OUTGOING = 4
SETTLE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the device counted for a batch: accepted frames, errors, drops."""

    accepted: int
    errors: int
    dropped: int


class KernelVtep:
    """Hand it datagrams with `judge`; see `frames` for what the host behind the device got."""

    def __init__(self, peer: Namespace, host: Namespace) -> None:
        peer.link_to(host, "out", "in")
        commands: Sequence[tuple[Namespace, str]] = (
            (peer, f"ip addr add {PEER}/24 dev out"),
            (host, f"ip addr add {HOST}/24 dev in"),
            (peer, "ip link set out mtu 1600"),
            (host, "ip link set in mtu 1600"),
            (peer, "ethtool -K out tx off gso off tso off gro off"),
            (host, "ethtool -K in tx off gso off tso off gro off"),
            (host, f"ip link add vx type vxlan id {VNI} dev in local {HOST} dstport {PORT} nolearning"),
            (host, f"ip link set vx address {HOST_MAC}"),
            (host, "ip link set vx mtu 1500 up"),
            (peer, f"ip addr add {PEER_V6}/64 dev out nodad"),
            (host, f"ip addr add {HOST_V6}/64 dev in nodad"),
            (host, f"ip link add vx6 type vxlan id {VNI} dev in local {HOST_V6} dstport {PORT} nolearning"),
            (host, f"ip link set vx6 address {HOST_MAC}"),
            (host, "ip link set vx6 mtu 1500 up"),
            (host, f"bridge fdb add {PEER_MAC} dev vx dst {PEER} self permanent"),
            (host, f"bridge fdb add {PEER_MAC} dev vx6 dst {PEER_V6} self permanent"),
        )
        for namespace, command in commands:
            namespace.command(*command.split())
        for device in ("vx", "vx6"):
            host.run(_quiet, device)
        self.host = host
        self._sender = peer.run(_open_sender)
        self._capture = host.run(_open_capture, "vx")
        self._seen = peer.run(_open_capture, "out")
        self._devices = {4: host.run(_open_capture, "vx"), 6: host.run(_open_capture, "vx6")}

    def close(self) -> None:
        """Close the descriptors; the namespaces are their maker's."""
        for end in (self._sender, self._capture, self._seen, *self._devices.values()):
            end.close()

    def judge(self, datagrams: Sequence[tuple[bytes, int]]) -> tuple[Judgement, list[bytes]]:
        """Send each (payload, outer TOS); what the device counted, and the frames that came out, in order."""
        before = self._counters()
        for payload, tos in datagrams:
            control = [(socket.IPPROTO_IP, socket.IP_TOS, struct.pack("i", tos))]
            self._sender.sendmsg([payload], control, 0, (HOST, PORT))
        self._sender.sendto(_MARK_DATAGRAM, (HOST, PORT))
        frames = self._frames()
        accepted, errors, dropped = (now - then for then, now in zip(before, self._counters(), strict=True))
        return Judgement(accepted - 1, errors, dropped), frames

    def encapsulate(self, packet: bytes, outer: int) -> bytes:
        """The outer IP packet, of that version, in which the device sends a packet to the peer."""
        ethertype = b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd"
        self._devices[outer].send(_bytes(PEER_MAC) + _bytes(HOST_MAC) + ethertype + packet)
        return self.next_datagram(outer)

    def next_datagram(self, outer: int) -> bytes:
        """The next outer IP packet to the peer's VXLAN port that passes the underlay."""
        l4 = 14 + (20 if outer == 4 else 40)
        end = time.monotonic() + SETTLE_SECONDS
        while select.select([self._seen], [], [], max(0.0, end - time.monotonic()))[0]:
            frame, address = self._seen.recvfrom(70000)
            mine = frame[12:14] == (b"\x08\x00" if outer == 4 else b"\x86\xdd")
            if mine and address[2] != PACKET_OUTGOING and frame[l4 + 2 : l4 + 4] == struct.pack("!H", PORT):
                return frame[14:]
        raise AssertionError(f"nothing has left for the peer within {SETTLE_SECONDS:.0f} s")

    def _frames(self) -> list[bytes]:
        """What came out before the mark, which came last: by then the device has seen everything."""
        found: list[bytes] = []
        end = time.monotonic() + SETTLE_SECONDS
        while select.select([self._capture], [], [], max(0.0, end - time.monotonic()))[0]:
            frame, address = self._capture.recvfrom(70000)
            if frame == _MARK:
                return found
            if address[2] != PACKET_OUTGOING:
                found.append(frame)
        raise AssertionError(f"the device has not handed over the mark within {SETTLE_SECONDS:.0f} s")

    def _counters(self) -> tuple[int, int, int]:
        return self.host.run(_read_counters, "vx")


def _bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


_MARK = _bytes(HOST_MAC) + bytes.fromhex("02000000097f88b5") + b"mark".ljust(46, b"\0")
_MARK_DATAGRAM = b"\x08\0\0\0" + struct.pack("!I", VNI << 8) + _MARK


@contextlib.contextmanager
def open_vtep() -> Iterator[KernelVtep]:
    """A judge in namespaces of its own."""
    with open_namespaces(2) as (peer, host):
        vtep = KernelVtep(peer, host)
        try:
            yield vtep
        finally:
            vtep.close()


def _open_sender() -> socket.socket:
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.bind((PEER, 0))
    return sender


def _open_capture(device: str) -> socket.socket:
    capture = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    capture.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
    capture.bind((device, ETH_P_ALL))
    return capture


def _quiet(device: str) -> None:
    """Nothing of its own comes out of the device."""
    Path("/proc/sys/net/ipv6/conf", device, "disable_ipv6").write_text("1")


def _read_counters(device: str) -> tuple[int, int, int]:
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == device:
            received = numbers.split()
            return int(received[1]), int(received[2]), int(received[3])
    raise AssertionError(f"no device {device}")
