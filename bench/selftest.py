"""Owns the harness's test of itself: two injected faults of known size must come back as they were injected.

A token bucket halves one candidate's rate; a rule throws away every hundredth datagram of another. The whole way is
tested: turns, generator, record, ratio. Free of: tunnels, whose speed nobody knows beforehand. Invariant: the bucket is
so slow, and the datagrams are so few, that no machine is the limit; so the answer does not depend on the machine. """

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dataplane.bench import profile, statistic
from dataplane.bench.ends import Ends, Timing
from dataplane.bench.run import Plan, execute
from dataplane.bench.stand import Stand
from dataplane.bench.workload import Workload

SLOWDOWN = 2.0
LOSS = 0.01
WITHIN = 0.1
_RATE_MBIT = 200
_TABLE = "loden_selftest"
_TCP, _UDP = "tcp-1", "udp-64@20000"


class Faulty:
    """The bare underlay behind a token bucket, with every `one_in`-th datagram of the generator lost (0: none)."""

    ours = False

    def __init__(self, name: str, megabits: int, one_in: int = 0) -> None:
        self.name = name
        self._megabits = megabits
        self._one_in = one_in

    def up(self, stand: Stand) -> Ends:
        bucket = ["tbf", "rate", f"{self._megabits}mbit", "burst", "64kb", "latency", "20ms"]
        stand.run("n1", ["tc", "qdisc", "add", "dev", "eth0", "root", *bucket])
        if self._one_in:
            rule = f"udp dport 5301 numgen inc mod {self._one_in} < 1 drop"
            chain = f'chain in {{ type filter hook ingress device "eth0" priority 0;\n{rule}\n}}'
            stand.run("n2", ["nft", "-f", "-"], stdin=f"table netdev {_TABLE} {{\n{chain}\n}}\n")
        return Ends("n1", "n2", str(stand.address(2).ip), stand.underlay_mtu)

    def down(self, stand: Stand) -> None:
        stand.attempt("n1", ["tc", "qdisc", "del", "dev", "eth0", "root"])
        stand.attempt("n2", ["nft", "delete", "table", "netdev", _TABLE])


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: what was injected, and what the harness has found."""

    what: str
    injected: float
    found: float

    @property
    def good(self) -> bool:
        return abs(self.found - self.injected) <= WITHIN * self.injected


def run(directory: Path, name: str, say: Callable[[str], None], rounds: int = 3, seconds: float = 1.0) -> list[Finding]:
    """Measure the faults in a stand of this name. Raises LodenError."""
    plan = Plan(
        candidates=[Faulty("whole", _RATE_MBIT), Faulty("half", int(_RATE_MBIT / SLOWDOWN), round(1 / LOSS))],
        profiles=[profile.load("p1")],
        workloads=[Workload.parse(_TCP), Workload.parse(_UDP)],
        rounds=rounds,
        timing=Timing(0.5, seconds),
        directory=directory,
        name=name,
        patience=0.0,  # what else goes on must not matter
    )
    found = execute(plan, say)
    whole, half = (found.values("p1", candidate, _TCP, "gbit_s") for candidate in ("whole", "half"))
    lost = found.values("p1", "half", _UDP, "loss")
    return [
        Finding("slowdown of TCP", SLOWDOWN, statistic.ratio(whole, half).ratio if half else 0.0),
        Finding("loss of datagrams, %", LOSS * 100, statistic.summarize(lost).median * 100 if lost else 0.0),
    ]
