"""Owns the choice of the interface, addresses and MTU that face the underlay, by flannel's rules (facts 1.6).

Free of: IO; what stands on the node is an argument. Invariant: the result depends on the arguments alone; each step is
told on the logger in flannel's words, since guides quote them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address

from dataplane.backend.base import Underlay
from dataplane.errors import ConfigError
from dataplane.kernel.facts import Address, Link, Route
from dataplane.patterns import compile_go

log = logging.getLogger(__name__)

NO_MATCH = "Failed to find interface to use that matches the interfaces and/or regexes provided"
NO_INTERFACE = "Failed to find any valid interface to use"

_Addr = IPv4Address | IPv6Address

NOWHERE = IPv4Address("0.0.0.0")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the flags and the net-conf say. `names` (of `-iface`: names or addresses) come before `patterns`, and these
    before `can_reach`; within one list the first hit wins."""

    names: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    can_reach: IPv4Address | IPv6Address | None = None
    public_ip: IPv4Address | None = None
    public_ipv6: IPv6Address | None = None
    v4: bool = True
    v6: bool = False

    @property
    def has_flags(self) -> bool:
        """Whether a flag speaks of the interface."""
        return bool(self.names or self.patterns or self.can_reach)

    @property
    def families(self) -> tuple[int, ...]:
        return (4,) * self.v4 + (6,) * self.v6


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What stands on the node, in the kernel's order. `default_routes`: the preferred first, each family by itself.
    `reach`: the route to `Wanted.can_reach`, None where there is no such wish or no way."""

    links: Sequence[Link]
    addresses: Sequence[Address]
    default_routes: Sequence[Route] = ()
    default_routes_v6: Sequence[Route] = ()
    reach: Route | None = None


def choose(wanted: Wanted, around: Surroundings, *, level: int = logging.INFO) -> Underlay:
    """The underlay of this node. Without any flag for the interface: the one that has the published address, else that
    of the first default route. The steps are told at `level`. Raises ConfigError, which lists what was looked at."""
    node = _Node(wanted, around, level)
    misses = []
    for word, find in node.tries():
        try:
            return node.published(find())
        except _NoHitError as miss:
            if word:
                log.log(level, "Could not find valid interface matching %s: %s", word, miss)
            misses.append(str(miss))
    if wanted.has_flags:
        raise ConfigError(f"{NO_MATCH}: {'; '.join(misses)}; {node}")
    raise ConfigError(f"{NO_INTERFACE}: {misses[-1]}; name one with -iface; {node}")


def stay(current: Underlay, chosen: Underlay, around: Surroundings) -> Underlay:
    """`chosen`, but with the addresses that we have, as long as they are good on the interface that was chosen: a
    better one that comes along is no reason to move."""
    if chosen.name != current.name:
        return chosen
    good = {a.interface.ip for a in around.addresses if a.index == chosen.index and not a.deprecated}
    if current.address in good and current.address != chosen.address:
        chosen = replace(chosen, address=current.address, public_ip=current.public_ip)
    if current.address_v6 in good and current.address_v6 != chosen.address_v6:
        chosen = replace(chosen, address_v6=current.address_v6, public_ipv6=current.public_ipv6)
    return chosen


class _NoHitError(Exception):
    """One try found nothing; the text says why."""


@dataclass(frozen=True, slots=True)
class _Hit:
    """An interface, and what of its addresses is settled already."""

    link: Link
    v4: IPv4Address | None = None
    v6: IPv6Address | None = None

    @classmethod
    def of(cls, link: Link, address: _Addr) -> _Hit:
        return cls(link, v4=address) if isinstance(address, IPv4Address) else cls(link, v6=address)


class _Node:
    """What stands on this node, and how one looks an interface up in it. Its text is the list of all interfaces."""

    def __init__(self, wanted: Wanted, around: Surroundings, level: int) -> None:
        self._wanted = wanted
        self._around = around
        self._links = {link.index: link for link in around.links}
        self._level = level

    def tries(self) -> Iterator[tuple[str, Callable[[], _Hit]]]:
        """In flannel's order; each with the word that the flag gave."""
        wanted = self._wanted
        for name in wanted.names:
            yield name, partial(self._of_name, name)
        for pattern in wanted.patterns:
            yield pattern, partial(self._of_pattern, pattern)
        if wanted.can_reach is not None:
            yield str(wanted.can_reach), self._of_reach
        if not wanted.has_flags:
            for address in (wanted.public_ip, wanted.public_ipv6):
                if address is not None and address.version in wanted.families:
                    yield "", partial(self._of_public_ip, address)
            yield "", self._of_default_route

    def published(self, hit: _Hit) -> Underlay:
        """The hit with an address of every family that is on."""
        link, wanted = hit.link, self._wanted
        v4 = (hit.v4 or self._pinned_v4(link) or self._best(link, 4)) if wanted.v4 else None
        v6 = (hit.v6 or self._pinned_v6(link) or self._best(link, 6)) if wanted.v6 else None
        if link.mtu == 0:
            raise _NoHitError(f"failed to determine MTU for {v4 or v6} interface")
        if v4 is not None:
            self._say("Using interface with name %s and address %s", link.name, v4)
        if v6 is not None:
            self._say("Using interface with name %s and v6 address %s", link.name, v6)
        public_v4 = None if v4 is None else self._public(wanted.public_ip or v4, v4, "external address")
        public_v6 = None if v6 is None else self._public(wanted.public_ipv6 or v6, v6, "external v6 address")
        return Underlay(
            link.name,
            link.index,
            IPv4Address(v4 or NOWHERE),
            IPv4Address(public_v4 or NOWHERE),
            link.mtu,
            None if v6 is None else IPv6Address(v6),
            None if public_v6 is None else IPv6Address(public_v6),
        )

    def _public(self, public: _Addr, own: _Addr, word: str) -> _Addr:
        if public in (self._wanted.public_ip, self._wanted.public_ipv6):
            self._say("Using %s as external address", public)
        else:
            self._say("Defaulting %s to interface address (%s)", word, own)
        return public

    def _of_name(self, name: str) -> _Hit:
        """By what one `-iface` says: an address that is configured somewhere, or a name."""
        wanted = _as_address(name)
        if wanted is None:
            for link in self._links.values():
                if link.name == name:
                    return _Hit(link)
            raise _NoHitError(f"error looking up interface {name}: no such network interface")
        self._say("Searching for interface using %s", wanted)
        word = "interface" if wanted.version == 4 else "v6 interface"
        if wanted.version not in self._wanted.families:
            raise _NoHitError(f"error looking up {word} {name}: the net-conf does not enable IPv{wanted.version}")
        owner = self._owner(wanted)
        if owner is None:
            raise _NoHitError(f"error looking up {word} {name}: No interface with given IP found")
        return _Hit.of(owner, wanted)

    def _of_pattern(self, pattern: str) -> _Hit:
        """An address that matches before a name; with two families, an address of each on one interface."""
        expression = compile_go(pattern)
        for link in self._links.values():
            matching = [
                next((ip for ip in self._usable(link, version) if expression.search(str(ip))), None)
                for version in self._wanted.families
            ]
            if matching and all(matching):
                hits = {ip.version: ip for ip in matching if ip is not None}
                return _Hit(link, *(hits.get(version) for version in (4, 6)))  # type: ignore[arg-type]  # by version
        for link in self._links.values():
            if expression.search(link.name):
                return _Hit(link)
        raise _NoHitError(f"Could not match pattern {pattern} to any of the available network interfaces")

    def _of_reach(self) -> _Hit:
        target, route = self._wanted.can_reach, self._around.reach
        self._say("Determining interface to use based on given ifcanreach: %s", target)
        reached = None if route is None else self._links.get(route.device_index)
        if route is None or reached is None:
            raise _NoHitError(f"failed to get ifcanreach based interface: there is no route to {target}")
        if route.source is None or route.source.version not in self._wanted.families:
            return _Hit(reached)
        return _Hit.of(reached, route.source)

    def _of_public_ip(self, address: _Addr) -> _Hit:
        """The interface that has the published address itself; behind NAT no interface has it."""
        if (link := self._owner(address)) is None:
            raise _NoHitError(f"no interface has {address}")
        return _Hit.of(link, address)

    def _of_default_route(self) -> _Hit:
        """With two families both default routes must leave by one interface."""
        self._say("Determining IP address of default interface")
        found = []
        for version in self._wanted.families:
            word = "default interface" if version == 4 else "default v6 interface"
            routes = self._around.default_routes if version == 4 else self._around.default_routes_v6
            if not routes:
                raise _NoHitError(f"failed to get {word}: Unable to find default route")
            if routes[0].device_index not in self._links:
                raise _NoHitError(f"failed to get {word}: Found default route but could not determine interface")
            found.append(self._links[routes[0].device_index])
        if found[0] != found[-1]:
            raise _NoHitError(
                f"v6 default route interface {found[-1].name} must be the same with v4 default route interface "
                f"{found[0].name}"
            )
        return _Hit(found[0])

    def _pinned_v4(self, link: Link) -> IPv4Address | None:
        """-public-ip, where this interface has it: peers send to it, and take only what comes from it."""
        wanted = self._wanted.public_ip
        return wanted if wanted is not None and self._owner(wanted) == link else None

    def _pinned_v6(self, link: Link) -> IPv6Address | None:
        """-public-ipv6, where an interface has it: which must be this one."""
        wanted = self._wanted.public_ipv6
        owner = None if wanted is None else self._owner(wanted)
        if owner is not None and owner != link:
            raise _NoHitError(f"v6 interface {owner.name} must be the same with v4 interface {link.name}")
        return wanted if owner is not None else None

    def _owner(self, wanted: _Addr) -> Link | None:
        for address in self._around.addresses:
            if address.interface.ip == wanted and address.index in self._links:
                return self._links[address.index]
        return None

    def _best(self, link: Link, version: int) -> _Addr:
        usable = self._usable(link, version)
        if not usable:
            raise _NoHitError(f"failed to find IPv{version} address for interface {link.name}")
        return usable[0]

    def _usable(self, link: Link, version: int) -> list[_Addr]:
        """The interface's addresses in order of preference: global, then permanent, then primary (v4) or lasting (v6)
        ones first."""
        own = [a for a in self._around.addresses if a.index == link.index and a.interface.version == version]
        usable = [a for a in own if not a.deprecated and _is_unicast(a.interface.ip)]
        usable.sort(key=lambda a: (a.interface.ip.is_link_local, not a.permanent, a.secondary))
        return [a.interface.ip for a in usable]

    def _say(self, text: str, *details: object) -> None:
        log.log(self._level, text, *details, stacklevel=2)

    def __str__(self) -> str:
        listed = []
        for link in self._links.values():
            own = [str(a.interface.ip) for a in self._around.addresses if a.index == link.index and self._counts(a)]
            listed.append(f"{link.name} ({', '.join(own) or 'no address'})")
        return f"this node has {', '.join(listed) or 'no interfaces'}"

    def _counts(self, address: Address) -> bool:
        return address.interface.version in self._wanted.families


def _is_unicast(address: _Addr) -> bool:
    """What Go counts as global or link-local unicast: loopback, multicast, broadcast and 0.0.0.0 are not."""
    return not (
        address.is_loopback
        or address.is_multicast
        or address.is_unspecified
        or address == IPv4Address("255.255.255.255")
    )


def _as_address(text: str) -> _Addr | None:
    try:
        return ip_address(text)
    except ValueError:
        return None
