"""Captures read as a whole: pairs, flows, two nodes' files merged; beside scapy, which makes the packets."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Raw

from dataplane.cli import main
from dataplane.debug import layers, pcapng, reading
from dataplane.debug.dissect import FlowKey
from dataplane.debug.reading import Flow, Pair

NS = 1_700_000_000_000_000_000
MS = 1_000_000
IN, OUT = pcapng.INBOUND, pcapng.OUTBOUND


def tcp(sequence: int, size: int, flags: str = "A", identity: int = 1) -> bytes:
    made = IP(src="10.244.1.2", dst="10.244.2.7", id=identity) / TCP(sport=4000, dport=80, seq=sequence, flags=flags)
    return bytes(made / bytes(size))


class File:
    """A capture as Loden writes it."""

    def __init__(self) -> None:
        interfaces = [pcapng.interface(101, 0, name=name) for name in ("overlay", "underlay")]
        self.data = pcapng.section("test") + b"".join(interfaces)
        self._number = 0

    def add(self, inner: bytes, ms: float = 0, *, way: int = OUT, drop: str = "", lost: int = 0) -> None:
        ns = NS + int(ms * MS)
        comment = f"peer=b dir={'tx' if way == OUT else 'rx'}{f' drop={drop}' if drop else ''}"
        outer = bytes(IP(src="198.18.1.1", dst="198.18.1.2") / UDP(sport=8285, dport=8285) / inner)
        sides = [(0, inner), (1, outer)] if way == OUT else [(1, outer), (0, inner)]
        for interface, data in sides[: 1 if drop == "NO_ROUTE" else 2]:
            self.data += pcapng.packet(
                interface, ns, data, len(data), comment=comment, direction=way, number=self._number, lost=lost
            )
        self._number += 1

    def end(self, missing: int = 0) -> None:
        for interface in (0, 1):
            self.data += pcapng.statistics(interface, NS, start=NS, received=9, dropped=missing, delivered=self._number)

    def read(self) -> list[Pair | pcapng.Statistics]:
        return list(reading.pairs(pcapng.Reader(io.BytesIO(self.data), "x")))


def only(flows: dict[FlowKey, Flow]) -> Flow:
    (flow,) = flows.values()
    return flow


def test_every_packet_is_in_one_pair() -> None:
    file = File()
    file.add(tcp(0, 10))
    file.add(tcp(10, 10), way=IN)
    file.add(tcp(20, 10), drop="NO_ROUTE")
    file.end()
    one, two, three, *statistics = file.read()
    for pair in (one, two):
        assert isinstance(pair, Pair)
        assert pair.inner is not None
        assert pair.outer is not None
        assert pair.outer.data.endswith(pair.inner.data)
    assert isinstance(three, Pair)
    assert (three.outer, three.drop) == (None, "NO_ROUTE")
    assert len(statistics) == 2


def test_flows_count_what_was_carried_what_came_again_and_what_did_not_follow() -> None:
    file = File()
    for sequence, size, flags in [(99, 0, "S"), (100, 10, "A"), (110, 10, "A"), (110, 10, "A"), (140, 10, "A")]:
        file.add(tcp(sequence, size, flags))
    file.add(tcp(150, 10), drop="NO_ROUTE")
    file.end(missing=4)
    summary = reading.flows(file.read())
    flow = only(summary.flows)
    assert flow.key == ("tcp", "10.244.1.2:4000", "10.244.2.7:80")
    assert (flow.packets, flow.bytes) == (5, 5 * 40 + 40)
    assert (flow.retransmitted, flow.gaps, flow.drops) == (1, 1, {"NO_ROUTE": 1})
    assert summary.missing == 4


def test_sequence_numbers_go_round_and_keep_alives_are_no_retransmissions() -> None:
    file = File()
    for sequence, size in [(2**32 - 15, 10), (2**32 - 5, 10), (5, 10), (14, 1), (14, 0), (15, 10)]:
        file.add(tcp(sequence, size))
    flow = only(reading.flows(file.read()).flows)
    assert (flow.retransmitted, flow.gaps) == (0, 0)


def test_two_nodes_files_tell_loss_and_delay(tmp_path: Path) -> None:
    here, there = File(), File()
    for i in range(10):
        here.add(tcp(i * 10, 10, identity=i), ms=i)
        if i != 4:
            there.add(tcp(i * 10, 10, identity=i), ms=i + 0.5, way=IN)
    here.end()
    there.end()
    paths = [tmp_path / "here", tmp_path / "there"]
    for path, file in zip(paths, (here, there), strict=True):
        path.write_bytes(file.data)
    for order in (paths, paths[::-1]):
        with reading.open_captures(order) as items:
            flow = only(reading.flows(items, merged=True).flows)
        assert (flow.packets, flow.sent, flow.arrived) == (10, 10, 9)
        assert flow.delays == pytest.approx([0.5] * 9)
        assert (flow.retransmitted, flow.gaps) == (0, 0)


def test_a_file_of_the_underlay_alone_is_unwrapped(tmp_path: Path) -> None:
    """As dumpcap writes it: one interface of Ethernet, no packet ids."""
    inner = IP(src="10.244.1.2", dst="10.244.2.7") / UDP(sport=1, dport=2) / b"x"
    wire = [
        Ether() / IP(src="198.18.1.1", dst="198.18.1.2") / UDP(sport=8285, dport=8285) / Raw(bytes(inner)),
        Ether() / IP(src="198.18.1.1", dst="198.18.1.2") / UDP(dport=8472) / VXLAN(vni=1) / Ether() / inner,
        Ether() / IP(src="198.18.1.1", dst="198.18.1.2") / UDP(dport=53) / b"a name",
    ]
    data = pcapng.section("dumpcap") + pcapng.interface(1, 0, name="eth0")
    for packet in wire:
        data += pcapng.packet(0, NS, bytes(packet), len(packet))
    summary = reading.flows(reading.pairs(pcapng.Reader(io.BytesIO(data), "x")))
    assert {key: flow.packets for key, flow in summary.flows.items()} == {
        ("udp", "10.244.1.2:1", "10.244.2.7:2"): 2,
        ("udp", "198.18.1.1:53", "198.18.1.2:53"): 1,
    }


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["read", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    "frame",
    [
        Ether(type=0x0800) / tcp(0, 10),
        Ether() / IP(dst="198.18.1.2") / UDP(dport=8472) / VXLAN(vni=1, flags=8) / Ether(type=0x0800) / tcp(0, 10),
    ],
)
def test_a_frame_whose_other_side_was_not_seen_tells_its_inner_flow(frame: Ether) -> None:
    data = pcapng.section("test") + pcapng.interface(101, 0, name="overlay") + pcapng.interface(1, 0, name="underlay")
    whole = bytes(frame)
    data += pcapng.packet(1, NS, whole, len(whole), comment="peer=b dir=rx inner=unseen", direction=IN, number=0)
    (pair,) = reading.pairs(pcapng.Reader(io.BytesIO(data), "x"))
    assert isinstance(pair, Pair)
    assert pair.seen is not None
    assert pair.seen.flow == ("tcp", "10.244.1.2:4000", "10.244.2.7:80")


def test_the_verb_shows_flows_lines_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, path = File(), tmp_path / "a.pcapng"
    file.add(tcp(0, 10))
    file.add(tcp(10, 10), drop="NO_ROUTE")
    file.end()
    path.write_bytes(file.data)
    code, out, _ = run(capsys, str(path))
    assert code == 0
    assert out.splitlines()[1].split() == [
        "tcp",
        "10.244.1.2:4000",
        "10.244.2.7:80",
        "1",
        "50",
        "0",
        "0",
        "NO_ROUTE",
        "1",
    ]
    assert len(run(capsys, str(path), "--lines")[1].splitlines()) == 2
    assert "drop=NO_ROUTE" in run(capsys, str(path), "--lines", "--drops")[1]
    (one,) = map(json.loads, run(capsys, str(path), "--lines", "--drops", "--json")[1].splitlines())
    assert one["drop"] == "NO_ROUTE"
    document: dict[str, Any] = json.loads(run(capsys, str(path), "--json")[1])
    assert document["flows"][0]["drops"] == {"NO_ROUTE": 1}


def test_a_broken_file_is_read_up_to_its_break(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, path = File(), tmp_path / "a.pcapng"
    file.add(tcp(0, 10))
    file.add(tcp(10, 10))
    path.write_bytes(file.data[:-3])
    code, out, err = run(capsys, str(path), "--lines")
    assert code == 1
    assert len(out.splitlines()) >= 1
    assert "is cut off at byte" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), (b"", "it is empty"), (b"text", "not a pcapng"), (b"\x1f\x8b..", "gzip")],
)
def test_what_is_no_capture_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, words: str
) -> None:
    path = tmp_path / "a"
    if content is not None:
        path.write_bytes(content)
    code, out, err = run(capsys, str(path))
    assert (code, out) == (1, "")
    assert words in err
    assert str(path) in err


def test_scapy_knows_udp_mode_once_it_is_told() -> None:
    inner = IP(src="10.244.1.2", dst="10.244.2.7") / UDP(sport=1, dport=2) / b"x"
    six = IPv6(src="fd00::1", dst="fd00::2") / UDP(sport=1, dport=2) / b"x"
    layers.register()
    try:
        built = IP(src="198.18.1.1", dst="198.18.1.2") / UDP() / inner
        assert built[UDP].dport == 8285
        for each in (inner, six):
            outer = IP(bytes(IP(src="198.18.1.1", dst="198.18.1.2") / UDP(sport=8285, dport=8285) / Raw(bytes(each))))
            assert bytes(outer[UDP].payload) == bytes(each)
            assert outer[UDP].payload.dst == each.dst
    finally:
        layers.unregister()
    again = IP(bytes(IP(src="198.18.1.1", dst="198.18.1.2") / UDP(sport=8285, dport=8285) / Raw(bytes(inner))))
    assert isinstance(again[UDP].payload, Raw)
