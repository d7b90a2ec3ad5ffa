"""Owns the UDP sockets that face the other nodes: bound, sized and set up for the pumps.

Free of: datagrams. Invariant: the socket that receives has its address and port for itself, or shares them with those
that it was widened by, and never with another daemon's (no SO_REUSEADDR; SO_REUSEPORT only once they are its own); no
error queue: with IP_RECVERR one dead peer's ICMP would fail the next send to a live one.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from dataplane.errors import KernelError
from dataplane.kernel.facts import Link
from dataplane.path.capability import Capability

BUFFER_BYTES = 8 << 20
"""Asked for in each direction: about 60 ms of 1,500-byte datagrams at 1 Gbit/s, while a pump is not scheduled."""

MOST_WAITING = 100_000
"""More datagrams than such a buffer holds: the kernel counts some hundred bytes for each."""

# linux/in.h, asm-generic/socket.h: not in Python's socket module before 3.14
IP_PKTINFO = 8
IP_MTU_DISCOVER = 10
IP_PMTUDISC_DONT = 0
IP_PMTUDISC_WANT = 1
IP_MTU = 14
IPV6_MTU_DISCOVER = 23
IPV6_MTU = 24
IPV6_AUTOFLOWLABEL = 70
UDP_SEGMENT = 103
UDP_GRO = 104
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33


Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class UdpSocket:
    """A bound socket that does not block; each datagram is received with its TOS byte or traffic class as a control
    message.

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
    address: Address,
    port: int,
    *,
    interface: str = "",
    links: Sequence[Link] = (),
    wanted: Collection[Capability] = (),
) -> UdpSocket:
    """Bind address and port; 0.0.0.0 and :: stand for every address of their version, and of that one only. `interface`
    and `links` only make errors clearer: where the address should be, and which kernel device may hold the port.
    `wanted`: which of UDP_SEGMENT and UDP_GRO to use where the kernel can.

    Raises KernelError: somebody holds the port (and who), or this node does not have the address.
    """
    try:
        underlay = _bound(address, port, IP_PMTUDISC_WANT)
        received = _grow(underlay, SO_RCVBUFFORCE, socket.SO_RCVBUF)
        sent = _grow(underlay, SO_SNDBUFFORCE, socket.SO_SNDBUF)
    except OSError as error:
        reason = _reason(error, address, port, interface, links)
        raise KernelError(f"cannot bind UDP {_place(address, port)}: {reason}") from error
    notes = [
        f"the {word} buffer of UDP {_place(address, port)} is {granted} bytes, not {2 * BUFFER_BYTES}: raise {knob}"
        for word, granted, knob in (
            ("receive", received, "sysctl net.core.rmem_max"),
            ("send", sent, "sysctl net.core.wmem_max"),
        )
        if granted < 2 * BUFFER_BYTES
    ]
    run_datagrams = _run_datagrams() if Capability.UDP_SEGMENT in wanted else 1
    granted = {Capability.UDP_SEGMENT} if run_datagrams > 1 else set()
    if Capability.UDP_GRO in wanted and _merges(underlay):
        granted.add(Capability.UDP_GRO)
    return UdpSocket(underlay, received, sent, tuple(notes), frozenset(granted), run_datagrams)


def widen(first: UdpSocket, count: int) -> tuple[UdpSocket, ...]:
    """`count` more sockets that share address and port with `first`. The kernel gives all datagrams of one outer
    source, address and port, to one of them: by inner flow it cannot be done, since one message of UDP_GRO, for which
    it chooses once, mixes flows (net/ipv4/udp.c, udp4_lib_lookup2; docs/adr). What was received before they all stood
    is dropped: it was given to fewer, and what follows it would overtake it.

    Raises KernelError; then none of them stays open.
    """
    address, port = first.socket.getsockname()[:2]
    opened: list[UdpSocket] = []
    try:
        # others of this user may join from now on, but no daemon does: the first socket of each wants the port alone
        first.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for _ in range(count):
            more = _bound(ip_address(address), port, IP_PMTUDISC_WANT, shared=True)
            opened.append(replace(first, socket=more, notes=()))
            _grow(more, SO_RCVBUFFORCE, socket.SO_RCVBUF)
            _grow(more, SO_SNDBUFFORCE, socket.SO_SNDBUF)
            if Capability.UDP_GRO in first.granted:
                more.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    except OSError as error:
        for each in opened:
            each.close()
        place = _place(ip_address(address), port)
        raise KernelError(f"cannot share UDP {place} among {count + 1} sockets: {error.strerror}") from error
    for each in (first, *opened):
        _empty(each.socket)
    return tuple(opened)


def _empty(underlay: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        for _ in range(MOST_WAITING):
            underlay.recv(1)


def open_senders(address: Address, count: int, *, interface: str = "") -> tuple[socket.socket, ...]:
    """Sockets that only send, each from a port of its own out of the kernel's range (net.ipv4.ip_local_port_range),
    without DF as the kernel's vxlan device does. Raises KernelError; then none stays open."""
    opened: list[socket.socket] = []
    try:
        for _ in range(count):
            sender = _bound(address, 0, IP_PMTUDISC_DONT)
            opened.append(sender)
            _grow(sender, SO_SNDBUFFORCE, socket.SO_SNDBUF)
            # nobody reads it: what strangers send there shall hold no memory
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
    except OSError as error:
        for sender in opened:
            sender.close()
        reason = _reason(error, address, 0, interface, ())
        raise KernelError(f"cannot bind {count} UDP sockets to {address}: {reason}") from error
    return tuple(opened)


def _bound(address: Address, port: int, discovery: int, *, shared: bool = False) -> socket.socket:
    v4 = address.version == 4
    family = socket.AF_INET if v4 else socket.AF_INET6
    underlay = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if v4:
            underlay.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, discovery)
            underlay.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
            underlay.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 0)
        else:
            underlay.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            underlay.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, discovery)
            underlay.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
            # the kernel's tunnels send a flow label of 0; the port tells flows apart
            underlay.setsockopt(socket.IPPROTO_IPV6, IPV6_AUTOFLOWLABEL, 0)
        if shared:
            underlay.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        underlay.bind((str(address), port))
    except OSError:
        underlay.close()
        raise
    return underlay


def path_mtu(peer: Address) -> int:
    """The MTU of the path to a peer as the kernel has learnt it, in bytes with the IP header; 0 where none is known.

    Asked of a short-lived connected socket, which sends nothing: an error queue on the data socket would let one
    peer's trouble fail sends to others.
    """
    v4 = peer.version == 4
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_INET if v4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe,
    ):
        probe.connect((str(peer), 9))
        return probe.getsockopt(*((socket.IPPROTO_IP, IP_MTU) if v4 else (socket.IPPROTO_IPV6, IPV6_MTU)))
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


def open_icmp(version: int = 4) -> socket.socket:
    """A raw socket that sends whole packets, IP header included, by the kernel's routes. Raises KernelError."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    try:
        return socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
    except PermissionError as error:
        reason = f"{error.strerror}; run as root or with CAP_NET_RAW"
    except OSError as error:
        reason = str(error.strerror)
    raise KernelError(f"cannot open a raw socket for ICMP errors of IPv{version}: {reason}")


def _grow(underlay: socket.socket, force: int, polite: int) -> int:
    """Ask for a buffer beyond the sysctl's limit, or up to it without the privilege; what was granted, in bytes."""
    try:
        underlay.setsockopt(socket.SOL_SOCKET, force, BUFFER_BYTES)
    except PermissionError:
        underlay.setsockopt(socket.SOL_SOCKET, polite, BUFFER_BYTES)
    return underlay.getsockopt(socket.SOL_SOCKET, polite)


def _place(address: Address, port: int) -> str:
    return f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}"


def _reason(error: OSError, address: Address, port: int, interface: str, links: Sequence[Link]) -> str:
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{address} is not an address of {interface or 'any interface of this node'}"
    if error.errno == errno.EADDRINUSE:
        return f"{_holder(address, port, links)} holds it"
    if error.errno == errno.EACCES:
        return f"{error.strerror}; a port below 1024 needs CAP_NET_BIND_SERVICE"
    return str(error.strerror)


def port_holder(port: int, links: Sequence[Link]) -> str:
    """Who has a UDP port of any address of this node, as far as that can be seen; empty where nobody has."""
    if not _bound_to(port, 4) and not any(link.udp_port == port and link.up for link in links):
        return ""
    return _holder(IPv4Address(0), port, links)


def _holder(address: Address, port: int, links: Sequence[Link]) -> str:
    everywhere = address.is_unspecified
    inodes = {
        inode for inode, bound in _bound_to(port, address.version) if everywhere or bound == address or int(bound) == 0
    }
    for process in Path("/proc").glob("[0-9]*"):
        # a process may end, or be none of our business, at any point of this
        with contextlib.suppress(OSError):
            if inodes & {_inode(descriptor) for descriptor in (process / "fd").iterdir()}:
                return f"process {(process / 'comm').read_text().strip()} (pid {process.name})"
    if devices := [link.name for link in links if link.udp_port == port and link.up]:
        return f"the kernel vxlan device {' or '.join(devices)}"
    return "a process that cannot be seen from here, or a device of the kernel (such as vxlan),"


def _bound_to(port: int, version: int) -> list[tuple[int, Address]]:
    """Inode and address of the UDP sockets of this namespace with that local port. Where IPv4 is asked for, an IPv6
    socket counts for the IPv4 address in its last word: of ::ffff:1.2.3.4, and of ::, which takes both."""
    found: list[tuple[int, Address]] = []
    for table in ("udp", "udp6") if version == 4 else ("udp6",):
        with contextlib.suppress(FileNotFoundError):  # no IPv6 in this kernel
            for line in Path("/proc/thread-self/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                host, _, number = fields[1].partition(":")
                if int(number, 16) == port:
                    # words of 32 bits in host byte order
                    words = [struct.pack("=I", int(host[i : i + 8], 16)) for i in range(0, len(host), 8)]
                    found.append((int(fields[9]), ip_address(words[-1] if version == 4 else b"".join(words))))
    return found


def _inode(descriptor: Path) -> int:
    """Of the socket behind /proc/PID/fd/N; 0 where it is something else, or gone."""
    with contextlib.suppress(OSError):
        kind, _, inode = descriptor.readlink().name.partition(":")
        if kind == "socket":
            return int(inode.strip("[]"))
    return 0
