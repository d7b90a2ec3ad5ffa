"""dataplane/lease/table.py: examples of each rule, and a comparison with a naive recomputation."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.errors import LeaseInvalid
from dataplane.lease.model import Lease, LeaseAttrs, LeaseEvent, LeaseEventKind, LeaseKey
from dataplane.lease.store import Batch, Deleted, Entry, Snapshot
from dataplane.lease.table import LeaseTable, Update

NETWORK = IPv4Network("10.5.0.0/16")
OWN = "10.5.9.0-24"
A, B, C = "10.5.1.0-24", "10.5.2.0-24", "10.5.3.0-24"


def value(number: int, data: bytes = b"") -> bytes:
    return LeaseAttrs(IPv4Address(f"192.0.2.{number}"), backend_data=data).encode()


def entry(key: str, content: bytes, created: int, modified: int | None = None, *, reserved: bool = False) -> Entry:
    return Entry(key, content, created, created if modified is None else modified, reserved)


def snapshot(revision: int, *entries: Entry) -> Snapshot:
    return Snapshot(revision, entries)


def batch(*changes: Entry | Deleted) -> Batch:
    last = changes[-1]
    return Batch(last.revision if isinstance(last, Deleted) else last.mod_revision, changes)


def said(update: Update) -> list[tuple[str, str]]:
    return [(event.kind.value, str(event.lease.key)) for event in update.events]


def reasons(update: Update) -> dict[str, str]:
    return {rejection.key: rejection.reason for rejection in update.rejections}


def followed(table: LeaseTable, update: Update) -> Update:
    """What a follower makes of an update who forgets at once what is lost."""
    later = table.forget(update.lost)
    return replace(
        update, events=update.events + later.events, rejections=update.rejections + later.rejections, lost=()
    )


def apply(table: LeaseTable, batch: Batch) -> Update:
    return followed(table, table.apply(batch))


def reset(table: LeaseTable, snapshot: Snapshot, *, restarted: bool = False) -> Update:
    return followed(table, table.reset(snapshot, restarted=restarted))


@pytest.fixture
def table() -> LeaseTable:
    table = LeaseTable(NETWORK, own_ip=IPv4Address("192.0.2.9"))
    table.set_own(OWN)
    return table


def test_a_snapshot_is_compared_by_content(table: LeaseTable) -> None:
    update = reset(table, snapshot(9, entry(A, value(1), 1), entry(B, value(2), 2), entry(C, value(3), 3)))
    assert said(update) == [("added", A), ("added", B), ("added", C)]
    new = "10.5.4.0-24"
    entries = (entry(A, value(1), 1, 15), entry(B, value(2, b'{"VNI":1}'), 2, 16), entry(new, value(4), 12))
    update = reset(table, snapshot(19, *entries))
    assert said(update) == [("changed", B), ("added", new), ("removed", C)]
    changed = update.events[0]
    assert changed.previous is not None
    assert (changed.previous.attrs.backend_data, changed.lease.attrs.backend_data) == (b"", b'{"VNI":1}')
    assert table.peers[A].mod_revision == 15


def test_a_renewal_and_a_turn_to_a_reservation_are_no_events(table: LeaseTable) -> None:
    reset(table, snapshot(1, entry(A, value(1), 1)))
    assert apply(table, batch(entry(A, value(1), 1, 2), entry(A, value(1), 1, 3, reserved=True))) == Update()
    assert table.peers[A].reserved


def test_a_batch_tells_its_changes_in_the_stores_order(table: LeaseTable) -> None:
    reset(table, snapshot(1, entry(A, value(1), 1)))
    update = apply(table, batch(entry(B, value(2), 2), Deleted(A, 3), entry(A, value(7), 4), entry(B, value(8), 2, 5)))
    assert said(update) == [("added", B), ("changed", A), ("changed", B)]
    assert str(update.events[1].lease.attrs.public_ip) == "192.0.2.7"


def test_our_own_lease_is_a_fact_and_never_a_peer(table: LeaseTable) -> None:
    ours = entry(OWN, value(9), 1)
    assert reset(table, snapshot(1, ours)) == Update(own=ours)
    theirs = entry(OWN, value(1), 1, 2)
    assert apply(table, batch(theirs)) == Update(own=theirs)
    assert apply(table, batch(entry(OWN, b"junk", 1, 3), Deleted(OWN, 4))).own == Deleted(OWN, 4)
    assert reset(table, snapshot(8, entry(A, value(1), 8))).own == Deleted(OWN, 8)
    assert set(table.peers) == {A}
    assert table.rejected == {}
    assert apply(table, batch(entry(B, value(2), 9))).own is None


def test_what_becomes_our_own_leaves_the_peers_and_comes_back() -> None:
    table = LeaseTable(NETWORK)
    half = "10.5.1.128-25"
    reset(table, snapshot(2, entry(A, value(1), 1), entry(B, value(2), 2)))
    assert said(table.set_own(A)) == [("removed", A)]
    update = apply(table, batch(entry(half, value(3), 3)))
    assert reasons(update) == {half: f"subnet overlaps {A}, which is our own lease"}
    assert said(table.set_own(B)) == [("removed", B), ("added", A)]
    assert said(table.set_own(None)) == [("added", B)]
    assert set(table.rejected) == {half}


BAD = {
    "10.5.300.0-24": value(1),
    "subnets-old/10.5.8.0-24": value(1),
    "10.6.1.0-24": value(1),
    "0.0.0.0-0": value(1),
    "10.5.11.0-24": b"",
    "10.5.12.0-24": b"null",
    "10.5.13.0-24": b"\xff" * 100,
    "10.5.14.0-24": value(1) + b" " * 5000,
    "10.5.15.0-24": b'{"PublicIP":"0.0.0.0","PublicIPv6":null}',
    "10.5.16.0-24": b'{"PublicIP":"127.0.0.1","PublicIPv6":null}',
    "10.5.17.0-24": b'{"PublicIP":"224.0.0.1","PublicIPv6":null}',
    "10.5.18.0-24": b'{"PublicIP":"255.255.255.255","PublicIPv6":null}',
    "10.5.19.0-24": b'{"PublicIP":"10.5.77.1","PublicIPv6":null}',
    "10.5.20.0-24": b'{"PublicIP":"192.0.2.9","PublicIPv6":null}',
    "10.5.21.0-24": b'{"PublicIP":"192.0.2.1","PublicIPv6":"::1"}',
    "10.5.9.64-26": value(1),
    "10.5.9.7-24": value(1),
    "10.5.0.0-16": value(1),
}


def test_a_hostile_entry_touches_nobody_else(table: LeaseTable) -> None:
    peers = [entry(A, value(1), 1), entry(B, value(2), 2)]
    hostile = [entry(key, content, 10 + number) for number, (key, content) in enumerate(BAD.items())]
    update = reset(table, snapshot(99, *hostile, *peers))
    assert said(update) == [("added", A), ("added", B)]
    assert set(reasons(update)) == set(BAD) == set(table.rejected)
    assert table.rejections == len(BAD)
    assert reset(table, snapshot(99, *hostile, *peers)).rejections == ()
    update = apply(table, batch(Deleted("10.5.11.0-24", 100), entry("10.5.12.0-24", value(3), 21, 101)))
    assert said(update) == [("added", "10.5.12.0-24")]
    assert set(table.rejected) == set(BAD) - {"10.5.11.0-24", "10.5.12.0-24"}


def test_a_rejection_is_told_once_for_each_write_and_says_if_it_is_old_news(table: LeaseTable) -> None:
    reset(table, snapshot(1))
    first, second, third = entry(A, b"x", 2), entry(A, b"x", 2, 3), entry(A, b"{}", 2, 4)
    told = [apply(table, batch(change)).rejections for change in (first, first, second, third)]
    assert [[rejection.again for rejection in rejections] for rejections in told] == [[False], [], [True], [False]]
    assert [rejection.mod_revision for rejections in told for rejection in rejections] == [2, 3, 4]


def test_the_last_good_value_of_a_lease_outlives_a_bad_one(table: LeaseTable) -> None:
    reset(table, snapshot(1, entry(A, value(1), 1)))
    update = apply(table, batch(entry(A, b"junk", 1, 2)))
    assert said(update) == []
    assert set(reasons(update)) == {A}
    assert str(table.peers[A].attrs.public_ip) == "192.0.2.1"
    assert said(reset(table, snapshot(3, entry(A, b"junk", 1, 2)))) == []
    assert said(apply(table, batch(entry(A, value(4), 1, 4)))) == [("changed", A)]
    assert table.rejected == {}
    assert said(apply(table, batch(Deleted(A, 5), entry(A, b"junk", 6)))) == [("removed", A)]


def test_of_two_that_overlap_the_older_is_obeyed_and_the_younger_comes_in_after_it(table: LeaseTable) -> None:
    wide, half = "10.5.0.0-21", "10.5.1.128-25"
    reset(table, snapshot(3, entry(wide, value(3), 3), entry(half, value(2), 2)))
    assert set(table.peers) == {half}
    assert table.rejected == {wide: f"subnet overlaps {half}, which is the older lease"}
    update = apply(table, batch(entry(B, value(4), 4)))
    assert said(update) == [("added", B)]
    update = apply(table, batch(Deleted(half, 5)))
    assert said(update) == [("removed", half), ("removed", B), ("added", wide)]
    assert table.rejected == {B: f"subnet overlaps {wide}, which is the older lease"}
    assert said(apply(table, batch(Deleted(wide, 6)))) == [("removed", wide), ("added", B)]


def test_two_keys_of_one_subnet_and_one_transaction_have_a_winner(table: LeaseTable) -> None:
    reset(table, snapshot(1, entry("10.5.1.7-24", value(2), 1), entry(A, value(1), 1)))
    assert set(table.peers) == {A}


def test_the_ipv6_parts_overlap_too() -> None:
    table = LeaseTable(NETWORK, IPv6Network("fd00::/48"))
    one, same, outside = "10.5.1.0-24&fd00::-64", "10.5.2.0-24&fd00::-72", "10.5.3.0-24&fd01::-64"
    reset(table, snapshot(3, entry(one, value(1), 1), entry(same, value(2), 2), entry(outside, value(3), 3)))
    assert set(table.peers) == {one}
    assert set(table.rejected) == {same, outside}


NETWORK_V6 = IPv6Network("fd00::/48")
V6_ONLY, DUAL = "0.0.0.0-0&fd00:0:0:7::-64", "10.5.7.0-24&fd00:0:0:8::-64"


def value_v6(number: int, public_ip: str = "0.0.0.0") -> bytes:
    return LeaseAttrs(IPv4Address(public_ip), IPv6Address(f"fd00:198:18::{number:x}")).encode()


def test_a_network_of_ipv4_ignores_leases_of_ipv6_alone_and_sees_the_ipv4_half_of_the_others() -> None:
    table = LeaseTable(NETWORK)
    update = reset(table, snapshot(2, entry(V6_ONLY, value_v6(7), 1), entry(DUAL, value_v6(8, "192.0.2.8"), 2)))
    assert reasons(update) == {V6_ONLY: "it leases fd00:0:0:7::/64 alone, and this network has no IPv6"}
    (peer,) = table.peers.values()
    assert str(peer.key) == "10.5.7.0-24"
    assert peer.attrs.public_ipv6 == IPv6Address("fd00:198:18::8")


def test_a_network_of_ipv6_alone_never_sees_an_ipv4_subnet() -> None:
    table = LeaseTable(None, NETWORK_V6)
    entries = (entry(A, value(1), 1), entry(V6_ONLY, value_v6(7), 2), entry(DUAL, value_v6(8, "192.0.2.8"), 3))
    update = reset(table, snapshot(3, *entries, entry("0.0.0.0-0", value(2), 3)))
    assert {str(key) for peer in table.peers.values() for key in peer.key.subnets} == {
        "fd00:0:0:7::/64", "fd00:0:0:8::/64",
    }  # fmt: skip
    assert reasons(update)[A] == "it leases 10.5.1.0/24 alone, and this network has no IPv4"
    assert "default route" in reasons(update)["0.0.0.0-0"]


def test_a_network_of_both_families_has_peers_of_either() -> None:
    table = LeaseTable(NETWORK, NETWORK_V6)
    entries = (entry(A, value(1), 1), entry(V6_ONLY, value_v6(7), 2), entry(DUAL, value_v6(8, "192.0.2.8"), 3))
    assert set(reset(table, snapshot(3, *entries)).events) == {
        LeaseEvent(LeaseEventKind.ADDED, peer) for peer in table.peers.values()
    }
    assert {text: str(peer.key) for text, peer in table.peers.items()} == {A: A, V6_ONLY: V6_ONLY, DUAL: DUAL}
    changed = apply(table, batch(entry(V6_ONLY, value_v6(9), 2, 4)))
    assert [str(event.lease.attrs.node) for event in changed.events] == ["fd00:198:18::9"]


def test_overlap_counts_only_in_a_family_that_the_network_has() -> None:
    other = "10.5.8.0-24&fd00:0:0:8::-64"
    entries = snapshot(2, entry(DUAL, value(1), 1), entry(other, value(2), 2))
    for table, peers in ((LeaseTable(NETWORK), {DUAL, other}), (LeaseTable(NETWORK, NETWORK_V6), {DUAL})):
        reset(table, entries)
        assert table.peers.keys() == peers


def test_what_overlaps_our_own_lease_in_either_family_is_rejected() -> None:
    table = LeaseTable(NETWORK, NETWORK_V6)
    table.set_own("10.5.9.0-24&fd00:0:0:9::-64")
    same_v6, same_v4 = "10.5.8.0-24&fd00:0:0:9::-80", "10.5.9.0-25&fd00:0:0:8::-64"
    reset(table, snapshot(3, *(entry(key, value_v6(1, "192.0.2.1"), 1) for key in (same_v6, same_v4, V6_ONLY))))
    assert table.peers.keys() == {V6_ONLY}
    assert set(table.rejected) == {same_v6, same_v4}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (value_v6(9), "public IP fd00:198:18::9 is that of this node"),
        (value_v6(9, "192.0.2.1"), "public IP fd00:198:18::9 is that of this node"),
        (b'{"PublicIP":"0.0.0.0","PublicIPv6":null}', "public IP 0.0.0.0 is not the address of a node"),
        (b'{"PublicIP":"127.0.0.1","PublicIPv6":"fd00:198:18::1"}', "public IP 127.0.0.1 is not the address of a node"),
        *(
            (b'{"PublicIP":"0.0.0.0","PublicIPv6":"%s"}' % ip, f"public IP {ip.decode()} is not the address of a node")
            for ip in (b"::", b"::1", b"ff02::1", b"fe80::1")
        ),
        (b'{"PublicIP":"0.0.0.0","PublicIPv6":"::ffff:192.0.2.1"}', "is not the address of a node"),
        (b'{"PublicIP":"0.0.0.0","PublicIPv6":"fd00::1"}', "public IP fd00::1 lies inside the overlay's own network"),
    ],
)
def test_a_hostile_lease_of_ipv6_is_rejected(content: bytes, reason: str) -> None:
    table = LeaseTable(NETWORK, NETWORK_V6, own_ip=IPv4Address(0), own_ipv6=IPv6Address("fd00:198:18::9"))
    reset(table, snapshot(1, entry(V6_ONLY, content, 1)))
    assert reason in table.rejected[V6_ONLY]
    assert table.peers == {}


def test_an_ipv4_subnet_needs_an_ipv4_address() -> None:
    table = LeaseTable(NETWORK, NETWORK_V6)
    reset(table, snapshot(1, entry(DUAL, value_v6(1), 1)))
    assert table.rejected == {DUAL: "public IP 0.0.0.0 is not the address of a node"}


def test_what_was_seen_already_is_ignored(table: LeaseTable) -> None:
    reset(table, snapshot(5, entry(A, value(1), 1)))
    assert apply(table, batch(entry(B, value(2), 4))) == Update()
    assert reset(table, snapshot(4)) == Update()
    changes = batch(Deleted(A, 6), entry(B, value(2), 7))
    apply(table, changes)
    assert apply(table, changes) == Update()
    assert table.revision == 7
    assert said(apply(table, Batch(8, (Deleted(A, 6), entry(B, value(2), 7), entry(C, value(3), 8))))) == [("added", C)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_batch_in_parts_says_the_same_and_is_known_at_its_end_only(table: LeaseTable, size: int) -> None:
    reset(table, snapshot(6, entry(A, value(1), 5), entry(B, value(2), 6)))
    changes = entry(A, value(7), 5, 8), Deleted(B, 8), entry(B, value(3), 8), entry(C, value(4), 8)
    events = []
    for at in range(0, len(changes), size):
        assert table.revision == 6
        events += said(table.apply(Batch(8 if at + size >= len(changes) else 6, changes[at : at + size])))
    assert events == [("changed", A), ("changed", B), ("added", C)]
    assert table.revision == 8
    assert said(apply(table, Batch(8, changes))) == []


def test_a_batch_that_breaks_off_is_followed_again(table: LeaseTable) -> None:
    whole = Batch(8, (entry(A, value(1), 8), Deleted(B, 8), entry(C, value(3), 8)))
    table.apply(Batch(0, whole.changes[:2]))
    assert table.revision == 0
    assert said(apply(table, whole)) == [("added", C)]
    assert (set(table.peers), table.revision) == ({A, C}, 8)


def test_a_store_that_began_anew_is_followed_when_told_so(table: LeaseTable) -> None:
    reset(table, snapshot(50, entry(A, value(1), 1), entry(B, value(2), 2)))
    update = reset(table, snapshot(3, entry(B, value(7), 2)), restarted=True)
    assert said(update) == [("changed", B), ("removed", A)]
    assert table.revision == 3


def test_a_peer_that_the_store_has_lost_stays_until_it_is_forgotten(table: LeaseTable) -> None:
    reset(table, snapshot(9, *(entry(key, value(number), number) for number, key in enumerate((A, B, C), 1))))
    update = table.apply(batch(Deleted(A, 10)))
    assert (said(update), update.lost, set(table.missing)) == ([], (A,), {A})
    assert table.apply(batch(Deleted(A, 11))).lost == ()
    assert table.reset(snapshot(12, entry(B, value(2), 2))).lost == (C,)
    assert set(table.peers) == {A, B, C}
    assert said(table.apply(batch(entry(A, value(1), 13)))) == [], "it is back as it was"
    assert said(table.apply(batch(entry(C, value(7), 14)))) == [("changed", C)]
    assert set(table.missing) == set()
    assert said(table.forget([A, B, C])) == []
    table.apply(batch(Deleted(A, 15), entry(C, b"junk", 14, 16), Deleted(C, 17)))
    assert said(table.forget([C, A])) == [("removed", A), ("removed", C)]
    assert said(table.apply(batch(entry(A, value(1), 18)))) == [("added", A)]


def test_a_lost_peer_gives_way_to_any_other_lease_and_to_our_own(table: LeaseTable) -> None:
    half = "10.5.2.0-25"
    reset(table, snapshot(9, entry(A, value(1), 1), entry(B, value(2), 2), entry(half, value(8), 8)))
    table.apply(batch(Deleted(A, 10)))
    update = table.apply(batch(Deleted(B, 11)))
    assert said(update) == [("removed", B), ("added", half)]
    assert said(table.set_own(A)) == [("removed", A)]
    assert set(table.peers) == {half}


def test_our_own_lease_and_what_was_no_peer_is_never_lost(table: LeaseTable) -> None:
    reset(table, snapshot(3, entry(OWN, value(9), 1), entry(A, b"junk", 2), entry("notes", b"", 3)))
    update = table.apply(batch(Deleted(OWN, 4), Deleted(A, 5), Deleted("notes", 6)))
    assert (update.lost, set(table.missing), table.rejected) == ((), set(), {})
    assert update.own == Deleted(OWN, 4)


def test_ten_thousand_leases_take_no_quadratic_time(table: LeaseTable) -> None:
    table = LeaseTable(IPv4Network("10.0.0.0/8"))
    entries = [
        entry(f"10.{number >> 8}.{number & 255}.0-24", value(number % 250 + 1), number + 1) for number in range(10_000)
    ]
    before = time.process_time()
    assert len(reset(table, Snapshot(20_000, tuple(entries))).events) == 10_000
    for number in range(1000):
        apply(table, batch(Deleted(entries[number].key, 20_001 + number)))
    # an order of magnitude above what it takes; comparing all pairs takes minutes
    assert time.process_time() - before < 10
    assert len(table.peers) == 9000


# ---- comparison with a naive recomputation

KEYS = [A, B, "10.5.1.0-25", "10.5.1.128-25", "10.5.0.0-22", "10.5.2.7-24", OWN, "10.5.9.0-25", "10.6.0.0-24", "junk"]
VALUES = [value(1), value(2), value(2, b'{"VNI":1}'), b"junk", b"", b'{"PublicIP":"127.0.0.1"}']


@dataclass
class Naive:
    """The store, and what a follower who saw these states of it must obey, written without any cleverness."""

    entries: dict[str, Entry] = field(default_factory=dict)
    good: dict[str, Entry] = field(default_factory=dict)
    revision: int = 0

    def put(self, key: str, content: bytes) -> Entry:
        self.revision += 1
        before = self.entries.get(key)
        created = self.revision if before is None else before.create_revision
        self.entries[key] = Entry(key, content, created, self.revision)
        return self.entries[key]

    def delete(self, key: str) -> Deleted | None:
        if self.entries.pop(key, None) is None:
            return None
        self.revision += 1
        return Deleted(key, self.revision)

    def seen(self, key: str) -> None:
        """The follower looks at this key now."""
        now, before = self.entries.get(key), self.good.get(key)
        if now is None or (before is not None and before.create_revision != now.create_revision):
            self.good.pop(key, None)
        if now is not None and self.lease(now) is not None:
            self.good[key] = now

    @staticmethod
    def lease(entry: Entry) -> Lease | None:
        try:
            key, attrs = LeaseKey.parse(entry.key), LeaseAttrs.decode(entry.value)
        except LeaseInvalid:
            return None
        if not key.subnet.subnet_of(NETWORK) or attrs.public_ip.is_loopback:
            return None
        return Lease(key, attrs, entry.create_revision, entry.mod_revision)

    def obeyed(self, own: str | None) -> dict[str, LeaseAttrs]:
        winners: dict[str, Lease] = {}
        for entry in sorted(self.good.values(), key=lambda entry: (entry.create_revision, entry.key)):
            lease = self.lease(entry)
            assert lease is not None
            if entry.key == own or (own is not None and lease.key.overlaps(LeaseKey.parse(own))):
                continue
            if not any(lease.key.overlaps(winner.key) for winner in winners.values()):
                winners[entry.key] = lease
        return {key: lease.attrs for key, lease in winners.items()}


def total(sum_so_far: dict[LeaseKey, LeaseAttrs], events: Iterable[LeaseEvent]) -> None:
    """Add events up; each must fit what came before."""
    for event in events:
        key, attrs = event.lease.key, event.lease.attrs
        if event.kind is LeaseEventKind.ADDED:
            assert key not in sum_so_far
            sum_so_far[key] = attrs
        elif event.kind is LeaseEventKind.CHANGED:
            assert event.previous is not None
            assert sum_so_far[key] == event.previous.attrs != attrs
            sum_so_far[key] = attrs
        else:
            assert sum_so_far.pop(key) == attrs


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(KEYS), st.sampled_from(VALUES)),
        st.tuples(st.just("delete"), st.sampled_from(KEYS)),
        st.tuples(st.just("snapshot")),
        st.tuples(st.just("unseen put"), st.sampled_from(KEYS), st.sampled_from(VALUES)),
        st.tuples(st.just("unseen delete"), st.sampled_from(KEYS)),
        st.tuples(st.just("repeat")),
        st.tuples(st.just("old snapshot")),
        st.tuples(st.just("own"), st.sampled_from([OWN, A, None])),
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_the_sum_of_all_events_is_a_naive_recomputation(steps: list[tuple[str, ...]]) -> None:
    table, store, own = LeaseTable(NETWORK), Naive(), None
    events: dict[LeaseKey, LeaseAttrs] = {}
    past: list[Batch] = []
    old = Snapshot(0, ())
    followed = True
    for step in steps:
        match step:
            case ("put" | "unseen put" | "delete" | "unseen delete", key, *content):
                before = store.revision
                change = store.put(key, content[0]) if content else store.delete(key)  # type: ignore[arg-type]  # bytes by the strategy
                if change is None:
                    continue
                followed = followed and not step[0].startswith("unseen")
                if followed:
                    past.append(Batch(before + 1, (change,)))
                    update = apply(table, past[-1])
                    assert update.own == (change if key == own else None)
                    total(events, update.events)
                    store.seen(key)
            case ("snapshot",):
                old, followed = Snapshot(store.revision, tuple(store.entries.values())), True
                total(events, reset(table, old).events)
                for key in {*store.entries, *store.good}:
                    store.seen(key)
            case ("repeat",):
                for seen in past:
                    assert apply(table, seen) == Update()
            case ("old snapshot",):
                if old.revision < table.revision:
                    assert reset(table, old) == Update()
            case ("own", key):
                own = key
                total(events, table.set_own(own).events)
        wanted = store.obeyed(own)
        assert {key: lease.attrs for key, lease in table.peers.items()} == wanted
        assert events == {LeaseKey.parse(key): attrs for key, attrs in wanted.items()}
        if followed:
            sound = {key for key in wanted if store.good[key] == store.entries[key]}
            assert set(table.rejected) == store.entries.keys() - sound - {own}
