"""Owns the programs that the kernel runs to choose which frames, or messages, a socket is shown: classic BPF.

Free of: IO. Source: linux/filter.h; Documentation/networking/filter.rst in the kernel's sources. Invariant: a frame
that is too short for a question is not shown, and costs the kernel nothing more.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

_LOAD_WORD, _LOAD_HALF, _LOAD_BYTE = 0x20, 0x28, 0x30
_LOAD_HALF_BEHIND_X = 0x48
_EQUAL, _ANY_BIT, _GO, _RETURN, _AND, _SHIFT_LEFT, _TO_X = 0x15, 0x45, 0x05, 0x06, 0x54, 0x64, 0x07

# SKF_AD_OFF and what lies there: the frame's ethertype and device, whatever its link layer is
_PROTOCOL, _INDEX = 0x100000000 - 0x1000, 0x100000000 - 0x1000 + 8
NETWORK_HEADER = 0x100000000 - 0x100000
"""SKF_NET_OFF: the network header, wherever it begins."""

ETHERNET = 14
WHOLE = 0x40000
"""More bytes than a frame has."""

_IPV4, _IPV6, _UDP = 0x0800, 0x86DD, 17
_INSTRUCTION = struct.Struct("=HBBI")

SO_ATTACH_FILTER = 26

Network = IPv4Network | IPv6Network
NOTHING = _INSTRUCTION.pack(_RETURN, 0, 0, 0)
"""A program that shows no frame."""


def attachable(instructions: array[int]) -> bytes:
    """What `setsockopt` takes with SO_ATTACH_FILTER: where the bytes of a program are. They have to live until it has
    returned; the kernel keeps a copy, in place of the socket's former program."""
    return struct.pack("@HP", len(instructions) // _INSTRUCTION.size, instructions.buffer_info()[0])


def all_but(offset: int, word: bytes) -> bytes:
    """A program that shows everything whose four bytes at `offset` are not these."""
    steps = ((_LOAD_WORD, 0, 0, offset), (_EQUAL, 0, 1, int.from_bytes(word, "big")), (_RETURN, 0, 0, 0))
    return b"".join(_INSTRUCTION.pack(*step) for step in (*steps, (_RETURN, 0, 0, WHOLE)))


@dataclass(frozen=True, slots=True)
class Wanted:
    """Of which devices, by index, which frames: all IP packets of `all_of`; of `some_of` those to UDP `port` (0: of no
    port) and those from or to an address of `networks`. `base`: where the network header of the latter begins."""

    all_of: frozenset[int] = frozenset()
    some_of: frozenset[int] = frozenset()
    port: int = 0
    networks: tuple[Network, ...] = ()
    base: int = ETHERNET


def program(wanted: Wanted) -> bytes:
    """Instructions, 8 bytes each."""
    code = _Code()
    code.add(_LOAD_WORD, _INDEX)
    for indices, target in ((wanted.all_of, "ip"), (wanted.some_of, "some")):
        for index in sorted(indices):
            code.when(index, target)
    code.add(_RETURN, 0)
    code.label("ip")
    code.add(_LOAD_WORD, _PROTOCOL)
    code.when(_IPV4, "accept")
    code.when(_IPV6, "accept")
    code.add(_RETURN, 0)
    code.label("some")
    code.add(_LOAD_WORD, _PROTOCOL)
    code.when(_IPV4, "v4")
    code.when(_IPV6, "v6")
    code.add(_RETURN, 0)
    code.label("v4")
    _ask_v4(code, wanted)
    code.label("v6")
    _ask_v6(code, wanted)
    code.label("accept")
    code.add(_RETURN, WHOLE)
    return code.assembled()


class _Code:
    """Instructions with jumps to labels, which may stand further off than a conditional jump reaches."""

    def __init__(self) -> None:
        self._instructions: list[tuple[int, int, int, int | str]] = []
        self._labels: dict[str, int] = {}

    def add(self, code: int, value: int) -> None:
        self._instructions.append((code, 0, 0, value))

    def go(self, target: str) -> None:
        self._instructions.append((_GO, 0, 0, target))

    def when(self, value: int, target: str) -> None:
        """Go on at `target` where the accumulator is `value`."""
        self._instructions += [(_EQUAL, 0, 1, value), (_GO, 0, 0, target)]

    def unless(self, value: int, target: str) -> None:
        self._instructions += [(_EQUAL, 1, 0, value), (_GO, 0, 0, target)]

    def when_any(self, bits: int, target: str) -> None:
        """Go on at `target` where the accumulator has one of these bits."""
        self._instructions += [(_ANY_BIT, 0, 1, bits), (_GO, 0, 0, target)]

    def label(self, name: str) -> None:
        self._labels[name] = len(self._instructions)

    def assembled(self) -> bytes:
        return b"".join(
            _INSTRUCTION.pack(code, yes, no, self._labels[value] - at - 1 if isinstance(value, str) else value)
            for at, (code, yes, no, value) in enumerate(self._instructions)
        )


def _ask_v4(code: _Code, wanted: Wanted) -> None:
    """RFC 791, RFC 768: of a datagram in fragments, the first has the port."""
    if wanted.port:
        code.add(_LOAD_BYTE, wanted.base + 9)
        code.unless(_UDP, "v4 networks")
        code.add(_LOAD_HALF, wanted.base + 6)
        code.when_any(0x1FFF, "v4 networks")
        code.add(_LOAD_BYTE, wanted.base)
        code.add(_AND, 0xF)
        code.add(_SHIFT_LEFT, 2)
        code.add(_TO_X, 0)
        code.add(_LOAD_HALF_BEHIND_X, wanted.base + 2)
        code.when(wanted.port, "accept")
    code.label("v4 networks")
    _ask_networks(code, [n for n in wanted.networks if n.version == 4], (wanted.base + 12, wanted.base + 16))


def _ask_v6(code: _Code, wanted: Wanted) -> None:
    """RFC 8200, without extension headers."""
    if wanted.port:
        code.add(_LOAD_BYTE, wanted.base + 6)
        code.unless(_UDP, "v6 networks")
        code.add(_LOAD_HALF, wanted.base + 42)
        code.when(wanted.port, "accept")
    code.label("v6 networks")
    _ask_networks(code, [n for n in wanted.networks if n.version == 6], (wanted.base + 8, wanted.base + 24))


def _ask_networks(code: _Code, networks: Collection[Network], ends: tuple[int, int]) -> None:
    for network in networks:
        for end in ends:
            other = f"{network} not at {end}"
            for at, mask, value in _words(network):
                code.add(_LOAD_WORD, end + at)
                code.add(_AND, mask)
                code.unless(value, other)
            code.go("accept")
            code.label(other)
    code.add(_RETURN, 0)


def _words(network: Network) -> Iterator[tuple[int, int, int]]:
    """(offset, mask, value) of each 32 bits of an address that the prefix reaches into."""
    for at in range(0, network.max_prefixlen // 8, 4):
        mask = int.from_bytes(network.netmask.packed[at : at + 4])
        if mask:
            yield at, mask, int.from_bytes(network.network_address.packed[at : at + 4])
