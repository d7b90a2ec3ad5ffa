"""Owns the program by which the kernel chooses the queue of a TUN device for each packet: by the packet's flow, so that
a flow's packets always come by the same queue and cannot overtake each other.

Free of IO: it makes bytes, `kernel.tun` hands them to the kernel. What the kernel does by itself (drivers/net/tun.c,
tun_automq_select_queue) moves a flow to the queue by which its answers were last written, in mid-stream.

The instructions are those of eBPF (RFC 9669) for the type "socket filter": packets are read by LD_ABS and LD_IND,
counted from the inner IP header; a read beyond the packet's end ends the program with 0 (kernel/bpf/core.c).
Invariant: it never looks at what may differ between packets of one flow.
"""

from __future__ import annotations

import struct

MULTIPLIER = 0x9E3779B97F4A7C15
"""Odd, and half of its bits are set: 2^64 divided by the golden ratio."""

_INSTRUCTION = struct.Struct("<BBhi")
_R0, _R1, _R6, _HASH, _MULTIPLIER, _OFFSET = 0, 1, 6, 7, 8, 9
"""Registers. The kernel wants the context in R6 for LD_ABS, which leaves its result in R0 and nothing in R1 to R5."""

# opcodes (RFC 9669 sections 4 and 5.5)
_LDDW, _LOAD_WORD, _LOAD_HALF, _LOAD_BYTE, _LOAD_WORD_AT = 0x18, 0x20, 0x28, 0x30, 0x40
_MOVE, _MOVE_VALUE, _XOR, _MULTIPLY, _AND, _LEFT, _RIGHT = 0xBF, 0xB7, 0xAF, 0x2F, 0x57, 0x67, 0x77
_JUMP, _IF_EQUAL, _IF_DIFFERENT, _IF_ANY_BIT, _EXIT = 0x05, 0x15, 0x55, 0x45, 0x95

_TCP, _UDP = 6, 17
_FRAGMENT = 0x3FFF
"""More-fragments flag and offset (RFC 791 section 3.1)."""


def steering_program(seed: int) -> bytes:
    """The instructions, 8 bytes each. Their result is a hash of the flow, of which the kernel takes the remainder by
    the number of queues. `seed`: 64 bits that strangers do not know, so that they cannot choose flows of one queue.

    A flow is addresses, protocol and ports of TCP and UDP, as in `flow_socket` of ext/dataplane/_tx.pxd; of fragments,
    which lack ports, and behind IPv6 extension headers, it is without. What is no IP packet has the first queue.
    """
    code = _Code()
    code.add(_MOVE, _R6, source=_R1)
    code.add_wide(_HASH, seed)
    code.add_wide(_MULTIPLIER, MULTIPLIER)
    code.add(_LOAD_BYTE, value=0)
    code.add(_RIGHT, _R0, value=4)
    code.add(_IF_EQUAL, _R0, value=6, to="IPv6")
    code.add(_IF_DIFFERENT, _R0, value=4, to="no flow")

    code.mix(_LOAD_WORD, 12)
    code.mix(_LOAD_WORD, 16)
    code.mix(_LOAD_BYTE, 9)
    code.add(_LOAD_HALF, value=6)
    code.add(_IF_ANY_BIT, _R0, value=_FRAGMENT, to="end")
    code.add(_LOAD_BYTE, value=0)
    code.add(_AND, _R0, value=15)
    code.add(_LEFT, _R0, value=2)
    code.add(_MOVE, _OFFSET, source=_R0)
    code.add(_LOAD_BYTE, value=9)
    code.add(_JUMP, to="protocol")

    code.mark("IPv6")
    for at in range(8, 40, 4):
        code.mix(_LOAD_WORD, at)
    code.mix(_LOAD_BYTE, 6)
    code.add(_MOVE_VALUE, _OFFSET, value=40)
    code.add(_LOAD_BYTE, value=6)

    code.mark("protocol")
    code.add(_IF_EQUAL, _R0, value=_TCP, to="ports")
    code.add(_IF_DIFFERENT, _R0, value=_UDP, to="end")
    code.mark("ports")
    code.mix(_LOAD_WORD_AT, 0, source=_OFFSET)
    code.mark("end")
    code.add(_MOVE, _R0, source=_HASH)
    code.add(_EXIT)
    code.mark("no flow")
    code.add(_MOVE_VALUE, _R0, value=0)
    code.add(_EXIT)
    return code.assembled()


class _Code:
    """Instructions in order, with jumps to marks that may come later."""

    def __init__(self) -> None:
        self._lines: list[tuple[int, int, int, str]] = []  # opcode, registers, value, mark
        self._marks: dict[str, int] = {}

    def add(self, opcode: int, target: int = 0, *, source: int = 0, value: int = 0, to: str = "") -> None:
        self._lines.append((opcode, source << 4 | target, value, to))

    def add_wide(self, target: int, value: int) -> None:
        """A value of 64 bits takes two places."""
        self.add(_LDDW, target, value=_signed(value & 0xFFFFFFFF))
        self.add(0, value=_signed(value >> 32))

    def mix(self, load: int, at: int, source: int = 0) -> None:
        """Read from the packet and stir it into the hash."""
        self.add(load, source=source, value=at)
        self.add(_XOR, _HASH, source=_R0)
        self.add(_MULTIPLY, _HASH, source=_MULTIPLIER)
        self.add(_MOVE, _R1, source=_HASH)
        self.add(_RIGHT, _R1, value=32)
        self.add(_XOR, _HASH, source=_R1)

    def mark(self, name: str) -> None:
        self._marks[name] = len(self._lines)

    def assembled(self) -> bytes:
        return b"".join(
            _INSTRUCTION.pack(opcode, registers, self._marks[mark] - at - 1 if mark else 0, value)
            for at, (opcode, registers, value, mark) in enumerate(self._lines)
        )


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
