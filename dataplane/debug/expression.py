"""Owns the filter language of captures: tcpdump's words, and a few for what only an overlay knows.

Free of IO. A text becomes a program of tests for ext/dataplane/_tap.pxd, which both pumps run for each packet.
Invariant: each test leads to a later one, so a program ends; what tcpdump and we both understand means the same to
both, of the inner packet (tests/debug/test_expression.py asks tcpdump).

    expression = term {("or" | "||") term}          term = factor {("and" | "&&") factor}
    factor     = ("not" | "!") factor | "(" expression ")" | primitive
    primitive  = [ip | ip6 | tcp | udp | sctp] [src | dst | src or dst] ([host] A | net N/L | port P | portrange P-P)
               | ip | ip6 | tcp | udp | sctp | icmp | icmp6 | [ip | ip6] proto N | less N | greater N
               | tx | rx | peer NODE | vni N | drop [REASON]
"""

from __future__ import annotations

import difflib
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from dataplane.errors import ConfigError, DropReason

ACCEPT, REJECT = 0xFFFF, 0xFFFE
MOST_TESTS = 1000
SOURCE, DESTINATION = 1, 2
TX, RX = 0, 1
MOST_LENGTH = 0xFFFFFFFF

_TEST = struct.Struct("=BBBBHHII16s")
_TOKEN = re.compile(r"\s*(\(|\)|!(?!=)|&&|\|\||[^\s()!&|]+|\S)")
_NODE = re.compile(r"[\w.:/-]+")
_PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
_WORDS = (
    *("and", "or", "not", "src", "dst", "host", "net", "port", "portrange", "proto", "less", "greater", "ip", "ip6"),
    *("tcp", "udp", "sctp", "icmp", "icmp6", "tx", "rx", "peer", "vni", "drop"),
)


class Kind(IntEnum):
    """Mirrors the TEST_ constants of ext/dataplane/_tap.pxd."""

    DIRECTION = 0
    DROP = 1
    PEER = 2
    NET = 3
    PROTOCOL = 4
    PORT = 5
    VERSION = 6
    LENGTH = 7
    VNI = 8


@dataclass(frozen=True, slots=True)
class Test:
    """One question about a packet; `low` and `high` are a number, a range or a set of bits, by kind."""

    kind: Kind
    low: int = 0
    high: int = 0
    ends: int = SOURCE | DESTINATION
    network: IPv4Network | IPv6Network | None = None

    def encode(self, yes: int, no: int) -> bytes:
        version, bits, address = 0, 0, b""
        if self.network is not None:
            version, bits = self.network.version, self.network.prefixlen
            address = self.network.network_address.packed
        return _TEST.pack(self.kind, self.ends, version, bits, yes, no, self.low, self.high, address)


@dataclass(frozen=True, slots=True)
class All:
    """Every part holds; of no parts, always."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Some:
    """At least one part holds."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Not:
    part: Node


Node = Test | All | Some | Not

Find = Callable[[str], Iterable[IPv4Address | IPv6Address]]
"""The outer addresses of the node that a word means. Raises ConfigError that lists who there is."""


def compile_filter(node: Node) -> bytes:
    """The program of a filter. Raises ConfigError where it is too long."""
    tests: list[bytes] = []

    def place(node: Node, yes: int, no: int) -> int:
        """Put the tests of `node` before all that stand already, so that what they lead to is known; positions are
        counted from the end. Returns where it begins."""
        if isinstance(node, Not):
            return place(node.part, no, yes)
        if isinstance(node, Test):
            tests.append(node.encode(0, 0))
            targets.append((yes, no))
            return len(tests) - 1
        start = yes if isinstance(node, All) else no
        for part in reversed(node.parts):
            start = place(part, start, no) if isinstance(node, All) else place(part, yes, start)
        return start

    targets: list[tuple[int, int]] = []
    start = place(node, -ACCEPT, -REJECT)
    if len(tests) > MOST_TESTS:
        raise ConfigError(f"the filter has {len(tests)} tests, more than {MOST_TESTS}; use a net in place of hosts")
    if start == -REJECT:
        raise ConfigError("the filter matches nothing")
    if start == -ACCEPT:
        return b""

    def forward(target: int) -> int:
        return -target if target < 0 else len(tests) - 1 - target

    return b"".join(
        test[:4] + struct.pack("=HH", *map(forward, leads)) + test[8:]
        for test, leads in zip(reversed(tests), reversed(targets), strict=True)
    )


def asks(node: Node, kind: Kind) -> bool:
    """Whether a filter has a test of that kind."""
    if isinstance(node, Test):
        return node.kind is kind
    return any(asks(part, kind) for part in ((node.part,) if isinstance(node, Not) else node.parts))


def unnamed(word: str) -> Iterable[IPv4Address | IPv6Address]:
    """Where nobody knows the nodes: an address is one, and any other word stands for one that sends nothing."""
    return (ip_address(word) if _is_address(word) else IPv4Address(0),)


def parse(text: str, find: Find = unnamed) -> Node:
    """Read an expression; an empty one matches everything. Raises ConfigError that points at the word."""
    reader = _Reader(text, find)
    node = reader.expression() if reader.word else All(())
    if reader.word is not None:
        raise reader.error("expected `and`, `or` or the end")
    return node


def direction(which: int) -> Test:
    return Test(Kind.DIRECTION, which)


def drops(reasons: Iterable[DropReason] = DropReason) -> Test:
    return Test(Kind.DROP, sum(1 << reason for reason in reasons))


def peer(address: IPv4Address | IPv6Address) -> Test:
    return Test(Kind.PEER, network=ip_network(address))


def net(network: IPv4Network | IPv6Network, ends: int = SOURCE | DESTINATION) -> Test:
    return Test(Kind.NET, ends=ends, network=network)


def port(low: int, high: int, ends: int = SOURCE | DESTINATION) -> Test:
    return Test(Kind.PORT, low, high, ends)


def protocol(number: int) -> Test:
    return Test(Kind.PROTOCOL, number)


class _Reader:
    """Recursive descent over the words of one text."""

    def __init__(self, text: str, find: Find) -> None:
        self._text = text
        self._find = find
        self._words = [(match[1], match.start(1)) for match in _TOKEN.finditer(text)]
        self._at = 0
        self._depth = 0

    @property
    def word(self) -> str | None:
        return self._words[self._at][0] if self._at < len(self._words) else None

    def take(self, *wanted: str) -> str | None:
        """The next word if it is one of these."""
        word = self.word
        if word is None or (wanted and word not in wanted):
            return None
        self._at += 1
        return word

    def error(self, what: str, *, back: int = 0) -> ConfigError:
        at = self._at - back
        column = self._words[at][1] if at < len(self._words) else len(self._text)
        return ConfigError(f"filter: {what}\n    {self._text}\n    {' ' * column}^")

    def expression(self) -> Node:
        self._depth += 1
        if self._depth > 100:
            raise self.error("nested too deeply")
        parts = [self._term()]
        while self.take("or", "||"):
            parts.append(self._term())
        self._depth -= 1
        return parts[0] if len(parts) == 1 else Some(tuple(parts))

    def _term(self) -> Node:
        parts = [self._factor()]
        while self.take("and", "&&"):
            parts.append(self._factor())
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def _factor(self) -> Node:
        negated = False
        while self.take("not", "!"):
            negated = not negated
        if self.take("("):
            node = self.expression()
            if not self.take(")"):
                raise self.error("a `)` is missing")
        else:
            node = self._primitive()
        return Not(node) if negated else node

    def _primitive(self) -> Node:
        word = self.take()
        if word is None:
            raise self.error("expected a primitive, such as `host 10.244.3.7`")
        if word in ("tx", "rx"):
            return direction(TX if word == "tx" else RX)
        if word == "drop":
            return self._drop()
        if word == "peer":
            return self._peer()
        if word == "vni":
            return Test(Kind.VNI, self._number(0xFFFFFF))
        if word in ("less", "greater"):
            number = self._number(MOST_LENGTH)
            return Test(Kind.LENGTH, 0, number) if word == "less" else Test(Kind.LENGTH, number, MOST_LENGTH)
        if word in ("icmp", "icmp6"):
            return _both(Test(Kind.VERSION, 4 if word == "icmp" else 6), protocol(1 if word == "icmp" else 58))
        if word == "proto":
            return protocol(self._protocol_number())
        return self._qualified(word)

    def _qualified(self, word: str) -> Node:
        """[ip | ip6 | tcp | udp | sctp] [direction] [kind value]; `word` was taken already."""
        outer: Node | None = None
        if word in ("ip", "ip6"):
            outer = Test(Kind.VERSION, 4 if word == "ip" else 6)
            if self.take("proto"):
                return _both(outer, protocol(self._protocol_number()))
        elif word in _PROTOCOLS:
            outer = protocol(_PROTOCOLS[word])
        if outer is not None:
            if self.word not in ("src", "dst", "host", "net", "port", "portrange"):
                return outer
            word = self.take() or ""
        ends = SOURCE | DESTINATION
        if word in ("src", "dst"):
            ends = self._ends(word)
            word = self.take("host", "net", "port", "portrange") or "host"
        node = self._value(word, ends)
        return node if outer is None else _both(outer, node)

    def _ends(self, word: str) -> int:
        """`src`, `dst`, `src or dst`; the latter needs both words again, or it is two primitives."""
        other = {"src": "dst", "dst": "src"}[word]
        if self.word in ("or", "||") and self._at + 1 < len(self._words) and self._words[self._at + 1][0] == other:
            self._at += 2
            return SOURCE | DESTINATION
        return SOURCE if word == "src" else DESTINATION

    def _value(self, kind: str, ends: int) -> Node:
        if kind == "host":
            return net(ip_network(self._address()), ends)
        if kind == "net":
            return net(self._network(), ends)
        if kind == "port":
            number = self._port(self.take())
            return port(number, number, ends)
        if kind == "portrange":
            low, dash, high = (self.take() or "").partition("-")
            if not dash:
                raise self.error("expected a range of ports, such as 8000-8080", back=1)
            first, last = self._port(low), self._port(high)
            return port(min(first, last), max(first, last), ends)
        if _is_address(kind):  # a bare address is a host, as behind `host A or` in tcpdump
            return net(ip_network(kind), ends)
        raise self.error(f"unknown word {kind!r}{_near(kind)}", back=1)

    def _peer(self) -> Node:
        word = self.take()
        if word is None or word in _WORDS or not _NODE.fullmatch(word):
            raise self.error("expected a node: its name, public IP or subnet", back=word is not None)
        try:
            return Some(tuple(peer(address) for address in self._find(word)))
        except ConfigError as error:
            raise self.error(str(error), back=1) from None

    def _address(self) -> IPv4Address | IPv6Address:
        word = self.take()
        try:
            return ip_address(word or "")
        except ValueError:
            raise self.error("expected an IP address; names are not looked up", back=word is not None) from None

    def _network(self) -> IPv4Network | IPv6Network:
        word = self.take() or ""
        try:
            if re.fullmatch(r"\d+(\.\d+){0,2}", word):  # as tcpdump: 10.5 is 10.5.0.0/16
                parts = word.split(".")
                return ip_network(f"{'.'.join(parts + ['0'] * (4 - len(parts)))}/{8 * len(parts)}")
            return ip_network(word)
        except ValueError as error:
            raise self.error(f"expected a network, such as 10.244.3.0/24 ({error})", back=1) from None

    def _number(self, most: int) -> int:
        word = self.take() or ""
        if not re.fullmatch(r"\d{1,10}", word) or int(word) > most:
            raise self.error(f"expected a number from 0 to {most}", back=bool(word))
        return int(word)

    def _port(self, word: str | None) -> int:
        if not re.fullmatch(r"\d{1,5}", word or "") or int(word or "") > 65535:
            raise self.error("expected a port, 0 to 65535", back=word is not None)
        return int(word or "")

    def _protocol_number(self) -> int:
        word = (self.word or "").removeprefix("\\")
        named = {**_PROTOCOLS, "icmp": 1, "icmp6": 58}.get(word)
        if named is not None:
            self._at += 1
            return named
        return self._number(255)

    def _drop(self) -> Node:
        """A reason may follow; any other word belongs to what comes next."""
        word = self.word or ""
        for reason in DropReason:
            if word.upper().replace("-", "_") == reason.name:
                self._at += 1
                return drops([reason])
        return drops()


def _both(one: Node, other: Node) -> All:
    return All((one, other))


def _is_address(word: str) -> bool:
    try:
        ip_address(word)
    except ValueError:
        return False
    return True


def _near(word: str) -> str:
    near = difflib.get_close_matches(word, _WORDS, n=1, cutoff=0.7)
    return f"; did you mean `{near[0]}`?" if near else ""
