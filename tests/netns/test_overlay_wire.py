"""The overlay seen from outside: flannel's leases in the store, flannel's datagrams on the wire, and hostile ones.

A foreign node is a plain UDP socket that speaks flannel's wire; packets are made and read by scapy.
"""

from __future__ import annotations

import json
import sys
from ipaddress import IPv4Interface

import pytest
from scapy.layers.inet import IP, UDP

from dataplane.lab import Lab, Node
from tests.netns.conftest import MakeLab
from tests.netns.observing import SUBNETS, both_stores, put_lease, python_in, reaches, status_of, until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]


def drops(node: Node) -> dict[str, int]:
    counters: dict[str, int] = status_of(node)["drops"]
    return counters


def leases(lab: Lab) -> dict[str, str]:
    """Keys and values under the subnets of a lab on etcd, as etcdctl prints them."""
    lines = lab.etcdctl("get", "--prefix", "/coreos.com/network/subnets").stdout.splitlines()
    return dict(zip(lines[::2], lines[1::2], strict=True))


# --- leases ---------------------------------------------------------------------------------------------------


@pytest.mark.etcd
def test_keys_and_values_in_etcd_are_flannels(make_lab: MakeLab) -> None:
    lab = make_lab(2, store="etcd")
    expected = {
        SUBNETS + status_of(node)["lease"]["subnet"].replace("/", "-"): (
            f'{{"PublicIP":"{node.address.ip}","PublicIPv6":null}}'
        )
        for node in lab.nodes.values()
    }
    assert leases(lab) == expected
    for lease in lab.etcdctl("lease", "list").stdout.splitlines()[1:]:
        told = json.loads(lab.etcdctl("lease", "timetolive", lease, "--keys", "-w", "json").stdout)
        assert told["granted-ttl"] == 86_400


@pytest.mark.etcd
def test_an_own_lease_that_is_deleted_is_put_back(make_lab: MakeLab) -> None:
    lab = make_lab(2, store="etcd")
    before = leases(lab)
    key = SUBNETS + status_of(lab.node("n1"))["lease"]["subnet"].replace("/", "-")
    lab.etcdctl("del", key)
    until("the lease is back", lambda: leases(lab) == before, seconds=10)
    lab.settle()
    assert reaches(lab, "n2-p1", "n1-p1")


FOREIGN_NODE = """
import socket, struct, sys
node = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
node.bind((sys.argv[1], 8285))
print("ready", flush=True)
def total(data):
    words = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while words >> 16:
        words = (words & 0xffff) + (words >> 16)
    return ~words & 0xffff
while True:
    packet, peer = node.recvfrom(65535)
    header, icmp = packet[:20], packet[20:]
    if header[0] != 0x45 or header[9] != 1 or icmp[0] != 8:
        continue
    answer = b"\\0" + icmp[1:2] + b"\\0\\0" + icmp[4:]
    answer = answer[:2] + struct.pack("!H", total(answer + b"\\0" * (len(answer) % 2))) + answer[4:]
    node.sendto(header[:12] + header[16:20] + header[12:16] + answer, peer)
"""


@both_stores
@pytest.mark.parametrize(
    "value",
    [
        '{"PublicIP":"198.18.3.3","PublicIPv6":null}',
        '{ "publicip": "198.18.3.3", "PUBLICIPV6": null, "Extra": {"deep": [1, {"x": null}]}, "backendtype": "udp" }',
    ],
    ids=["as flannel writes it", "any case, extra fields"],
)
def test_a_lease_put_by_hand_is_obeyed(make_lab: MakeLab, store: str, value: str) -> None:
    lab = make_lab(2, store=store)
    foreign = lab.add_node(start=False)
    foreign.readdress(IPv4Interface("198.18.3.3/15"))
    with python_in(lab, foreign.name, FOREIGN_NODE, "198.18.3.3"):
        put_lease(lab, "10.244.200.0-24", value)
        for source in ("n1-p1", "n2-p1"):
            ping = ["ping", "-n", "-c", "3", "-i", "0.05", "-W", "1", "10.244.200.9"]
            until("the foreign node answers", lambda: lab.run(source, ping, check=False).returncode == 0)  # noqa: B023  # called at once
    assert reaches(lab, "n1-p1", "n2-p1")


HOSTILE = {
    "foo": '{"PublicIP":"198.18.7.1"}',
    "10.244.300.0-24": '{"PublicIP":"198.18.7.2"}',
    "10.244.201.0-24": "not json",
    "10.244.202.0-24": '{"PublicIP":5}',
    "10.244.203.0-24": '{"PublicIP":"999.1.1.1"}',
    "10.244.204.0-24": "[" * 4000,
    "10.244.205.0-24": '{"PublicIP":"198.18.7.3","BackendData":' + '"x' * 2 + '"' * 3 + "}",
    "10.244.206.0-24": '{"PublicIP":"' + "1" * 8000 + '"}',
    "10.244.207.0-24": "{}",
}


@both_stores
def test_hostile_leases_disturb_nobody(make_lab: MakeLab, store: str) -> None:
    lab = make_lab(2, store=store)
    for key, value in HOSTILE.items():
        put_lease(lab, key, value)
    for node in lab.nodes.values():
        until("all are refused", lambda: set(HOSTILE) <= set(status_of(node)["rejected"]))  # noqa: B023  # called at once
    assert all(pair.whole for pair in lab.ping_all(count=5))
    third = lab.join()  # one that meets them in its first snapshot
    assert all(pair.whole for pair in lab.ping_all(count=5))
    assert len(status_of(third)["peers"]) == 2


# --- the wire -------------------------------------------------------------------------------------------------


SEND = """
import socket, sys
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for line in sys.stdin:
    out.sendto(bytes.fromhex(line), (sys.argv[1], 8285))
"""


def send_datagrams(lab: Lab, source: str, target: str, datagrams: list[bytes]) -> None:
    """Send raw datagrams to a node's port from another node's own address."""
    lab.run(source, [sys.executable, "-c", SEND, target], stdin="".join(f"{data.hex()}\n" for data in datagrams))


def inner_udp(source: str, target: str, payload: bytes) -> bytes:
    """A whole IPv4 packet, made by a library that is not ours."""
    return bytes(IP(src=source, dst=target) / UDP(sport=7, dport=4000) / payload)


def test_a_packet_for_no_node_comes_back_as_unreachable(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    said = lab.run("n1-p1", ["ping", "-n", "-c", "3", "-i", "0.3", "-W", "1", "10.244.254.9"], check=False).stdout
    assert "Net Unreachable" in said
    assert drops(lab.node("n1"))["NO_ROUTE"] == 3
    assert drops(lab.node("n2"))["NO_ROUTE"] == 0


def test_bad_datagrams_are_dropped_and_counted_each_by_its_reason(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    lab.add_node(start=False)  # a machine without a lease
    node, pod, peer_pod = lab.node("n1"), lab.address_of("n1-p1"), lab.address_of("n2-p1")
    good = inner_udp(peer_pod, pod, b"x" * 50)
    cases = [
        ("n3", "UNKNOWN_PEER", [good] * 5),
        ("n2", "SPOOFED_SOURCE", [inner_udp("10.244.253.9", pod, b"y"), inner_udp("192.0.2.1", pod, b"z")]),
        ("n2", "LENGTH", [good[:-1], good[:40]]),
        ("n2", "NOT_IP", [b"\0" * 60, b"\xff", good[:10]]),
    ]
    before = drops(node)
    for source, reason, datagrams in cases:
        send_datagrams(lab, source, str(node.address.ip), datagrams)
        before[reason] += len(datagrams)
        until(f"{reason} is counted", lambda: drops(node) == before, seconds=5)
    assert "198.18.1.3" in status_of(node)["unknown_sources"]
    assert reaches(lab, "n1-p1", "n2-p1")
    assert drops(node) == before


RECEIVE = """
import socket
sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sink.bind(("", 4000))
print("ready", flush=True)
print(sink.recv(65535).hex(), flush=True)
"""


@pytest.mark.parametrize("length", [1473, 1800, 8000])
def test_a_datagram_longer_than_our_mtu_is_delivered_whole(make_lab: MakeLab, length: int) -> None:
    lab = make_lab(2)
    payload = bytes(index * 7 % 251 for index in range(length - 28))
    with python_in(lab, "n1-p1", RECEIVE) as sink:
        packet = inner_udp(lab.address_of("n2-p1"), lab.address_of("n1-p1"), payload)
        assert len(packet) == length
        send_datagrams(lab, "n2", str(lab.node("n1").address.ip), [packet])
        assert sink.stdout is not None
        assert bytes.fromhex(sink.stdout.readline()) == payload


def test_what_leaves_the_wire_is_the_packet_and_nothing_else(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    foreign = lab.add_node(start=False)
    code = (
        "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((sys.argv[1], 8285));"
        "print('ready', flush=True); d, peer = s.recvfrom(65535); print(d.hex(), *peer, flush=True)"
    )
    with python_in(lab, foreign.name, code, str(foreign.address.ip)) as wire:
        put_lease(lab, "10.244.200.0-24", f'{{"PublicIP":"{foreign.address.ip}","PublicIPv6":null}}')
        until("the lease is known", lambda: status_of(lab.node("n1"))["peers"])
        send = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'hello', ('10.244.200.9', 99))"
        lab.run("n1-p1", [sys.executable, "-c", send])
        assert wire.stdout is not None
        data, address, port = wire.stdout.readline().split()
    packet = IP(bytes.fromhex(data))
    assert (address, port) == ("198.18.1.1", "8285")
    assert (packet.src, packet.dst, packet[UDP].dport) == (lab.address_of("n1-p1"), "10.244.200.9", 99)
    assert bytes(packet[UDP].payload) == b"hello"
    assert packet.ttl == 63, "one hop: the pod's node; the tunnel takes none"
