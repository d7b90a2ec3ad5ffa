"""The forwarding table against a dictionary that is searched by hand."""

from __future__ import annotations

import random
import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane._fib import CHANGE_BYTES, Fib
from tests.generated import cases

RECORD = struct.Struct("=16s16sIHBB6s2x")

Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address


def v4_prefix(base: int, length: int) -> IPv4Network:
    return IPv4Network((base & (0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF, length))


def v6_prefix(base: int, length: int) -> IPv6Network:
    return IPv6Network((base & ((1 << 128) - (1 << (128 - length))), length))


# a small corner of each address space makes prefixes nest, touch and repeat
v4_prefixes = st.builds(
    v4_prefix,
    st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0x0A000000, 0x0A0000FF, 0x0A00FFFF, 0xFFFFFFFF, 0])),
    st.integers(0, 32),
)
CORNERS = [int(IPv6Address(text)) for text in ("fd00::", "fd00::1:0", "fd00:0:0:ff::", "::", "2001:db8::1")]
v6_prefixes = st.builds(
    v6_prefix,
    st.one_of(st.integers(0, 2**128 - 1), st.sampled_from([*CORNERS, 2**128 - 1])),
    st.one_of(st.integers(0, 128), st.sampled_from([48, 56, 64, 64, 128])),
).filter(lambda network: not network.subnet_of(IPv6Network("::ffff:0:0/96")))
prefixes = st.one_of(v4_prefixes, v6_prefixes)
near = st.tuples(prefixes, st.integers(-2, 2))
PEERS = [ip_address(text) for text in ("198.18.0.1", "198.18.0.2", "198.19.0.1", "fd00:198:18::1", "::1", "::")]


def wide(address: Address) -> bytes:
    return bytes(10) + b"\xff\xff" + address.packed if address.version == 4 else address.packed


def mac_of(peer: int) -> bytes:
    return bytes([2, 0, 0, 0, 0, peer])


def record(subnet: Network, peer: int = 0, slot: int | None = None, *, remove: bool = False) -> bytes:
    length = subnet.prefixlen + (96 if subnet.version == 4 else 0)
    slot = peer if slot is None else slot
    return RECORD.pack(wide(subnet.network_address), wide(PEERS[peer % 6]), slot, 0, length, remove, mac_of(peer % 6))


def answer(subnet: Network, peer: int) -> tuple[bytes, int, bytes, int, bytes]:
    length = subnet.prefixlen + (96 if subnet.version == 4 else 0)
    return wide(subnet.network_address), length, wide(PEERS[peer]), peer, mac_of(peer)


def naive_lookup(routes: dict[Network, int], destination: Address) -> tuple[bytes, int, bytes, int, bytes] | None:
    covering = [n for n in routes if destination in n]
    if not covering:
        return None
    best = max(covering, key=lambda n: n.prefixlen)
    return answer(best, routes[best])


def shifted(address: Address, by: int) -> Address:
    return type(address)((int(address) + by) % 2**address.max_prefixlen)


def test_change_record_is_the_one_that_the_datapath_packs() -> None:
    assert RECORD.size == CHANGE_BYTES


def test_empty_table_misses() -> None:
    for address in (bytes(4), b"\xff" * 4, bytes(16), b"\xff" * 16):
        assert Fib().lookup(address) is None
    assert Fib().sources(bytes(16)) == []


def test_what_is_no_record_and_no_address_is_refused() -> None:
    with pytest.raises(ValueError, match="whole number"):
        Fib().updated(b"\0" * (CHANGE_BYTES - 1))
    with pytest.raises(ValueError, match="4 bytes or 16"):
        Fib().lookup(bytes(6))
    with pytest.raises(ValueError, match="16 bytes"):
        Fib().sources(bytes(4))


@settings(max_examples=cases(500), deadline=None)
@given(
    steps=st.lists(st.lists(st.tuples(prefixes, st.integers(0, 5), st.booleans()), max_size=16), max_size=5),
    probes=st.lists(
        st.one_of(
            st.builds(IPv4Address, st.integers(0, 2**32 - 1)),
            st.builds(IPv6Address, st.integers(0, 2**128 - 1)),
        ),
        max_size=20,
    ),
    edges=st.lists(near, max_size=20),
)
def test_updates_and_lookups_equal_a_dictionary(
    steps: list[list[tuple[Network, int, bool]]], probes: list[Address], edges: list[tuple[Network, int]]
) -> None:
    fib, routes = Fib(), dict[Network, int]()
    for step in steps:
        changes = {}
        for subnet, peer, remove in step:
            changes[subnet] = record(subnet, peer, remove=remove)
            if remove:
                routes.pop(subnet, None)
            else:
                routes[subnet] = peer
        fib = fib.updated(b"".join(changes.values()))
    assert len(fib) == len(routes)
    probes += [shifted(n.broadcast_address, by) for n, by in edges]
    ends = [end for n in routes for end in (n.network_address, n.broadcast_address)]
    probes += [shifted(end, by) for end in ends for by in (-1, 0, 1)]
    for destination in probes:
        assert fib.lookup(destination.packed) == naive_lookup(routes, destination)
    for peer, address in enumerate(PEERS):
        held = {answer(n, p) for n, p in routes.items() if p == peer}
        assert set(fib.sources(wide(address))) == held


@pytest.mark.parametrize("version", [4, 6])
def test_ten_thousand_leases_each_find_their_own(version: int) -> None:
    def subnet(i: int) -> Network:
        if version == 4:
            return IPv4Network((0x0A000000 + (i << 8), 24))
        return IPv6Network(((0xFD << 120) + (i << 64), 64))

    fib = Fib().updated(b"".join(record(subnet(i), slot=i) for i in range(10_000)))
    for i in range(10_000):
        found = fib.lookup((subnet(i).network_address + i % 256).packed)
        assert found is not None
        assert (found[0], found[3]) == (wide(subnet(i).network_address), i)
    assert len(fib.sources(wide(PEERS[0]))) == 10_000
    assert fib.lookup(subnet(10_000).network_address.packed) is None
    assert fib.lookup((subnet(0).network_address - 1).packed) is None


@settings(max_examples=cases(50), deadline=None)
@given(st.lists(st.tuples(v6_prefixes, st.integers(0, 5)), min_size=100, max_size=300))
def test_many_scattered_prefixes_are_all_found(entries: list[tuple[IPv6Network, int]]) -> None:
    """Whatever their stretch looks like: the buckets of a table divide it evenly."""
    routes: dict[Network, int] = dict(entries)
    fib = Fib().updated(b"".join(record(subnet, peer) for subnet, peer in routes.items()))
    for subnet in routes:
        for end in (subnet.network_address, subnet.broadcast_address):
            for by in (-1, 0, 1):
                destination = shifted(end, by)
                assert fib.lookup(destination.packed) == naive_lookup(routes, destination)


def test_mixed_prefixes_keep_to_16_bytes_each() -> None:
    """What a lookup reads, beside the routes themselves; bench/micro.py has a million of them."""
    generator = random.Random(1)
    subnets = set[tuple[int, int]]()
    while len(subnets) < 200_000:
        length = generator.choice((16, 20, 24, 24, 24, 28, 32))
        subnets.add((generator.getrandbits(length) << (32 - length), length))
    changes = (
        RECORD.pack(bytes(10) + b"\xff\xff" + base.to_bytes(4), wide(PEERS[0]), slot, 0, 96 + length, False, bytes(6))
        for slot, (base, length) in enumerate(subnets)
    )
    narrow, _ = Fib(b"".join(changes)).lookup_bytes
    assert narrow <= 16 * len(subnets)


def test_a_node_holds_subnets_of_both_families() -> None:
    v4, v6 = IPv4Network("10.1.0.0/24"), IPv6Network("fd00:1::/64")
    fib = Fib(record(v4, 1) + record(v6, 1))
    assert {entry[0] for entry in fib.sources(wide(PEERS[1]))} == {wide(v4[0]), wide(v6[0])}
    assert fib.lookup(IPv6Address("::ffff:10.1.0.1").packed) is None, "an IPv4 route is none for its mapped twin"


def test_an_old_table_is_not_changed_by_its_update() -> None:
    subnet = IPv4Network("10.1.0.0/24")
    old = Fib().updated(record(subnet, 3))
    new = old.updated(record(subnet, remove=True))
    assert old.lookup(subnet.network_address.packed) is not None
    assert new.lookup(subnet.network_address.packed) is None
