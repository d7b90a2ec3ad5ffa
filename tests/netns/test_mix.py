"""Clusters that mix: VXLAN in the kernel, in userspace and made by hand, IPv4 and IPv6, in every profile of offloads;
and leases of nodes that speak another language."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest

from dataplane.bench import profile
from dataplane.lab import Lab, measure
from dataplane.path.capability import Capability
from tests.netns.conftest import MakeLab
from tests.netns.flannel_node import FlannelNode
from tests.netns.observing import SUBNETS, both_stores, put_lease, status_of, until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600)]

TCP_BYTES = 2_000_000
NODES = ("n1", "n2", "n3")
ALL_WAYS = [[("n1", "n2"), ("n2", "n3"), ("n3", "n1")], [("n2", "n1"), ("n3", "n2"), ("n1", "n3")]]
OUR_WAYS = [[("n1", "n2"), ("n2", "n3")], [("n2", "n1"), ("n3", "n2")]]
"""Those on which our own path carries: n2 is the node in userspace."""
UNDERLAY_PROFILES = {
    "tx off": {"tx": False},
    "tx on, gro": {"tx": True, "gro": True},
    **{name: profile.load(name).ethtool for name in ("p2", "p2x", "p3")},
}
"""On top of each other; the last are those of `loden bench`, of which each takes more away. "As is" is its p1."""
HURT = ("LENGTH", "SEND_FAILED", "TUN_WRITE", "SUPERFRAME", "SPOOFED_SOURCE", "UNKNOWN_PEER", "RESERVED_BITS")


def sizes_of(mtu: int, version: int) -> str:
    """Up to a whole packet, the first that is fragmented, and the largest there is."""
    whole = mtu - (28 if version == 4 else 48)
    return f"1,17,64,512,{min(1400, whole - 1)},{whole},{whole + 1},8000,65507"


def carry_everything(lab: Lab, how: str, ways: list[list[tuple[str, str]]] = ALL_WAYS) -> None:
    """TCP and UDP from node to node, by every IP version; of `ways`, what stands together at the same time."""
    mtu = min(status_of(lab.node(name))["mtu"] for name in ("n1", "n2"))
    for version in lab.settings.versions:
        for pairs in ways:
            with ThreadPoolExecutor(len(pairs)) as pool:
                done = [pool.submit(carry, lab, one, other, version, mtu, how) for one, other in pairs]
            for future in done:
                future.result()


def carry(lab: Lab, one: str, other: str, version: int, mtu: int, how: str) -> None:
    source, target = f"{one}-p1", f"{other}-p1"
    where = f"{how}: {source} to {target}, IPv{version}"
    with lab.traffic("tcp", source, target, f"--bytes={TCP_BYTES}", version=version) as run:
        result = measure.verdict(run, 120)
    assert result["equal"], (where, result)
    flags = (f"--sizes={sizes_of(mtu, version)}", "--count=16")
    with lab.traffic("udp", source, target, *flags, version=version) as run:
        result = measure.verdict(run, 120)
    faults = {name: result[name] for name in ("lost", "altered", "duplicated", "stalls")}
    assert faults == {"lost": 0, "altered": 0, "duplicated": 0, "stalls": []}, (where, result)


def set_features(lab: Lab, device: str, nodes: tuple[str, ...], features: Mapping[str, bool]) -> None:
    words = [word for name, state in features.items() for word in (name, "on" if state else "off")]
    for name in nodes:
        lab.run(name, ["ethtool", "-K", device, *words])


@pytest.mark.etcd
def test_kernel_userspace_and_a_node_made_by_hand_carry_everything(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend="vxlan", dataplane="kernel,userspace", families="46", store="etcd")
    FlannelNode(lab).raise_up()
    for name in ("n1", "n2"):
        until("the lease is known", lambda: len(status_of(lab.node(name))["peers"]) == 4)  # noqa: B023  # called at once
    assert [status_of(lab.node(name))["dataplane"] for name in ("n1", "n2")] == ["kernel", "userspace"]
    until("all pairs answer", lambda: all(pair.whole for pair in lab.ping_all(count=5)))

    carry_everything(lab, "as is")
    for name, features in UNDERLAY_PROFILES.items():
        set_features(lab, "eth0", NODES, features)
        carry_everything(lab, name, OUR_WAYS)
    for state, what in ((False, "no offloads of the vxlan devices"), (True, "and all of them again")):
        for device in ("flannel.1", "flannel-v6.1"):
            set_features(lab, device, ("n1", "n3"), dict.fromkeys(("tx", "gso", "gro"), state))
        carry_everything(lab, what, OUR_WAYS)
    node = lab.node("n2")
    node.stop_daemon()
    node.start_daemon(*(f"--{capability.word}=false" for capability in Capability))
    node.wait_ready()
    until("all pairs answer", lambda: all(pair.whole for pair in lab.ping_all(count=2)))
    carry_everything(lab, "no capabilities of ours", OUR_WAYS)

    drops = status_of(node)["drops"]
    assert {reason: drops[reason] for reason in HURT} == dict.fromkeys(HURT, 0)


OTHERS = {
    "udp": '{"PublicIP":"198.18.1.77","PublicIPv6":null}',
    "host-gw": '{"PublicIP":"198.18.1.77","PublicIPv6":null,"BackendType":"host-gw"}',
    "vxlan": '{"PublicIP":"198.18.1.77","PublicIPv6":null,"BackendType":"vxlan",'
    '"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}}',
    "wireguard": '{"PublicIP":"198.18.1.77","PublicIPv6":null,"BackendType":"wireguard","BackendData":{}}',
}
V6_ONLY = (
    '{"PublicIP":"0.0.0.0","PublicIPv6":"fd00:198:18::77","BackendType":"vxlan",'
    '"BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:00:78"}}'
)


@pytest.mark.parametrize(
    ("backend", "dataplane"), [("vxlan", "kernel,userspace"), ("udp", ""), ("host-gw", "")], ids=lambda value: value
)
def test_a_peer_of_another_backend_is_ignored_with_the_reason(make_lab: MakeLab, backend: str, dataplane: str) -> None:
    lab = make_lab(2, backend=backend, dataplane=dataplane)
    before = {name: lab.run(name, ["ip", "route"]).stdout for name in lab.nodes}
    foreign = [kind for kind in OTHERS if kind != backend]
    for number, kind in enumerate(foreign):
        put_lease(lab, f"10.244.{250 + number}.0-24", OTHERS[kind])
    put_lease(lab, "0.0.0.0-0&fd00:10:244:77::-64", V6_ONLY)
    for node in lab.nodes.values():
        until(
            "all are ignored",
            lambda: (status := status_of(node))["rejected"] and len(status["ignored"]) == len(foreign),  # noqa: B023  # called at once
        )
        status = status_of(node)
        assert len(status["peers"]) == 1
        for number, kind in enumerate(foreign):
            named = "udp or alloc" if kind == "udp" else kind
            assert f"its node uses backend '{named}'" in status["ignored"][f"10.244.{250 + number}.0/24"]
        assert "0.0.0.0-0&fd00:10:244:77::-64" in status["rejected"]
        assert lab.run(node.name, ["ip", "route"]).stdout == before[node.name]
        for family in ("-4", "-6"):
            assert lab.run(node.name, ["ip", family, "route", "show", "default"]).stdout == ""
    sent = lab.run("n1-p1", ["ping", "-n", "-c", "2", "-i", "0.1", "-W", "1", "10.244.250.9"], check=False)
    assert sent.returncode == 1, sent.stdout
    assert all(pair.whole for pair in lab.ping_all(count=5))


@both_stores
def test_a_network_of_ipv6_alone(make_lab: MakeLab, store: str) -> None:
    lab = make_lab(3, backend="vxlan", dataplane="userspace,userspace,kernel", families="6", store=store)
    assert all(pair.whole for pair in lab.ping_all(count=5))
    carry_everything(lab, store)
    for node in lab.nodes.values():
        status = status_of(node)
        assert (status["lease"]["subnet"], status["lease"]["public_ip"]) == (None, "0.0.0.0")
        assert lab.run(node.name, ["ip", "-4", "route"]).stdout == ""
        assert lab.run(node.name, ["ip", "-6", "route", "show", "default"]).stdout == ""
    if store == "etcd":
        lines = lab.etcdctl("get", "--prefix", SUBNETS).stdout.splitlines()
        assert len(lines) == 6
        assert all(key.removeprefix(SUBNETS).startswith("0.0.0.0-0&fd00:10:244:") for key in lines[::2])
        assert {json.loads(value)["PublicIP"] for value in lines[1::2]} == {"0.0.0.0"}
