"""Owns `loden lab`: words and tables for the labs of dataplane.lab.

Free of: namespaces and processes. Invariant: an exit code of 0 means that what was asked for is so.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataplane.lab import Lab, Node

    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


def add(verbs: Verbs) -> Verbs:
    """Register `lab`; returns its own verbs, so that more can be added."""
    parser = verbs.add_parser("lab", help="nodes as network namespaces on this machine")
    subverbs = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_up(subverbs)
    for name, run, text in (
        ("ping", _ping, "ping between all pods; fails if one packet is lost"),
        ("status", _status, "a line for each node"),
        ("down", _down, "remove every trace of a lab, also after a crash"),
    ):
        _verb(subverbs, name, run, text)
    subverbs.choices["status"].add_argument("--json", action="store_true", help="everything that the daemons tell")
    subverbs.choices["ping"].add_argument("--count", type=int, default=20, metavar="N", help="pings of a pair (20)")
    subverbs.choices["down"].add_argument("--all", action="store_true", help="all labs of this machine")
    for name, run, text in (("cut", _cut, "take a node's cable out"), ("heal", _heal, "put a node's cable back")):
        _verb(subverbs, name, run, text).add_argument("node", metavar="NODE", help="as in n1")
    enter = _verb(subverbs, "exec", _exec, "run a command in a node or pod: loden lab exec n1-p1 -- ip address")
    enter.add_argument("member", metavar="NODE|POD", help="as in n1 or n1-p1")
    enter.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD")
    return subverbs


def _verb(verbs: Verbs, name: str, run: object, text: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("--name", default="lab", help="which lab, where several stand (default: lab)")
    return parser


def _add_up(verbs: Verbs) -> None:
    parser = _verb(verbs, "up", _up, "build a lab and wait until all nodes know each other")
    parser.add_argument("nodes", nargs="?", type=int, default=3, metavar="N", help="number of nodes (3)")
    parser.add_argument("--backend", default="udp", help="udp (default), vxlan, host-gw or alloc")
    parser.add_argument(
        "--dataplane", default="", metavar="D[,D...]", help="vxlan: kernel, userspace or auto; for all or for each node"
    )
    parser.add_argument("--direct-routing", action="store_true", help="no encapsulation where a route does it")
    parser.add_argument("--families", default="4", metavar="4|6|46", help="IP versions of underlay and pods (4)")
    parser.add_argument("--store", default="sqlite", help="where leases live: sqlite (default) or etcd")
    parser.add_argument("--underlay-mtu", type=int, default=1500, metavar="M", help="MTU of the wire (1500)")
    parser.add_argument("--network", default="10.244.0.0/16", metavar="CIDR", help="of all pods (10.244.0.0/16)")
    parser.add_argument("--pods", type=int, default=1, metavar="K", help="pods of each node (1)")


class Progress:
    """A line a step, with the seconds since the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.2f}s  {text}", flush=True)


def _up(arguments: argparse.Namespace) -> int:
    from dataplane.lab import Lab, Settings

    settings = Settings(
        store=arguments.store,
        backend=arguments.backend,
        network=arguments.network,
        underlay_mtu=arguments.underlay_mtu,
        pods=arguments.pods,
        dataplane=arguments.dataplane,
        direct_routing=arguments.direct_routing,
        families=arguments.families,
    )
    lab = Lab.create(arguments.name, arguments.nodes, settings, Progress())
    print(status_table(lab))
    option = "" if lab.name == "lab" else f" --name={lab.name}"
    print(f"next: loden lab ping{option} | loden lab exec{option} n1-p1 -- ip address | loden lab down{option}")
    return 0


def _ping(arguments: argparse.Namespace) -> int:
    from dataplane.lab import Lab
    from dataplane.lab.measure import table

    results = Lab.open(arguments.name).ping_all(arguments.count)
    rows = [(p.source, p.target, p.address, "-" if p.p50 is None else f"{p.p50:.3f}", f"{p.loss:.0%}") for p in results]
    print(table(("from", "to", "address", "RTT p50 ms", "loss"), rows))
    return 0 if all(pair.whole for pair in results) else 1


def _status(arguments: argparse.Namespace) -> int:
    from dataplane.lab import Lab

    lab = Lab.open(arguments.name)
    if arguments.json:
        print(json.dumps([{"node": node.name, "status": node.status()} for node in lab.nodes.values()], indent=2))
    else:
        print(status_table(lab))
    return 0


def status_table(lab: Lab) -> str:
    """A line for each node: what it leases, whether it carries, and how much."""
    from dataplane.lab.measure import table

    header = ("node", "subnet", "public IP", "state", "peers", "TX packets", "RX packets", "drops")
    return table(header, [_status_row(node) for node in lab.nodes.values()])


def _status_row(node: Node) -> tuple[object, ...]:
    from dataplane.lab.measure import drops_text

    status: dict[str, Any] | None = node.status()
    if status is None:
        addresses = _both(*(address.ip for address in node.addresses))
        return node.name, "-", addresses, "no answer" if node.pids else "no daemon", "-", "-", "-", "-"
    lease, peers = status.get("lease") or {}, status.get("peers", [])
    return (
        node.name,
        _both(lease.get("subnet"), lease.get("subnet_v6")) or "-",
        _both(lease.get("subnet") and lease["public_ip"], lease.get("subnet_v6") and lease["public_ipv6"])
        or _both(*(address.ip for address in node.addresses)),
        "ready" if status["ready"] else "not ready",
        len(peers),
        _total(peers, "tx_packets"),
        _total(peers, "rx_packets"),
        drops_text(status.get("drops", {})),
    )


def _both(*values: object) -> str:
    """What there is of either IP version."""
    return " ".join(str(value) for value in values if value is not None)


def _total(peers: list[dict[str, Any]], counter: str) -> object:
    """Of all peers; the kernel does not count by peer."""
    return sum(peer[counter] for peer in peers) if all(peer["counted"] for peer in peers) else "-"


def _exec(arguments: argparse.Namespace) -> int:
    from dataplane.errors import ConfigError
    from dataplane.lab import Lab

    argv = arguments.argv[1:] if arguments.argv[:1] == ["--"] else arguments.argv
    if not argv:
        raise ConfigError("say which command to run: loden lab exec n1-p1 -- ip address")
    command = Lab.open(arguments.name).exec_argv(arguments.member, argv)
    os.execvp(command[0], command)  # noqa: S606  # in place of ourselves, so that signals and exit code are the command's


def _cut(arguments: argparse.Namespace) -> int:
    from dataplane.lab import Lab

    Lab.open(arguments.name).node(arguments.node).cut()
    return 0


def _heal(arguments: argparse.Namespace) -> int:
    from dataplane.lab import Lab

    Lab.open(arguments.name).node(arguments.node).heal()
    return 0


def _down(arguments: argparse.Namespace) -> int:
    from dataplane.lab import Lab

    for name in Lab.names() if arguments.all else [arguments.name]:
        print(f"lab {name} is gone" if Lab.destroy(name) else f"there is no lab {name!r}; nothing to do")
    return 0
