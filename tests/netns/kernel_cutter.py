"""Owns the kernel as a cutter of superframes: a TUN that takes them, a router without offloads, a socket that sees the
packets that come out.

Free of: what is written. Invariant: everything lives in two namespaces that go with the cutter; nothing but what was
written through the TUN is returned.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.namespaces import Namespace, open_namespaces

TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
OFFLOADS = 0x01 | 0x02 | 0x04 | 0x08 | 0x20 | 0x40  # CSUM, TSO4, TSO6, TSO_ECN, USO4, USO6
SO_RCVBUFFORCE = 33
ETH_P_ALL = 3
PACKET_OUTGOING = 4
MAC = "02:00:00:00:00:09"
MTU = "65535"


class KernelCutter:
    """Write superframes with `write`, read with `collect` what the kernel made of them."""

    def __init__(self, router: Namespace, far: Namespace) -> None:
        router.link_to(far, "out", "seen")
        self._tun = router.run(_open_tun, "in")
        commands: Sequence[tuple[Namespace, str]] = (
            (router, f"ip link set in up mtu {MTU}"),
            (router, f"ip link set out mtu {MTU}"),
            (far, f"ip link set seen mtu {MTU} address {MAC} arp off"),
            (router, "ethtool -K out tx off sg off tso off gso off tx-udp-segmentation off"),
            (far, "ethtool -K seen gro off"),
            (router, "ip addr add 172.16.9.254/24 dev out"),
            (router, f"ip neigh add 172.16.9.1 lladdr {MAC} dev out nud permanent"),
            (router, "ip -6 addr add fd09::fe/64 dev out nodad"),
            (router, f"ip -6 neigh add fd09::1 lladdr {MAC} dev out nud permanent"),
            (router, "ip route add 10.0.0.0/8 dev in"),
            (router, "ip -6 route add fd01::/16 dev in"),
        )
        for namespace, command in commands:
            namespace.command(*command.split())
        router.run(_become_router)
        self._capture = far.run(_open_capture, "seen")

    def close(self) -> None:
        """Close the descriptors; the namespaces are their maker's."""
        os.close(self._tun)
        self._capture.close()

    def write(self, header: bytes, packet: bytes) -> None:
        """Raises OSError (EINVAL) where the kernel does not take it."""
        os.writev(self._tun, [header, packet])

    def collect(self, count: int, timeout: float = 3) -> list[bytes]:
        """The IP packets that came out, in order: `count`, and whatever came besides; fewer after `timeout` seconds."""
        found: list[bytes] = []
        while True:
            wait = timeout if len(found) < count else 0
            if not select.select([self._capture], [], [], wait)[0]:
                return found
            frame, address = self._capture.recvfrom(70000)
            if address[2] != PACKET_OUTGOING and _is_ours(frame):
                found.append(frame[14:])


@contextlib.contextmanager
def open_cutter() -> Iterator[KernelCutter]:
    """A cutter in namespaces of its own."""
    with open_namespaces(2) as (router, far):
        cutter = KernelCutter(router, far)
        try:
            yield cutter
        finally:
            cutter.close()


def _is_ours(frame: bytes) -> bool:
    """Neither neighbour discovery nor anything else that a router says by itself."""
    if frame[12:14] == b"\x08\x00":
        return frame[26] == 10
    return frame[12:14] == b"\x86\xdd" and frame[22:24] == b"\xfd\x01"


def _open_tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", 10))
    fcntl.ioctl(fd, TUNSETOFFLOAD, OFFLOADS)
    return fd


def _become_router() -> None:
    for path, value in (
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/in/rp_filter", "0"),
    ):
        Path("/proc/sys/net", path).write_text(value)


def _open_capture(device: str) -> socket.socket:
    capture = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    capture.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 256 << 20)
    capture.bind((device, ETH_P_ALL))
    return capture
