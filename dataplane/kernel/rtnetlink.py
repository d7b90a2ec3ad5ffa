"""Owns rtnetlink's bytes: the entries that we program, how the kernel shows them, and its events as records.

Free of: sockets. Invariant: an entry's body is at once what the kernel is asked for and, byte for byte, the beginning
of how its dump shows that entry (attributes stand in the order of net/core/neighbour.c, drivers/net/vxlan/vxlan_core.c,
net/ipv4/fib_semantics.c and net/ipv6/route.c), so that an audit of many thousands is a comparison of slices. What is
shown otherwise is parsed and packed anew (`entry_of`): speed depends on the order, correctness does not.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import Any

from dataplane.kernel.facts import (
    Address,
    AddressEvent,
    KernelEvent,
    LinkEvent,
    NeighbourEvent,
    Route,
    RouteEvent,
)

NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_NEWLINK, RTM_DELLINK = 16, 17
RTM_NEWADDR, RTM_DELADDR = 20, 21
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NLM_F_REPLACE, NLM_F_CREATE = 0x100, 0x400
NLM_F_ACK_TLVS, NLM_F_CAPPED = 0x200, 0x100
NLMSGERR_ATTR_MSG = 1

AF_INET, AF_BRIDGE, AF_INET6 = 2, 7, 10
NDA_DST, NDA_LLADDR, NDA_IFINDEX = 1, 2, 8
NUD_PERMANENT = 0x80
NTF_SELF = 0x02
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_MULTIPATH, RTA_TABLE = 1, 4, 5, 6, 7, 9, 15
RT_TABLE_MAIN = 254
RTPROT_BOOT = 3
RT_SCOPE_UNIVERSE, RT_SCOPE_NOWHERE = 0, 255
RTN_UNICAST, RTN_BLACKHOLE = 1, 6
RTNH_F_ONLINK = 0x4
IP6_METRIC = 1024
"""What the kernel gives an IPv6 route for which none was asked (IP6_RT_PRIO_USER)."""

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_CARRIER = 1, 3, 4, 33
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFF_UP = 0x1
IFA_F_SECONDARY, IFA_F_DEPRECATED, IFA_F_PERMANENT = 0x01, 0x20, 0x80

HEADER = struct.Struct("=IHHII")
"""nlmsghdr: length, type, flags, sequence, port."""
_LENGTH_TYPE = struct.Struct("=IH")
_NDMSG = struct.Struct("=BxxxiHBB")
_RTMSG = struct.Struct("=BBBBBBBBI")
_IFINFOMSG = struct.Struct("=BxHiII")
_IFADDRMSG = struct.Struct("=BBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_U32 = struct.Struct("=I")
_NLA_TYPE_MASK = 0x3FFF

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network


class Table(Enum):
    """A table of the kernel that we write: the message type of an addition; a deletion's is one more, a list's two."""

    FDB = "fdb"
    NEIGHBOUR = "neighbour"
    ROUTE = "route"

    @property
    def message(self) -> int:
        return RTM_NEWROUTE if self is Table.ROUTE else RTM_NEWNEIGH


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a table. Of two with one `key` the kernel keeps one: setting the second replaces the first."""

    table: Table
    key: bytes
    body: bytes


def neighbour(index: int, address: IPAddress, mac: bytes) -> Entry:
    """The address is behind that MAC on device `index`, for ever."""
    family = AF_INET if address.version == 4 else AF_INET6
    packed = address.packed
    body = b"".join(
        (
            _NDMSG.pack(family, index, NUD_PERMANENT, 0, RTN_UNICAST),
            _attribute(NDA_DST, packed),
            # the last attribute is not padded, so that the body ends where the next of a dump begins to vary
            _ATTRIBUTE.pack(4 + len(mac), NDA_LLADDR) + mac,
        )
    )
    return Entry(Table.NEIGHBOUR, b"N" + _U32.pack(index) + packed, body)


def fdb(index: int, mac: bytes, address: IPAddress) -> Entry:
    """Frames for that MAC go out of the vxlan device `index` to the outer address."""
    head = _NDMSG.pack(AF_BRIDGE, index, NUD_PERMANENT, NTF_SELF, RTN_UNICAST)
    body = head + _attribute(NDA_LLADDR, mac) + _attribute(NDA_DST, address.packed)
    return Entry(Table.FDB, b"F" + _U32.pack(index) + mac, body)


def route(destination: IPNetwork, index: int, gateway: IPAddress, *, onlink: bool) -> Entry:
    """Through a gateway on device `index`; `onlink`: whatever the kernel thinks of its address."""
    return _route(
        AF_INET if destination.version == 4 else AF_INET6,
        destination.prefixlen,
        destination.network_address.packed,
        index,
        gateway.packed,
        onlink,
    )


def blackhole(destination: IPNetwork) -> Entry:
    """Packets for it end here. In IPv6 the kernel shows it on its loopback device."""
    family = AF_INET if destination.version == 4 else AF_INET6
    packed = destination.network_address.packed
    head = _RTMSG.pack(family, destination.prefixlen, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_BLACKHOLE, 0)
    body = head + _attribute(RTA_TABLE, _U32.pack(RT_TABLE_MAIN)) + _attribute(RTA_DST, packed)
    return Entry(Table.ROUTE, _route_key(family, destination.prefixlen, packed), body)


def _route(family: int, length: int, packed: bytes, index: int, gateway: bytes, onlink: bool) -> Entry:
    flags = RTNH_F_ONLINK if onlink else 0
    parts = [
        _RTMSG.pack(family, length, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_UNIVERSE, RTN_UNICAST, flags),
        _attribute(RTA_TABLE, _U32.pack(RT_TABLE_MAIN)),
        _attribute(RTA_DST, packed),
        _attribute(RTA_PRIORITY, _U32.pack(IP6_METRIC)) if family == AF_INET6 else b"",
        _attribute(RTA_GATEWAY, gateway),
        _attribute(RTA_OIF, _U32.pack(index)),
    ]
    return Entry(Table.ROUTE, _route_key(family, length, packed), b"".join(parts))


def _route_key(family: int, length: int, packed: bytes) -> bytes:
    return b"R" + bytes((family, length)) + packed


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


# --- requests -------------------------------------------------------------------------------------------------


def set_message(entry: Entry, sequence: int) -> bytes:
    """Ask for the entry, in place of one with the same key. Only a refusal is answered."""
    return _message(entry.table.message, NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE, sequence, entry.body)


def delete_message(entry: Entry, sequence: int) -> bytes:
    """Take away exactly this entry. Only a refusal is answered."""
    return _message(entry.table.message + 1, NLM_F_REQUEST, sequence, entry.body)


def dump_message(table: Table, family: int, index: int, sequence: int) -> bytes:
    """Ask for the entries of one device; of routes, those of the main table. Needs strict checking."""
    if table is Table.ROUTE:
        body = _RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
        body += _attribute(RTA_TABLE, _U32.pack(RT_TABLE_MAIN)) + _attribute(RTA_OIF, _U32.pack(index))
    elif table is Table.FDB:
        body = _NDMSG.pack(AF_BRIDGE, index, 0, 0, 0)
    else:
        body = _NDMSG.pack(family, 0, 0, 0, 0) + _attribute(NDA_IFINDEX, _U32.pack(index))
    return _message(table.message + 2, NLM_F_REQUEST | NLM_F_DUMP, sequence, body)


def lookup_message(address: IPAddress, sequence: int) -> bytes:
    """Ask by which route a packet to `address` would leave now."""
    family = AF_INET if address.version == 4 else AF_INET6
    body = _RTMSG.pack(family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0) + _attribute(RTA_DST, address.packed)
    return _message(RTM_GETROUTE, NLM_F_REQUEST, sequence, body)


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    body += b"\0" * (-len(body) % 4)
    return HEADER.pack(HEADER.size + len(body), kind, flags, sequence, 0) + body


def with_acknowledgement(message: bytes) -> bytes:
    """The same request, answered also where it succeeds."""
    length, kind, flags, sequence, port = HEADER.unpack_from(message)
    return HEADER.pack(length, kind, flags | NLM_F_ACK, sequence, port) + message[HEADER.size :]


# --- answers --------------------------------------------------------------------------------------------------


def messages(buffer: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, sequence and body of each message in what one `recv` gave. A cut one ends it."""
    at, end = 0, len(buffer)
    while at + HEADER.size <= end:
        length, kind, flags, sequence, _ = HEADER.unpack_from(buffer, at)
        if length < HEADER.size or at + length > end:
            return
        yield kind, flags, sequence, buffer[at + HEADER.size : at + length]
        at += (length + 3) & ~3


def refusal(body: bytes, flags: int) -> tuple[int, str]:
    """The errno of an NLMSG_ERROR (0: it is an acknowledgement), and the kernel's own words where it has some."""
    code = -int(struct.unpack_from("=i", body)[0])
    if not flags & NLM_F_ACK_TLVS:
        return code, ""
    quoted = HEADER.size if flags & NLM_F_CAPPED else int(_U32.unpack_from(body, 4)[0])
    words = attributes(body, 4 + ((quoted + 3) & ~3)).get(NLMSGERR_ATTR_MSG, b"")
    return code, words.rstrip(b"\0").decode(errors="replace")


def scan(buffer: bytes, table: Table, known: Mapping[bytes, Entry], width: int) -> tuple[list[Entry], list[bytes]]:
    """Take one buffer of a dump apart: entries of `known` (by body, of `width` bytes), and other messages' bodies."""
    seen: list[Entry] = []
    others: list[bytes] = []
    at, end, wanted, unpack = 0, len(buffer), table.message, _LENGTH_TYPE.unpack_from
    start = HEADER.size
    find, hit = known.get, seen.append
    while at + start <= end:
        length, kind = unpack(buffer, at)
        if length < start:
            break
        if kind == wanted:
            entry = find(buffer[at + start : at + start + width])
            if entry is None:
                others.append(buffer[at + start : at + length])
            else:
                hit(entry)
        at += (length + 3) & ~3
    return seen, others


def attributes(body: bytes, at: int) -> dict[int, bytes]:
    """The attributes behind a message's fixed part, by type; a malformed one ends the list."""
    found: dict[int, bytes] = {}
    end = len(body)
    while at + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if length < 4 or at + length > end:
            break
        found[kind & _NLA_TYPE_MASK] = body[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


def entry_of(table: Table, body: bytes) -> Entry | None:
    """The entry that a message shows, packed as we would have; None where we would make no such entry."""
    if table is Table.ROUTE:
        return _route_entry(body)
    family, index, state, _, _ = _NDMSG.unpack_from(body)
    found = attributes(body, _NDMSG.size)
    address, mac = found.get(NDA_DST, b""), found.get(NDA_LLADDR, b"")
    if len(address) not in (4, 16) or len(mac) != 6 or not state & NUD_PERMANENT:
        return None
    if family == AF_BRIDGE:
        return fdb(index, mac, ip_address(address)) if table is Table.FDB else None
    return neighbour(index, ip_address(address), mac) if table is Table.NEIGHBOUR else None


def _route_entry(body: bytes) -> Entry | None:
    family, length, source, tos, _, protocol, _, kind, flags = _RTMSG.unpack_from(body)
    found = attributes(body, _RTMSG.size)
    destination, gateway, index = (found.get(word, b"") for word in (RTA_DST, RTA_GATEWAY, RTA_OIF))
    usual = _U32.pack(IP6_METRIC if family == AF_INET6 else 0)
    ours = (
        (source, tos, protocol, kind) == (0, 0, RTPROT_BOOT, RTN_UNICAST)
        and found.get(RTA_TABLE) == _U32.pack(RT_TABLE_MAIN)
        and found.get(RTA_PRIORITY, _U32.pack(0)) == usual
        and RTA_PREFSRC not in found
        and len(destination) == len(gateway) in (4, 16)
        and len(index) == 4
    )
    if not ours:
        return None
    return _route(family, length, destination, _U32.unpack(index)[0], gateway, bool(flags & RTNH_F_ONLINK))


def route_key_of(body: bytes) -> bytes | None:
    """The key that a shown route takes up; None where it leaves room for one of ours: another table or metric."""
    family, length, _, tos, *_ = _RTMSG.unpack_from(body)
    found = attributes(body, _RTMSG.size)
    usual = IP6_METRIC if family == AF_INET6 else 0
    metric = _U32.unpack(found.get(RTA_PRIORITY, _U32.pack(0)))[0]
    if tos or metric != usual or found.get(RTA_TABLE) != _U32.pack(RT_TABLE_MAIN) or RTA_DST not in found:
        return None
    return _route_key(family, length, found[RTA_DST])


# --- events ---------------------------------------------------------------------------------------------------


def event_of(kind: int, body: bytes) -> KernelEvent | None:
    """The record of a multicast message; None for one that is about none of the four."""
    read = _EVENTS.get(kind)
    try:
        return None if read is None else read(body)
    except (struct.error, ValueError):  # a kernel that speaks otherwise than its own headers
        return None


def _link_event(body: bytes, *, gone: bool) -> LinkEvent | None:
    family, _, index, flags, _ = _IFINFOMSG.unpack_from(body)
    if family != 0:
        return None  # a bridge tells of its ports in the same words: "gone" means that one has left it
    found = attributes(body, _IFINFOMSG.size)
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
    found = attributes(body, _IFADDRMSG.size)
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


def route_of(body: bytes) -> Route:
    """A route message as a record. Raises ValueError or struct.error where it is none."""
    family, length, _, _, table, _, scope, _, _ = _RTMSG.unpack_from(body)
    found = attributes(body, _RTMSG.size)
    if RTA_MULTIPATH in found:
        index = int(struct.unpack_from("=HBBi", found[RTA_MULTIPATH])[3])
        gateway = attributes(found[RTA_MULTIPATH], 8).get(RTA_GATEWAY)
    else:
        index, gateway = _U32.unpack(found.get(RTA_OIF, _U32.pack(0)))[0], found.get(RTA_GATEWAY)
    source = found.get(RTA_PREFSRC)
    nowhere = bytes(4 if family == AF_INET else 16)
    return Route(
        destination=ip_network((found.get(RTA_DST, nowhere), length)),
        gateway=ip_address(gateway) if gateway else None,
        device_index=index,
        source=ip_address(source) if source else None,
        table=_U32.unpack(found.get(RTA_TABLE, _U32.pack(table)))[0],
        metric=_U32.unpack(found.get(RTA_PRIORITY, _U32.pack(0)))[0],
        scope=scope,
    )


def _route_event(body: bytes, *, gone: bool) -> RouteEvent:
    return RouteEvent(gone=gone, route=route_of(body), body=body)


def _neighbour_event(body: bytes, *, gone: bool) -> NeighbourEvent:
    family, index, _, _, _ = _NDMSG.unpack_from(body)
    return NeighbourEvent(gone=gone, index=index, fdb=family == AF_BRIDGE, body=body)


_EVENTS: Mapping[int, Callable[[bytes], Any]] = {
    RTM_NEWLINK: partial(_link_event, gone=False),
    RTM_DELLINK: partial(_link_event, gone=True),
    RTM_NEWADDR: partial(_address_event, gone=False),
    RTM_DELADDR: partial(_address_event, gone=True),
    RTM_NEWROUTE: partial(_route_event, gone=False),
    RTM_DELROUTE: partial(_route_event, gone=True),
    RTM_NEWNEIGH: partial(_neighbour_event, gone=False),
    RTM_DELNEIGH: partial(_neighbour_event, gone=True),
}
