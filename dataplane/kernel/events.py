"""Owns the kernel's news: what changes in links, addresses, routes and neighbours of our namespace, as it happens.

Free of: requests and policy. Invariant: every event that the kernel could deliver is handed on, in its order; where it
could not, an Overrun says so in their place, and nothing else is ever lost in silence.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
from array import array
from collections.abc import Callable, Mapping
from enum import IntEnum
from functools import partial
from ipaddress import ip_interface
from typing import Any

from dataplane.errors import KernelError
from dataplane.kernel import packet_filter, rtnetlink
from dataplane.kernel.facts import (
    Address,
    AddressEvent,
    KernelEvent,
    LinkEvent,
    NeighbourEvent,
    Overrun,
    RouteEvent,
)

log = logging.getLogger(__name__)

BUFFER_BYTES = 4 << 20
"""Room for some thousand events that come while the loop is busy; the kernel takes a page or less for each."""
BATCH = 256
"""Events that are read before others of the loop have their turn."""
EVENT_BYTES = 65_536

_SO_RCVBUFFORCE = 33
_PORT_AT = 12
"""Where a message's header has the port of whoever asked for the change (nlmsg_pid)."""

RTM_NEWLINK, RTM_DELLINK = 16, 17
RTM_NEWADDR, RTM_DELADDR = 20, 21
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_CARRIER = 1, 3, 4, 33
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFF_UP = 0x1
IFA_F_SECONDARY, IFA_F_DEPRECATED, IFA_F_PERMANENT = 0x01, 0x20, 0x80

_IFINFOMSG = struct.Struct("=BxHiII")
_IFADDRMSG = struct.Struct("=BBBBI")
_NDMSG = struct.Struct("=BxxxiHBB")
_U32 = struct.Struct("=I")


class Group(IntEnum):
    """What may be listened to (linux/rtnetlink.h, RTNLGRP_*)."""

    LINK = 1
    NEIGHBOUR = 3
    """Neighbours of every device, and the FDB; on a node with many pods these are many."""
    ADDRESS = 5
    ROUTE = 7
    ADDRESS_V6 = 9
    ROUTE_V6 = 11


UNDERLAY = frozenset({Group.LINK, Group.ADDRESS, Group.ADDRESS_V6, Group.ROUTE, Group.ROUTE_V6})
"""Everything by which the way to other nodes may change."""


class KernelEvents:
    """A listener: `KernelEvents.open(groups, on_event)`, then `close()`.

    `on_event` is called in the loop, once for each event; what it raises is logged and ends nothing. Open it before
    the first look at the kernel's state: then no change can fall between the look and the first event.
    """

    def __init__(self, receiver: socket.socket, on_event: Callable[[KernelEvent], None]) -> None:
        self._socket = receiver
        self._on_event = on_event
        self._overrun = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(receiver.fileno(), self._read)

    @classmethod
    def open(cls, groups: frozenset[Group], on_event: Callable[[KernelEvent], None], *, but: int = 0) -> KernelEvents:
        """Listen in the namespace of the calling thread, whose loop runs. `but`: the netlink port of whose changes the
        kernel shall not tell us. Raises KernelError."""
        try:
            receiver = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        except OSError as error:
            raise KernelError(f"cannot listen to the kernel's network events: {error.strerror}") from error
        try:
            receiver.setblocking(False)
            _enlarge(receiver)
            if but:
                leave_out = array("B", packet_filter.all_but(_PORT_AT, _U32.pack(but)))
                receiver.setsockopt(
                    socket.SOL_SOCKET, packet_filter.SO_ATTACH_FILTER, packet_filter.attachable(leave_out)
                )
            receiver.bind((0, sum(1 << (group - 1) for group in groups)))
            return cls(receiver, on_event)
        except OSError as error:
            receiver.close()
            raise KernelError(f"cannot listen to the kernel's network events: {error.strerror}") from error

    def close(self) -> None:
        """Stop listening. Safe to call twice."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()

    def _read(self) -> None:
        for _ in range(BATCH):
            if self._socket.fileno() < 0:  # closed by a handler
                return
            try:
                data, sender = self._socket.recvfrom(EVENT_BYTES)
            except BlockingIOError:
                self._drained()
                return
            except OSError as error:
                self._failed(error)
                continue
            if sender[0] == 0:  # port 0 is the kernel; other processes could write to us too
                for kind, _, _, body in rtnetlink.messages(data):
                    event = event_of(kind, body)
                    if event is not None:
                        self._hand_on(event)

    def _failed(self, error: OSError) -> None:
        if error.errno != errno.ENOBUFS:
            log.warning("Cannot read the kernel's network events: %s", error.strerror)
        self._overrun = True
        # libuv stops watching a descriptor that polls as faulty, which is what an overrun makes of ours
        self._loop.remove_reader(self._socket.fileno())
        self._loop.add_reader(self._socket.fileno(), self._read)
        self._hand_on(Overrun())

    def _drained(self) -> None:
        """Until the queue is empty the kernel drops on, and says it once only: so this is the time to look again."""
        if self._overrun:
            self._overrun = False
            self._hand_on(Overrun())

    def _hand_on(self, event: KernelEvent) -> None:
        try:
            self._on_event(event)
        except Exception:  # one listener's fault must not make it deaf
            log.exception("A change in the kernel's network state could not be followed: %s", event)


def _enlarge(receiver: socket.socket) -> None:
    try:
        receiver.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER_BYTES)
    except PermissionError:  # without CAP_NET_ADMIN the system's limit holds, and overruns come earlier
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)


def event_of(kind: int, body: bytes) -> KernelEvent | None:
    """The record of a multicast message; None for one that is about none of the four."""
    read = _EVENTS.get(kind)
    try:
        return None if read is None else read(body)
    except (struct.error, ValueError, IndexError):  # a kernel that speaks otherwise than its own headers
        return None


def _link_event(body: bytes, *, gone: bool) -> LinkEvent | None:
    family, _, index, flags, _ = _IFINFOMSG.unpack_from(body)
    if family != 0:
        return None  # a bridge tells of its ports in the same words: "gone" means that one has left it
    found = rtnetlink.attributes(body, _IFINFOMSG.size)
    return LinkEvent(
        gone=gone,
        index=index,
        name=found.get(IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
        up=bool(flags & IFF_UP),
        carrier=found.get(IFLA_CARRIER, b"\0") == b"\1",
        mtu=_U32.unpack(found.get(IFLA_MTU, _U32.pack(0)))[0],
        address=found.get(IFLA_ADDRESS, b"").hex(":"),
    )


def _address_event(body: bytes, *, gone: bool) -> AddressEvent:
    _, length, flags, scope, index = _IFADDRMSG.unpack_from(body)
    found = rtnetlink.attributes(body, _IFADDRMSG.size)
    # of a point-to-point link IFA_ADDRESS is the other end; IPv6 has IFA_LOCAL there only
    own = found.get(IFA_LOCAL) or found.get(IFA_ADDRESS, b"")
    flags = _U32.unpack(found.get(IFA_FLAGS, _U32.pack(flags)))[0]
    address = Address(
        index=index,
        interface=ip_interface((own, length)),
        scope=scope,
        permanent=bool(flags & IFA_F_PERMANENT),
        deprecated=bool(flags & IFA_F_DEPRECATED),
        secondary=bool(flags & IFA_F_SECONDARY),
    )
    return AddressEvent(gone=gone, address=address)


def _route_event(body: bytes, *, gone: bool) -> RouteEvent:
    return RouteEvent(gone=gone, length=body[1], body=body)


def _neighbour_event(body: bytes, *, gone: bool) -> NeighbourEvent:
    family, index, _, _, _ = _NDMSG.unpack_from(body)
    return NeighbourEvent(gone=gone, index=index, fdb=family == rtnetlink.AF_BRIDGE, body=body)


_EVENTS: Mapping[int, Callable[[bytes], Any]] = {
    RTM_NEWLINK: partial(_link_event, gone=False),
    RTM_DELLINK: partial(_link_event, gone=True),
    RTM_NEWADDR: partial(_address_event, gone=False),
    RTM_DELADDR: partial(_address_event, gone=True),
    rtnetlink.RTM_NEWROUTE: partial(_route_event, gone=False),
    rtnetlink.RTM_DELROUTE: partial(_route_event, gone=True),
    rtnetlink.RTM_NEWNEIGH: partial(_neighbour_event, gone=False),
    rtnetlink.RTM_DELNEIGH: partial(_neighbour_event, gone=True),
}
