"""Owns the sentences that the log says about leases; those that flannel has too are its own words (facts 1.8).

Free of: IO, clocks, logging. Invariant: what stands before a colon or a bracket in a sentence of flannel's is kept,
since guides and scripts look for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address

from dataplane.lease.model import LeaseEvent, LeaseEventKind, LeaseKey

MOST_EVENT_LINES = 20
"""More events at once than this get one line together."""

_WORDS = {
    LeaseEventKind.ADDED: "Subnet added",
    LeaseEventKind.CHANGED: "Subnet changed",
    LeaseEventKind.REMOVED: "Subnet removed",
}


def event_lines(events: Sequence[LeaseEvent]) -> Iterator[str]:
    if len(events) <= MOST_EVENT_LINES:
        for event in events:
            yield f"{_WORDS[event.kind]}: {subnets(event.lease.key)} via {event.lease.attrs.node}"
        return
    for kind, words in _WORDS.items():
        number = sum(event.kind is kind for event in events)
        if number:
            yield f"{words}: {number} of them at once"


def subnets(key: LeaseKey) -> str:
    return ", ".join(map(str, key.subnets))


def families(key: LeaseKey) -> str:
    return f"ip: {key.subnet} ipv6: {key.subnet_v6 or '::/0'}"


def duration(seconds: float) -> str:
    """As Go prints a time.Duration: 22h59m59s."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}h{minute}m{second}s" if hour else f"{minute}m{second}s" if minute else f"{second}s"


def config_missing(store: str) -> str:
    return (
        "flannel config not found in etcd store. Did you create your config using etcdv3 API? "
        f"(looked in {store}; `loden net-conf set FILE` writes one)"
    )


def from_memory(trouble: str, peers: int, left: float | None) -> str:
    expiry = "is a reservation" if left is None else f"runs for another {duration(left)}"
    return (
        f"Beginning without the lease store ({trouble}): forwarding to the {peers} peers that the state file knows; "
        f"our lease {expiry}. Not ready until the store answers"
    )


def wiped(store: str, peers: int, grace: float) -> str:
    return (
        f"The lease store {store} has lost its leases: the {peers} peers are kept for {duration(grace)}, "
        f"so that their nodes can put them back"
    )


def taken(key: str, store: str, holder: str, public_ip: IPv4Address | IPv6Address) -> str:
    return (
        f"Our lease {key} is taken: {store} now names {holder}, not this node ({public_ip}). This node is fenced and "
        f"writes nothing over it. Delete the entry to get it back, or restart this daemon for another subnet"
    )


def twin(key: str, store: str, public_ip: IPv4Address | IPv6Address) -> str:
    return (
        f"Another live daemon has our public IP {public_ip} and writes our lease {key} in {store}. Give each node an "
        f"address of its own (--iface, --public-ip), stop the other daemon, then restart this one"
    )
