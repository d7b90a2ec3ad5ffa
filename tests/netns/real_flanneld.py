"""Owns a cluster of the lab whose nodes run a real flanneld and ours by turns: only the program changes, no flag.

The program is the one that LODEN_FLANNELD names; it is no part of this project. Free of: what is tried with it.
Invariant: what differs between the two programs at one node is their first word, and nothing else.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from typing import Any

from dataplane.lab import Lab, Node
from dataplane.lab.node import DAEMON
from tests.netns.conftest import MakeLab
from tests.netns.observing import SUBNETS, until

FLANNELD = os.environ.get("LODEN_FLANNELD", "")
ABSENT = "LODEN_FLANNELD=/path/to/flanneld names none: this test compares ours with a real flanneld"
ENVIRONMENT = ("env", "FLANNELD_IP_MASQ=true", "FLANNELD_SUBNET_LEASE_RENEW_MARGIN=45")
LOOKS = {
    "routes": ["ip", "-4", "route"],
    "IPv6 routes": ["ip", "-6", "route"],
    "neighbours": ["ip", "neigh", "show", "nud", "permanent"],
    "FDB": ["bridge", "fdb"],
    "iptables": ["iptables-save"],
    "ip6tables": ["ip6tables-save"],
    "nftables": ["nft", "list", "ruleset"],
    "links": ["ip", "-d", "-j", "link"],
    "addresses": ["ip", "-j", "addr"],
}
_TUNNEL = ("ifname", "mtu", "address", "flags", "linkinfo")
_COUNTED = re.compile(r"\[\d+:\d+\]|counter packets \d+ bytes \d+")


@dataclass(frozen=True, slots=True)
class Case:
    """A net-conf. `members` go into it, `backend` into its Backend."""

    type: str
    families: str = "4"
    backend: dict[str, Any] = field(default_factory=dict)
    members: dict[str, Any] = field(default_factory=dict)

    @property
    def userspace(self) -> bool:
        return self.type == "udp" or self.backend.get("Dataplane") == "userspace"

    @property
    def stays(self) -> bool:
        """Whether the kernel goes on carrying while no daemon runs."""
        return not self.userspace


class Cluster:
    """Machines with pods; `start` and `stop` change who runs on one."""

    def __init__(self, make_lab: MakeLab, case: Case, nodes: int = 2) -> None:
        self.case = case
        self.lab: Lab = make_lab(nodes, daemons=False, store="etcd", backend=case.type, families=case.families)
        conf = json.loads(self.lab.settings.net_conf()) | case.members
        conf["Backend"] |= case.backend
        self.lab.etcdctl("put", "/coreos.com/network/config", json.dumps(conf))

    @classmethod
    def of_flannels(cls, make_lab: MakeLab, case: Case) -> Cluster:
        """Every node runs the real one, and all pods answer each other."""
        cluster = cls(make_lab, case)
        for node in cluster.lab.nodes.values():  # one after the other: two at once lose each other now and then
            cluster.start(node, ours=False)
            node.connect_pods()
        cluster.wait_whole()
        return cluster

    def start(self, node: Node, *, ours: bool, flags: tuple[str, ...] = ()) -> None:
        """Returns once the daemon says that it carries."""
        said = len(log_of(node))
        node.program = program(ours=ours)
        node.start_daemon(*flags)
        until(f"{node.name} runs its backend", lambda: "Running backend." in log_of(node)[said:], 60)
        if ours:
            node.wait_ready()

    def swap(self, node: Node, *, ours: bool) -> None:
        assert node.stop_daemon() == 0, log_of(node)
        self.start(node, ours=ours)

    def wait_whole(self) -> None:
        until("every pod reaches every other", lambda: all(trip.whole for trip in self.lab.ping_all(count=3)), 60)

    def leases(self) -> dict[str, dict[str, Any]]:
        """What etcd holds, by key."""
        lines = self.lab.etcdctl("get", "--prefix", SUBNETS).stdout.splitlines()
        entries = zip(lines[::2], lines[1::2], strict=True)
        return {key.removeprefix(SUBNETS): json.loads(value) for key, value in entries}

    def kernel_state(self, node: Node) -> dict[str, list[str]]:
        """What a daemon has set on its node, by LOOKS, without counters, times and the numbers of devices."""
        shown = {what: self.lab.run(node.name, argv).stdout for what, argv in LOOKS.items()}
        state = {what: _lines(text) for what, text in shown.items()}
        tunnels = [link for link in json.loads(shown["links"]) if link["ifname"].startswith("flannel")]
        state["links"] = [json.dumps({name: link.get(name) for name in _TUNNEL}, indent=1) for link in tunnels]
        state["addresses"] = [
            f"{device['ifname']} {address['local']}/{address['prefixlen']} {address['scope']}"
            for device in json.loads(shown["addresses"])
            for address in device["addr_info"]
            if device["ifname"].startswith("flannel") and not address["local"].startswith("fe80:")
        ]
        return state


def program(*, ours: bool) -> tuple[str, ...]:
    return *ENVIRONMENT, *(DAEMON if ours else (FLANNELD,))


def log_of(node: Node) -> str:
    return node.log.read_text(errors="replace") if node.log.exists() else ""


def subnet_values(node: Node) -> dict[str, str]:
    return dict(line.split("=", 1) for line in node.subnet_file.read_text().splitlines())


def _lines(text: str) -> list[str]:
    """Without what is counted, and what each IPv6 device has by itself."""
    kept = (_COUNTED.sub("", line).rstrip() for line in text.splitlines())
    return sorted(line for line in kept if line and not line.startswith(("#", "fe80::", "33:33:")))
