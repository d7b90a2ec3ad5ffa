"""Owns the workloads: their names, what is measured by each, and which figures a report shows of them.

Free of: how a sample is taken. Invariant: a figure stands once, with its unit and which way is better; a packet rate
always has its loss beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dataplane.bench import capturing, composite, exchange
from dataplane.bench.ends import MOST_FAR, Ends, Timing
from dataplane.bench.stand import Stand
from dataplane.errors import ConfigError

_MOST_FLOWS = 256
_PAYLOADS = range(12, 65_508)


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a workload: its unit, whether more is better, and whether candidates are compared by it."""

    unit: str
    more_is_better: bool
    compared: bool = True


_PACKETS = {
    "kpps": Figure("kpps", True),
    "loss": Figure("loss", False, compared=False),
    "offered_kpps": Figure("kpps offered", True, compared=False),
    "cpu_s_per_mpkt": Figure("CPU s/Mpkt", False),
    "tunnel_cpu_s_per_mpkt": Figure("CPU s/Mpkt of the tunnel's processes", False, compared=False),
}
_TRIPS = {
    "p50_us": Figure("us p50", False),
    "p90_us": Figure("us p90", False, compared=False),
    "p99_us": Figure("us p99", False),
    "p999_us": Figure("us p99.9", False, compared=False),
    "loss": Figure("loss", False, compared=False),
}


def _beside(disturbed: str, quiet: str) -> dict[str, Figure]:
    return {
        "gap_ms": Figure(f"ms, longest gap {disturbed}", False, compared=False),
        "quiet_gap_ms": Figure(f"ms, longest gap {quiet}", False, compared=False),
        "loss": Figure(f"loss {disturbed}", False, compared=False),
        "quiet_loss": Figure(f"loss {quiet}", False, compared=False),
    }


FIGURES: dict[str, Mapping[str, Figure]] = {
    "tcp": {
        "gbit_s": Figure("Gbit/s", True),
        "cpu_s_per_gb": Figure("CPU s/GB", False),
        "tunnel_cpu_s_per_gb": Figure("CPU s/GB of the tunnel's processes", False, compared=False),
        "retransmits": Figure("retransmits", False, compared=False),
    },
    "udp": _PACKETS,
    "sweep": {
        "kpps": Figure("kpps with under 0.1 % lost", True),
        "loss": Figure("loss", False, compared=False),
    },
    "rtt": _TRIPS,
    "rtt-load": {**_TRIPS, "beside_gbit_s": Figure("Gbit/s beside it", True, compared=False)},
    "connect": {
        "connections_s": Figure("connections/s", True),
        "cpu_s_per_mconn": Figure("CPU s per million", False, compared=False),
        "failed_connections": Figure("failed", False, compared=False),
    },
    "peers": {
        "kpps_one": Figure("kpps to one", True),
        "loss_one": Figure("loss to one", False, compared=False),
        "kpps_all": Figure("kpps to all", True),
        "loss_all": Figure("loss to all", False, compared=False),
        "settled_s": Figure("s until all leases were taken", False, compared=False),
    },
    "publish": {
        **_beside("while leases change", "while the store is written elsewhere"),
        "kpps": Figure("kpps", True, compared=False),
        "changed_s": Figure("s to write the change", False, compared=False),
    },
    "table": {
        **_beside("while the table is replaced", "without"),
        "kpps": Figure("kpps while the table is replaced", True, compared=False),
        "quiet_kpps": Figure("kpps without", True, compared=False),
        "published_ms": Figure("ms for a new table", False, compared=False),
    },
    "gil": {
        "held_kpps": Figure("kpps with the GIL held", True, compared=False),
        "quiet_kpps": Figure("kpps without", True, compared=False),
        "held_gap_ms": Figure("ms, longest gap with the GIL held", False, compared=False),
        "quiet_gap_ms": Figure("ms, longest gap without", False, compared=False),
        "empty_slices": Figure("slices of 10 ms without a packet", False, compared=False),
        "loss": Figure("loss", False, compared=False),
    },
    "capture": {
        "never_kpps": Figure("kpps before any capture", True, compared=False),
        "off_kpps": Figure("kpps after one", True, compared=False),
        "nothing_kpps": Figure("kpps with one that sees nothing", True, compared=False),
        "all_kpps": Figure("kpps with one of everything", True, compared=False),
        "loss": Figure("loss, of all", False, compared=False),
        "off_share": Figure("after one / before any", True, compared=False),
        "nothing_share": Figure("sees nothing / after one", True, compared=False),
        "all_share": Figure("everything / after one", True, compared=False),
        "recorded": Figure("of everything recorded", True, compared=False),
    },
}

_Run = Callable[[Stand, Ends, Timing, str], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Workload:
    """`kind` chooses the figures; `detail` is what its name says behind that."""

    name: str
    kind: str
    detail: str
    _run: _Run

    @classmethod
    def parse(cls, name: str) -> Workload:
        """Raises ConfigError."""
        for pattern, kind, make in _NAMES:
            if match := re.fullmatch(pattern, name):
                run = make(*match.groups())
                if run is not None:
                    return cls(name, kind, name.removeprefix(kind).removeprefix("-"), run)
        raise ConfigError(f"{name!r} is no workload: take one of {SYNTAX}")

    @property
    def figures(self) -> Mapping[str, Figure]:
        return FIGURES[self.kind]

    @property
    def needs_leases(self) -> bool:
        return self.kind in ("peers", "publish")

    @property
    def needs_disturbing(self) -> bool:
        return self.kind in ("table", "gil")

    def run(self, stand: Stand, ends: Ends, timing: Timing, congestion: str) -> dict[str, Any]:
        """Sample once. `skipped` instead of figures where the candidate has no means for it. Raises LodenError where
        the generator fails or nothing arrives."""
        return self._run(stand, ends, timing, congestion)


SYNTAX = (
    "tcp-FLOWS[-down|-both], udp-BYTES[@RATE], udp-mtu[@RATE], sweep-BYTES, sweep-mtu, rtt-busy, rtt-idle, rtt-load, "
    f"connect, peers-COUNT (up to {MOST_FAR}), publish, table, gil, capture"
)


def _tcp(flows: str, direction: str | None) -> _Run | None:
    if not 1 <= int(flows) <= _MOST_FLOWS:
        return None
    return lambda stand, ends, timing, congestion: exchange.tcp(
        stand, ends, timing, int(flows), direction or "up", congestion
    )


def _size(detail: str, ends: Ends) -> int:
    return ends.mtu - exchange.HEADERS if detail == "mtu" else int(detail)


def _udp(detail: str, rate: str | None) -> _Run | None:
    if detail != "mtu" and int(detail) not in _PAYLOADS:
        return None
    return lambda stand, ends, timing, _: exchange.udp(
        stand, ends, timing, _size(detail, ends), float(rate) if rate else 0.0
    )


def _sweep(detail: str) -> _Run | None:
    if detail != "mtu" and int(detail) not in _PAYLOADS:
        return None
    return lambda stand, ends, timing, _: composite.sweep(stand, ends, timing, _size(detail, ends))


def _rtt(detail: str) -> _Run:
    interval = 0.0 if detail == "busy" else exchange.IDLE_INTERVAL
    return lambda stand, ends, timing, _: exchange.rtt(stand, ends, timing, interval)


def _peers(count: str) -> _Run | None:
    if not 1 <= int(count) <= MOST_FAR:
        return None
    return lambda stand, ends, timing, _: composite.peers(stand, ends, timing, int(count))


_NAMES: tuple[tuple[str, str, Callable[..., _Run | None]], ...] = (
    (r"tcp-(\d{1,3})(?:-(down|both))?", "tcp", _tcp),
    (r"udp-(\d{1,5}|mtu)(?:@(\d{1,7}))?", "udp", _udp),
    (r"sweep-(\d{1,5}|mtu)", "sweep", _sweep),
    (r"rtt-(busy|idle)", "rtt", _rtt),
    (r"rtt-load", "rtt-load", lambda: exchange.rtt_under_load),
    (r"connect", "connect", lambda: lambda stand, ends, timing, _: exchange.connect(stand, ends, timing)),
    (r"peers-(\d{1,5})", "peers", _peers),
    (r"publish", "publish", lambda: lambda stand, ends, timing, _: composite.publish(stand, ends, timing)),
    (r"table", "table", lambda: lambda stand, ends, timing, _: composite.table(stand, ends, timing)),
    (r"gil", "gil", lambda: lambda stand, ends, timing, _: composite.gil(stand, ends, timing)),
    (r"capture", "capture", lambda: lambda stand, ends, timing, _: capturing.capture(stand, ends, timing)),
)
