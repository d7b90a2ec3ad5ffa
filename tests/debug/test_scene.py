"""Which peer an address belongs to: beside a search through all leases."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6

from dataplane.debug.scene import Way, Ways

ADDRESSES = st.sampled_from(
    [f"10.5.{a}.{b}" for a in range(4) for b in (0, 9)] + ["198.18.1.1", "198.18.1.2", "fd00::1", "fd00:0:0:1::9", "::"]
)
SUBNETS = st.sampled_from(
    [
        "10.5.0.0/24",
        "10.5.1.0/24",
        "10.5.0.0/16",
        "10.5.2.0/23",
        "10.5.1.9/32",
        "fd00::/64",
        "fd00:0:0:1::/64",
        "fd00::/48",
    ]
)
NODES = st.sampled_from(["198.18.1.1", "198.18.1.2", "fd00:198::2"])
WAYS = st.lists(
    st.builds(Way, SUBNETS.map(ip_network), NODES.map(ip_address), st.booleans()), unique_by=lambda w: w.subnet
)


@settings(max_examples=300, deadline=None)
@given(WAYS, ADDRESSES)
def test_the_longest_prefix_wins_and_then_the_nodes_own_address(ways: list[Way], text: str) -> None:
    address = ip_address(text)
    covering = [way for way in ways if address in way.subnet]
    nodes = [way for way in ways if way.address == address]
    expected = max(covering, key=lambda way: way.subnet.prefixlen) if covering else nodes[0] if nodes else None
    assert Ways(ways).of(address.packed) == expected


def test_the_far_end_of_a_packet() -> None:
    way = Way(ip_network("10.5.2.0/24"), ip_address("198.18.1.2"), direct=False)
    six = Way(ip_network("fd00:2::/64"), ip_address("fd00:198::2"), direct=False)
    ways = Ways([way, six])
    for packet, sent, found in (
        (IP(src="10.5.1.1", dst="10.5.2.2"), True, way),
        (IP(src="10.5.1.1", dst="10.5.2.2"), False, None),
        (IP(src="10.5.2.2", dst="10.5.1.1"), False, way),
        (IPv6(src="fd00:1::1", dst="fd00:2::2"), True, six),
        (IPv6(src="fd00:2::1", dst="fd00:1::2"), False, six),
    ):
        assert ways.of_packet(bytes(packet), sent=sent) == found
    assert ways.of_packet(b"", sent=True) is None
    assert ways.of_packet(b"\x45", sent=False) is None
