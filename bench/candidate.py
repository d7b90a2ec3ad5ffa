"""Owns what a candidate is, and those without a program of their own: the bare underlay and the kernel's VXLAN device.

All but `raw` carry between the same two pods at the same addresses; bridge and pods get the candidate's MTU. Free of:
traffic. Invariant: after `carrying` the nodes have the links, routes and firewall tables that they had before, also
where the candidate came up half-way, and whatever a foreign program has left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from dataplane.bench.ends import Ends, FarLease
from dataplane.bench.stand import NODES, Stand
from dataplane.errors import LodenError


class Candidate(Protocol):
    """A path that can be measured. `ours`: one of Loden's, which a report compares with the others."""

    name: str
    ours: bool

    def up(self, stand: Stand) -> Ends:
        """Bring the path up. Raises LodenError; `down` is called after that too."""

    def down(self, stand: Stand) -> None: ...


@contextmanager
def carrying(candidate: Candidate, stand: Stand) -> Iterator[Ends]:
    """The candidate's path for the length of the block, once its far end has answered."""
    before = {f"n{node}": stand.inventory(f"n{node}") for node in NODES}
    try:
        try:
            ends = candidate.up(stand)
            stand.set_pod_mtu(ends.mtu)
            # The first packets go to address resolution: the warm-up of the path, not a part of what is counted.
            stand.run(ends.source, ["ping", "-q", "-n", "-i", "0.1", "-c", "3", "-W", "2", ends.address])
            yield ends
        except BaseException:
            with suppress(LodenError):  # of two faults the first one tells
                candidate.down(stand)
            raise
        candidate.down(stand)
    finally:
        for member, there in before.items():
            stand.sweep(member, there)


def pod_to_pod(stand: Stand, mtu: int) -> Ends:
    return Ends("n1-p1", "n2-p1", stand.pod_address(2), mtu)


class Raw:
    """The underlay itself, node to node: no pods, no bridge, no tunnel. Nothing can be faster, so it is also the proof
    that the load generator is not what is measured."""

    name = "raw"
    ours = False

    def up(self, stand: Stand) -> Ends:
        return Ends("n1", "n2", str(stand.address(2).ip), stand.underlay_mtu)

    def down(self, stand: Stand) -> None:
        """Nothing was made."""


_DEVICE = "flannel.1"


class KernelVxlan:
    """The kernel's VXLAN device as flannel sets it up; no daemon is in the way."""

    name = "kernel-vxlan"
    ours = False

    def up(self, stand: Stand) -> Ends:
        mtu = stand.underlay_mtu - 50
        for node in NODES:
            peer = NODES[0] + NODES[1] - node
            tunnel = f"id 1 dev eth0 local {stand.address(node).ip} dstport 8472 nolearning"
            own = stand.subnet(node).network_address
            stand.configure(
                f"n{node}",
                [
                    f"link add {_DEVICE} address {_mac(node)} mtu {mtu} type vxlan {tunnel}",
                    f"addr add {own}/32 dev {_DEVICE}",
                    f"link set {_DEVICE} up",
                ],
            )
            _point(stand, node, [FarLease(stand.subnet(peer), stand.address(peer).ip, _mac(peer))])
        return Ends("n1-p1", "n2-p1", stand.pod_address(2), mtu, leases=KernelLeases(stand))

    def down(self, stand: Stand) -> None:
        for node in NODES:
            if _DEVICE in stand.inventory(f"n{node}")["link"]:
                stand.configure(f"n{node}", [f"link del {_DEVICE}"])


class KernelLeases:
    """Far leases in the first node's kernel: for each a neighbour, an FDB entry and a route, as flannel makes them."""

    def __init__(self, stand: Stand) -> None:
        self._stand = stand
        self._there: dict[str, FarLease] = {}

    def put(self, leases: Sequence[FarLease]) -> None:
        changed = [self._there[str(lease.subnet)] for lease in leases if str(lease.subnet) in self._there]
        self._there.update({str(lease.subnet): lease for lease in leases})
        _point(self._stand, 1, leases)
        self._fdb([f"fdb del {lease.mac} dev {_DEVICE} dst {lease.address} self" for lease in changed])

    def rehearse(self, leases: Sequence[FarLease]) -> None:
        """There is no store whose work could be told from the change itself."""

    def clear(self) -> None:
        there = list(self._there.values())
        self._there.clear()
        lines = [f"route del {lease.subnet} dev {_DEVICE}" for lease in there]
        lines += [f"neigh del {lease.subnet.network_address} dev {_DEVICE}" for lease in there]
        self._stand.configure("n1", lines)
        self._fdb([f"fdb del {lease.mac} dev {_DEVICE} dst {lease.address} self" for lease in there])

    def _fdb(self, lines: Sequence[str]) -> None:
        self._stand.run("n1", ["bridge", "-batch", "-"], stdin="\n".join(lines) + "\n")


def _point(stand: Stand, node: int, leases: Sequence[FarLease]) -> None:
    """Give the kernel of a node the way to each lease."""
    entries = [f"fdb replace {lease.mac} dev {_DEVICE} dst {lease.address} self permanent" for lease in leases]
    stand.run(f"n{node}", ["bridge", "-batch", "-"], stdin="\n".join(entries) + "\n")
    lines = []
    for lease in leases:
        gateway = lease.subnet.network_address
        lines.append(f"neigh replace {gateway} lladdr {lease.mac} dev {_DEVICE} nud permanent")
        lines.append(f"route replace {lease.subnet} via {gateway} dev {_DEVICE} onlink")
    stand.configure(f"n{node}", lines)


def _mac(node: int) -> str:
    """Locally administered, as flannel's are; fixed, so that it need not be read back."""
    return f"0e:00:00:00:00:{node:02x}"
