"""Measures how long pods miss each other after a fault in vxlan's kernel mode: `python -m tests.netns.recovery`.

Two nodes on etcd, a ping each 2 ms between their pods; the figure is the longest gap between two answers around the
fault, the median of some rounds. Figures for docs/operations.md; nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from ipaddress import IPv4Interface
from itertools import pairwise

from dataplane.lab import Lab, Settings
from dataplane.lab.measure import table

INTERVAL = 0.002
_ANSWER = re.compile(r"\[(\d+\.\d+)\] .*icmp_seq=")


def gap(lab: Lab, fault: Callable[[], None], settle: float) -> float:
    """Milliseconds without an answer, beyond the usual interval."""
    ping = lab.open_process("n1-p1", ["ping", "-n", "-D", "-i", str(INTERVAL), lab.address_of("n2-p1")])
    time.sleep(0.7)
    fault()
    time.sleep(settle)
    ping.terminate()
    times = [float(match[1]) for match in _ANSWER.finditer(ping.communicate()[0])]
    return max(0.0, max(later - earlier for earlier, later in pairwise(times)) - INTERVAL) * 1000


def faults(lab: Lab) -> dict[str, tuple[Callable[[], None], float]]:
    """What is done, and the seconds that it is watched."""
    address = iter(range(10, 250))

    def by(node: str, line: str) -> Callable[[], None]:
        def run() -> None:
            lab.run(node, line.split())

        return run

    def new_address() -> None:
        lab.node("n2").readdress(IPv4Interface(f"198.18.9.{next(address)}/15"))

    def new_mtu() -> None:
        for node in ("n1", "n2"):
            lab.run(node, ["ip", "link", "set", "eth0", "mtu", "1400"])

    def new_mac() -> None:
        """n2's daemon is not asked: a peer whose device has another MAC, told by the store."""
        status = lab.node("n2").status() or {}
        key = f"/coreos.com/network/subnets/{status['lease']['subnet'].replace('/', '-')}"
        lab.node("n2").stop_daemon()
        lease = json.loads(lab.etcdctl("get", key, "--print-value-only").stdout)
        lease["BackendData"]["VtepMAC"] = mac = f"02:00:00:00:01:{next(address):02x}"
        (there,) = json.loads(lab.run("n2", ["ip", "-j", "neigh", "show", "dev", "flannel.1"]).stdout)
        neighbour = f"neigh replace {there['dst']} lladdr {there['lladdr']} dev flannel.1 nud permanent"
        lab.run("n2", ["ip", "-batch", "-"], stdin=f"link set flannel.1 address {mac}\n{neighbour}\n")
        lab.etcdctl("put", key, stdin=json.dumps(lease))
        time.sleep(1)
        lab.node("n2").start_daemon()
        lab.node("n2").wait_ready()

    return {
        "nothing (what the machine itself does)": (lambda: None, 2.0),
        "ip link del flannel.1": (by("n1", "ip link del flannel.1"), 2.0),
        "ip link set flannel.1 down": (by("n1", "ip link set flannel.1 down"), 2.0),
        "ip route flush dev flannel.1": (by("n1", "ip route flush dev flannel.1"), 2.0),
        "ip neigh flush dev flannel.1 nud permanent": (by("n1", "ip neigh flush dev flannel.1 nud permanent"), 2.0),
        "the peer's MAC changes, in the store too": (new_mac, 1.0),
        "the peer's underlay address changes": (new_address, 8.0),
        "the underlay's MTU changes on both": (new_mtu, 5.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    lab = Lab.create("recovery", 2, Settings(backend="vxlan", store="etcd"))
    rows = []
    try:
        for name, (fault, settle) in faults(lab).items():
            gaps = [gap(lab, fault, settle) for _ in range(1 if "MTU" in name else rounds)]
            rows.append((name, f"{statistics.median(gaps):.0f}", f"{max(gaps):.0f}"))
    finally:
        Lab.destroy("recovery")
    print(table(("fault", "median ms", "worst ms"), rows))  # noqa: T201  # the purpose of this program


if __name__ == "__main__":
    main()
