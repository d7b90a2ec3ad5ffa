"""Owns what a person wants to know of one packet: its flow, its flags, and one readable line.

Free of IO and of files; sans oracle duties (dataplane.path.wire is the oracle of the path's own headers). Invariant:
whatever the bytes are, looking at them ends in an answer, never in an exception.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from dataplane.debug.pcapng import INBOUND, LINKTYPE_ETHERNET, Packet

TCP, UDP, ICMP, ICMPV6, SCTP = 6, 17, 1, 58, 132
PROTOCOLS = {TCP: "tcp", UDP: "udp", ICMP: "icmp", ICMPV6: "icmp6", SCTP: "sctp"}
VXLAN_HEADER, ETHERNET_HEADER = 8, 14
FIN, SYN = 1, 2
_FLAGS = "FSRP.UEC"
_ICMP_KINDS = {
    ICMP: {0: "echo reply", 3: "unreachable", 8: "echo request", 11: "time exceeded"},
    ICMPV6: {1: "unreachable", 2: "too big", 3: "time exceeded", 128: "echo request", 129: "echo reply"},
}

Address = IPv4Address | IPv6Address
FlowKey = tuple[str, str, str]
"""(protocol, source, destination), ports written behind the addresses."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One IP packet. `length`: by its header, in bytes. `payload`: bytes behind the TCP or UDP header, or behind the IP
    header of others. `sequence` and `flags` are TCP's. `identity` tells packets of a flow apart, the same on each node
    that sees it."""

    source: Address
    destination: Address
    protocol: int
    length: int
    payload: int
    ports: tuple[int, int] | None
    flags: int
    sequence: int
    icmp: tuple[int, int, int] | None
    """Type, code, and identifier with sequence as one number."""
    fragment: bool
    identity: bytes

    @property
    def flow(self) -> FlowKey:
        source, destination = str(self.source), str(self.destination)
        if self.ports:
            bracket = "[{}]" if self.source.version == 6 else "{}"
            source = f"{bracket.format(source)}:{self.ports[0]}"
            destination = f"{bracket.format(destination)}:{self.ports[1]}"
        return PROTOCOLS.get(self.protocol, f"proto {self.protocol}"), source, destination


def look(data: bytes) -> Seen | None:
    """The IP packet that begins here; None where none does, or too little of it was kept."""
    if len(data) >= 20 and data[0] >> 4 == 4 and data[0] & 15 >= 5:
        (length,), header = struct.unpack_from("!H", data, 2), (data[0] & 15) * 4
        fragment = struct.unpack_from("!H", data, 6)[0] & 0x3FFF
        ends: tuple[Address, Address] = IPv4Address(data[12:16]), IPv4Address(data[16:20])
        return _seen(data, ends, data[9], length, header, bool(fragment & 0x1FFF), bool(fragment))
    if len(data) >= 40 and data[0] >> 4 == 6:
        (length,) = struct.unpack_from("!H", data, 4)
        ends = IPv6Address(data[8:24]), IPv6Address(data[24:40])
        return _seen(data, ends, data[6], length + 40, 40, data[6] == 44, data[6] == 44)
    return None


def _seen(
    data: bytes, ends: tuple[Address, Address], protocol: int, length: int, at: int, later: bool, fragment: bool
) -> Seen:
    ports, flags, sequence, icmp, payload = None, 0, 0, None, length - at
    # identification and payload stay the same on the way; TTL and header checksum do not
    identity = data[4:6] + data[at : at + 20] if at == 20 else data[at : at + 20]
    if not later and protocol in (TCP, UDP, SCTP) and len(data) >= at + 8:
        ports = struct.unpack_from("!HH", data, at)
        payload -= 8
        if protocol == TCP and len(data) >= at + 14:
            (sequence,) = struct.unpack_from("!I", data, at + 4)
            flags = data[at + 13]
            payload = length - at - (data[at + 12] >> 4) * 4
    elif not later and protocol in (ICMP, ICMPV6) and len(data) >= at + 8:
        kind, code, _, rest = struct.unpack_from("!BBHI", data, at)
        icmp = (kind, code, rest)
    return Seen(*ends, protocol, length, max(payload, 0), ports, flags, sequence, icmp, fragment, identity)


def ip_of(packet: Packet) -> bytes:
    """The bytes of a packet from its IP header on; empty where it carries none."""
    if packet.interface.linktype != LINKTYPE_ETHERNET:
        return packet.data
    kind, at = packet.data[12:14], 14
    if kind == b"\x81\x00":
        kind, at = packet.data[16:18], 18
    return packet.data[at:] if kind in (b"\x08\x00", b"\x86\xdd") else b""


def inner_of(datagram: bytes, port: int, vxlan_port: int = 8472) -> tuple[bytes, int | None]:
    """The inner packet of an outer UDP payload to or from `port`, and its VNI where that is a port of VXLAN."""
    if port not in (vxlan_port, 4789):
        return datagram, None
    if len(datagram) < VXLAN_HEADER + ETHERNET_HEADER or not datagram[0] & 8:
        return b"", None
    vni = int.from_bytes(datagram[4:7])
    frame = datagram[VXLAN_HEADER:]
    return (frame[14:] if frame[12:14] in (b"\x08\x00", b"\x86\xdd") else b""), vni


def payload_of(data: bytes) -> bytes:
    """What was kept of the payload of a UDP packet without IPv6 extension headers."""
    return data[header_length(data) + 8 :]


def header_length(data: bytes) -> int:
    """Bytes of the IP header, without IPv6 extension headers."""
    return (data[0] & 15) * 4 if data[0] >> 4 == 4 else 40


def line(packet: Packet) -> str:
    """One readable line: time, direction, flow, what it is, and the comment without what the line says already."""
    clock = time.strftime("%H:%M:%S", time.localtime(packet.ns // 10**9))
    way = "rx" if packet.direction == INBOUND else "tx"
    rest = " ".join(word for word in packet.comment.split(" ") if not word.startswith("dir="))
    return f"{clock}.{packet.ns // 1000 % 10**6:06d} {way} {what(ip_of(packet), packet.length)}  {rest}".rstrip()


def document(packet: Packet) -> dict[str, Any]:
    """The same in JSON's types: `ns` since 1970, and each word of the comment under its own name."""
    seen = look(ip_of(packet))
    found: dict[str, Any] = {"ns": packet.ns, "length": packet.length}
    if seen is not None:
        found |= dict(zip(("protocol", "source", "destination"), seen.flow, strict=True))
    return found | {name: value for name, value in words(packet.comment).items() if value}


def words(comment: str) -> dict[str, str]:
    """What a comment of ours says, by name; a word without a value has an empty one."""
    return dict(word.partition("=")[::2] for word in comment.split())


def what(data: bytes, length: int) -> str:
    """Flow, flags and length of a packet that begins with `data` and has `length` bytes."""
    seen = look(data)
    return f"{length} bytes that are no IP packet" if seen is None else _what(seen)


def _what(seen: Seen) -> str:
    protocol, source, destination = seen.flow
    detail = ""
    if seen.protocol == TCP:
        flags = "".join(letter for bit, letter in enumerate(_FLAGS) if seen.flags >> bit & 1)
        detail = f" [{flags}] seq {seen.sequence}"
    elif seen.icmp:
        kind, code, rest = seen.icmp
        name = _ICMP_KINDS.get(seen.protocol, {}).get(kind, f"type {kind}")
        detail = f" {name}" + (f" seq {rest & 0xFFFF}" if "echo" in name else f" code {code}")
    if seen.fragment:
        detail += " fragment"
    return f"{source} > {destination} {protocol}{detail}, {seen.length} bytes"
