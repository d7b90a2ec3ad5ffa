"""Owns /dev/net/tun: a TUN device that outlives a kill of its holder, and is gone after an ordered stop.

Free of: addresses, routes, packets; of how flows are told apart (`kernel.steering`). Invariant: a device that was there
before is taken over only if the caller named it and nobody holds it; when a call fails, no device stands that did not
stand before. A device of several queues gives all packets of a flow to one of them.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import platform
import re
import secrets
import socket
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dataplane.errors import KernelError
from dataplane.kernel.facts import Link
from dataplane.kernel.steering import steering_program
from dataplane.path.capability import Capability
from dataplane.path.superframe import GSO_TCPV4, GSO_UDP_L4, NEEDS_CSUM, TCP, UDP, VnetHeader, with_ip_length

CLONE_DEVICE = "/dev/net/tun"

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETPERSIST = 0x400454CB
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNSETVNETHDRSZ = 0x400454D8
TUNSETSTEERINGEBPF = 0x800454E0
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

# linux/sockios.h, linux/ethtool.h
SIOCETHTOOL = 0x8946
ETHTOOL_GLINK = 0x0A

# linux/bpf.h; the number of bpf(2) by what uname calls the machine: those whose layout of an instruction is ours
BPF_PROG_LOAD = 5
BPF_PROG_TYPE_SOCKET_FILTER = 1
BPF_CALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "loongarch64": 280, "ppc64le": 361}

MOST_WAITING = 100_000
"""Packets in a queue at most: more than anybody sets a txqueuelen to."""

UNSEEN = "a process that cannot be seen from here"

_IFREQ = struct.Struct("16sH22x")
_IFREQ_DATA = struct.Struct("16sP16x")
_BPF_LOAD = struct.Struct("=IIQQIIQ")
"""Of union bpf_attr: type, number of instructions, these, the licence, and no log of the verifier's."""
_LEFTOVER = re.compile(r"flannel\d+|flannel(-v6)?\.\d+")


@dataclass(frozen=True, slots=True)
class Tun:
    """An open TUN device. Each read and write carries a virtio_net_hdr of VNET_HDR_BYTES before the IP packet.

    `fd` does not block and is not inherited by child processes; `release` it once. `adopted`: it stood already, so
    it may have an address and a route.
    `granted`: which superframes pass it. `further`: more queues of the device, each a descriptor like `fd`. `note`: why
    it has fewer than were asked for; empty where it has as many.
    """

    fd: int
    name: str
    adopted: bool
    granted: frozenset[Capability] = frozenset()
    further: tuple[int, ...] = ()
    note: str = ""

    @property
    def queues(self) -> tuple[int, ...]:
        return (self.fd, *self.further)


def open_tun(
    template: str = "flannel%d", *, adopt: str = "", wanted: Collection[Capability] = (), queues: int = 1
) -> Tun:
    """Take over the device `adopt` where it is a TUN device that stands; else make the first free one of `template`.
    `wanted`: which of TUN_TSO and TUN_USO to ask for; what the kernel refuses is done without. `queues`: as many where
    the kernel lets flows be steered, else one.

    The device persists until `release`, also beyond a kill. Raises KernelError: the device is held (and by whom),
    there is no /dev/net/tun, or the privilege is missing.
    """
    note = ""
    tun = None
    if queues > 1:
        try:
            with _steering() as program:
                tun = _open_several(template, adopt, queues, program)
        except _NotSteeredError as error:
            note = f"one queue instead of {queues}: {error}"
    if tun is None:
        tun = _open_first(template, adopt, FLAGS)
    try:
        return replace(tun, granted=_ask_for(tun.fd, wanted), note=note)
    except BaseException:
        release(tun)
        raise


def _open_first(template: str, adopt: str, flags: int) -> Tun:
    tun = _adopt(adopt, flags) if adopt and _exists(adopt) else None
    return tun or _attach(template, flags | IFF_TUN_EXCL, adopted=False)


# ------------------------------------------------------------------------------------------------- several queues


class _NotSteeredError(Exception):
    """The kernel does not let us choose queues; the text says why. Never leaves this file."""


def _open_several(template: str, adopt: str, queues: int, program: int) -> Tun:
    tun = _open_first(template, adopt, FLAGS | IFF_MULTI_QUEUE)
    try:
        try:
            fcntl.ioctl(tun.fd, TUNSETSTEERINGEBPF, struct.pack("i", program))
        except OSError as error:
            raise _NotSteeredError(f"TUNSETSTEERINGEBPF: {error.strerror}; it needs Linux 4.16") from error
        while len(tun.queues) < queues:
            more = _attach(tun.name, FLAGS | IFF_MULTI_QUEUE, adopted=True)
            tun = replace(tun, further=(*tun.further, more.fd))
        for fd in tun.queues:
            _empty(fd)
    except BaseException:
        release(tun)
        raise
    return tun


def _empty(fd: int) -> None:
    """What came while there were fewer queues chose among fewer: its flow's next packets may come by another queue, and
    would overtake it."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(MOST_WAITING):
            os.read(fd, VNET_HDR_BYTES + 65535)


@contextlib.contextmanager
def _steering() -> Iterator[int]:
    """The steering program as a descriptor; a device keeps what was set, also after it is closed."""
    import ctypes  # a daemon of one queue at rest does without

    number = BPF_CALL.get(platform.machine())
    if number is None:
        raise _NotSteeredError(f"no steering program for {platform.machine()} machines")
    code = steering_program(secrets.randbits(64))
    instructions, licence = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"Apache-2.0")
    places = (ctypes.addressof(instructions), ctypes.addressof(licence))
    attributes = _BPF_LOAD.pack(BPF_PROG_TYPE_SOCKET_FILTER, len(code) // 8, *places, 0, 0, 0)
    call = ctypes.CDLL(None, use_errno=True).syscall
    program = call(ctypes.c_long(number), ctypes.c_long(BPF_PROG_LOAD), attributes, ctypes.c_long(len(attributes)))
    if program < 0:
        error = ctypes.get_errno()
        advice = "; it needs CAP_BPF" if error in (errno.EPERM, errno.EACCES) else ""
        raise _NotSteeredError(f"the steering program: {os.strerror(error)}{advice}")
    try:
        yield program
    finally:
        os.close(program)


def _has_carrier(name: str) -> bool:
    """Whether the device is up and somebody has a queue of it."""
    answer = array.array("I", (ETHTOOL_GLINK, 0))
    request = _IFREQ_DATA.pack(name.encode(), answer.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, contextlib.suppress(OSError):
        fcntl.ioctl(any_socket, SIOCETHTOOL, request)
    return bool(answer[1])


# ---------------------------------------------------------------------------------------------------- superframes


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
    for fd in tun.queues:
        with contextlib.suppress(OSError):
            if _name_of(fd) not in (tun.name, ""):  # released before, and the number has a new owner
                continue
            with contextlib.suppress(OSError):  # EBADFD: somebody removed the device under us
                fcntl.ioctl(fd, TUNSETPERSIST, 0)
            os.close(fd)


def leftovers(links: Sequence[Link]) -> list[str]:
    """Names of the TUN devices `flannelN`, `flannel.N` and `flannel-v6.N` among `links` that no process holds: a kill
    left them."""
    # only a TAP has a MAC address
    return [k.name for k in links if k.kind == "tun" and _LEFTOVER.fullmatch(k.name) and not (k.carrier or k.address)]


def _adopt(name: str, flags: int) -> Tun | None:
    """Take over a device; None where it is no TUN device. One whose setting of IFF_MULTI_QUEUE differs is made anew.

    The kernel takes IFF_NO_PI and IFF_VNET_HDR from whoever attaches; what it refuses with EINVAL is another kind of
    device and another setting of IFF_MULTI_QUEUE (drivers/net/tun.c, tun_set_iff).
    """
    several = bool(flags & IFF_MULTI_QUEUE)
    # attaching would give us a share of the packets of whoever holds a multi-queue device: look before
    if several:
        _refuse_held(name)
    carried = several and _has_carrier(name)
    if (tun := _attach_fitting(name, flags)) is not None:
        if carried:
            os.close(tun.fd)
            raise KernelError(f"cannot adopt device {name}: {UNSEEN} holds one of its queues")
        return tun
    if not several:
        _refuse_held(name)
    tun = _attach_fitting(name, flags ^ IFF_MULTI_QUEUE)
    if tun is None:
        return None
    release(tun)
    if _exists(name):
        raise KernelError(f"cannot adopt device {name}: {UNSEEN} holds one of its queues")
    return _attach(name, flags | IFF_TUN_EXCL, adopted=False)


def _refuse_held(name: str) -> None:
    if holder := _holder(name):
        raise KernelError(f"cannot adopt device {name}: {holder} holds it")


def _attach_fitting(name: str, flags: int) -> Tun | None:
    """None where the device is of another kind."""
    try:
        return _attach(name, flags, adopted=True)
    except KernelError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EINVAL:
            return None
        raise


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
