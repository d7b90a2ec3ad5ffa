"""Owns the verdict: what the steps on the way to an address, and the answers to the probes, say together.

Free of IO: the steps are looked at and the probes sent by dataplane.debug.explain. Invariant: the verdict is the first
fault on the way that the probes do not disprove, and it comes with a command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from dataplane.backend.base import BackendStatus, PeerStatus, Underlay
from dataplane.errors import DropReason
from dataplane.kernel.probe import Answer
from dataplane.lease.model import Lease

SMALL = 64
"""Bytes of the smaller inner echo."""

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Node:
    """What the daemon knows; the rest is looked at."""

    own: Lease | None
    fenced: bool
    store: str
    store_error: str | None
    networks: tuple[Network, ...]
    peers: Mapping[str, Lease]
    rejected: Mapping[str, str]
    facing: Underlay
    port: int
    status: BackendStatus


@dataclass(slots=True)
class Step:
    """One thing on the way. `fault`: None where it is as it should be; else the verdict, if nothing before has one."""

    name: str
    text: str
    fault: str | None = None
    command: str = ""


@dataclass(slots=True)
class Probes:
    """Answers to the probes, and how much the counters rose meanwhile."""

    small: Answer
    large: Answer
    public: Answer
    poke: str
    heard: int
    drops: dict[DropReason, int]
    strangers: dict[Address, int]
    udp_errors: dict[str, int]


@dataclass(slots=True)
class Account:
    """All steps, the probes if there were any, and the verdict."""

    address: Address
    steps: list[Step] = field(default_factory=list)
    probes: Probes | None = None
    rules: list[str] = field(default_factory=list)
    """Rules of this node that drop, and name the peer or the port."""
    direct: bool = False
    """Packets go there without encapsulation."""
    verdict: str = ""
    command: str = ""

    def say(self, name: str, text: str, fault: str | None = None, command: str = "") -> None:
        self.steps.append(Step(name, text, fault, command))

    def document(self) -> dict[str, Any]:
        """In JSON's types."""
        steps = [{"step": s.name, "text": s.text, "ok": s.fault is None, "command": s.command} for s in self.steps]
        return {
            "address": str(self.address),
            "steps": steps,
            "probes": None if self.probes is None else _probes_document(self.probes),
            "verdict": self.verdict,
            "command": self.command,
        }


def _probes_document(probes: Probes) -> dict[str, Any]:
    def answer(one: Answer) -> dict[str, Any]:
        return {"sent": one.sent, "received": one.received, "ms": one.ms, "error": one.error}

    return {
        "inner_small": answer(probes.small),
        "inner_mtu": answer(probes.large),
        "public_ip": answer(probes.public),
        "port": probes.poke,
        "heard": probes.heard,
        "drops": {reason.name: count for reason, count in probes.drops.items()},
        "unknown_sources": {str(address): count for address, count in probes.strangers.items()},
        "udp_errors": probes.udp_errors,
    }


PROVABLE = ("device", "underlay", "neighbour", "FDB")
"""Steps whose fault an answer through the overlay disproves."""


def judge(account: Account, node: Node, lease: Lease | None) -> None:
    """Set verdict and command."""
    probes = account.probes
    reached = probes is not None and probes.small.received > 0 and probes.large.received > 0
    faults = [step for step in account.steps if step.fault and not (reached and step.name in PROVABLE)]
    if faults:
        account.verdict, account.command = faults[0].fault or "", faults[0].command
    elif lease is None:
        account.verdict = f"{account.address} is local to this node: nothing of the overlay is in the way"
    elif probes is None:
        account.verdict = f"nothing on this node is in the way to {account.address}; no probe was sent"
    else:
        pattern = _Pattern(account, node, lease, probes)
        account.verdict, account.command = pattern.reached() if reached else pattern.fault()


class _Pattern:
    """What the answers say, where nothing that can be seen on this node is at fault."""

    def __init__(self, account: Account, node: Node, lease: Lease, probes: Probes) -> None:
        self._account, self._node, self._lease, self._probes = account, node, lease, probes
        self._public = public_of(lease, account.address)
        self._rule = f": {account.rules[0]}" if account.rules else ""

    def reached(self) -> tuple[str, str]:
        small, large = self._probes.small, self._probes.large
        received, sent = small.received + large.received, small.sent + large.sent
        if received < sent:
            lost = f"{sent - received} of {sent} echoes were lost"
            return f"loss on the way: {self._account.address} is reached, but {lost}", f"mtr {self._public}"
        return f"{self._account.address} is reached: {self._public} answers inside the overlay, also at the MTU", ""

    def fault(self) -> tuple[str, str]:
        public, port, mtu = self._public, self._node.port, self._node.status.mtu
        if self._probes.small.received:
            return (
                f"MTU too large: {public} answers at {SMALL} bytes but not at {mtu}; something on the way takes less",
                f"ping -M do -s {mtu} {public}   # finds what passes; lower the MTU of {self._node.facing.name} to it",
            )
        found = self._refused_here() or self._came_and_was_dropped() or self._nobody_there()
        if found is not None:
            return found
        own = subnet_of(self._node.own, self._account.address).network_address if self._node.own else ""
        if self._account.direct:
            silent = "" if has_device(self._node) else ", or no pod has been there yet"
            said = f"is up, but nothing comes back from its subnet: a firewall drops it, or a route is missing{silent}"
            return f"pods' packets blocked: {public} {said}{self._rule}", f"loden explain {own}   # on {public}"
        if not self._rule and self._probes.heard:
            said = "is heard meanwhile, but does not answer: our datagrams do not get there, or it drops them"
            return f"one-way loss: {public} {said}", f"loden explain {own}   # on {public}"
        said = f"is up, but nothing passes UDP port {port}: a firewall here, there or between drops it{self._rule}"
        return f"port blocked: {public} {said}", f"nft list ruleset | grep -n {port}   # on both nodes"

    def _refused_here(self) -> tuple[str, str] | None:
        """The kernel of this node did not take the datagrams."""
        probes = self._probes
        if probes.poke in ("silent", "refused", "not sent") and not probes.drops.get(DropReason.SEND_FAILED):
            return None
        if probes.poke == "Operation not permitted" or (self._rule and probes.drops.get(DropReason.SEND_FAILED)):
            said = f"this node's own firewall refuses datagrams to {self._public} port {self._node.port}{self._rule}"
            return f"port blocked: {said}", f"nft -a list ruleset | grep -n {self._node.port}"
        if probes.poke in ("No route to host", "Host is unreachable"):
            return None  # nobody answers for that address: the node is down
        return f"the kernel does not send to {self._public}: {probes.poke}", f"ip route get {self._public}"

    def _came_and_was_dropped(self) -> tuple[str, str] | None:
        """Something came while the probes were out, and did not pass."""
        probes, public = self._probes, self._public
        if probes.udp_errors.get("InCsumErrors"):
            said = "its datagrams have a wrong UDP checksum, and this kernel drops them"
            name = self._node.facing.name
            return f"checksum broken: {public} sends, but {said}", f"ethtool -K {name} tx off   # on that node"
        if stranger := self._stranger():
            said = f"names {public}, but datagrams come from {stranger}, which no lease names"
            subnet = subnet_of(self._lease, self._account.address)
            return (
                f"wrong public IP: the lease of {subnet} {said}",
                f"flanneld -public-ip={stranger} ...   # on that node",
            )
        if probes.drops.get(DropReason.SPOOFED_SOURCE):
            said = f"{public} sends packets whose inner source is not of its subnet, and they are dropped"
            return f"source spoofed: {said}", f"loden capture drop SPOOFED_SOURCE and peer {public}"
        return None

    def _stranger(self) -> Address | None:
        """An outer source without a lease that was heard during the probes; or ever, if there is but one."""
        heard, ever = self._probes.strangers, self._node.status.unknown_sources
        if heard:
            return max(heard, key=lambda address: heard[address])
        return next(iter(ever)) if len(ever) == 1 else None

    def _nobody_there(self) -> tuple[str, str] | None:
        public, port = self._public, self._node.port
        if self._probes.poke == "refused":
            said = f"the node {public} is up, but nothing listens at its UDP port {port}"
            return f"peer down: {said}", f"ssh {public} systemctl status flanneld"
        if self._probes.public.received:
            return None
        idle = idle_of(self._node, self._lease, self._account.address)
        heard = "" if idle is None else f"; it was last heard {idle:.0f} s ago"
        said = f"{public} answers neither inside the overlay nor outside{heard}"
        return f"peer down, or wrong public IP in its lease: {said}", f"ping {public}"


def has_device(node: Node) -> bool:
    """Whether the overlay has a device, with an address of this node inside."""
    return node.status.type not in ("host-gw", "alloc")


def public_of(lease: Lease, address: Address) -> Address:
    """Where the outer packets for an address go: IPv6 over IPv6, but not in udp mode, whose leases name no type."""
    six = lease.attrs.public_ipv6
    if address.version == 6 and six is not None and lease.attrs.backend_type not in ("", "udp"):
        return six
    return lease.attrs.public_ip


def subnet_of(lease: Lease, address: Address) -> Network:
    """The lease's subnet of that family; where it has none, the first."""
    subnets = lease.key.subnets
    return next((subnet for subnet in subnets if subnet.version == address.version), subnets[0])


def status_of(node: Node, lease: Lease, address: Address) -> PeerStatus | None:
    subnet = subnet_of(lease, address)
    return next((peer for peer in node.status.peers if peer.subnet == subnet), None)


def idle_of(node: Node, lease: Lease, address: Address) -> float | None:
    peer = status_of(node, lease, address)
    return None if peer is None else peer.idle
