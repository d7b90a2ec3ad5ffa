"""Flags of flannel's that change what a node is or has: a daemon is started with each, and the node is looked at.

How flags are read: tests/test_options.py. Those of etcd and of the log: tests/test_daemon.py. What a part does
with its settings is tested where the part is; here is that the flag reaches it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dataplane.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.observing import until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600)]

FETCH = """
import sys, urllib.error, urllib.request
try:
    answer = urllib.request.urlopen(sys.argv[1], timeout=5)
    print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code)
except OSError:
    print("nobody")
"""


@contextmanager
def started(lab: Lab, *flags: str, iface: bool = True) -> Iterator[dict[str, Any]]:
    """The status of the node's daemon, while it runs with these flags; the lab's own -iface stands first, or not."""
    node = lab.node("n1")
    argv = [word for word in node.daemon_argv(*flags) if iface or word != "-iface=eth0"]
    with lab.open_process("n1", argv) as daemon:
        try:
            yield until("it is ready", lambda: (status := node.status()) and status["ready"] and status, 30)
        finally:
            daemon.terminate()
            code = daemon.wait(30)
    assert code == 0


def stopped_lab(make_lab: MakeLab, **settings: object) -> Lab:
    lab = make_lab(1, **settings)
    lab.node("n1").stop_daemon()
    return lab


def test_the_interface_is_the_one_that_the_flags_mean(make_lab: MakeLab) -> None:
    lab = stopped_lab(make_lab)
    for name, address in (("eth1", "198.18.21.7/24"), ("uplink2", "198.18.22.7/24")):
        lab.run("n1", ["ip", "link", "add", name, "type", "veth", "peer", "name", f"wire-{name[-1]}"])
        lab.run("n1", ["ip", "addr", "add", address, "dev", name])
        for end in (name, f"wire-{name[-1]}"):
            lab.run("n1", ["ip", "link", "set", end, "up"])
    lab.run("n1", ["ip", "route", "add", "default", "via", "198.18.22.1", "dev", "uplink2"])
    found = {}
    for flags in (
        "-iface=eth1", "-iface=198.18.21.7", "-iface=none0 -iface=eth1", "-iface-regex=^upl", "-iface-regex=18\\.21\\.",
        "-iface-can-reach=198.18.21.200", "-iface=none0 -iface-regex=^none -iface-can-reach=198.18.22.200", "",
        "-public-ip=198.18.21.7", "-iface=eth1 -public-ip=203.0.113.5",
    ):  # fmt: skip
        with started(lab, *flags.split(), iface=False) as status:
            found[flags] = status["lease"]["public_ip"]
    assert found == {
        "-iface=eth1": "198.18.21.7",
        "-iface=198.18.21.7": "198.18.21.7",
        "-iface=none0 -iface=eth1": "198.18.21.7",
        "-iface-regex=^upl": "198.18.22.7",
        "-iface-regex=18\\.21\\.": "198.18.21.7",
        "-iface-can-reach=198.18.21.200": "198.18.21.7",
        "-iface=none0 -iface-regex=^none -iface-can-reach=198.18.22.200": "198.18.22.7",
        "": "198.18.22.7",
        "-public-ip=198.18.21.7": "198.18.21.7",
        "-iface=eth1 -public-ip=203.0.113.5": "203.0.113.5",
    }


def test_the_public_ipv6_is_the_one_that_the_flag_means(make_lab: MakeLab) -> None:
    lab = stopped_lab(make_lab, backend="host-gw", families="46")
    lab.run("n1", ["ip", "addr", "add", "fd00:198:18::77/64", "dev", "eth0", "nodad"])
    for address in ("fd00:198:18::77", "fd00:198:18::1:1"):
        with started(lab, f"-public-ipv6={address}") as status:
            assert status["lease"]["public_ipv6"] == address


def test_rules_are_set_as_the_flags_say(make_lab: MakeLab) -> None:
    lab = stopped_lab(make_lab)

    def rules(*flags: str) -> tuple[bool, bool, bool]:
        """Whether there are accepts in FORWARD, whether there is masquerading, and whether with random ports."""
        lab.run("n1", ["nft", "flush", "ruleset"])
        with started(lab, *flags):
            forward, nat = (lab.run("n1", ["iptables", "-t", table, "-S"]).stdout for table in ("filter", "nat"))
        return "10.244.0.0/16" in forward, "MASQUERADE" in nat, "--random-fully" in nat

    assert rules() == (True, False, False)
    assert rules("-iptables-forward-rules=false") == (False, False, False)
    assert rules("-ip-masq", "-iptables-forward-rules=false") == (False, True, True)
    assert rules("-ip-masq", "-ip-masq-fully-random-disable") == (True, True, False)
    assert "FLANNEL_IPMASQ=true" in lab.node("n1").subnet_file.read_text()
    with started(lab):
        assert "FLANNEL_IPMASQ=false" in lab.node("n1").subnet_file.read_text()


def test_the_renew_margin_and_the_ports_of_health_and_metrics(
    make_lab: MakeLab, capfd: pytest.CaptureFixture[str]
) -> None:
    lab = stopped_lab(make_lab)

    def fetch(where: str) -> str:
        return lab.run("n1", [sys.executable, "-c", FETCH, f"http://{where}"]).stdout

    here, there = "127.0.0.1", str(lab.node("n1").address.ip)
    with started(lab, "-healthz-ip=127.0.0.1", "-healthz-port=9091", "-subnet-lease-renew-margin=120"):
        assert fetch(f"{here}:9091/readyz") == "200 flanneld is ready\n"
        assert "loden_" in fetch(f"{here}:9091/metrics")
        assert fetch(f"{there}:9091/readyz") == "nobody\n"
    with started(lab, "-healthz-port=9092", "-metrics-port=9093", "-subnet-lease-renew-margin=1439"):
        assert fetch(f"{there}:9092/healthz") == "200 flanneld is running\n"
        assert fetch(f"{there}:9092/metrics") == "404\n"
        assert "loden_" in fetch(f"{there}:9093/metrics")
    with started(lab, "-metrics-port=9094"):
        assert "loden_" in fetch(f"{there}:9094/metrics")
    said = capfd.readouterr().err
    assert "Waiting for 22h0m0s to renew lease" in said
    assert "Waiting for 1m0s to renew lease" in said
    assert "Waiting for 23h0m0s to renew lease" in said


def test_vxlan_leaves_by_as_many_ports_as_the_flag_says(make_lab: MakeLab) -> None:
    lab = stopped_lab(make_lab, backend="vxlan", dataplane="userspace")

    def sockets(*flags: str) -> int:
        with started(lab, *flags):
            return len(lab.run("n1", ["ss", "-Huan"]).stdout.splitlines())

    assert sockets("-vxlan-source-ports=3") - sockets("-vxlan-source-ports=1") == 2
    assert sockets() - sockets("-vxlan-source-ports=1") == 7
