"""Owns looking at the kernel as an operator does: what `ip`, `bridge` and `nft` print, and the counters in /proc.

Free of changes and of judgement. Used off the path, when somebody asks; each call takes milliseconds and runs in the
caller's thread. Invariant: a tool that is missing or refuses is a fact (None), not an error.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from dataplane.errors import KernelError

TOOL_SECONDS = 5.0

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Way:
    """How a packet to an address leaves. `device` is empty and `error` says why where it does not."""

    device: str
    gateway: str
    source: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class Device:
    """A link; `carrier`: somebody is at the other end."""

    name: str
    mtu: int
    up: bool
    carrier: bool
    mac: str


def way_to(address: Address) -> Way:
    """The route that a packet to `address` takes now."""
    try:
        (entry,) = _json("ip", "-j", "route", "get", str(address))
    except KernelError as error:
        return Way("", "", "", str(error))
    kind = entry.get("type", "unicast")
    if kind not in ("unicast", "local"):
        return Way("", "", "", f"the route is of type {kind}")
    return Way(entry.get("dev", ""), entry.get("gateway", ""), entry.get("prefsrc", ""))


def device(name: str) -> Device | None:
    """The link of that name; None where there is none."""
    try:
        (entry,) = _json("ip", "-j", "link", "show", "dev", name)
    except (KernelError, ValueError):
        return None
    flags = entry["flags"]
    return Device(name, entry["mtu"], "UP" in flags, "LOWER_UP" in flags, entry.get("address", ""))


def own_addresses() -> set[str]:
    """Every address of this node, as text."""
    try:
        return {a["local"] for link in _json("ip", "-j", "address") for a in link.get("addr_info", ()) if "local" in a}
    except KernelError:
        return set()


def neighbour(address: Address, name: str) -> tuple[str, str] | None:
    """(MAC, state) that the kernel has for an address on a device; None where it has no entry."""
    try:
        entries = _json("ip", "-j", "neigh", "show", str(address), "dev", name)
    except KernelError:
        return None
    return next(((e.get("lladdr", ""), " ".join(e.get("state", []))) for e in entries), None)


def forwarding(name: str, mac: str) -> str | None:
    """Outer address to which a vxlan device sends frames for a MAC; None where its FDB has none."""
    try:
        entries = _json("bridge", "-j", "fdb", "show", "dev", name)
    except KernelError:
        return None
    return next((e.get("dst") for e in entries if e.get("mac", "").lower() == mac.lower() and e.get("dst")), None)


def blocking_rules(port: int, address: Address) -> list[str]:
    """Rules of nftables (and of iptables, where it speaks through nftables) that drop or reject, and name this UDP port
    or this address. Not proof: a rule may be passed by, and one that names neither may match."""
    try:
        listing = _run("nft", "list", "ruleset")
    except KernelError:
        return []
    about = re.compile(rf"(?<![\d.:]){re.escape(str(address))}(?![\d.:])|port \S*\b{port}\b")
    found, chain = [], ""
    for line in map(str.strip, listing.splitlines()):
        if line.startswith("chain "):
            chain = line.split()[1]
        elif re.search(r"\b(drop|reject)\b", line) and about.search(line):
            found.append(f"chain {chain}: {line}")
    return found


def forwards(version: int) -> bool | None:
    """Whether this node forwards packets; None where that cannot be read."""
    place = "ipv4/ip_forward" if version == 4 else "ipv6/conf/all/forwarding"
    try:
        return Path("/proc/sys/net", place).read_text().strip() == "1"
    except OSError:
        return None


def udp_errors() -> dict[str, int]:
    """The namespace's own counts of UDP datagrams that it did not deliver (net/ipv4/proc.c), by the kernel's names."""
    try:
        text = Path("/proc/thread-self/net/snmp").read_text()
    except OSError:
        return {}
    lines = [line.split() for line in text.splitlines() if line.startswith("Udp:")]
    if len(lines) != 2:
        return {}
    counts = dict(zip(lines[0][1:], map(int, lines[1][1:]), strict=True))
    return {name: counts[name] for name in ("InCsumErrors", "RcvbufErrors", "SndbufErrors") if name in counts}


def _json(*argv: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(_run(*argv) or "[]")
    return found


def _run(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
    except FileNotFoundError:
        raise KernelError(f"{argv[0]} is not installed") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"`{' '.join(argv)}`: {error}") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise KernelError(said[0].removeprefix("RTNETLINK answers: ") if said else f"`{' '.join(argv)}` failed")
    return done.stdout
