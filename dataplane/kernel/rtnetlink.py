"""Owns rtnetlink's bytes: the entries that we program, and how the kernel shows them.

Free of: sockets. Invariant: an entry's body is at once what the kernel is asked for and, byte for byte, the beginning
of how its dump shows that entry (attributes stand in the order of net/core/neighbour.c, drivers/net/vxlan/vxlan_core.c,
net/ipv4/fib_semantics.c and net/ipv6/route.c), so that an audit of many thousands is a comparison of slices. What is
shown otherwise is parsed and packed anew (`entry_of`): speed depends on the order, correctness does not.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import NamedTuple

from dataplane.kernel.facts import Route

NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH = 28, 29

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NLM_F_REPLACE, NLM_F_CREATE = 0x100, 0x400
NLM_F_ACK_TLVS, NLM_F_CAPPED = 0x200, 0x100
NLMSGERR_ATTR_MSG = 1

AF_INET, AF_BRIDGE, AF_INET6 = 2, 7, 10
NDA_DST, NDA_LLADDR, NDA_IFINDEX = 1, 2, 8
NUD_PERMANENT = 0x80
NTF_SELF = 0x02
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_MULTIPATH, RTA_TABLE, RTA_VIA = 1, 4, 5, 6, 7, 9, 15, 18
RT_TABLE_MAIN = 254
RTPROT_BOOT = 3
RT_SCOPE_UNIVERSE = 0
RTN_UNICAST = 1
RTNH_F_ONLINK = 0x4
IP6_METRIC = 1024
"""What the kernel gives an IPv6 route for which none was asked (IP6_RT_PRIO_USER)."""

HEADER = struct.Struct("=IHHII")
"""nlmsghdr: length, type, flags, sequence, port."""
_HEAD = struct.Struct("=IHHI")
_NDMSG = struct.Struct("=BxxxiHBB")
_RTMSG = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_U32 = struct.Struct("=I")
_S32 = struct.Struct("=i")
_NLA_TYPE_MASK = 0x3FFF

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network


class Table(StrEnum):
    """A table of the kernel that we write: the message type of an addition; a deletion's is one more, a list's two.

    Strings, and entries are tuples: a start with ten thousand peers makes, hashes and compares each some ten thousand
    times, for which plain enums and dataclasses need the interpreter.
    """

    FDB = "fdb"
    NEIGHBOUR = "neighbour"
    ROUTE = "route"

    @property
    def message(self) -> int:
        return RTM_NEWROUTE if self is Table.ROUTE else RTM_NEWNEIGH


@dataclass(frozen=True, slots=True)
class Scope:
    """One table of one device in one family; 0 stands for every device (routes only). The FDB has one family."""

    table: Table
    family: int
    index: int


class Entry(NamedTuple):
    """One entry of a table. Of two with one `key` the kernel keeps one: putting the second replaces the first."""

    scope: Scope
    key: bytes
    body: bytes


_scope = lru_cache(maxsize=64)(Scope)


def routes_of(version: int, index: int) -> Scope:
    """The main table's routes of IP version 4 or 6 through one device, or through any (0)."""
    return _scope(Table.ROUTE, AF_INET if version == 4 else AF_INET6, index)


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
    return Entry(_scope(Table.NEIGHBOUR, family, index), _neighbour_key(index, packed), body)


def fdb(index: int, mac: bytes, address: IPAddress) -> Entry:
    """Frames for that MAC go out of the vxlan device `index` to the outer address."""
    head = _NDMSG.pack(AF_BRIDGE, index, NUD_PERMANENT, NTF_SELF, RTN_UNICAST)
    body = head + _attribute(NDA_LLADDR, mac) + _attribute(NDA_DST, address.packed)
    return Entry(_scope(Table.FDB, AF_BRIDGE, index), _fdb_key(index, mac), body)


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
    return Entry(_scope(Table.ROUTE, family, index), _route_key(family, length, packed), b"".join(parts))


def _neighbour_key(index: int, packed: bytes) -> bytes:
    return b"N" + _U32.pack(index) + packed


def _fdb_key(index: int, mac: bytes) -> bytes:
    return b"F" + _U32.pack(index) + mac


def _route_key(family: int, length: int, packed: bytes) -> bytes:
    return b"R" + bytes((family, length)) + packed


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


# --- requests -------------------------------------------------------------------------------------------------


def set_message(entry: Entry, sequence: int) -> bytes:
    """Ask for the entry, in place of one with the same key. Only a refusal is answered."""
    return _message(entry.scope.table.message, NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE, sequence, entry.body)


def delete_message(entry: Entry, sequence: int) -> bytes:
    """Take away exactly this entry. Only a refusal is answered."""
    return _message(entry.scope.table.message + 1, NLM_F_REQUEST, sequence, entry.body)


def clearing_message(entry: Entry, sequence: int) -> bytes:
    """Take away the route to the destination of this one, by whatever way it goes."""
    destination = destination_of(entry)
    family, length, packed = entry.scope.family, destination.prefixlen, destination.network_address.packed
    body = _RTMSG.pack(family, length, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0)
    return _message(RTM_NEWROUTE + 1, NLM_F_REQUEST, sequence, body + _attribute(RTA_DST, packed))


def dump_message(scope: Scope, sequence: int) -> bytes:
    """Ask for the entries of a scope; of routes, those of the main table. Needs strict checking."""
    if scope.table is Table.ROUTE:
        body = _RTMSG.pack(scope.family, 0, 0, 0, 0, 0, 0, 0, 0) + _attribute(RTA_TABLE, _U32.pack(RT_TABLE_MAIN))
        if scope.index:
            body += _attribute(RTA_OIF, _U32.pack(scope.index))
    elif scope.table is Table.FDB:
        body = _NDMSG.pack(AF_BRIDGE, scope.index, 0, 0, 0)
    else:
        body = _NDMSG.pack(scope.family, 0, 0, 0, 0) + _attribute(NDA_IFINDEX, _U32.pack(scope.index))
    return _message(scope.table.message + 2, NLM_F_REQUEST | NLM_F_DUMP, sequence, body)


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
    code = -int(_S32.unpack_from(body)[0])
    if not flags & NLM_F_ACK_TLVS:
        return code, ""
    quoted = HEADER.size if flags & NLM_F_CAPPED else int(_U32.unpack_from(body, 4)[0])
    words = attributes(body, 4 + ((quoted + 3) & ~3)).get(NLMSGERR_ATTR_MSG, b"")
    return code, words.rstrip(b"\0").decode(errors="replace")


class Scan:
    """The answer to a dump, buffer by buffer: which entries of `known` (by body, of `width` bytes) stand there, and
    the bodies of all other messages. `end`: errno once it is over, 0 for success."""

    def __init__(self, table: Table, known: Mapping[bytes, Entry], width: int, sequence: int) -> None:
        self._kind = table.message
        self._known = known
        self._width = width
        self._sequence = sequence
        self.present: list[Entry] = []
        self.others: list[bytes] = []
        self.flags = 0
        self.end: int | None = None

    def take(self, buffer: bytes) -> None:
        """Look through what one `recv` gave; what answers another request is passed over."""
        at, last, start, width = 0, len(buffer) - HEADER.size, HEADER.size, self._width
        unpack, find, present = _HEAD.unpack_from, self._known.get, self.present.append
        wanted, ours, all_flags = self._kind, self._sequence, 0
        while at <= last:
            length, kind, flags, sequence = unpack(buffer, at)
            if length < start:
                break
            body = at + start
            if sequence == ours:
                all_flags |= flags
                if kind == wanted:
                    entry = find(buffer[body : body + width])
                    if entry is None:
                        self.others.append(buffer[body : at + length])
                    else:
                        present(entry)
                elif kind in (NLMSG_DONE, NLMSG_ERROR):
                    self.end = -int(_S32.unpack_from(buffer, body)[0])
            at += (length + 3) & ~3
        self.flags |= all_flags


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


def key_of(table: Table, body: bytes) -> bytes | None:
    """The key that a shown entry, in whatever state, takes up; None where it is in the way of none of ours."""
    if table is Table.ROUTE:
        family, length, _, tos, *_ = _RTMSG.unpack_from(body)
        found = attributes(body, _RTMSG.size)
        usual = IP6_METRIC if family == AF_INET6 else 0
        metric = _U32.unpack(found.get(RTA_PRIORITY, _U32.pack(0)))[0]
        if tos or metric != usual or found.get(RTA_TABLE) != _U32.pack(RT_TABLE_MAIN) or RTA_DST not in found:
            return None
        return _route_key(family, length, found[RTA_DST])
    _, index, _, _, _ = _NDMSG.unpack_from(body)
    found = attributes(body, _NDMSG.size)
    if table is Table.FDB:
        return _fdb_key(index, found.get(NDA_LLADDR, b""))
    return _neighbour_key(index, found.get(NDA_DST, b""))


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


def destination_of(entry: Entry) -> IPNetwork:
    """Of the entry of a route."""
    destination: IPNetwork = ip_network((entry.key[3:], entry.key[2]))
    return destination


def describe(entry: Entry) -> str:
    """An entry in iproute2's words, as far as an operator needs them."""
    body, index = entry.body, entry.scope.index
    if entry.scope.table is Table.ROUTE:
        shown = route_of(body)
        return f"route {shown.destination} via {shown.gateway} on device number {index}"
    found = attributes(body, _NDMSG.size)
    mac, address = found[NDA_LLADDR].hex(":"), ip_address(found[NDA_DST])
    if entry.scope.table is Table.FDB:
        return f"FDB entry {mac} to {address} on device number {index}"
    return f"neighbour {address} at {mac} on device number {index}"


def neighbouring_device(body: bytes) -> int:
    """The device of a route that was looked up and goes straight to its destination; 0 where it does not."""
    found = attributes(body, _RTMSG.size)
    if _RTMSG.unpack_from(body)[7] != RTN_UNICAST or not found.keys().isdisjoint((RTA_GATEWAY, RTA_VIA)):
        return 0
    return int(_U32.unpack(found.get(RTA_OIF, _U32.pack(0)))[0])
