"""Which node a word means, and what is said where it means none."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address, ip_network

import pytest

from dataplane.debug import expression
from dataplane.debug.peers import MOST_LISTED, Peer, Peers
from dataplane.errors import ConfigError

HOSTS = """
127.0.0.1 localhost
198.18.1.1   here
198.18.1.2 node-b b.example.org  # the second
fd00:198:18::2 node-b
198.18.1.3\tNode-C
198.18.7.7 stranger
nonsense here
198.18.1.4
"""


def peer(*words: str) -> Peer:
    """Networks are its subnets, addresses its own."""
    subnets = tuple(ip_network(word) for word in words if "/" in word)
    return Peer(subnets, tuple(ip_address(word) for word in words if "/" not in word))


KNOWN = Peers(
    [
        peer("10.244.2.0/24", "fd00:244:2::/64", "198.18.1.2", "fd00:198:18::2"),
        peer("10.244.3.0/24", "198.18.1.3"),
        peer("10.244.4.0/24", "198.18.1.4"),
    ],
    HOSTS,
    own=[IPv4Address("198.18.1.1")],
)


def test_the_first_name_of_each_node_and_of_no_stranger() -> None:
    names = {str(address): name for address, name in KNOWN.names.items()}
    both = {"198.18.1.2": "node-b", "fd00:198:18::2": "node-b"}
    assert names == both | {"198.18.1.1": "here", "198.18.1.3": "Node-C"}


@pytest.mark.parametrize(
    "word",
    [
        *("node-b", "NODE-B", "b.example.org", "198.18.1.2", "fd00:198:18::2", "10.244.2.0/24", "fd00:244:2::/64"),
        *("10.244.2.7", "fd00:244:2::9", "10.244.2.128/25"),
    ],
)
def test_a_node_by_any_of_its_words_is_all_of_its_addresses(word: str) -> None:
    assert list(map(str, KNOWN.find(word))) == ["198.18.1.2", "fd00:198:18::2"]


def test_an_address_of_nobody_stands_for_itself() -> None:
    assert KNOWN.find("198.18.9.9") == [IPv4Address("198.18.9.9")]


@pytest.mark.parametrize("word", ["node-d", "stranger", "here", "10.244.9.0/24", "10.244.0.0/16", "10.244.2.1/24"])
def test_a_word_that_means_nobody_is_refused_with_who_there_is(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KNOWN.find(word)
    said = str(caught.value)
    assert said.startswith(f"no other node is called '{word}'")
    assert "node-b (198.18.1.2, fd00:198:18::2, 10.244.2.0/24, fd00:244:2::/64)" in said
    assert said.endswith("198.18.1.4 (10.244.4.0/24)")


def test_a_name_that_is_nearly_right_is_guessed() -> None:
    with pytest.raises(ConfigError, match="did you mean `node-b`"):
        KNOWN.find("nodeb")


def test_a_long_list_is_cut_and_an_empty_one_is_said_to_be() -> None:
    many = Peers([peer(f"10.244.{number}.0/24", f"198.18.1.{number}") for number in range(1, 31)])
    with pytest.raises(ConfigError) as caught:
        many.find("node-b")
    assert str(caught.value).count("(10.244.") == MOST_LISTED
    assert str(caught.value).endswith(f"and {30 - MOST_LISTED} more: see `loden status`")
    with pytest.raises(ConfigError, match="knows no other yet"):
        Peers([]).find("node-b")


def test_a_filter_takes_any_of_these_words_and_points_at_one_that_means_nobody() -> None:
    compiled = expression.compile_filter(expression.parse("peer node-b or peer 10.244.3.0/24", KNOWN.find))
    one_by_one = "peer 198.18.1.2 or peer fd00:198:18::2 or peer 198.18.1.3"
    assert compiled == expression.compile_filter(expression.parse(one_by_one))
    with pytest.raises(ConfigError) as caught:
        expression.parse("tcp and peer node-x", KNOWN.find)
    assert str(caught.value).splitlines()[-1] == " " * (4 + 13) + "^"
