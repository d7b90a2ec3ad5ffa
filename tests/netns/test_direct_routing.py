"""DirectRouting end to end: nodes of one wire route, a node behind a router gets the tunnel, and both may change."""

from __future__ import annotations

import json

import pytest

from dataplane.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.observing import reaches, status_of, until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600)]

CASES = [("vxlan", "kernel", "flannel.1"), ("vxlan", "userspace", "flannel.1"), ("udp", "", "flannel0")]


def routes(lab: Lab, node: str, version: int = 4) -> dict[str, str]:
    """Device by destination, of routes of protocol boot."""
    shown = json.loads(lab.run(node, ["ip", "-j", f"-{version}", "route", "show", "proto", "boot"]).stdout)
    return {route["dst"]: route["dev"] for route in shown}


@pytest.mark.parametrize(("backend", "dataplane", "device"), CASES)
def test_ipv6_goes_the_shortest_way_too_where_the_underlay_has_it(
    make_lab: MakeLab, backend: str, dataplane: str, device: str
) -> None:
    """udp has an underlay of IPv4, over which a packet of IPv6 needs the encapsulation."""
    lab = make_lab(3, backend=backend, dataplane=dataplane, direct_routing=True, families="46")
    until("all pods reach each other", lambda: all(pair.whole for pair in lab.ping_all(3)))
    direct = {peer["subnet"]: peer["direct"] for peer in status_of(lab.node("n1"))["peers"]}
    assert sorted(direct.values()) == ([False, False, True, True] if backend == "udp" else [True] * 4)
    far = status_of(lab.node("n2"))["lease"]["subnet_v6"]
    if backend == "udp":
        assert far not in routes(lab, "n1", 6)
        return
    assert routes(lab, "n1", 6)[far] == "eth0"
    lab.run("n1", ["ip", "-6", "route", "del", far])
    until("a direct route comes back", lambda: routes(lab, "n1", 6).get(far) == "eth0")
    # n1 learns that n2 is behind a router, which is n3 here
    outer = {name: str(node.addresses[1].ip) for name, node in lab.nodes.items()}
    detour = ["ip", "-6", "route", "add", outer["n2"], "via", outer["n3"]]
    lab.run("n1", detour)
    until("packets are encapsulated", lambda: routes(lab, "n1", 6).get(far, "flannel-v6.1") == "flannel-v6.1")
    until("and pods reach each other", lambda: all(pair.whole for pair in lab.ping_all(3)))
    lab.run("n1", ["ip", "-6", "route", "del", *detour[4:]])
    until("n2 is direct again", lambda: routes(lab, "n1", 6).get(far) == "eth0")
    assert all(pair.whole for pair in lab.ping_all(3))


@pytest.mark.parametrize(("backend", "dataplane", "device"), CASES)
def test_the_way_is_the_shortest_there_is(make_lab: MakeLab, backend: str, dataplane: str, device: str) -> None:
    lab = make_lab(3, backend=backend, dataplane=dataplane, direct_routing=True)
    until("all pods reach each other", lambda: all(pair.whole for pair in lab.ping_all(3)))
    subnets = {name: status_of(node)["lease"]["subnet"] for name, node in lab.nodes.items()}
    assert routes(lab, "n1")[subnets["n2"]] == routes(lab, "n1")[subnets["n3"]] == "eth0"
    assert {peer["direct"] for peer in status_of(lab.node("n1"))["peers"]} == {True}
    # n1 learns that n3 is behind a router, which is n2 here
    lab.run("n1", ["ip", "route", "add", "198.18.1.3/32", "via", "198.18.1.2"])
    lab.run("n2", ["sysctl", "-q", "-w", "net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.eth0.send_redirects=0"])

    def tunnelled() -> bool:
        return routes(lab, "n1").get(subnets["n3"], device) == device

    until("packets to n3 are encapsulated", tunnelled)
    assert routes(lab, "n1")[subnets["n2"]] == "eth0"
    until("and pods reach each other", lambda: all(pair.whole for pair in lab.ping_all(3)))
    ways = {peer["subnet"]: peer["direct"] for peer in status_of(lab.node("n1"))["peers"]}
    assert ways == {subnets["n2"]: True, subnets["n3"]: False}
    lab.run("n1", ["ip", "route", "del", "198.18.1.3/32"])
    until("n3 is direct again", lambda: routes(lab, "n1").get(subnets["n3"]) == "eth0")
    lab.run("n1", ["ip", "route", "del", subnets["n2"]])
    until("a direct route comes back", lambda: routes(lab, "n1").get(subnets["n2"]) == "eth0")
    assert reaches(lab, "n1-p1", "n2-p1")
    if device == "flannel.1" and dataplane == "kernel":
        assert lab.run("n1", ["bridge", "fdb", "show", "dev", device]).stdout == "", "nothing of the tunnel is left"
    else:
        assert lab.node("n1").stop_daemon() == 0
        assert set(routes(lab, "n1")) & set(subnets.values()) == set(), "a stop leaves no route into nowhere"
