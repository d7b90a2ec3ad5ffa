"""Frames cut as the kernel would cut them: beside the plain-Python oracle, and beside scapy for what is around them."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet as Layers

from dataplane.debug import cutting
from dataplane.debug.scene import Tunnel
from dataplane.path import superframe
from dataplane.path.superframe import GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VnetHeader

LINK = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
VXLAN_TUNNEL, UDP_TUNNEL = Tunnel(8472, 1), Tunnel(8285, None)
FINISHED = VnetHeader().encode()
SIZE = 100


def big(version: int, protocol: int, count: int = 3, *, size: int = SIZE) -> tuple[VnetHeader, bytes]:
    """A superframe of `count` segments, the last one shorter, and how it is to be cut."""
    head = (
        IP(src="10.1.1.1", dst="10.2.2.2", id=65535, flags="DF") if version == 4 else IPv6(src="fd00::1", dst="fd00::2")
    )
    payload = bytes(number % 251 for number in range(size * count - 7))
    l4 = TCP(sport=1, dport=2, seq=2**32 - 50, flags="PA") if protocol == 6 else UDP(sport=1, dport=2)
    packet = bytes(head / l4 / payload)
    at, offset = (20 if version == 4 else 40), (16 if protocol == 6 else 6)
    partial = superframe.partial_checksum(packet, protocol, len(packet) - at)
    packet = packet[: at + offset] + struct.pack("!H", partial) + packet[at + offset + 2 :]
    kind = GSO_UDP_L4 if protocol == 17 else GSO_TCPV4 if version == 4 else GSO_TCPV6
    return VnetHeader(NEEDS_CSUM, kind, 0, size, at, offset), packet


def within(header: VnetHeader, before: int) -> bytes:
    """The same header, counted from further ahead."""
    return VnetHeader(
        header.flags, header.gso_type, header.hdr_len, header.gso_size, header.csum_start + before, header.csum_offset
    ).encode()


def outer(version: int, **udp: Any) -> Layers:
    head = IP(src="198.18.1.1", dst="198.18.1.2", id=7) if version == 4 else IPv6(src="fd01::1", dst="fd01::2")
    return head / UDP(sport=50000, **udp)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [6, 17])
def test_a_superframe_on_a_device_is_cut(version: int, protocol: int) -> None:
    header, packet = big(version, protocol)
    frame = bytes(LINK) + packet
    expected = superframe.segments(header, packet)
    assert expected is not None
    assert cutting.packets(within(header, 14), frame, 14) == expected
    pieces = cutting.direct(within(header, 14), frame, 14)
    assert [piece.inner for piece in pieces] == expected
    assert [piece.frame for piece in pieces] == [bytes(LINK) + each for each in expected]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("inner_version", [4, 6])
@pytest.mark.parametrize("protocol", [6, 17])
@pytest.mark.parametrize("summed", [False, True])
def test_a_superframe_within_vxlan_is_cut(version: int, inner_version: int, protocol: int, summed: bool) -> None:
    header, packet = big(inner_version, protocol)
    ethernet = Ether(src="02:00:00:00:00:03", dst="02:00:00:00:00:04", type=0x0800 if inner_version == 4 else 0x86DD)
    check: dict[str, int] = {} if summed else {"chksum": 0}

    def made(number: int, inner: bytes) -> bytes:
        layers = outer(version, dport=8472, **check) / VXLAN(vni=1, flags=8) / ethernet / inner
        if version == 4:
            layers[IP].id = 7 + number
        return bytes(layers)

    whole = bytes(LINK) + made(0, packet)
    before = len(whole) - len(packet)
    pieces = cutting.carried(within(header, before), whole, 14, VXLAN_TUNNEL)
    expected = superframe.segments(header, packet)
    assert expected is not None
    assert pieces is not None
    assert [(piece.inner, piece.vni) for piece in pieces] == [(each, 1) for each in expected]
    assert [piece.frame for piece in pieces] == [bytes(LINK) + made(n, each) for n, each in enumerate(expected)]


@pytest.mark.parametrize("version", [4, 6])
def test_a_run_of_datagrams_is_cut_into_its_packets(version: int) -> None:
    """UDP_SEGMENT, as our own path sends: each segment is a datagram with a packet of its own."""
    inner = [bytes(IP(src="10.1.1.1", dst="10.2.2.2", id=n) / UDP(sport=1, dport=2) / bytes(72)) for n in range(3)]
    assert {len(each) for each in inner} == {SIZE}
    whole = bytes(outer(version, dport=8285) / b"".join(inner))
    at = 20 if version == 4 else 40
    partial = superframe.partial_checksum(whole, 17, len(whole) - at)
    whole = whole[: at + 6] + struct.pack("!H", partial) + whole[at + 8 :]
    header = VnetHeader(NEEDS_CSUM, GSO_UDP_L4, 0, SIZE, at, 6)
    pieces = cutting.carried(within(header, 14), bytes(LINK) + whole, 14, UDP_TUNNEL)
    expected = superframe.segments(header, whole)
    assert expected is not None
    assert pieces is not None
    assert [piece.inner for piece in pieces] == inner
    assert [piece.frame[14:] for piece in pieces] == expected
    assert {piece.vni for piece in pieces} == {None}


def test_an_unfinished_checksum_is_finished_also_within_a_datagram() -> None:
    right = IP(src="10.1.1.1", dst="10.2.2.2") / TCP(sport=1, dport=2) / b"abc"
    packet = bytes(right)
    partial = superframe.partial_checksum(packet, 6, len(packet) - 20)
    raw = packet[:36] + struct.pack("!H", partial) + packet[38:]
    header = VnetHeader(NEEDS_CSUM, 0, 0, 0, 20, 16)
    assert cutting.packets(within(header, 0), raw, 0) == [packet]
    ethernet = Ether(src="02:00:00:00:00:03", dst="02:00:00:00:00:04", type=0x0800)
    whole = bytes(outer(4, dport=8472, chksum=0) / VXLAN(vni=9, flags=8) / ethernet / raw)
    before = len(whole) - len(raw)
    # a device without a link header: the outer packet begins at once
    pieces = cutting.carried(within(header, before), whole, 0, VXLAN_TUNNEL)
    assert pieces == [cutting.Piece(packet, whole[:before] + packet, 9)]


def test_the_checksum_of_sctp_is_left_alone() -> None:
    packet = bytes(IP(src="10.1.1.1", dst="10.2.2.2", proto=132) / bytes(20))
    assert cutting.packets(VnetHeader(NEEDS_CSUM, 0, 0, 0, 20, 8).encode(), packet, 0) == [packet]


def test_padding_is_no_part_of_a_packet_but_of_its_frame() -> None:
    packet = bytes(IP(src="10.1.1.1", dst="10.2.2.2") / UDP(sport=1, dport=2) / b"a")
    datagram = bytes(outer(4, dport=8285) / packet)
    frame = bytes(LINK) + datagram + bytes(5)
    assert cutting.carried(FINISHED, frame, 14, UDP_TUNNEL) == [cutting.Piece(packet, frame, None)]
    assert cutting.packets(FINISHED, packet + bytes(9), 0) == [packet]


@pytest.mark.parametrize(
    ("payload", "inner", "vni"),
    [
        (b"", b"", None),
        (bytes(22), b"", None),
        (b"\x08" + bytes(3) + b"\0\0\x05\0", b"", None),
        (bytes(VXLAN(vni=5, flags=8) / Ether(type=0x0806) / bytes(28)), b"", 5),
        (bytes(VXLAN(vni=5, flags=8) / Ether(type=0x0800) / b"\x10none"), b"", 5),
        (bytes(VXLAN(vni=5, flags=8) / Ether(type=0x0800) / b"\x45"), b"", 5),
        (bytes(VXLAN(vni=5, flags=8) / Ether(type=0x86DD) / (b"\x60" + bytes(38))), b"", 5),
    ],
)
def test_a_datagram_without_a_packet_is_shown(payload: bytes, inner: bytes, vni: int | None) -> None:
    frame = bytes(LINK / outer(4, dport=8472) / payload)
    assert cutting.carried(FINISHED, frame, 14, VXLAN_TUNNEL) == [cutting.Piece(inner, frame, vni)]


def test_what_is_not_the_tunnels_is_told() -> None:
    for layers in (
        outer(4, dport=53) / (b"x" * 30),
        outer(6, dport=53) / (b"x" * 30),
        IP(frag=100, proto=17) / bytes(40),
        IP() / TCP(dport=8472),
    ):
        assert cutting.carried(FINISHED, bytes(LINK / layers), 14, VXLAN_TUNNEL) is None


@settings(max_examples=3000, deadline=None)
@given(
    st.binary(max_size=120),
    st.binary(min_size=10, max_size=10),
    st.sampled_from([0, 14]),
    st.sampled_from([VXLAN_TUNNEL, UDP_TUNNEL]),
    st.booleans(),
)
@example(b"", bytes(10), 14, VXLAN_TUNNEL, False)
def test_whatever_the_bytes_are_a_frame_ends_in_pieces(
    data: bytes, unfinished: bytes, network: int, tunnel: Tunnel, dressed: bool
) -> None:
    if dressed:
        data = bytes(LINK)[:network] + bytes(outer(4, dport=tunnel.port)) + data
    assert cutting.packets(unfinished, data, network)
    assert cutting.direct(unfinished, data, network)
    pieces = cutting.carried(unfinished, data, network, tunnel)
    assert pieces is None or pieces
    assert not dressed or pieces
