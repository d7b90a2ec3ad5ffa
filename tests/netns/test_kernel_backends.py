"""vxlan in the kernel and host-gw, end to end: real daemons, real stores, traffic between pods."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Interface
from pathlib import Path

import pytest

from dataplane.lab import Lab, Node, measure
from tests.netns.conftest import MakeLab
from tests.netns.observing import put_lease, reaches, status_of, until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600)]

SIZES = "1,64,512,1400,1422"


@contextmanager
def datagrams(lab: Lab, source: str = "n1-p1", target: str = "n2-p1") -> Iterator[subprocess.Popen[str]]:
    """Numbered datagrams, each of whose bytes is checked, until the block ends; then not one may be missing."""
    with lab.traffic("udp", source, target, f"--sizes={SIZES}", "--count=500", "--until-eof") as run:
        yield run
        assert run.poll() is None, "the datagrams were over too early"
        result = measure.verdict(run, 120)
    faults = {name: result[name] for name in ("lost", "altered", "duplicated", "reordered", "stalls")}
    assert faults == {"lost": 0, "altered": 0, "duplicated": 0, "reordered": 0, "stalls": []}, result
    assert result["received"] == result["sent"]


def shown(lab: Lab, node: str, *argv: str) -> str:
    return lab.run(node, list(argv)).stdout


def restart(node: Node, number: signal.Signals) -> None:
    node.stop_daemon(number)
    node.start_daemon()
    node.wait_ready()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_restart_under_load_loses_no_datagram(make_lab: MakeLab, number: signal.Signals) -> None:
    lab = make_lab(3, backend="vxlan")
    assert all(pair.whole for pair in lab.ping_all())
    device = json.loads(shown(lab, "n1", "ip", "-j", "link", "show", "flannel.1"))
    with datagrams(lab):
        for _ in range(3):
            for node in (lab.node("n1"), lab.node("n2")):
                restart(node, number)
            time.sleep(0.2)
    after = json.loads(shown(lab, "n1", "ip", "-j", "link", "show", "flannel.1"))
    assert [(k["ifindex"], k["address"]) for k in after] == [(k["ifindex"], k["address"]) for k in device]


def test_a_peer_that_left_meanwhile_is_cleared_and_nobody_else_is_touched(make_lab: MakeLab) -> None:
    lab = make_lab(3, backend="vxlan", store="etcd")
    gone = status_of(lab.node("n3"))["lease"]["subnet"]
    lab.node("n1").stop_daemon(signal.SIGKILL)
    lab.node("n3").stop_daemon()
    lab.etcdctl("del", f"/coreos.com/network/subnets/{gone.replace('/', '-')}")
    assert gone in shown(lab, "n1", "ip", "route")
    with datagrams(lab):
        lab.node("n1").start_daemon()
        lab.node("n1").wait_ready()
        until("the stale route is gone", lambda: gone not in shown(lab, "n1", "ip", "route"))
    assert "198.18.1.3" not in shown(lab, "n1", "bridge", "fdb", "show", "dev", "flannel.1")


@pytest.mark.parametrize(
    "taken",
    ["ip link del flannel.1", "ip route flush dev flannel.1", "ip neigh flush dev flannel.1 nud permanent"],
)
def test_what_others_take_away_is_back_while_pods_talk(make_lab: MakeLab, taken: str) -> None:
    lab = make_lab(2, backend="vxlan")
    with lab.open_process("n1-p1", ["ping", "-n", "-i", "0.01", lab.address_of("n2-p1")]) as ping:
        for node in ("n1", "n2"):
            lab.run(node, taken.split())
            until(f"pods reach each other again after: {taken}", lambda: reaches(lab, "n1-p1", "n2-p1"))
        ping.terminate()
    assert all(status_of(node)["repairs"] > 0 for node in lab.nodes.values())


def test_a_mac_that_changes_in_the_store_is_followed(make_lab: MakeLab) -> None:
    """n2 gets another device by hand; its daemon is gone, so the store is told by hand too."""
    lab = make_lab(2, backend="vxlan", store="etcd")
    key = f"/coreos.com/network/subnets/{status_of(lab.node('n2'))['lease']['subnet'].replace('/', '-')}"
    lab.node("n2").stop_daemon()
    old = json.loads(lab.etcdctl("get", key, "--print-value-only").stdout)
    value = {**old, "BackendData": {"VNI": 1, "VtepMAC": "02:00:00:00:00:42"}}
    (there,) = json.loads(shown(lab, "n2", "ip", "-j", "neigh", "show", "dev", "flannel.1"))
    lab.run("n2", ["ip", "link", "set", "flannel.1", "address", "02:00:00:00:00:42"])
    # the kernel forgets neighbours with the MAC, and no daemon puts them back here
    line = f"ip neigh replace {there['dst']} lladdr {there['lladdr']} dev flannel.1 nud permanent"
    lab.run("n2", line.split())
    lab.etcdctl("put", key, stdin=json.dumps(value))
    until("n1 reaches the new device", lambda: reaches(lab, "n1-p1", "n2-p1"))
    table = shown(lab, "n1", "bridge", "fdb", "show", "dev", "flannel.1")
    assert "02:00:00:00:00:42" in table
    assert old["BackendData"]["VtepMAC"] not in table


def test_a_node_changes_its_public_address_under_load(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend="vxlan")
    node = lab.node("n2")
    node.stop_daemon()
    node.readdress(IPv4Interface("198.18.9.9/15"))
    node.start_daemon()
    node.wait_ready()
    lab.settle()
    until("n1 reaches it", lambda: reaches(lab, "n1-p1", "n2-p1"))
    assert "dst 198.18.9.9" in shown(lab, "n1", "bridge", "fdb", "show", "dev", "flannel.1")
    data = json.loads(shown(lab, "n2", "ip", "-d", "-j", "link", "show", "flannel.1"))[0]["linkinfo"]["info_data"]
    assert data["local"] == "198.18.9.9"


def handmade(lab: Lab, number: int = 9) -> str:
    """A node that runs no daemon: device, entries and lease by hand, as an ordinary flannel node would have them.
    Returns its namespace's name in the lab, which has a pod of its own."""
    node = lab.add_node(start=False)
    subnet, mac = f"10.244.{200 + number}", f"02:00:00:00:01:{number:02x}"
    for line in (
        (f"ip link add flannel.1 address {mac} mtu 1450 type vxlan id 1 local {node.address.ip} dev eth0"
        " dstport 8472 nolearning"),
        f"ip addr add {subnet}.0/32 dev flannel.1",
        "ip link set flannel.1 up",
    ):
        lab.run(node.name, line.split())
    for other in lab.nodes.values():
        status = other.status()
        if status is None:
            continue
        lease = status["lease"]
        (link,) = json.loads(shown(lab, other.name, "ip", "-j", "link", "show", "flannel.1"))
        first = lease["subnet"].partition("/")[0]
        for line in (
            f"ip neigh replace {first} lladdr {link['address']} dev flannel.1 nud permanent",
            f"bridge fdb replace {link['address']} dev flannel.1 dst {lease['public_ip']} self permanent",
            f"ip route replace {lease['subnet']} via {first} dev flannel.1 onlink",
        ):
            lab.run(node.name, line.split())
    node.subnet_file.write_text(f"FLANNEL_SUBNET={subnet}.1/24\nFLANNEL_MTU=1450\n")
    node.connect_pods()
    data = {"VNI": 1, "VtepMAC": mac}
    value = {"PublicIP": str(node.address.ip), "PublicIPv6": None, "BackendType": "vxlan", "BackendData": data}
    put_lease(lab, f"{subnet}.0-24", json.dumps(value, separators=(",", ":")))
    return node.name


@pytest.mark.parametrize("store", ["sqlite", pytest.param("etcd", marks=pytest.mark.etcd)])
def test_a_node_made_by_hand_is_a_peer_like_any_other(make_lab: MakeLab, store: str) -> None:
    lab = make_lab(2, backend="vxlan", store=store)
    pod = f"{handmade(lab)}-p1"
    for other in ("n1-p1", "n2-p1"):
        until(f"{other} reaches the handmade node", lambda other=other: reaches(lab, other, pod))  # type: ignore[misc]
    with datagrams(lab, "n1-p1", pod), datagrams(lab, pod, "n2-p1"):
        time.sleep(0.5)
    with lab.traffic("tcp", "n1-p1", pod, "--bytes=20000000") as run:
        assert measure.verdict(run, 60)["equal"]


def test_a_lease_of_another_backend_is_ignored_with_a_reason(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend="vxlan")
    put_lease(lab, "10.244.250.0-24", '{"PublicIP":"198.18.77.1","PublicIPv6":null}')
    ignored = until("the reason stands in the status", lambda: status_of(lab.node("n1"))["ignored"])
    assert ignored == {"10.244.250.0/24": "its node uses backend 'udp or alloc', this one vxlan"}
    assert "10.244.250.0" not in shown(lab, "n1", "ip", "route")


def test_host_gw_routes_come_back_under_load(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend="host-gw")
    assert all(pair.whole for pair in lab.ping_all())
    assert {"FLANNEL_MTU=1500"} <= set(lab.node("n1").subnet_file.read_text().splitlines())
    subnet = status_of(lab.node("n2"))["lease"]["subnet"]
    with lab.open_process("n1-p1", ["ping", "-n", "-i", "0.01", lab.address_of("n2-p1")]) as ping:
        for taken in (f"ip route del {subnet}", "ip route flush proto boot", "ip link set eth0 down"):
            lab.run("n1", taken.split())
            lab.run("n1", ["ip", "link", "set", "eth0", "up"])
            until(f"pods reach each other again after: {taken}", lambda: reaches(lab, "n1-p1", "n2-p1"))
        ping.terminate()
    with datagrams_of_1472(lab):
        restart(lab.node("n1"), signal.SIGKILL)


@contextmanager
def datagrams_of_1472(lab: Lab) -> Iterator[None]:
    with lab.traffic("udp", "n1-p1", "n2-p1", "--sizes=1,1472", "--count=500", "--until-eof") as run:
        yield
        result = measure.verdict(run, 120)
    assert result["received"] == result["sent"], result


def test_direct_routing_between_nodes_of_one_wire(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend="vxlan", direct_routing=True)
    assert all(pair.whole for pair in lab.ping_all())
    assert "flannel.1" not in shown(lab, "n1", "ip", "route", "show", "proto", "boot")
    assert shown(lab, "n1", "bridge", "fdb", "show", "dev", "flannel.1") == ""
    assert [peer["direct"] for peer in status_of(lab.node("n1"))["peers"]] == [True]


@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
def test_cleanup_leaves_nothing_of_the_overlay(make_lab: MakeLab, backend: str) -> None:
    lab = make_lab(2, backend=backend)
    node = lab.node("n1")
    lab.run("n1", ["ip", "route", "add", "192.0.2.0/24", "via", "198.18.1.2"])
    node.stop_daemon()
    subnet = status_of(lab.node("n2"))["lease"]["subnet"]
    assert subnet in shown(lab, "n1", "ip", "route"), "an ordered stop leaves it"
    lab.run("n1", node.daemon_argv("-cleanup"))
    assert subnet not in shown(lab, "n1", "ip", "route")
    assert "flannel" not in shown(lab, "n1", "ip", "link")
    assert "192.0.2.0/24" in shown(lab, "n1", "ip", "route")


def test_alloc_writes_subnet_env_and_nothing_else(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend="alloc")
    text = Path(lab.node("n1").subnet_file).read_text()
    assert "FLANNEL_MTU=1500" in text
    assert "flannel" not in shown(lab, "n1", "ip", "link")
    assert status_of(lab.node("n1"))["dataplane"] == "none"


def test_a_backend_that_is_not_carried_ends_the_start_with_one_sentence(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    node = lab.node("n1")
    node.stop_daemon()
    conf = json.dumps({"Network": "10.244.0.0/16", "Backend": {"Type": "wireguard"}})
    argv = [sys.executable, "-P", "-m", "dataplane.cli", "net-conf", "set", "-"]
    lab.run("n1", [*argv, *(flag.replace("-", "--", 1) for flag in lab.store_flags)], stdin=conf)
    done = lab.run("n1", node.daemon_argv(), check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("E")]
    words = "Error fetching backend: Backend.Type 'wireguard' is not carried by Loden: "
    assert f"] {words}for an encrypted network keep flannel's own" in line
