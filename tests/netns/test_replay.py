"""Captures that were made in a lab, replayed: nothing differs; and a packet that was altered does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dataplane.lab import Lab, measure
from tests.examples import documented, normal
from tests.netns.conftest import MakeLab
from tests.netns.test_capture import capturing

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

LODEN = (sys.executable, "-P", "-m", "dataplane.cli")
TCP_BYTES = 4_000_000


def replay(path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run([*LODEN, "replay", "--json", *words, path], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def load(lab: Lab) -> None:
    """Both ways: superframes, runs, single packets, and what nobody has a lease for."""
    for source, target in (("n1-p1", "n2-p1"), ("n2-p1", "n1-p1")):
        with lab.traffic("tcp", source, target, f"--bytes={TCP_BYTES}") as there:
            assert measure.verdict(there, 60)["equal"]
        assert lab.ping(source, target).whole
    lab.run("n1-p1", ["ping", "-n", "-c", "1", "-W", "1", "10.244.255.7"], check=False)


@pytest.mark.parametrize(("backend", "snaplen"), [("udp", 65535), ("vxlan", 65535), ("vxlan", 100)])
def test_a_capture_of_a_lab_replays_without_difference(
    make_lab: MakeLab, tmp_path: Path, backend: str, snaplen: int
) -> None:
    lab = make_lab(2, backend=backend, dataplane="userspace" if backend == "vxlan" else "")
    path = tmp_path / "node.pcapng"
    with capturing(lab, "n1", "-w", str(path), "-s", str(snaplen), "--buffer", "64"):
        load(lab)
    code, found = replay(path)
    assert found["differences"] == []
    assert (code, found["differ"], found["unfit"], found["broken"]) == (0, 0, 0, "")
    assert found["encapsulated"] >= TCP_BYTES // 1500
    assert found["decapsulated"] >= TCP_BYTES // 1500
    assert found["undecided"] == {}
    if snaplen == 65535:
        assert found["superframes"] > 10
        assert found["cut"] == 0
    else:
        assert found["cut"] > TCP_BYTES // 1500
    assert replay(path)[1] == found, "the same file gives the same answers"


def test_an_altered_file_shows_the_packet_that_was_altered(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(2)
    path = tmp_path / "ping.pcapng"
    with capturing(lab, "n1", "-w", str(path), "icmp"):
        lab.ping("n1-p1", "n2-p1", count=2)
    altered = tmp_path / "altered.pcapng"
    blocks, at = bytearray(path.read_bytes()), 0
    for _ in range(3 + 4):  # section and two interfaces; four blocks of packets
        at, former = at + int.from_bytes(blocks[at + 4 : at + 8], "little"), at
    blocks[former + 28 + 8] ^= 2  # the inner TTL in the fourth block: what was received, as the device got it
    altered.write_bytes(blocks)
    for file, code, wanted in ((path, 0, documented("replay-ping")), (altered, 1, documented("replay-altered"))):
        done = subprocess.run([*LODEN, "replay", file.name], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert normal(done.stdout) == normal(wanted)
