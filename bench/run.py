"""Owns the method: in which order candidates, profiles and workloads are run, and what is recorded of it.

Candidates take turns within each round; their order moves on by one from round to round and is reversed in every second
one, so that neither a drift of the machine nor a predecessor favours any. Free of: how a path is made or loaded.
Invariant: what was measured is on disk after each round, also when the run is broken off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataplane.bench import record, report
from dataplane.bench.candidate import Candidate, carrying
from dataplane.bench.profile import Profile
from dataplane.bench.record import Run, Sample
from dataplane.bench.stand import Stand, raised
from dataplane.bench.workload import Timing, Workload
from dataplane.lab import LabError


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run. `subject`: the candidate that the report compares with the others."""

    candidates: Sequence[Candidate]
    profiles: Sequence[Profile]
    workloads: Sequence[Workload]
    rounds: int
    timing: Timing
    directory: Path
    subject: str
    name: str = "bench"
    """Of the stand; two runs at a time need two, and would measure each other."""

    @property
    def steps(self) -> int:
        return len(self.profiles) * self.rounds * len(self.candidates)


def order(candidates: Sequence[Candidate], number: int) -> list[Candidate]:
    """The turns of round `number`, counted from 0."""
    turned = number % len(candidates)
    rotated = [*candidates[turned:], *candidates[:turned]]
    return rotated[::-1] if number % 2 else rotated


def execute(plan: Plan, say: Callable[[str], None]) -> Run:
    """Run it all, and leave run.json and report.md in the plan's directory. Raises LodenError."""
    settings = {
        "candidates": [candidate.name for candidate in plan.candidates],
        "workloads": [workload.name for workload in plan.workloads],
        "rounds": plan.rounds,
        "seconds": plan.timing.seconds,
        "warmup": plan.timing.warmup,
    }
    run = Run(machine=record.machine(), settings=settings, profiles=list(plan.profiles))
    began = time.monotonic()
    plan.directory.mkdir(parents=True, exist_ok=True)
    try:
        with raised(plan.name) as stand:
            _rounds(plan, stand, run, say)
        run.complete = True
    finally:
        run.seconds = time.monotonic() - began
        _keep(plan, run)
    return run


def _rounds(plan: Plan, stand: Stand, run: Run, say: Callable[[str], None]) -> None:
    done, began = 0, time.monotonic()
    for profile in plan.profiles:
        stand.set_offloads(profile.ethtool, profile.mtu)
        run.features[profile.name] = stand.features("n1")
        for number in range(plan.rounds):
            for candidate in order(plan.candidates, number):
                figures = _turn(plan, stand, run, profile, number, candidate)
                done += 1
                left = (time.monotonic() - began) / done * (plan.steps - done)
                where = f"{profile.name} {number + 1}/{plan.rounds} {candidate.name:<12}"
                say(f"{int(left) // 60:3d}:{int(left) % 60:02d} left  {where} {figures}")
            _keep(plan, run)


def _turn(plan: Plan, stand: Stand, run: Run, profile: Profile, number: int, candidate: Candidate) -> str:
    """All workloads on one candidate, once; the words for it."""
    words = []
    with carrying(candidate, stand) as ends:
        for workload in plan.workloads:
            waited, busy = record.wait_until_idle(min(5.0, 2 * plan.timing.seconds))
            try:
                figures = workload.run(stand, ends, plan.timing, profile.congestion)
            except LabError as error:  # a path that carries nothing is a result; the others are still wanted
                figures = {"failed": str(error)}
            run.samples.append(Sample(profile.name, number, candidate.name, workload.name, figures, waited, busy))
            words.append(report.in_short(workload, figures))
    return "  ".join(words)


def _keep(plan: Plan, run: Run) -> None:
    run.write(plan.directory)
    (plan.directory / "report.md").write_text(report.markdown(run, plan.subject))
