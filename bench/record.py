"""Owns what a run leaves: the machine that it ran on, every sample, and one JSON file with a schema version.

Free of: what the samples say (see report.py). Invariant: the file is written whole or not at all, and says of itself
whether the run came to its end.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from dataplane import __version__
from dataplane.bench._load import processor_time
from dataplane.bench.profile import Profile
from dataplane.errors import ConfigError

SCHEMA = "loden-bench/2"
BUSY = 0.1
"""Of one processor: what may go on beside a sample."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One workload on one candidate in one round. `figures`: see workload.FIGURES, and what else the generator said.

    `waited`: seconds until the machine was idle enough; `idle_busy`: how busy it then still was, in processors.
    """

    profile: str
    round: int
    candidate: str
    workload: str
    figures: dict[str, Any]
    waited: float
    idle_busy: float


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked for. `ours`: which candidates are Loden's; `arguments`: the command line behind `loden`."""

    candidates: list[str]
    ours: list[str]
    workloads: list[str]
    rounds: int
    seconds: float
    warmup: float
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Run:
    """Everything of one run."""

    machine: dict[str, Any]
    settings: Settings
    profiles: list[Profile]
    features: dict[str, dict[str, bool]] = field(default_factory=dict)
    """Per profile: the underlay's offloads as they were, read back from the device."""
    samples: list[Sample] = field(default_factory=list)
    proof: list[Sample] = field(default_factory=list)
    """The generator to its sink without a tunnel, once for each profile, where `raw` is no candidate."""
    starts: dict[str, list[int]] = field(default_factory=dict)
    """Per candidate and turn: how many starts it took; 0 where none carried."""
    seconds: float = 0.0
    complete: bool = False

    def values(self, profile: str, candidate: str, workload: str, figure: str) -> list[float]:
        """A figure by round; rounds without one are left out."""
        return list(self.by_round(profile, candidate, workload, figure).values())

    def by_round(self, profile: str, candidate: str, workload: str, figure: str) -> dict[int, float]:
        """A figure for each round that has one."""
        chosen = [s for s in self.samples if (s.profile, s.candidate, s.workload) == (profile, candidate, workload)]
        found = {sample.round: sample.figures.get(figure) for sample in chosen}
        return {number: float(value) for number, value in sorted(found.items()) if value is not None}

    def write(self, directory: Path) -> Path:
        """`run.json` in the directory."""
        document = {"schema": SCHEMA, **asdict(self)}
        path, temporary = directory / "run.json", directory / "run.json.new"
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        temporary.replace(path)
        return path

    @classmethod
    def read(cls, path: Path) -> Run:
        """From the file, or from a directory that has it. Raises ConfigError where it is none of ours."""
        path = path / "run.json" if path.is_dir() else path
        try:
            document = json.loads(path.read_text())
            if document.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            return msgspec.convert(document, cls)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no {SCHEMA} file: {error}") from None


def schema() -> dict[str, Any]:
    """The JSON Schema of run.json."""
    found = msgspec.json.schema(Run)
    run = found["$defs"]["Run"]
    run["properties"] = {"schema": {"const": SCHEMA}, **run["properties"]}
    run["required"] = ["schema", *run["required"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": SCHEMA, **found}


def machine() -> dict[str, Any]:
    """Facts about this machine, and its load before the run."""
    model = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal:")]
    release = dict(line.split("=", 1) for line in _lines("/etc/os-release") if "=" in line)
    return {
        "loden": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": platform.release(),
        "kernel_version": platform.version(),
        "system": release.get("PRETTY_NAME", "").strip('"'),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("uvloop", "Cython")},
        "processors": len(os.sched_getaffinity(0)),
        "processor": model[0] if model else platform.machine(),
        "memory_mib": int(memory[0]) // 1024 if memory else None,
        "default_congestion": " ".join(_lines("/proc/sys/net/ipv4/tcp_congestion_control")),
        "load_before": list(os.getloadavg()),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _lines(path: str) -> Sequence[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def wait_until_idle(patience: float, busy: float = BUSY) -> tuple[float, float]:
    """Until all processors together are less busy than `busy` of one, at most `patience` seconds: (seconds waited, how
    busy they were at last)."""
    began = time.monotonic()
    while True:
        at, (before, _) = time.monotonic(), processor_time()
        time.sleep(0.2)
        now = (processor_time()[0] - before) / (time.monotonic() - at)
        waited = time.monotonic() - began
        if now < busy or waited > patience:
            return waited, now
