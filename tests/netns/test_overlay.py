"""The overlay end to end: real daemons, real TUN devices, real packets; what it is for, and how a daemon lives.

Everything happens in the namespaces of a lab.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Interface
from pathlib import Path

import pytest

from dataplane.lab import Lab, Node, measure
from dataplane.lab.traffic import parse_sizes
from tests.netns.conftest import MakeLab
from tests.netns.observing import both_stores, python_in, reaches, status_of, until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600)]

TCP_BYTES = int(os.environ.get("LODEN_TEST_TCP_BYTES", "1000000000"))
SIZES = "1-9,15,16,31-33,63-65,127-129,255-257,511-513,575-577,1023-1025,1199-1201,1399-1401,1442-1444"


def come_change_and_go(lab: Lab, heard: Callable[[str, str], bool]) -> None:
    """A node joins, changes its public address, and leaves, seen from n1."""
    third = lab.join()
    until("n1 reaches the new node", lambda: heard("n1-p1", f"{third.name}-p1"))
    assert third.stop_daemon() == 0
    third.readdress(IPv4Interface("198.18.9.9/15"))
    third.start_daemon()
    third.wait_ready()
    third.connect_pods()
    lab.settle()
    assert "198.18.9.9" in {peer["public_ip"] for peer in status_of(lab.node("n1"))["peers"]}
    until("n1 reaches the moved node", lambda: heard("n1-p1", f"{third.name}-p1"))
    lab.remove_node(third.name)


# --- what the network is for ----------------------------------------------------------------------------------


@both_stores
def test_a_tcp_stream_stays_whole_while_a_node_comes_changes_and_goes(make_lab: MakeLab, store: str) -> None:
    lab = make_lab(2, store=store)
    assert all(pair.whole for pair in lab.ping_all())
    with lab.traffic("tcp", "n1-p1", "n2-p1", f"--bytes={TCP_BYTES}", "--until-eof") as run:
        # the stream fills every queue, so a ping may be lost to congestion: one answer shows the path
        come_change_and_go(lab, lambda source, target: lab.ping(source, target, count=3).received > 0)
        assert run.poll() is None, "the stream was over before the node had left"
        result = measure.verdict(run, 300)
    assert result["equal"], result
    assert result["bytes"] >= TCP_BYTES


@both_stores
def test_no_datagram_of_any_size_is_lost_while_a_node_comes_changes_and_goes(make_lab: MakeLab, store: str) -> None:
    lab = make_lab(2, store=store)
    mtu = status_of(lab.node("n1"))["mtu"]
    assert max(parse_sizes(SIZES)) == mtu - 28, "the sizes reach up to the overlay's MTU"
    with lab.traffic("udp", "n2-p1", "n1-p1", f"--sizes={SIZES}", "--count=1000", "--until-eof") as run:
        come_change_and_go(lab, lambda source, target: reaches(lab, source, target))
        assert run.poll() is None, "the datagrams were over before the node had left"
        result = measure.verdict(run, 300)
    faults = {name: result[name] for name in ("lost", "altered", "duplicated", "reordered", "stalls")}
    assert faults == {"lost": 0, "altered": 0, "duplicated": 0, "reordered": 0, "stalls": []}, result
    assert result["received"] == result["sent"] >= 1000 * len(parse_sizes(SIZES))


@both_stores
def test_a_cut_node_is_reached_again_when_it_is_healed(make_lab: MakeLab, store: str) -> None:
    lab = make_lab(2, store=store)
    lab.node("n2").cut()
    assert lab.ping("n1-p1", "n2-p1", count=5).received == 0
    lab.node("n2").heal()
    until("the healed node is reached", lambda: reaches(lab, "n1-p1", "n2-p1"))
    until("and reaches others", lambda: reaches(lab, "n2-p1", "n1-p1"))
    assert all(status_of(node)["ready"] for node in lab.nodes.values())


# --- life of a daemon -----------------------------------------------------------------------------------------


def network_state(lab: Lab, node: str) -> tuple[object, ...]:
    """Index and address of flannel0 and the routes through it."""
    (device,) = json.loads(lab.run(node, ["ip", "-j", "addr", "show", "flannel0"]).stdout)
    routes = json.loads(lab.run(node, ["ip", "-j", "route", "show", "dev", "flannel0"]).stdout)
    addresses = [(entry["local"], entry["prefixlen"]) for entry in device["addr_info"]]
    return device["ifindex"], device["mtu"], addresses, [route["dst"] for route in routes]


@both_stores
def test_a_killed_daemon_leaves_its_device_and_the_next_one_adopts_it(make_lab: MakeLab, store: str) -> None:
    lab = make_lab(2, store=store)
    node = lab.node("n1")
    before, subnet = network_state(lab, "n1"), status_of(node)["lease"]["subnet"]
    assert before[2:] == ([(subnet.split("/")[0], 32)], ["10.244.0.0/16"])
    assert node.stop_daemon(signal.SIGKILL) == -signal.SIGKILL
    assert network_state(lab, "n1") == before
    node.start_daemon()
    assert node.wait_ready()["lease"]["subnet"] == subnet
    assert network_state(lab, "n1") == before
    lab.settle()
    until("traffic flows again", lambda: all(pair.whole for pair in lab.ping_all(count=5)))


def test_an_ordered_stop_gives_the_device_back_and_keeps_the_subnet(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    node = lab.node("n1")
    subnet = status_of(node)["lease"]["subnet"]
    assert node.stop_daemon(signal.SIGTERM) == 0
    assert lab.run("n1", ["ip", "link", "show", "flannel0"], check=False).returncode != 0
    assert "10.244.0.0/16" not in lab.run("n1", ["ip", "route"]).stdout
    lab.run("n1", ["ip", "tuntap", "add", "flannel0", "mode", "tun"])  # a flanneld finds its name free
    lab.run("n1", ["ip", "link", "del", "flannel0"])
    node.start_daemon()
    assert node.wait_ready()["lease"]["subnet"] == subnet
    lab.settle()
    until("traffic flows again", lambda: all(pair.whole for pair in lab.ping_all(count=5)))


def test_a_foreign_flannel0_is_left_alone(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    node = lab.add_node(start=False)
    lab.run(node.name, ["ip", "tuntap", "add", "flannel0", "mode", "tun"])
    node.start_daemon()
    assert node.wait_ready()["device"] == "flannel1"
    node.connect_pods()
    lab.settle()
    until("traffic flows over flannel1", lambda: reaches(lab, "n1-p1", "n2-p1"))


@contextmanager
def holding_port(lab: Lab, node: Node) -> Iterator[int]:
    code = (
        "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((sys.argv[1], 8285));"
        "print('ready', flush=True); input()"
    )
    with python_in(lab, node.name, code, str(node.address.ip)) as process:
        yield process.pid


def test_a_taken_port_ends_the_start_and_names_who_holds_it(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    node = lab.add_node(start=False)
    with holding_port(lab, node) as holder:
        done = lab.run(node.name, node.daemon_argv(), check=False, timeout=60)
        assert done.returncode == 1, done.stderr
        assert "] Error registering network: " in done.stderr, "flannel's words, which guides quote"
        assert "8285" in done.stderr
        assert str(holder) in done.stderr, "the text names the process that holds the port"
        assert "Traceback" not in done.stderr
        assert lab.run(node.name, ["ip", "-o", "link", "show", "type", "tun"]).stdout == ""
        assert "10.244" not in lab.run(node.name, ["ip", "route"]).stdout
        assert not node.subnet_file.exists()
        assert not Path(f"{node.subnet_file}.sock").exists()
    node.start_daemon()
    node.wait_ready()


def test_a_second_daemon_on_the_same_files_ends_and_the_first_goes_on(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    node = lab.node("n1")
    (pid,) = node.pids
    done = lab.run("n1", node.daemon_argv(), check=False, timeout=60)
    assert done.returncode == 1, done.stderr
    assert str(pid) in done.stderr, "the text names the daemon that runs"
    assert status_of(node)["ready"]
    assert reaches(lab, "n1-p1", "n2-p1")


def test_two_labs_stand_side_by_side(make_lab: MakeLab) -> None:
    name = f"s{secrets.token_hex(3)}"
    first, second = make_lab(2, name=name), make_lab(2, name=f"{name}-n1")
    for lab in (first, second):
        assert all(pair.whole for pair in lab.ping_all(count=3))
    assert Lab.destroy(first.name)
    assert all(pair.whole for pair in second.ping_all(count=3))


def test_readyz_and_forward_rules_and_cleanup(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    node = lab.node("n1")
    node.stop_daemon()
    node.start_daemon("-healthz-port=9090")
    node.wait_ready()
    fetch = "import sys, urllib.request as u; print(u.urlopen('http://127.0.0.1:9090' + sys.argv[1]).status)"
    for path in ("/healthz", "/readyz"):
        assert lab.run("n1", [sys.executable, "-c", fetch, path]).stdout == "200\n"
    assert lab.run("n1", ["iptables", "-S"]).stdout.count("10.244.0.0/16") == 2
    node.stop_daemon(signal.SIGKILL)
    lab.run("n1", [*node.daemon_argv(), "-cleanup"])
    assert "10.244.0.0/16" not in lab.run("n1", ["iptables", "-S"]).stdout
    assert lab.run("n1", ["ip", "link", "show", "flannel0"], check=False).returncode != 0


@both_stores
def test_a_daemon_at_rest_is_small(make_lab: MakeLab, store: str) -> None:
    lab = make_lab(2, store=store)
    for node in lab.nodes.values():
        (pid,) = node.pids
        (line,) = [row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith("VmRSS")]
        assert int(line.split()[1]) < 64 * 1024, line
