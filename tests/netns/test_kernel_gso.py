"""The kernel as the oracle of segmentation: what we cut a superframe into equals, byte for byte, what a forwarding
kernel without offloads sends; and what we merge, the kernel cuts into the packets that came.

LODEN_GSO_CASES says how many cases (10,000), LODEN_GSO_SEED repeats a run.
"""

from __future__ import annotations

import errno
import os
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

from dataplane import _coalesce, _segment
from dataplane.path.superframe import TCP, UDP, VnetHeader
from tests.netns.gso_cases import Superframe, forwarded, label_of, make_stream, make_superframe
from tests.netns.kernel_cutter import KernelCutter, open_cutter

pytestmark = pytest.mark.netns

CASES = int(os.environ.get("LODEN_GSO_CASES", "10000"))
SEED = int(os.environ.get("LODEN_GSO_SEED", "0")) or secrets.randbits(32)
BATCH = 100
RARE = (
    "UDP checksum of 0xFFFF",
    "TCP checksum of 0",
    "IPv6 extension",
    "IPv4 options",
    "sequence wrap",
    "IP ID wrap",
    "MSS below header",
    "one segment",
    "more than 128 segments",
)


@pytest.fixture(scope="module")
def cutter() -> Iterator[KernelCutter]:
    with open_cutter() as found:
        yield found


def show(case: Superframe) -> str:
    return (
        f"repeat with LODEN_GSO_SEED={SEED} LODEN_GSO_CASES={CASES}\ncase {case.label}: {case.header}\n"
        f"header {case.header.encode().hex()}\npacket {case.packet.hex()}"
    )


def by_label(packets: list[bytes]) -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = defaultdict(list)
    for packet in packets:
        found[label_of(packet)].append(packet)
    return found


def as_the_kernel_sends(case: Superframe, cut: list[bytes]) -> list[bytes]:
    """What the kernel makes of our segments: it forwards them. Two peculiarities, both of a superframe of one segment,
    which no kernel hands over: it takes TCP options for payload when it looks whether there is anything to cut, then
    finds nothing to cut and drops the packet (virtio_net_hdr_to_skb, tcp_gso_segment); and a packet that it does not
    cut gets 0xFFFF for a TCP checksum of 0 as well (skb_checksum_help), which means the same."""
    if len(cut) == 1 and case.header.csum_offset == 16:
        at = case.header.csum_start + 16
        if len(case.packet) - case.header.csum_start - 20 > case.header.gso_size:
            return []
        if cut[0][at : at + 2] == b"\0\0":
            cut = [cut[0][:at] + b"\xff\xff" + cut[0][at + 2 :]]
    return [forwarded(packet) for packet in cut]


def test_we_cut_superframes_as_the_kernel_does(cutter: KernelCutter) -> None:
    rng = random.Random(SEED)
    reached: Counter[str] = Counter()
    for start in range(0, CASES, BATCH):
        cases = [make_superframe(rng, label) for label in range(start, min(start + BATCH, CASES))]
        expected: dict[int, list[bytes]] = {}
        for case in cases:
            cut = _segment.segments(case.header.encode(), case.packet)
            assert cut is not None, show(case)
            expected[case.label] = as_the_kernel_sends(case, cut)
            count(reached, case, cut)
            try:
                cutter.write(case.header.encode(), case.packet)
            except OSError as error:
                pytest.fail(f"the kernel did not take this: {error}\n{show(case)}")
        found = by_label(cutter.collect(sum(map(len, expected.values()))))
        for case in cases:
            assert found[case.label] == expected[case.label], show(case)
        assert found.keys() == expected.keys()
    # each of these is rare enough that a generator gone wrong would show here
    for kind in RARE:
        assert reached[kind] >= CASES // 2000, f"{kind}: {reached}"


def count(reached: Counter[str], case: Superframe, cut: list[bytes]) -> None:
    l4, packet = case.header.csum_start, case.packet
    at = l4 + case.header.csum_offset
    tcp = case.header.csum_offset == 16
    v4 = packet[0] >> 4 == 4
    reached["UDP checksum of 0xFFFF"] += not tcp and any(p[at : at + 2] == b"\xff\xff" for p in cut)
    reached["TCP checksum of 0"] += tcp and any(p[at : at + 2] == b"\0\0" for p in cut)
    reached["IPv6 extension"] += not v4 and l4 > 40
    reached["IPv4 options"] += v4 and l4 > 20
    reached["sequence wrap"] += tcp and cut[-1][l4 + 4 : l4 + 8] < cut[0][l4 + 4 : l4 + 8]
    reached["IP ID wrap"] += v4 and cut[-1][4:6] < cut[0][4:6]
    reached["MSS below header"] += case.header.gso_size < l4
    reached["one segment"] += len(cut) == 1
    reached["more than 128 segments"] += len(cut) > 128


def without_identification(packet: bytes) -> bytes:
    """RFC 6864 section 4: the identification of an atomic datagram (DF) means nothing."""
    if packet[0] >> 4 == 4 and packet[6] & 0x40:
        return packet[:4] + b"\0\0" + packet[6:10] + b"\0\0" + packet[12:]
    return packet


def test_the_kernel_cuts_what_we_merge_into_the_packets_that_came(cutter: KernelCutter) -> None:
    rng = random.Random(SEED)
    merged = 0
    for start in range(0, CASES, BATCH):
        streams = {label: make_stream(rng, label) for label in range(start, min(start + BATCH, CASES))}
        # four flows interleaved at a time, as a node receives them
        labels = list(streams)
        for at in range(0, len(labels), 4):
            queues = [list(streams[label]) for label in labels[at : at + 4]]
            came = []
            while queues:
                queue = rng.choice(queues)
                came.append(queue.pop(0))
                queues = [q for q in queues if q]
            for header, packet in _coalesce.superframes(came):
                merged += header != bytes(10)
                cutter.write(header, packet)
        found = by_label(cutter.collect(sum(map(len, streams.values()))))
        for label, stream in streams.items():
            expected = [without_identification(forwarded(packet)) for packet in stream]
            left = [without_identification(packet) for packet in found[label]]
            assert left == expected, f"LODEN_GSO_SEED={SEED}, stream {label}: {[p.hex() for p in stream]}"
    assert merged > CASES


EINVAL = errno.EINVAL
TAKEN = 0


def plain(version: int, protocol: int) -> tuple[VnetHeader, bytes]:
    """A superframe of 250 bytes without options or extensions, to be cut at 100."""
    rng = random.Random(1)
    while True:
        case = make_superframe(rng, 1)
        l4 = 20 if version == 4 else 40
        header = case.header
        same = case.packet[0] >> 4 == version and header.csum_start == l4
        if same and header.csum_offset == (16 if protocol == TCP else 6) and header.hdr_len > l4:
            size = -(-(len(case.packet) - header.hdr_len) // 3)
            kind = header.gso_type & 0x7F
            return VnetHeader(1, kind, header.hdr_len, size, l4, header.csum_offset), case.packet


REFUSALS = [
    # id, version, protocol, what is changed in the header, bytes left of the packet, kernel's errno, do we cut it
    ("udp without unfinished checksum", 4, UDP, {"flags": 0}, None, EINVAL, False),
    ("udp with the checksum elsewhere", 4, UDP, {"csum_offset": 4}, None, EINVAL, False),
    ("udp with the ECN bit", 4, UDP, {"gso_type": 0x85}, None, EINVAL, True),
    ("tcp with the checksum elsewhere", 4, TCP, {"csum_offset": 6}, None, EINVAL, False),
    ("size of nothing", 4, TCP, {"gso_size": 0}, None, EINVAL, False),
    ("udp, size of nothing", 6, UDP, {"gso_size": 0}, None, EINVAL, False),
    ("129 segments of udp", 4, UDP, {"gso_size": 1}, 20 + 8 + 129, EINVAL, True),
    ("headers longer than the packet", 4, TCP, {"hdr_len": 65535}, None, EINVAL, True),
    ("tcp6 on ipv4", 4, TCP, {"gso_type": 4}, None, EINVAL, False),
    ("tcp4 on ipv6", 6, TCP, {"gso_type": 1}, None, TAKEN, False),
    ("checksum behind the end", 4, TCP, {"csum_start": 65000}, None, EINVAL, False),
    ("no such type", 4, TCP, {"gso_type": 7}, None, EINVAL, False),
    ("cut inside the tcp header", 4, TCP, {"hdr_len": 0}, 39, EINVAL, False),
    ("cut inside the ip header", 4, TCP, {"hdr_len": 0}, 19, EINVAL, False),
    ("tcp without unfinished checksum", 4, TCP, {"flags": 0}, None, TAKEN, False),
]


@pytest.mark.parametrize(
    ("version", "protocol", "change", "left", "code", "cut"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS]
)
def test_what_the_kernel_refuses(
    cutter: KernelCutter, version: int, protocol: int, change: dict[str, int], left: int | None, code: int, cut: bool
) -> None:
    """We read from a kernel that writes none of these. What we cut all the same is well defined: the segments of a
    long UDP packet are no more than a loop, hdr_len is a hint that we do not use, and the ECN bit says nothing of UDP.
    What we refuse although the kernel takes it, to drop it later: another version's type; and finished checksums
    of the whole, which say nothing of the parts."""
    header, packet = plain(version, protocol)
    fields = ("flags", "gso_type", "hdr_len", "gso_size", "csum_start", "csum_offset")
    header = VnetHeader(**{**{name: getattr(header, name) for name in fields}, **change})
    packet = packet[:left]
    try:
        cutter.write(header.encode(), packet)
        answer = TAKEN
    except OSError as error:
        answer = error.errno or -1
    cutter.collect(0)
    assert answer == code
    assert (_segment.segments(header.encode(), packet) is not None) == cut
