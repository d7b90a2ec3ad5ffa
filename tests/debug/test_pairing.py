"""Packets that are seen twice: known again, or given up after a while; never lost, never made."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.sctp import SCTP, SCTPChunkData
from scapy.packet import Packet as Layers

from dataplane.debug import pairing
from dataplane.debug.pairing import MOST_WAITING, OVERLAY, PATIENCE_NS, UNDERLAY, Pair, Pairing, Sighting, identity


def seen(ns: int, name: bytes, *, sent: bool = True, vni: int | None = 1) -> Sighting:
    return Sighting(ns, name, sent, vni, name)


def drained(made: Pairing, before: int) -> list[Pair]:
    found = []
    while (pair := made.ready(before)) is not None:
        found.append(pair)
    return found


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([OVERLAY, UNDERLAY]), st.integers(0, 20), st.booleans(), st.integers(0, 3))),
    st.integers(0, 30),
)
def test_every_sighting_comes_out_once_and_only_beside_its_like(
    sightings: list[tuple[int, int, bool, int]], halt: int
) -> None:
    made, out = Pairing(), list[Pair]()
    firsts = 0
    for number, (side, ns, sent, name) in enumerate(sightings):
        firsts += made.take(side, Sighting(ns, str(number).encode(), sent, None, b"abc"[name : name + 1]))
        if number == halt:
            out += drained(made, 25)
    out += drained(made, 10**12)
    assert len(made) == 0
    assert firsts == len(out)
    shown = [(side, each.data) for pair in out for side, each in enumerate(pair.sides) if each is not None]
    assert sorted(shown) == sorted((side, str(n).encode()) for n, (side, *_) in enumerate(sightings))
    for pair in out:
        one, two = pair.sides
        if one is not None and two is not None:
            assert (one.sent, one.identity) == (two.sent, two.identity)
            assert one.identity, "what carries no packet is beside nothing"
        assert pair.first in pair.sides


def test_the_other_side_is_waited_for_and_holds_up_what_is_later() -> None:
    made = Pairing()
    made.take(OVERLAY, seen(100, b"a"))
    made.take(OVERLAY, seen(200, b"b"))
    made.take(UNDERLAY, seen(210, b"b"))
    assert drained(made, 1000) == []
    made.take(UNDERLAY, seen(900, b"a"))
    assert [pair.first.identity for pair in drained(made, 1000)] == [b"a", b"b"]
    made.take(OVERLAY, seen(1000, b"c"))
    assert drained(made, 1000 + PATIENCE_NS) == []
    (alone,) = drained(made, 1001 + PATIENCE_NS)
    assert alone.sides[UNDERLAY] is None
    assert made.take(UNDERLAY, seen(2000, b"c")), "too late: the first of its kind again"


def test_alike_packets_pair_in_their_order_and_others_do_not_pair() -> None:
    made = Pairing()
    for ns in (1, 2):
        made.take(OVERLAY, Sighting(ns, b"%d" % ns, True, 1, b"x"))
    made.take(UNDERLAY, Sighting(3, b"3", False, 1, b"x"))
    made.take(UNDERLAY, Sighting(4, b"4", True, 2, b"x"))
    made.take(UNDERLAY, Sighting(5, b"5", True, 1, b"x"))
    found = [[each and each.data for each in pair.sides] for pair in drained(made, 10**12)]
    assert found == [[b"1", b"5"], [b"2", None], [None, b"3"], [None, b"4"]]


def test_what_waits_has_a_bound() -> None:
    made = Pairing()
    for number in range(MOST_WAITING + 10):
        made.take(OVERLAY, seen(10**9 + number, b"%d" % number))
    assert [pair.first.ns for pair in drained(made, 0)] == [10**9 + number for number in range(10)]


LAYERS = [
    IP(src="10.1.1.1", dst="10.2.2.2", flags="DF") / TCP(sport=1, dport=2, seq=7, ack=8) / b"payload, and more of it",
    IP(src="10.1.1.1", dst="10.2.2.2") / UDP(sport=1, dport=2) / b"payload, and more of it",
    IP(src="10.1.1.1", dst="10.2.2.2") / ICMP(id=4, seq=5) / b"payload",
    IP(src="10.1.1.1", dst="10.2.2.2") / SCTP(sport=1, dport=2, tag=9) / SCTPChunkData(tsn=4, data=b"abcd"),
    IPv6(src="fd00::1", dst="fd00::2") / TCP(sport=1, dport=2, seq=7, ack=8) / b"payload",
    IPv6(src="fd00::1", dst="fd00::2") / UDP(sport=1, dport=2) / b"payload",
]


def test_what_changes_on_the_way_makes_no_other_packet() -> None:
    """TTL, ECN, and checksums that are finished on one side only; of TCP with DF the identification."""
    for layers in LAYERS:
        packet = bytes(layers)
        changed = layers.copy()
        if packet[0] >> 4 == 4:
            changed.ttl, changed.tos = 3, 1
            changed.id = 77 if layers.haslayer(TCP) else layers.id
        else:
            changed.hlim, changed.tc = 3, 1
        changed.payload.chksum = 0x1234
        assert identity(bytes(changed)) == identity(packet), layers.summary()


def test_what_tells_packets_apart_does() -> None:
    def differing(layers: Layers) -> list[Layers]:
        found = []
        for name, value in {"sport": 9, "dport": 9, "seq": 9, "ack": 9, "id": 9, "tag": 5}.items():
            other = layers.copy()
            if name in [field.name for field in other.payload.fields_desc]:
                setattr(other.payload, name, value)
                found.append(other)
        longer = layers.copy() / b"x"
        return [*found, longer]

    for layers in LAYERS:
        names = {identity(bytes(each)) for each in (layers, *differing(layers))}
        assert len(names) == 1 + len(differing(layers)), layers.summary()


def test_any_bytes_have_an_identity() -> None:
    rng = random.Random(1)
    for _ in range(5000):
        data = rng.randbytes(rng.randrange(80))
        assert isinstance(pairing.identity(data), bytes)
