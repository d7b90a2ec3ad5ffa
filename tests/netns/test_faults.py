"""Faults made on purpose, in one lab, and whether `loden explain` and `loden status` name the cause.

Every fault is taken back before the next; the tests of this file share the lab and run in order on one worker.
"""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dataplane.lab import Lab, Settings
from tests.examples import documented, normal
from tests.netns.conftest import MakeLab
from tests.netns.observing import python_in, reaches, status_of, until
from tests.netns.test_capture import capturing
from tests.netns.test_wire_capture import SEND, pairs_of

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600), pytest.mark.xdist_group("faults")]

LODEN = (sys.executable, "-P", "-m", "dataplane.cli")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    name = f"f{secrets.token_hex(4)}"
    try:
        yield Lab.create(name, 2, Settings())
    finally:
        Lab.destroy(name)


def loden(lab: Lab, node: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    argv = [*LODEN, *words, f"--subnet-file={lab.node(node).subnet_file}"]
    done = lab.run(node, argv, check=False, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    if check:
        assert done.returncode in (0, 1), done.stderr
    return done


def explain(lab: Lab, address: str, *words: str, node: str = "n1") -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(loden(lab, node, "explain", address, "--json", *words).stdout)
    return answer


@contextmanager
def rules(lab: Lab, member: str, text: str) -> Iterator[None]:
    """nftables of a node, in a table of its own."""
    lab.run(member, ["nft", "-f", "-"], stdin=f"table inet fault {{\n{text}\n}}\n")
    try:
        yield
    finally:
        lab.run(member, ["nft", "delete", "table", "inet", "fault"])


def mended(lab: Lab) -> None:
    """The fault is gone with its cause."""
    until("both pods reach each other", lambda: reaches(lab, "n1-p1", "n2-p1") and reaches(lab, "n2-p1", "n1-p1"))
    answer = explain(lab, lab.address_of("n2-p1"))
    assert answer["verdict"].endswith("answers inside the overlay, also at the MTU"), answer


def names(answer: dict[str, Any], cause: str, command: str) -> None:
    assert answer["verdict"].startswith(cause), answer
    assert command in answer["command"], answer


def test_nothing_is_wrong(lab: Lab) -> None:
    done = loden(lab, "n1", "explain", lab.address_of("n2-p1"))
    assert done.returncode == 0
    assert normal(done.stdout) == normal(documented("explain-well"))
    status = loden(lab, "n1", "status")
    assert status.returncode == 0
    assert normal(status.stdout) == normal(documented("status"))


def test_the_own_pods_and_what_is_not_of_the_overlay(lab: Lab) -> None:
    assert "local to this node" in explain(lab, lab.address_of("n1-p1"))["verdict"]
    assert "lies outside the overlay" in json.dumps(explain(lab, "192.0.2.1"))
    assert explain(lab, "198.18.1.2")["verdict"].startswith("198.18.1.2 is reached")


def test_without_probes_nothing_is_sent(lab: Lab) -> None:
    before = status_of(lab.node("n1"))["peers"]
    answer = explain(lab, lab.address_of("n2-p1"), "--no-probe")
    assert answer["probes"] is None
    assert "no probe was sent" in answer["verdict"]
    after = status_of(lab.node("n1"))["peers"]
    assert before[0]["tx_packets"] == after[0]["tx_packets"]


def test_lease_missing(lab: Lab) -> None:
    done = loden(lab, "n1", "explain", "10.244.255.7")
    assert done.returncode == 1
    assert normal(done.stdout) == normal(documented("explain-no-lease"))
    names(explain(lab, "10.244.255.7"), "no lease covers 10.244.255.7", "loden status")


def test_route_deleted(lab: Lab) -> None:
    """The daemon puts it back, and status says that it had to."""
    node = lab.node("n1")
    before = status_of(node)["repairs"]
    lab.run("n1", ["ip", "route", "del", "10.244.0.0/16"])
    until("the route is back", lambda: status_of(node)["repairs"] > before)
    (line,) = [line for line in loden(lab, "n1", "status").stdout.splitlines() if line.startswith("repairs")]
    assert "what others took away or changed was put right" in line
    mended(lab)


def test_a_rule_before_the_route(lab: Lab) -> None:
    rule = ["to", "10.244.0.0/16", "unreachable"]
    lab.run("n1", ["ip", "rule", "add", *rule])
    try:
        names(explain(lab, lab.address_of("n2-p1")), "there is no route to", "ip rule")
    finally:
        lab.run("n1", ["ip", "rule", "del", *rule])
    mended(lab)


def test_a_route_that_leads_elsewhere(lab: Lab) -> None:
    pod = lab.address_of("n2-p1")
    lab.run("n1", ["ip", "route", "add", pod, "dev", "eth0"])
    try:
        names(explain(lab, pod), f"the route to {pod} leads to eth0, not into flannel0", "ip route")
    finally:
        lab.run("n1", ["ip", "route", "del", pod])
    mended(lab)


@pytest.mark.parametrize(
    ("member", "hook", "rule", "where"),
    [
        ("n1", "output", "udp dport 8285 drop", "this node's own firewall refuses"),
        ("n1", "input", "udp dport 8285 drop", "chain c: udp dport 8285 drop"),
        ("n2", "input", "udp dport 8285 drop", "nothing passes UDP port 8285"),
    ],
)
def test_port_blocked_by_nft(lab: Lab, member: str, hook: str, rule: str, where: str) -> None:
    with rules(lab, member, f"chain c {{ type filter hook {hook} priority 0; {rule}; }}"):
        answer = explain(lab, lab.address_of("n2-p1"))
        names(answer, "port blocked", "nft")
        assert where in answer["verdict"]
        if member == "n2":
            done = loden(lab, "n1", "explain", lab.address_of("n2-p1"))
            assert normal(done.stdout) == normal(documented("explain-blocked"))
    mended(lab)


@pytest.mark.parametrize(("member", "device"), [("n1", "eth0"), ("switch", "n1")])
def test_mtu_too_large(lab: Lab, member: str, device: str) -> None:
    node = lab.node("n1")
    before = status_of(node)["mtu"]
    lab.run(member, ["ip", "link", "set", device, "mtu", "1400"])
    try:
        names(
            explain(lab, lab.address_of("n2-p1")),
            "MTU too large",
            "ip link set eth0" if member == "n1" else "ping -M do",
        )
    finally:
        lab.run(member, ["ip", "link", "set", device, "mtu", "1500"])
    until("the node has followed its interface back", lambda: status_of(node)["mtu"] == before)
    mended(lab)


def test_device_down_and_a_node_that_forwards_nothing(lab: Lab) -> None:
    lab.run("n1", ["sysctl", "-q", "-w", "net.ipv4.ip_forward=0"])
    names(explain(lab, lab.address_of("n2-p1")), "this node forwards no packets", "sysctl -w net.ipv4.ip_forward=1")
    lab.run("n1", ["sysctl", "-q", "-w", "net.ipv4.ip_forward=1"])
    mended(lab)


def test_peer_down(lab: Lab) -> None:
    lab.node("n2").cut()
    try:
        names(explain(lab, lab.address_of("n2-p1")), "peer down", "ping 198.18.1.2")
    finally:
        lab.node("n2").heal()
    mended(lab)


def test_the_peers_daemon_down(lab: Lab) -> None:
    pod = lab.address_of("n2-p1")
    assert lab.node("n2").stop_daemon() == 0
    try:
        answer = explain(lab, pod)
        names(answer, "peer down: the node 198.18.1.2 is up, but nothing listens at its UDP port 8285", "systemctl")
    finally:
        lab.node("n2").start_daemon()
        lab.node("n2").wait_ready()
    lab.settle()
    mended(lab)


SPOOF = """
import socket, sys
from scapy.layers.inet import IP, UDP
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(7):
    s.sendto(bytes(IP(src="10.244.99.9", dst=sys.argv[1]) / UDP(sport=1, dport=2) / b"spoof"), ("198.18.1.1", 8285))
print("ready", flush=True)
input()
"""


def test_source_spoofed(lab: Lab) -> None:
    before = status_of(lab.node("n1"))["drops"]["SPOOFED_SOURCE"]
    lines: list[str] = []

    def capture() -> None:
        with lab.open_process("n1", capture_argv(lab, "n1", "--drops", "-c", "7")) as process:
            until("a capture runs", lambda: captures_running(lab))
            with python_in(lab, "n2", SPOOF, lab.address_of("n1-p1")):
                output, _ = process.communicate(timeout=30)
            lines.extend(output.splitlines())

    capture()
    status = loden(lab, "n1", "status").stdout
    assert status_of(lab.node("n1"))["drops"]["SPOOFED_SOURCE"] == before + 7
    (line,) = [line for line in status.splitlines() if line.startswith("SPOOFED_SOURCE")]
    assert "the inner source is not the sending node's" in line
    assert len(lines) == 7
    assert normal(lines[0]) == normal(documented("capture-drops"))


def capture_argv(lab: Lab, node: str, *words: str) -> list[str]:
    return [*LODEN, "capture", *words, f"--subnet-file={lab.node(node).subnet_file}"]


def captures_running(lab: Lab) -> bool:
    return bool(status_of(lab.node("n1"))["captures"])


def test_checksum_broken(lab: Lab) -> None:
    """As by a driver that breaks checksums: what n2 computed in software is changed where n1 receives it."""
    lab.run("n2", ["ethtool", "-K", "eth0", "tx", "off"])
    chain = "chain c { type filter hook ingress device eth0 priority 0; udp sport 8285 udp checksum set 0x1234; }"
    lab.run("n1", ["nft", "-f", "-"], stdin=f"table netdev fault {{\n{chain}\n}}\n")
    try:
        names(explain(lab, lab.address_of("n2-p1")), "checksum broken: 198.18.1.2 sends", "ethtool -K eth0 tx off")
        assert "InCsumErrors" in loden(lab, "n1", "status").stdout
    finally:
        lab.run("n1", ["nft", "delete", "table", "netdev", "fault"])
        lab.run("n2", ["ethtool", "-K", "eth0", "tx", "on"])
    mended(lab)


def test_wrong_public_ip(lab: Lab) -> None:
    node = lab.node("n2")
    node.stop_daemon()
    node.start_daemon("-public-ip=198.18.9.9")
    node.wait_ready()
    lab.settle()
    lab.ping("n2-p1", "n1-p1", count=3)
    try:
        answer = explain(lab, lab.address_of("n2-p1"))
        names(answer, "wrong public IP", "-public-ip=198.18.1.2")
        assert "names 198.18.9.9, but datagrams come from 198.18.1.2" in answer["verdict"]
        assert "unknown source 198.18.1.2" in loden(lab, "n1", "status").stdout
    finally:
        node.stop_daemon()
        node.start_daemon()
        node.wait_ready()
        lab.settle()
    until("both pods reach each other", lambda: reaches(lab, "n1-p1", "n2-p1"))


def test_mac_changed_where_the_daemon_carries_vxlan(make_lab: MakeLab, tmp_path: Path) -> None:
    """The same datagram from the same node, with another MAC in its frame than its lease has."""
    lab = make_lab(2, backend="vxlan", dataplane="userspace")
    path = tmp_path / "n2.pcapng"
    with capturing(lab, "n2", "-c", "1", "--tx", "-w", str(path), "icmp") as process:
        lab.ping("n2-p1", "n1-p1", count=1)
        process.wait(30)
    ((_, outer),) = pairs_of(path)
    frame = bytearray(outer.data[28:])
    frame[8 + 11] ^= 1
    with python_in(lab, "n2", SEND, "198.18.1.1", frame.hex()):
        until("it is counted", lambda: status_of(lab.node("n1"))["drops"]["PEER_MAC"] == 1)
    (line,) = [line for line in loden(lab, "n1", "status").stdout.splitlines() if line.startswith("PEER_MAC")]
    assert "it changed, and its lease did not" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("explain", "nonsense"), "does not appear to be an IPv4 or IPv6 address"),
        (("capture", "hots", "10.1.1.1"), "did you mean `host`"),
        (("capture", "--pod", "nonsense"), "--pod: 'nonsense'"),
        (("capture", "-s", "0"), "-s 0"),
        (("capture", "--json", "-w", "a.pcapng"), "--json is another form of the lines"),
        (("capture", "--for", "soon"), "use a time such as 10s"),
        (("capture", "--keep", "3"), "need a file"),
        (("capture", "--keep", "-1", "-w", "a.pcapng", "--rotate-size", "1M"), "--keep -1"),
        (("capture", "--peer", "and"), "--peer and: expected a node"),
        (("capture", "--port", "80 or port 90"), "--port takes one word"),
        (("capture", "--buffer", "0"), "--buffer 0"),
        (("capture", "-w", "/nowhere/a.pcapng", "-c", "1"), "cannot write /nowhere/a.pcapng"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(lab: Lab, words: tuple[str, ...], said: str) -> None:
    done = loden(lab, "n1", *words)
    assert done.returncode == 1
    assert said in done.stderr


def test_a_peer_that_there_is_not_and_all_the_words_for_one_that_there_is(lab: Lab) -> None:
    done = loden(lab, "n1", "capture", "--peer", "node-b")
    assert done.returncode == 1
    assert normal(done.stderr) == normal(documented("capture-no-peer"))
    subnet = status_of(lab.node("n2"))["lease"]["subnet"]
    for word in ("198.18.1.2", subnet, lab.address_of("n2-p1")):
        with lab.open_process("n1", capture_argv(lab, "n1", "-q", "-c", "1", "--tx", "--peer", word)) as process:
            until("a capture runs", lambda: captures_running(lab))
            lab.ping("n1-p1", "n2-p1", count=1)
            output, _ = process.communicate(timeout=30)
        assert f"peer=198.18.1.2 lease={subnet}" in output


def test_status_lives_with_rates_or_as_json(lab: Lab) -> None:
    flag = f"--subnet-file={lab.node('n1').subnet_file}"
    for words in ([], ["--json"]):
        with lab.open_process("n1", [*LODEN, "status", "--watch", *words, flag]) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            page = [first] + [process.stdout.readline() for _ in range(0 if words else 7)]
            lab.ping("n1-p1", "n2-p1", count=20)  # over the borders of seconds
            for _ in range(0 if words else 40):
                page.append(process.stdout.readline())
                if "RX  " in page[-1]:
                    break
            process.kill()
        if words:
            assert json.loads(first)["pumps"]["tx"].keys() == json.loads(first)["pumps"]["rx"].keys()
        else:
            assert any("TX packets/s" in line for line in page), page
            assert re.search(r"^RX  \d+ packets/s, \d\.\d a message; \d+ wake-ups/s$", page[-1]), page


@pytest.mark.parametrize("verb", [("status",), ("explain", "10.244.1.2"), ("capture",)])
def test_no_daemon_is_said_and_where_it_was_looked_for(lab: Lab, verb: tuple[str, ...]) -> None:
    for words, said in (
        (("--control-socket=/run/nothing.sock",), "no daemon answers at /run/nothing.sock: is flanneld running"),
        ((f"--control-socket={lab.directory}/lab.json",), "no daemon answers at"),
    ):
        done = lab.run("n1", [*LODEN, *verb, *words], check=False)
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_another_user_is_not_answered(lab: Lab) -> None:
    argv = ["setpriv", "--reuid=65534", "--clear-groups", *LODEN, "status"]
    done = lab.run("n1", [*argv, f"--subnet-file={lab.node('n1').subnet_file}"], check=False)
    assert done.returncode != 0
    assert "ready" not in done.stdout
