"""Owns the roads to nodes that are not there: far leases need a host each, and all of them are the second node.

The first node sends to 198.19.0.0/16 by way of the second, which rewrites the destination to its own address before any
socket or device sees it, statelessly, by two rules that also count; what comes out of its tunnel for a far subnet goes
to its pod, which takes every such address for its own. Traffic is one way: an answer would come from a subnet that its
sender does not hold. Free of: how a lease gets into a candidate. Invariant: nothing is left when the block ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network

from dataplane.bench.ends import FAR_ADDRESSES, FAR_SUBNETS
from dataplane.bench.stand import Stand

_TABLE = "loden_far"
_MAC_TABLE = "loden_far_mac"
_ROUTES = 100
_ALL = IPv4Network("198.19.0.0/16")


@contextmanager
def roads(stand: Stand) -> Iterator[None]:
    """The roads to all far nodes for the length of the block."""
    own = stand.address(2).ip
    rules = "\n".join(f"ip daddr {addresses} counter ip daddr set {own}" for addresses in FAR_ADDRESSES)
    chain = f'chain in {{ type filter hook ingress device "eth0" priority 10;\n{rules}\n}}'
    try:
        stand.run("n2", ["nft", "-f", "-"], stdin=f"table netdev {_TABLE} {{\n{chain}\n}}\n")
        for device in kernel_tunnels(stand):
            stand.run("n2", ["nft", "-f", "-"], stdin=_any_mac(device))
        stand.configure("n1", [f"route add {_ALL} via {own}"])
        for subnets in FAR_SUBNETS:
            stand.configure("n2-p1", [f"route add local {subnets} dev lo"])
            # A rule, since daemons have routes of their own to these subnets.
            stand.configure(
                "n2",
                [
                    f"route add {subnets} via {stand.pod_address(2)} dev cni0 table {_ROUTES}",
                    f"rule add not iif cni0 to {subnets} lookup {_ROUTES}",
                ],
            )
        yield
    finally:
        _close(stand)


def kernel_tunnels(stand: Stand) -> list[str]:
    """VXLAN devices of the second node."""
    links = json.loads(stand.run("n2", ["ip", "-j", "-d", "link"]))
    return [link["ifname"] for link in links if link.get("linkinfo", {}).get("info_kind") == "vxlan"]


def _any_mac(device: str) -> str:
    """The far nodes' MACs are not that of the second node's device: without this rule it drops their frames."""
    chain = f'chain in {{ type filter hook ingress device "{device}" priority 0; meta pkttype set host; }}'
    return f"table netdev {_MAC_TABLE} {{\n{chain}\n}}\n"


def _close(stand: Stand) -> None:
    """Each command by itself: the block may have been broken off before some of it was made."""
    for table in (_TABLE, _MAC_TABLE):
        stand.attempt("n2", ["nft", "delete", "table", "netdev", table])
    stand.attempt("n1", ["ip", "route", "del", str(_ALL)])
    stand.attempt("n2", ["ip", "route", "flush", "table", str(_ROUTES)])
    for subnets in FAR_SUBNETS:
        stand.attempt("n2-p1", ["ip", "route", "del", "local", str(subnets), "dev", "lo"])
        stand.attempt("n2", ["ip", "rule", "del", "not", "iif", "cni0", "to", str(subnets), "lookup", str(_ROUTES)])


def arrived(stand: Stand) -> list[int]:
    """Datagrams that have come for the far addresses of each generation since the roads were opened."""
    listing = stand.run("n2", ["nft", "-j", "list", "table", "netdev", _TABLE])
    rules = [item["rule"]["expr"] for item in json.loads(listing)["nftables"] if "rule" in item]
    return [part["counter"]["packets"] for rule in rules for part in rule if "counter" in part]
