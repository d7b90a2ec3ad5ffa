"""Owns the printed examples of the README and of docs/: what stands there, and how it is held against what is printed.

An example is the block behind `<!-- example: NAME -->`. It is real output of one run; what differs from run to run
(addresses of a lab, times, MACs, counts of packets) is put in the same shape on both sides before they are compared.
A block that nobody printed has a language: `sh` is typed, `text` is drawn.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_VARIABLE = [
    (r"\d\d:\d\d:\d\d\.\d+", "TIME"),
    (r"\b([0-9a-f]{2}:){5}[0-9a-f]{2}\b", "MAC"),
    (r": ([0-9a-f]{2} ){3,7}[0-9a-f]{2}$", ": HEX"),
    (r"\b\d+\.\d+ ms", "N ms"),
    (r"\bheard (now|never|\d+ (s|min) ago)|\b(never|now|\d+ (s|min) ago)\b|\bnever heard\b", "HEARD"),
    (r"\b(REACHABLE|STALE|DELAY|PROBE)\b|not asked for yet", "STATE"),
    (r"\bpid \d+", "pid N"),
    (r"\d+ bytes", "N bytes"),
    (r"\bseq \d+", "seq N"),
    (r"\b(TX|RX) \d+ packets", r"\1 N packets"),
    (r"/run/(loden/\w+/n\d+/subnet\.env|flannel/loden)\.sock", "SOCKET"),
    (r"/run/loden/\w+/", "/run/loden/LAB/"),
    (r"Loden \d+\.\d+\.\d+", "Loden VERSION"),
    (r"\b\d+\.\d{3}$", "N.NNN"),
    (r"superframe=\d+/\d+", "superframe=N"),
]


def documented(name: str) -> str:
    """The text of an example."""
    pattern = re.compile(rf"<!-- example: {re.escape(name)} -->\n+```\n(.*?)```", re.DOTALL)
    found = [match[1] for path in DOCUMENTS if (match := pattern.search(path.read_text()))]
    assert len(found) == 1, f"{len(found)} documents have an example {name}"
    return found[0]


def normal(text: str) -> str:
    """The text in the shape in which two runs agree: pods' subnets are numbered as they appear, columns one blank."""
    seen: dict[str, str] = {}

    def number(match: re.Match[str]) -> str:
        return seen.setdefault(match[0], f"10.244.<{len(seen) + 1}>.")

    text = re.sub(r"\b10\.244\.\d+\.(?!0/16)", number, text)
    for pattern, word in _VARIABLE:
        text = re.sub(pattern, word, text, flags=re.MULTILINE)
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.strip().splitlines() if not line.startswith("$ ")]
    return "\n".join(re.sub(r"(?<= )\d+(?= |$)", "N", line) if line.startswith("10.244.") else line for line in lines)


_ANY = [
    (r"\b[0-9a-f]{1,4}(:[0-9a-f]{0,4}){2,7}", "V6"),
    (r"/run/loden/\w+/", "/run/loden/LAB/"),
    (r" --name=\w+", ""),
    (r"\d[\d.,]*", "N"),
    (r"\bN s?kbit/s|\bN [MG]bit/s", "N bit/s"),
    (r"N$|NO_ROUTE N$", "COUNT"),
    (r"\s+", " "),
]


def shape(text: str) -> list[str]:
    """The lines with every number, address and blank alike: where figures differ from run to run, and words do not."""
    lines = []
    for line in text.strip().splitlines():
        if not re.match(r"[$#] ", line):
            for pattern, word in _ANY:
                line = re.sub(pattern, word, line.strip())
            lines.append(line)
    return lines
