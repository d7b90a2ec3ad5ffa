"""What may be merged and how superframes are cut, case by case, with expectations written out by hand.

The packets are scapy's; packet i of a case carries nothing but bytes of value i, so that a superframe shows which
packets it was made of. The cases are those that wireguard-go and nebula test, and what they leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment

from dataplane import _coalesce, _segment
from dataplane.path.superframe import VnetHeader

Make = Callable[[int], bytes]
"""Makes the packet at that place of a case."""

A, B = "10.1.1.1", "10.1.2.2"
A6, B6 = "fd00::1", "fd00::2"
TCP_NAMES = ("sport", "dport", "ack", "window", "options", "urgptr", "reserved", "chksum")


def tcp(seq: int, size: int = 100, flags: str = "A", bits: str = "DF", **fields: Any) -> Make:
    """TCP over IPv4; `flags` are TCP's, `bits` those of the IP header."""
    l4 = {name: fields.pop(name) for name in TCP_NAMES if name in fields}
    ip = {"src": A, "dst": B, "id": 0, **fields}
    return lambda i: bytes(IP(flags=bits, **ip) / TCP(seq=seq % 2**32, flags=flags, **l4) / bytes([i] * size))


def tcp6(seq: int, size: int = 100, flags: str = "A", **fields: Any) -> Make:
    l4 = {name: fields.pop(name) for name in TCP_NAMES if name in fields}
    ip = {"src": A6, "dst": B6, **fields}
    return lambda i: bytes(IPv6(**ip) / TCP(seq=seq % 2**32, flags=flags, **l4) / bytes([i] * size))


def udp(size: int = 100, sport: int = 5, dport: int = 7, check: int | None = None, **fields: Any) -> Make:
    ip = {"src": A, "dst": B, "flags": "DF", "id": 0, **fields}
    return lambda i: bytes(IP(**ip) / UDP(sport=sport, dport=dport, chksum=check) / bytes([i] * size))


def udp6(size: int = 100, sport: int = 5, dport: int = 7, check: int | None = None, **fields: Any) -> Make:
    ip = {"src": A6, "dst": B6, **fields}
    return lambda i: bytes(IPv6(**ip) / UDP(sport=sport, dport=dport, chksum=check) / bytes([i] * size))


def behind(make: Make, *headers: Any) -> Make:
    """The IPv6 packet with extension headers."""

    def made(i: int) -> bytes:
        packet = IPv6(make(i))
        inner = packet.payload.copy()
        for header in reversed(headers):
            inner = header / inner
        return bytes(IPv6(src=A6, dst=B6) / inner)

    return made


def raw(make: Make, change: Callable[[bytes], bytes]) -> Make:
    return lambda i: change(make(i))


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda packet: packet[:at] + bytes([packet[at] ^ 1]) + packet[at + 1 :]


def ping(i: int) -> bytes:
    return bytes(IP(src=A, dst=B) / ICMP(seq=i))


def ping6(i: int) -> bytes:
    return bytes(IPv6(src=A6, dst=B6) / ICMPv6EchoRequest(seq=i))


def nothing(i: int) -> bytes:
    return b""


TIMES_1 = [("NOP", None), ("NOP", None), ("Timestamp", (1, 2))]
TIMES_2 = [("NOP", None), ("NOP", None), ("Timestamp", (3, 2))]
NOPS = [("NOP", None)] * 4


@dataclass(frozen=True)
class Case:
    """Packets that come, and which of them leave together, in the order in which they leave."""

    name: str
    packets: Sequence[Make]
    leave: list[list[int]]


TCP_CASES = [
    Case("one packet", [tcp(0)], [[0]]),
    Case("two in sequence", [tcp(0), tcp(100)], [[0, 1]]),
    Case("ipv6", [tcp6(0), tcp6(100), tcp6(200)], [[0, 1, 2]]),
    Case("smaller tail ends", [tcp(0), tcp(100, 40), tcp(140, 40)], [[0, 1], [2]]),
    Case("after a smaller tail a new one begins", [tcp(0), tcp(100, 40), tcp(140), tcp(240)], [[0, 1], [2, 3]]),
    Case("larger after smaller", [tcp(0, 40), tcp(40), tcp(140)], [[0], [1, 2]]),
    Case("one byte each", [tcp(0, 1), tcp(1, 1), tcp(2, 1)], [[0, 1, 2]]),
    Case("gap", [tcp(0), tcp(101)], [[0], [1]]),
    Case("overlap", [tcp(0), tcp(99)], [[0], [1]]),
    Case("twice the same", [tcp(0), tcp(0), tcp(100)], [[0], [1, 2]]),
    Case("the wrong way round is not put right", [tcp(100), tcp(0), tcp(200)], [[0], [1], [2]]),
    Case("out of order in the middle", [tcp(0), tcp(200), tcp(100), tcp(300)], [[0], [1], [2], [3]]),
    Case("sequence wrap", [tcp(2**32 - 150), tcp(2**32 - 50), tcp(50)], [[0, 1, 2]]),
    Case("sequence wraps between two", [tcp(2**32 - 100), tcp(0)], [[0, 1]]),
    Case("push ends", [tcp(0), tcp(100, flags="PA"), tcp(200)], [[0, 1], [2]]),
    Case("push on the first", [tcp(0, flags="PA"), tcp(100)], [[0], [1]]),
    Case("push interleaved", [tcp(0, flags="PA"), tcp(100), tcp(200, flags="PA"), tcp(300)], [[0], [1, 2], [3]]),
    Case("fin stands alone", [tcp(0), tcp(100, flags="FA"), tcp(200)], [[0], [1], [2]]),
    Case("fin after two", [tcp(0), tcp(100), tcp(200, flags="FA")], [[0, 1], [2]]),
    Case("syn stands alone", [tcp(0, flags="S"), tcp(101), tcp(201)], [[0], [1, 2]]),
    Case("syn in the middle seals", [tcp(0), tcp(100, flags="SA"), tcp(100)], [[0], [1], [2]]),
    Case("rst stands alone", [tcp(0), tcp(100, flags="RA"), tcp(200)], [[0], [1], [2]]),
    Case("urg stands alone", [tcp(0), tcp(100, flags="UA", urgptr=1), tcp(200)], [[0], [1], [2]]),
    Case("without ack", [tcp(0, flags=""), tcp(100, flags="")], [[0], [1]]),
    Case("cwr stands alone", [tcp(0), tcp(100, flags="CA"), tcp(200)], [[0], [1], [2]]),
    Case("ece in all", [tcp(0, flags="EA"), tcp(100, flags="EA")], [[0, 1]]),
    Case("ece begins", [tcp(0), tcp(100, flags="EA"), tcp(200, flags="EA")], [[0], [1, 2]]),
    Case("ece ends", [tcp(0, flags="EA"), tcp(100), tcp(200)], [[0], [1, 2]]),
    Case("accurate ecn's bit", [tcp(0, reserved=1), tcp(100, reserved=1)], [[0], [1]]),
    Case("pure ack does not join", [tcp(0), tcp(100, 0), tcp(100)], [[0], [1], [2]]),
    Case("pure acks stay apart", [tcp(0, 0), tcp(0, 0)], [[0], [1]]),
    Case("other acknowledgement", [tcp(0, ack=5), tcp(100, ack=6)], [[0], [1]]),
    Case("other window", [tcp(0, window=5), tcp(100, window=6)], [[0], [1]]),
    Case("other urgent pointer", [tcp(0, urgptr=5), tcp(100, urgptr=6)], [[0], [1]]),
    Case("same options", [tcp(0, options=TIMES_1), tcp(100, options=TIMES_1)], [[0, 1]]),
    Case("other option bytes", [tcp(0, options=TIMES_1), tcp(100, options=TIMES_2)], [[0], [1]]),
    Case("options and none", [tcp(0, options=TIMES_1), tcp(100)], [[0], [1]]),
    Case("other source port", [tcp(0, sport=1), tcp(100, sport=2)], [[0], [1]]),
    Case("other destination port", [tcp(0, dport=1), tcp(100, dport=2)], [[0], [1]]),
    Case("other source", [tcp(0), tcp(100, src="10.1.1.3")], [[0], [1]]),
    Case("other destination", [tcp(0), tcp(100, dst="10.1.1.3")], [[0], [1]]),
    Case("other direction", [tcp(0, sport=5, dport=5), tcp(100, sport=5, dport=5, src=B, dst=A)], [[0], [1]]),
    Case("checksum of the first wrong", [tcp(0, chksum=1), tcp(100), tcp(200)], [[0], [1, 2]]),
    Case("checksum of the second wrong", [tcp(0), tcp(100, chksum=1), tcp(200)], [[0], [1], [2]]),
    Case("payload damaged", [tcp(0), raw(tcp(100), flip(139)), tcp(200), tcp(300)], [[0], [1], [2, 3]]),
    Case("ipv6 payload damaged", [tcp6(0), raw(tcp6(100), flip(159)), tcp6(200)], [[0], [1], [2]]),
    Case("ip header checksum wrong", [tcp(0), tcp(100), raw(tcp(200), flip(11))], [[0, 1], [2]]),
    Case("ttl", [tcp(0, ttl=64), tcp(100, ttl=63)], [[0], [1]]),
    Case("hop limit", [tcp6(0, hlim=64), tcp6(100, hlim=63)], [[0], [1]]),
    Case("dscp", [tcp(0, tos=0x20), tcp(100, tos=0x40)], [[0], [1]]),
    Case("same dscp", [tcp(0, tos=0x20), tcp(100, tos=0x20)], [[0, 1]]),
    Case("ect(0) then ect(1) make no ce", [tcp(0, tos=2), tcp(100, tos=1)], [[0], [1]]),
    Case("ect(0) then ce", [tcp(0, tos=2), tcp(100, tos=3), tcp(200, tos=3)], [[0], [1, 2]]),
    Case("all ce", [tcp(0, tos=3), tcp(100, tos=3)], [[0, 1]]),
    Case("ipv6 ect(0) then ect(1)", [tcp6(0, tc=2), tcp6(100, tc=1)], [[0], [1]]),
    Case("traffic class", [tcp6(0, tc=0x20), tcp6(100, tc=0x40)], [[0], [1]]),
    Case("flow label", [tcp6(0, fl=1), tcp6(100, fl=2)], [[0], [1]]),
    Case("flow label's low bits", [tcp6(0, fl=0x80000), tcp6(100, fl=0x80001)], [[0], [1]]),
    Case("df: any identification", [tcp(0, id=7), tcp(100, id=3), tcp(200, id=3)], [[0, 1, 2]]),
    Case("no df: identifications in sequence", [tcp(0, bits="", id=7), tcp(100, bits="", id=8)], [[0, 1]]),
    Case("no df: a gap", [tcp(0, bits="", id=7), tcp(100, bits="", id=9)], [[0], [1]]),
    Case("no df: the same twice", [tcp(0, bits="", id=7), tcp(100, bits="", id=7)], [[0], [1]]),
    Case("no df: identification wraps", [tcp(0, bits="", id=65535), tcp(100, bits="", id=0)], [[0, 1]]),
    Case("df and none", [tcp(0, id=7), tcp(100, bits="", id=8)], [[0], [1]]),
    Case("none and df", [tcp(0, bits="", id=7), tcp(100, id=8)], [[0], [1]]),
    Case("reserved bit", [tcp(0), tcp(100, bits="DF+evil")], [[0], [1]]),
    Case("more fragments", [tcp(0), tcp(100, bits="MF"), tcp(200)], [[0], [1], [2]]),
    Case("later fragment", [tcp(0), tcp(100, bits="", frag=3), tcp(200)], [[0], [1], [2]]),
    Case("padding behind", [tcp(0), raw(tcp(100), lambda p: p + b"\0" * 6), tcp(200)], [[0], [1], [2]]),
    Case("cut off", [tcp(0), raw(tcp(100), lambda p: p[:-1]), tcp(200)], [[0], [1], [2]]),
    Case("data offset too small", [tcp(0), raw(tcp(100), lambda p: p[:32] + b"\x40" + p[33:])], [[0], [1]]),
    Case("data offset behind the end", [tcp(0), raw(tcp(100, 0), lambda p: p[:32] + b"\xf0" + p[33:])], [[0], [1]]),
]

UDP_CASES = [
    Case("one", [udp()], [[0]]),
    Case("two", [udp(), udp()], [[0, 1]]),
    Case("ipv6", [udp6(), udp6(), udp6()], [[0, 1, 2]]),
    Case("smaller tail ends", [udp(), udp(), udp(99), udp(99)], [[0, 1, 2], [3]]),
    Case("larger", [udp(), udp(101), udp(101)], [[0], [1, 2]]),
    Case("larger after smaller", [udp(), udp(99), udp()], [[0, 1], [2]]),
    Case("one byte each", [udp(1), udp(1)], [[0, 1]]),
    Case("zero length between", [udp(), udp(0), udp()], [[0], [1], [2]]),
    Case("zero length first", [udp(0), udp(), udp()], [[0], [1, 2]]),
    Case("zero length only", [udp(0), udp(0)], [[0], [1]]),
    Case("ipv6 zero length between", [udp6(), udp6(0), udp6()], [[0], [1], [2]]),
    Case("other port", [udp(), udp(dport=8)], [[0], [1]]),
    Case("other address", [udp(), udp(src="10.1.1.9")], [[0], [1]]),
    Case("no checksum", [udp(check=0), udp(check=0)], [[0], [1]]),
    Case("no checksum between", [udp(), udp(check=0), udp()], [[0], [1], [2]]),
    Case("ipv6 without checksum is wrong", [udp6(), udp6(check=0), udp6()], [[0], [1], [2]]),
    Case("checksum wrong", [udp(), udp(check=1), udp()], [[0], [1], [2]]),
    Case("checksum of the first wrong", [udp(check=1), udp(), udp()], [[0], [1, 2]]),
    Case("payload damaged", [udp(), raw(udp(), flip(127)), udp(), udp()], [[0], [1], [2, 3]]),
    Case("length field too small", [udp(), raw(udp(), lambda p: p[:24] + b"\0\x20" + p[26:]), udp()], [[0], [1], [2]]),
    Case("length field too large", [udp(), raw(udp(), lambda p: p[:24] + b"\0\xff" + p[26:]), udp()], [[0], [1], [2]]),
    Case("ttl", [udp(ttl=64), udp(ttl=63)], [[0], [1]]),
    Case("ect(0) then ect(1)", [udp(tos=2), udp(tos=1)], [[0], [1]]),
    Case("dscp", [udp(tos=0x20), udp(tos=0x24)], [[0], [1]]),
    Case("flow label", [udp6(fl=1), udp6(fl=2)], [[0], [1]]),
    Case("df: any identification", [udp(id=9), udp(id=4)], [[0, 1]]),
    Case("no df: in sequence", [udp(flags="", id=9), udp(flags="", id=10), udp(flags="", id=11)], [[0, 1, 2]]),
    Case("no df: a gap", [udp(flags="", id=9), udp(flags="", id=11)], [[0], [1]]),
    Case("more fragments", [udp(), udp(flags="MF"), udp()], [[0], [1], [2]]),
    Case("later fragment", [udp(), udp(flags="", frag=1), udp()], [[0], [1], [2]]),
    Case("vxlan's port", [udp(dport=4789), udp(dport=4789)], [[0], [1]]),
    Case("flannel's vxlan port", [udp(dport=8472), udp(dport=8472)], [[0], [1]]),
    Case("geneve's port", [udp(dport=6081), udp(dport=6081)], [[0], [1]]),
    Case("vxlan-gpe's port", [udp6(dport=4790), udp6(dport=4790)], [[0], [1]]),
    Case("from a tunnel's port", [udp(sport=4789), udp(sport=4789)], [[0, 1]]),
]

MIXED_CASES = [
    Case("nothing", [], []),
    Case("interleaved", [tcp(0, sport=1), tcp(0, sport=2), tcp(100, sport=1), tcp(100, sport=2)], [[0, 2], [1, 3]]),
    Case("tcp and udp of the same ports", [tcp(0, sport=5, dport=7), udp(), udp()], [[0], [1, 2]]),
    Case("ipv4 and ipv6", [tcp(0), tcp6(0), tcp(100), tcp6(100)], [[0, 2], [1, 3]]),
    Case(
        "a flow that ends is not overtaken",
        [tcp(0, sport=1), tcp(0, sport=2), tcp(100, flags="FA", sport=1), tcp(100, sport=2)],
        [[0], [1, 3], [2]],
    ),
    Case("ping in between", [tcp(0), ping, tcp(100)], [[0, 2], [1]]),
    Case("ping over ipv6 in between", [tcp6(0), ping6, tcp6(100)], [[0, 2], [1]]),
    Case("what is no packet seals all", [tcp(0), udp6(), nothing, tcp(100), udp6()], [[0], [1], [2], [3], [4]]),
    Case("bad version seals all", [tcp(0), raw(tcp(100), lambda p: b"\x55" + p[1:]), tcp(100)], [[0], [1], [2]]),
    Case("short header seals all", [tcp(0), raw(tcp(100), lambda p: p[:19]), tcp(100)], [[0], [1], [2]]),
    Case("short ipv6 header seals all", [tcp6(0), raw(tcp6(100), lambda p: p[:39]), tcp6(100)], [[0], [1], [2]]),
    Case("ihl of 4 seals all", [tcp(0), raw(tcp(100), lambda p: b"\x44" + p[1:]), tcp(100)], [[0], [1], [2]]),
    Case("another flow's fragment seals all", [tcp(0), udp(flags="MF", src="10.9.9.9"), tcp(100)], [[0], [1], [2]]),
    Case("a fragment over ipv6", [tcp6(0), behind(tcp6(100), IPv6ExtHdrFragment()), tcp6(100)], [[0], [1], [2]]),
    Case("ipv6 extension header", [tcp6(0), behind(tcp6(100), IPv6ExtHdrDestOpt()), tcp6(200)], [[0], [1], [2]]),
    Case("after a sealer new ones grow", [tcp(0), nothing, tcp(100), tcp(200)], [[0], [1], [2, 3]]),
]


def options_between(i: int) -> bytes:
    return bytes(IP(src=A, dst=B, flags="DF", options=[IPOption(b"\x01\x01\x01\x01")]) / TCP(seq=100, flags="A") / b"x")


MIXED_CASES += [Case("ip options", [tcp(0), options_between, tcp(101)], [[0], [1], [2]])]


def leaving(packets: list[bytes], **switches: bool) -> list[list[int]]:
    """Which packets leave together: read off the payloads, and off the position of a packet that stays itself."""
    found: list[list[int]] = []
    singles = [i for i, _ in enumerate(packets)]
    for header, packet in _coalesce.superframes(packets, **switches):
        how = VnetHeader.decode(header)
        if how == VnetHeader():
            at = next(i for i in singles if packets[i] == packet)
            singles.remove(at)
            found.append([at])
        else:
            payload = packet[how.hdr_len :]
            parts = [payload[at : at + how.gso_size] for at in range(0, len(payload), how.gso_size)]
            assert all(len(set(part)) == 1 for part in parts), "a segment is not what one packet carried"
            found.append([part[0] for part in parts])
            assert b"".join(packets[i][how.hdr_len :] for i in found[-1]) == payload
    return found


def ids(cases: Sequence[Case]) -> list[str]:
    return [case.name for case in cases]


@pytest.mark.parametrize("case", TCP_CASES, ids=ids(TCP_CASES))
def test_tcp(case: Case) -> None:
    assert leaving([make(i) for i, make in enumerate(case.packets)]) == case.leave


@pytest.mark.parametrize("case", UDP_CASES, ids=ids(UDP_CASES))
def test_udp(case: Case) -> None:
    assert leaving([make(i) for i, make in enumerate(case.packets)]) == case.leave


@pytest.mark.parametrize("case", MIXED_CASES, ids=ids(MIXED_CASES))
def test_mixed(case: Case) -> None:
    assert leaving([make(i) for i, make in enumerate(case.packets)]) == case.leave


def test_each_protocol_has_its_switch() -> None:
    packets = [make(i) for i, make in enumerate([tcp(0), udp(), tcp(100), udp()])]
    assert leaving(packets) == [[0, 2], [1, 3]]
    assert leaving(packets, tcp=False) == [[0], [1, 3], [2]]
    assert leaving(packets, udp=False) == [[0, 2], [1], [3]]
    assert leaving(packets, tcp=False, udp=False) == [[0], [1], [2], [3]]


def test_a_superframe_holds_64_packets_at_most() -> None:
    packets = [tcp(10 * i, 10)(i) for i in range(130)]
    assert leaving(packets) == [[*range(64)], [*range(64, 128)], [128, 129]]


def test_a_superframe_fills_the_length_field_at_most() -> None:
    # 40 + 45 * 1455 = 65,515; one more byte of payload in each would make 65,560
    assert leaving([tcp(1455 * i, 1455)(i) for i in range(46)]) == [[*range(45)], [45]]
    assert leaving([tcp(1456 * i, 1456)(i) for i in range(45)]) == [[*range(44)], [44]]
    # 28 + 3 * 21835 + 2 = 65,535
    assert leaving([udp(21835)(0), udp(21835)(1), udp(21835)(2), udp(2)(3)]) == [[0, 1, 2, 3]]
    assert leaving([udp(21835)(0), udp(21835)(1), udp(21835)(2), udp(3)(3)]) == [[0, 1, 2], [3]]


def test_fifty_flows_side_by_side() -> None:
    packets = [tcp(100 * turn, sport=1000 + flow)(turn * 50 + flow) for turn in range(4) for flow in range(50)]
    assert leaving(packets) == [[flow, 50 + flow, 100 + flow, 150 + flow] for flow in range(50)]


def test_more_flows_than_are_looked_at_lose_nothing() -> None:
    packets = [udp(20, sport=1000 + flow)(turn) for turn in range(3) for flow in range(200)]
    came: dict[int, list[int]] = {}
    for header, packet in _coalesce.superframes(packets):
        how = VnetHeader.decode(header)
        payload = packet[28:]
        assert how == VnetHeader() or how.gso_size == 20
        came.setdefault(int.from_bytes(packet[20:22]), []).extend(payload[::20])
    assert came == {1000 + flow: [0, 1, 2] for flow in range(200)}


# ---------------------------------------------------------------------------------------- superframes byte for byte


def test_a_tcp_superframe_byte_for_byte() -> None:
    one = bytes(IP(src=A, dst=B, flags="DF", id=7) / TCP(sport=5, dport=7, seq=100, ack=9, flags="A") / b"\1\2\3\4")
    two = bytes(IP(src=A, dst=B, flags="DF", id=8) / TCP(sport=5, dport=7, seq=104, ack=9, flags="PA") / b"\5\6")
    (header, packet), *rest = _coalesce.superframes([one, two])
    assert not rest
    assert VnetHeader.decode(header) == VnetHeader(1, 1, 40, 4, 20, 16)
    # total length 46; PSH of the last packet
    # IP: 4500 + 002e + 0007 + 4000 + 4006 + 0a01 + 0101 + 0a01 + 0202 = dc40, so 23bf
    # in the place of TCP's: 0a01 + 0101 + 0a01 + 0202 + 0006 + 001a = 1725
    expected = "4500002e00074000400623bf0a0101010a0102020005000700000064000000095018200017250000010203040506"
    assert packet.hex() == expected


def test_a_udp6_superframe_byte_for_byte() -> None:
    packets = [bytes(IPv6(src=A6, dst=B6, fl=3) / UDP(sport=5, dport=7) / bytes([i] * 3)) for i in (1, 2, 3)]
    ((header, packet),) = _coalesce.superframes(packets)
    assert VnetHeader.decode(header) == VnetHeader(1, 5, 48, 3, 40, 6)
    # payload 17; in the checksum's place fd00 + 0001 + fd00 + 0002 + 0011 + 0011 = fa26 with the carry
    addresses = "fd000000000000000000000000000001fd000000000000000000000000000002"
    assert packet.hex() == "6000000300111140" + addresses + "000500070011fa26" + "010101020202030303"


# ------------------------------------------------------------------------------------------------- segmentation


def superframe(make: Make, size: int, kind: int, **changes: int) -> tuple[bytes, bytes]:
    """A finished packet made unfinished: the pseudo-header's sum is what is left after the rest is taken out."""
    packet = bytearray(make(0))
    l4 = 20 if packet[0] >> 4 == 4 else 40
    udp_ = kind & 0x7F == 5
    at = l4 + (6 if udp_ else 16)
    addresses = packet[12:20] if l4 == 20 else packet[8:40]
    words = addresses + (len(packet) - l4).to_bytes(2) + bytes([0, 17 if udp_ else 6])
    total = sum(int.from_bytes(words[i : i + 2]) for i in range(0, len(words), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    packet[at : at + 2] = total.to_bytes(2)
    fields = {"flags": 1, "gso_type": kind, "hdr_len": 0, "gso_size": size, "csum_start": l4, "csum_offset": at - l4}
    return VnetHeader(**{**fields, **changes}).encode(), bytes(packet)


def cut(make: Make, size: int, kind: int, **changes: int) -> list[Any]:
    """The segments as scapy reads them; their checksums are right."""
    found = _segment.segments(*superframe(make, size, kind, **changes))
    assert found is not None
    read = [(IP if packet[0] >> 4 == 4 else IPv6)(packet) for packet in found]
    for packet, layers in zip(found, read, strict=True):
        fresh = layers.copy()
        for layer in (IP, TCP, UDP):
            if layer in fresh:
                del fresh[layer].chksum
        again = bytes(fresh)
        if UDP in fresh and again[-len(fresh[UDP]) :][6:8] == b"\0\0":
            again = packet
        assert again == packet
    return read


TCP4, TCP6, UDP4 = 1, 4, 5


@pytest.mark.parametrize(
    ("payload", "size", "expected"),
    [
        (1, 1, [1]),
        (99, 100, [99]),
        (100, 100, [100]),
        (101, 100, [100, 1]),
        (250, 100, [100, 100, 50]),
        (300, 100, [100, 100, 100]),
        (7, 3, [3, 3, 1]),
        (65495, 65495, [65495]),
        (65495, 1448, [1448] * 45 + [335]),
        (65495, 88, [88] * 744 + [23]),
    ],
)
def test_lengths(payload: int, size: int, expected: list[int]) -> None:
    found = cut(tcp(0, payload), size, TCP4)
    assert [len(packet[TCP].payload) for packet in found] == expected
    assert [packet.len for packet in found] == [40 + length for length in expected]
    assert [packet[TCP].seq for packet in found] == [size * i for i in range(len(expected))]


def test_udp_lengths_are_each_segments_own() -> None:
    assert [(p.len, p[UDP].len) for p in cut(udp(250), 100, UDP4)] == [(128, 108), (128, 108), (78, 58)]
    assert [(p.plen, p[UDP].len) for p in cut(udp6(250), 100, UDP4)] == [(108, 108), (108, 108), (58, 58)]
    assert [p.plen for p in cut(tcp6(0, 250), 100, TCP6)] == [120, 120, 70]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("A", ["A", "A", "A"]),
        ("PA", ["A", "A", "PA"]),
        ("FA", ["A", "A", "FA"]),
        ("FPA", ["A", "A", "FPA"]),
        ("UA", ["UA", "UA", "UA"]),
        ("EA", ["EA", "EA", "EA"]),
        ("CA", ["AC", "A", "A"]),
        ("FPACE", ["AEC", "AE", "FPAE"]),
    ],
)
@pytest.mark.parametrize("kind", [TCP4, TCP4 | 0x80], ids=["plain", "with the ECN bit"])
def test_tcp_flags(flags: str, expected: list[str], kind: int) -> None:
    found = cut(tcp(0, 250, flags=flags), 100, kind)
    assert [set(str(packet[TCP].flags)) for packet in found] == [set(some) for some in expected]


def test_identifications_increase_and_wrap_with_and_without_df() -> None:
    for bits in ("DF", ""):
        assert [p.id for p in cut(tcp(0, 250, bits=bits, id=0xFFFE), 100, TCP4)] == [0xFFFE, 0xFFFF, 0]
    assert [p.id for p in cut(udp(250, id=0xFFFF), 100, UDP4)] == [0xFFFF, 0, 1]


def test_sequence_numbers_wrap() -> None:
    found = cut(tcp(0xFFFFFF9C, 250), 100, TCP4)
    assert [p[TCP].seq for p in found] == [0xFFFFFF9C, 0, 100]


def test_a_size_below_the_header_harms_nothing() -> None:
    found = cut(tcp(0, 25, options=NOPS * 10), 10, TCP4)
    assert [bytes(p[TCP].payload) for p in found] == [bytes(10), bytes(10), bytes(5)]


def test_ip_options_and_extension_headers_go_with_every_segment() -> None:
    header, packet = superframe(tcp6(0, 250), 100, TCP6, csum_start=48)
    extended = packet[:4] + b"\x01\x16\x3c" + packet[7:40] + b"\x06\0\x01\x04\0\0\0\0" + packet[40:]
    found = _segment.segments(header, extended)
    assert found is not None
    assert [int.from_bytes(p[4:6]) for p in found] == [128, 128, 78]
    assert {p[40:48] for p in found} == {extended[40:48]}


def carrying(layers: Any) -> Make:
    packet = bytes(IP(src=A, dst=B, flags="DF") / layers)
    return lambda _: packet


def test_a_checksum_of_zero_is_ffff_in_udp_and_zero_in_tcp() -> None:
    # 0a01 + 0101 + 0a01 + 0202 + 0011 + 000a + 0005 + 0007 + 000a = 1736; 1736 + e8c9 = ffff
    (one,) = cut(carrying(UDP(sport=5, dport=7) / b"\xe8\xc9"), 2, UDP4)
    assert one[UDP].chksum == 0xFFFF
    # 0a01 + 0101 + 0a01 + 0202 + 0006 + 0016 + 0005 + 0007 + 5010 + 2000 = 873d; 873d + 78c2 = ffff
    (one,) = cut(carrying(TCP(sport=5, dport=7, flags="A") / b"\x78\xc2"), 2, TCP4)
    assert one[TCP].chksum == 0


@pytest.mark.parametrize(
    ("make", "kind", "changes"),
    [
        pytest.param(tcp(0), 0, {}, id="no superframe"),
        pytest.param(udp(), 3, {}, id="legacy UFO"),
        pytest.param(tcp(0), TCP6, {}, id="tcp6 on ipv4"),
        pytest.param(tcp6(0), TCP4, {}, id="tcp4 on ipv6"),
        pytest.param(tcp(0), 6, {}, id="unknown type"),
        pytest.param(tcp(0), TCP4, {"gso_size": 0}, id="size of nothing"),
        pytest.param(tcp(0), TCP4, {"flags": 0}, id="checksum not unfinished"),
        pytest.param(tcp(0), TCP4, {"flags": 2}, id="checksum said to be valid"),
        pytest.param(tcp(0), TCP4, {"csum_offset": 6}, id="tcp checksum at udp's place"),
        pytest.param(udp(), UDP4, {"csum_offset": 16}, id="udp checksum at tcp's place"),
        pytest.param(tcp(0), TCP4, {"csum_start": 19}, id="transport header inside ip's"),
        pytest.param(tcp(0), TCP4, {"csum_start": 24}, id="transport header behind its beginning"),
        pytest.param(tcp6(0), TCP6, {"csum_start": 39}, id="transport header inside ipv6's"),
        pytest.param(tcp(0), TCP4, {"csum_start": 65535}, id="transport header behind the end"),
        pytest.param(tcp(0, 0), TCP4, {}, id="nothing to cut"),
        pytest.param(udp(0), UDP4, {}, id="nothing to cut in udp"),
        pytest.param(raw(tcp(0), lambda p: p[:39]), TCP4, {}, id="tcp header cut off"),
        pytest.param(raw(tcp(0), lambda p: p[:32] + b"\x40" + p[33:]), TCP4, {}, id="data offset too small"),
        pytest.param(raw(tcp(0, 4), lambda p: p[:32] + b"\xf0" + p[33:]), TCP4, {}, id="data offset behind the end"),
        pytest.param(raw(tcp(0), lambda p: b"\x55" + p[1:]), TCP4, {}, id="bad version"),
    ],
)
def test_what_is_not_cut(make: Make, kind: int, changes: dict[str, int]) -> None:
    header, packet = superframe(make, 50, kind, **changes)
    assert _segment.segments(header, packet) is None
    assert _segment.segments(header, b"") is None
