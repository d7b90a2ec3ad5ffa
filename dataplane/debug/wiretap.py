"""Owns captures without taps: packets as packet sockets show them on the overlay's devices and on the underlay's.

Used where the kernel carries the packets, and wherever the outer header is wanted as it is on the wire. Free of the
client and the file. Invariant: whatever frames come, they end in blocks or in a count; nothing stays behind when the
daemon is gone, for the kernel takes sockets and rings back by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from dataplane.debug import cutting, pcapng
from dataplane.debug.cutting import Piece
from dataplane.debug.pairing import OVERLAY, UNDERLAY, Pair, Pairing, Sighting, identity
from dataplane.debug.scene import Address, Scene, Way, Ways
from dataplane.debug.source import Account, Face, ending
from dataplane.errors import CaptureError, DropReason, KernelError
from dataplane.kernel import packet_ring
from dataplane.kernel.facts import holders
from dataplane.kernel.netlink import Netlink
from dataplane.kernel.packet_filter import ETHERNET, NETWORK_HEADER, Wanted
from dataplane.kernel.packet_ring import RETIRE_MS, Frame, PacketRing
from dataplane.path.datapath import Tap

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""How often devices and leases are looked at anew."""

OUT_BYTES = 1 << 20
NO_VNI = 0xFFFFFFFF
FILTER_BYTES = 1 << 18
SIDES = (OVERLAY, UNDERLAY)
NOTHING_KNOWN = Scene((), "", None, (), (), ())


@dataclass(frozen=True, slots=True)
class _View:
    """The scene as frames tell of it: devices by index. `pods`: where packets turn up that go without encapsulation."""

    scene: Scene
    ways: Ways
    tunnels: frozenset[int]
    pods: frozenset[int]
    underlay: frozenset[int]


class Wiretap:
    """A source of a capture; see dataplane.debug.source.Source."""

    def __init__(
        self, look: Callable[[], Scene], program: bytes, snaplen: int, ring_bytes: int, names: Mapping[Address, str]
    ) -> None:
        """`look` says how the scene is now; it is asked on the loop. `program`: the filter. `ring_bytes`: of each side.
        Raises CaptureError."""
        self._look = look
        self._snaplen = snaplen
        self._names = {address.packed: name for address, name in names.items()}
        self._filter = Tap(program, snaplen, FILTER_BYTES, tuple(reason.name.encode() for reason in DropReason))
        self._pairing = Pairing()
        self._view = _View(NOTHING_KNOWN, Ways(), frozenset(), frozenset(), frozenset())
        self._seen = [0, 0]
        self._dropped = [0, 0]
        self._matched = self._delivered = self._superframes = 0
        self._following: asyncio.Task[None] | None = None
        self._device = look().underlay
        self._ethernet = packet_ring.has_ethernet_header(self._device)
        self._rings: list[PacketRing] = []
        try:
            for _ in SIDES:
                self._rings.append(PacketRing.open(ring_bytes))
        except CaptureError:
            self.close()
            raise

    # --- the life of a source -------------------------------------------------------------------------------------

    @property
    def faces(self) -> tuple[Face, Face]:
        how = "superframes are cut and checksums finished, as a network card would do it"
        linktype = pcapng.LINKTYPE_ETHERNET if self._ethernet else pcapng.LINKTYPE_RAW
        return (
            Face(pcapng.LINKTYPE_RAW, f"as packet sockets show them: {how}"),
            Face(linktype, f"frames of {self._device} as a packet socket shows them: {how}"),
        )

    async def begin(self) -> None:
        await self._follow()
        self._following = asyncio.create_task(self._keep_following())

    async def end(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        for ring in self._rings:
            ring.hush()
        await asyncio.sleep(4 * RETIRE_MS / 1000)

    def close(self) -> None:
        for ring in self._rings:
            ring.close()

    def counts(self) -> tuple[int, int, int]:
        lost = self._dropped[OVERLAY]
        return self._matched + lost, lost, self._delivered  # whether the filter wanted what was lost, nobody knows

    def accounts(self) -> tuple[Account, Account]:
        if any(self._dropped):
            comment = "{} frames of the overlay and {} of the underlay found no room: a larger --buffer helps".format(
                *self._dropped
            )
        else:
            comment = ending(self._delivered, ordered=self._matched > self._delivered)
        overlay, underlay = (Account(self._matched, lost, self._delivered, comment) for lost in self._dropped)
        return overlay, underlay

    async def _keep_following(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self._follow()
            except (CaptureError, KernelError) as error:  # it goes on with what is looked at already
                log.warning("A capture cannot follow the devices: %s", error)

    async def _follow(self) -> None:
        """Take devices and leases for what they are now; a device that was made again has another number."""
        scene = self._look()
        found = await _resolve(scene, self._view)
        if found != self._view:
            base = ETHERNET if self._ethernet else NETWORK_HEADER
            port = scene.tunnel.port if scene.tunnel else 0
            networks = scene.networks if scene.direct else ()
            self._rings[OVERLAY].show(Wanted(found.tunnels, found.pods, networks=networks))
            self._rings[UNDERLAY].show(Wanted(some_of=found.underlay, port=port, networks=networks, base=base))
            self._view = found

    # --- packets --------------------------------------------------------------------------------------------------

    def drain(self, before: int, most: int) -> bytes:
        blocks: list[bytes] = []
        filled, more = 0, True
        while most > 0 and filled < OUT_BYTES:
            pair = self._pairing.ready(min(self._seen))
            if pair is not None:
                blocks += self._blocks(pair)
                filled += len(blocks[-1])
                most -= 1
            elif more:
                more = self._read(before)
            else:
                break
        for side, ring in enumerate(self._rings):
            self._dropped[side] = ring.dropped
        return b"".join(blocks)

    def _read(self, before: int) -> bool:
        """Take frames in from whichever side is behind; False where neither has any."""
        for side in sorted(SIDES, key=self._seen.__getitem__):
            frames = self._rings[side].take()
            if frames is None:
                self._seen[side] = max(self._seen[side], before)
                continue
            for frame in frames:
                self._take_overlay(frame) if side == OVERLAY else self._take_underlay(frame)
                self._seen[side] = frame.ns
            return True
        return False

    def _take_overlay(self, frame: Frame) -> None:
        view = self._view
        tunnel = view.scene.tunnel
        direct = frame.device in view.pods
        # what comes from a pod is sent to the underlay; what the tunnel's device sends is so, too
        sent = frame.sent != direct
        vni = None if direct or tunnel is None else tunnel.vni
        packets = cutting.packets(frame.unfinished, frame.data, frame.network)
        cut = self._superframe(len(packets), len(frame.data) - frame.network)
        for packet in packets:
            way = view.ways.of_packet(packet, sent=sent)
            if direct and not (way and way.direct):
                continue
            remote = way.address.packed if way else b""
            self._take(OVERLAY, frame.ns, Piece(packet, packet, vni), way, remote, sent=sent, cut=cut)

    def _take_underlay(self, frame: Frame) -> None:
        view = self._view
        data, network = frame.data, frame.network
        pieces = cutting.carried(frame.unfinished, data, network, view.scene.tunnel) if view.scene.tunnel else None
        direct = pieces is None
        if pieces is None:
            pieces = cutting.direct(frame.unfinished, data, network)
        cut = self._superframe(len(pieces), len(data) - network)
        link = b"" if self._ethernet else data[:network]
        for piece in pieces:
            way = view.ways.of_packet(piece.inner, sent=frame.sent)
            if direct and not (way and way.direct):
                continue
            remote = way.address.packed if direct and way else _far_end(data[network:], sent=frame.sent)
            shown = piece._replace(frame=piece.frame.removeprefix(link))
            self._take(UNDERLAY, frame.ns, shown, way or view.ways.of(remote), remote, sent=frame.sent, cut=cut)

    def _superframe(self, pieces: int, size: int) -> tuple[int, int]:
        """Number and bytes of what was cut."""
        if pieces == 1:
            return 0, 0
        self._superframes += 1
        return self._superframes, size

    def _take(
        self, side: int, ns: int, piece: Piece, way: Way | None, remote: bytes, *, sent: bool, cut: tuple[int, int]
    ) -> None:
        """Keep a packet that the filter lets through."""
        vni = NO_VNI if piece.vni is None else piece.vni
        if self._filter.offer(not sent, -1, remote, vni, piece.inner):
            lease = str(way.subnet) if way else ""
            named = identity(piece.inner) if piece.inner else b""
            self._matched += self._pairing.take(
                side, Sighting(ns, piece.frame, sent, piece.vni, named, cut, remote, lease)
            )

    def _blocks(self, pair: Pair) -> list[bytes]:
        """The blocks of one packet, in the order in which the node saw it."""
        comment, number = self._comment(pair), self._delivered
        self._delivered += 1
        sent = pair.first.sent
        return [
            pcapng.packet(
                side,
                shown.ns,
                shown.data[: self._snaplen],
                len(shown.data),
                comment=comment,
                direction=pcapng.OUTBOUND if sent else pcapng.INBOUND,
                number=number,
            )
            for side in (SIDES if sent else SIDES[::-1])
            if (shown := pair.sides[side]) is not None
        ]

    def _comment(self, pair: Pair) -> str:
        overlay, underlay = pair.sides
        first = pair.first
        other = (underlay if first is overlay else overlay) or first
        remote = underlay.remote if underlay else first.remote
        words = [f"peer={self._names.get(remote) or ip_address(remote)}"] if remote else []
        if lease := first.lease or other.lease:
            words.append(f"lease={lease}")
        words.append("dir=tx" if first.sent else "dir=rx")
        if first.vni is not None:
            words.append(f"vni={first.vni}")
        number, size = first.superframe if first.superframe[0] else other.superframe
        if number:
            words.append(f"superframe={number}/{size}")
        if underlay is None:
            words.append("outer=unseen")
        elif overlay is None:
            words.append("inner=unseen" if underlay.identity else "inner=none")
        return " ".join(words)


async def _resolve(scene: Scene, known: _View) -> _View:
    """The devices' numbers; what cannot be found is not there now. Raises KernelError."""
    tunnels = frozenset(_index(name) for name in scene.devices if name != scene.underlay) - {0}
    pods = await _pods(scene) - tunnels if scene.direct else frozenset()
    ways = known.ways if scene.ways == known.scene.ways else Ways(scene.ways)
    return _View(scene, ways, tunnels, pods, frozenset({_index(scene.underlay)}) - {0})


async def _pods(scene: Scene) -> frozenset[int]:
    netlink = await Netlink.open()
    try:
        return holders(await netlink.addresses(), scene.subnets)
    finally:
        await netlink.close()


def _index(name: str) -> int:
    with contextlib.suppress(OSError):
        return socket.if_nametoindex(name)
    return 0


def _far_end(outer: bytes, *, sent: bool) -> bytes:
    """The other node's address in an outer header."""
    if outer[0] >> 4 == 4:
        return outer[16:20] if sent else outer[12:16]
    return outer[24:40] if sent else outer[8:24]
