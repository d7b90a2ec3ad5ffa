"""Owns single samples: one sink and one source (or two of each), and the figures that come of what the sink has
counted.

Free of: candidates, and of workloads that consist of several samples (composite.py). Invariant: rates are the
receiver's; a packet rate never stands without its loss; processor time is the whole machine's, generator and softirq
included, and beside it that of the tunnel's processes by the scheduler's clock. """

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from dataplane.bench.ends import Ends, Timing
from dataplane.bench.load import PATIENCE, PORT
from dataplane.bench.stand import Stand
from dataplane.lab import LabError, measure

LOAD = (sys.executable, "-P", "-m", "dataplane.bench.load")
HEADERS = 28
"""Bytes of IPv4 and UDP, which an MTU includes and a payload does not."""
IDLE_INTERVAL = 0.01
_tags = itertools.count(1)
_Pair = tuple[subprocess.Popen[str], subprocess.Popen[str]]


def tcp(stand: Stand, ends: Ends, timing: Timing, flows: int, direction: str, congestion: str) -> dict[str, Any]:
    """`direction`: `up` from the pod that connects, `down` to it, `both` at once with `flows` each way."""
    flags = [*timing.flags, f"--flows={flows}", f"--congestion={congestion}"]
    ways = ["up", "down"] if direction == "both" else [direction]
    with ExitStack() as stack:
        pairs = []
        for number, way in enumerate(ways):
            port, to = f"--port={PORT + number}", f"--host={ends.address}"
            sink, source = ["tcp-sink", *flags, port, *_watch(ends)], ["tcp-source", *flags, port]
            listener, caller = (sink, source) if way == "up" else (source, sink)
            pair = stack.enter_context(_exchange(stand, ends, listener, [*caller, to]))
            pairs.append(pair if way == "up" else (pair[1], pair[0]))
        results = [(measure.verdict(sink, _patience(timing)), source) for sink, source in pairs]
        found = [(seen, measure.verdict(source, _patience(timing))) for seen, source in results]
    if not all(seen["bytes"] for seen, _ in found):
        raise LabError(f"{ends.source} to {ends.target}: no byte arrived by TCP")
    rate = sum(seen["bytes"] / seen["seconds"] for seen, _ in found)
    first, _ = found[0]
    gigabytes = rate * first["seconds"] / 1e9
    return {
        "gbit_s": rate * 8 / 1e9,
        **_cost(first["used"], gigabytes, "cpu_s_per_gb", "tunnel_cpu_s_per_gb"),
        "retransmits": sum(sent["retransmits"] for _, sent in found),
        "congestion": found[0][1]["congestion"],
        "seconds": first["seconds"],
        **{
            f"{way}_gbit_s": seen["bytes"] * 8 / seen["seconds"] / 1e9
            for way, (seen, _) in zip(ways, found, strict=True)
        },
    }


def udp(
    stand: Stand, ends: Ends, timing: Timing, size: int, rate: float = 0.0, spread: int = 0, timeline: float = 0.0
) -> dict[str, Any]:
    """Numbered datagrams of `size` bytes; `rate` a second, 0 is saturation. `spread`: over that many far subnets, with
    `ends.address` in the first of them. `timeline`: seconds of a slice of the window."""
    common = [*timing.flags, f"--tag={next(_tags)}"]
    sink = ["udp-sink", *common, f"--slice={timeline}", *_watch(ends)]
    source = ["udp-source", ends.address, *common, f"--size={size}", f"--rate={rate}", f"--spread={spread}"]
    with _exchange(stand, ends, sink, source) as (there, here):
        return datagrams(measure.verdict(there, _patience(timing)), measure.verdict(here, _patience(timing)), size)


def datagrams(seen: dict[str, Any], sent: dict[str, Any], size: int) -> dict[str, Any]:
    """The figures of a UDP sink and its source."""
    received, seconds = seen["received"], seen["seconds"]
    return {
        "kpps": received / seconds / 1e3 if seconds else 0.0,
        # one that was sent before the window may come in it, overtaken
        "loss": max(0.0, 1 - received / seen["expected"]) if seen["expected"] else 1.0,
        "offered_kpps": sent["sent"] / sent["seconds"] / 1e3,
        **_cost(seen["used"], received / 1e6, "cpu_s_per_mpkt", "tunnel_cpu_s_per_mpkt"),
        "longest_gap_ms": seen["longest_gap"] * 1e3 if seconds else None,
        "whole_run_loss": 1 - seen["all_received"] / sent["sent"] if sent["sent"] else 1.0,
        "duplicated": seen["all_duplicated"],
        "reordered": seen["reordered"],
        "refused": sent["refused"],
        "payload": size,
        "seconds": seconds,
        **({"timeline": seen["timeline"], "started": seen["started"]} if seen["timeline"] else {}),
    }


def rtt(stand: Stand, ends: Ends, timing: Timing, interval: float) -> dict[str, Any]:
    """Echoes; the next one `interval` seconds after the last one, or as soon as that was answered (0)."""
    flags = [*timing.flags, f"--interval={interval}", *_watch(ends)]
    with stand.open_process(ends.source, [*LOAD, "echo", ends.address, *flags]) as asking:
        try:
            seen = measure.verdict(asking, _patience(timing))
        finally:
            asking.kill()
    if "p50" not in seen:
        raise LabError(f"{ends.source} to {ends.target}: no echo was answered")
    times = {f"{name}_us": seen[name] for name in ("p50", "p90", "p99", "p999", "least", "greatest")}
    return {
        **times,
        "loss": 1 - seen["received"] / seen["sent"],
        "samples": seen["samples"],
        **_cost(seen["used"], seen["received"] / 1e6, "cpu_s_per_mpkt", "tunnel_cpu_s_per_mpkt"),
    }


def rtt_under_load(stand: Stand, ends: Ends, timing: Timing, congestion: str) -> dict[str, Any]:
    """Echoes back to back beside one TCP flow that takes what it gets, in the same direction."""
    around = Timing(0.2, timing.warmup + timing.seconds + 0.3)
    flags = [*around.flags, "--flows=1", f"--congestion={congestion}"]
    source = ["tcp-source", *flags, f"--host={ends.address}"]
    with _exchange(stand, ends, ["tcp-sink", *flags], source) as (sink, _):
        figures = rtt(stand, ends, Timing(timing.warmup + 0.2, timing.seconds), 0.0)
        seen = measure.verdict(sink, _patience(around))
    if not seen["bytes"]:
        raise LabError(f"{ends.source} to {ends.target}: the load has not arrived")
    return {**figures, "beside_gbit_s": seen["bytes"] * 8 / seen["seconds"] / 1e9, "congestion": congestion}


def connect(stand: Stand, ends: Ends, timing: Timing) -> dict[str, Any]:
    """TCP connections made and ended, 32 under way at a time, counted by the acceptor."""
    sink, source = ["connect-sink", *timing.flags, *_watch(ends)], ["connect-source", ends.address, *timing.flags]
    with _exchange(stand, ends, sink, source) as (there, here):
        seen, made = measure.verdict(there, _patience(timing)), measure.verdict(here, _patience(timing))
    if not seen["accepted"]:
        raise LabError(f"{ends.source} to {ends.target}: no connection came")
    return {
        "connections_s": seen["accepted"] / seen["seconds"],
        **_cost(seen["used"], seen["accepted"] / 1e6, "cpu_s_per_mconn", "tunnel_cpu_s_per_mconn"),
        "failed_connections": made["failed"],
        "seconds": seen["seconds"],
    }


def _exchange(
    stand: Stand, ends: Ends, listener: Sequence[str], caller: Sequence[str]
) -> AbstractContextManager[_Pair]:
    """The listener at the far end, the caller at the near one."""
    return measure.exchange(stand.open_process, (ends.target, [*LOAD, *listener]), (ends.source, [*LOAD, *caller]))


def _watch(ends: Ends) -> list[str]:
    return [f"--watch={process}" for process in ends.processes]


def _cost(used: dict[str, float], amount: float, whole: str, tunnel: str) -> dict[str, float | None]:
    """Processor seconds for each unit of what arrived, and what the hypervisor took meanwhile."""
    if not amount:
        return {whole: None, tunnel: None, "stolen_s": used["stolen"]}
    return {whole: used["busy"] / amount, tunnel: used["watched"] / amount, "stolen_s": used["stolen"]}


def _patience(timing: Timing) -> float:
    return timing.warmup + timing.seconds + 3 * PATIENCE + 10
