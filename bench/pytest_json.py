"""Owns a run in pytest-benchmark's JSON, so that `pytest-benchmark compare` reads it.

That tool knows durations, of which less is better. So a rate is told as the time that a fixed amount takes: seconds for
one GB of TCP, for a million datagrams, for a round trip at its median. Free of: figures that are no time of anything;
loss stands in `extra_info`. Invariant: the statistics are those of the samples, one for each round. """

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from dataplane.bench.record import Run
from dataplane.bench.workload import Workload

_VERSION = "5.0.0"
"""Of the format, whose reader asks for nothing newer."""

# kind: (figure, what a sample's duration is of, seconds from the figure)
_TIMES: dict[str, tuple[str, str, Callable[[float], float]]] = {
    "tcp": ("gbit_s", "a GB", lambda value: 8 / value),
    "udp": ("kpps", "a million datagrams", lambda value: 1e3 / value),
    "rtt": ("p50_us", "a round trip", lambda value: value / 1e6),
}


def benchmarks(run: Run) -> str:
    found = []
    for profile in run.profiles:
        for name in run.settings.workloads:
            workload = Workload.parse(name)
            if workload.kind not in _TIMES:
                continue
            key, amount, seconds = _TIMES[workload.kind]
            for candidate in run.settings.candidates:
                values = [value for value in run.values(profile.name, candidate, name, key) if value > 0]
                if values:
                    lost = run.values(profile.name, candidate, name, "loss")
                    group = f"{profile.name} {name}: seconds for {amount}"
                    entry = _benchmark(
                        group, f"{name}[{profile.name}-{candidate}]", [seconds(value) for value in values]
                    )
                    found.append({**entry, "extra_info": {"loss": statistics.median(lost)} if lost else {}})
    processor = run.machine["processor"]
    document = {
        "machine_info": {
            "node": "",
            "machine": "",
            "system": run.machine["system"],
            "release": run.machine["kernel"],
            "python_version": run.machine["python"],
            "python_implementation": "CPython",
            "python_implementation_version": run.machine["python"],
            "cpu": {"brand_raw": processor, "count": run.machine["processors"]},
        },
        "commit_info": {
            "id": "unversioned",
            "dirty": False,
            "time": None,
            "author_time": None,
            "project": "loden",
            "branch": "(unknown)",
        },
        "benchmarks": found,
        "datetime": run.machine["time"],
        "version": _VERSION,
    }
    return json.dumps(document, indent=1) + "\n"


def _benchmark(group: str, name: str, data: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(data)
    middle = statistics.median(ordered)
    first, _, third = statistics.quantiles(ordered, method="inclusive") if len(ordered) > 1 else (middle,) * 3
    mean, deviation = statistics.fmean(ordered), statistics.stdev(ordered) if len(ordered) > 1 else 0.0
    reach = 1.5 * (third - first)
    inner = [value for value in ordered if first - reach <= value <= third + reach]
    far = sum(abs(value - mean) > deviation for value in ordered)
    stats = {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "stddev": deviation,
        "rounds": len(ordered),
        "median": middle,
        "iqr": third - first,
        "q1": first,
        "q3": third,
        "iqr_outliers": len(ordered) - len(inner),
        "stddev_outliers": far,
        "outliers": f"{far};{len(ordered) - len(inner)}",
        "ld15iqr": inner[0],
        "hd15iqr": inner[-1],
        "ops": 1 / mean,
        "total": sum(ordered),
        "data": list(data),
        "iterations": 1,
    }
    return {
        "group": group,
        "name": name,
        "fullname": f"loden bench::{name}",
        "params": None,
        "param": None,
        "options": {},
        "stats": stats,
    }
