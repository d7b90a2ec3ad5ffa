"""Owns `loden lab demo`: a lab that is built, pinged, loaded with a checked stream, shown, and taken down.

Free of: how any of it is done. Invariant: nothing is left when it ends, however it ends.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

from dataplane.errors import LodenError

if TYPE_CHECKING:
    from dataplane.lab import Lab
    from dataplane.lab.measure import RoundTrips

_NAME = "demo"
_NODES = 3
_BYTES = 200_000_000
_PATIENCE = 180.0


def add(lab_verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = lab_verbs.add_parser("demo", help="build a lab, prove that it carries, show it, take it down")
    parser.set_defaults(run=_demo)


def _demo(_arguments: argparse.Namespace) -> int:
    from dataplane.lab import Lab

    began = time.monotonic()

    def progress(text: str) -> None:
        print(f"{time.monotonic() - began:7.2f}s  {text}", flush=True)

    if Lab.destroy(_NAME):
        progress("removed what an earlier demo left")
    try:
        lab = Lab.create(_NAME, _NODES, progress=progress)
        pings = lab.ping_all()
        if lost := [f"{pair.source} to {pair.target}" for pair in pings if not pair.whole]:
            raise LodenError(f"ping lost packets from {', '.join(lost)}; to look closer: loden lab up, loden lab ping")
        progress(f"ping: all {len(pings)} pairs of pods, nothing lost")
        rates: dict[str, float] = {}
        for source, target in zip(lab.pods, [*lab.pods[1:], lab.pods[0]], strict=True):
            rate = rates[source] = _stream(lab, source, target)
            progress(f"TCP: {_BYTES // 1_000_000} MB from {source} to {target}, SHA-256 equal, {rate:.2f} Gbit/s")
        print("\n" + _summary(lab, pings, rates) + "\n", flush=True)
    finally:
        Lab.destroy(_NAME)
    progress("the lab is gone, nothing is left")
    return 0


def _stream(lab: Lab, source: str, target: str) -> float:
    """Move a checked TCP stream; Gbit/s as the sink saw it. Raises LodenError if a byte differs."""
    from dataplane.lab.measure import verdict

    with lab.traffic("tcp", source, target, f"--bytes={_BYTES}") as run:
        result = verdict(run, _PATIENCE)
    if not result["equal"]:
        raise LodenError(f"TCP from {source} to {target}: what arrived is not what was sent: {result}")
    return float(result["bytes"]) * 8 / float(result["sink"]["seconds"]) / 1e9


def _summary(lab: Lab, pings: list[RoundTrips], rates: dict[str, float]) -> str:
    from dataplane.lab.measure import drops_text, table

    rows: list[tuple[object, ...]] = []
    for node in lab.nodes.values():
        status = node.wait_ready()
        own = [p.p50 for p in pings if p.source in node.pods and p.target not in node.pods and p.p50 is not None]
        rate = max(rates[pod] for pod in node.pods)
        lease = status["lease"]
        rtt = f"{statistics.median(own):.3f}"
        rows.append((node.name, lease["subnet"], lease["public_ip"], rtt, f"{rate:.2f}", drops_text(status["drops"])))
    return table(("node", "subnet", "public IP", "RTT p50 ms", "Gbit/s", "drops"), rows)
