"""The filter language, as the pumps run it, held against tcpdump on the same packets."""

from __future__ import annotations

import itertools
import random
import struct
import subprocess
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrFragment
from scapy.layers.sctp import SCTP
from scapy.packet import Packet

from dataplane.debug import expression
from dataplane.errors import ConfigError, DropReason
from dataplane.path.datapath import Tap

REASONS = tuple(reason.name.encode() for reason in DropReason)
NO_VNI = 0xFFFFFFFF

V4 = ("10.244.1.2", "10.244.1.130", "10.244.2.7", "10.245.0.1")
V6 = ("fd00:244:1::2", "fd00:244:2::7", "fd00:245::1")
PORTS = (22, 80, 443, 8080, 8081, 65535)

PRIMITIVES = [
    "ip", "ip6", "tcp", "udp", "sctp", "icmp", "icmp6", "proto 6", "ip proto 17", "ip6 proto 58", "ip proto \\tcp",
    "host 10.244.1.2", "src host 10.244.1.2", "dst 10.244.2.7", "src or dst host 10.244.2.7",
    "host fd00:244:1::2", "dst host fd00:244:2::7", "net 10.244.1.0/24", "src net 10.244.1.128/25", "net 10.244",
    "dst net 10.244.2.0/23", "net 0.0.0.0/0", "net fd00:244::/32", "src net fd00:244:1::/48", "ip host 10.244.1.2",
    "port 80", "src port 22", "dst port 65535", "portrange 8080-8081", "tcp port 80", "udp src port 443",
    "tcp dst portrange 1-500", "sctp port 22", "ip6 proto 44", "less 60", "greater 100", "less 28",
]  # fmt: skip


def packets() -> list[bytes]:
    rng = random.Random(7)
    found: list[Packet] = []
    layers: list[Packet]
    ports: dict[str, Any]
    for source, destination in itertools.permutations(V4, 2):
        ports = {"sport": rng.choice(PORTS), "dport": rng.choice(PORTS)}
        body = bytes(rng.randrange(120))
        layers = [TCP(**ports), UDP(**ports), SCTP(**ports), ICMP()]
        found += [IP(src=source, dst=destination) / layer / body for layer in layers]
        found.append(IP(src=source, dst=destination, flags="MF") / UDP(**ports) / bytes(64))
        found.append(IP(src=source, dst=destination, frag=8, proto=17) / (b"\0\x50\0\x50" + body))
        found.append(IP(src=source, dst=destination, options=[b"\x07\x03\x04\0"]) / TCP(**ports))
    for source, destination in itertools.permutations(V6, 2):
        ports = {"sport": rng.choice(PORTS), "dport": rng.choice(PORTS)}
        layers = [TCP(**ports), UDP(**ports), ICMPv6EchoRequest()]
        found += [IPv6(src=source, dst=destination) / layer / bytes(rng.randrange(120)) for layer in layers]
        found.append(IPv6(src=source, dst=destination) / IPv6ExtHdrFragment(offset=9, nh=58) / bytes(40))
    return [bytes(packet) for packet in found]


def write_pcap(path: Path, found: list[bytes]) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 101))
        for number, packet in enumerate(found):
            file.write(struct.pack("=IIII", number, 0, len(packet), len(packet)) + packet)


def tcpdump(path: Path, text: str) -> list[int]:
    """Numbers of the packets that tcpdump's own filter lets through."""
    done = subprocess.run(["tcpdump", "-n", "-r", path, "-w", "-", text], capture_output=True, check=False)
    assert done.returncode == 0 or b"rejects all packets" in done.stderr, done.stderr
    found, at = [], 24
    while at < len(done.stdout):
        number, _, length, _ = struct.unpack_from("=IIII", done.stdout, at)
        found.append(number)
        at += 16 + length
    return found


def tap(text: str) -> Tap:
    return Tap(expression.compile_filter(expression.parse(text)), 65535, 1 << 18, REASONS)


def ours(text: str, found: list[bytes]) -> list[int]:
    made = tap(text)
    return [number for number, packet in enumerate(found) if made.offer(0, -1, b"", NO_VNI, packet)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    path, found = tmp_path_factory.mktemp("filters") / "packets.pcap", packets()
    write_pcap(path, found)
    return path, found


@pytest.mark.parametrize("text", PRIMITIVES)
def test_a_primitive_means_what_tcpdump_means(file: tuple[Path, list[bytes]], text: str) -> None:
    path, found = file
    assert ours(text, found) == tcpdump(path, text)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_composed_means_what_tcpdump_means(file: tuple[Path, list[bytes]], seed: int) -> None:
    path, found = file
    rng = random.Random(seed)

    def compose(depth: int) -> str:
        if depth == 0 or rng.random() < 0.3:
            return rng.choice(PRIMITIVES)
        if rng.random() < 0.25:
            return f"{rng.choice(('not', '!'))} ({compose(depth - 1)})"
        word = rng.choice(("and", "or", "&&", "||"))
        return f"({compose(depth - 1)}) {word} ({compose(depth - 1)})"

    text = compose(4)
    assert ours(text, found) == tcpdump(path, text), text


def test_and_and_or_read_as_the_grammar_says() -> None:
    """tcpdump gives both the same precedence; ours is that of every other language, and parentheses say it in both."""
    packet = bytes(IP(src="10.244.1.2", dst="10.244.2.7") / TCP(dport=80))
    assert ours("tcp or udp and udp", [packet]) == [0]


def test_a_bare_address_is_a_host() -> None:
    there, back = (bytes(IP(src=a, dst=b) / TCP()) for a, b in itertools.permutations(("10.244.1.2", "10.244.2.7")))
    other = bytes(IP(src="10.244.1.3", dst="10.244.2.7") / TCP())
    assert ours("10.244.1.2", [there, back, other]) == [0, 1]
    assert ours("host 10.244.9.9 or 10.244.1.3", [there, back, other]) == [2]


def test_an_empty_filter_lets_everything_through() -> None:
    assert expression.compile_filter(expression.parse("")) == b""
    assert ours(" ", [b"", b"x", b"\x45"]) == [0, 1, 2]


def test_what_only_an_overlay_knows() -> None:
    packet = bytes(IP(src="10.244.1.2", dst="10.244.2.7") / TCP())
    peer = ip_address("198.18.1.2").packed

    def let(text: str, *, direction: int = 0, drop: int = -1, remote: bytes = b"", vni: int = NO_VNI) -> bool:
        return tap(text).offer(direction, drop, remote, vni, packet)

    assert let("tx")
    assert not let("rx")
    assert let("rx", direction=1)
    assert let("peer 198.18.1.2", remote=peer)
    assert not let("peer 198.18.1.2")
    assert not let("not peer 198.18.1.2", remote=peer)
    assert let("vni 1", vni=1)
    assert not let("vni 1", vni=2)
    for reason in DropReason:
        assert let("drop", drop=reason)
        assert let(f"drop {reason.name}", drop=reason)
        assert not let(f"drop {reason.name}")
    assert let("drop no-route and tcp", drop=DropReason.NO_ROUTE)
    assert not let("drop no_route", drop=DropReason.LENGTH)


@pytest.mark.parametrize("seed", range(3))
def test_no_bytes_confuse_a_filter(seed: int) -> None:
    rng = random.Random(seed)
    taps = [tap(text) for text in PRIMITIVES]
    for _ in range(300):
        data = bytes(rng.choice((0x45, 0x60, 0x4F, rng.randrange(256))) if i == 0 else rng.randrange(256)
                     for i in range(rng.randrange(64)))  # fmt: skip
        for made in taps:
            made.offer(0, -1, b"", NO_VNI, data)


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("hots 10.244.1.2", 0, "did you mean `host`"),
        ("host", 4, "expected an IP address"),
        ("host node-b", 5, "names are not looked up"),
        ("tcp and", 7, "expected a primitive"),
        ("tcp udp", 4, "expected `and`, `or` or the end"),
        ("(tcp or udp", 11, "a `)` is missing"),
        ("tcp)", 3, "expected `and`"),
        ("port 70000", 5, "0 to 65535"),
        ("portrange 80", 10, "range of ports"),
        ("net 10.244.1.2/24", 4, "host bits"),
        ("less many", 5, "a number"),
        ("src", 3, "expected an IP address"),
        ("()", 1, "unknown word"),
        ("(" * 200, 100, "nested too deeply"),
    ],
)
def test_an_error_points_at_the_word(text: str, column: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expression.parse(text)
    said, _, caret = str(caught.value).split("\n")
    assert words in said
    assert caret == " " * (4 + column) + "^"


def test_a_filter_that_is_too_long_or_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than 1000"):
        expression.compile_filter(expression.parse(" or ".join(["tcp"] * 1001)))
    with pytest.raises(ConfigError, match="matches nothing"):
        expression.compile_filter(expression.Not(expression.All(())))


def test_a_program_that_could_run_for_ever_is_refused() -> None:
    loop = expression.Test(expression.Kind.VERSION, 4).encode(0, 0)
    with pytest.raises(ValueError, match="leads back"):
        Tap(loop, 100, 1 << 18, REASONS)
    with pytest.raises(ValueError, match="whole number"):
        Tap(loop[:-1], 100, 1 << 18, REASONS)


@pytest.mark.parametrize(
    ("text", "asks"),
    [("", False), ("tcp or (udp and not drop)", True), ("drop NO_ROUTE", True), ("not (tx or host 10.1.1.1)", False)],
)
def test_what_a_filter_asks_about_is_told(text: str, asks: bool) -> None:
    assert expression.asks(expression.parse(text), expression.Kind.DROP) is asks
