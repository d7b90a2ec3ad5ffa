"""`explain` at a kernel VTEP, in a namespace of its own and without a daemon, which would mend the fault at once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

import pytest

from dataplane.backend.base import BackendStatus, PeerStatus, Underlay
from dataplane.debug.explain import explain
from dataplane.debug.verdict import Account, Node
from dataplane.errors import DropReason
from dataplane.lease.model import Lease, LeaseAttrs, LeaseKey
from tests.namespaces import Namespace, open_namespace

pytestmark = pytest.mark.netns

HERE, THERE = IPv4Address("198.18.1.1"), IPv4Address("198.18.1.2")
THEIRS = IPv4Network("10.244.2.0/24")
POD = IPv4Address("10.244.2.7")
MAC, OLD_MAC = "02:00:00:00:00:22", "02:00:00:00:00:99"


def lease(subnet: str, address: IPv4Address) -> Lease:
    data = json.dumps({"VNI": 1, "VtepMAC": MAC}).encode()
    attrs = LeaseAttrs(address, backend_type="vxlan", backend_data=data)
    return Lease(LeaseKey(IPv4Network(subnet)), attrs, create_revision=1, mod_revision=1)


def node() -> Node:
    """What a daemon of the kernel's VXLAN would tell."""
    status = BackendStatus(
        type="vxlan",
        device="flannel.1",
        mtu=1450,
        peers=(PeerStatus(THEIRS, THERE, 0, 0, 0, 0, None),),
        drops=dict.fromkeys(DropReason, 0),
        unknown_sources={},
        ignored={},
        capabilities={},
    )
    return Node(
        own=lease("10.244.1.0/24", HERE),
        fenced=False,
        store="etcd",
        store_error=None,
        networks=(IPv4Network("10.244.0.0/16"),),
        peers={"10.244.2.0-24": lease("10.244.2.0/24", THERE)},
        rejected={"10.244.8.0-24": "subnet overlaps 10.244.8.0-23, which is the older lease"},
        facing=Underlay("eth0", 2, HERE, HERE, 1500),
        port=8472,
        status=status,
    )


@pytest.fixture(scope="module")
def vtep() -> Iterator[Namespace]:
    """A node as the kernel's VXLAN leaves it, its cable to nowhere."""
    with open_namespace() as made:
        for command in (
            "ip link add eth0 type veth peer name cable",
            "ip link set cable up",
            f"ip addr add {HERE}/15 dev eth0",
            "ip link set eth0 up",
            f"ip link add flannel.1 mtu 1450 type vxlan id 1 local {HERE} dev eth0 dstport 8472 nolearning",
            "ip addr add 10.244.1.0/32 dev flannel.1",
            "ip link set flannel.1 up",
            f"ip route add {THEIRS} via {THEIRS[0]} dev flannel.1 onlink",
            "sysctl -q -w net.ipv4.ip_forward=1",
        ):
            made.command(*command.split())
        yield made


def entries(vtep: Namespace, *, mac: str = MAC, where: IPv4Address = THERE) -> None:
    vtep.command(*f"ip neigh replace {THEIRS[0]} lladdr {mac} dev flannel.1 nud permanent".split())
    vtep.command(*f"bridge fdb replace {MAC} dev flannel.1 dst {where} self permanent".split())


def account(vtep: Namespace, address: IPv4Address = POD) -> Account:
    return vtep.run(explain, address, node, probing=False)


def test_neighbour_and_fdb_as_the_lease_says(vtep: Namespace) -> None:
    entries(vtep)
    found = account(vtep)
    assert "no probe was sent" in found.verdict
    assert {"neighbour", "FDB", "route", "underlay"} <= {step.name for step in found.steps}


def test_fdb_wrong(vtep: Namespace) -> None:
    entries(vtep, where=IPv4Address("198.18.9.9"))
    found = account(vtep)
    assert found.verdict == f"the FDB of flannel.1 sends {MAC} to 198.18.9.9, not to {THERE}"
    vtep.command(*found.command.split())
    assert "no probe was sent" in account(vtep).verdict, "the command mends it"


def test_mac_changed(vtep: Namespace) -> None:
    entries(vtep, mac=OLD_MAC)
    found = account(vtep)
    assert found.verdict == f"neighbour {THEIRS[0]} has MAC {OLD_MAC}, its lease says {MAC}"
    vtep.command(*found.command.split())
    assert "no probe was sent" in account(vtep).verdict, "the command mends it"


def test_a_device_that_is_down(vtep: Namespace) -> None:
    entries(vtep)
    vtep.command("ip", "link", "set", "flannel.1", "down")
    found = account(vtep)
    assert found.verdict == "device flannel.1 is down"
    vtep.command(*found.command.split())
    vtep.command(*f"ip route add {THEIRS} via {THEIRS[0]} dev flannel.1 onlink".split())
    entries(vtep)
    assert "no probe was sent" in account(vtep).verdict


@pytest.mark.parametrize(
    ("carried", "fault"),
    [(True, "lease 10.244.2.0-24 is not obeyed as it is: "), (False, "packets for 10.244.2.0/24 are not carried: ")],
)
def test_a_lease_that_its_backend_does_not_obey_is_the_fault(vtep: Namespace, carried: bool, fault: str) -> None:
    """Also where its node is reached by what it said before: it is the lease that has to be put right."""
    whole, reason = node(), "its VtepMAC is all zero"
    peers = whole.status.peers if carried else ()
    status = dataclasses.replace(whole.status, peers=peers, ignored={THEIRS: reason})
    found = vtep.run(explain, POD, lambda: dataclasses.replace(whole, status=status), probing=False)
    assert found.verdict == fault + reason


def test_a_lease_that_is_not_obeyed_is_named(vtep: Namespace) -> None:
    found = account(vtep, IPv4Address("10.244.8.9"))
    assert found.verdict.startswith("the lease 10.244.8.0-24 that covers 10.244.8.9 is not obeyed: subnet overlaps")
