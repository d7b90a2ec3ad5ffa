"""`loden explain` where the overlay is IPv6, alone and beside IPv4: what is well is said to be, faults are named."""

from __future__ import annotations

from typing import Any

import pytest

from dataplane.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.observing import until
from tests.netns.test_faults import explain, loden, names, rules

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

REACHED = "answers inside the overlay, also at the MTU"
PEER = "fd00:198:18::1:2"


def well(lab: Lab, version: int) -> bool:
    return REACHED in str(explain(lab, lab.address_of("n2-p1", version))["verdict"])


@pytest.fixture
def lab(make_lab: MakeLab) -> Lab:
    return make_lab(2, backend="vxlan", dataplane="userspace", families="6")


def test_faults_of_an_overlay_of_ipv6_are_named(lab: Lab) -> None:
    pod = lab.address_of("n2-p1", 6)
    assert well(lab, 6)
    assert "local to this node" in explain(lab, lab.address_of("n1-p1", 6))["verdict"]
    names(explain(lab, "fd00:10:244:ffff::7"), "no lease covers fd00:10:244:ffff::7", "loden status")
    for member, hook, said in (("n1", "output", "this node's own firewall"), ("n2", "input", "passes UDP port 8472")):
        with rules(lab, member, f"chain c {{ type filter hook {hook} priority 0; udp dport 8472 drop; }}"):
            answer = explain(lab, pod)
            names(answer, "port blocked", "nft")
            assert said in answer["verdict"]
        until("the fault is gone with its cause", lambda: well(lab, 6))
    lab.run("n1", ["ip", "route", "add", pod, "dev", "eth0"])
    names(explain(lab, pod), f"the route to {pod} leads to eth0, not into flannel-v6.1", "ip route")
    lab.run("n1", ["ip", "route", "del", pod, "dev", "eth0"])
    lab.node("n2").cut()
    names(explain(lab, pod), "peer down", f"ping {PEER}")
    lab.node("n2").heal()
    until("the fault is gone with its cause", lambda: well(lab, 6))
    assert lab.node("n2").stop_daemon() == 0
    names(explain(lab, pod), f"peer down: the node {PEER} is up, but nothing listens", f"ssh {PEER}")


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({"backend": "host-gw", "families": "46"}, "direct: as they are"),
        ({"backend": "udp", "direct_routing": True}, "direct: as they are"),
        ({"backend": "vxlan", "dataplane": "kernel", "families": "46"}, "kernel: the kernel sends them inside vxlan"),
    ],
)
def test_the_way_of_packets_that_the_kernel_carries(make_lab: MakeLab, options: dict[str, Any], way: str) -> None:
    lab = make_lab(2, **options)
    pod = lab.address_of("n2-p1")
    for version in lab.settings.versions:
        answer = explain(lab, lab.address_of("n2-p1", version))
        assert REACHED in answer["verdict"], answer
        steps = {step["step"]: step["text"] for step in answer["steps"]}
        assert steps["way"].startswith(way)
        assert steps["counters"].startswith("none: they pass the kernel alone")
    row = next(line for line in loden(lab, "n1", "status").stdout.splitlines() if line.startswith(pod[:-1]))
    assert row.split()[-1] == "-"
    if options["backend"] == "vxlan":
        return
    lab.run("n1", ["ip", "route", "add", pod, "dev", "eth0"])
    names(explain(lab, pod), f"the route to {pod} leads into eth0, not to the node 198.18.1.2", "ip route")
    lab.run("n1", ["ip", "route", "del", pod, "dev", "eth0"])
    with rules(lab, "n2", "chain c { type filter hook input priority 0; ip daddr 10.244.0.0/16 drop; }"):
        names(explain(lab, pod), "pods' packets blocked: 198.18.1.2 is up", "loden explain")


@pytest.mark.parametrize("backend", ["udp", "vxlan"])
def test_of_two_families_each_has_its_own_way(make_lab: MakeLab, backend: str) -> None:
    """udp carries IPv6 over IPv4; of vxlan IPv6 has a device, an MTU and an underlay of its own."""
    lab = make_lab(2, backend=backend, dataplane="userspace" if backend == "vxlan" else "", families="46")
    for version in (4, 6):
        assert well(lab, version), explain(lab, lab.address_of("n2-p1", version))
