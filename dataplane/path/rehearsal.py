"""Owns a path without pumps: what the compiled path does with given packets and datagrams, from memory to memory.

Free of sockets, devices and threads. Invariant: nothing is sent, the same calls have the same effects, and it is the
pumps' own code that answers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from dataplane._rehearsal import MOST_MESSAGES, receive, transmit
from dataplane._tap import Tap, TapSet
from dataplane.path.capability import EVERYTHING
from dataplane.path.datapath import VXLAN_HEAD, Datapath
from dataplane.path.facts import Outer, PathEvent, SourceCheck, Vxlan, wide
from dataplane.path.superframe import VnetHeader

MOST_SEGMENTS = 1024
"""Of a superframe, and datagrams of a batch: what the pumps hold at once."""

_MTU = 0xFFFF
_RUN_DATAGRAMS = 64

__all__ = ["MOST_MESSAGES", "MOST_SEGMENTS", "Message", "OuterHeader", "Rehearsal"]


@dataclass(frozen=True, slots=True)
class OuterHeader:
    """What the outer headers of a path's datagrams have in common: our address, and where peers listen."""

    local: IPv4Address | IPv6Address
    peers_port: int


@dataclass(frozen=True, slots=True)
class Message:
    """What a UDP socket receives at once: datagrams of `size` bytes each, the last one may be shorter."""

    source: IPv4Address | IPv6Address
    port: int
    tos: int
    ttl: int
    size: int
    data: bytes


class Rehearsal:
    """`tap` sees what the path does. It takes everything that a path may be granted, and checks as one does."""

    def __init__(self, tap: Tap, outer: OuterHeader, *, source_check: SourceCheck, vxlan: Vxlan | None = None) -> None:
        self._device = os.memfd_create("loden-rehearsal")
        self._path = Datapath(
            self._device,
            Outer(-1, outer.peers_port),
            mtu=_MTU,
            source_check=source_check,
            vxlan=vxlan,
            capabilities=EVERYTHING,
            run_datagrams=_RUN_DATAGRAMS,
            on_event=_ignore,
        )
        frames: dict[str, int] = {"vni": vxlan.vni, "skip": VXLAN_HEAD} if vxlan else {}
        port = outer.peers_port
        taps = TapSet(
            [tap],
            local=outer.local.packed,
            port=port,
            peers_port=port,
            ports=(port,),
            ttl=64,
            dont_fragment=False,
            **frames,
        )
        self._path.engine.arm(taps)

    def set_route(
        self, subnet: IPv4Network | IPv6Network, address: IPv4Address | IPv6Address, mac: bytes = b""
    ) -> None:
        """As `Datapath.set_route`, from the next call on. Raises KernelError."""
        self._path.set_route(subnet, address, mac)
        self._path.publish()

    def remove_route(self, subnet: IPv4Network | IPv6Network) -> None:
        """As `Datapath.remove_route`, from the next call on."""
        self._path.remove_route(subnet)
        self._path.publish()

    def transmit(self, header: VnetHeader, packet: bytes) -> None:
        """A packet, or a superframe of at most MOST_SEGMENTS, comes from the TUN."""
        transmit(self._path.engine, header.encode(), packet)

    def receive(self, messages: Sequence[Message]) -> list[tuple[VnetHeader, bytes]]:
        """A batch of at most MOST_MESSAGES, with MOST_SEGMENTS datagrams in all, comes from the socket: what is written
        to the TUN."""
        batch = [(wide(one.source), one.port, one.tos, one.ttl, one.size, one.data) for one in messages]
        receive(self._path.engine, batch)
        written = os.pread(self._device, os.lseek(self._device, 0, os.SEEK_CUR), 0)
        os.lseek(self._device, 0, os.SEEK_SET)
        os.ftruncate(self._device, 0)
        return _taken_apart(written)

    def close(self) -> None:
        """Give its memory back."""
        os.close(self._device)


def _taken_apart(written: bytes) -> list[tuple[VnetHeader, bytes]]:
    """A TUN takes one packet at a write, a file just bytes: a packet that was accepted is as long as it says."""
    found, at = [], 0
    while at < len(written):
        header, at = VnetHeader.decode(written[at : at + 10]), at + 10
        four = written[at] >> 4 == 4
        length = int.from_bytes(written[at + 2 : at + 4] if four else written[at + 4 : at + 6]) + (0 if four else 40)
        found.append((header, written[at : at + length]))
        at += length
    return found


def _ignore(_event: PathEvent) -> None:
    """Nobody listens to a rehearsal."""
