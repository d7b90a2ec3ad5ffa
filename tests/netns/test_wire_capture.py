"""`loden capture` by packet sockets: where the kernel carries the packets, and with `--outer=wire`.

The judge is tcpdump behind the kernel's own cutting: the switch's ends of the cables have no offloads, so that what
leaves the switch was cut and finished by the kernel, whatever the nodes handed over.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from dataplane.debug import dissect
from dataplane.debug.pcapng import INBOUND, LINKTYPE_ETHERNET, Packet
from dataplane.lab import Lab, measure
from tests.examples import documented, normal
from tests.netns.conftest import MakeLab
from tests.netns.observing import python_in, status_of, until
from tests.netns.test_capture import LODEN, capturing, grows_no_more, read

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600)]

TCP_BYTES = 3_000_000
VXLAN_HEADS = {4: 14 + 20 + 8 + 8 + 14, 6: 14 + 40 + 8 + 8 + 14}


@contextmanager
def behind_the_switch(lab: Lab, directory: Path, what: str) -> Iterator[dict[str, Path]]:
    """What leaves the switch for each node, as the kernel cuts and finishes it on the way out."""
    paths = {node: directory / f"to-{node}.pcap" for node in lab.nodes}
    with ExitStack() as stack:
        for node, path in paths.items():
            lab.run("switch", ["ethtool", "-K", node, "tx", "off", "sg", "off", "tso", "off", "gso", "off"])
            argv = ["tcpdump", "-i", node, "-Q", "out", "-B", "32768", "-U", "-w", str(path), what]
            process = stack.enter_context(lab.open_process("switch", argv))
            stack.callback(process.kill)
            until("tcpdump listens", partial(has_begun, path))
        yield paths
        until("tcpdump has written all", lambda: all(map(grows_no_more, paths.values())))


def has_begun(path: Path) -> bool:
    return path.exists() and path.stat().st_size >= 24


def frames_of(path: Path) -> Counter[bytes]:
    """Of an old pcap file in this machine's byte order."""
    data, at, found = path.read_bytes(), 24, Counter[bytes]()
    while at < len(data):
        captured = int.from_bytes(data[at + 8 : at + 12], sys.byteorder)
        found[data[at + 16 : at + 16 + captured]] += 1
        at += 16 + captured
    return found


def pairs_of(path: Path) -> list[tuple[Packet, Packet]]:
    """(inner, outer) of every packet; fails where one has no other side."""
    packets, statistics = read(path)
    assert statistics
    assert [each.dropped for each in statistics] == [0, 0]
    found = []
    for one, two in zip(packets[::2], packets[1::2], strict=True):
        assert (one.number, one.comment, one.direction) == (two.number, two.comment, two.direction)
        assert one.interface.name != two.interface.name
        assert one.interface.name == ("underlay" if one.direction == INBOUND else "overlay"), "as the node saw it"
        found.append((one, two) if one.interface.name == "overlay" else (two, one))
    return found


def tshark(path: Path, *words: str) -> str:
    """Opened without a warning, every checksum looked at."""
    checks = [f"{name}.check_checksum:TRUE" for name in ("ip", "tcp", "udp")]
    argv = ["tshark", "-r", str(path), *(word for check in checks for word in ("-o", check)), *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert not [line for line in done.stderr.splitlines() if "Running as user" not in line]
    return done.stdout


def test_kernel_and_userspace_nodes_show_what_was_on_the_cable(make_lab: MakeLab, tmp_path: Path) -> None:
    """Superframes of the kernel's device and runs of our path are cut as the kernel cuts them, IPv4 and IPv6."""
    lab = make_lab(2, backend="vxlan", dataplane="kernel,userspace", families="46")
    files = {node: tmp_path / f"{node}.pcapng" for node in lab.nodes}
    words = ["--buffer", "64", "-w"]
    between = " or ".join(f"host {lab.address_of('n1-p1', version)}" for version in (4, 6))
    with (
        behind_the_switch(lab, tmp_path, "udp dst port 8472") as wires,
        capturing(lab, "n1", *words, str(files["n1"]), between),
        capturing(lab, "n2", *words, str(files["n2"]), "--outer=wire", between),
    ):
        for version in (4, 6):
            lab.ping("n1-p1", "n2-p1", count=2, version=version)
            for source, target in (("n1-p1", "n2-p1"), ("n2-p1", "n1-p1")):
                with lab.traffic("tcp", source, target, f"--bytes={TCP_BYTES}", version=version) as there:
                    assert measure.verdict(there, 120)["equal"]
    for node, path in files.items():
        found = pairs_of(path)
        for inner, outer in found:
            assert outer.interface.linktype == LINKTYPE_ETHERNET
            assert outer.data[VXLAN_HEADS[4 if outer.data[12:14] == b"\x08\x00" else 6] :] == inner.data
        for direction, to in ((1, node), (2, "n1" if node == "n2" else "n2")):
            shown = Counter(outer.data for inner, outer in found if inner.direction == direction)
            carried = Counter({f: n for f, n in frames_of(wires[to]).items() if not is_chatter(f)})
            assert shown == carried, f"{node}, direction {direction}"
        sizes = [len(inner.data) for inner, _ in found]
        assert max(sizes) <= 1450
        assert {inner.data[0] >> 4 for inner, _ in found} == {4, 6}
        assert any("superframe=" in inner.comment for inner, _ in found if inner.direction == 2)
        assert "Malformed" not in tshark(path)
        assert not tshark(path, "-Y", "tcp.checksum.status == 0 || ip.checksum.status == 0 || udp.checksum.status == 0")


def is_chatter(frame: bytes) -> bool:
    """Neighbour discovery and multicast listeners' reports, which come when they come."""
    inner = frame[VXLAN_HEADS[4 if frame[12:14] == b"\x08\x00" else 6] :]
    seen = dissect.look(inner)
    return seen is None or seen.source.is_link_local or seen.destination.is_multicast


@pytest.mark.parametrize(
    ("backend", "options"),
    [("host-gw", {"families": "46"}), ("vxlan", {"direct_routing": True}), ("udp", {"direct_routing": True})],
)
def test_packets_without_encapsulation(
    make_lab: MakeLab, tmp_path: Path, backend: str, options: dict[str, object]
) -> None:
    """The inner packet on the pods' side, and the frame in which it left: one hop and a link header lie between."""
    lab = make_lab(2, backend=backend, **options)
    path = tmp_path / "n1.pcapng"
    with (
        behind_the_switch(lab, tmp_path, "net 10.244.0.0/16 or net fd00:10:244::/48") as wires,
        capturing(lab, "n1", "-w", str(path), "--outer=wire", "--peer", "198.18.1.2"),
        lab.traffic("tcp", "n1-p1", "n2-p1", f"--bytes={TCP_BYTES}") as there,
    ):
        assert measure.verdict(there, 120)["equal"]
        lab.ping("n1-p1", "n2-p1", count=2)
    found = pairs_of(path)
    for inner, outer in found:
        beneath = outer.data[14:]
        assert (beneath[:8], beneath[9:10], beneath[12:]) == (inner.data[:8], inner.data[9:10], inner.data[12:])
        hop = -1 if inner.direction == 2 else 1
        assert inner.data[8] + hop == beneath[8]
        assert "peer=198.18.1.2 lease=10.244." in inner.comment
    for direction, to in ((1, "n1"), (2, "n2")):
        shown = Counter(outer.data for _, outer in found if outer.direction == direction)
        assert shown == frames_of(wires[to])
    assert not tshark(path, "-Y", "tcp.checksum.status == 0 || ip.checksum.status == 0")


def test_a_peers_v6_packets_without_encapsulation(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(2, backend="host-gw", families="46")
    path = tmp_path / "n1.pcapng"
    with capturing(lab, "n1", "-w", str(path), "ip6", "and", "icmp6"):
        lab.ping("n1-p1", "n2-p1", count=3, version=6)
    found = pairs_of(path)
    assert len(found) == 6
    assert all(outer.data[14 + 40 :] == inner.data[40:] for inner, outer in found)
    assert all("peer=fd00:198:18::1:2" in inner.comment for inner, _ in found)


SEND = """
import os, socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for line in sys.argv[2:]:
    s.sendto(bytes.fromhex(line), (sys.argv[1], 8472))
print("ready", flush=True)
sys.stdin.read()
"""


def test_what_is_seen_on_one_side_only_is_said_to_be(make_lab: MakeLab, tmp_path: Path) -> None:
    """Garbage, another VNI, and packets that a firewall takes between device and wire; none of them ends a capture."""
    lab = make_lab(2, backend="vxlan")
    path = tmp_path / "n1.pcapng"
    strange = "0800000000000500" + "02" * 12 + "0800" + "4500001c00000000401100000a09090a0a09090b0001000200080000"
    garbage = ["", "00", "08" * 7, "08" + "00" * 40, "ff" * 1400, "0800000000000100" + "02" * 12 + "0800" + "4f"]
    with capturing(lab, "n1", "-w", str(path)):
        with python_in(lab, "n2", SEND, "198.18.1.1", *garbage, strange):
            assert lab.ping("n1-p1", "n2-p1", count=1).whole
        lab.run("n1", ["nft", "add table inet t; add chain inet t o { type filter hook output priority 0; }"])
        lab.run("n1", ["nft", "add rule inet t o udp dport 8472 drop"])
        lab.ping("n1-p1", "n2-p1", count=1)
        lab.run("n1", ["nft", "delete table inet t"])
        assert lab.ping("n1-p1", "n2-p1", count=1).whole
    packets, statistics = read(path)
    assert statistics[0].comment == "nothing is missing"
    alone = [each for each in packets if "inner=" in each.comment or "outer=" in each.comment]
    words = [each.comment.split(" ")[-1] for each in alone]
    assert words == ["inner=none"] * len(garbage) + ["inner=unseen", "outer=unseen"]
    assert [each.interface.name for each in alone] == ["underlay"] * (len(garbage) + 1) + ["overlay"]
    assert alone[-2].comment == "peer=198.18.1.2 lease={} dir=rx vni=5 inner=unseen".format(
        status_of(lab.node("n2"))["lease"]["subnet"]
    )
    assert len(packets) - len(alone) == 2 * 4, "and the pings are whole"


MUTATE = """
import random, socket, sys
rng = random.Random(7)
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
for _ in range(2000):
    frame = bytearray.fromhex(sys.argv[1])
    for _ in range(rng.randrange(1, 5)):
        frame[rng.randrange(14, len(frame))] = rng.randrange(256)
    s.send(frame[:rng.randrange(34, len(frame) + 1)])
print("ready", flush=True)
sys.stdin.read()
"""


def test_malformed_frames_do_not_end_a_capture(make_lab: MakeLab, tmp_path: Path) -> None:
    """Frames of a real capture, cut short and with wrong bytes anywhere behind the Ethernet header."""
    lab = make_lab(2, backend="vxlan")
    before, path = tmp_path / "before.pcapng", tmp_path / "n2.pcapng"
    with capturing(lab, "n2", "-c", "1", "-w", str(before), "--tx", "icmp") as process:
        lab.ping("n1-p1", "n2-p1", count=1)
        process.wait(30)
    ((_, outer),) = pairs_of(before)
    with capturing(lab, "n1", "-w", str(path)), python_in(lab, "n2", MUTATE, outer.data.hex()):
        assert lab.ping("n1-p1", "n2-p1", count=2).whole
    packets, statistics = read(path)
    assert statistics[0].comment == "nothing is missing"
    assert sum(" inner=" in each.comment for each in packets) > 500
    assert sum(" inner=" not in each.comment for each in packets[-8:]) == 8


def test_a_device_that_is_made_again_and_a_client_that_is_killed(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend="vxlan")
    node = lab.node("n1")
    argv = [*LODEN, "capture", f"--subnet-file={node.subnet_file}", "icmp"]

    def seen() -> int:
        return int(status_of(node)["captures"][0]["matched"])

    with lab.open_process("n1", argv) as process:
        until("the capture runs", lambda: status_of(node)["captures"])
        lab.run("n1", ["ip", "link", "del", "flannel.1"])
        until("the device is back", lambda: lab.ping("n1-p1", "n2-p1", count=1).whole)
        until("its packets are seen", lambda: lab.ping("n1-p1", "n2-p1", count=1).whole and seen() >= 2)
        assert len(packet_sockets(lab)) == 2
        process.kill()
    until("the daemon has given it up", lambda: not status_of(node)["captures"])
    assert packet_sockets(lab) == []


def packet_sockets(lab: Lab) -> list[str]:
    return lab.run("n1", ["cat", "/proc/net/packet"]).stdout.splitlines()[1:]


@pytest.mark.parametrize(
    ("backend", "words", "said"),
    [
        ("vxlan", ["--drops"], "packets that are dropped are seen only where the daemon carries them itself"),
        ("vxlan", ["--outer=rebuilt"], "the kernel carries this node's packets"),
        ("udp", ["--outer=wire", "drop NO_ROUTE"], "without --outer=wire"),
        ("udp", ["--outer=guessed"], "outer headers are rebuilt or wire"),
        ("alloc", [], "backend alloc carries no packets between nodes"),
    ],
)
def test_what_cannot_be_seen_is_refused(make_lab: MakeLab, backend: str, words: list[str], said: str) -> None:
    lab = make_lab(1, backend=backend)
    argv = [*LODEN, "capture", f"--subnet-file={lab.node('n1').subnet_file}", *words]
    done = lab.run("n1", argv, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert packet_sockets(lab) == []


def test_what_finds_no_room_is_owned_up_to(make_lab: MakeLab, tmp_path: Path) -> None:
    """A client that stands still holds the daemon up, and then the kernel's rings are full."""
    lab = make_lab(2, backend="vxlan")
    path = tmp_path / "n1.pcapng"
    with capturing(lab, "n1", "--buffer", "1", "-w", str(path)) as process:
        until("the client writes", path.exists)
        process.send_signal(signal.SIGSTOP)
        with lab.traffic("tcp", "n1-p1", "n2-p1", "--bytes=30000000") as there:
            assert measure.verdict(there, 120)["equal"]
        process.send_signal(signal.SIGCONT)
    packets, (overlay, underlay) = read(path)
    assert packets
    assert overlay.dropped
    assert underlay.dropped
    assert overlay.comment == (
        f"{overlay.dropped} frames of the overlay and {underlay.dropped} of the underlay found no room: "
        "a larger --buffer helps"
    )


def test_the_example_of_a_kernel_node(make_lab: MakeLab, tmp_path: Path) -> None:
    lab = make_lab(2, backend="vxlan")
    path = tmp_path / "ping.pcapng"
    with capturing(lab, "n1", "-c", "2", "-w", str(path), "icmp") as process:
        lab.ping("n1-p1", "n2-p1", count=1)
        process.wait(30)
    fields = [
        *("-T", "fields", "-e", "frame.interface_name", "-e", "frame.protocols", "-e", "frame.len"),
        *("-e", "frame.comment"),
    ]
    shown = tshark(path, "-d", "udp.port==8472,vxlan", *fields)
    assert normal(shown) == normal(documented("capture-wire"))
