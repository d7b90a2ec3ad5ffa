"""Owns the calls of iproute2: named network namespaces, and `ip` commands inside them.

Free of: what a lab looks like. Invariant: a call either did all of its commands, or raises KernelError with the
text that `ip` printed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from dataplane.errors import KernelError

_DIRECTORY = Path("/run/netns")


def listed() -> list[str]:
    """Names of all network namespaces of this machine that have one."""
    try:
        return sorted(entry.name for entry in _DIRECTORY.iterdir())
    except FileNotFoundError:
        return []


def within(name: str, argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` in a namespace, in place of itself: the process id stays the same."""
    return ["ip", "netns", "exec", name, *argv]


def add(names: Sequence[str]) -> None:
    _batch([], [f"netns add {name}" for name in names])


def delete(names: Sequence[str]) -> None:
    """Remove the names; each namespace goes with its last process and takes its devices with it."""
    _batch([], [f"netns del {name}" for name in names])


def configure(name: str, commands: Sequence[str]) -> None:
    """Run `ip` commands, one a line and without the leading `ip`, inside a namespace."""
    _batch(["-n", name], commands)


def set_sysctls(name: str, settings: Sequence[str]) -> None:
    """Write `key=value` settings of one namespace; keys that this kernel does not have are passed over."""
    _run(within(name, ["sysctl", "-q", "-e", "-w", *settings]), None)


def _batch(options: Sequence[str], commands: Sequence[str]) -> None:
    if commands:
        _run(["ip", *options, "-batch", "-"], commands)


def _run(argv: Sequence[str], commands: Sequence[str] | None) -> None:
    text = None if commands is None else "\n".join(commands) + "\n"
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        asked = " ".join(argv) if commands is None else f"{' '.join(argv)} <<< {'; '.join(commands)}"
        raise KernelError(f"`{asked}` failed: {said}")
