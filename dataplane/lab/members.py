"""Owns the processes of a lab: starting, finding again, and ending them.

A lab's processes outlive the command that started them, so a later command, perhaps after a crash, must find them
again and must not take a stranger's process for one of its own. Each is started with a mark in its environment,
`_LODEN_LAB_MEMBER=<lab>/<role>`, which the kernel keeps in /proc/PID/environ for the life of the process. A recorded
process id could have been recycled; a mark cannot be: it is read again through a pidfd before each signal.

Invariant: no signal goes to a process that does not carry the mark.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_MARK = "_LODEN_LAB_MEMBER"


@dataclass(frozen=True, slots=True)
class Member:
    """A running process of a lab. `role` is, for instance, `n1/flanneld`."""

    pid: int
    lab: str
    role: str


def environment(lab: str, role: str) -> dict[str, str]:
    """What a process of a lab is started with: the mark, and no FLANNELD_* variable that is meant for a real daemon."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLANNELD_")}
    return {**inherited, _MARK: f"{lab}/{role}"}


def start(lab: str, role: str, argv: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process that outlives its parent, in a session of its own; its output is appended to `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment(lab, role),
        )


def pipe(lab: str, role: str, argv: Sequence[str]) -> subprocess.Popen[str]:
    """Start a process whose input and output the caller holds."""
    return subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(lab, role)
    )


def running(lab: str, role: str | None = None) -> list[Member]:
    """The live processes of a lab, or of one role in it."""
    found = (_member(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return [member for member in found if member and member.lab == lab and role in (None, member.role)]


def end(members: Iterable[Member], *, first: signal.Signals = signal.SIGTERM, patience: float = 5.0) -> list[Member]:
    """Send `first`, wait up to `patience` seconds, then SIGKILL. Returns what is left: nothing, as a rule."""
    descriptors: dict[int, Member] = {}
    try:
        for member in members:
            try:
                descriptor = os.pidfd_open(member.pid)
            except ProcessLookupError:
                continue
            descriptors[descriptor] = member
        left = dict(descriptors)
        for number, wait in ((first, patience), (signal.SIGKILL, 5.0)):
            # The pidfd was opened first: where the mark still stands now, the descriptor means this process.
            left = {descriptor: member for descriptor, member in left.items() if _member(member.pid) == member}
            for descriptor in left:
                _signal(descriptor, number)
            left = _wait(left, wait)
            if not left:
                break
        return list(left.values())
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _member(pid: int) -> Member | None:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone meanwhile, or not ours to look at
        return None
    prefix = f"{_MARK}=".encode()
    for setting in environment:
        if setting.startswith(prefix):
            lab, _, role = setting.removeprefix(prefix).decode(errors="replace").partition("/")
            return Member(pid, lab, role)
    return None


def _signal(descriptor: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return  # ended between the look and the signal: what was wanted


def _wait(members: dict[int, Member], seconds: float) -> dict[int, Member]:
    """Those that have not ended after `seconds`. A pidfd turns readable when its process ends."""
    poller = select.poll()
    left = dict(members)
    for descriptor in left:
        poller.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + seconds
    while left and (remaining := deadline - time.monotonic()) > 0:
        for descriptor, _ in poller.poll(remaining * 1000):
            poller.unregister(descriptor)
            del left[descriptor]
    return left
