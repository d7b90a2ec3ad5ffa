"""The capture file, held against scapy and tshark, and the reader against everything that can be wrong with a file."""

from __future__ import annotations

import io
import json
import random
import struct
import subprocess
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.utils import PcapNgReader, PcapNgWriter

from dataplane.debug import pcapng
from dataplane.debug.pcapng import Interface, Names, Packet, Reader, Statistics
from dataplane.errors import CaptureError

NS = 1_700_000_000_123_456_789
INNER = bytes(IP(src="10.244.1.2", dst="10.244.2.7", ttl=63) / UDP(sport=1000, dport=2000) / b"hello")


def head() -> bytes:
    return (
        pcapng.section("Loden test", os="Linux", comment="node 198.18.1.1")
        + pcapng.interface(pcapng.LINKTYPE_RAW, 128, name="overlay", description="inner", filter_text="tcp port 80")
        + pcapng.interface(pcapng.LINKTYPE_ETHERNET, 0, name="underlay")
    )


def read(data: bytes) -> list[pcapng.Block]:
    return list(Reader(io.BytesIO(data), "x.pcapng"))


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
packets = st.fixed_dictionaries(
    {
        "interface": st.sampled_from([0, 1]),
        "ns": st.integers(0, 2**63),
        "data": st.binary(max_size=70),
        "comment": texts,
        "direction": st.integers(0, 3),
        "number": st.none() | st.integers(0, 2**64 - 1),
        "lost": st.integers(0, 2**64 - 1),
    }
)


@given(st.lists(packets, max_size=5))
def test_what_is_written_is_read(values: list[dict[str, object]]) -> None:
    made = [pcapng.packet(**value, length=len(value["data"]) + 7) for value in values]  # type: ignore[arg-type]  # any
    one, two, *blocks = read(head() + b"".join(made))
    assert one == Interface(0, 101, 128, "overlay", "inner", "tcp port 80", 10**9)
    assert two == Interface(1, 1, 0, "underlay", units=10**9)
    assert blocks == [
        Packet(**{**value, "interface": (one, two)[value["interface"]]}, length=len(value["data"]) + 7)  # type: ignore
        for value in values
    ]


def test_names_and_statistics() -> None:
    known = {ip_address("198.18.1.2"): "node-b", ip_address("fd00::2"): "node-c"}
    data = head() + pcapng.names(known)
    data += pcapng.statistics(1, NS, start=NS - 5, received=10, dropped=3, delivered=7, comment="3 of 10")
    *_, names, statistics = read(data)
    assert names == Names(known)
    assert isinstance(statistics, Statistics)
    assert (statistics.received, statistics.dropped, statistics.delivered) == (10, 3, 7)
    assert (statistics.interface.number, statistics.comment) == (1, "3 of 10")
    assert pcapng.names({}) == b""


def test_scapy_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    path.write_bytes(head() + pcapng.packet(0, NS, INNER, len(INNER), comment="peer=b", direction=2))
    with PcapNgReader(str(path)) as reader:
        (packet,) = reader
    assert bytes(packet) == INNER
    assert packet.sniffed_on == "overlay"
    assert packet.comment == b"peer=b"
    assert packet.direction == 2
    assert round(packet.time * 10**9) == NS


def test_what_scapy_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "b.pcapng"
    packet = IP(INNER)
    packet.time = 1_700_000_000.25
    packet.comment = b"from scapy"
    with PcapNgWriter(str(path)) as writer:
        writer.write([packet, packet])
    blocks = [block for block in read(path.read_bytes()) if isinstance(block, Packet)]
    assert [block.data for block in blocks] == [INNER] * 2
    assert blocks[0].comment == "from scapy"
    assert blocks[0].ns == 1_700_000_000_250_000_000


def test_tshark_reads_all_of_it_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "c.pcapng"
    path.write_bytes(
        head()
        + pcapng.names({ip_address("10.244.1.2"): "pod-a"})
        + pcapng.packet(0, NS, INNER, len(INNER), comment="peer=b dir=tx", direction=2, number=7, lost=4)
        + pcapng.packet(1, NS, bytes(12) + b"\x08\0" + INNER, 14 + len(INNER), direction=1, number=7)
        + pcapng.statistics(0, NS, start=NS, received=1, dropped=0, delivered=1)
    )
    fields = "frame.interface_name frame.comment frame.packet_flags_direction frame.packet_id frame.time_epoch ip.src"
    wanted = [word for field in fields.split() for word in ("-e", field)]
    done = subprocess.run(["tshark", "-r", path, "-T", "fields", *wanted], capture_output=True, text=True, check=True)
    assert "damaged" not in done.stderr + done.stdout
    assert done.stdout.splitlines() == [
        "overlay\tpeer=b dir=tx\t0x00000002\t7\t1700000000.123456789\t10.244.1.2",
        "underlay\t\t0x00000001\t7\t1700000000.123456789\t10.244.1.2",
    ]
    info = subprocess.run(["capinfos", path], capture_output=True, text=True, check=True)
    assert "Number of interfaces in file: 2" in info.stdout
    assert "Name = overlay" in info.stdout


def test_a_file_of_the_other_byte_order_and_of_microseconds_is_read() -> None:
    options = struct.pack(">HH8s", 14, 8, struct.pack(">q", 100)) + bytes(4)  # if_tsoffset; the default is microseconds
    body = struct.pack(">HHI", 101, 0, 0) + options
    data = struct.pack(">IIIHHqI", pcapng.SECTION, 28, pcapng.BYTE_ORDER, 1, 0, -1, 28)
    data += struct.pack(">II", 1, len(body) + 12) + body + struct.pack(">I", len(body) + 12)
    body = struct.pack(">IIIII", 0, 0, 5_000_001, len(INNER), len(INNER)) + INNER + bytes(-len(INNER) % 4)
    data += struct.pack(">II", 6, len(body) + 12) + body + struct.pack(">I", len(body) + 12)
    *_, packet = read(data)
    assert isinstance(packet, Packet)
    assert (packet.ns, packet.data) == (105_000_001_000, INNER)


def test_what_dumpcap_knows_and_we_do_not_is_passed_over() -> None:
    data = head() + pcapng.block(0x0A, b"secrets!") + pcapng.packet(0, NS, INNER, len(INNER))
    assert isinstance(read(data)[-1], Packet)


WHOLE = head() + pcapng.packet(0, NS, INNER, len(INNER), comment="c") + pcapng.packet(1, NS, INNER, len(INNER))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"\xd4\xc3\xb2\xa1" + bytes(20), "editcap -F pcapng"),
        (b"\x1f\x8b\x08" + bytes(20), "gzip"),
        (b"#!/bin/sh\necho hello\n", "not a pcapng file"),
        (WHOLE[:3], "not a pcapng file"),
        (WHOLE[:9], "no byte order"),
        (WHOLE[:-1], "cut off at byte"),
        (WHOLE[:-60], "cut off at byte"),
        (WHOLE + b"\6\0\0\0", "cut off at byte"),
        (WHOLE + struct.pack("=II", 6, 0xFFFFFFF0) + bytes(40), "claims 4294967280 bytes"),
        (WHOLE + struct.pack("=II", 6, 8), "claims 8 bytes"),
        (WHOLE + pcapng.packet(2, NS, b"", 0), "interface 2 was not described"),
        (WHOLE + pcapng.block(6, struct.pack("=IIIII", 0, 0, 0, 999, 999)), "a packet of 999 bytes"),
        (pcapng.section("x") + pcapng.block(3, b"\1\0\0\0\0\0\0\0"), "is broken"),
        (WHOLE + pcapng.block(5, struct.pack("=III", 0, 0, 0) + b"\4\0\xff\0"), "longer than its block"),
    ],
)
def test_an_error_says_which_byte(data: bytes, words: str) -> None:
    with pytest.raises(CaptureError, match=words) as caught:
        read(data)
    assert str(caught.value).startswith("x.pcapng: ")


def test_what_came_before_a_cut_is_given() -> None:
    blocks = iter(Reader(io.BytesIO(WHOLE[:-4]), "x"))
    assert [type(next(blocks)) for _ in range(3)] == [Interface, Interface, Packet]
    with pytest.raises(CaptureError):
        next(blocks)


def test_no_damage_raises_anything_else() -> None:
    rng = random.Random(3)
    for _ in range(3000):
        data = bytearray(WHOLE)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        try:
            for _ in Reader(io.BytesIO(bytes(data)), "x"):
                pass
        except CaptureError:
            pass


def test_the_filter_stands_in_the_file_for_capinfos(tmp_path: Path) -> None:
    path = tmp_path / "d.pcapng"
    path.write_bytes(head() + pcapng.packet(0, NS, INNER, len(INNER)))
    done = subprocess.run(["tshark", "-r", path, "-T", "json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[0]["_source"]["layers"]["ip"]["ip.dst"] == "10.244.2.7"
    info = subprocess.run(["capinfos", path], capture_output=True, text=True, check=True)
    assert "Filter string = tcp port 80" in info.stdout
