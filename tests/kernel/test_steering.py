"""The steering program in the real kernel: packets of a flow come by one queue, and by the one that its text names."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from scapy.layers.inet import IP, TCP, UDP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.packet import Packet, Raw

from dataplane.errors import KernelError
from dataplane.kernel import tun
from dataplane.kernel.steering import MULTIPLIER, steering_program
from dataplane.kernel.tun import VNET_HDR_BYTES, Tun, open_tun, release
from tests.kernel.holding import hold
from tests.kernel.test_tun import details, names
from tests.namespaces import Namespace, open_namespace

SEED = 0xFEDC_BA98_7654_3210
WITHOUT_BPF = """
from dataplane.kernel.tun import open_tun
tun = open_tun(queues=4)
print(len(tun.queues), tun.note, flush=True)
"""
HOLD = """
import sys, time
from dataplane.kernel.tun import open_tun
tun = open_tun(adopt=sys.argv[1], queues=3)
print(tun.name, tun.adopted, len(tun.queues), flush=True)
time.sleep(600)
"""


def expected_queue(packet: bytes, queues: int) -> int:
    """What the program's text says, in Python."""
    version = packet[0] >> 4
    if version not in (4, 6):
        return 0
    words = [packet[12:16], packet[16:20]] if version == 4 else [packet[at : at + 4] for at in range(8, 40, 4)]
    protocol = packet[9] if version == 4 else packet[6]
    words.append(bytes((protocol,)))
    fragment = version == 4 and int.from_bytes(packet[6:8]) & 0x3FFF
    if protocol in (6, 17) and not fragment:
        at = (packet[0] & 15) * 4 if version == 4 else 40
        if len(packet) < at + 4:
            return 0
        words.append(packet[at : at + 4])
    value = SEED
    for word in words:
        value = (value ^ int.from_bytes(word)) * MULTIPLIER & (1 << 64) - 1
        value ^= value >> 32
    return (value & 0xFFFF) % queues


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with open_namespace() as namespace:
        yield namespace


@pytest.fixture
def device(ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tun]:
    """Of five queues, up, with a seed that is known."""
    monkeypatch.setattr("secrets.randbits", lambda _bits: SEED)
    made: Tun = ns.run(open_tun, queues=5)
    try:
        ns.command("sysctl", "-qw", f"net.ipv6.conf.{made.name}.disable_ipv6=1")
        ns.command("ip", "link", "set", made.name, "up")
        yield made
    finally:
        release(made)


def arrivals(ns: Namespace, device: Tun, packets: list[bytes]) -> list[int]:
    """By which queue each packet comes, sent as it is through a packet socket."""
    with ns.run(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM) as sender:
        found = []
        for packet in packets:
            ethertype = 0x86DD if packet[0] >> 4 == 6 else 0x0800
            sender.sendto(packet, (device.name, ethertype))
            readable, _, _ = select.select(device.queues, [], [], 10)
            (fd,) = readable
            assert os.read(fd, 70000)[VNET_HDR_BYTES:] == packet
            found.append(device.queues.index(fd))
    return found


def flows(count: int) -> list[Packet]:
    made: list[Packet] = []
    for n in range(count):
        made += [
            IP(src="10.5.1.2", dst="10.5.2.2") / UDP(sport=1000 + n, dport=53) / Raw(b"x"),
            IP(src="10.5.1.2", dst=f"10.5.2.{n}") / TCP(sport=40000, dport=80, seq=n),
            IPv6(src="fd00:5:0:1::2", dst=f"fd00:5:0:2::{n:x}") / UDP(sport=7, dport=9) / Raw(bytes(n)),
            IPv6(src="fd00:5:0:1::2", dst="fd00:5:0:2::2") / TCP(sport=n, dport=443),
        ]
    return made


@pytest.mark.netns
def test_each_packet_comes_by_the_queue_of_its_flow_and_flows_spread(ns: Namespace, device: Tun) -> None:
    packets = [bytes(packet) for packet in flows(60)]
    seen = arrivals(ns, device, packets)
    assert seen == [expected_queue(packet, 5) for packet in packets]
    for kind in range(4):
        shares = Counter(seen[kind::4])
        assert set(shares) == set(range(5)), f"flows of kind {kind} miss a queue: {shares}"


@pytest.mark.netns
def test_what_differs_between_packets_of_a_flow_changes_nothing(ns: Namespace, device: Tun) -> None:
    tcp = IP(src="10.5.1.2", dst="10.5.2.2") / TCP(sport=40000, dport=80)
    same = [
        tcp,
        IP(src="10.5.1.2", dst="10.5.2.2", tos=3, id=99, ttl=3, flags="DF") / TCP(sport=40000, dport=80, seq=77, ack=1),
        tcp / Raw(bytes(1000)),
        IP(src="10.5.1.2", dst="10.5.2.2", options=[b"\x01\x01\x01\x00"]) / TCP(sport=40000, dport=80, flags="SFP"),
    ]
    six = IPv6(src="fd00::1", dst="fd00::2", tc=255, fl=12345, hlim=1) / TCP(sport=40000, dport=80) / Raw(bytes(77))
    also = [IPv6(src="fd00::1", dst="fd00::2") / TCP(sport=40000, dport=80), six]
    assert len(set(arrivals(ns, device, [bytes(packet) for packet in same]))) == 1
    assert len(set(arrivals(ns, device, [bytes(packet) for packet in also]))) == 1


@pytest.mark.netns
def test_the_fragments_of_a_packet_come_by_one_queue(ns: Namespace, device: Tun) -> None:
    for n in range(12):
        whole = IP(src="10.5.1.2", dst=f"10.5.2.{n}", id=n) / UDP(sport=n, dport=n) / Raw(os.urandom(4000))
        parts = [bytes(part) for part in fragment(whole, 1000)]  # type: ignore[no-untyped-call]  # scapy has no annotations
        six = IPv6(src="fd00::1", dst=f"fd00::{n}")
        parts_v6 = [bytes(six / IPv6ExtHdrFragment(nh=17, id=n, offset=o, m=o < 2) / os.urandom(64)) for o in range(3)]
        for fragments in (parts, parts_v6):
            assert set(arrivals(ns, device, fragments)) == {expected_queue(fragments[0], 5)}


@pytest.mark.netns
def test_what_is_hardly_a_packet_has_a_queue_all_the_same(ns: Namespace, device: Tun) -> None:
    cut = bytes(IP(src="10.5.1.2", dst="10.5.2.2", len=22, proto=17))[:20] + b"\0\1"
    odd = [
        cut,
        bytes(IP(src="10.5.1.2", dst="10.5.2.2", proto=47) / Raw(b"gre")),
        bytes(IPv6(src="fd00::1", dst="fd00::2") / IPv6ExtHdrDestOpt() / UDP(sport=1, dport=2)),
        bytes(IPv6(src="fd00::1", dst="fd00::2", nh=6)),
        struct.pack("!B", 0x45) + bytes(19),
        b"\x60" + bytes(39),
        b"\x50" + bytes(30),
    ]
    assert arrivals(ns, device, odd) == [expected_queue(packet, 5) for packet in odd]


@pytest.mark.parametrize("seed", [0, 1, SEED, (1 << 64) - 1, 1 << 63])
def test_the_program_is_whole_instructions_whose_jumps_stay_inside(seed: int) -> None:
    code = steering_program(seed)
    lines = list(struct.iter_unpack("<BBhi", code))
    assert b"".join(struct.pack("<BBhi", *line) for line in lines) == code
    for at, (opcode, _, jump, _) in enumerate(lines):
        assert jump == 0 or opcode & 7 == 5
        assert 0 < at + 1 + jump <= len(lines)
    low, high = lines[1][3], lines[2][3]
    assert (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32 == seed


# --- devices of several queues --------------------------------------------------------------------------------


@pytest.mark.netns
def test_a_device_has_as_many_queues_as_asked_for_and_goes_with_all_of_them(ns: Namespace) -> None:
    made = ns.run(open_tun, queues=16)
    try:
        seen = details(ns, made.name)
        assert (seen["multi_queue"], seen["numqueues"], seen["persist"]) == (True, 16, True)
        assert len(set(made.queues)) == 16
        assert not any(os.get_blocking(fd) or os.get_inheritable(fd) for fd in made.queues)
        assert made.note == ""
    finally:
        release(made)
        release(made)
    assert names(ns) == set()


@pytest.mark.netns
def test_a_kill_leaves_the_device_which_is_adopted_with_what_came_for_fewer_queues_dropped(ns: Namespace) -> None:
    process, printed = hold(ns, HOLD)
    assert printed == "flannel0 False 3"
    ns.command("ip", "addr", "add", "10.5.1.0/32", "dev", "flannel0")
    ns.command("ip", "link", "set", "flannel0", "up")
    ns.command("ip", "route", "add", "10.5.0.0/16", "dev", "flannel0")
    index = details(ns, "flannel0")["ifindex"]
    with pytest.raises(KernelError, match=rf"cannot adopt device flannel0: process python\S* \(pid {process.pid}\)"):
        ns.run(open_tun, adopt="flannel0", queues=2)
    assert details(ns, "flannel0")["numqueues"] == 3
    process.kill()
    process.wait(timeout=30)
    assert "10.5.0.0/16 dev flannel0" in ns.command("ip", "route").stdout
    made = ns.run(open_tun, adopt="flannel0", queues=2)  # another number of queues is no other device
    try:
        seen = details(ns, "flannel0")
        assert (made.adopted, seen["ifindex"], seen["numqueues"]) == (True, index, 2)
        assert "10.5.1.0/32" in ns.command("ip", "addr").stdout
        for fd in made.queues:
            with pytest.raises(BlockingIOError):
                os.read(fd, 2048)
    finally:
        release(made)
    assert names(ns) == set()


@pytest.mark.netns
@pytest.mark.parametrize(("left", "wanted"), [(1, 3), (3, 1)])
def test_a_device_of_the_other_kind_is_made_anew_under_its_name(ns: Namespace, left: int, wanted: int) -> None:
    flags = ("multi_queue",) if left > 1 else ()
    ns.command("ip", "tuntap", "add", "dev", "flannel7", "mode", "tun", *flags)
    index = details(ns, "flannel7")["ifindex"]
    made = ns.run(open_tun, adopt="flannel7", queues=wanted)
    try:
        seen = details(ns, "flannel7")
        assert (made.name, made.adopted, len(made.queues)) == ("flannel7", False, wanted)
        assert seen["multi_queue"] == (wanted > 1)
        assert seen["ifindex"] != index
    finally:
        release(made)


@pytest.mark.netns
@pytest.mark.parametrize("kind", ["tap", "veth"])
def test_what_is_no_tun_device_is_left_alone(ns: Namespace, kind: str) -> None:
    if kind == "tap":
        ns.command("ip", "tuntap", "add", "dev", "flannel0", "mode", "tap", "multi_queue")
    else:
        ns.command("ip", "link", "add", "flannel0", "type", "veth", "peer", "name", "v1")
        ns.command("ip", "link", "set", "v1", "up")
    ns.command("ip", "link", "set", "flannel0", "up")
    before = names(ns)
    made = ns.run(open_tun, adopt="flannel0", queues=2)
    try:
        assert (made.name, made.adopted, len(made.queues)) == ("flannel1", False, 2)
    finally:
        release(made)
    assert names(ns) == before


@pytest.mark.netns
def test_without_the_privilege_there_is_one_queue_and_a_reason(ns: Namespace) -> None:
    stdout, stderr = ns.spawn_python(WITHOUT_BPF, dropped=("bpf", "sys_admin")).communicate(timeout=60)
    assert stderr == ""
    assert stdout == (
        "1 one queue instead of 4: the steering program: Operation not permitted; it needs CAP_BPF\n"
    )
    assert details(ns, "flannel0")["multi_queue"] is False


@pytest.mark.netns
def test_where_no_program_can_steer_there_is_one_queue_and_a_reason(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tun, "BPF_CALL", {})
    made = ns.run(open_tun, queues=4)
    release(made)
    assert len(made.queues) == 1
    assert made.note.startswith("one queue instead of 4: no steering program for ")
    monkeypatch.undo()
    monkeypatch.setattr(tun, "TUNSETSTEERINGEBPF", 0x800454FF)  # a kernel that has no such call
    made = ns.run(open_tun, queues=4)
    try:
        assert "TUNSETSTEERINGEBPF: " in made.note
        assert details(ns, made.name)["multi_queue"] is False
        assert names(ns) == {made.name}
    finally:
        release(made)


def test_the_oracle_knows_addresses_of_both_versions() -> None:
    """So that a wrong oracle cannot agree with a wrong program on nothing."""
    packet = bytes(IP(src="10.5.1.2", dst="10.5.2.2") / UDP(sport=1, dport=2))
    assert packet[12:16] == ip_address("10.5.1.2").packed
    assert bytes(IPv6(src="fd00::1", dst="fd00::2"))[8:24] == ip_address("fd00::1").packed
