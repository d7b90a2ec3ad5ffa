"""Owns a packet socket: the frames of this namespace's devices, in a ring that the kernel fills and we empty.

TPACKET_V3 (Documentation/networking/packet_mmap.rst in the kernel's sources): no system call for a frame, and a
virtio_net_hdr before each that says what is unfinished in it. Free of: what is in the frames. Invariant: what found no
room in the ring is counted by the kernel; a frame handed out is a copy, so that its room is free again at once.
"""

from __future__ import annotations

import array
import fcntl
import mmap
import select
import socket
import struct
from typing import NamedTuple

from dataplane.errors import CaptureError
from dataplane.kernel import packet_filter

BLOCK_BYTES = 1 << 18
"""Room for a superframe, and what is handed over at once."""

RETIRE_MS = 10
"""A block that is not full is handed over after so long."""

LEAST_BLOCKS = 4

# linux/if_packet.h, asm-generic/socket.h, linux/sockios.h: not in Python's socket module
_SOL_PACKET = 263
_RX_RING, _STATISTICS, _VERSION, _VNET_HDR = 5, 6, 10, 15
_TPACKET_V3 = 2
_SIOCGIFHWADDR = 0x8927
_ETH_P_ALL = 0x0003
_STATUS_USER = 1
_STATUS_VLAN = 1 << 4
_OTHER_HOST, _OUTGOING = 3, 4
_ETHERNET_LIKE = (1, 772)
"""ARPHRD_ETHER, ARPHRD_LOOPBACK."""

_REQUEST = struct.Struct("=7I")
_BLOCK = struct.Struct("=IIIII")
_FRAME = struct.Struct("=6IHH20x4xi2xBx")
"""struct tpacket3_hdr, and behind it the sockaddr_ll up to the kind of packet."""

VNET_BYTES = 10


class Frame(NamedTuple):
    """`ns` since 1970. `sent`: by this node, else received. `device`: its index. `unfinished`: a virtio_net_hdr,
    which counts from the start of `data`. `network`: where the IP header begins."""

    ns: int
    sent: bool
    device: int
    unfinished: bytes
    data: bytes
    network: int


class PacketRing:
    """`PacketRing.open(bytes)`, `show(wanted)`, any number of `take`, then `hush` and `take` until all is taken, and
    `close`."""

    def __init__(self, receiver: socket.socket, ring: mmap.mmap) -> None:
        self._socket = receiver
        self._ring = ring
        self._blocks = len(ring) // BLOCK_BYTES
        self._next = 0
        self._dropped = 0
        self._poll = select.poll()
        self._poll.register(receiver, select.POLLIN)

    @classmethod
    def open(cls, size: int) -> PacketRing:
        """A ring of about `size` bytes that is shown nothing yet, in the calling thread's namespace. Raises
        CaptureError."""
        blocks = max(size // BLOCK_BYTES, LEAST_BLOCKS)
        try:
            receiver = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(_ETH_P_ALL))
        except OSError as error:
            raise CaptureError(
                f"cannot open a packet socket: {error.strerror}; the daemon needs CAP_NET_RAW, and from systemd "
                "AF_PACKET among its RestrictAddressFamilies"
            ) from None
        try:
            _attach(receiver, packet_filter.NOTHING)
            receiver.setsockopt(_SOL_PACKET, _VERSION, _TPACKET_V3)
            receiver.setsockopt(_SOL_PACKET, _VNET_HDR, 1)
            frames = BLOCK_BYTES // 2048 * blocks
            request = _REQUEST.pack(BLOCK_BYTES, blocks, 2048, frames, RETIRE_MS, 0, 0)
            receiver.setsockopt(_SOL_PACKET, _RX_RING, request)  # which forgets what came before the filter
            ring = mmap.mmap(receiver.fileno(), BLOCK_BYTES * blocks)
        except OSError as error:
            receiver.close()
            what = f"cannot make a ring of {size >> 20} MiB for packets: {error.strerror}"
            raise CaptureError(f"{what}; use a smaller --buffer") from None
        return cls(receiver, ring)

    def show(self, wanted: packet_filter.Wanted) -> None:
        """From now on what is wanted, in place of what was before. Raises CaptureError."""
        try:
            _attach(self._socket, packet_filter.program(wanted))
        except OSError as error:
            raise CaptureError(f"the kernel refuses the filter of a packet socket: {error.strerror}") from None

    def hush(self) -> None:
        """Nothing more is shown; what waits in the ring can be taken within RETIRE_MS."""
        _attach(self._socket, packet_filter.NOTHING)

    def take(self, wait_ms: int = 0) -> list[Frame] | None:
        """The frames of one block, in order; None where none is handed over yet."""
        at = self._next * BLOCK_BYTES
        if not self._handed_over(at) and not (wait_ms and self._poll.poll(wait_ms) and self._handed_over(at)):
            return None
        _, _, _, count, offset = _BLOCK.unpack_from(self._ring, at)
        frames = []
        here = at + offset
        for _ in range(count):
            frame, forward = self._frame(here)
            if frame is not None:
                frames.append(frame)
            here += forward
        struct.pack_into("=I", self._ring, at + 8, 0)
        self._next = (self._next + 1) % self._blocks
        return frames

    @property
    def dropped(self) -> int:
        """Frames for which there was no room, ever."""
        counts = self._socket.getsockopt(_SOL_PACKET, _STATISTICS, 12)  # which sets the kernel's own to 0
        self._dropped += int(struct.unpack("=3I", counts)[1])
        return self._dropped

    def close(self) -> None:
        self._ring.close()
        self._socket.close()

    def _handed_over(self, at: int) -> bool:
        return bool(_BLOCK.unpack_from(self._ring, at)[2] & _STATUS_USER)

    def _frame(self, at: int) -> tuple[Frame | None, int]:
        """None for what is none of ours: frames for other hosts, and those of a VLAN, which its own device shows."""
        forward, seconds, ns, kept, _, status, mac, network, index, kind = _FRAME.unpack_from(self._ring, at)
        if kind == _OTHER_HOST or status & _STATUS_VLAN:
            return None, forward
        start = at + mac
        data = self._ring[start : start + kept]
        unfinished = self._ring[start - VNET_BYTES : start]
        stamp = seconds * 10**9 + ns
        return Frame(stamp, kind == _OUTGOING, index, unfinished, data, network - mac), forward


def has_ethernet_header(device: str) -> bool:
    """Whether frames of the device begin with one; False too where there is no such device."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        try:
            answer = fcntl.ioctl(asker, _SIOCGIFHWADDR, struct.pack("16s24x", device.encode()[:15]))
        except OSError:
            return False
    return struct.unpack_from("=H", answer, 16)[0] in _ETHERNET_LIKE


def _attach(receiver: socket.socket, code: bytes) -> None:
    """The program takes the place of the former one at once."""
    instructions = array.array("B", code)
    receiver.setsockopt(socket.SOL_SOCKET, packet_filter.SO_ATTACH_FILTER, packet_filter.attachable(instructions))
