"""Owns what packet sockets show, as packets: frames are cut and finished as the card or the next device would do it.

Free of: IO, and of what becomes of the packets. What waits for a device's offloads is told by a virtio_net_hdr: a
superframe of TCP or UDP segments, with or without a VXLAN header around it, or a checksum that holds no more than the
pseudo-header's sum. Invariant: whatever the bytes are, a frame ends in at least one piece; one that cannot be cut is
shown as it is.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import NamedTuple

from dataplane.debug.dissect import UDP, inner_of
from dataplane.debug.scene import Tunnel
from dataplane.path.datapath import finished, segments
from dataplane.path.superframe import GSO_NONE, NEEDS_CSUM, VnetHeader, with_ip_length
from dataplane.path.wire import FRAME_HEAD, checksum, pseudo_header

_INTERNET_SUMS = (6, 16)
"""Where UDP and TCP have their checksum; SCTP's, elsewhere, is none that we could finish."""

_FINISHED = VnetHeader()
_NOTHING = _FINISHED.encode()


class Piece(NamedTuple):
    """One packet as it travels. `inner` is empty where the frame carries no IP packet; `vni` None where it is not
    VXLAN."""

    inner: bytes
    frame: bytes
    vni: int | None


def packets(unfinished: bytes, data: bytes, network: int) -> list[bytes]:
    """The IP packets of one frame, whose IP header begins at `network`."""
    header = _read(unfinished, network)
    return [_trimmed(packet) for packet in _whole(header, data[network:])]


def direct(unfinished: bytes, data: bytes, network: int) -> list[Piece]:
    """The packets of a frame that travel without encapsulation, each in its frame."""
    header = _read(unfinished, network)
    link = data[:network]
    return [Piece(_trimmed(packet), link + packet, None) for packet in _whole(header, data[network:])]


def carried(unfinished: bytes, data: bytes, network: int, tunnel: Tunnel) -> list[Piece] | None:
    """The datagrams of a frame that are the tunnel's, with the packet in each; None where the frame is none of its."""
    link, outer = data[:network], data[network:]
    payload = _payload_at(outer, tunnel.port)
    if payload is None:
        return None
    header = _read(unfinished, network)
    inner_at = payload + (0 if tunnel.vni is None else FRAME_HEAD)
    if header.gso_type != GSO_NONE and header.csum_start >= payload:
        inner = segments(_behind(header, inner_at).encode(), outer[inner_at:])
        whole = [outer] if inner is None else _encapsulated(outer[:inner_at], payload, inner)
    else:
        whole = _whole(header, outer)
    return [_piece(link, each, payload, tunnel) for each in whole]


def _piece(link: bytes, outer: bytes, payload: int, tunnel: Tunnel) -> Piece:
    inner, vni = inner_of(_trimmed(outer)[payload:], tunnel.port, -1 if tunnel.vni is None else tunnel.port)
    version = inner[0] >> 4 if inner else 0
    is_packet = (version == 4 and len(inner) >= 20) or (version == 6 and len(inner) >= 40)
    return Piece(_trimmed(inner) if is_packet else b"", link + outer, vni)


def _payload_at(outer: bytes, port: int) -> int | None:
    """Where the UDP payload begins, in a datagram to `port`, or in the first fragment of one."""
    at = 40
    if len(outer) >= 28 and outer[0] >> 4 == 4:
        at = (outer[0] & 15) * 4
        protocol, later = outer[9], struct.unpack_from("!H", outer, 6)[0] & 0x1FFF
        if protocol != UDP or later or at < 20:
            return None
    elif len(outer) < 48 or outer[0] >> 4 != 6 or outer[6] != UDP:
        return None
    if len(outer) < at + 8 or struct.unpack_from("!H", outer, at + 2)[0] != port:
        return None
    return at + 8


def _encapsulated(head: bytes, payload: int, inner: list[bytes]) -> list[bytes]:
    """Segments, each behind the headers of the whole as the kernel writes them (net/ipv4/udp_offload.c,
    skb_udp_tunnel_segment): identification counts on, and a checksum of 0 stays 0."""
    found = []
    udp = payload - 8
    for number, packet in enumerate(inner):
        stamped = bytearray(head)
        length = len(head) - udp + len(packet)
        if head[0] >> 4 == 4:
            (identification,) = struct.unpack_from("!H", head, 4)
            struct.pack_into("!H", stamped, 4, (identification + number) & 0xFFFF)
        struct.pack_into("!H", stamped, udp + 4, length)
        summed = head[udp + 6 : udp + 8] != b"\0\0"
        stamped[udp + 6 : udp + 8] = b"\0\0"
        whole = with_ip_length(bytes(stamped) + packet, len(head) + len(packet))
        if summed:
            value = checksum(pseudo_header(whole, UDP, length) + whole[udp:]) or 0xFFFF
            whole = whole[: udp + 6] + struct.pack("!H", value) + whole[udp + 8 :]
        found.append(whole)
    return found


def _whole(header: VnetHeader, packet: bytes) -> list[bytes]:
    """The packets of a superframe, or the one packet, finished."""
    if header.gso_type != GSO_NONE:
        return segments(header.encode(), packet) or [packet]
    if header.flags & NEEDS_CSUM and header.csum_offset in _INTERNET_SUMS:
        return [finished(header.encode(), packet) or packet]
    return [packet]


def _read(unfinished: bytes, network: int) -> VnetHeader:
    return _FINISHED if unfinished == _NOTHING else _behind(VnetHeader.decode(unfinished), network)


def _behind(header: VnetHeader, offset: int) -> VnetHeader:
    """The same header, for what begins `offset` bytes later; without checksum where that begins earlier."""
    start = header.csum_start - offset
    if start < 0:
        return _FINISHED
    return replace(header, csum_start=start)


def _trimmed(packet: bytes) -> bytes:
    """Without what Ethernet fills short frames up with."""
    if len(packet) < 40:
        length = int.from_bytes(packet[2:4]) if packet[:1] and packet[0] >> 4 == 4 else 0
    elif packet[0] >> 4 == 4:
        length = int.from_bytes(packet[2:4])
    else:
        length = int.from_bytes(packet[4:6]) + 40 if packet[4:6] != b"\0\0" else 0  # 0: RFC 2675
    return packet[:length] if 20 <= length < len(packet) else packet
