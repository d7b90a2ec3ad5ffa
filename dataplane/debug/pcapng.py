"""Owns the pcapng file format (IETF draft-ietf-opsawg-pcapng): blocks out of values, values out of blocks.

Free of packets' meaning and of files: the writer returns bytes, the reader takes anything with `read`. The oracle of
the blocks that ext/dataplane/_tap.pyx makes. Invariant: what the writer writes the reader gives back, and whatever a
file holds, reading it ends in values or in a CaptureError that says at which byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from dataplane.errors import CaptureError

SECTION, INTERFACE, SIMPLE, NAMES, STATISTICS, PACKET = 0x0A0D0D0A, 1, 3, 4, 5, 6
BYTE_ORDER = 0x1A2B3C4D
LINKTYPE_ETHERNET = 1
LINKTYPE_RAW = 101
"""Bare IPv4 or IPv6, told apart by the first nibble (tcpdump.org/linktypes.html)."""

INBOUND, OUTBOUND = 1, 2
MOST_BLOCK = 16 << 20
"""Bytes; a longer block is no block but a broken or hostile file."""

_COMMENT = 1
_SHB_HARDWARE, _SHB_OS, _SHB_APPLICATION = 2, 3, 4
_IF_NAME, _IF_DESCRIPTION, _IF_TSRESOL, _IF_FILTER, _IF_TSOFFSET = 2, 3, 9, 11, 14
_EPB_FLAGS, _EPB_DROPCOUNT, _EPB_PACKETID = 2, 4, 5
_ISB_START, _ISB_END, _ISB_RECEIVED, _ISB_DROPPED, _ISB_ACCEPTED, _ISB_DELIVERED = 2, 3, 4, 5, 6, 8
_NRB_V4, _NRB_V6 = 1, 2


class Readable(Protocol):
    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes, fewer only at the end."""


@dataclass(frozen=True, slots=True)
class Interface:
    """One place where packets were seen. `units` in a second, `offset` in seconds: of its time stamps."""

    number: int
    linktype: int
    snaplen: int
    name: str = ""
    description: str = ""
    filter: str = ""
    units: int = 10**6
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet, its first bytes at least. `ns` since 1970. `direction`: INBOUND, OUTBOUND, 0 if it is not said.

    `number` is shared by blocks that are about one packet; None where the file has none. `lost`: packets of the same
    interface that are missing before this one.
    """

    interface: Interface
    ns: int
    data: bytes
    length: int
    comment: str = ""
    direction: int = 0
    number: int | None = None
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Names:
    """What addresses are called."""

    names: Mapping[IPv4Address | IPv6Address, str]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts at the end of an interface: None where the file does not say."""

    interface: Interface
    received: int | None
    dropped: int | None
    delivered: int | None
    comment: str = ""


Block = Interface | Packet | Names | Statistics


# --- writing --------------------------------------------------------------------------------------------------


def section(application: str, *, os: str = "", comment: str = "") -> bytes:
    """What a file, or a further section of it, begins with; blocks are in the byte order of this machine."""
    options = _text(_COMMENT, comment) + _text(_SHB_OS, os) + _text(_SHB_APPLICATION, application)
    return block(SECTION, struct.pack("=IHHq", BYTE_ORDER, 1, 0, -1) + _end(options))


def interface(linktype: int, snaplen: int, *, name: str, description: str = "", filter_text: str = "") -> bytes:
    """An interface whose time stamps are in ns; interfaces count from 0 in the order in which they are written."""
    options = _text(_IF_NAME, name) + _text(_IF_DESCRIPTION, description) + _option(_IF_TSRESOL, b"\x09")
    if filter_text:
        options += _option(_IF_FILTER, b"\0" + filter_text.encode())  # code 0: the text of a filter
    return block(INTERFACE, struct.pack("=HHI", linktype, 0, snaplen) + _end(options))


def packet(
    interface: int,
    ns: int,
    data: bytes,
    length: int,
    *,
    comment: str = "",
    direction: int = 0,
    number: int | None = None,
    lost: int = 0,
) -> bytes:
    """One packet of `length` bytes, of which `data` was kept."""
    options = _text(_COMMENT, comment)
    if direction:
        options += _option(_EPB_FLAGS, struct.pack("=I", direction))
    if lost:
        options += _option(_EPB_DROPCOUNT, struct.pack("=Q", lost))
    if number is not None:
        options += _option(_EPB_PACKETID, struct.pack("=Q", number))
    head = struct.pack("=IIIII", interface, ns >> 32, ns & 0xFFFFFFFF, len(data), length)
    return block(PACKET, head + _padded(data) + _end(options))


def names(known: Mapping[IPv4Address | IPv6Address, str]) -> bytes:
    """Names of addresses; empty where there are none."""
    if not known:
        return b""
    records = b"".join(
        _option(_NRB_V4 if address.version == 4 else _NRB_V6, address.packed + name.encode() + b"\0")
        for address, name in known.items()
    )
    return block(NAMES, records + b"\0\0\0\0")


def statistics(
    interface: int, ns: int, *, start: int, received: int, dropped: int, delivered: int, comment: str = ""
) -> bytes:
    """Counts of an interface at `ns`, since `start`. `received`: packets that passed its filter; `dropped`: those
    among them that found no room."""
    options = _text(_COMMENT, comment)
    options += _option(_ISB_START, _stamp(start)) + _option(_ISB_END, _stamp(ns))
    for code, count in ((_ISB_RECEIVED, received), (_ISB_DROPPED, dropped), (_ISB_DELIVERED, delivered)):
        options += _option(code, struct.pack("=Q", count))
    return block(STATISTICS, struct.pack("=I", interface) + _stamp(ns) + _end(options))


def _stamp(ns: int) -> bytes:
    return struct.pack("=II", ns >> 32, ns & 0xFFFFFFFF)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("=HH", code, len(value)) + _padded(value)


def _text(code: int, text: str) -> bytes:
    return _option(code, text.encode()) if text else b""


def _end(options: bytes) -> bytes:
    return options + b"\0\0\0\0" if options else b""


def block(kind: int, body: bytes) -> bytes:
    """A block of any kind; `body` has a multiple of 4 bytes."""
    length = struct.pack("=I", len(body) + 12)
    return struct.pack("=I", kind) + length + body + length


# --- reading --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Reader:
    """Gives the blocks of a file one by one: interfaces, packets, names and statistics; others are passed over.

    `name` is for errors. Iterating raises CaptureError where the file is no pcapng, is cut off or is broken; what came
    before has been given by then.
    """

    stream: Readable
    name: str
    interfaces: list[Interface] = field(default_factory=list)
    _order: str = "="
    _at: int = 0

    def __iter__(self) -> Iterator[Block]:
        for kind, body in raw_blocks(self.stream, self.name, self):
            try:
                value = self.take(kind, body)
            except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
                raise CaptureError(f"{self.name}: the block that ends at byte {self._at} is broken: {error}") from None
            if value is not None:
                yield value

    def take(self, kind: int, body: bytes) -> Block | None:
        """What a block says; None where it says nothing that is known here."""
        if kind == SECTION:
            self.interfaces.clear()
        elif kind == INTERFACE:
            self.interfaces.append(self._interface(body))
            return self.interfaces[-1]
        elif kind == PACKET:
            return self._packet(body)
        elif kind == SIMPLE:
            (length,) = self._unpack("I", body)
            first = self.interfaces[0]
            kept = min(length, first.snaplen or length, len(body) - 4)
            return Packet(first, 0, body[4 : 4 + kept], length)
        elif kind == NAMES:
            return self._names(body)
        elif kind == STATISTICS:
            return self.statistics(body)
        return None

    def _unpack(self, form: str, body: bytes, at: int = 0) -> tuple[int, ...]:
        return struct.unpack_from(self._order + form, body, at)

    def _options(self, body: bytes, at: int) -> dict[int, bytes]:
        """Of an option that stands twice, the first."""
        found: dict[int, bytes] = {}
        while at + 4 <= len(body):
            code, length = self._unpack("HH", body, at)
            if code == 0:
                break
            if at + 4 + length > len(body):
                raise ValueError(f"option {code} is longer than its block")
            found.setdefault(code, body[at + 4 : at + 4 + length])
            at += 4 + length + -length % 4
        return found

    def _interface(self, body: bytes) -> Interface:
        linktype, _, snaplen = self._unpack("HHI", body)
        options = self._options(body, 8)
        resolution = options.get(_IF_TSRESOL, b"\x06")[0]
        (offset,) = self._unpack("q", options.get(_IF_TSOFFSET, bytes(8)))
        return Interface(
            len(self.interfaces),
            linktype,
            snaplen,
            name=_decoded(options.get(_IF_NAME)),
            description=_decoded(options.get(_IF_DESCRIPTION)),
            filter=_decoded(options.get(_IF_FILTER, b"\0")[1:]),
            units=2 ** (resolution & 0x7F) if resolution & 0x80 else 10**resolution,
            offset=offset,
        )

    def _ns(self, interface: Interface, high: int, low: int) -> int:
        return (high << 32 | low) * 10**9 // interface.units + interface.offset * 10**9

    def _packet(self, body: bytes) -> Packet:
        number, high, low, captured, length = self._unpack("IIIII", body)
        interface = self._known(number)
        if 20 + captured > len(body):
            raise ValueError(f"a packet of {captured} bytes in a block of {len(body)}")
        options = self._options(body, 20 + captured + -captured % 4)
        identity = options.get(_EPB_PACKETID)
        return Packet(
            interface,
            self._ns(interface, high, low),
            body[20 : 20 + captured],
            length,
            comment=_decoded(options.get(_COMMENT)),
            direction=self._unpack("I", options.get(_EPB_FLAGS, bytes(4)))[0] & 3,
            number=None if identity is None else self._unpack("Q", identity)[0],
            lost=self._unpack("Q", options.get(_EPB_DROPCOUNT, bytes(8)))[0],
        )

    def _known(self, number: int) -> Interface:
        if number >= len(self.interfaces):
            raise ValueError(f"interface {number} was not described")
        return self.interfaces[number]

    def _names(self, body: bytes) -> Names:
        found: dict[IPv4Address | IPv6Address, str] = {}
        at = 0
        while at + 4 <= len(body):
            kind, length = self._unpack("HH", body, at)
            value = body[at + 4 : at + 4 + length]
            if kind == 0:
                break
            if kind == _NRB_V4:
                found[IPv4Address(value[:4])] = _decoded(value[4:].split(b"\0")[0])
            elif kind == _NRB_V6:
                found[IPv6Address(value[:16])] = _decoded(value[16:].split(b"\0")[0])
            at += 4 + length + -length % 4
        return Names(found)

    def statistics(self, body: bytes) -> Statistics:
        """What a statistics block says."""
        interface = self._known(self._unpack("I", body)[0])
        options = self._options(body, 12)

        def count(code: int) -> int | None:
            return self._unpack("Q", options[code])[0] if code in options else None

        return Statistics(
            interface, count(_ISB_RECEIVED), count(_ISB_DROPPED), count(_ISB_DELIVERED), _decoded(options.get(_COMMENT))
        )


def raw_blocks(stream: Readable, name: str, reader: Reader | None = None) -> Iterator[tuple[int, bytes]]:
    """(kind, body) of every block. Raises CaptureError."""
    order, at = "=", 0
    while True:
        head = stream.read(8)
        if not head:
            if at == 0:
                raise CaptureError(f"{name}: it is empty")
            return
        if at == 0 and head[:4] != SECTION.to_bytes(4, "big"):
            raise CaptureError(f"{name}: {_what_else(head)}")
        magic = b""
        if head[:4] == SECTION.to_bytes(4, "big"):
            magic = stream.read(4)
            order = _byte_order(magic, name, at)
        if len(head) < 8:
            raise CaptureError(f"{name}: it is cut off at byte {at + len(head)}")
        kind, length = struct.unpack(f"{order}II", head)
        if length % 4 or not 12 <= length <= MOST_BLOCK:
            raise CaptureError(f"{name}: the block at byte {at} claims {length} bytes")
        rest = magic + stream.read(length - 8 - len(magic))
        if len(rest) < length - 8:
            raise CaptureError(f"{name}: it is cut off at byte {at + 8 + len(rest)}, within a block of {length} bytes")
        at += length
        if reader is not None:
            reader._order, reader._at = order, at
        yield kind, rest[:-4]


def _byte_order(magic: bytes, name: str, at: int) -> str:
    for order in "<>":
        if magic == struct.pack(f"{order}I", BYTE_ORDER):
            return order
    raise CaptureError(f"{name}: the section at byte {at} has no byte order")


def _what_else(head: bytes) -> str:
    """What a file is that is no pcapng."""
    old = {b"\xd4\xc3\xb2\xa1", b"\xa1\xb2\xc3\xd4", b"\x4d\x3c\xb2\xa1", b"\xa1\xb2\x3c\x4d"}
    if head[:4] in old:
        return "it is an old pcap file, not pcapng; convert it: editcap -F pcapng IN OUT"
    if head[:2] == b"\x1f\x8b":
        return "it is compressed by gzip; unpack it first"
    return "it is not a pcapng file"


def _decoded(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace").rstrip("\0")
