"""Offloads: with any of them off the same packets arrive, and the daemon says which are on; paths that are too short.

Everything happens in the namespaces of a lab.
"""

from __future__ import annotations

import json
import re
import signal

import pytest

from dataplane.lab import Lab, measure
from dataplane.path.capability import Capability
from tests.netns.conftest import MakeLab
from tests.netns.observing import status_of, until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

SIZES = "1-3,64,500,1443,1444"
WORDS = [capability.word for capability in Capability]


def restart_with(lab: Lab, *flags: str) -> None:
    for node in lab.nodes.values():
        node.stop_daemon(signal.SIGTERM)
        node.start_daemon(*flags)
    for node in lab.nodes.values():
        node.wait_ready()
    lab.settle()


def carries_everything(lab: Lab, tcp_bytes: int = 50_000_000) -> None:
    with lab.traffic("tcp", "n1-p1", "n2-p1", f"--bytes={tcp_bytes}") as run:
        result = measure.verdict(run, 120)
    assert result["equal"], result
    with lab.traffic("udp", "n2-p1", "n1-p1", f"--sizes={SIZES}", "--count=300") as run:
        result = measure.verdict(run, 120)
    faults = {name: result[name] for name in ("lost", "altered", "duplicated", "reordered")}
    assert faults == {"lost": 0, "altered": 0, "duplicated": 0, "reordered": 0}, result


def states(lab: Lab) -> dict[str, str]:
    found: dict[str, str] = status_of(lab.node("n1"))["capabilities"]
    return found


def test_the_same_packets_arrive_with_each_capability_off(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    assert set(states(lab).values()) == {"on"}, "this kernel grants everything"
    carries_everything(lab)
    for off in [*([word] for word in WORDS), WORDS]:
        restart_with(lab, *(f"--{word}=false" for word in off))
        assert states(lab) == {word: "off: switched off" if word in off else "on" for word in WORDS}
        carries_everything(lab)
        assert not any(status_of(node)["drops"]["SEND_FAILED"] for node in lab.nodes.values())


def test_a_node_with_everything_on_talks_to_one_with_everything_off(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    node = lab.node("n2")
    node.stop_daemon(signal.SIGTERM)
    node.start_daemon("--spin=0", *(f"--{word}=false" for word in WORDS))
    node.wait_ready()
    lab.settle()
    carries_everything(lab)


@pytest.mark.parametrize(
    "features",
    [
        "tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off gro on tx-udp-segmentation off",
        "tx-udp-segmentation off tso off gso off gro on",
        "tx off tso off gso off gro off",
    ],
    ids=["merged-by-nobody", "cut-by-software", "no-checksum-offload"],
)
def test_an_underlay_without_offloads_carries_the_same(make_lab: MakeLab, features: str) -> None:
    lab = make_lab(2)
    for node in lab.nodes.values():
        lab.run(node.name, ["ethtool", "-K", "eth0", *features.split()])
    carries_everything(lab)


def test_a_path_that_takes_less_is_learnt_and_senders_are_told(make_lab: MakeLab) -> None:
    """A route's MTU stands for what a router on the way would have said."""
    lab = make_lab(2)
    lab.run("n1", ["ip", "route", "add", "198.18.1.2/32", "dev", "eth0", "mtu", "1400"])
    carries_everything(lab)
    log = lab.node("n1").log
    until("n1 has learnt the path's MTU", lambda: "takes inner packets of 1372 bytes" in log.read_text())
    target = str(lab.address_of("n2-p1"))
    told = lab.run("n1-p1", ["ping", "-c", "1", "-W", "2", "-M", "do", "-s", "1400", target], check=False)
    # from the node, or from the pod's own kernel, which the TCP stream has already taught
    assert re.search(r"mtu ?= ?1372", told.stdout + told.stderr)
    plain = lab.run("n1-p1", ["ping", "-c", "3", "-i", "0.2", "-W", "2", "-M", "dont", "-s", "1400", target])
    assert " 0% packet loss" in plain.stdout
    assert status_of(lab.node("n1"))["drops"]["PATH_MTU"] > 0


def test_a_killed_daemon_with_several_queues_is_followed_by_one_that_adopts_its_device(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    node = lab.node("n1")

    def restart(queues: int, stop: signal.Signals) -> int:
        """Of the device's index; everything is carried."""
        node.stop_daemon(stop)
        node.start_daemon(f"--queues={queues}")
        assert node.wait_ready()["queues"] == {"asked": queues, "used": queues, "reason": ""}
        lab.settle()
        carries_everything(lab)
        (link,) = json.loads(lab.run("n1", ["ip", "-d", "-j", "link", "show", "flannel0"]).stdout)
        assert link["linkinfo"]["info_data"]["multi_queue"] is (queues > 1)
        return int(link["ifindex"])

    four = restart(4, signal.SIGTERM)
    assert restart(4, signal.SIGKILL) == four
    assert restart(2, signal.SIGKILL) == four
    assert restart(1, signal.SIGKILL) != four, "a device of one queue is of another kind"
