"""Captures through the path once more: made by the plain-Python codec and scapy, so that the path is held to them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Ether

from dataplane.cli import main
from dataplane.debug import fields, pcapng
from dataplane.debug.comparison import Difference
from dataplane.debug.reading import open_captures
from dataplane.debug.replay import Replay, Tally, Wire
from dataplane.path import superframe, wire
from dataplane.path.facts import SourceCheck
from tests.debug.replay_case import CASES, to_capture, to_text
from tests.path.rig import packet, tcp_superframe

IN, OUT = pcapng.INBOUND, pcapng.OUTBOUND
US, PEER, STRANGER = "198.18.1.1", "198.18.1.2", "198.18.1.9"
MAC, THEIR_MAC, VNI = bytes.fromhex("0e1122334455"), bytes.fromhex("0eaabbccddee"), 1
LEASE = "10.5.2.0/24"
THERE, BACK = packet("10.5.1.2", "10.5.2.9"), packet("10.5.2.9", "10.5.1.2", bytes(range(200)))


class File:
    """A capture as `loden capture` writes it, of the wire of udp mode or of VXLAN."""

    def __init__(self, *, frames: bool, snaplen: int = 65535) -> None:
        self.frames = frames
        self.blocks: list[bytes] = []
        self._snaplen = snaplen
        self._number = 0

    def add(
        self, way: int, inner: bytes, *, drop: str = "", peer: str = PEER, lease: str = LEASE, words: str = ""
    ) -> None:
        """An inner packet beside its datagram, which a packet without a route has none of."""
        head = b""
        if self.frames:
            ends = (MAC, THEIR_MAC) if way == OUT else (THEIR_MAC, MAC)
            head = wire.frame_head(VNI, *ends, inner[0] >> 4)
        ends_of = (US, peer) if way == OUT else (peer, US)
        source, port = (40000, 8472) if self.frames else (8285, 8285)
        ip = IP(src=ends_of[0], dst=ends_of[1], id=0)
        outer = bytes(ip / UDP(sport=source, dport=port, chksum=0) / (head + inner))
        known = "" if drop in ("NO_ROUTE", "UNKNOWN_PEER") else f" lease={lease}"
        vni = f" vni={VNI}" if self.frames else ""
        comment = f"peer={peer}{known} dir={'tx' if way == OUT else 'rx'}{vni}{words}{f' drop={drop}' if drop else ''}"
        sides = [(0, inner), (1, outer)] if way == OUT else [(1, outer), (0, inner)]
        for interface, data in sides[: 1 if drop == "NO_ROUTE" else 2]:
            kept = data[: self._snaplen]
            self.blocks.append(
                pcapng.packet(interface, 0, kept, len(data), comment=comment, direction=way, number=self._number)
            )
        self._number += 1

    @property
    def data(self) -> bytes:
        return HEAD + b"".join(self.blocks)


HEAD = pcapng.section("test") + b"".join(pcapng.interface(101, 0, name=name) for name in ("overlay", "underlay"))


def play(
    path: Path, check: SourceCheck = SourceCheck.NODE, known: Wire | None = None
) -> tuple[list[Difference], Tally]:
    def items() -> Iterator[object]:
        with open_captures([path]) as found:
            yield from found

    replay = Replay(items, check, known or Wire())  # type: ignore[arg-type]  # the items are those of a file
    try:
        return list(replay.run(items())), replay.tally  # type: ignore[arg-type]
    finally:
        replay.close()


def mixed(*, frames: bool, snaplen: int = 65535) -> File:
    file = File(frames=frames, snaplen=snaplen)
    for _ in range(3):
        file.add(OUT, THERE)
        file.add(IN, BACK)
    file.add(OUT, packet("10.5.1.2", "10.5.77.1"), drop="NO_ROUTE")
    file.add(IN, packet("10.5.99.9", "10.5.1.2"), drop="SPOOFED_SOURCE")
    file.add(IN, BACK, drop="UNKNOWN_PEER", peer=STRANGER)
    file.add(OUT, THERE)
    return file


both_wires = pytest.mark.parametrize("frames", [False, True], ids=["udp", "vxlan"])


@both_wires
def test_what_the_path_still_does_does_not_differ(tmp_path: Path, frames: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(mixed(frames=frames).data)
    found, tally = play(path)
    assert found == []
    assert (tally.tx, tally.rx, tally.unfit, tally.cut) == (5, 5, 0, 0)


@both_wires
def test_every_byte_that_is_altered_is_found_in_its_packet_and_in_no_other(tmp_path: Path, frames: bool) -> None:
    """Of the third packet each way: what comes before has told of lease and MACs. Left out: what no path decides."""
    head = wire.FRAME_HEAD if frames else 0
    blind = {*range(4, 9), 10, 11, *((20, 21) if frames else ()), 26, 27, 1}
    skipped = re.compile("outer (IPv4|UDP) (total length|length|version|protocol|source port|destination port|source)")
    path, differed = tmp_path / "file", 0
    for number in (4, 5):
        for side in (0, 1):
            file = mixed(frames=frames)
            at = 2 * number + side
            block, outer = file.blocks[at], (side == 1) == (number == 4)
            inner = THERE if number == 4 else BACK
            for offset in range(28 + head + len(inner) if outer else len(inner)):
                data = bytearray(block)
                data[28 + offset] ^= 0x10
                name = fields.field_of(block[28:], offset, outer=outer, vxlan=frames)
                if outer and (offset in blind or skipped.match(name) or (number == 5 and offset < 28)):
                    continue
                file.blocks[at] = bytes(data)
                path.write_bytes(file.data)
                found, _ = play(path)
                assert [one.record.number for one in found] == [number], (number, side, offset, name)
                differed += 1
    assert differed > 3 * len(THERE)


def test_a_difference_is_told_with_both_sides_and_its_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = mixed(frames=False)
    data = bytearray(file.blocks[9])
    data[28 + 28 + 22] ^= 0xFF
    file.blocks[9] = bytes(data)
    path = tmp_path / "file"
    path.write_bytes(file.data)
    assert main(["replay", str(path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "packet 4  tx 10.5.1.2:1000 > 10.5.2.9:2000 udp, 33 bytes  peer=198.18.1.2 lease=10.5.2.0/24",
        "  outer datagram, byte 50: inner UDP destination port",
        "    recorded   198.18.1.1:8285 > 198.18.1.2:8285 udp, 61 bytes: f8 d0 00 0d " + THERE[26:30].hex(" "),
        "    comes out  198.18.1.1:8285 > 198.18.1.2:8285 udp, 61 bytes: 07 d0 00 0d " + THERE[26:30].hex(" "),
        "5 packets encapsulated, 5 datagrams decapsulated: 1 differ",
    ]
    assert main(["replay", "--json", str(path)]) == 1
    (one,) = json.loads(capsys.readouterr().out)["differences"]
    assert (one["packet"], one["differs"], one["byte"]) == (4, "outer datagram", 50)


def test_another_verdict_is_a_difference(tmp_path: Path) -> None:
    """The path of another version, or with another source check, may take what was dropped."""
    path = tmp_path / "file"
    path.write_bytes(mixed(frames=False).data)
    found, _ = play(path, SourceCheck.OFF)
    assert [(one.record.number, one.recorded, one.comes_out) for one in found] == [
        (7, "drop=SPOOFED_SOURCE", "accepted"),
        (8, "drop=UNKNOWN_PEER", "accepted"),
    ]


def test_a_lease_that_moves_is_one_difference_and_then_believed(tmp_path: Path) -> None:
    file = File(frames=True)
    for peer in (PEER, PEER, STRANGER, STRANGER, STRANGER):
        file.add(OUT, THERE, peer=peer)
    path = tmp_path / "file"
    path.write_bytes(file.data)
    found, _ = play(path)
    assert [(one.record.number, one.field) for one in found] == [(2, "outer IPv4 destination")]


def test_a_superframe_is_cut_again_into_what_was_recorded(tmp_path: Path) -> None:
    header, whole = tcp_superframe(7 * 1000 + 77, 1000)
    segments = superframe.segments(header, whole)
    assert segments is not None
    file = File(frames=True)
    for each in segments:
        file.add(OUT, each, words=f" superframe=5/{len(whole)}")
    path = tmp_path / "file"
    path.write_bytes(file.data)
    found, tally = play(path)
    assert (found, tally.superframes, tally.tx) == ([], 1, 8)
    block = bytearray(file.blocks[6])
    block[28 + 70] ^= 1
    file.blocks[6] = bytes(block)
    path.write_bytes(file.data)
    found, tally = play(path)
    assert [one.record.number for one in found] == [3], "an altered segment, and no other"
    assert tally.superframes == 0


def test_messages_are_merged_again_and_what_is_written_is_cut(tmp_path: Path) -> None:
    """A kernel merges datagrams of one size: the path takes them apart, and merges their packets for the device."""
    segments = superframe.segments(*tcp_superframe(9 * 1000 + 1, 1000))
    assert segments is not None
    back = [each[:12] + each[16:20] + each[12:16] + each[20:] for each in segments]
    file = File(frames=False)
    for each in back:
        file.add(IN, each, words=f" superframe=3/{sum(map(len, back))}")
    path = tmp_path / "file"
    path.write_bytes(file.data)
    found, tally = play(path)
    assert (found, tally.superframes, tally.rx) == ([], 1, 10)


@pytest.mark.parametrize("snaplen", [50, 64, 90, 128])
@both_wires
def test_what_a_capture_has_cut_off_is_told_apart(tmp_path: Path, frames: bool, snaplen: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(mixed(frames=frames, snaplen=snaplen).data)
    found, tally = play(path)
    assert found == []
    assert tally.cut > 0
    assert tally.cut + tally.unfit + tally.tx + tally.rx >= 10


def test_what_the_kernel_decided_is_not_judged(tmp_path: Path) -> None:
    file = File(frames=False)
    file.add(OUT, THERE, drop="SEND_FAILED")
    for drop in ("TUN_WRITE", "PATH_MTU", "PATH_MTU"):
        file.add(OUT, THERE, drop=drop)
        if drop != "SEND_FAILED":
            del file.blocks[-1]
    path = tmp_path / "file"
    path.write_bytes(file.data)
    found, tally = play(path)
    assert found == []
    assert tally.undecided == {"SEND_FAILED": 1, "TUN_WRITE": 1, "PATH_MTU": 2}


def test_packets_that_travel_without_a_datagram_cannot_be_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a capture of host-gw shows them: the same packet on both interfaces."""
    made = HEAD
    for number, inner in enumerate((THERE, bytes(IP(src="10.5.1.2", dst="10.5.2.9") / TCP()))):
        for interface in (0, 1):
            made += pcapng.packet(interface, 0, inner, len(inner), comment="dir=tx", direction=OUT, number=number)
    path = tmp_path / "file"
    path.write_bytes(made)
    assert main(["replay", str(path)]) == 2
    assert "nothing in it could be fed" in capsys.readouterr().err


@both_wires
def test_a_file_of_the_underlay_goes_round(tmp_path: Path, frames: bool) -> None:
    """As dumpcap writes it: Ethernet, one interface, other traffic in between."""
    port = 8472 if frames else 8285
    made = pcapng.section("dumpcap") + pcapng.interface(1, 262144, name="eth0")
    for number, inner in enumerate([THERE, BACK, THERE, b"\x45no packet at all, but long enough", BACK]):
        ends = ((US, MAC), (PEER, THEIR_MAC))
        (source, mac), (target, their) = ends if inner != BACK else ends[::-1]
        head = wire.frame_head(VNI, mac, their, 4) if frames else b""
        datagram = IP(src=source, dst=target, id=number) / UDP(sport=port, dport=port) / (head + inner)
        other = bytes(Ether() / IP(src=US, dst=PEER) / ICMP())
        for data in (bytes(Ether() / datagram), other):
            made += pcapng.packet(0, 0, data, len(data))
    path = tmp_path / "file"
    path.write_bytes(made)
    found, tally = play(path)
    assert [(one.record.number, one.recorded, one.comes_out) for one in found] == [
        (7, f"carried to {PEER}", "drop=LENGTH")
    ]
    assert (tally.rx, tally.unfit) == (5, 5)


def test_a_port_and_a_wire_can_be_named(tmp_path: Path) -> None:
    made = pcapng.section("dumpcap") + pcapng.interface(101, 0, name="eth0")
    outer = bytes(IP(src=US, dst=PEER) / UDP(sport=7777, dport=7777) / THERE)
    path = tmp_path / "file"
    path.write_bytes(made + pcapng.packet(0, 0, outer, len(outer)))
    assert main(["replay", str(path)]) == 2, "nothing of an overlay is in it"
    assert main(["replay", "--port", "7777", "--wire", "udp", str(path)]) == 0
    assert main(["replay", "--port", "7777", str(path)]) == 0
    assert main(["replay", "--port", "7777", "--wire", "vxlan", str(path)]) == 1


@pytest.mark.parametrize("case", sorted(CASES.glob("*.txt")), ids=lambda path: path.stem)
def test_a_bug_report_is_a_test_case(tmp_path: Path, case: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(to_capture(case.read_text()))
    found, tally = play(path)
    assert found == []
    assert tally.tx + tally.rx > 0
    assert tally.unfit == 0


def test_a_case_holds_what_the_capture_held() -> None:
    data = mixed(frames=True).data
    assert to_text(to_capture(to_text(data))) == to_text(data)
    assert to_text(data, {3}).count("\n") == 2


@both_wires
def test_hostile_files_end_in_a_sentence(tmp_path: Path, frames: bool, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(8285)
    whole, path = mixed(frames=frames).data, tmp_path / "file"
    codes = set()
    for _ in range(200):
        data = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.2 else whole)
        for _ in range(rng.choice((1, 3, 30))):
            if data:
                data[rng.randrange(len(data))] = rng.choice((0, 1, 0x45, 0x60, 0xFF, rng.randrange(256)))
        path.write_bytes(data)
        codes.add(code := main(["replay", str(path)]))
        said = capsys.readouterr()
        assert (code == 2) == bool(said.err)
        assert said.err.count("\n") <= 1
    assert codes == {0, 1, 2}


def test_a_file_that_cannot_be_used_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, said in (
        (b"", "it is empty"),
        (b"hello, world", "not a pcapng file"),
        (HEAD, "there is no packet in it"),
    ):
        (tmp_path / "file").write_bytes(text)
        assert main(["replay", str(tmp_path / "file")]) == 2
        assert said in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "nobody")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["replay", "--most", "-1", str(tmp_path / "file")]) == 1


def test_words_that_say_nonsense_are_no_words(tmp_path: Path) -> None:
    """Comments come from whoever made the file."""
    file = File(frames=True)
    for words in (f" superframe={'9' * 5000}/1", " superframe=/", " lease=::/0 vni=99999999999", " superframe=1/0"):
        file.add(OUT, THERE, words=words)
        file.add(IN, BACK, words=words, lease="::ffff:0:0/97")
    path = tmp_path / "file"
    path.write_bytes(file.data)
    _, tally = play(path)
    assert tally.tx + tally.rx == 8


def test_every_byte_of_a_packet_has_a_name() -> None:
    inner = bytes(IP(src="10.5.1.2", dst="10.5.2.9", options=b"\x01" * 4) / TCP(flags="S") / b"data")
    names = [fields.field_of(inner, at) for at in range(len(inner))]
    assert names[20] == "IPv4 options"
    assert names[24] == "TCP source port"
    assert names[24 + 13] == "TCP flags"
    assert names[-1] == "payload"
    for data in (b"", b"\x45", b"\x60" * 60, bytes(100)):
        for at in range(len(data) + 1):
            for outer in (False, True):
                assert fields.field_of(data, at, outer=outer, vxlan=True)
