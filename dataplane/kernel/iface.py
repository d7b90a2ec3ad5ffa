"""Owns the choice of the interface, address and MTU that face the underlay, by flannel's rules (facts 1.6).

Free of: IO; what stands on the node is an argument. Invariant: the result depends on the arguments alone; each step is
told on the logger in flannel's words, since guides quote them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, ip_address

from dataplane.backend.base import Underlay
from dataplane.errors import ConfigError
from dataplane.kernel.facts import Address, Link, Route

log = logging.getLogger(__name__)

NO_MATCH = "Failed to find interface to use that matches the interfaces and/or regexes provided"
NO_INTERFACE = "Failed to find any valid interface to use"


def choose(
    links: Sequence[Link],
    addresses: Sequence[Address],
    default_routes: Sequence[Route],
    *,
    names: Sequence[str],
    public_ip: IPv4Address | None,
) -> Underlay:
    """The underlay of this node.

    `names`: what `-iface` gave, interface names or IPv4 addresses; the first that is there wins. Without any, the
    interface that has `public_ip`, else that of the first default route. `addresses` stand in the kernel's order.

    Raises ConfigError, which lists what was looked at.
    """
    node = _Node(links, addresses)
    if not names:
        try:
            link, address = node.of_public_ip(public_ip) or node.of_default_route(default_routes)
        except _NoHitError as miss:
            raise ConfigError(f"{NO_INTERFACE}: {miss}; name one with -iface; {node}") from None
        return _published(link, address, public_ip)
    misses = []
    for name in names:
        try:
            link, address = node.of_name(name)
        except _NoHitError as miss:
            log.info("Could not find valid interface matching %s: %s", name, miss)
            misses.append(str(miss))
        else:
            return _published(link, address, public_ip)
    raise ConfigError(f"{NO_MATCH}: {'; '.join(misses)}; {node}")


class _NoHitError(Exception):
    """One try found nothing; the text says why."""


class _Node:
    """What stands on this node, and how one looks an interface up in it. Its text is the list of all interfaces."""

    def __init__(self, links: Sequence[Link], addresses: Sequence[Address]) -> None:
        self._links = {link.index: link for link in links}
        self._addresses = addresses

    def of_name(self, name: str) -> tuple[Link, IPv4Address]:
        """By what one `-iface` says: an address that is configured somewhere, or a name."""
        wanted = _as_address(name)
        if isinstance(wanted, IPv6Address):
            raise _NoHitError(f"error looking up interface {name}: only IPv4 addresses are carried yet")
        if wanted is not None:
            log.info("Searching for interface using %s", wanted)
            if (link := self._owner(wanted)) is None:
                raise _NoHitError(f"error looking up interface {name}: No interface with given IP found")
            return _with_mtu(link, wanted)
        for link in self._links.values():
            if link.name == name:
                return self._with_address(link)
        raise _NoHitError(f"error looking up interface {name}: no such network interface")

    def of_public_ip(self, public_ip: IPv4Address | None) -> tuple[Link, IPv4Address] | None:
        """The interface that has the published address itself; None behind NAT, where no interface has it."""
        link = None if public_ip is None else self._owner(public_ip)
        return None if public_ip is None or link is None else _with_mtu(link, public_ip)

    def of_default_route(self, default_routes: Sequence[Route]) -> tuple[Link, IPv4Address]:
        log.info("Determining IP address of default interface")
        if not default_routes:
            raise _NoHitError("failed to get default interface: Unable to find default route")
        link = self._links.get(default_routes[0].device_index)
        if link is None:
            raise _NoHitError("failed to get default interface: Found default route but could not determine interface")
        return self._with_address(link)

    def _owner(self, wanted: IPv4Address) -> Link | None:
        for address in self._addresses:
            if address.interface.ip == wanted and address.index in self._links:
                return self._links[address.index]
        return None

    def _with_address(self, link: Link) -> tuple[Link, IPv4Address]:
        usable = self._usable(link)
        if not usable:
            raise _NoHitError(f"failed to find IPv4 address for interface {link.name}")
        return _with_mtu(link, usable[0])

    def _usable(self, link: Link) -> list[IPv4Address]:
        """The interface's addresses in order of preference: global, permanent and primary ones first."""
        own = [a for a in self._addresses if a.index == link.index and isinstance(a.interface, IPv4Interface)]
        usable = [a for a in own if not a.deprecated and _is_unicast(IPv4Address(a.interface.ip))]
        usable.sort(key=lambda a: (a.interface.ip.is_link_local, not a.permanent, a.secondary))
        return [IPv4Address(a.interface.ip) for a in usable]

    def __str__(self) -> str:
        listed = []
        for link in self._links.values():
            own = [str(a.interface.ip) for a in self._addresses if a.index == link.index and a.interface.version == 4]
            listed.append(f"{link.name} ({', '.join(own) or 'no IPv4 address'})")
        return f"this node has {', '.join(listed) or 'no interfaces'}"


def _published(link: Link, address: IPv4Address, public_ip: IPv4Address | None) -> Underlay:
    log.info("Using interface with name %s and address %s", link.name, address)
    if public_ip is None:
        log.info("Defaulting external address to interface address (%s)", address)
    else:
        log.info("Using %s as external address", public_ip)
    return Underlay(link.name, link.index, address, public_ip or address, link.mtu)


def _with_mtu(link: Link, address: IPv4Address) -> tuple[Link, IPv4Address]:
    if link.mtu == 0:
        raise _NoHitError(f"failed to determine MTU for {address} interface")
    return link, address


def _is_unicast(address: IPv4Address) -> bool:
    """What Go counts as global or link-local unicast: loopback, multicast, broadcast and 0.0.0.0 are not."""
    return not (
        address.is_loopback
        or address.is_multicast
        or address.is_unspecified
        or address == IPv4Address("255.255.255.255")
    )


def _as_address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None
