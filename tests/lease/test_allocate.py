"""dataplane/lease/allocate.py: the order of choice, and the draw against a walk over every subnet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.errors import LeaseError
from dataplane.lease.allocate import Claim, Discard, Proof, Reuse, SubnetRange, Take, Wish, plan
from dataplane.lease.model import LeaseAttrs, LeaseKey
from dataplane.lease.store import Entry

NETWORK = IPv4Network("10.5.0.0/16")
RANGE = SubnetRange(NETWORK, 24, IPv4Address("10.5.1.0"), IPv4Address("10.5.255.0"))
RANGE_V6 = SubnetRange(IPv6Network("fd00::/48"), 64, IPv6Address("fd00:0:0:1::"), IPv6Address("fd00:0:0:ffff::"))
ME, FORMER, OTHER = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2"), IPv4Address("192.0.2.3")
A, B, C = (LeaseKey(IPv4Network(f"10.5.{number}.0/24")) for number in (1, 2, 3))


def entry(key: LeaseKey | str, ip: IPv4Address | None, created: int = 1) -> Entry:
    content = b"junk" if ip is None else LeaseAttrs(ip).encode()
    return Entry(str(key), content, created, created + 5)


def planned(entries: Sequence[Entry], wish: Wish) -> Reuse | Discard | Take:
    return plan(entries, wish, Random(1))


def test_our_public_ip_comes_first() -> None:
    ours, claimed = entry(A, ME, 9), entry(B, FORMER, 3)
    wish = Wish(RANGE, ME, claim=Claim(str(B), 3, FORMER), previous=C)
    assert planned([entry("10.5.7.0-24", OTHER), claimed, ours], wish) == Reuse(ours, A, Proof.PUBLIC_IP)


def test_a_claim_proves_an_entry_of_our_former_address() -> None:
    claimed = entry(B, FORMER, 3)
    wish = Wish(RANGE, ME, claim=Claim(str(B), 3, FORMER), previous=C)
    assert planned([claimed], wish) == Reuse(claimed, B, Proof.CLAIM)


@pytest.mark.parametrize("claim", [Claim(str(B), 4, FORMER), Claim(str(A), 3, FORMER), Claim(str(B), 3, OTHER), None])
def test_a_claim_that_differs_in_anything_proves_nothing(claim: Claim | None) -> None:
    assert planned([entry(B, FORMER, 3)], Wish(RANGE, ME, claim=claim, previous=C)) == Take(C, previous=True)


def test_of_several_entries_of_ours_claim_then_previous_then_age_decide() -> None:
    entries = [entry(C, ME, 7), entry(B, ME, 6), entry(A, ME, 5)]
    assert planned(entries, Wish(RANGE, ME)) == Reuse(entries[2], A, Proof.PUBLIC_IP)
    assert planned(entries, Wish(RANGE, ME, previous=B)) == Reuse(entries[1], B, Proof.PUBLIC_IP)
    wish = Wish(RANGE, ME, previous=B, claim=Claim(str(C), 7, ME))
    assert planned(entries, wish) == Reuse(entries[0], C, Proof.PUBLIC_IP)


@pytest.mark.parametrize("key", ["10.5.1.0-25", "10.5.0.0-24", "10.6.1.0-24", "10.5.1.0-24&fd00:0:0:1::-64"])
def test_an_entry_of_ours_that_does_not_fit_is_discarded(key: str) -> None:
    ours = entry(key, ME)
    assert planned([ours], Wish(RANGE, ME)) == Discard(ours)


def test_with_ipv6_on_both_parts_must_fit_and_both_are_drawn() -> None:
    wish = Wish(RANGE, ME, subnets_v6=RANGE_V6)
    old, fits = entry(A, ME), entry("10.5.1.0-24&fd00:0:0:1::-64", ME)
    assert planned([old], wish) == Discard(old)
    assert planned([fits], wish) == Reuse(fits, LeaseKey.parse(fits.key), Proof.PUBLIC_IP)
    taken = planned([entry("10.5.1.0-24&fd00:0:0:1::-64", OTHER)], wish)
    assert isinstance(taken, Take)
    assert wish.fits(taken.key)
    assert not taken.key.overlaps(LeaseKey.parse("10.5.1.0-24&fd00:0:0:1::-64"))


V6_ONLY = LeaseKey.parse("0.0.0.0-0&fd00:0:0:1::-64")
NOWHERE, ME_V6, OTHER_V6 = IPv4Address(0), IPv6Address("fd00:198:18::1"), IPv6Address("fd00:198:18::3")


def entry_v6(key: LeaseKey, ip: IPv6Address, created: int = 1) -> Entry:
    return Entry(str(key), LeaseAttrs(NOWHERE, ip).encode(), created, created + 5)


def test_without_ipv4_our_entry_is_found_by_our_ipv6_address() -> None:
    wish = Wish(None, NOWHERE, ME_V6, RANGE_V6)
    ours = entry_v6(V6_ONLY, ME_V6)
    assert planned([entry(A, OTHER), ours], wish) == Reuse(ours, V6_ONLY, Proof.PUBLIC_IP)
    step = planned([entry_v6(V6_ONLY, OTHER_V6), entry("10.5.2.0-24&fd00:0:0:2::-64", OTHER)], wish)
    assert isinstance(step, Take)
    assert wish.fits(step.key)
    assert step.key.subnets == (step.key.subnet_v6,)
    assert str(step.key.subnet_v6) not in ("fd00:0:0:1::/64", "fd00:0:0:2::/64")


def test_a_claim_proves_an_entry_of_our_former_ipv6_address() -> None:
    claimed = entry_v6(V6_ONLY, OTHER_V6, 3)
    wish = Wish(None, NOWHERE, ME_V6, RANGE_V6, claim=Claim(str(V6_ONLY), 3, NOWHERE, OTHER_V6))
    assert planned([claimed], wish) == Reuse(claimed, V6_ONLY, Proof.CLAIM)
    assert isinstance(planned([claimed], replace(wish, claim=Claim(str(V6_ONLY), 3, NOWHERE))), Take)


def test_a_key_of_ipv6_alone_takes_no_ipv4_subnet() -> None:
    step = planned([entry("0.0.0.0-0", OTHER), entry_v6(V6_ONLY, OTHER_V6)], Wish(RANGE, ME, previous=A))
    assert step == Take(A, previous=True)


def test_a_node_that_gets_a_second_family_keeps_the_subnet_that_it_has() -> None:
    wish = Wish(RANGE, ME, subnets_v6=RANGE_V6, previous=C)
    step = planned([], wish)
    assert isinstance(step, Take)
    assert step.key.subnet == C.subnet
    assert wish.fits(step.key)
    assert not step.previous
    alone = planned([], Wish(None, NOWHERE, ME_V6, RANGE_V6, previous=step.key))
    assert alone == Take(step.key.within(ipv4=False, ipv6=True), previous=False)


def test_each_family_has_its_own_end_of_subnets() -> None:
    few = SubnetRange(IPv6Network("fd00::/62"), 64, IPv6Address("fd00:0:0:1::"), IPv6Address("fd00:0:0:1::"))
    with pytest.raises(LeaseError, match=r"^out of subnets: every /64 from fd00:0:0:1:: .* 1 leases"):
        planned([entry(A, OTHER), entry_v6(V6_ONLY, OTHER_V6)], Wish(RANGE, ME, subnets_v6=few))


def test_a_key_outside_the_leases_is_never_ours_to_delete() -> None:
    assert isinstance(planned([entry("notes", ME), entry("x/10.5.1.0-24", ME)], Wish(RANGE, ME)), Take)


@pytest.mark.parametrize("taken", ["10.5.3.0-24", "10.5.3.128-25", "10.5.0.0-20"])
@pytest.mark.parametrize("ip", [OTHER, None])
def test_the_previous_subnet_is_left_alone_if_anything_overlaps_it(taken: str, ip: IPv4Address | None) -> None:
    step = planned([entry(taken, ip)], Wish(RANGE, ME, previous=C))
    assert isinstance(step, Take)
    assert not step.previous
    assert not step.key.overlaps(LeaseKey.parse(taken))


def test_a_previous_subnet_of_another_network_is_ignored() -> None:
    step = planned([], Wish(RANGE, ME, previous=LeaseKey(IPv4Network("10.9.1.0/24"))))
    assert isinstance(step, Take)
    assert step.key.subnet.subnet_of(NETWORK)


def test_out_of_subnets_says_how_many_are_taken() -> None:
    subnets = SubnetRange(IPv4Network("10.5.0.0/22"), 24, IPv4Address("10.5.1.0"), IPv4Address("10.5.3.0"))
    entries = [entry(key, OTHER if key is A else None) for key in (A, B, C)]
    with pytest.raises(LeaseError, match=r"^out of subnets: .* 3 leases"):
        planned(entries, Wish(subnets, ME, previous=A))


def test_the_draw_is_among_the_first_hundred_free() -> None:
    drawn = {plan([entry(A, OTHER)], Wish(RANGE, ME), Random(seed)) for seed in range(2000)}
    assert drawn == {Take(LeaseKey(IPv4Network(f"10.5.{number}.0/24")), previous=False) for number in range(2, 102)}


blocks = st.builds(
    lambda address, length: IPv4Network((0x0A050000 + address, length), strict=False),
    st.integers(0, 0xFFFF),
    st.integers(12, 31),
)


@given(st.lists(blocks, max_size=40), st.integers(18, 28), st.integers(0, 2**32), st.data())
def test_the_draw_equals_a_walk_over_every_subnet(
    taken: list[IPv4Network], length: int, seed: int, data: st.DataObject
) -> None:
    every = list(NETWORK.subnets(new_prefix=length))
    first = data.draw(st.integers(0, len(every) - 1))
    last = data.draw(st.integers(first, len(every) - 1))
    subnets = SubnetRange(NETWORK, length, every[first][0], every[last][0])
    spans = [(int(block[0]), int(block[-1])) for block in taken]
    free = [
        subnet
        for subnet in every[first : last + 1]
        if not any(int(subnet[0]) <= high and low <= int(subnet[-1]) for low, high in spans)
    ]
    entries = [entry(LeaseKey(block), None) for block in taken]
    if not free:
        with pytest.raises(LeaseError, match="out of subnets"):
            plan(entries, Wish(subnets, ME), Random(seed))
        return
    step = plan(entries, Wish(subnets, ME), Random(seed))
    assert step == Take(LeaseKey(Random(seed).choice(free[:100])), previous=False)


def test_sixty_thousand_taken_subnets_of_a_wide_network_take_no_quadratic_time() -> None:
    subnets = SubnetRange(IPv4Network("10.0.0.0/8"), 24, IPv4Address("10.0.1.0"), IPv4Address("10.255.255.0"))
    entries = [entry(f"10.{number >> 8}.{number & 255}.0-24", OTHER) for number in range(60_000)]
    before = time.process_time()
    step = planned(entries, Wish(subnets, ME))
    # an order of magnitude above what it takes; comparing all pairs takes many minutes
    assert time.process_time() - before < 20
    assert isinstance(step, Take)
    assert step.key.subnet > IPv4Network("10.234.95.0/24")
