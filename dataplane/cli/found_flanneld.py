"""Owns finding how flanneld is started on this node: the command line and variables of a process, or of a systemd unit.

Free of: what they mean. Invariant: nothing is run and nothing is written.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

UNITS = tuple(
    Path(directory, f"{name}.service")
    for directory in ("/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system",
                      "/usr/lib/systemd/system", "/lib/systemd/system")
    for name in ("flanneld", "flannel")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """How a flanneld is, or would be, started. `ours`: it is Loden's already; `pid`: 0 where it does not run."""

    where: str
    words: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    pid: int = 0
    ours: bool = False


def find() -> Found | None:
    """A process in our network namespace, else a unit; None where there is neither."""
    processes = list(_processes())
    if processes:
        return min(processes, key=lambda found: found.ours)
    for unit in UNITS:
        with contextlib.suppress(OSError, ValueError):
            found = of_unit(unit)
            if found is not None:
                return found
    return None


def _processes() -> Iterator[Found]:
    mine = os.stat("/proc/self/ns/net").st_ino  # noqa: PTH116 - os.stat follows the magic link
    for process in Path("/proc").glob("[0-9]*"):
        # a process may end, or be none of our business, at any point of this
        with contextlib.suppress(OSError):
            argv = [word.decode(errors="replace") for word in (process / "cmdline").read_bytes().split(b"\0")[:-1]]
            start = _program_at(argv)
            if start is None or (process / "ns/net").stat().st_ino != mine:
                continue
            variables = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            pairs = (text.partition("=") for text in variables if text.startswith("FLANNELD_"))
            environ = {name: value for name, _, value in pairs}
            words = tuple(argv[start + 1 :])
            yield Found(f"process {process.name}", words, environ, pid=int(process.name), ours=start > 0)


def _program_at(argv: list[str]) -> int | None:
    """Where the program stands in a command line: first for flannel's, behind an interpreter for ours."""
    for index, word in enumerate(argv[:4]):
        if Path(word).name == "flanneld" or (index and argv[index - 1 : index + 1] == ["-m", "dataplane"]):
            return index
    return None


def of_unit(path: Path) -> Found | None:
    """The command of a unit's ExecStart, with its variables; None where it starts no flanneld. Raises OSError, and
    ValueError for quotes that do not match."""
    text = path.read_text(errors="replace").replace("\\\n", " ")
    settings = re.findall(r"^\s*(ExecStart|Environment|EnvironmentFile)\s*=\s*(.*?)\s*$", text, re.MULTILINE)
    environ: dict[str, str] = {}
    for name, value in settings:
        if name == "Environment":
            environ.update(_assignments(shlex.split(value)))
        elif name == "EnvironmentFile":
            with contextlib.suppress(OSError):
                lines = Path(value.lstrip("-")).read_text(errors="replace").splitlines()
                environ.update(_assignments([word for line in lines for word in _words(line)]))
    for name, value in settings:
        words = _expanded(value.lstrip("-@:+!"), environ) if name == "ExecStart" else []
        start = _program_at(words)
        if start is not None:
            flags = {name: value for name, value in environ.items() if name.startswith("FLANNELD_")}
            return Found(f"unit {path}", tuple(words[start + 1 :]), flags, ours=start > 0)
    return None


def _words(line: str) -> list[str]:
    """One assignment of an environment file, which is no shell: its value goes on to the end of the line."""
    name, equals, value = line.strip().partition("=")
    if not equals or name.startswith(("#", ";")):
        return []
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return [f"{name}={value[1:-1] if quoted else value}"]


def _assignments(words: list[str]) -> dict[str, str]:
    return {name: value for name, equals, value in (word.partition("=") for word in words) if equals}


def _expanded(command: str, environ: Mapping[str, str]) -> list[str]:
    """As systemd does it: $NAME that is a word of its own is split into words, ${NAME} is not."""
    words: list[str] = []
    for word in shlex.split(command):
        alone = re.fullmatch(r"\$(\w+)", word)
        if alone:
            words += environ.get(alone[1], "").split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda match: environ.get(match[1], ""), word))
    return words
