"""Owns a datapath from memory to memory: a datagram socket pair stands for the TUN, loopback for the underlay.

Free of tests. Real TUN devices and namespaces are in tests/netns; here each packet and each counter is looked at alone.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Collection
from ipaddress import IPv4Address, IPv4Network

from scapy.layers.inet import IP, TCP, UDP

from dataplane.errors import DropReason
from dataplane.kernel import underlay
from dataplane.path import superframe
from dataplane.path.capability import Capability
from dataplane.path.datapath import Datapath
from dataplane.path.facts import IcmpSender, Outer, PathEvent, SourceCheck

HEADER = bytes(10)  # struct virtio_net_hdr with nothing asked for
LOCAL = IPv4Address("127.0.0.1")
PEER = IPv4Address("127.0.0.2")
OURS = IPv4Network("10.5.1.0/24")
THEIRS = IPv4Network("10.5.2.0/24")


class Rig:
    """One datapath, the pods' side of its TUN, and one peer's socket."""

    def __init__(
        self,
        check: SourceCheck = SourceCheck.NODE,
        icmp: socket.socket | None = None,
        capabilities: Collection[Capability] = (),
        spin: float = 0.0,
        moderation: float = 0.0,
    ) -> None:
        """Without `icmp`, a socket that refuses every ICMP error: they would leave by the machine's own routes."""
        self.pods, self.tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (self.pods, self.tun):
            end.setsockopt(socket.SOL_SOCKET, 32, 8 << 20)  # SO_SNDBUFFORCE: room for superframes, and for bursts
        self.tun.setblocking(False)
        self.pods.settimeout(5)
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind((str(LOCAL), 0))
        self.port = self._udp.getsockname()[1]
        self._udp.setblocking(False)
        self._udp.setsockopt(socket.SOL_SOCKET, underlay.SO_RCVBUFFORCE, 8 << 20)
        self._icmp = icmp or socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.peer = self.node(PEER)
        self.peer.setsockopt(socket.SOL_SOCKET, underlay.SO_RCVBUFFORCE, 8 << 20)  # whoever reads it may be starved
        self.events: list[PathEvent] = []
        self.outer = Outer(self._udp.fileno(), self.port)
        self.path = Datapath(
            self.tun.fileno(),
            self.outer,
            [IcmpSender(self._icmp.fileno(), OURS.network_address)],
            mtu=1472,
            source_check=check,
            capabilities=capabilities,
            run_datagrams=128,
            spin=spin,
            moderation=moderation,
            on_event=self.events.append,
        )

    def node(self, address: IPv4Address) -> socket.socket:
        node = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        node.bind((str(address), self.port))
        node.settimeout(5)
        return node

    def send_from_pod(self, packet: bytes) -> None:
        self.pods.send(HEADER + packet)

    def read_at_pod(self) -> bytes:
        got = self.pods.recv(70000)
        assert got[:10] == HEADER
        return got[10:]

    def send_from_peer(self, datagram: bytes, node: socket.socket | None = None) -> None:
        (node or self.peer).sendto(datagram, (str(LOCAL), self.port))

    def drops(self) -> dict[DropReason, int]:
        return {reason: count for reason, count in self.path.statistics().drops.items() if count}

    async def until(self, *, drops: dict[DropReason, int]) -> None:
        for _ in range(500):
            if self.drops() == drops:
                return
            await asyncio.sleep(0.01)
        assert self.drops() == drops

    async def close(self) -> None:
        await self.path.stop()
        for end in (self.pods, self.tun, self._udp, self._icmp, self.peer):
            end.close()


async def running(
    check: SourceCheck, icmp: socket.socket | None = None, spin: float = 0.0, moderation: float = 0.0
) -> AsyncIterator[Rig]:
    """A rig that carries, with one route."""
    made = Rig(check, icmp, spin=spin, moderation=moderation)
    made.path.set_route(THEIRS, PEER)
    made.path.start()
    try:
        yield made
    finally:
        await made.close()


def packet(source: str, destination: str, payload: bytes = b"hello") -> bytes:
    return bytes(IP(src=source, dst=destination, ttl=63) / UDP(sport=1000, dport=2000) / payload)


def tcp_superframe(size: int, segment: int) -> tuple[superframe.VnetHeader, bytes]:
    whole = bytes(IP(src="10.5.1.2", dst="10.5.2.9", flags="DF", id=7) / TCP(seq=1000, flags="PA") / os.urandom(size))
    partial = superframe.partial_checksum(whole, superframe.TCP, 20 + size)
    whole = whole[:36] + partial.to_bytes(2) + whole[38:]
    return superframe.VnetHeader(1, superframe.GSO_TCPV4, 40, segment, 20, 16), whole
