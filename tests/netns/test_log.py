"""What a daemon's log says from start to stop: flannel's words, which guides and scripts look for, in klog's format."""

from __future__ import annotations

import re

import pytest

from tests.netns.conftest import MakeLab
from tests.netns.observing import SUBNETS, status_of, until

pytestmark = [pytest.mark.netns, pytest.mark.etcd, pytest.mark.timeout(300)]

LINE = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ [a-z_]+\.py:\d+\] (.+)")


def test_a_log_has_flannels_words_in_flannels_order(make_lab: MakeLab) -> None:
    lab = make_lab(2, store="etcd", backend="vxlan")
    node, peer = lab.node("n1"), lab.node("n2")
    subnet, gone = (status_of(each)["lease"]["subnet"] for each in (node, peer))
    until("it is said", lambda: f"Subnet added: {gone}" in node.log.read_text())
    peer.stop_daemon()
    lab.etcdctl("del", SUBNETS + gone.replace("/", "-"))
    until("it is said", lambda: f"Subnet removed: {gone}" in node.log.read_text())
    node.stop_daemon()
    node.start_daemon()
    node.wait_ready()
    node.stop_daemon()
    lines = node.log.read_text().splitlines()
    said = [match[1] for match in map(LINE.fullmatch, lines) if match]
    assert len(said) == len(lines)

    underlay = [
        "Using interface with name eth0 and address 198.18.1.1",
        "Defaulting external address to interface address (198.18.1.1)",
        "VXLAN config: VNI=1 Port=8472 GBP=false Learning=false DirectRouting=false",
    ]
    last = ["Waiting for all goroutines to exit", "Exiting cleanly..."]
    for words in (
        [
            "CLI flags config: {etcd-endpoints:",
            "Installing signal handlers",
            "Created subnet manager: Etcd Local Manager with Previous Subnet: None",
            "Found network config - Backend type: vxlan",
            *underlay,
            "Picking subnet in range 10.244.1.0 ... 10.244.191.0",
            f"Allocated lease (ip: {subnet} ipv6: ::/0) to current node (198.18.1.1)",
            "Cleaning-up unused traffic manager rules",
            f"Wrote subnet file to {node.subnet_file}",
            "flannel is ready",
            "Running backend.",
            f"Subnet removed: {gone}",
            *last,
            "CLI flags config: {",
            f"Created subnet manager: Etcd Local Manager with Previous Subnet: {subnet}",
            *underlay,
            f"Found lease (ip: {subnet} ipv6: ::/0) for current IP (198.18.1.1), reusing",
            *last,
        ],
        ["Watching for new subnet leases", *last],
        [f"Subnet added: {gone}", f"Subnet removed: {gone}"],
        ["Waiting for 23h0m0s to renew lease", *last],
    ):
        rest = iter(said)
        missing = [word for word in words if not any(line.startswith(word) for line in rest)]
        assert not missing, missing[0]
