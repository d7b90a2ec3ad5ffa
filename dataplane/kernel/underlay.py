"""Owns the UDP sockets that face the other nodes: bound, sized and set up for the pumps.

Free of: datagrams. Invariant: a socket has its address and port for itself (no SO_REUSEADDR, no SO_REUSEPORT), and
no error queue: with IP_RECVERR one dead peer's ICMP would fail the next send to a live one.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from dataplane.errors import KernelError
from dataplane.kernel.facts import Link
from dataplane.path.capability import Capability

BUFFER_BYTES = 8 << 20
"""Asked for in each direction: about 60 ms of 1,500-byte datagrams at 1 Gbit/s, while a pump is not scheduled."""

# linux/in.h, asm-generic/socket.h: not in Python's socket module before 3.14
IP_PKTINFO = 8
IP_MTU_DISCOVER = 10
IP_PMTUDISC_WANT = 1
IP_MTU = 14
UDP_SEGMENT = 103
UDP_GRO = 104
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33


@dataclass(frozen=True, slots=True)
class UdpSocket:
    """A bound socket that does not block; each datagram is received with its TOS byte as a control message.

    `receive_buffer`, `send_buffer`: bytes that the kernel granted (it counts its own overhead in them, so twice
    what was asked). `notes`: a sentence for each thing that was not granted.
    """

    socket: socket.socket
    receive_buffer: int
    send_buffer: int
    notes: tuple[str, ...]
    granted: frozenset[Capability] = frozenset()
    run_datagrams: int = 1
    """How many datagrams the kernel cuts out of one send: 1 without UDP_SEGMENT, 64 or 128 with it."""

    @property
    def fd(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        """Give address and port back. Safe to call twice."""
        self.socket.close()


def open_udp(
    address: IPv4Address,
    port: int,
    *,
    interface: str = "",
    links: Sequence[Link] = (),
    wanted: Collection[Capability] = (),
) -> UdpSocket:
    """Bind address and port. `interface` and `links` only make errors clearer: where the address should be, and
    which kernel device may hold the port. `wanted`: which of UDP_SEGMENT and UDP_GRO to use where the kernel can.

    Raises KernelError: somebody holds the port (and who), or this node does not have the address.
    """
    underlay = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        underlay.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_WANT)
        underlay.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        underlay.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 0)
        received = _grow(underlay, SO_RCVBUFFORCE, socket.SO_RCVBUF)
        sent = _grow(underlay, SO_SNDBUFFORCE, socket.SO_SNDBUF)
        underlay.bind((str(address), port))
    except OSError as error:
        underlay.close()
        reason = _reason(error, address, port, interface, links)
        raise KernelError(f"cannot bind UDP {address}:{port}: {reason}") from error
    notes = [
        f"the {word} buffer of UDP {address}:{port} is {granted} bytes, not {2 * BUFFER_BYTES}: raise sysctl {knob}"
        for word, granted, knob in (("receive", received, "net.core.rmem_max"), ("send", sent, "net.core.wmem_max"))
        if granted < 2 * BUFFER_BYTES
    ]
    run_datagrams = _run_datagrams() if Capability.UDP_SEGMENT in wanted else 1
    granted = {Capability.UDP_SEGMENT} if run_datagrams > 1 else set()
    if Capability.UDP_GRO in wanted and _merges(underlay):
        granted.add(Capability.UDP_GRO)
    return UdpSocket(underlay, received, sent, tuple(notes), frozenset(granted), run_datagrams)


def path_mtu(peer: IPv4Address) -> int:
    """The MTU of the path to a peer as the kernel has learnt it, in bytes with the IP header; 0 where none is known.

    Asked of a short-lived connected socket, which sends nothing: an error queue on the data socket would let one
    peer's trouble fail sends to others.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((str(peer), 9))
        return probe.getsockopt(socket.IPPROTO_IP, IP_MTU)
    return 0


def _merges(underlay: socket.socket) -> bool:
    try:
        underlay.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    except OSError:
        return False
    return True


def _run_datagrams() -> int:
    """How many datagrams the kernel cuts out of one send over loopback, where nothing below it can object: 128 since
    6.9 (1382e3b6a350) and in many older ones, 64 before, 1 before 4.18. With loopback down, what all of them take."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1)
        except OSError:
            return 1
        for datagrams in (128, 64):
            try:
                probe.sendto(bytes(datagrams), ("127.0.0.1", 9))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    return 64
            else:
                return datagrams
    return 1


def open_icmp() -> socket.socket:
    """A raw socket that sends whole packets, IP header included, by the kernel's routes. Raises KernelError."""
    try:
        return socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
    except PermissionError as error:
        reason = f"{error.strerror}; run as root or with CAP_NET_RAW"
        raise KernelError(f"cannot open a raw socket for ICMP errors: {reason}") from error


def _grow(underlay: socket.socket, force: int, polite: int) -> int:
    """Ask for a buffer beyond the sysctl's limit, or up to it without the privilege; what was granted, in bytes."""
    try:
        underlay.setsockopt(socket.SOL_SOCKET, force, BUFFER_BYTES)
    except PermissionError:
        underlay.setsockopt(socket.SOL_SOCKET, polite, BUFFER_BYTES)
    return underlay.getsockopt(socket.SOL_SOCKET, polite)


def _reason(error: OSError, address: IPv4Address, port: int, interface: str, links: Sequence[Link]) -> str:
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{address} is not an address of {interface or 'any interface of this node'}"
    if error.errno == errno.EADDRINUSE:
        return f"{_holder(address, port, links)} holds it"
    if error.errno == errno.EACCES:
        return f"{error.strerror}; a port below 1024 needs CAP_NET_BIND_SERVICE"
    return str(error.strerror)


def port_holder(port: int, links: Sequence[Link]) -> str:
    """Who has a UDP port of any address of this node, as far as that can be seen; empty where nobody has."""
    if not _bound_to(port) and not any(link.udp_port == port and link.up for link in links):
        return ""
    addresses = [address for _, address in _bound_to(port)] or [IPv4Address(0)]
    return _holder(addresses[0], port, links)


def _holder(address: IPv4Address, port: int, links: Sequence[Link]) -> str:
    inodes = {inode for inode, bound in _bound_to(port) if bound in (address, IPv4Address(0))}
    for process in Path("/proc").glob("[0-9]*"):
        # a process may end, or be none of our business, at any point of this
        with contextlib.suppress(OSError):
            if inodes & {_inode(descriptor) for descriptor in (process / "fd").iterdir()}:
                return f"process {(process / 'comm').read_text().strip()} (pid {process.name})"
    if devices := [link.name for link in links if link.udp_port == port and link.up]:
        return f"the kernel vxlan device {' or '.join(devices)}"
    return "a process that cannot be seen from here, or a device of the kernel (such as vxlan),"


def _bound_to(port: int) -> list[tuple[int, IPv4Address]]:
    """Inode and address of the UDP sockets of this namespace with that local port, IPv6 wildcards included."""
    found = []
    for table in ("udp", "udp6"):
        with contextlib.suppress(FileNotFoundError):  # no IPv6 in this kernel
            for line in Path("/proc/thread-self/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                host, _, number = fields[1].partition(":")
                if int(number, 16) == port:
                    # the last word is the IPv4 address, also in ::ffff:1.2.3.4 and in ::, in host byte order
                    found.append((int(fields[9]), IPv4Address(socket.htonl(int(host[-8:], 16)))))
    return found


def _inode(descriptor: Path) -> int:
    """Of the socket behind /proc/PID/fd/N; 0 where it is something else, or gone."""
    with contextlib.suppress(OSError):
        kind, _, inode = descriptor.readlink().name.partition(":")
        if kind == "socket":
            return int(inode.strip("[]"))
    return 0
