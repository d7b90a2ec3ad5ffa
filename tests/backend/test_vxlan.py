"""VXLAN in userspace, between nodes of ours and with a kernel device that was made by hand."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from ipaddress import IPv4Address
from typing import Any

import pytest

from dataplane.backend.base import Underlay
from dataplane.backend.userspace import Tuning
from dataplane.backend.vxlan import VxlanBackend, VxlanWire
from dataplane.bench import profile
from dataplane.bench.profile import Profile
from dataplane.errors import KernelError
from dataplane.kernel.netlink import Netlink
from dataplane.lease.model import LeaseAttrs, LeaseEventKind
from dataplane.path.capability import EVERYTHING, Capability
from dataplane.path.facts import SourceCheck
from tests.backend.tunnels import NETWORKS, Node, carries_everything, overlay, ping, wait_until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]


def userspace(
    *, off: frozenset[Capability] = frozenset(), versions: tuple[int, ...] = (4, 6), ports: int = 8, **changes: Any
) -> Any:
    """What Node.start wants."""

    def make(facing: Underlay, netlink: Netlink, _node: Node) -> VxlanBackend:
        kept: dict[str, Any] = {"macs": {}, "on_macs": lambda _: None, "on_device": lambda _: None, **changes}
        tuning = Tuning(SourceCheck.NODE, EVERYTHING - off, spin=0.0, moderation=0.0)
        networks = [NETWORKS[version] for version in versions]
        return VxlanBackend(facing, networks, VxlanWire(1, 8472, source_ports=ports), netlink, tuning, **kept)

    return make


def features_of(one: Profile) -> str:
    """The words of `ethtool -K`."""
    return " ".join(f"{feature} {'on' if state else 'off'}" for feature, state in one.ethtool.items())


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
    **{name: features_of(profile.load(name)) for name in ("p1", "p2", "p2x", "p3")},
    "nothing offloaded": "tx off tso off gso off gro off",
}
"""What `loden bench` measures, and a wire that takes finished packets only."""


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


def test_every_capability_off_carries_the_same() -> None:
    with overlay() as ((ours, kernels), _):
        kernels.make_kernel_vtep()
        ours.start(userspace(off=EVERYTHING))
        ours.learn(kernels)
        kernels.program(ours)
        for version in (4, 6):
            carries_everything(ours, kernels, version)


def test_the_device_is_flannels() -> None:
    with overlay(1) as ((one,), _):
        one.start(userspace())
        shown = one.machine.command("ip", "-d", "address", "show", "flannel.1").stdout
        assert "tun" in shown
        assert "mtu 1450" in shown
        assert "inet 10.5.1.0/32" in shown
        assert "inet6" not in shown
        shown = one.machine.command("ip", "-d", "address", "show", "flannel-v6.1").stdout
        assert "mtu 1430" in shown
        assert "inet6 fd00:5:0:1::/128" in shown
        assert shown.count("inet6") == 1, "no address of the kernel's making"
        assert "10.5.0.0/16 dev flannel.1" in one.machine.command("ip", "route").stdout
        assert "fd00:5::/48 dev flannel-v6.1" in one.machine.command("ip", "-6", "route").stdout
        assert one.backend.mtu == 1430
        one.stop()
        assert "flannel" not in one.machine.command("ip", "link").stdout


def test_flows_leave_by_several_ports_and_each_by_one() -> None:
    with overlay() as ((one, two), _):
        for node in (one, two):
            node.start(userspace(ports=8))
        one.learn(two)
        two.learn(one)
        one.machine.command("ethtool", "-K", "eth0", "tx-udp-segmentation", "off", "gso", "off")
        capture = two.machine.spawn("tcpdump", "-lnni", "eth0", "-c", "60", "src 198.18.0.1 and udp")
        assert capture.stderr is not None
        while "listening" not in capture.stderr.readline():
            pass
        send = (
            "import socket, sys\n"
            "for port in range(30):\n"
            "    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 20000 + port))\n"
            "    for _ in range(2): s.sendto(b'x' * port, (sys.argv[1], 9))\n"
        )
        one.pod.command(sys.executable, "-c", send, two.pod_address(4))
        shown, _ = capture.communicate(timeout=30)
        by_length: dict[str, set[str]] = {}
        for port, length in re.findall(r"198\.18\.0\.1\.(\d+) > .*\n.* length (\d+)", shown):
            by_length.setdefault(length, set()).add(port)
        assert len(by_length) == 30
        assert all(len(ports) == 1 for ports in by_length.values()), "a flow keeps its port"
        ports = {int(port) for found in by_length.values() for port in found}
        assert 3 <= len(ports) <= 8
        low, high = one.machine.command("sysctl", "-n", "net.ipv4.ip_local_port_range").stdout.split()
        assert all(int(low) <= port <= int(high) for port in ports)


def test_a_killed_daemons_device_is_taken_over_with_its_mac() -> None:
    with overlay(1) as ((one,), _):
        kept: list[dict[int, bytes]] = []
        one.start(userspace(on_macs=lambda macs: kept.append(dict(macs))))
        index = one.machine.command("cat", "/sys/class/net/flannel.1/ifindex").stdout
        for tunnel in one.backend._tunnels.values():  # as a kill would leave it: nothing let go in order
            one.ask(tunnel._path.stop())
            tunnel._path = None
            os.close(tunnel._device.tun.fd)
            tunnel._device.tun = None
        one.stop()
        first = one.attrs
        one.start(userspace(macs=kept[-1]))
        assert one.attrs == first
        assert one.machine.command("cat", "/sys/class/net/flannel.1/ifindex").stdout == index


def test_the_kernels_device_makes_way_and_leaves_its_mac() -> None:
    with overlay(1) as ((one,), _):
        one.make_kernel_vtep()
        kernels = one.attrs
        one.start(userspace())
        assert one.attrs == kernels, "peers need not learn anything"
        assert "tun" in one.machine.command("ip", "-d", "link", "show", "flannel.1").stdout


def test_a_foreign_device_of_that_name_is_left_alone() -> None:
    with overlay(1) as ((one,), _):
        one.machine.command("ip", "link", "add", "flannel.1", "type", "vxlan", "id", "7", "dstport", "8472")
        with pytest.raises(KernelError, match=r"cannot make device flannel\.1: a vxlan device has that name"):
            one.start(userspace())
        assert "vxlan id 7" in one.machine.command("ip", "-d", "link", "show", "flannel.1").stdout


def test_a_port_that_is_held_is_told_with_its_holder() -> None:
    with overlay(1) as ((one,), _):
        kind = ("type", "vxlan", "id", "9", "dstport", "8472")
        one.machine.command("ip", "link", "add", "other", *kind)
        one.machine.command("ip", "link", "set", "other", "up")
        with pytest.raises(KernelError, match=r"0\.0\.0\.0:8472: the kernel vxlan device other holds it"):
            one.start(userspace(versions=(4,)))


def test_leases_that_cannot_be_obeyed_are_ignored_with_a_reason() -> None:
    with overlay() as ((one, two), _):
        one.start(userspace(versions=(4,)))
        assert one.attrs is not None
        ours = one.attrs.backend_data.decode()
        cases = {
            '{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}': "all zero",
            '{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}': "group address",
            ours: "this node's own device",
            '{"VNI":2,"VtepMAC":"0a:00:00:00:00:01"}': "its VNI is 2, ours 1",
            "": "BackendData",
        }
        for data, reason in cases.items():
            two.attrs = LeaseAttrs(two.address, None, "vxlan", data.encode())
            one.learn(two)
            assert reason in one.status().ignored[two.key.subnet]
            assert not one.status().peers
        two.attrs = LeaseAttrs(two.address)
        one.learn(two)
        assert "backend 'udp or alloc'" in one.status().ignored[two.key.subnet]


def test_the_node_moves_to_another_address_and_mtu() -> None:
    with overlay() as ((one, two), _):
        for node in (one, two):
            node.start(userspace())
        one.learn(two)
        two.learn(one)
        assert ping(one, two, 4).returncode == 0
        one.machine.command("sysctl", "-qw", "net.ipv4.conf.eth0.promote_secondaries=1")
        one.machine.command("ip", "address", "add", "198.18.0.77/24", "dev", "eth0")
        one.machine.command("ip", "link", "set", "eth0", "mtu", "1490")
        moved = dataclasses.replace(
            one.facing, address=IPv4Address("198.18.0.77"), public_ip=IPv4Address("198.18.0.77"), mtu=1490
        )
        one.attrs = one.ask(one.backend.move(moved))
        assert one.attrs.public_ip == IPv4Address("198.18.0.77")
        two.learn(one, kind=LeaseEventKind.CHANGED)
        one.machine.command("ip", "address", "del", "198.18.0.1/24", "dev", "eth0")
        assert ping(two, one, 4).returncode == 0
        assert ping(one, two, 6).returncode == 0
        assert "mtu 1440" in one.machine.command("ip", "link", "show", "flannel.1").stdout


TAKEN = (
    "ip -{} route flush dev {} proto boot",
    "ip -{} address flush dev {} scope global",
    "ip link set {1} down",
    "ip link del {1}",
)


@pytest.mark.parametrize(("version", "device"), [(4, "flannel.1"), (6, "flannel-v6.1")])
def test_what_others_take_away_comes_back_complete(version: int, device: str) -> None:
    with overlay() as ((one, two), _):
        for node in (one, two):
            node.start(userspace())
        one.learn(two)
        two.learn(one)
        for line in TAKEN:
            one.machine.command(*line.format(version, device).split())
            wait_until(f"after {line}", lambda: ping(one, two, version, "-c", "1", "-W", "1").returncode == 0)
            assert ping(two, one, version).returncode == 0, line
        assert one.status().repairs >= 3
