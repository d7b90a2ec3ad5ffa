"""Owns the question which of many subnets overlap a given one.

Free of: leases, IO. Invariant: what was added and not removed is found by every subnet that shares an address with it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network

Subnets = tuple[IPv4Network | IPv6Network, ...]


class OverlapIndex:
    """Names with their subnets, found by the subnets that they overlap.

    Two blocks overlap only if one contains the other: the containing ones are found by one look-up per prefix length in
    use, the contained ones are neighbours in order of address.
    """

    def __init__(self, items: Mapping[str, Subnets]) -> None:
        self._at: dict[tuple[int, int, int], set[str]] = {}
        self._lengths: dict[int, dict[int, int]] = {4: {}, 6: {}}
        self._order: dict[int, list[tuple[int, str]]] = {4: [], 6: []}
        for text, subnets in items.items():
            for block in _blocks(subnets):
                self._count(block, text)
                self._order[block[0]].append((block[2], text))
        for order in self._order.values():
            order.sort()

    def _count(self, block: tuple[int, int, int], text: str) -> None:
        self._at.setdefault(block, set()).add(text)
        lengths = self._lengths[block[0]]
        lengths[block[1]] = lengths.get(block[1], 0) + 1

    def add(self, text: str, subnets: Subnets) -> None:
        for block in _blocks(subnets):
            self._count(block, text)
            insort(self._order[block[0]], (block[2], text))

    def remove(self, text: str, subnets: Subnets) -> None:
        for block in _blocks(subnets):
            version, length, first = block
            self._at[block].discard(text)
            if not self._at[block]:
                del self._at[block]
            self._lengths[version][length] -= 1
            if not self._lengths[version][length]:
                del self._lengths[version][length]
            order = self._order[version]
            del order[bisect_left(order, (first, text))]

    def overlapping(self, subnets: Subnets) -> set[str]:
        """The names whose subnets share an address with one of these."""
        found: set[str] = set()
        for version, length, first in _blocks(subnets):
            bits = 32 if version == 4 else 128
            for wider in self._lengths[version]:
                if wider <= length:
                    found |= self._at.get((version, wider, first >> (bits - wider) << (bits - wider)), set())
            order = self._order[version]
            start = bisect_left(order, (first, ""))
            end = bisect_right(order, (first + (1 << (bits - length)), ""), lo=start)
            found.update(text for _, text in order[start:end])
        return found


def _blocks(subnets: Subnets) -> Iterator[tuple[int, int, int]]:
    """(IP version, prefix length, first address) of each."""
    for subnet in subnets:
        yield subnet.version, subnet.prefixlen, int(subnet.network_address)
