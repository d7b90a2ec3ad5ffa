"""The compiled packet functions against their plain-Python oracle, and the oracle against scapy."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP

from dataplane import _engine
from dataplane.errors import DropReason
from dataplane.path import wire

OUR_ADDRESS = IPv4Address("10.5.52.0")

addresses = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 0x7F000001, 0xE0000001, 0xFFFFFFFF, 0x0A053401, 0xDFFFFFFF, 0xF0000000]),
)


@st.composite
def packets(draw: st.DrawFn) -> bytes:
    """Mostly sound IPv4 packets, some with a header that lies."""
    payload = draw(st.binary(max_size=700))
    header = 20 + 4 * draw(st.integers(0, 10))
    body = bytearray(header) + payload
    body[0] = draw(st.sampled_from([0x40 | header // 4] * 8 + [0x60, 0x45, 0x4F, 0x44, 0x00]))
    lengths = [len(body)] * 6 + [len(body) - 1, len(body) + 1, 19, header, 0, 65535]
    body[2:4] = draw(st.sampled_from(lengths)).to_bytes(2)
    body[6:8] = draw(st.sampled_from([0, 0, 0, 0x4000, 0x2000, 0x0001, 0x1FFF])).to_bytes(2)
    body[9] = draw(st.sampled_from([1, 1, 6, 17, 0, 255]))
    body[12:16] = draw(addresses).to_bytes(4)
    body[16:20] = draw(addresses).to_bytes(4)
    if payload:
        body[header] = draw(st.one_of(st.integers(0, 20), st.integers(0, 255)))
    cut = draw(st.one_of(st.just(len(body)), st.integers(0, len(body))))
    return bytes(body[:cut])


@settings(max_examples=1000)
@given(st.one_of(packets(), st.binary(max_size=64)))
def test_parse_equals_the_oracle(packet: bytes) -> None:
    verdict, source, destination, length = _engine.inspect_ipv4(packet)
    expected = wire.parse_ipv4(packet)
    if isinstance(expected, DropReason):
        assert verdict == expected
    else:
        found = (verdict, source, destination, length)
        assert found == (None, int(expected.source), int(expected.destination), expected.length)


@settings(max_examples=1000)
@given(st.one_of(packets(), st.binary(max_size=64)))
def test_icmp_unreachable_equals_the_oracle(packet: bytes) -> None:
    assert _engine.icmp_unreachable(int(OUR_ADDRESS), packet) == wire.icmp_unreachable(OUR_ADDRESS, packet)


def test_icmp_unreachable_is_what_scapy_builds() -> None:
    packet = bytes(IP(src="10.5.52.2", dst="10.5.99.9", ttl=63) / TCP(sport=1, dport=2) / (b"x" * 1000))
    quoted = packet[:548]
    expected = bytes(IP(src="10.5.52.0", dst="10.5.52.2", tos=0xC0, id=0, ttl=64) / ICMP(type=3, code=0) / quoted)
    assert wire.icmp_unreachable(OUR_ADDRESS, packet) == expected


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
    ],
)
def test_no_icmp_error_is_sent(packet: IP, why: str) -> None:
    assert _engine.icmp_unreachable(int(OUR_ADDRESS), bytes(packet)) is None, why


def test_an_echo_request_is_answered() -> None:
    packet = bytes(IP(src="10.1.1.1", dst="10.2.2.2") / ICMP(type=8) / b"abcd")
    assert _engine.icmp_unreachable(int(OUR_ADDRESS), packet) is not None


@given(st.binary(max_size=200))
def test_checksum_equals_scapy(data: bytes) -> None:
    from scapy.utils import checksum

    assert wire.checksum(data) == checksum(data)
