"""What a client makes of a capture: files, rings of files, lines; and what it does where a disk is full or cut off."""

from __future__ import annotations

import io
import re
import stat
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6

from dataplane.debug import dissect, pcapng, recording
from dataplane.errors import CaptureError, DropReason
from tests.namespaces import open_namespace

NS = 1_700_000_000_123_456_789
SECOND = 10**9
INNER = bytes(IP(src="10.244.1.2", dst="10.244.2.7") / TCP(sport=4000, dport=80, seq=77, flags="SA") / b"abc")


def head() -> bytes:
    interfaces = [pcapng.interface(101, 0, name=name) for name in ("overlay", "underlay")]
    return pcapng.section("test") + b"".join(interfaces) + pcapng.names({ip_address("198.18.1.2"): "node-b"})


def pair(number: int, *, inner: bytes = INNER, seconds: float = 0, comment: str = "peer=b dir=tx") -> bytes:
    ns = NS + int(seconds * SECOND)
    return b"".join(
        pcapng.packet(interface, ns, inner, len(inner), comment=comment, direction=2, number=number)
        for interface in (0, 1)
    )


def foot(count: int) -> bytes:
    return b"".join(
        pcapng.statistics(i, NS, start=NS, received=count, dropped=0, delivered=count, comment="whole")
        for i in range(2)
    )


def capture(count: int) -> bytes:
    return head() + b"".join(pair(i) for i in range(count)) + foot(count)


def packets(path: Path) -> list[pcapng.Packet]:
    with path.open("rb") as file:
        return [block for block in pcapng.Reader(file, str(path)) if isinstance(block, pcapng.Packet)]


def test_a_file_is_the_stream_and_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    path.write_bytes(b"older and longer" * 1000)
    path.chmod(0o644)
    with recording.open_file(path) as file:
        statistics = recording.copy(io.BytesIO(capture(9)), file, str(path))
    assert path.read_bytes() == capture(9)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [(each.delivered, each.comment) for each in statistics] == [(9, "whole")] * 2


def test_a_stream_without_an_end_has_no_statistics(tmp_path: Path) -> None:
    with recording.open_file(tmp_path / "a") as file:
        assert recording.copy(io.BytesIO(head() + pair(0)), file, "a") == []


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"cannot write .*/none/a: No such file or directory"):
        recording.open_file(tmp_path / "none" / "a")
    with pytest.raises(CaptureError, match="Is a directory"):
        recording.open_file(tmp_path)


FULL_DISK = """
import io, sys
from pathlib import Path
from dataplane.debug import recording
from dataplane.errors import CaptureError
from tests.debug.test_recording import capture
ring = sys.argv[2] == "ring"
try:
    if ring:
        with recording.Ring(Path(sys.argv[1]), size=200_000, seconds=0, keep=0) as made:
            made.take(io.BytesIO(capture(5000)))
    else:
        with recording.open_file(Path(sys.argv[1])) as file:
            recording.copy(io.BytesIO(capture(5000)), file, sys.argv[1])
except CaptureError as error:
    print(error)
for path in sorted(Path(sys.argv[1]).parent.iterdir()):
    from tests.debug.test_recording import packets
    print(len(packets(path)))
"""


@pytest.mark.netns
@pytest.mark.parametrize("way", ["file", "ring"])
def test_a_full_disk_leaves_a_whole_file(tmp_path: Path, way: str) -> None:
    """A disk of 300 KiB, in a mount namespace of its own; every file that is left can be read to its end."""
    with open_namespace() as node:
        code = f"import os; os.system('mount -t tmpfs -o size=300k none {tmp_path}')\n{FULL_DISK}"
        argv = ("unshare", "--mount", sys.executable, "-c", code, str(tmp_path / "a.pcapng"), way)
        here = Path(__file__).parents[2]
        done = subprocess.run(node.argv(*argv), capture_output=True, text=True, check=True, cwd=here)
    said, *counts = done.stdout.splitlines()
    assert re.search(r"cannot go on writing .*: No space left on device; what was written before is whole: \d+", said)
    assert sum(map(int, counts)) > 500


def test_files_in_turn_by_size_each_a_capture_of_its_own(tmp_path: Path) -> None:
    with recording.Ring(tmp_path / "r.pcapng", size=3000, seconds=0, keep=0) as ring:
        statistics = ring.take(io.BytesIO(capture(60)))
    files = sorted(tmp_path.iterdir())
    assert files[0].name == "r_0001.pcapng"
    assert len(files) > 5
    assert [packet.number for path in files for packet in packets(path)] == [i for i in range(60) for _ in range(2)]
    assert all(path.stat().st_size <= 3000 for path in files)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    assert statistics[0].delivered == 60
    for path in files:
        assert path.read_bytes().startswith(head())


def test_the_oldest_file_goes(tmp_path: Path) -> None:
    with recording.Ring(tmp_path / "r", size=3000, seconds=0, keep=2) as ring:
        ring.take(io.BytesIO(capture(60)))
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    assert packets(kept[-1])[-1].number == 59


def test_files_in_turn_by_time(tmp_path: Path) -> None:
    data = head() + b"".join(pair(i, seconds=i * 0.4) for i in range(10)) + foot(10)
    with recording.Ring(tmp_path / "r.pcapng", size=0, seconds=1, keep=0) as ring:
        ring.take(io.BytesIO(data))
    numbers = [sorted({packet.number or 0 for packet in packets(path)}) for path in sorted(tmp_path.iterdir())]
    assert numbers == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_a_line_for_each_packet_and_each_gap() -> None:
    lines: list[str] = []
    data = head() + pair(0)
    data += pcapng.packet(0, NS, INNER, len(INNER), comment="dir=tx drop=NO_ROUTE", direction=2, lost=3, number=1)
    outer = bytes(IP(src="198.18.1.9", dst="198.18.1.1") / UDP(sport=8285, dport=8285) / b"?")
    data += pcapng.packet(
        1, NS, outer, len(outer), comment="peer=198.18.1.9 dir=rx drop=NOT_IP inner=none", direction=1, number=2
    )
    statistics = recording.show(io.BytesIO(data + foot(3)), lines.append)
    said = [re.sub(r"^\d\d:\d\d:\d\d", "T", line) for line in lines]
    assert said == [
        "T.123456 tx 10.244.1.2:4000 > 10.244.2.7:80 tcp [S.] seq 77, 43 bytes  peer=b",
        "--- 3 packets are missing here",
        "T.123456 tx 10.244.1.2:4000 > 10.244.2.7:80 tcp [S.] seq 77, 43 bytes  drop=NO_ROUTE",
        "T.123456 rx 198.18.1.9:8285 > 198.18.1.1:8285 udp, 29 bytes  peer=198.18.1.9 drop=NOT_IP inner=none",
    ]
    assert statistics[0].delivered == 3


@pytest.mark.parametrize(
    ("packet", "words"),
    [
        (IP(src="10.1.1.1", dst="10.1.1.2") / ICMP(seq=4), "10.1.1.1 > 10.1.1.2 icmp echo request seq 4, 28 bytes"),
        (IP(src="10.1.1.1", dst="10.1.1.2") / ICMP(type=3, code=4), "icmp unreachable code 4, 28 bytes"),
        (IP(src="10.1.1.1", dst="10.1.1.2", frag=2, proto=17) / b"12345678", "10.1.1.2 udp fragment, 28 bytes"),
        (IP(src="10.1.1.1", dst="10.1.1.2", proto=47), "10.1.1.1 > 10.1.1.2 proto 47, 20 bytes"),
        (IPv6(src="fd00::1", dst="fd00::2") / UDP(sport=1, dport=2), "[fd00::1]:1 > [fd00::2]:2 udp, 48 bytes"),
        (IPv6(src="fd00::1", dst="fd00::2") / ICMPv6EchoRequest(seq=9), "fd00::2 icmp6 echo request seq 9, 48 bytes"),
    ],
)
def test_a_line_says_what_a_packet_is(packet: IP, words: str) -> None:
    data = bytes(packet)
    made = pcapng.Packet(pcapng.Interface(0, 101, 0), NS, data, len(data), direction=1)
    assert words in dissect.line(made)


@pytest.mark.parametrize("reason", DropReason)
def test_every_drop_reason_fits_a_line(reason: DropReason) -> None:
    made = pcapng.Packet(pcapng.Interface(0, 101, 0), NS, b"x", 1, comment=f"dir=tx drop={reason.name}")
    assert dissect.line(made).endswith(f"1 bytes that are no IP packet  drop={reason.name}")
