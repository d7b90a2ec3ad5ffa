"""Owns the path's routes: which peer each subnet goes to, which slot counts for it, and what is not published yet.

Free of: IO, the engine and its tables; `pending` is what `Fib.updated` makes one of. Invariant: every route has a
counter slot of its own, and a slot is used again only after all pumps have left every table that names it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv6Network

from dataplane.errors import KernelError
from dataplane.path.facts import Address, Network, wide

MAX_ROUTES = 1 << 18
"""Counter slots; memory that no peer uses is never touched."""

_CHANGE = struct.Struct("=16s16sIHBB6s2x")
"""See dataplane._fib.Fib.updated."""

_MAPPED = IPv6Network("::ffff:0:0/96")
"""Where IPv4 lies in the path's tables (RFC 4291 section 2.5.5.2)."""


@dataclass(slots=True)
class Route:
    """A peer's outer address and MAC, the slot that counts for it, and what inner packets may have on its path: 0 for
    as much as ours."""

    address: Address
    slot: int
    mac: bytes
    mtu: int = 0


class Routes:
    """Change them, give what is `pending` to the pumps, say so (`published`), and `free` slots as pumps move on."""

    def __init__(self) -> None:
        self._routes: dict[Network, Route] = {}
        self._pending: dict[Network, bytes] = {}
        self._leaving: list[int] = []  # of routes whose end is not published yet
        self._retired: list[tuple[int, list[int]]] = []  # of routes that tables before that generation name
        self._free: list[int] = []
        self._used = 0

    def __iter__(self) -> Iterator[tuple[Network, Route]]:
        return iter(self._routes.items())

    @property
    def pending(self) -> bytes:
        """Every change since the last `published`, the last one of each subnet only."""
        return b"".join(self._pending.values())

    def set(self, subnet: Network, address: Address, mac: bytes) -> None:
        """What was learnt of the path to a former address is forgotten. Raises KernelError where there is no room for a
        route, or the subnet lies where the path keeps IPv4."""
        if subnet.version == 6 and subnet.subnet_of(_MAPPED):
            raise KernelError(f"no route to {subnet}: IPv6 addresses in {_MAPPED} stand for IPv4 ones")
        route = self._routes.get(subnet)
        if route is None:
            route = self._routes[subnet] = Route(address, self._take_slot(subnet), mac)
        if route.address != address:
            route.address, route.mtu = address, 0
        route.mac = mac
        self._change(subnet, route)

    def set_path_mtu(self, address: Address, mtu: int) -> None:
        """Of all routes to the peer at `address`."""
        for subnet, route in self._routes.items():
            if route.address == address and route.mtu != mtu:
                route.mtu = mtu
                self._change(subnet, route)

    def remove(self, subnet: Network) -> None:
        """A subnet that has no route is no error."""
        route = self._routes.pop(subnet, None)
        if route is not None:
            self._leaving.append(route.slot)
            self._change(subnet, None)

    def published(self, generation: int) -> None:
        """The table of that generation has every change; no later one names the slots of routes that are gone."""
        self._pending.clear()
        if self._leaving:
            self._retired.append((generation, self._leaving))
            self._leaving = []

    def free(self, oldest: int) -> list[int]:
        """No pump works under a generation before `oldest`. The slots that may be used again from now on, once they
        count from zero."""
        freed = [slot for generation, slots in self._retired if generation <= oldest for slot in slots]
        self._retired = [entry for entry in self._retired if entry[0] > oldest]
        self._free += freed
        return freed

    def _take_slot(self, subnet: Network) -> int:
        if self._free:
            return self._free.pop()
        if self._used == MAX_ROUTES:
            raise KernelError(f"no room for a route to {subnet}: the path holds {MAX_ROUTES} routes already")
        self._used += 1
        return self._used - 1

    def _change(self, subnet: Network, route: Route | None) -> None:
        length = subnet.prefixlen + (96 if subnet.version == 4 else 0)
        prefix = wide(subnet.network_address)
        if route is None:
            self._pending[subnet] = _CHANGE.pack(prefix, b"", 0, 0, length, True, b"")
        else:
            there = wide(route.address), route.slot, route.mtu
            self._pending[subnet] = _CHANGE.pack(prefix, *there, length, False, route.mac)
