"""The compiled packet functions against their plain-Python oracle, and the oracle against scapy and the RFCs."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet

from dataplane import _engine
from dataplane.errors import DropReason
from dataplane.path import wire
from tests.generated import cases

OURS: dict[int, IPv4Address | IPv6Address] = {4: IPv4Address("10.5.52.0"), 6: IPv6Address("fd00:5:52::")}
MAC, PEER_MAC = bytes.fromhex("0a0000000001"), bytes.fromhex("0a0000000002")
VNI = 0x0A0B0C

addresses = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 0x7F000001, 0xE0000001, 0xFFFFFFFF, 0x0A053401, 0xDFFFFFFF, 0xF0000000]),
)
wide_addresses = st.one_of(
    st.integers(0, 2**128 - 1),
    st.sampled_from([int(IPv6Address(a)) for a in ("::", "::1", "fd00::1", "ff02::1", "::ffff:10.1.1.1", "fe80::1")]),
)


@st.composite
def v4_packets(draw: st.DrawFn) -> bytes:
    """Mostly sound IPv4 packets, some with a header that lies."""
    payload = draw(st.binary(max_size=700))
    header = 20 + 4 * draw(st.integers(0, 10))
    body = bytearray(header) + payload
    body[0] = draw(st.sampled_from([0x40 | header // 4] * 8 + [0x60, 0x45, 0x4F, 0x44, 0x00]))
    body[1] = draw(st.integers(0, 255))
    lengths = [len(body)] * 6 + [len(body) - 1, len(body) + 1, 19, header, 0, 65535]
    body[2:4] = draw(st.sampled_from(lengths)).to_bytes(2)
    body[6:8] = draw(st.sampled_from([0, 0, 0, 0x4000, 0x2000, 0x0001, 0x1FFF])).to_bytes(2)
    body[9] = draw(st.sampled_from([1, 1, 6, 17, 0, 255]))
    body[10:12] = draw(st.sampled_from([0, 0xFFFF, wire.checksum(bytes(body[:header]))])).to_bytes(2)
    body[12:16] = draw(addresses).to_bytes(4)
    body[16:20] = draw(addresses).to_bytes(4)
    if payload:
        body[header] = draw(st.one_of(st.integers(0, 20), st.integers(0, 255)))
    cut = draw(st.one_of(st.just(len(body)), st.integers(0, len(body))))
    return bytes(body[:cut])


@st.composite
def v6_packets(draw: st.DrawFn) -> bytes:
    """IPv6 packets with up to ten headers behind the first, most of them sound."""
    chain = draw(st.lists(st.sampled_from([0, 43, 60, 60, 44]), max_size=3)) * draw(st.sampled_from([1, 1, 1, 4]))
    last = draw(st.sampled_from([6, 17, 58, 58, 59]))
    rest = b""
    for kind, following in zip(chain, [*chain, last][1:], strict=True):
        units = 0 if kind == 44 else draw(st.sampled_from([0, 0, 1, 5]))
        offset = draw(st.sampled_from([0, 0, 1, 8, 1480]))
        body = offset.to_bytes(2) + bytes(4) if kind == 44 else draw(st.binary(min_size=6, max_size=6))
        rest += bytes([following, units if kind != 44 else draw(st.sampled_from([0, 7]))]) + body + bytes(8 * units)
    upper = draw(st.binary(max_size=1500))
    if upper:
        upper = bytes([draw(st.sampled_from([1, 2, 128, 135, 137, upper[0]]))]) + upper[1:]
    payload = rest + upper
    length = draw(st.sampled_from([len(payload)] * 6 + [len(payload) + 1, max(0, len(payload) - 1), 0, 65535]))
    first = 0x60000000 | draw(st.integers(0, 2**28 - 1))
    header = first.to_bytes(4) + length.to_bytes(2) + bytes([chain[0] if chain else last, 64])
    packet = header + draw(wide_addresses).to_bytes(16) + draw(wide_addresses).to_bytes(16) + payload
    return packet[: draw(st.one_of(st.just(len(packet)), st.integers(0, len(packet))))]


packets = st.one_of(v4_packets(), v6_packets(), st.binary(max_size=64))


def wide(address: IPv4Address | IPv6Address) -> bytes:
    return bytes(10) + b"\xff\xff" + address.packed if address.version == 4 else address.packed


@settings(max_examples=cases(1500))
@given(packets)
def test_parse_equals_the_oracle(packet: bytes) -> None:
    verdict, source, destination, length = _engine.inspect_ip(packet)
    expected = wire.parse_ip(packet)
    if isinstance(expected, DropReason):
        assert verdict == expected
    else:
        found = (verdict, source, destination, length)
        assert found == (None, wide(expected.source), wide(expected.destination), expected.length)


@settings(max_examples=cases(1500))
@given(packets, st.sampled_from([0, 1280, 1400, 65535]))
def test_icmp_errors_equal_the_oracle(packet: bytes, mtu: int) -> None:
    source = OURS.get(packet[0] >> 4 if packet else 4, OURS[4])
    assert _engine.icmp_error(source.packed, packet, mtu) == wire.icmp_error(source, packet, mtu=mtu)


def test_icmp_unreachable_is_what_scapy_builds() -> None:
    packet = bytes(IP(src="10.5.52.2", dst="10.5.99.9", ttl=63) / TCP(sport=1, dport=2) / (b"x" * 1000))
    quoted = packet[:548]
    expected = bytes(IP(src="10.5.52.0", dst="10.5.52.2", tos=0xC0, id=0, ttl=64) / ICMP(type=3, code=0) / quoted)
    assert wire.icmp_error(OURS[4], packet) == expected


@pytest.mark.parametrize("mtu", [0, 1380])
def test_icmpv6_errors_are_what_scapy_builds(mtu: int) -> None:
    packet = bytes(IPv6(src="fd00:5:52::2", dst="fd00:5:99::9", hlim=63) / TCP(sport=1, dport=2) / (b"x" * 2000))
    outer = IPv6(src="fd00:5:52::", dst="fd00:5:52::2", hlim=64)
    error = ICMPv6PacketTooBig(mtu=mtu) if mtu else ICMPv6DestUnreach(code=0)
    assert wire.icmp_error(OURS[6], packet, mtu=mtu) == bytes(outer / error / packet[:1232])


@pytest.mark.parametrize(
    ("packet", "why"),
    [
        (IP(src="10.1.1.1", dst="10.2.2.2") / ICMP(type=3) / (b"x" * 28), "about an ICMP error"),
        (IP(src="10.1.1.1", dst="10.2.2.2") / ICMP(type=11) / (b"x" * 28), "about an ICMP error"),
        (IP(src="10.1.1.1", dst="10.2.2.2", frag=100) / (b"x" * 28), "about a later fragment"),
        (IP(src="10.1.1.1", dst="224.0.0.5") / UDP() / b"x", "to a multicast destination"),
        (IP(src="10.1.1.1", dst="255.255.255.255") / UDP() / b"x", "to broadcast"),
        (IP(src="0.0.0.0", dst="10.2.2.2") / UDP() / b"x", "to nobody"),
        (IP(src="127.0.0.1", dst="10.2.2.2") / UDP() / b"x", "to loopback"),
        (IPv6(src="fd00::1", dst="fd00::2") / ICMPv6DestUnreach() / (b"x" * 48), "about an ICMPv6 error"),
        (IPv6(src="fd00::1", dst="fd00::2") / IPv6ExtHdrDestOpt() / ICMPv6DestUnreach() / b"x", "an error, further on"),
        (IPv6(src="fd00::1", dst="fd00::2") / IPv6ExtHdrFragment(offset=5, nh=17) / (b"x" * 8), "a later fragment"),
        (IPv6(src="fd00::1", dst="ff05::5") / UDP() / b"x", "to a multicast destination"),
        (IPv6(src="::", dst="ff02::1:ff00:1") / ICMPv6ND_NS(tgt="fd00::1"), "duplicate address detection"),
        (IPv6(src="ff02::1", dst="fd00::2") / UDP() / b"x", "to multicast, as a source"),
    ],
)
def test_no_icmp_error_is_sent(packet: IP, why: str) -> None:
    assert _engine.icmp_error(OURS[packet.version].packed, bytes(packet)) is None, why


@pytest.mark.parametrize(
    "packet",
    [
        IP(src="10.1.1.1", dst="10.2.2.2") / ICMP(type=8) / b"abcd",
        IPv6(src="fd00::1", dst="fd00::2") / ICMPv6EchoRequest(data=b"abcd"),
        IPv6(src="fd00::1", dst="fd00::2") / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / UDP() / b"x",
        IPv6(src="fd00::1", dst="fd00::2") / IPv6ExtHdrFragment(m=1, nh=17) / UDP() / b"x",
    ],
)
def test_what_may_be_answered_is(packet: IP) -> None:
    assert _engine.icmp_error(OURS[packet.version].packed, bytes(packet)) is not None


def test_a_multicast_packet_that_is_too_big_is_answered() -> None:
    """RFC 4443 section 2.4 (e.3): path MTU discovery has to work for multicast too."""
    packet = bytes(IPv6(src="fd00::1", dst="ff05::5") / UDP() / b"x")
    assert _engine.icmp_error(OURS[6].packed, packet, 1280) == wire.icmp_error(OURS[6], packet, mtu=1280) is not None


@given(st.binary(max_size=200))
def test_checksum_equals_scapy(data: bytes) -> None:
    from scapy.utils import checksum

    assert wire.checksum(data) == checksum(data)


# --- unfinished checksums -------------------------------------------------------------------------------------


@st.composite
def summed(draw: st.DrawFn) -> bytes:
    """TCP and UDP packets whose checksum is right, unfinished or something else."""
    payload = draw(st.binary(max_size=60))
    l4 = UDP(sport=1, dport=2) if draw(st.booleans()) else TCP(sport=1, dport=2, options=[("NOP", None)] * 4)
    ip: Packet
    if draw(st.booleans()):
        ip = IP(src="10.1.1.1", dst="10.1.2.2", flags=draw(st.sampled_from(["", "DF", "DF", "MF"])))
    else:
        ip = IPv6(src="fd00::1", dst="fd00::2")
        for extension in draw(st.lists(st.sampled_from([IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop]), max_size=2)):
            ip = ip / extension()
    packet = bytearray(bytes(ip / l4 / payload))
    header = wire.parse_ip(bytes(packet))
    assert not isinstance(header, DropReason)
    assert header.l4 is not None
    at = header.l4 + (6 if header.protocol == wire.UDP else 16)
    partial = ~wire.checksum(wire.pseudo_header(bytes(packet), header.protocol, len(packet) - header.l4)) & 0xFFFF
    sums = [bytes(packet[at : at + 2]), partial.to_bytes(2), partial.to_bytes(2), b"\0\7"]
    packet[at : at + 2] = draw(st.sampled_from(sums))
    return bytes(packet) + draw(st.sampled_from([b"", b"", b"pad"]))


@settings(max_examples=cases(1000))
@given(st.one_of(summed(), summed(), packets))
def test_unfinished_checksums_are_told_as_by_the_oracle(packet: bytes) -> None:
    if not isinstance(wire.parse_ip(packet), DropReason):
        assert _engine.unfinished(packet) == wire.unfinished_checksum(packet)


def test_a_sum_that_is_right_is_finished_whatever_it_looks_like() -> None:
    """A datagram whose own words add up to nothing: its checksum is the complement of its pseudo-header's sum, and a
    second one makes the pair that is both."""
    head = bytes(IP(src="10.1.1.1", dst="10.1.2.2", len=30, proto=17, chksum=None))
    l4 = bytearray(b"\0\1\0\2\0\x0a\0\0\0\0")
    partial = ~wire.checksum(wire.pseudo_header(head, 17, 10)) & 0xFFFF
    l4[6:8] = partial.to_bytes(2)
    rest = (0xFFFF - partial) * 2 % 0xFFFF  # so that the whole sums to 0xFFFF
    l4[8:10] = ((rest - 1 - 2 - 10) % 0xFFFF).to_bytes(2)
    packet = head + bytes(l4)
    assert wire.checksum(wire.pseudo_header(head, 17, 10) + bytes(l4)) == 0
    assert _engine.unfinished(packet) is None
    assert wire.unfinished_checksum(packet) is None


# --- VXLAN ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "packet"), [(4, IP(src="10.1.1.1") / b"x"), (6, IPv6(src="fd00::1") / b"x")])
def test_the_head_of_a_frame_is_what_scapy_builds(version: int, packet: IP) -> None:
    head = wire.frame_head(VNI, MAC, PEER_MAC, version)
    frame = VXLAN(vni=VNI, flags="Instance") / Ether(src=MAC.hex(":"), dst=PEER_MAC.hex(":")) / packet
    assert head + bytes(packet) == bytes(frame)
    assert _engine.frame_head(VNI, MAC, PEER_MAC, version) == head
    assert wire.inspect_frame(wire.frame_head(VNI, PEER_MAC, MAC, version) + bytes(packet), VNI, MAC, version) is None


@settings(max_examples=cases(2000))
@given(
    st.sampled_from([4, 6]),
    st.lists(st.tuples(st.integers(0, 21), st.integers(0, 255)), max_size=2),
    st.sampled_from([PEER_MAC, PEER_MAC, MAC]),
    st.sampled_from([None, None, 0x8100, 0x88A8, 0x0806, 0x0800]),
    st.integers(0, 30),
)
def test_frames_get_the_verdict_of_the_oracle(
    version: int, changes: list[tuple[int, int]], source: bytes, ethertype: int | None, length: int
) -> None:
    frame = bytearray(wire.frame_head(VNI, source, MAC, version) + bytes(20))
    if ethertype is not None:
        frame[20:22] = ethertype.to_bytes(2)
    for at, value in changes:
        frame[at] = value
    datagram = bytes(frame[: length if length < 22 else len(frame)])
    assert _engine.inspect_frame(datagram, VNI, MAC, version) == wire.inspect_frame(datagram, VNI, MAC, version)


RFC6040 = {
    (0, 0): 0, (0, 1): 0, (0, 2): 0, (0, 3): None,
    (1, 0): 1, (1, 1): 1, (1, 2): 1, (1, 3): 3,
    (2, 0): 2, (2, 1): 1, (2, 2): 2, (2, 3): 3,
    (3, 0): 3, (3, 1): 3, (3, 2): 3, (3, 3): 3,
}  # fmt: skip
"""Figure 4: (inner, outer) -> what leaves."""


@pytest.mark.parametrize(("inner", "outer"), RFC6040)
@pytest.mark.parametrize("dscp", [0, 0x2E])
def test_ecn_leaves_the_tunnel_as_in_the_table(inner: int, outer: int, dscp: int) -> None:
    for build in (IP(src="10.1.1.1", tos=dscp << 2 | inner, id=0x1234), IPv6(src="fd00::1", tc=dscp << 2 | inner)):
        packet = bytes(build / UDP() / b"payload")
        expected = RFC6040[inner, outer]
        found = _engine.with_outer_ecn(packet, outer)
        assert found == wire.with_outer_ecn(packet, outer)
        if expected is None:
            assert found is None
        else:
            setattr(build, "tos" if build.version == 4 else "tc", dscp << 2 | expected)
            assert found == bytes(build / UDP() / b"payload"), "checksum mended, nothing else touched"


@pytest.mark.parametrize("inner", range(4))
def test_ecn_enters_the_tunnel_as_with_the_kernel(inner: int) -> None:
    for build in (IP(tos=0xB8 | inner), IPv6(tc=0xB8 | inner)):
        assert _engine.outer_ecn(bytes(build)) == wire.outer_ecn(bytes(build)) == (0, 1, 2, 2)[inner]


@settings(max_examples=cases(500))
@given(packets, st.integers(0, 3))
def test_ecn_of_every_packet_equals_the_oracle(packet: bytes, outer: int) -> None:
    if not isinstance(wire.parse_ip(packet), DropReason):
        assert _engine.with_outer_ecn(packet, outer) == wire.with_outer_ecn(packet, outer)
        assert _engine.outer_ecn(packet) == wire.outer_ecn(packet)
