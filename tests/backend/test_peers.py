"""Which leases a backend obeys: by a naive model, and by what hostile leases would do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.backend.peers import Peer, Peers, check_type, decode_vtep, encode_vtep
from dataplane.errors import LeaseInvalid
from dataplane.lease.model import Lease, LeaseAttrs, LeaseEvent, LeaseEventKind, LeaseKey

OWN = bytes.fromhex("020000000001")


def mac_of(lease: Lease) -> bytes:
    check_type(lease, "vxlan")
    return decode_vtep(lease.attrs.backend_data, 1, OWN)


def lease(number: int, mac: str, *, revision: int = 1, ip: str = "", kind: str = "vxlan", data: bytes = b"") -> Lease:
    attrs = LeaseAttrs(
        public_ip=IPv4Address(ip or f"198.18.1.{number}"),
        backend_type=kind,
        backend_data=data or encode_vtep(1, bytes.fromhex(mac)),
    )
    return Lease(LeaseKey(IPv4Network(f"10.5.{number}.0/24")), attrs, revision, revision)


def added(*leases: Lease) -> list[LeaseEvent]:
    return [LeaseEvent(LeaseEventKind.ADDED, one) for one in leases]


def removed(one: Lease) -> list[LeaseEvent]:
    return [LeaseEvent(LeaseEventKind.REMOVED, one)]


def test_a_peer_comes_changes_and_goes() -> None:
    peers = Peers(4, mac_of)
    subnet = IPv4Network("10.5.7.0/24")
    peer = Peer(subnet, IPv4Address("198.18.1.7"), bytes.fromhex("02000000000a"))
    assert peers.follow(added(lease(7, "02000000000a"))) == {subnet: peer}
    assert peers.follow(added(lease(7, "02000000000a", revision=9))) == {}, "told twice, nothing changed"
    (moved,) = peers.follow(added(lease(7, "02000000000a", ip="198.18.9.9"))).values()
    assert moved is not None
    assert moved.address == IPv4Address("198.18.9.9")
    assert peers.obeyed == {subnet: moved}
    assert peers.follow(removed(lease(7, "02000000000a"))) == {subnet: None}
    assert peers.follow(removed(lease(7, "02000000000a"))) == {}


def test_where_macs_may_be_shared_all_who_have_one_are_obeyed() -> None:
    """A VTEP in userspace sends to a node's address, and no table of it leads from a MAC to one."""
    peers = Peers(4, mac_of, shared_macs=True)
    both = [lease(7, "02000000000a"), lease(8, "02000000000a", revision=9)]
    peers.follow(added(*both))
    assert {str(peer.address) for peer in peers.obeyed.values()} == {"198.18.1.7", "198.18.1.8"}
    assert peers.ignored == {}
    assert peers.follow(removed(both[0])) == {IPv4Network("10.5.7.0/24"): None}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "missing or no JSON"),
        (b"[1]", "missing or no JSON"),
        (b'{"VNI":1,"VtepMAC":"0', "missing or no JSON"),
        (b'{"VNI":2,"VtepMAC":"02:00:00:00:00:0a"}', "its VNI is 2, ours 1"),
        (b'{"VNI":"1","VtepMAC":"02:00:00:00:00:0a"}', "its VNI is 1, ours 1"),
        (b'{"VNI":1}', "no VtepMAC"),
        (b'{"VNI":1,"VtepMAC":7}', "no VtepMAC"),
        (b'{"VNI":1,"VtepMAC":"02:00:00:00:00"}', "no VtepMAC"),
        (b'{"VNI":1,"VtepMAC":"02:00:00-00:00:0a"}', "no VtepMAC"),
        (b'{"VNI":1,"VtepMAC":"02:00:00:00:00:00:00:0a"}', "no VtepMAC"),
        (b'{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}', "all zero"),
        (b'{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}', "group address"),
        (b'{"VNI":1,"VtepMAC":"01:00:5e:00:00:0a"}', "group address"),
        (b'{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}', "this node's own"),
    ],
)
def test_a_lease_that_cannot_be_obeyed_has_a_reason(data: bytes, reason: str) -> None:
    peers = Peers(4, mac_of)
    subnet = IPv4Network("10.5.7.0/24")
    if data:
        assert peers.follow(added(lease(7, "", data=data))) == {}
        assert reason in peers.ignored[subnet]
        assert subnet in peers.follow(added(lease(7, "02000000000a"))), "it comes in once it is right"
        assert peers.ignored == {}
    with pytest.raises(LeaseInvalid, match=reason):
        decode_vtep(data, 1, OWN)


def test_a_lease_that_says_nonsense_is_obeyed_as_it_last_said_something() -> None:
    peers = Peers(4, mac_of)
    subnet = IPv4Network("10.5.7.0/24")
    (peer,) = peers.follow(added(lease(7, "02000000000a"))).values()
    for _ in range(2):
        nonsense = lease(7, "000000000000", ip="198.18.9.9")
        assert peers.follow(added(nonsense)) == {}
        assert peers.obeyed == {subnet: peer}
        assert peers.ignored == {subnet: "its VtepMAC is all zero; what it said before stands"}
    assert peers.follow(added(lease(8, "02000000000a", revision=5))) == {}, "its MAC is not free for others"
    assert peers.follow(removed(lease(8, "02000000000a", revision=5))) == {}
    assert peers.follow(added(lease(7, "02000000000a"))) == {}
    assert peers.ignored == {}
    assert peers.follow(added(lease(7, "000000000000", revision=9))) == {subnet: None}, "another node's by then"


@pytest.mark.parametrize("other", [lease(7, "", kind="udp"), lease(7, "", data=encode_vtep(2, OWN))])
def test_a_node_that_goes_over_to_another_backend_or_vni_is_no_peer_any_more(other: Lease) -> None:
    peers = Peers(4, mac_of)
    subnet = IPv4Network("10.5.7.0/24")
    peers.follow(added(lease(7, "02000000000a")))
    assert peers.follow(added(other)) == {subnet: None}
    assert subnet in peers.ignored


@pytest.mark.parametrize("text", ["02:00:00:00:00:0A", "02-00-00-00-00-0a", "0200.0000.000a"])
def test_what_go_takes_for_a_mac_is_taken(text: str) -> None:
    assert decode_vtep(json.dumps({"vni": 1, "VTEPMac": text}).encode(), 1, OWN) == bytes.fromhex("02000000000a")
    assert decode_vtep(json.dumps({"VtepMAC": text}).encode(), 1, OWN), "flannel of old wrote no VNI"


def test_another_backend_is_named() -> None:
    peers = Peers(4, mac_of)
    assert peers.follow(added(lease(7, "02000000000a", kind="host-gw"), lease(8, "02000000000b", kind=""))) == {}
    assert peers.ignored[IPv4Network("10.5.7.0/24")] == "its node uses backend 'host-gw', this one vxlan"
    assert "'udp or alloc'" in peers.ignored[IPv4Network("10.5.8.0/24")]


def test_a_lease_of_ipv6_alone_is_never_a_default_route() -> None:
    attrs = LeaseAttrs(
        IPv4Address(0), IPv6Address("fd00:198:18::7"), "vxlan", b"", encode_vtep(1, bytes.fromhex("02000000000a"))
    )
    alone = Lease(LeaseKey(IPv4Network("0.0.0.0/0"), IPv6Network("fd00:5:7::/64")), attrs, 1, 1)
    v4 = Peers(4, mac_of)
    assert v4.follow(added(alone)) == {}
    assert v4.ignored == {}
    v6 = Peers(6, lambda lease: decode_vtep(lease.attrs.backend_v6_data, 1, OWN))
    (peer,) = v6.follow(added(alone)).values()
    assert peer == Peer(IPv6Network("fd00:5:7::/64"), IPv6Address("fd00:198:18::7"), bytes.fromhex("02000000000a"))


def test_a_subnet_without_an_outer_address_of_its_version_is_told() -> None:
    attrs = LeaseAttrs(IPv4Address("198.18.1.7"), None, "vxlan", b"", encode_vtep(1, bytes.fromhex("02000000000a")))
    half = Lease(LeaseKey(IPv4Network("10.5.7.0/24"), IPv6Network("fd00:5:7::/64")), attrs, 1, 1)
    v6 = Peers(6, lambda lease: decode_vtep(lease.attrs.backend_v6_data, 1, OWN))
    assert v6.follow(added(half)) == {}
    assert "no public IPv6 address" in v6.ignored[IPv6Network("fd00:5:7::/64")]


NUMBERS = st.integers(1, 4)
MACS = st.sampled_from(["02000000000a", "02000000000b"])
STEPS = st.lists(
    st.lists(
        st.tuples(NUMBERS, st.none() | st.tuples(MACS, st.integers(1, 5), st.sampled_from(["", "198.18.9.9"]))),
        min_size=1,
        max_size=3,
    ),
    max_size=12,
)


@given(STEPS)
def test_whatever_the_order_the_oldest_lease_has_a_mac(
    steps: Sequence[Sequence[tuple[int, tuple[str, int, str] | None]]],
) -> None:
    peers, leases = Peers(4, mac_of), dict[int, Lease]()
    told: dict[object, Peer] = {}
    for step in steps:
        events = []
        for number, change in step:
            if change is None:
                events += removed(leases.pop(number, lease(number, "02000000000a")))
            else:
                mac, revision, ip = change
                leases[number] = lease(number, mac, revision=revision, ip=ip)
                events += added(leases[number])
        for subnet, peer in peers.follow(events).items():
            assert told.get(subnet) != peer, "only what is news"
            if peer is None:
                del told[subnet]
            else:
                told[subnet] = peer
    wanted: dict[object, Peer] = {}
    for one in sorted(leases.values(), key=lambda one: (one.create_revision, str(one.key.subnet))):
        named = mac_of(one)
        if named not in {peer.mac for peer in wanted.values()}:
            wanted[one.key.subnet] = Peer(one.key.subnet, one.attrs.public_ip, named)
    assert told == wanted == peers.obeyed
    assert peers.ignored.keys() == {one.key.subnet for one in leases.values()} - wanted.keys()
