"""What people read of a lab: round trips from real ping output, and tables."""

from __future__ import annotations

import pytest

from dataplane.lab.measure import RoundTrips, drops_text, table

# printed by iputils-ping 20221126
WHOLE = """PING 127.0.0.1 (127.0.0.1) 56(84) bytes of data.
64 bytes from 127.0.0.1: icmp_seq=1 ttl=64 time=0.030 ms
64 bytes from 127.0.0.1: icmp_seq=2 ttl=64 time=0.040 ms
64 bytes from 127.0.0.1: icmp_seq=3 ttl=64 time=9.5 ms

--- 127.0.0.1 ping statistics ---
3 packets transmitted, 3 received, 0% packet loss, time 43ms
rtt min/avg/max/mdev = 0.030/3.190/9.500/0.004 ms
"""
DUPLICATED = """64 bytes from 127.0.0.1: icmp_seq=1 ttl=64 time=0.030 ms
64 bytes from 127.0.0.1: icmp_seq=1 ttl=64 time=7.0 ms (DUP!)

3 packets transmitted, 1 received, +1 duplicates, 66.6667% packet loss, time 43ms
"""


def test_a_whole_run_has_its_median_and_no_loss() -> None:
    result = RoundTrips.parse("a", "b", WHOLE)
    assert (result.sent, result.received, result.p50, result.loss, result.whole) == (3, 3, 0.04, 0.0, True)


def test_duplicates_are_no_answers() -> None:
    result = RoundTrips.parse("a", "b", DUPLICATED)
    assert (result.sent, result.received, result.p50, result.whole) == (3, 1, 0.03, False)
    assert result.loss == pytest.approx(2 / 3)


def test_what_was_not_measured_is_lost() -> None:
    result = RoundTrips.parse("a", "b", "ping: connect: Network is unreachable\n")
    assert (result.loss, result.p50, result.whole) == (1.0, None, False)


def test_tables_align_words_left_and_numbers_right() -> None:
    assert table(("node", "packets"), [("n1", 5), ("node12", 1234)]) == (
        "node    packets\n" "n1            5\n" "node12     1234"
    )  # fmt: skip


def test_drops_show_only_what_happened() -> None:
    assert drops_text({"NO_ROUTE": 3, "LENGTH": 0, "NOT_IP": 1}) == "NO_ROUTE 3, NOT_IP 1"
    assert drops_text({"NO_ROUTE": 0}) == "0"
