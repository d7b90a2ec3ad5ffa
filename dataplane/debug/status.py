"""Owns the status document: everything that this node knows of itself, as plain JSON values.

Free of IO. Invariant: the same facts always stand under the same names, which docs/operations.md lists.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dataplane.backend.base import BackendStatus, PeerStatus
from dataplane.lease.keeper import LeaseKeeper
from dataplane.lease.model import NO_IPV4


def lease_document(keeper: LeaseKeeper) -> dict[str, Any]:
    """Our own lease (null before there is one), what is wrong with it, and the entries that are not obeyed."""
    own = keeper.own
    return {
        "lease": None
        if own is None
        else {
            "subnet": None if own.key.subnet == NO_IPV4 else str(own.key.subnet),
            "public_ip": str(own.attrs.public_ip),
            "subnet_v6": _text(own.key.subnet_v6),
            "public_ipv6": _text(own.attrs.public_ipv6),
            "reserved": own.reserved,
            "fenced": keeper.fenced,
        },
        "store_error": keeper.store_error,
        "rejected": dict(keeper.rejected),
    }


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def backend_document(status: BackendStatus) -> dict[str, Any]:
    """What a backend tells of itself, in JSON's types."""
    return {
        "backend": status.type,
        "dataplane": status.dataplane,
        "device": status.device,
        "mtu": status.mtu,
        "peers": [_peer_document(peer) for peer in status.peers],
        "drops": {reason.name: count for reason, count in status.drops.items()},
        "unknown_sources": {str(address): count for address, count in status.unknown_sources.items()},
        "capabilities": {capability.word: state for capability, state in status.capabilities.items()},
        "ignored": {str(subnet): reason for subnet, reason in status.ignored.items()},
        "repairs": status.repairs,
        "pumps": status.pumps,
        "queues": dataclasses.asdict(status.queues) if status.queues else None,
    }


def _peer_document(peer: PeerStatus) -> dict[str, Any]:
    return {
        "subnet": str(peer.subnet),
        "public_ip": str(peer.public_ip),
        "tx_packets": peer.tx_packets,
        "tx_bytes": peer.tx_bytes,
        "rx_packets": peer.rx_packets,
        "rx_bytes": peer.rx_bytes,
        "idle": peer.idle,
        "counted": peer.counted,
        "direct": peer.direct,
    }
