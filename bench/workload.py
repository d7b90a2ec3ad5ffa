"""Owns the workloads: what is sent from one end of a candidate's path to the other, and the figures that come of it.

A workload is named `tcp-FLOWS`, `udp-BYTES` (at saturation; `udp-mtu` fills the MTU), `rtt-busy` (echo back to back) or
`rtt-idle` (100 a second). Free of: candidates. Invariant: rates are the receiver's; a packet rate never stands without
its loss; processor time is the whole machine's, generator and softirq included.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from dataplane.bench.load import PATIENCE
from dataplane.bench.stand import Stand
from dataplane.errors import ConfigError
from dataplane.lab import LabError

LOAD = (sys.executable, "-P", "-m", "dataplane.bench.load")
_NAME = re.compile(r"(tcp)-(\d+)|(udp)-(\d+|mtu)|(rtt)-(busy|idle)")
_HEADERS = 28  # IPv4 and UDP
_IDLE_INTERVAL = 0.01
_tags = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a workload: its unit, whether more is better, and whether candidates are compared by it."""

    unit: str
    more_is_better: bool
    compared: bool = True


FIGURES: dict[str, dict[str, Figure]] = {
    "tcp": {
        "gbit_s": Figure("Gbit/s", True),
        "cpu_s_per_gb": Figure("CPU s/GB", False),
        "retransmits": Figure("retransmits", False, compared=False),
    },
    "udp": {
        "kpps": Figure("kpps", True),
        "loss": Figure("loss", False, compared=False),
        "offered_kpps": Figure("kpps offered", True, compared=False),
        "cpu_s_per_mpkt": Figure("CPU s/Mpkt", False),
    },
    "rtt": {
        "p50_us": Figure("us p50", False),
        "p90_us": Figure("us p90", False, compared=False),
        "p99_us": Figure("us p99", False),
        "loss": Figure("loss", False, compared=False),
    },
}


@dataclass(frozen=True, slots=True)
class Ends:
    """Where traffic goes in and comes out: members of the stand, the far one's address, and the MTU between them."""

    source: str
    target: str
    address: str
    mtu: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a run: what is thrown away first, and what is counted."""

    warmup: float
    seconds: float

    @property
    def flags(self) -> list[str]:
        return [f"--warmup={self.warmup}", f"--seconds={self.seconds}"]


@dataclass(frozen=True, slots=True)
class Workload:
    """`kind` is tcp, udp or rtt; `detail` the flows, the payload's bytes (or `mtu`), or `busy` and `idle`."""

    kind: str
    detail: str

    @classmethod
    def parse(cls, name: str) -> Workload:
        """Raises ConfigError."""
        match = _NAME.fullmatch(name)
        kind, detail = [part for part in match.groups() if part] if match else ("", "")
        too_few = detail.isdecimal() and not (1 if kind == "tcp" else 12) <= int(detail) <= 65_507
        if not kind or too_few or (kind == "tcp" and int(detail) > 256):
            raise ConfigError(
                f"{name!r} is no workload: take tcp-1 to tcp-256 (flows), udp-12 to udp-65507 (payload bytes), "
                "udp-mtu, rtt-busy or rtt-idle"
            )
        return cls(kind, detail)

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.detail}"

    @property
    def figures(self) -> dict[str, Figure]:
        return FIGURES[self.kind]

    def run(self, stand: Stand, ends: Ends, timing: Timing, congestion: str) -> dict[str, Any]:
        """Send once and count. Raises LabError where the generator fails or nothing arrives by TCP."""
        if self.kind == "tcp":
            return _tcp(stand, ends, timing, int(self.detail), congestion)
        if self.kind == "udp":
            size = ends.mtu - _HEADERS if self.detail == "mtu" else int(self.detail)
            return _udp(stand, ends, timing, size)
        return _rtt(stand, ends, timing, 0.0 if self.detail == "busy" else _IDLE_INTERVAL)


def _tcp(stand: Stand, ends: Ends, timing: Timing, flows: int, congestion: str) -> dict[str, Any]:
    common = [*timing.flags, f"--flows={flows}"]
    seen, sent = _pair(stand, ends, "tcp", timing, common, [*common, f"--congestion={congestion}"])
    if not seen["bytes"]:
        raise LabError(f"{ends.source} to {ends.target}: no byte arrived by TCP")
    return {
        "gbit_s": seen["bytes"] * 8 / seen["seconds"] / 1e9,
        "cpu_s_per_gb": seen["used"]["busy"] / seen["bytes"] * 1e9,
        "retransmits": sent["retransmits"],
        "stolen_s": seen["used"]["stolen"],
        "congestion": sent["congestion"],
        "seconds": seen["seconds"],
    }


def _udp(stand: Stand, ends: Ends, timing: Timing, size: int, rate: float = 0.0) -> dict[str, Any]:
    common = [*timing.flags, f"--tag={next(_tags)}"]
    seen, sent = _pair(stand, ends, "udp", timing, common, [*common, f"--size={size}", f"--rate={rate}"])
    received, seconds = seen["received"], seen["seconds"]
    return {
        "kpps": received / seconds / 1e3 if seconds else 0.0,
        "loss": 1 - received / seen["expected"] if seen["expected"] else 1.0,
        "offered_kpps": sent["sent"] / sent["seconds"] / 1e3,
        "cpu_s_per_mpkt": seen["used"]["busy"] / received * 1e6 if received else None,
        "whole_run_loss": 1 - seen["all_received"] / sent["sent"] if sent["sent"] else 1.0,
        "duplicated": seen["all_duplicated"],
        "reordered": seen["reordered"],
        "refused": sent["refused"],
        "stolen_s": seen["used"]["stolen"],
        "payload": size,
        "seconds": seconds,
    }


def _rtt(stand: Stand, ends: Ends, timing: Timing, interval: float) -> dict[str, Any]:
    flags = [*timing.flags, f"--interval={interval}"]
    with stand.open_process(ends.source, [*LOAD, "echo", ends.address, *flags]) as asking:
        try:
            seen = _result(asking, timing)
        finally:
            asking.kill()
    if "p50" not in seen:
        raise LabError(f"{ends.source} to {ends.target}: no echo was answered")
    times = {f"{name}_us": seen[name] for name in ("p50", "p90", "p99", "p999", "least", "greatest")}
    return {
        **times,
        "loss": 1 - seen["received"] / seen["sent"],
        "samples": seen["samples"],
        "cpu_s_per_mpkt": seen["used"]["busy"] / seen["received"] * 1e6,
        "stolen_s": seen["used"]["stolen"],
    }


def _pair(
    stand: Stand, ends: Ends, kind: str, timing: Timing, sink_flags: list[str], source_flags: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of a sink and a source; both processes end with the call."""
    with stand.open_process(ends.target, [*LOAD, f"{kind}-sink", *sink_flags]) as sink:
        try:
            if sink.stdout is None or sink.stdout.readline() != "ready\n":
                raise LabError(f"{ends.target}: the {kind} sink does not start")
            with stand.open_process(ends.source, [*LOAD, f"{kind}-source", ends.address, *source_flags]) as source:
                try:
                    return _result(sink, timing), _result(source, timing)
                finally:
                    source.kill()
        finally:
            sink.kill()


def _result(process: subprocess.Popen[str], timing: Timing) -> dict[str, Any]:
    patience = timing.warmup + timing.seconds + 3 * PATIENCE + 10
    try:
        output, _ = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        raise LabError(f"the load generator has not ended after {patience:.0f} s") from None
    try:
        result: dict[str, Any] = json.loads(output)
    except ValueError:
        raise LabError(f"the load generator ended with {process.returncode} and without a result") from None
    return result
