"""Owns who takes part in a run: candidates by their names, those that the user brings, and what stands where nothing is
said.

Free of: how a candidate works. Invariant: what is asked for is checked before the first namespace is made, and each
name stands once. """

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dataplane.bench.candidate import Candidate, KernelVxlan, Raw
from dataplane.bench.flanneld import Daemon, Foreign
from dataplane.bench.program import Baseline, Prototype, PythonProxy, Tunnel
from dataplane.bench.workload import Workload
from dataplane.errors import ConfigError

BACKENDS: Mapping[str, Mapping[str, Any]] = {
    "host-gw": {"Type": "host-gw"},
    "vxlan": {"Type": "vxlan", "Dataplane": "userspace"},
    "udp": {"Type": "udp"},
}
"""Our own candidates, each with the Backend of its net-conf."""
NAMES = ("raw", "host-gw", "kernel-vxlan", "vxlan", "udp", "baseline", "asyncio", "uvloop", "prototype")
DEFAULT = ("raw", "host-gw", "kernel-vxlan", "vxlan", "udp", "baseline", "asyncio", "uvloop")
QUICK = ("kernel-vxlan", "vxlan", "udp", "baseline")
FOREIGN_BACKENDS = ("udp", "vxlan")


@dataclass(frozen=True, slots=True)
class Brought:
    """What the user brings: `--prototype`, `--flanneld NAME=PATH[,BACKEND...]`, `--tunnel NAME=SCRIPT`, flags for our
    own daemons, and further ones of these: `--ours NAME=BACKEND[,FLAG...]`."""

    prototype: Path | None = None
    flannelds: Sequence[str] = ()
    tunnels: Sequence[str] = ()
    flags: Sequence[str] = ()
    ours: Sequence[str] = ()


def candidates(names: Sequence[str], brought: Brought, workloads: Sequence[Workload]) -> list[Candidate]:
    """Those named, then those brought. Raises ConfigError."""
    with_leases = any(workload.needs_leases for workload in workloads)
    disturbed = any(workload.needs_disturbing for workload in workloads)

    def daemon(name: str, backend: str, flags: Sequence[str] = ()) -> Candidate:
        flags = [*brought.flags, *flags]
        return Daemon(name, BACKENDS[backend], flags, with_leases=with_leases, disturbed=disturbed)

    makers: dict[str, Callable[[], Candidate]] = {
        "raw": Raw,
        "kernel-vxlan": KernelVxlan,
        "baseline": Baseline,
        "asyncio": lambda: PythonProxy("asyncio"),
        "uvloop": lambda: PythonProxy("uvloop"),
        **{name: partial(daemon, name, name) for name in BACKENDS},
    }
    if brought.prototype is not None:
        makers["prototype"] = _prototype(brought.prototype)
        names = [*names, "prototype"]
    elif "prototype" in names:
        raise ConfigError("candidate prototype: say which C file it is with --prototype=FILE.c")
    if unknown := [name for name in names if name not in makers]:
        raise ConfigError(f"{unknown[0]!r} is no candidate: take one of {', '.join(NAMES)}")
    found = [makers[name]() for name in dict.fromkeys(names)]
    found += [daemon(*_ours(word)) for word in brought.ours]
    for word in brought.flannelds:
        found += _foreign(word)
    found += [_tunnel(word) for word in brought.tunnels]
    taken = [candidate.name for candidate in found]
    if double := [name for name in taken if taken.count(name) > 1]:
        raise ConfigError(f"two candidates are called {double[0]!r}: give one of them another name")
    return found


def _prototype(source: Path) -> Callable[[], Candidate]:
    return lambda: Prototype(source)


def _ours(word: str) -> tuple[str, str, list[str]]:
    """Name, backend and flags of `NAME=BACKEND[,FLAG...]`."""
    name, _, rest = word.partition("=")
    backend, *flags = rest.split(",")
    if not name or backend not in BACKENDS or not all(flag.startswith("-") for flag in flags):
        known = ", ".join(BACKENDS)
        raise ConfigError(
            f"--ours={word}: it is NAME=BACKEND[,FLAG...], as in k1=vxlan,--vxlan-source-ports=1; backends: {known}"
        )
    return name, backend, flags


def _foreign(word: str) -> list[Candidate]:
    """One candidate for each backend of `NAME=PATH[,BACKEND...]`."""
    name, _, rest = word.partition("=")
    path, *backends = rest.split(",")
    if not name or not path:
        raise ConfigError(f"--flanneld={word}: it is NAME=PATH[,BACKEND...], as in go=/usr/bin/flanneld,udp,vxlan")
    return [Foreign(f"{name}-{backend}", Path(path), backend) for backend in backends or FOREIGN_BACKENDS]


def _tunnel(word: str) -> Candidate:
    name, _, script = word.partition("=")
    if not name or not script:
        raise ConfigError(f"--tunnel={word}: it is NAME=SCRIPT, as in mine=./mine.sh")
    return Tunnel(name, Path(script))
