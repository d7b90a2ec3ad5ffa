"""Owns how the other nodes are called, and which of them a word means.

Free of IO: leases and the text of /etc/hosts are arguments; no name server is asked, for that would be traffic of our
own. Invariant: a word means one node with all of its outer addresses, or an address that no node has, or an error that
lists who there is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from dataplane.errors import ConfigError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MOST_LISTED = 8


@dataclass(frozen=True, slots=True)
class Peer:
    """A node that holds a lease: its subnets, and the outer addresses at which it is reached."""

    subnets: tuple[Network, ...]
    addresses: tuple[Address, ...]

    def holds(self, network: Network) -> bool:
        """Whether a network lies in one of its subnets, or is one of its addresses."""
        within = any(
            each.version == network.version and each.prefixlen <= network.prefixlen and network[0] in each
            for each in self.subnets
        )
        return within or (network.num_addresses == 1 and network[0] in self.addresses)


class Peers:
    """All other nodes, as operators call them. `names`: the first that the hosts file gives an outer address."""

    def __init__(self, peers: Iterable[Peer], hosts: str = "", own: Iterable[Address] = ()) -> None:
        """`hosts`: the text of /etc/hosts. `own`: outer addresses of this node, which get their names too."""
        self._peers = tuple(peers)
        self.names: dict[Address, str] = {}
        self._called: dict[str, set[Address]] = {}
        wanted = {*own, *(address for peer in self._peers for address in peer.addresses)}
        for line in hosts.splitlines():
            text, *names = line.partition("#")[0].split() or [""]
            try:
                address = ip_address(text)
            except ValueError:
                continue
            if names and address in wanted:
                self.names.setdefault(address, names[0])
                for name in names:
                    self._called.setdefault(name.lower(), set()).add(address)

    def find(self, word: str) -> list[Address]:
        """The outer addresses of a node by its name, its public IP, its lease's subnet, or an address in that. An
        address of nobody stands for itself: who holds no lease may send all the same. Raises ConfigError."""
        try:
            network = ip_network(word)
        except ValueError:
            called = self._called.get(word.lower(), set())
            found = [peer for peer in self._peers if called.intersection(peer.addresses)]
        else:
            found = [peer for peer in self._peers if peer.holds(network)]
            if not found and network.num_addresses == 1:
                return [network[0]]
        if not found:
            raise ConfigError(f"no other node is called {word!r}{self._near(word)}; {self._known()}")
        return list(dict.fromkeys(address for peer in found for address in peer.addresses))

    def _near(self, word: str) -> str:
        subnets = [str(subnet) for peer in self._peers for subnet in peer.subnets]
        near = difflib.get_close_matches(word.lower(), [*self._called, *subnets], n=1, cutoff=0.8)
        return f" (did you mean `{near[0]}`?)" if near else ""

    def _known(self) -> str:
        if not self._peers:
            return "this node knows no other yet"
        listed = ", ".join(map(self._description, self._peers[:MOST_LISTED]))
        more = len(self._peers) - MOST_LISTED
        return f"this node knows {listed}{f', and {more} more: see `loden status`' if more > 0 else ''}"

    def _description(self, peer: Peer) -> str:
        name = next((self.names[address] for address in peer.addresses if address in self.names), "")
        words = [*map(str, peer.addresses), *map(str, peer.subnets)]
        return f"{name or words.pop(0)} ({', '.join(words)})"
