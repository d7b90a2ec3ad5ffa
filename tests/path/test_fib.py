"""The forwarding table against a list that is searched by hand."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane._fib import CHANGE_BYTES, Fib

RECORD = struct.Struct("=6I")

# a small corner of the address space makes prefixes nest, touch and repeat
prefixes = st.builds(
    lambda base, length: IPv4Network((base & (0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF, length)),
    st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0x0A000000, 0x0A0000FF, 0x0A00FFFF, 0xFFFFFFFF, 0])),
    st.integers(0, 32),
)
near = st.tuples(prefixes, st.integers(-2, 2))


def record(subnet: IPv4Network, address: int = 0, slot: int = 0, *, remove: bool = False) -> bytes:
    return RECORD.pack(int(subnet.network_address), int(subnet.netmask), address, slot, 0, remove)


def naive_lookup(routes: dict[IPv4Network, int], destination: int) -> tuple[int, int, int, int] | None:
    covering = [n for n in routes if IPv4Address(destination) in n]
    if not covering:
        return None
    best = max(covering, key=lambda n: n.prefixlen)
    return int(best.network_address), int(best.netmask), routes[best], routes[best] & 0xFF


def test_change_record_is_the_one_that_the_datapath_packs() -> None:
    assert RECORD.size == CHANGE_BYTES


def test_empty_table_misses() -> None:
    assert Fib().lookup(0) is None
    assert Fib().lookup(2**32 - 1) is None
    assert Fib().sources(0) == []


def test_partial_record_is_refused() -> None:
    with pytest.raises(ValueError, match="whole number"):
        Fib().updated(b"\0" * (CHANGE_BYTES - 1))


@settings(max_examples=300)
@given(
    steps=st.lists(st.lists(st.tuples(prefixes, st.integers(1, 6), st.booleans()), max_size=12), max_size=5),
    probes=st.lists(st.integers(0, 2**32 - 1), max_size=20),
    edges=st.lists(near, max_size=20),
)
def test_updates_and_lookups_equal_a_dictionary(
    steps: list[list[tuple[IPv4Network, int, bool]]], probes: list[int], edges: list[tuple[IPv4Network, int]]
) -> None:
    fib, routes = Fib(), dict[IPv4Network, int]()
    for step in steps:
        changes = {}
        for subnet, address, remove in step:
            changes[subnet] = record(subnet, address, address & 0xFF, remove=remove)
            if remove:
                routes.pop(subnet, None)
            else:
                routes[subnet] = address
        fib = fib.updated(b"".join(changes.values()))
    assert len(fib) == len(routes)
    probes += [(int(n.broadcast_address) + d) % 2**32 for n, d in edges]
    ends = [int(end) for n in routes for end in (n.network_address, n.broadcast_address)]
    probes += [(end + d) % 2**32 for end in ends for d in (-1, 0, 1)]
    for destination in probes:
        assert fib.lookup(destination) == naive_lookup(routes, destination)
    for address in range(8):
        held = {(int(n.network_address), int(n.netmask), a, a & 0xFF) for n, a in routes.items() if a == address}
        assert set(fib.sources(address)) == held


def test_ten_thousand_leases_each_find_their_own() -> None:
    base = int(IPv4Address("10.0.0.0"))
    fib = Fib().updated(b"".join(record(IPv4Network((base + (i << 8), 24)), i + 1, i) for i in range(10_000)))
    for i in range(10_000):
        found = fib.lookup(base + (i << 8) + i % 256)
        assert found == (base + (i << 8), 0xFFFFFF00, i + 1, i)
        assert fib.sources(i + 1) == [found]
    assert fib.lookup(base + (10_000 << 8)) is None


def test_an_old_table_is_not_changed_by_its_update() -> None:
    subnet = IPv4Network("10.1.0.0/24")
    old = Fib().updated(record(subnet, 7))
    new = old.updated(record(subnet, remove=True))
    assert old.lookup(int(subnet.network_address)) is not None
    assert new.lookup(int(subnet.network_address)) is None
