"""Long transfers over an underlay that loses and doubles datagrams: not one wrong byte may arrive.

`make test` runs the short form. `make soak` sets LODEN_SOAK_BYTES (with everything on) and LODEN_SOAK_OFF_BYTES (with
each capability off) and takes hours; its last result stands in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest

from dataplane.lab import Lab, measure
from dataplane.path.capability import Capability
from tests.examples import documented, shape
from tests.netns.conftest import MakeLab
from tests.netns.observing import status_of

BYTES = int(os.environ.get("LODEN_SOAK_BYTES", "300000000"))
OFF_BYTES = int(os.environ.get("LODEN_SOAK_OFF_BYTES", "30000000"))
DATAGRAMS = max(200, BYTES // 2_000_000)
SLOWEST = 2_500_000
"""Bytes a second below which a transfer counts as stuck; 1 % loss costs TCP most of its speed."""

pytestmark = [pytest.mark.netns, pytest.mark.timeout(60 + (BYTES + 5 * OFF_BYTES) // SLOWEST * 2)]


def impair(lab: Lab) -> None:
    """One in a hundred is lost and one in a hundred doubled, in each direction, on the ports of the switch.

    Without offloads there: a whole run would be lost or doubled at once.
    """
    off = ["tx", "off", "tso", "off", "gso", "off", "gro", "off"]
    rules = []
    for here, there in (("n1", "n2"), ("n2", "n1")):
        lab.run(here, ["ethtool", "-K", "eth0", *off])
        lab.run("switch", ["ethtool", "-K", here, *off])
        rules.append(
            f'chain {here} {{ type filter hook ingress device "{here}" priority 0;\n'
            f'numgen random mod 100 == 0 counter drop\n numgen random mod 100 == 1 counter dup to "{there}"\n}}'
        )
    lab.run("switch", ["nft", "-f", "-"], stdin="table netdev soak {\n" + "\n".join(rules) + "\n}\n")


def impaired(lab: Lab) -> tuple[int, int]:
    """How many were lost and doubled."""
    listing = lab.run("switch", ["nft", "-j", "list", "table", "netdev", "soak"]).stdout
    rules = [item["rule"]["expr"] for item in json.loads(listing)["nftables"] if "rule" in item]
    count = {"drop": 0, "dup": 0}
    for rule in rules:
        kinds = {name: value for part in rule for name, value in part.items()}
        count["drop" if "drop" in kinds else "dup"] += kinds["counter"]["packets"]
    return count["drop"], count["dup"]


def soak(lab: Lab, tcp_bytes: int, datagrams: int) -> str:
    began = time.monotonic()
    with lab.traffic("tcp", "n1-p1", "n2-p1", f"--bytes={tcp_bytes}") as run:
        result = measure.verdict(run, 60 + tcp_bytes / SLOWEST)
    assert result["equal"], result
    assert result["bytes"] == tcp_bytes
    speed = tcp_bytes * 8 / (time.monotonic() - began) / 1e6
    with lab.traffic("udp", "n2-p1", "n1-p1", "--sizes=1,100,1443,1444", f"--count={datagrams}") as run:
        numbered = measure.verdict(run, 120 + datagrams / 50)
    assert numbered["altered"] == 0, numbered
    assert numbered["received"] > 0.9 * numbered["sent"], numbered
    return (
        f"{tcp_bytes / 1e9:.2f} GB of TCP whole at {speed:.0f} Mbit/s; of {numbered['sent']} datagrams "
        f"{numbered['lost']} lost, {numbered['duplicated']} doubled, 0 altered\n"
    )


def test_nothing_arrives_wrong_over_a_bad_underlay(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    impair(lab)
    said = [soak(lab, BYTES, DATAGRAMS)]
    for capability in Capability:
        for node in lab.nodes.values():
            node.stop_daemon(signal.SIGTERM)
            node.start_daemon(f"--{capability.word}=false")
        for node in lab.nodes.values():
            node.wait_ready()
        lab.settle()
        assert status_of(lab.node("n1"))["capabilities"][capability.word] == "off: switched off"
        said.append(soak(lab, OFF_BYTES, DATAGRAMS // 10))
    lost, doubled = impaired(lab)
    assert lost > 100
    assert doubled > 100
    said.append(f"the underlay lost {lost} datagrams and doubled {doubled}\n")
    sys.stdout.write("".join(said))
    assert shape("".join(said)) == shape(documented("soak"))
