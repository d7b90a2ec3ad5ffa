"""VXLAN in userspace, between nodes of ours and with a kernel device that was made by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from dataplane.backend.base import Underlay
from dataplane.backend.userspace import Tuning
from dataplane.backend.vxlan import VxlanBackend, VxlanWire
from dataplane.kernel.netlink import Netlink
from dataplane.path.capability import EVERYTHING, Capability
from dataplane.path.datapath import SourceCheck
from tests.backend.tunnels import NETWORKS, Node, Service, ping, tcp_roundtrip, udp_exchange
from tests.namespaces import Namespace, open_namespaces

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

MTU = 1430


def userspace(
    *, off: frozenset[Capability] = frozenset(), versions: tuple[int, ...] = (4, 6), ports: int = 8, **changes: Any
) -> Any:
    """What Node.start wants."""

    def make(facing: Underlay, netlink: Netlink, _node: Node) -> VxlanBackend:
        kept: dict[str, Any] = {"mac": b"", "on_mac": lambda _: None, "on_device": lambda _: None, **changes}
        tuning = Tuning(SourceCheck.NODE, EVERYTHING - off, 0.0)
        networks = [NETWORKS[version] for version in versions]
        return VxlanBackend(facing, networks, VxlanWire(1, 8472, source_ports=ports), netlink, tuning, **kept)

    return make


@contextlib.contextmanager
def overlay(count: int = 2) -> Iterator[tuple[list[Node], Namespace]]:
    """Nodes on one switch, each with a pod, without a backend yet."""
    with open_namespaces(2 * count + 1) as (switch, *places):
        switch.command("ip", "link", "add", "br0", "type", "bridge")
        switch.command("ip", "link", "set", "br0", "up")
        nodes = [Node(n + 1, places[2 * n], places[2 * n + 1]) for n in range(count)]
        try:
            for node in nodes:
                node.plug_in(switch)
                node.add_pod(MTU)
            yield nodes, switch
        finally:
            for node in nodes:
                node.stop()


def carries_everything(one: Node, two: Node, version: int) -> None:
    with contextlib.ExitStack() as stack:
        for node in (one, two):
            stack.callback(Service(node, version).close)
        head = 28 if version == 4 else 48
        sizes = [1, 2, 18, 64, 500, MTU - head - 1, MTU - head]
        for source, target in ((one, two), (two, one)):
            assert ping(source, target, version).returncode == 0
            udp_exchange(source, target, version, sizes * 3)
            udp_exchange(source, target, version, [4000, 9000])  # fragments
            udp_exchange(source, target, version, [200] * 20, segment=200)
            udp_exchange(source, target, version, [1000] * 19 + [10], segment=1000)
            udp_exchange(source, target, version, [100, 50], segment=100)
            for size in (1 << 16, 20 << 20):
                tcp_roundtrip(source, target, version, size)


@pytest.mark.parametrize("version", [4, 6])
def test_two_nodes_of_ours_carry_everything(version: int) -> None:
    with overlay() as ((one, two), _):
        for node in (one, two):
            node.start(userspace())
        one.learn(two)
        two.learn(one)
        carries_everything(one, two, version)
        for node in (one, two):
            assert set(node.drops()) <= {"NO_ROUTE"}


PROFILES = {
    "as it is": "",
    "without tunnel segmentation": "tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off",
    "nothing merged": "tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off gro on tx-udp-segmentation off",
    "nothing offloaded": "tx off tso off gso off gro off",
}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES.keys())
def test_with_a_kernel_vtep_everything_is_carried(version: int, profile: str) -> None:
    with overlay() as ((ours, kernels), _):
        for node in (ours, kernels):
            if profile:
                node.machine.command("ethtool", "-K", "eth0", *profile.split())
        kernels.make_kernel_vtep()
        ours.start(userspace())
        ours.learn(kernels)
        kernels.program(ours)
        carries_everything(ours, kernels, version)
        assert set(ours.drops()) <= {"NO_ROUTE"}
