"""Owns /dev/net/tun: a TUN device that outlives a kill of its holder, and is gone after an ordered stop.

Free of: addresses, routes, packets. Invariant: a device that was there before is taken over only if the caller named
it and nobody holds it; when a call fails, no device stands that did not stand before.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dataplane.errors import KernelError
from dataplane.kernel.facts import Link
from dataplane.path.capability import Capability
from dataplane.path.superframe import GSO_TCPV4, GSO_UDP_L4, NEEDS_CSUM, TCP, UDP, VnetHeader, with_ip_length

CLONE_DEVICE = "/dev/net/tun"

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETPERSIST = 0x400454CB
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8
IFF_TUN = 0x0001
IFF_MULTI_QUEUE = 0x0100
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_TUN_EXCL = 0x8000

FLAGS = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR

VNET_HDR_BYTES = 10
"""struct virtio_net_hdr, without the num_buffers of its mergeable kin."""

TUN_F_CSUM = 0x01
TUN_F_OFFLOADS = {Capability.TUN_TSO: 0x02 | 0x04, Capability.TUN_USO: 0x20 | 0x40}
"""What the kernel may leave to the reader: to cut TCP, or UDP (since 6.2), over IPv4 and IPv6. Both need TUN_F_CSUM."""

UNSEEN = "a process that cannot be seen from here"

_IFREQ = struct.Struct("16sH22x")
_LEFTOVER = re.compile(r"flannel\d+|flannel(-v6)?\.\d+")


@dataclass(frozen=True, slots=True)
class Tun:
    """An open TUN device. Each read and write carries a virtio_net_hdr of VNET_HDR_BYTES before the IP packet.

    `fd` does not block and is not inherited by child processes; `release` it once. `adopted`: it stood already, so
    it may have an address and a route.
    `granted`: which superframes pass it.
    """

    fd: int
    name: str
    adopted: bool
    granted: frozenset[Capability] = frozenset()


def open_tun(template: str = "flannel%d", *, adopt: str = "", wanted: Collection[Capability] = ()) -> Tun:
    """Take over the device `adopt` where it is a TUN device that stands; else make the first free one of `template`.
    `wanted`: which of TUN_TSO and TUN_USO to ask for; what the kernel refuses is done without.

    The device persists until `release`, also beyond a kill. Raises KernelError: the device is held (and by whom),
    there is no /dev/net/tun, or the privilege is missing.
    """
    tun = _adopt(adopt) if adopt and _exists(adopt) else None
    if tun is None:
        tun = _attach(template, FLAGS | IFF_TUN_EXCL, adopted=False)
    return replace(tun, granted=_ask_for(tun.fd, wanted))


def takes_superframes(tun: Tun) -> frozenset[Capability]:
    """Which of the granted superframes the kernel really takes from us: some kernels refused them with EINVAL (such as
    6.1 before 6.1.103, e269d79c7d35). The device must be up. What is written is for nobody: the kernel checks how it
    is to be cut before it drops it for its zero addresses."""
    working = set(tun.granted)
    for capability in tun.granted:
        with contextlib.suppress(OSError):
            os.write(tun.fd, _probe(capability))
            continue
        working.discard(capability)
    return frozenset(working)


def _probe(capability: Capability) -> bytes:
    protocol, size = (TCP, 20) if capability is Capability.TUN_TSO else (UDP, 8)
    payload = bytes(64)
    packet = struct.pack("!BBHHHBBHII", 0x45, 0, 20 + size + len(payload), 0, 0, 1, protocol, 0, 0, 0)
    offset, kind = (16, GSO_TCPV4) if protocol == TCP else (6, GSO_UDP_L4)
    header = VnetHeader(NEEDS_CSUM, kind, 20 + size, len(payload) // 2, 20, offset)
    udp = struct.pack("!HHHH", 0, 0, size + len(payload), 0)
    l4 = bytes(12) + b"\x50\x10" + bytes(6) if protocol == TCP else udp
    return header.encode() + with_ip_length(packet, 20 + size + len(payload)) + l4 + payload


def _ask_for(fd: int, wanted: Collection[Capability]) -> frozenset[Capability]:
    """Ask for all, else for one less; the kernel says yes or no to a whole set (drivers/net/tun.c, set_offload)."""
    asked = [capability for capability in TUN_F_OFFLOADS if capability in wanted]
    while True:
        bits = sum(TUN_F_OFFLOADS[capability] for capability in asked)
        try:
            fcntl.ioctl(fd, TUNSETOFFLOAD, bits | TUN_F_CSUM if bits else 0)
        except OSError as error:
            if error.errno != errno.EINVAL or not asked:
                raise KernelError(f"cannot set the offloads of a TUN device: {error.strerror}") from error
            asked.pop()
        else:
            return frozenset(asked)


def release(tun: Tun) -> None:
    """Let go of the device, so that it vanishes with its addresses and routes. Fine where it is gone already."""
    with contextlib.suppress(OSError):
        if _name_of(tun.fd) not in (tun.name, ""):  # released before, and the number has a new owner
            return
        with contextlib.suppress(OSError):  # EBADFD: somebody removed the device under us
            fcntl.ioctl(tun.fd, TUNSETPERSIST, 0)
        os.close(tun.fd)


def leftovers(links: Sequence[Link]) -> list[str]:
    """Names of the TUN devices `flannelN`, `flannel.N` and `flannel-v6.N` among `links` that no process holds: a kill
    left them."""
    # only a TAP has a MAC address
    return [k.name for k in links if k.kind == "tun" and _LEFTOVER.fullmatch(k.name) and not (k.carrier or k.address)]


def _adopt(name: str) -> Tun | None:
    """Take over a device; None where it is no TUN device, or was one that had to go since its flags differ.

    The kernel takes IFF_NO_PI and IFF_VNET_HDR from whoever attaches; what it refuses with EINVAL is another kind of
    device and another setting of IFF_MULTI_QUEUE (drivers/net/tun.c, tun_set_iff).
    """
    try:
        return _attach(name, FLAGS, adopted=True)
    except KernelError as error:
        if not (isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EINVAL):
            raise
    # attaching would give us a share of the packets of whoever holds a multi-queue device: look before
    if holder := _holder(name):
        raise KernelError(f"cannot adopt device {name}: {holder} holds it")
    try:
        tun = _attach(name, FLAGS | IFF_MULTI_QUEUE, adopted=True)
    except KernelError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EINVAL:
            return None
        raise
    release(tun)
    if _exists(name):
        raise KernelError(f"cannot adopt device {name}: {UNSEEN} holds one of its queues")
    return _attach(name, FLAGS | IFF_TUN_EXCL, adopted=False)


def _attach(name: str, flags: int, *, adopted: bool) -> Tun:
    """Open the device of that name or template and make it ready for the pumps; on failure nothing stays open."""
    operation = f"adopt device {name}" if adopted else f"make TUN device {name}"
    fd = _open(operation)
    try:
        answer = fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(name.encode(), flags))
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HDR_BYTES))
        # last: until here a new device goes with its descriptor
        fcntl.ioctl(fd, TUNSETPERSIST, 1)
    except OSError as error:
        os.close(fd)
        raise KernelError(f"cannot {operation}: {_reason(error, name)}") from error
    return Tun(fd, _text(answer), adopted)


def _open(operation: str) -> int:
    try:
        return os.open(CLONE_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            advice = "load the driver with `modprobe tun`, or give the container that device"
        else:
            advice = "run as root with CAP_NET_ADMIN, and give the container that device"
        raise KernelError(f"cannot {operation}: {CLONE_DEVICE}: {error.strerror}; {advice}") from error


def _reason(error: OSError, name: str) -> str:
    if error.errno == errno.EBUSY:
        return f"{_holder(name) or UNSEEN} holds it"
    if error.errno == errno.EPERM:
        return f"{error.strerror}; run as root or with CAP_NET_ADMIN"
    return str(error.strerror)


def _exists(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _name_of(fd: int) -> str:
    """The device behind a descriptor, empty where it has gone. Raises OSError if the descriptor is no TUN's."""
    try:
        return _text(fcntl.ioctl(fd, TUNGETIFF, bytes(_IFREQ.size)))
    except OSError as error:
        if error.errno == errno.EBADFD:
            return ""
        raise


def _text(ifreq: bytes) -> str:
    name: bytes = _IFREQ.unpack(ifreq)[0]
    return name.rstrip(b"\0").decode()


def _holder(name: str) -> str:
    """Who in this namespace has the device open, as `process NAME (pid N)`; empty if that cannot be seen."""
    here = Path("/proc/thread-self/ns/net").readlink()
    for process in Path("/proc").glob("[0-9]*"):
        # a process may end, or be none of our business, at any point of this
        with contextlib.suppress(OSError):
            if (process / "ns/net").readlink() == here and name in _devices_of(process):
                return f"process {(process / 'comm').read_text().strip()} (pid {process.name})"
    return ""


def _devices_of(process: Path) -> Iterator[str]:
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            # by its last part: a container may have the device at another place
            if descriptor.readlink().name == Path(CLONE_DEVICE).name:
                for line in (process / "fdinfo" / descriptor.name).read_text().splitlines():
                    word, _, value = line.partition(":")
                    if word == "iff":
                        yield value.strip()
