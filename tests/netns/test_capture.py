"""`loden capture` of a real node under load, beside tcpdump on the other end of the node's cable."""

from __future__ import annotations

import json
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dataplane.debug import pcapng
from dataplane.debug.pcapng import Packet, Statistics
from dataplane.lab import Lab, measure
from dataplane.path.wire import FRAME_HEAD
from tests.examples import documented, normal, shape
from tests.netns.conftest import MakeLab
from tests.netns.observing import status_of, until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600)]

LODEN = (sys.executable, "-P", "-m", "dataplane.cli")
TCP_BYTES = int(os.environ.get("LODEN_TEST_CAPTURE_BYTES", "40000000"))
"""1,500,000,000 for a million packets."""

KEPT = 128
Datagram = tuple[bytes, bytes, int, bytes]


@contextmanager
def capturing(lab: Lab, node: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A capture that runs; at the end of the block it was interrupted as by Ctrl-C, and has ended."""
    argv = [*LODEN, "capture", f"--subnet-file={lab.node(node).subnet_file}", *words]
    with lab.open_process(node, argv) as process:
        try:
            until("the capture runs", lambda: status_of(lab.node(node))["captures"])
            yield process
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            process.kill()


@contextmanager
def on_the_cable(lab: Lab, node: str, port: int, path: Path) -> Iterator[None]:
    """tcpdump at the switch's end; both nodes cut their runs before the cable, as a card without offload would."""
    for each in lab.nodes:
        lab.run(each, ["ethtool", "-K", "eth0", "tx-udp-segmentation", "off"])
    argv = ["tcpdump", "-i", node, "-s", str(14 + KEPT), "-B", "65536", "-U", "-w", str(path), f"udp port {port}"]
    with lab.open_process("switch", argv) as process:
        try:
            until("tcpdump listens", lambda: path.exists() and path.stat().st_size >= 24)
            yield
            until("tcpdump has written all", lambda: grows_no_more(path))
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            process.kill()


def grows_no_more(path: Path) -> bool:
    """tcpdump hands on what it received a second before, at the latest."""
    size = path.stat().st_size
    time.sleep(1.5)
    return path.stat().st_size == size


def of_the_wire(path: Path) -> Counter[Datagram]:
    data, at, found = path.read_bytes(), 24, Counter[Datagram]()
    while at < len(data):
        _, _, captured, _ = struct.unpack_from("=IIII", data, at)
        found[datagram(data[at + 30 : at + 16 + captured])] += 1
        at += 16 + captured
    return found


def datagram(packet: bytes) -> Datagram:
    """What a UDP socket shows: addresses, ports, length; and as much of the payload as was kept."""
    assert packet[0] == 0x45
    assert packet[9] == 17
    return packet[12:20], packet[20:24], int.from_bytes(packet[24:26]), packet[28:]


def blocks_of(path: Path) -> Iterator[Packet | Statistics]:
    with path.open("rb") as file:
        for block in pcapng.Reader(file, str(path)):
            if isinstance(block, Packet | Statistics):
                yield block


def read(path: Path) -> tuple[list[Packet], list[Statistics]]:
    blocks = list(blocks_of(path))
    return [b for b in blocks if isinstance(b, Packet)], [b for b in blocks if isinstance(b, Statistics)]


@dataclass
class Shown:
    """What a capture shows, taken pair by pair: a million of them is not to be held."""

    head: int
    """Bytes between the outer UDP header and the inner packet."""
    datagrams: Counter[Datagram] = field(default_factory=Counter)
    pairs: int = 0
    lost: int = 0
    superframes: int = 0
    missing: int | None = None

    def take(self, one: Packet, two: Packet) -> None:
        inner, outer = (one, two) if one.interface.name == "overlay" else (two, one)
        assert (one.number, one.ns, one.comment) == (two.number, two.ns, two.comment)
        assert (inner.interface.name, outer.interface.name) == ("overlay", "underlay")
        assert inner.data.startswith(outer.data[28 + self.head :])
        assert outer.length == inner.length + 28 + self.head
        self.datagrams[datagram(outer.data)] += 1
        self.pairs += 1
        self.lost += one.lost + two.lost
        self.superframes += "superframe=" in one.comment

    @classmethod
    def of(cls, path: Path, head: int) -> Shown:
        shown = cls(head)
        blocks = blocks_of(path)
        for one in blocks:
            if isinstance(one, Packet):
                two = next(blocks)
                assert isinstance(two, Packet), "no packet stands alone"
                shown.take(one, two)
            elif shown.missing is None:
                shown.missing = one.dropped
        return shown


@pytest.mark.parametrize(("backend", "port", "head"), [("udp", 8285, 0), ("vxlan", 8472, FRAME_HEAD)])
def test_under_load_every_inner_packet_sits_beside_its_datagram(
    make_lab: MakeLab, tmp_path: Path, backend: str, port: int, head: int
) -> None:
    lab = make_lab(2, backend=backend, dataplane="userspace" if backend == "vxlan" else "")
    path, wire_path = tmp_path / "node.pcapng", tmp_path / "wire.pcap"
    with (
        on_the_cable(lab, "n1", port, wire_path),
        capturing(lab, "n1", "-w", str(path), "-s", str(KEPT), "--buffer", "64"),
        lab.traffic("tcp", "n1-p1", "n2-p1", f"--bytes={TCP_BYTES}") as there,
    ):
        assert measure.verdict(there, 300)["equal"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    shown, wire = Shown.of(path, head), of_the_wire(wire_path)
    said = f"{backend}: {shown.pairs} packets shown, {shown.missing} missing, {wire.total()} on the cable\n"
    sys.stdout.write(said)
    assert shape(said)[0] in shape(documented("capture-million"))
    assert not shown.datagrams - wire, "what is shown was on the cable"
    assert (wire - shown.datagrams).total() == shown.missing, "and what is not shown is owned up to"
    assert shown.pairs >= TCP_BYTES // 1500
    assert shown.lost <= shown.missing
    assert shown.superframes
    done = subprocess.run(["tshark", "-r", path, "-Y", "_ws.malformed"], capture_output=True, text=True, check=True)
    assert not done.stdout
    assert not [line for line in done.stderr.splitlines() if "Running as user" not in line]


def test_the_examples_of_a_file_and_of_two_nodes_files(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(2)
    fields = [word for name in ("frame.interface_name", "ip.src", "ip.dst", "frame.comment") for word in ("-e", name)]
    for attempt in range(3):  # on a starved machine a pump's ring may be read after the other's next packet
        one, two = tmp_path / f"n1-{attempt}.pcapng", tmp_path / f"n2-{attempt}.pcapng"
        with capturing(lab, "n1", "-w", str(one)), capturing(lab, "n2", "-w", str(two)):
            lab.ping("n1-p1", "n2-p1", count=5)
        argv = ["tshark", "-r", str(one), "-c", "4", "-T", "fields", *fields]
        shown = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        if normal(shown) == normal(documented("capture-tshark")):
            break
    assert normal(shown) == normal(documented("capture-tshark"))
    done = subprocess.run([*LODEN, "read", one, two], capture_output=True, text=True, check=True)
    assert normal(done.stdout) == normal(documented("read"))


def test_lines_and_an_expression(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    with capturing(lab, "n1", "-c", "4", "icmp") as process:
        lab.ping("n1-p1", "n2-p1", count=2)
        output, _ = process.communicate(timeout=30)
    assert normal(output) == normal(documented("capture-lines"))


def test_an_object_for_each_packet(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    with capturing(lab, "n1", "-c", "2", "--json", "--tx", "icmp") as process:
        lab.ping("n1-p1", "n2-p1", count=2)
        output, _ = process.communicate(timeout=30)
    first, second = map(json.loads, output.splitlines())
    assert 0 < second.pop("ns") - first.pop("ns") < 10**10
    assert first == second
    lease = status_of(lab.node("n2"))["lease"]["subnet"]
    ends = {"source": lab.address_of("n1-p1"), "destination": lab.address_of("n2-p1")}
    assert first == {"length": 84, "protocol": "icmp", **ends, "peer": "198.18.1.2", "lease": lease, "dir": "tx"}


def test_a_pipe_into_tshark(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    loden = " ".join([*LODEN, "capture", f"--subnet-file={lab.node('n1').subnet_file}", "-w", "-", "-c", "4"])
    with lab.open_process(
        "n1", ["sh", "-c", f"{loden} 2>/dev/null | tshark -i - -T fields -e frame.interface_name -e ip.src"]
    ) as run:
        until("the capture runs", lambda: status_of(lab.node("n1"))["captures"])
        lab.ping("n1-p1", "n2-p1", count=2)
        output, _ = run.communicate(timeout=60)
    names = [line.split("\t")[0] for line in output.splitlines()]
    assert names == ["overlay", "underlay", "underlay", "overlay"] * 2


def test_a_capture_ends_with_its_daemon_and_its_client_and_its_time(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(1)
    node = lab.node("n1")

    def free() -> bool:
        return not status_of(node)["captures"]

    argv = [*LODEN, "capture", f"--subnet-file={node.subnet_file}"]
    done = lab.run("n1", [*argv, "--for", "300ms", "-w", str(tmp_path / "a.pcapng")])
    assert "0 packets, 0 missing: nothing is missing" in done.stderr
    assert free()
    with lab.open_process("n1", argv) as process:  # killed: it cannot say goodbye
        until("the capture runs", lambda: status_of(node)["captures"])
        process.kill()
    until("the daemon has given it up", free)
    with lab.open_process("n1", [*argv, "-w", str(tmp_path / "b.pcapng")]) as process:
        until("the capture runs", lambda: status_of(node)["captures"])
        assert node.stop_daemon() == 0
        process.wait(30)
    assert read(tmp_path / "b.pcapng")[1], "the daemon finishes the file before it goes"


def test_more_captures_than_there_are_taps_are_refused(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    argv = [*LODEN, "capture", f"--subnet-file={lab.node('n1').subnet_file}"]
    running = [lab.open_process("n1", argv) for _ in range(4)]
    try:
        until("four captures run", lambda: len(status_of(lab.node("n1"))["captures"]) == 4)
        done = lab.run("n1", argv, check=False)
        assert done.returncode == 1
        assert "4 captures are running already" in done.stderr
    finally:
        for process in running:
            process.kill()
            process.wait(10)
