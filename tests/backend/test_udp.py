"""The udp backend by itself: IPv6 in the same datagrams, and what strangers send."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address
from typing import Any

import pytest

from dataplane.backend import reports
from dataplane.backend.base import Underlay
from dataplane.backend.udp import UdpBackend
from dataplane.backend.userspace import Tuning
from dataplane.errors import KernelError
from dataplane.kernel.netlink import Netlink
from dataplane.path.capability import EVERYTHING
from dataplane.path.facts import PathEvent, PathEventKind, SourceCheck
from tests.backend.tunnels import NETWORKS, Node, carries_everything, overlay, ping, wait_until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]


def udp(versions: tuple[int, ...] = (4, 6)) -> Any:
    def make(facing: Underlay, netlink: Netlink, _node: Node) -> UdpBackend:
        tuning = Tuning(SourceCheck.NODE, EVERYTHING, spin=0.0, moderation=0.0)
        networks = [NETWORKS[version] for version in versions]
        return UdpBackend(facing, networks, 8285, netlink, tuning, device="", on_device=lambda _: None)

    return make


@pytest.mark.parametrize("version", [4, 6])
def test_both_versions_travel_over_ipv4_through_one_device(version: int) -> None:
    with overlay() as ((one, two), _):
        for node in (one, two):
            node.start(udp())
        one.learn(two)
        two.learn(one)
        carries_everything(one, two, version)
        status = one.status()
        assert status.device == "flannel0"
        assert {peer.subnet.version for peer in status.peers} == {4, 6}
        assert {peer.public_ip for peer in status.peers} == {two.address}
        (counted,) = [peer for peer in status.peers if peer.subnet.version == version]
        assert counted.tx_packets > 0
        assert counted.rx_packets > 0
        assert status.pumps["tx"]["packets"] == counted.tx_packets
        assert status.pumps["rx"]["packets"] == counted.rx_packets
        (other,) = [peer for peer in status.peers if peer.subnet.version != version]
        assert (other.tx_packets, other.rx_packets) == (0, 0), "each subnet has counters of its own"
        assert set(one.drops()) <= {"NO_ROUTE"}, "the kernel tells its groups to nobody"


def test_an_ipv6_packet_without_a_route_comes_back_as_unreachable() -> None:
    with overlay(1) as ((one,), _):
        one.start(udp())
        ping_nobody = ("ping", "-6", "-n", "-c", "2", "-i", "0.3", "-W", "1", "fd00:5:0:99::2")
        assert "No route" in one.pod.command(*ping_nobody, check=False).stdout
        assert one.drops()["NO_ROUTE"] >= 2


def test_a_node_without_ipv4_is_refused_with_a_reason() -> None:
    refused = pytest.raises(KernelError, match="has no IPv4 address, and backend udp carries")
    with overlay(1) as ((one,), _), refused:
        one.start(lambda facing, *rest: udp()(dataclasses.replace(facing, address=IPv4Address(0)), *rest))


def test_the_node_moves_to_another_address() -> None:
    with overlay() as ((one, two), _):
        for node in (one, two):
            node.start(udp())
        one.learn(two)
        two.learn(one)
        one.machine.command("sysctl", "-qw", "net.ipv4.conf.eth0.promote_secondaries=1")
        one.machine.command("ip", "address", "add", "198.18.0.77/24", "dev", "eth0")
        there = IPv4Address("198.18.0.77")
        one.attrs = one.ask(one.backend.move(dataclasses.replace(one.facing, address=there, public_ip=there)))
        two.learn(one)
        one.machine.command("ip", "address", "del", "198.18.0.1/24", "dev", "eth0")
        assert ping(one, two, 4).returncode == 0
        assert ping(two, one, 6).returncode == 0


@pytest.mark.parametrize("version", [4, 6])
def test_what_others_take_away_comes_back_complete(version: int) -> None:
    with overlay() as ((one, two), _):
        for node in (one, two):
            node.start(udp())
        one.learn(two)
        two.learn(one)
        for line in (
            f"ip -{version} route flush dev flannel0 proto boot",
            f"ip -{version} address flush dev flannel0 scope global",
            "ip link set flannel0 down",
            "ip link del flannel0",
        ):
            one.machine.command(*line.split())
            wait_until(f"after {line}", lambda: ping(one, two, version, "-c", "1", "-W", "1").returncode == 0)
            assert ping(two, one, version).returncode == 0, line
        assert one.status().repairs >= 3


def test_forged_sources_leave_no_more_than_so_many_entries() -> None:
    with overlay(1) as ((one,), _):
        one.start(udp((4,)))
        (tunnel,) = [one.backend._tunnel]

        async def flood() -> None:
            for n in range(3 * reports.MOST_STRANGERS):
                tunnel._on_event(PathEvent(PathEventKind.UNKNOWN_SOURCE, IPv4Address("203.0.0.0") + n, 1))

        one.ask(flood())
        unknown = one.status().unknown_sources
        assert len(unknown) == reports.MOST_STRANGERS
        assert IPv4Address("203.0.0.0") + 3 * reports.MOST_STRANGERS - 1 in unknown, "the oldest go"
        assert len(tunnel._reports._complaints) == reports.MOST_STRANGERS
