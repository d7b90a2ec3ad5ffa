"""Several queues: whatever the number on either node, no packet of a flow overtakes another, and all are counted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from dataplane.backend.base import Backend, Queues, Underlay
from dataplane.backend.udp import UdpBackend
from dataplane.backend.userspace import Tuning
from dataplane.backend.vxlan import VxlanBackend, VxlanWire
from dataplane.kernel import tun
from dataplane.kernel.netlink import Netlink
from dataplane.path.capability import EVERYTHING
from dataplane.path.facts import SourceCheck
from tests.backend.tunnels import NETWORKS, Node, Service, carries_everything, overlay, ping, tcp_roundtrip

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

ROUNDS = 80
WIRES = ("udp", "vxlan")
DEVICE = {"udp": "flannel0", "vxlan": "flannel.1"}


def backend(wire: str, queues: int, off: frozenset[Any] = frozenset()) -> Callable[[Underlay, Netlink, Node], Backend]:
    def make(facing: Underlay, netlink: Netlink, _node: Node) -> Backend:
        tuning = Tuning(SourceCheck.NODE, EVERYTHING - off, spin=2e-4, moderation=1.5e-4, queues=queues)
        if wire == "udp":
            return UdpBackend(facing, [NETWORKS[4]], 8285, netlink, tuning, device="", on_device=lambda _: None)
        return VxlanBackend(
            facing,
            [NETWORKS[4]],
            VxlanWire(1, 8472),
            netlink,
            tuning,
            macs={},
            on_macs=lambda _: None,
            on_device=lambda _: None,
        )

    return make


@contextlib.contextmanager
def two_nodes(wire: str, first: int, second: int) -> Iterator[tuple[Node, Node]]:
    with overlay() as ((one, two), _):
        one.start(backend(wire, first))
        two.start(backend(wire, second))
        one.learn(two)
        two.learn(one)
        yield one, two


def flows(source: Node, target: Node, rounds: int) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Sink and source of many numbered flows."""
    options: dict[str, Any] = {"cwd": str(Path(__file__).parents[2])}
    program = (sys.executable, "-m", "tests.backend.flows")
    address = target.pod_address(4)
    sink = target.pod.spawn(*program, "sink", address, **options)
    assert sink.stdout is not None
    assert sink.stdout.readline() == "ready\n", sink.communicate()
    return sink, source.pod.spawn(*program, "source", address, str(rounds), **options)


def verdict(run: tuple[subprocess.Popen[str], subprocess.Popen[str]]) -> dict[str, int]:
    out, err = run[1].communicate(timeout=200)
    assert out, err
    found: dict[str, int] = json.loads(out)
    run[0].communicate(timeout=30)
    return found


def carried(source: Node, target: Node) -> tuple[int, int]:
    """Packets sent, and packets received; among these what came before the target's pumps knew the source."""
    (there,), (here,) = source.status().peers, target.status().peers
    return there.tx_packets, here.rx_packets + target.drops().get("UNKNOWN_PEER", 0)


def settled(one: Node, two: Node) -> None:
    """What one has sent the other has received, once nothing is under way."""
    deadline = time.monotonic() + 10
    while True:
        there, back = carried(one, two), carried(two, one)
        if there[0] == there[1] and back[0] == back[1]:
            return
        assert time.monotonic() < deadline, (there, back)
        time.sleep(0.05)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(("first", "second"), [(2, 1), (2, 2), (4, 4)])
def test_the_order_inside_every_flow_stands_under_a_mixed_load(wire: str, first: int, second: int) -> None:
    with two_nodes(wire, first, second) as (one, two):
        assert (one.status().queues, two.status().queues) == (Queues(first, first), Queues(second, second))
        for found in list(map(verdict, [flows(one, two, ROUNDS), flows(two, one, ROUNDS)])):
            assert found == {"sent": found["sent"], "received": found["sent"], **CLEAN}, "alone nothing is lost"
            assert min(*carried(one, two), *carried(two, one)) >= found["sent"]
        settled(one, two)
        with contextlib.ExitStack() as stack:
            for node in (one, two):
                stack.callback(Service(node, 4).close)
            runs = [flows(one, two, ROUNDS), flows(two, one, ROUNDS)]
            streams = in_background(lambda n: tcp_roundtrip(*((one, two) if n % 2 else (two, one)), 4, 20 << 20), 4)
            for found in list(map(verdict, runs)):
                assert {name: found[name] for name in CLEAN} == CLEAN, found
                assert found["received"] > found["sent"] // 2, "TCP may fill the queues, and yet most arrive"
            for stream in streams:
                stream()
        assert set(one.drops()) | set(two.drops()) <= {"NO_ROUTE"}
        busy = [used_queues(node) for node in (one, two)]
        assert busy == [first, second], "48 flows and their answers use every queue of the device"


CLEAN = {"altered": 0, "reordered": 0, "duplicated": 0}


def used_queues(node: Node) -> int:
    """Whose TX pump has carried something."""
    tunnel = getattr(node.backend, "_tunnel", None) or node.backend._tunnels[4]
    return sum(engine.counters()["tx"]["packets"] > 0 for engine in tunnel._path._engines)


def in_background(work: Callable[[int], None], count: int) -> list[Callable[[], None]]:
    """Call each of the results to wait for one piece of work; it raises what that raised."""
    failures: dict[int, BaseException] = {}

    def guarded(n: int) -> None:
        try:
            work(n)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            failures[n] = error

    def waiter(n: int, thread: threading.Thread) -> Callable[[], None]:
        def wait() -> None:
            thread.join(120)
            assert not thread.is_alive()
            if n in failures:
                raise failures[n]

        return wait

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    return [waiter(n, thread) for n, thread in enumerate(threads)]


@pytest.mark.parametrize("wire", WIRES)
def test_packets_of_every_kind_pass_with_several_queues(wire: str) -> None:
    with two_nodes(wire, 3, 2) as (one, two):
        carries_everything(one, two, 4)


@pytest.mark.parametrize("wire", WIRES)
def test_a_device_that_somebody_deletes_comes_back_with_as_many_queues(wire: str) -> None:
    with two_nodes(wire, 4, 2) as (one, two):
        for _ in range(2):
            one.machine.command("ip", "link", "del", DEVICE[wire])
            deadline = time.monotonic() + 30
            while ping(one, two, 4).returncode:
                assert time.monotonic() < deadline
        assert one.status().queues == Queues(4, 4)
        found = verdict(flows(one, two, 10))
        assert found == {"sent": found["sent"], "received": found["sent"], **CLEAN}


@pytest.mark.parametrize("wire", WIRES)
def test_the_node_moves_under_load_and_order_stands(wire: str) -> None:
    with two_nodes(wire, 3, 2) as (one, two):
        one.machine.command("sysctl", "-qw", "net.ipv4.conf.eth0.promote_secondaries=1")
        one.machine.command("ip", "address", "add", "198.18.0.77/24", "dev", "eth0")
        there = IPv4Address("198.18.0.77")
        runs = [flows(one, two, 2 * ROUNDS), flows(two, one, 2 * ROUNDS)]
        moved = dataclasses.replace(one.facing, address=there, public_ip=there)
        one.attrs = one.ask(one.backend.move(moved))
        two.learn(one)
        one.machine.command("ip", "address", "del", "198.18.0.1/24", "dev", "eth0")
        for found in list(map(verdict, runs)):
            assert {name: found[name] for name in CLEAN} == CLEAN, found
            assert found["received"] > found["sent"] // 2
        assert ping(two, one, 4).returncode == 0
        assert one.status().queues == Queues(3, 3)
        bound = one.machine.command("ss", "-Hluan", "sport", "=", ":8285" if wire == "udp" else ":8472").stdout
        assert len(bound.splitlines()) == 3, bound


@pytest.mark.parametrize("wire", WIRES)
def test_a_kernel_that_refuses_the_program_leaves_one_queue_and_a_reason(
    wire: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tun, "BPF_CALL", {})
    with two_nodes(wire, 4, 1) as (one, two):
        queues = one.status().queues
        assert queues is not None
        assert (queues.asked, queues.used) == (4, 1)
        assert "no steering program for" in queues.reason
        assert sum("no steering program for" in record.getMessage() for record in caplog.records) <= 1
        assert two.status().queues == Queues(1, 1)
        assert ping(one, two, 4).returncode == 0
        bound = one.machine.command("ss", "-Hluan", "sport", "=", ":8285" if wire == "udp" else ":8472").stdout
        assert len(bound.splitlines()) == 1, bound
