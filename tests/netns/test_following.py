"""The node changes under a running daemon: its address, MTU or way out. Nothing restarts, inner connections live on."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Interface
from typing import Any

import pytest

from dataplane.lab import Lab, Node, measure
from tests.netns.conftest import MakeLab
from tests.netns.observing import both_stores, reaches, status_of, until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600)]


def lease_of(lab: Lab, node: Node, seen_by: str) -> dict[str, Any]:
    """What another node knows of this one's lease."""
    subnet = status_of(node)["lease"]["subnet"]
    (peer,) = [peer for peer in status_of(lab.node(seen_by))["peers"] if peer["subnet"] == subnet]
    return dict(peer)


def knows(lab: Lab, node: Node, seen_by: str, address: str) -> Callable[[], bool]:
    return lambda: lease_of(lab, node, seen_by)["public_ip"] == address


@both_stores
@pytest.mark.parametrize("backend", ["udp", "host-gw"])
def test_a_stream_lives_on_while_its_node_gets_another_address(make_lab: MakeLab, store: str, backend: str) -> None:
    """For vxlan see test_recovery."""
    lab = make_lab(2, store=store, backend=backend)
    node = lab.node("n2")
    before = status_of(node)
    with lab.traffic("tcp", "n1-p1", "n2-p1", "--bytes=200000000", "--until-eof") as run:
        for address in ("198.18.9.9", "198.18.9.10"):
            node.readdress(IPv4Interface(f"{address}/15"))
            until(f"n1 knows {address}", knows(lab, node, "n1", address))
            until("n1 reaches n2", lambda: lab.ping("n1-p1", "n2-p1", count=3).received > 0)
        assert run.poll() is None, "the stream was over before the node had moved"
        result = measure.verdict(run, 300)
    assert result["equal"], result
    after = status_of(node)
    assert (after["pid"], after["lease"]["subnet"]) == (before["pid"], before["lease"]["subnet"])
    assert after["ready"]
    assert "The underlay of this node has changed: address 198.18." in node.log.read_text()


@pytest.mark.parametrize(("backend", "dataplane"), [("vxlan", "kernel"), ("vxlan", "userspace"), ("udp", "")])
def test_a_stream_lives_on_while_its_node_publishes_another_address(
    make_lab: MakeLab, backend: str, dataplane: str
) -> None:
    """Only -public-ip changes, which takes another start of the daemon: the node has both addresses all the time."""
    lab = make_lab(2, backend=backend, dataplane=dataplane)
    node = lab.node("n2")
    subnet = status_of(node)["lease"]["subnet"]
    lab.run("n2", ["ip", "addr", "add", "198.18.9.50/15", "dev", "eth0"])
    with lab.traffic("tcp", "n1-p1", "n2-p1", "--bytes=20000000", "--until-eof") as run:
        for address in ("198.18.9.50", str(node.address.ip)):
            node.stop_daemon()
            node.start_daemon(f"-public-ip={address}")
            node.wait_ready()
            assert status_of(node)["lease"]["subnet"] == subnet
            until(f"n1 knows {address}", knows(lab, node, "n1", address))
            until("n1 reaches n2", lambda: lab.ping("n1-p1", "n2-p1", count=3).received > 0)
        assert run.poll() is None, "the stream was over before the node had moved"
        result = measure.verdict(run, 300)
    assert result["equal"], result


def test_another_mtu_reaches_the_device_and_the_subnet_file(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    node = lab.node("n1")
    assert "FLANNEL_MTU=1472" in node.subnet_file.read_text()
    lab.run("n1", ["ip", "link", "set", "eth0", "mtu", "1400"])
    until("subnet.env says it", lambda: "FLANNEL_MTU=1372" in node.subnet_file.read_text())
    assert status_of(node)["mtu"] == 1372
    assert " mtu 1372 " in lab.run("n1", ["ip", "link", "show", "flannel0"]).stdout
    assert reaches(lab, "n1-p1", "n2-p1")


def test_another_mtu_of_host_gw_reaches_the_subnet_file_while_a_stream_lives_on(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend="host-gw")
    node = lab.node("n1")
    with lab.traffic("tcp", "n1-p1", "n2-p1", "--bytes=20000000", "--until-eof") as run:
        lab.run("n1", ["ip", "link", "set", "eth0", "mtu", "1400"])
        until("subnet.env says it", lambda: "FLANNEL_MTU=1400" in node.subnet_file.read_text())
        until("packets flow", lambda: lab.ping("n1-p1", "n2-p1", count=3).received > 0)
        assert run.poll() is None
        assert measure.verdict(run, 120)["equal"]
    assert status_of(node)["mtu"] == 1400


def test_an_address_that_is_gone_for_a_moment_changes_nothing(make_lab: MakeLab) -> None:
    """As a DHCP client does it when it renews. A second address of the interface would do as well, and is not taken."""
    lab = make_lab(2)
    node = lab.node("n1")
    address = str(node.address)
    lab.run("n1", ["ip", "addr", "add", "198.18.77.77/15", "dev", "eth0"])
    lab.run("n1", ["sysctl", "-qw", "net.ipv4.conf.eth0.promote_secondaries=1"])
    lab.run("n1", ["ip", "addr", "del", address, "dev", "eth0"])
    lab.run("n1", ["ip", "addr", "add", address, "dev", "eth0"])
    until("packets flow", lambda: reaches(lab, "n1-p1", "n2-p1"))
    assert "The underlay of this node has changed" not in node.log.read_text()
    assert lease_of(lab, node, "n2")["public_ip"] == address.split("/")[0]


def test_a_node_without_any_address_keeps_what_it_had_until_there_is_one(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    node = lab.node("n1")
    lab.run("n1", ["ip", "addr", "flush", "dev", "eth0"])
    until("the log says so", lambda: "No interface faces the underlay now" in node.log.read_text())
    assert status_of(node)["pid"] == node.pids[0]
    node.readdress(IPv4Interface("198.18.5.5/15"))
    until("n2 knows", knows(lab, node, "n2", "198.18.5.5"))
    until("packets flow", lambda: reaches(lab, "n1-p1", "n2-p1"))


@pytest.mark.parametrize(("backend", "dataplane"), [("udp", ""), ("vxlan", "kernel"), ("vxlan", "userspace")])
def test_a_stream_lives_on_while_the_default_route_moves_to_another_interface(
    make_lab: MakeLab, capfd: pytest.CaptureFixture[str], backend: str, dataplane: str
) -> None:
    """Without -iface the default route decides, also later."""
    lab = make_lab(2, backend=backend, dataplane=dataplane)
    node = lab.node("n1")
    node.stop_daemon()
    lab.run("n1", ["ip", "link", "add", "eth9", "link", "eth0", "type", "macvlan", "mode", "bridge"])
    lab.run("n1", ["ip", "addr", "add", "198.18.6.6/15", "dev", "eth9"])
    lab.run("n1", ["ip", "link", "set", "eth9", "up"])
    lab.run("n1", ["ip", "route", "add", "default", "via", "198.18.0.1", "dev", "eth0"])
    argv = [word for word in node.daemon_argv() if word != "-iface=eth0"]
    with lab.open_process("n1", argv) as daemon, daemon:
        until("it is ready", lambda: (node.status() or {}).get("ready"))
        assert lease_of(lab, node, "n2")["public_ip"] == str(node.address.ip)
        until("packets flow", lambda: reaches(lab, "n1-p1", "n2-p1"))
        with lab.traffic("tcp", "n1-p1", "n2-p1", "--bytes=20000000", "--until-eof") as run:
            lab.run("n1", ["ip", "route", "replace", "default", "via", "198.18.0.1", "dev", "eth9"])
            until("n2 knows", knows(lab, node, "n2", "198.18.6.6"))
            until("packets flow", lambda: reaches(lab, "n1-p1", "n2-p1"))
            assert run.poll() is None, "the stream was over before the node had moved"
            assert measure.verdict(run, 120)["equal"]
        daemon.terminate()
        assert daemon.wait(30) == 0
    assert "interface eth0 is eth9 now" in capfd.readouterr().err
