"""Compiled segmentation and coalescing against their plain-Python oracle; the kernel is asked in tests/netns."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6

from dataplane import _coalesce, _segment
from dataplane.path import superframe
from dataplane.path.superframe import ACK, CWR, ECE, FIN, PSH, VnetHeader
from tests.generated import cases


def ip_header(version: int, payload: int, protocol: int, draw: st.DrawFn) -> bytes:
    """An IP header without its checksum; the addresses come from few, so that flows meet."""
    one, two = draw(st.sampled_from([(1, 2), (2, 1), (1, 3)]))
    if version == 6:
        flow = draw(st.sampled_from([0x60000000, 0x60000000, 0x60012345, 0x60300000]))
        hops = draw(st.sampled_from([64, 64, 63]))
        return struct.pack("!IHBB", flow, payload, protocol, hops) + bytes(15) + bytes([one]) + bytes(15) + bytes([two])
    tos = draw(st.sampled_from([0, 0, 0, 1, 2, 3, 0x28]))
    fragment = draw(st.sampled_from([0x4000] * 8 + [0, 0, 0xC000, 0x2000, 0x0100]))
    identification = draw(st.sampled_from([0, 1, 2, 3, 0xFFFE, 0xFFFF]))
    ttl = draw(st.sampled_from([64, 64, 64, 63]))
    return struct.pack(
        "!BBHHHBBH4B4B",
        0x45,
        tos,
        20 + payload,
        identification,
        fragment,
        ttl,
        protocol,
        0,
        10,
        0,
        0,
        one,
        10,
        0,
        0,
        two,
    )


def with_checksums(packet: bytes, protocol: int) -> bytes:
    l4 = 20 if packet[0] >> 4 == 4 else 40
    offset = 16 if protocol == superframe.TCP else 6
    partial = superframe.partial_checksum(packet, protocol, len(packet) - l4)
    at = l4 + offset
    packet = packet[:at] + struct.pack("!H", partial) + packet[at + 2 :]
    whole = superframe.finished(VnetHeader(1, 0, 0, 0, l4, offset), superframe.with_ip_length(packet, len(packet)))
    assert whole is not None
    return whole


@st.composite
def flow_packets(draw: st.DrawFn) -> list[bytes]:
    """Packets of a few flows, in order within each, with everything that ends a merge strewn in."""
    size = draw(st.sampled_from([1, 7, 100, 100, 1000]))
    sequence = dict[tuple[int, int], int]()
    found = []
    for _ in range(draw(st.integers(1, 25))):
        version = draw(st.sampled_from([4, 4, 4, 6]))
        protocol = draw(st.sampled_from([superframe.TCP, superframe.TCP, superframe.UDP, 1]))
        length = draw(st.sampled_from([size] * 6 + [size - 1, size + 1, 0]))
        payload = draw(st.binary(min_size=length, max_size=length))
        port = draw(st.sampled_from([1000, 1000, 1001]))
        to = draw(st.sampled_from([80] * 10 + [8472]))
        if protocol == superframe.TCP:
            options = draw(st.sampled_from([b"", b"", b"\x01\x01\x08\x0a" + bytes(8), b"\x01" * 4]))
            flags = draw(st.sampled_from([ACK] * 10 + [ACK | PSH, ACK | FIN, ACK | ECE, ACK | CWR, 0x02, 0x04, 0x30]))
            at = sequence.get((version, port), draw(st.sampled_from([0, 0xFFFFFF00])))
            step = draw(st.sampled_from([0] * 12 + [1, -1]))
            at = (at + step) % 2**32
            sequence[version, port] = (at + len(payload)) % 2**32
            window = draw(st.sampled_from([100] * 10 + [101]))
            offset = (5 + len(options) // 4) << 4
            l4 = struct.pack("!HHIIBBHHH", port, to, at, 7, offset, flags, window, 0, 0) + options
        elif protocol == superframe.UDP:
            l4 = struct.pack("!HHHH", port, to, 8 + len(payload), 0)
        else:
            l4 = b"\x08\0\0\0\0\0\0\0"
        packet = ip_header(version, len(l4) + len(payload), protocol, draw) + l4 + payload
        if protocol != 1:
            packet = with_checksums(packet, protocol)
        damage = draw(st.sampled_from(["none"] * 12 + ["flip", "cut", "pad"]))
        if damage == "flip":
            i = draw(st.integers(0, len(packet) - 1))
            packet = packet[:i] + bytes([packet[i] ^ (1 << draw(st.integers(0, 7)))]) + packet[i + 1 :]
        elif damage == "cut":
            packet = packet[: draw(st.integers(0, len(packet)))]
        elif damage == "pad":
            packet += b"\0"
        found.append(packet)
    return found


@settings(max_examples=cases(1500), deadline=None)
@given(flow_packets(), st.booleans(), st.booleans())
def test_coalescing_equals_the_oracle(packets: list[bytes], tcp: bool, udp: bool) -> None:
    found = _coalesce.superframes(packets, tcp=tcp, udp=udp)
    expected = superframe.superframes(packets, tcp=tcp, udp=udp)
    assert [(VnetHeader.decode(h), p) for h, p in found] == expected


def without_id_where_df(packet: bytes) -> bytes:
    """RFC 6864: the identification of an atomic datagram means nothing."""
    if packet and packet[0] >> 4 == 4 and len(packet) >= 20 and packet[6] & 0x40:
        return packet[:4] + b"\0\0" + packet[6:10] + b"\0\0" + packet[12:]
    return packet


@settings(max_examples=cases(500), deadline=None)
@given(flow_packets())
def test_cutting_gives_back_what_was_merged_in_order(packets: list[bytes]) -> None:
    """Nothing is lost, made twice, altered or overtaken within its flow, and a wrong checksum stays wrong."""
    out = []
    for header, packet in _coalesce.superframes(packets):
        if header == bytes(10):
            out.append(packet)
        else:
            cut = _segment.segments(header, packet)
            assert cut is not None
            assert len(cut) > 1
            out += cut
    came, left = ([without_id_where_df(p) for p in some] for some in (packets, out))
    assert sorted(came) == sorted(left)

    def by_flow(some: list[bytes]) -> dict[bytes, list[bytes]]:
        flows: dict[bytes, list[bytes]] = {}
        for p in some:
            flows.setdefault(p[6:7] + p[8:44] if p[:1] >= b"\x60" else p[9:10] + p[12:24], []).append(p)
        return flows

    assert by_flow(came) == by_flow(left)


@st.composite
def tcp_superframes(draw: st.DrawFn) -> tuple[VnetHeader, bytes]:
    version = draw(st.sampled_from([4, 6]))
    protocol = draw(st.sampled_from([superframe.TCP, superframe.UDP]))
    payload = draw(st.binary(min_size=1, max_size=3000))
    size = draw(st.one_of(st.integers(1, 100), st.integers(1, 3000)))
    extension = draw(st.sampled_from([b"", bytes([protocol, 0, 1, 4, 0, 0, 0, 0])])) if version == 6 else b""
    if protocol == superframe.TCP:
        options = b"\x01" * (4 * draw(st.integers(0, 10)))
        flags = draw(st.integers(0, 255))
        sequence = draw(st.one_of(st.integers(0, 2**32 - 1), st.integers(2**32 - 3000, 2**32 - 1)))
        l4 = struct.pack("!HHIIBBHHH", 1, 2, sequence, 3, (5 + len(options) // 4) << 4, flags, 4, 0, 5) + options
    else:
        l4 = struct.pack("!HHHH", 1, 2, 8 + len(payload), 0)
    first = 60 if extension else protocol  # 60: destination options, RFC 8200 section 4.6
    header = ip_header(version, len(extension) + len(l4) + len(payload), first, draw)
    packet = header + extension + l4 + payload
    start = len(header) + len(extension)
    offset = 16 if protocol == superframe.TCP else 6
    partial = superframe.partial_checksum(packet, protocol, len(l4) + len(payload))
    packet = packet[: start + offset] + struct.pack("!H", partial) + packet[start + offset + 2 :]
    kind = superframe.GSO_UDP_L4 if protocol == superframe.UDP else 1 if version == 4 else 4
    ecn = superframe.GSO_ECN if draw(st.booleans()) else 0
    return VnetHeader(1, kind | ecn, draw(st.integers(0, 200)), size, start, offset), packet


@settings(max_examples=cases(1000), deadline=None)
@given(tcp_superframes())
def test_segmentation_equals_the_oracle(frame: tuple[VnetHeader, bytes]) -> None:
    header, packet = frame
    assert _segment.segments(header.encode(), packet) == superframe.segments(header, packet)


@settings(max_examples=cases(1000), deadline=None)
@given(
    tcp_superframes(),
    st.sampled_from(["flags", "gso_type", "gso_size", "csum_start", "csum_offset", "none"]),
    st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 3, 4, 5])),
    st.integers(0, 3100),
)
def test_a_superframe_that_lies_is_refused_alike(
    frame: tuple[VnetHeader, bytes], field: str, value: int, cut: int
) -> None:
    header, packet = frame
    packet = packet[:cut]
    values = {
        name: getattr(header, name)
        for name in ("flags", "gso_type", "hdr_len", "gso_size", "csum_start", "csum_offset")
    }
    if field != "none":
        values[field] = value
    header = VnetHeader(**values)
    assert _segment.segments(header.encode(), packet) == superframe.segments(header, packet)
    assert _segment.finished(header.encode(), packet) == superframe.finished(header, packet)


@pytest.mark.parametrize(
    "build", [lambda: IP(src="10.1.1.1", dst="10.1.2.2"), lambda: IPv6(src="fd00::1", dst="fd00::2")]
)
@pytest.mark.parametrize("length", [1, 99, 100, 101, 6400, 6401])
def test_tcp_segments_are_what_scapy_would_send(build: Callable[[], IP], length: int) -> None:
    payload = bytes(i % 251 for i in range(length))

    def piece(start: int, data: bytes, flags: str, number: int) -> bytes:
        ip = build()
        if ip.version == 4:
            ip.id, ip.flags = 0xFFFE + number & 0xFFFF, "DF"
        return bytes(ip / TCP(sport=5, dport=6, seq=(0xFFFFFF00 + start) % 2**32, ack=9, flags=flags) / data)

    whole = piece(0, payload, "FPA", 0)
    l4 = 20 if whole[0] >> 4 == 4 else 40
    partial = superframe.partial_checksum(whole, 6, len(whole) - l4)
    whole = whole[: l4 + 16] + struct.pack("!H", partial) + whole[l4 + 18 :]
    header = VnetHeader(1, 1 if l4 == 20 else 4, l4 + 20, 100, l4, 16)
    starts = range(0, length, 100)
    expected = [piece(s, payload[s : s + 100], "FPA" if s == starts[-1] else "A", s // 100) for s in starts]
    assert _segment.segments(header.encode(), whole) == expected


def test_a_corrupt_packet_is_never_given_a_good_checksum() -> None:
    packets = [
        bytes(IP(src="10.1.1.1", dst="10.1.2.2", flags="DF") / TCP(seq=i * 100, flags="A") / (bytes([i]) * 100))
        for i in range(10)
    ]
    for broken in range(10):
        for bit in (0, 7, 8 * 60, 8 * 139 + 7):
            damaged = bytearray(packets[broken])
            damaged[bit // 8] ^= 1 << bit % 8
            came = [*packets[:broken], bytes(damaged), *packets[broken + 1 :]]
            singles = [p for h, p in _coalesce.superframes(came) if h == bytes(10)]
            assert bytes(damaged) in singles


@pytest.mark.parametrize("length", [*range(300), 1448, 9000, 65535])
def test_vectorised_sums_equal_the_plain_one(length: int) -> None:
    data = bytes((i * 7 + length) % 256 for i in range(length + 8))
    for shift in (0, 1, 3):
        piece = b"\0\0" + data[shift : shift + length]
        done = _segment.finished(VnetHeader(1, 0, 0, 0, 0, 0).encode(), piece)
        assert done == superframe.finished(VnetHeader(1, 0, 0, 0, 0, 0), piece)


def test_many_flows_at_once_are_all_merged() -> None:
    packets = [
        bytes(IP(src="10.1.1.1", dst="10.1.2.2", flags="DF") / UDP(sport=1000 + flow, dport=7) / b"payload")
        for _ in range(4)
        for flow in range(60)
    ]
    assert len(_coalesce.superframes(packets)) == 60
