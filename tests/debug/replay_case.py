"""Owns captures as text: how a bug report becomes a file under tests/debug/cases, and that file a capture again.

`python -m tests.debug.replay_case FILE [PACKET_ID...] > tests/debug/cases/NAME.txt` writes the packets that are named,
or all. A line is a block: interface, packet id, comment, length, and the bytes that were kept, in hex. What stands
behind `#` is for people. Invariant: a file and its text replay alike.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from dataplane.debug import pcapng
from dataplane.debug.pcapng import INBOUND, OUTBOUND, Packet

CASES = Path(__file__).parent / "cases"
_NAMES = ("overlay", "underlay")


def to_text(data: bytes, wanted: set[int] | None = None) -> str:
    """The packets of a capture of ours, or those with these ids, line by line."""
    lines = []
    for block in pcapng.Reader(io.BytesIO(data), "capture"):
        if isinstance(block, Packet) and (wanted is None or block.number in wanted):
            words = [block.interface.name, str(block.number), block.comment.replace(" ", ","), str(block.length)]
            lines.append(" ".join([*words, block.data.hex()]))
    return "\n".join(lines) + "\n"


def to_capture(text: str) -> bytes:
    """The capture that a text stands for; times are not kept."""
    made = pcapng.section("a case") + b"".join(pcapng.interface(101, 0, name=name) for name in _NAMES)
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, number, comment, length, kept = words
        comment = comment.replace(",", " ")
        way = INBOUND if "dir=rx" in comment else OUTBOUND
        made += pcapng.packet(
            _NAMES.index(name),
            0,
            bytes.fromhex(kept),
            int(length),
            comment=comment,
            direction=way,
            number=int(number),
        )
    return made


if __name__ == "__main__":
    sys.stdout.write(to_text(Path(sys.argv[1]).read_bytes(), set(map(int, sys.argv[2:])) or None))
