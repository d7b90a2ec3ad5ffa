"""Taps in the running pumps: what is recorded, beside the plain-Python writer and scapy; what is lost and said."""

from __future__ import annotations

import asyncio
import io
import socket
import time
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Network, ip_address

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from dataplane.debug import expression, pcapng
from dataplane.debug.pcapng import INBOUND, OUTBOUND, Packet
from dataplane.errors import DropReason
from dataplane.path import superframe
from dataplane.path.capability import EVERYTHING
from dataplane.path.datapath import Datapath, Tap
from dataplane.path.facts import Outer, SourceCheck, Vxlan
from tests.path.rig import LOCAL, PEER, THEIRS, Rig, packet, tcp_superframe

REASONS = tuple(reason.name.encode() for reason in DropReason)
FAR = 1 << 63
HEAD = pcapng.section("test") + b"".join(pcapng.interface(101, 0, name=name) for name in ("overlay", "underlay"))


def make_tap(text: str = "", snaplen: int = 65535, names: dict[str, str] | None = None) -> Tap:
    program = expression.compile_filter(expression.parse(text))
    known = [(ip_address(address).packed, name) for address, name in (names or {}).items()]
    return Tap(program, snaplen, 1 << 18, REASONS, known)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig(SourceCheck.NODE)
    made.path.set_route(THEIRS, PEER)
    made.path.start()
    yield made
    await made.close()


def drain(tap: Tap, most: int = 1 << 62) -> list[Packet]:
    data = HEAD + bytes(tap.drain(FAR, most))
    return [block for block in pcapng.Reader(io.BytesIO(data), "tap") if isinstance(block, Packet)]


async def matched(tap: Tap, count: int) -> None:
    for _ in range(500):
        if tap.statistics[0] >= count:
            break
        await asyncio.sleep(0.01)
    assert tap.statistics[0] == count


def outer(rig: Rig, payload: bytes, *, sent: bool, ttl: int = 64) -> bytes:
    ends = (LOCAL, PEER) if sent else (PEER, LOCAL)
    made = IP(src=str(ends[0]), dst=str(ends[1]), ttl=ttl, id=0, flags="DF" if sent else 0)
    return bytes(made / UDP(sport=rig.port, dport=rig.port, chksum=0) / payload)


async def test_both_headers_of_a_packet_each_way(rig: Rig) -> None:
    tap = make_tap(names={str(PEER): "node-b"})
    await rig.path.arm([tap])
    before = time.time_ns()
    there, back = packet("10.5.1.2", "10.5.2.9"), packet("10.5.2.9", "10.5.1.2", b"x" * 33)
    rig.send_from_pod(there)
    rig.peer.recv(70000)
    await matched(tap, 1)
    rig.peer.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 61)
    rig.peer.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0xB8)
    rig.send_from_peer(back)
    rig.read_at_pod()
    await matched(tap, 2)
    tx_inner, tx_outer, rx_outer, rx_inner = drain(tap)
    comment = "peer=node-b lease=10.5.2.0/24 dir="
    assert (tx_inner.interface.name, tx_inner.data, tx_inner.length) == ("overlay", there, len(there))
    assert (tx_inner.comment, tx_inner.direction, tx_inner.number) == (f"{comment}tx", OUTBOUND, 0)
    wanted = outer(rig, there, sent=True)
    assert (tx_outer.interface.name, IP(tx_outer.data).ttl) == ("underlay", 64)
    assert without_df(tx_outer.data) == without_df(wanted)
    assert (rx_inner.data, rx_inner.comment, rx_inner.direction) == (back, f"{comment}rx", INBOUND)
    seen = IP(rx_outer.data)
    assert (seen.ttl, seen.tos, seen.src, seen.dst) == (61, 0xB8, str(PEER), str(LOCAL))
    assert bytes(seen[UDP].payload) == back
    assert [each.number for each in (tx_outer, rx_outer, rx_inner)] == [0, 1, 1]
    assert before <= tx_inner.ns <= rx_outer.ns <= time.time_ns()
    assert tap.statistics == (2, 0, 2)


def without_df(data: bytes) -> bytes:
    """The test's socket leaves the kernel's default in IP_MTU_DISCOVER, which a sysctl sets."""
    made = IP(data)
    made.flags = 0
    del made.chksum
    return bytes(made)


async def test_the_blocks_are_those_of_the_plain_writer(rig: Rig) -> None:
    """Byte for byte, for payloads of every length modulo 4."""
    tap = make_tap()
    await rig.path.arm([tap])
    sent = [packet("10.5.1.2", "10.5.2.9", bytes(size)) for size in range(9)]
    for each in sent:
        rig.send_from_pod(each)
        rig.peer.recv(70000)
    await matched(tap, len(sent))
    data = bytes(tap.drain(FAR, 1 << 62))
    found = [block for block in pcapng.Reader(io.BytesIO(HEAD + data), "tap") if isinstance(block, Packet)]
    again = b"".join(
        pcapng.packet(
            each.interface.number,
            each.ns,
            each.data,
            each.length,
            comment=each.comment,
            direction=each.direction,
            number=each.number,
            lost=each.lost,
        )
        for each in found
    )
    assert data == again
    assert [each.data for each in found[::2]] == sent


@pytest.mark.parametrize(
    ("datagram", "reason", "inner"),
    [
        (b"", DropReason.NOT_IP, False),
        (b"hello, world", DropReason.NOT_IP, False),
        (packet("10.5.2.9", "10.5.1.2")[:-1], DropReason.LENGTH, True),
        (packet("10.5.3.9", "10.5.1.2"), DropReason.SPOOFED_SOURCE, True),
    ],
)
async def test_a_dropped_datagram_is_shown_with_its_reason(
    rig: Rig, datagram: bytes, reason: DropReason, inner: bool
) -> None:
    tap = make_tap("drop")
    await rig.path.arm([tap])
    rig.send_from_peer(datagram)
    rig.send_from_peer(packet("10.5.2.9", "10.5.1.2"))
    rig.read_at_pod()
    await matched(tap, 1)
    found = drain(tap)
    assert [each.interface.name for each in found] == ["underlay", "overlay"][: 1 + inner]
    assert found[0].comment.split()[2] == "dir=rx"
    assert f"drop={reason.name}" in found[0].comment.split()
    assert ("inner=none" in found[0].comment) is not inner
    assert bytes(IP(found[0].data)[UDP].payload) == datagram


async def test_a_stranger_and_a_lost_way_are_shown(rig: Rig) -> None:
    tap = make_tap("drop")
    await rig.path.arm([tap])
    stranger = rig.node(IPv4Address("127.0.0.3"))
    rig.send_from_peer(packet("10.5.2.9", "10.5.1.2"), stranger)
    stranger.close()
    lost = packet("10.5.1.2", "10.5.77.1")
    await matched(tap, 1)
    rig.send_from_pod(lost)
    await matched(tap, 2)
    *one, two = drain(tap)
    assert {each.comment for each in one} == {"peer=127.0.0.3 dir=rx drop=UNKNOWN_PEER"}
    assert (two.interface.name, two.data, two.comment) == ("overlay", lost, "dir=tx drop=NO_ROUTE")


async def test_a_datagram_that_cannot_be_sent_is_shown_once_as_dropped(rig: Rig) -> None:
    """255.255.255.255 needs SO_BROADCAST: the kernel answers EACCES."""
    tap = make_tap()
    rig.path.set_route(IPv4Network("10.5.9.0/24"), IPv4Address("255.255.255.255"))
    rig.path.publish()
    await rig.path.arm([tap])
    rig.send_from_pod(packet("10.5.1.2", "10.5.9.9"))
    rig.send_from_pod(packet("10.5.1.2", "10.5.2.9"))
    rig.peer.recv(70000)
    await matched(tap, 2)
    comments = {each.comment for each in drain(tap)}
    assert comments == {
        "peer=255.255.255.255 lease=10.5.9.0/24 dir=tx drop=SEND_FAILED",
        "peer=127.0.0.2 lease=10.5.2.0/24 dir=tx",
    }


async def test_segments_say_which_superframe_they_were_part_of() -> None:
    rig = Rig(capabilities=EVERYTHING)
    rig.path.set_route(THEIRS, PEER)
    header, whole = tcp_superframe(5 * 1000, 1000)
    plain = packet("10.5.1.2", "10.5.2.9")
    rig.path.start()
    tap = make_tap()
    await rig.path.arm([tap])
    rig.pods.send(header.encode() + whole)
    rig.send_from_pod(plain)
    expected = superframe.segments(header, whole)
    assert expected is not None
    assert [rig.peer.recv(70000) for _ in range(6)] == [*expected, plain]
    await matched(tap, 6)
    found = [each for each in drain(tap) if each.interface.name == "overlay"]
    assert [each.data for each in found] == [*expected, plain], "taken after the checksums were finished"
    assert {each.comment.split()[-1] for each in found[:5]} == {f"superframe=1/{len(whole)}"}
    assert "superframe" not in found[5].comment
    await rig.close()


async def test_a_refused_run_is_shown_datagram_by_datagram() -> None:
    rig = Rig(capabilities=EVERYTHING)
    rig.path.set_route(THEIRS, PEER)
    rig._udp.setsockopt(socket.SOL_SOCKET, 11, 1)  # SO_NO_CHECK: the kernel cuts nothing
    sent = [packet("10.5.1.2", "10.5.2.9", bytes([i]) * 50) for i in range(10)]
    for each in sent:
        rig.send_from_pod(each)
    tap = make_tap()
    rig.path.start()
    await rig.path.arm([tap])
    assert [rig.peer.recv(70000) for _ in sent] == sent
    for each in sent:
        rig.send_from_pod(each)
    assert [rig.peer.recv(70000) for _ in sent] == sent
    await asyncio.sleep(0.05)
    assert [each.data for each in drain(tap) if each.interface.name == "overlay"][-10:] == sent
    await rig.close()


MAC, THEIR_MAC = bytes.fromhex("021122334455"), bytes.fromhex("02aabbccddee")


def vxlan(vni: int) -> bytes:
    """RFC 7348 section 5: the flag, reserved bits, the VNI, reserved bits. Scapy's sets one that is reserved."""
    return bytes((8, 0, 0, 0)) + (vni << 8).to_bytes(4)


class WideRig:
    """One datapath of VXLAN over IPv4, or of udp mode's wire over IPv6; the peer is one socket."""

    def __init__(self, family: int, here: str, there: str, wire: Vxlan | None) -> None:
        self.pods, self._tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._tun.setblocking(False)
        self.receiver, self.sender, self.peer = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(3))
        for each, address in ((self.receiver, here), (self.sender, here), (self.peer, there)):
            each.bind((address, 0))
        self.peer.settimeout(5)
        self.pods.settimeout(5)
        self.receiver.setblocking(False)
        port = self.peer.getsockname()[1]
        self.path = Datapath(
            self._tun.fileno(),
            Outer(self.receiver.fileno(), port, (self.sender.fileno(),)),
            mtu=1400,
            source_check=SourceCheck.NODE,
            vxlan=wire,
            on_event=print,
        )
        self.path.set_route(THEIRS, ip_address(there), THEIR_MAC)
        self.path.start()

    async def close(self) -> None:
        await self.path.stop()
        for end in (self.pods, self._tun, self.receiver, self.sender, self.peer):
            end.close()


async def test_vxlan_shows_the_frame_its_vni_and_its_source_port() -> None:
    rig = WideRig(socket.AF_INET, str(LOCAL), str(PEER), Vxlan(5, MAC, 4))
    tap = make_tap("vni 5")
    await rig.path.arm([tap])
    there, back = packet("10.5.1.2", "10.5.2.9"), packet("10.5.2.9", "10.5.1.2")
    rig.pods.send(bytes(10) + there)
    datagram, _ = rig.peer.recvfrom(2000)
    frame = bytes(Ether(src=THEIR_MAC.hex(":"), dst=MAC.hex(":")) / IP(back))
    rig.peer.sendto(vxlan(5) + frame, rig.receiver.getsockname())
    assert rig.pods.recv(2000)[10:] == back
    rig.peer.sendto(vxlan(6) + frame, rig.receiver.getsockname())
    await matched(tap, 2)
    await asyncio.sleep(0.1)
    tx_inner, tx_outer, rx_outer, rx_inner = drain(tap)
    assert (tx_inner.data, rx_inner.data) == (there, back)
    assert tx_inner.comment == "peer=127.0.0.2 lease=10.5.2.0/24 dir=tx vni=5"
    sent = IP(tx_outer.data)
    assert bytes(sent[UDP].payload) == datagram
    assert sent[UDP].sport == rig.sender.getsockname()[1]
    assert sent[UDP].dport == rig.peer.getsockname()[1]
    assert bytes(IP(rx_outer.data)[UDP].payload) == vxlan(5) + frame
    other = make_tap("drop foreign_vni")
    await rig.path.arm([other])
    rig.peer.sendto(vxlan(6) + frame, rig.receiver.getsockname())
    await matched(other, 1)
    assert {each.comment for each in drain(other)} == {"peer=127.0.0.2 lease=10.5.2.0/24 dir=rx vni=6 drop=FOREIGN_VNI"}
    await rig.close()


async def test_an_outer_header_of_ipv6_has_a_right_checksum() -> None:
    rig = WideRig(socket.AF_INET6, "::1", "::1", None)
    tap = make_tap(snaplen=60)
    await rig.path.arm([tap], 1)
    for size in range(5):
        rig.pods.send(bytes(10) + packet("10.5.1.2", "10.5.2.9", bytes([size]) * size))
        rig.peer.recv(2000)
    await matched(tap, 5)
    for number, outer_packet in enumerate(drain(tap)[1::2]):
        payload = packet("10.5.1.2", "10.5.2.9", bytes([number]) * number)
        ports = {"sport": rig.sender.getsockname()[1], "dport": rig.peer.getsockname()[1]}
        wanted = bytes(IPv6(src="::1", dst="::1", hlim=64) / UDP(**ports) / payload)
        assert outer_packet.data == wanted[:60]
        assert outer_packet.length == len(wanted)
    await rig.close()


async def test_snaplen_cuts_both_and_lengths_stay(rig: Rig) -> None:
    tap = make_tap(snaplen=40)
    await rig.path.arm([tap])
    sent = packet("10.5.1.2", "10.5.2.9", bytes(900))
    rig.send_from_pod(sent)
    await matched(tap, 1)
    inner, datagram = drain(tap)
    assert (inner.data, inner.length) == (sent[:40], len(sent))
    assert (len(datagram.data), datagram.length) == (40, len(sent) + 28)
    assert datagram.data[28:] == sent[:12]


async def test_a_full_ring_counts_what_it_left_out_and_says_where(rig: Rig) -> None:
    tap = make_tap()
    await rig.path.arm([tap])
    count = 400  # of about 1,100 bytes: more than 256 KiB
    for i in range(count):
        rig.send_from_pod(packet("10.5.1.2", "10.5.2.9", i.to_bytes(4) + bytes(1000)))
        rig.peer.recv(70000)
    await matched(tap, count)
    _, lost, _ = tap.statistics
    assert 0 < lost < count
    first = drain(tap)
    assert len(first) == 2 * (count - lost)
    for _ in range(3):
        rig.send_from_pod(packet("10.5.1.2", "10.5.2.9"))
        rig.peer.recv(70000)
    await matched(tap, count + 3)
    later = drain(tap)
    assert [each.lost for each in later] == [lost, 0, 0, 0, 0, 0]
    assert sum(each.lost for each in first) == 0


async def test_a_ring_goes_round_without_a_scratch(rig: Rig) -> None:
    tap = make_tap()
    await rig.path.arm([tap])
    for turn in range(60):
        sent = [packet("10.5.1.2", "10.5.2.9", bytes([turn, i]) * (11 * i + turn)) for i in range(30)]
        for each in sent:
            rig.send_from_pod(each)
            rig.peer.recv(70000)
        await matched(tap, 30 * (turn + 1))
        assert [each.data for each in drain(tap)[::2]] == sent
    assert tap.statistics[1] == 0


async def test_both_directions_come_merged_by_time_and_by_the_count(rig: Rig) -> None:
    tap = make_tap("udp")
    await rig.path.arm([tap])
    for i in range(20):
        if i % 3:
            rig.send_from_pod(packet("10.5.1.2", "10.5.2.9", bytes([i])))
            rig.peer.recv(70000)
        else:
            rig.send_from_peer(packet("10.5.2.9", "10.5.1.2", bytes([i])))
            rig.read_at_pod()
        await matched(tap, i + 1)
    first, rest = drain(tap, 5), drain(tap)
    assert len(first) == 10
    stamps = [each.ns for each in first + rest]
    assert stamps == sorted(stamps)
    assert [each.data[-1] for each in first + rest if each.interface.name == "overlay"] == list(range(20))


async def test_nothing_younger_than_asked_for_is_handed_over(rig: Rig) -> None:
    tap = make_tap()
    await rig.path.arm([tap])
    rig.send_from_pod(packet("10.5.1.2", "10.5.2.9"))
    await matched(tap, 1)
    assert bytes(tap.drain(time.time_ns() - 10**12, 10)) == b""
    assert bytes(tap.drain(time.time_ns() + 1, 10)) != b""


async def test_taps_have_filters_of_their_own_and_go_one_by_one(rig: Rig) -> None:
    udp, tcp, everything = make_tap("udp"), make_tap("tcp"), make_tap()
    await rig.path.arm([udp, tcp, everything])
    rig.send_from_pod(packet("10.5.1.2", "10.5.2.9"))
    rig.send_from_pod(bytes(IP(src="10.5.1.2", dst="10.5.2.9") / TCP()))
    await matched(everything, 2)
    assert [tap.statistics[0] for tap in (udp, tcp)] == [1, 1]
    await rig.path.arm([tcp])
    rig.send_from_pod(packet("10.5.1.2", "10.5.2.9"))
    rig.send_from_pod(bytes(IP(src="10.5.1.2", dst="10.5.2.9") / TCP()))
    await matched(tcp, 2)
    await rig.path.arm([])
    rig.send_from_pod(bytes(IP(src="10.5.1.2", dst="10.5.2.9") / TCP()))
    for _ in range(5):
        rig.peer.recv(70000)
    assert [tap.statistics[0] for tap in (udp, tcp, everything)] == [1, 2, 2]
    with pytest.raises(ValueError, match="at most 4"):
        await rig.path.arm([make_tap() for _ in range(5)])


async def test_arming_and_disarming_under_traffic_loses_no_packet(rig: Rig) -> None:
    rig.peer.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
    seen = 0
    for turn in range(200):
        tap = make_tap()
        await rig.path.arm([tap])
        for i in range(5):
            rig.send_from_pod(packet("10.5.1.2", "10.5.2.9", bytes([turn, i])))
        if turn % 2:
            await rig.path.arm([])
        seen += len(drain(tap))
    assert [rig.peer.recv(70000)[28:] for _ in range(1000)] == [bytes([t, i]) for t in range(200) for i in range(5)]
    assert not rig.drops()
    assert seen > 0
