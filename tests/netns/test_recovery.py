"""What happens to traffic when a daemon is killed, or somebody changes under it what it needs: how long it is away.

A beat of 1,000 numbered datagrams a second runs from n1 to n2 and a TCP stream beside it; n2 is hurt, and nothing is
restarted by hand. `LODEN_RECOVERY_TRIALS=5 pytest -s tests/netns/test_recovery.py` prints the table of
docs/operations.md; without that each event happens once.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Interface
from typing import Any

import pytest

from dataplane.lab import Lab, measure
from tests.netns.conftest import MakeLab
from tests.netns.flannel_node import FlannelNode
from tests.netns.observing import reaches, status_of, until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(900)]

TRIALS = int(os.environ.get("LODEN_RECOVERY_TRIALS", "1"))
WITHIN = 5.0
"""Seconds; what takes longer is no recovery. A bound for the test, not what is promised."""
DATAPLANES = ("kernel", "userspace")
DEVICE = "flannel.1"


@contextmanager
def beating(lab: Lab, source: str, target: str) -> Iterator[dict[str, Any]]:
    """A beat while the block runs; the result is what it lost, and its longest gap."""
    result: dict[str, Any] = {}
    with lab.traffic("beat", f"{source}-p1", f"{target}-p1") as run:
        time.sleep(0.3)
        yield result
        time.sleep(0.3)
        result |= measure.verdict(run, 60)


def tell(event: str, dataplane: str, results: list[dict[str, Any]]) -> None:
    gaps, lost = ([1000 * result["gap"] for result in results], [result["lost"] for result in results])
    print(
        f"\n| {event} | {dataplane} | {statistics.median(gaps):.0f} ms | {max(gaps):.0f} ms | "
        f"{statistics.median(lost):.0f} | {max(lost)} |"
    )


def network_state(lab: Lab, node: str) -> tuple[object, ...]:
    """Device, addresses, and the routes through it."""
    (device,) = json.loads(lab.run(node, ["ip", "-j", "addr", "show", DEVICE]).stdout)
    addresses = [(entry["local"], entry["prefixlen"]) for entry in device["addr_info"]]
    routes = json.loads(lab.run(node, ["ip", "-j", "route", "show", "dev", DEVICE]).stdout)
    return device["ifindex"], device["mtu"], device.get("address"), addresses, [route["dst"] for route in routes]


@pytest.mark.parametrize("dataplane", DATAPLANES)
def test_a_daemon_is_killed_and_started_again(make_lab: MakeLab, dataplane: str) -> None:
    lab = make_lab(2, backend="vxlan", dataplane=dataplane)
    node, results = lab.node("n2"), []
    before = network_state(lab, "n2")
    with lab.traffic("tcp", "n2-p1", "n1-p1", "--bytes=20000000", "--until-eof") as stream:
        for _ in range(TRIALS):
            with beating(lab, "n1", "n2") as result:
                node.stop_daemon(signal.SIGKILL)
                assert network_state(lab, "n2") == before, "the device is left as it was"
                node.start_daemon()
                node.wait_ready()
                lab.settle()
            assert network_state(lab, "n2") == before
            results.append(result)
        assert stream.poll() is None
        assert measure.verdict(stream, 120)["equal"]
    tell("kill -9 and start", dataplane, results)
    if dataplane == "kernel":
        assert [result["lost"] for result in results] == [0] * TRIALS
