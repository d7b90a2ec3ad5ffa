"""Owns the method: in which order candidates, profiles and workloads are run, and what is recorded of it.

Candidates take turns within each round; their order moves on by one from round to round and is reversed in every second
one, so that neither a drift of the machine nor a predecessor favours any. Free of: how a path is made or loaded.
Invariant: what was measured is on disk after each round, also when the run is broken off; a candidate that does not
come up is a result, and the others are measured all the same. """

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataplane.bench import record, report
from dataplane.bench.candidate import Candidate, Raw, carrying
from dataplane.bench.ends import Ends, Timing
from dataplane.bench.profile import Profile
from dataplane.bench.record import Run, Sample, Settings
from dataplane.bench.stand import Stand, raised
from dataplane.bench.workload import Workload
from dataplane.errors import ConfigError, LodenError

_PROVEN = ("tcp", "udp")
"""Kinds of workload whose figure could be the generator's instead of the path's."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run. `arguments`: the command line, for the record."""

    candidates: Sequence[Candidate]
    profiles: Sequence[Profile]
    workloads: Sequence[Workload]
    rounds: int
    timing: Timing
    directory: Path
    name: str = "bench"
    """Of the stand; two runs at a time need two, and would measure each other."""
    arguments: Sequence[str] = ()
    patience: float = 5.0
    """Seconds at most, and two samples at most, for which a sample waits until the machine is idle."""

    @property
    def steps(self) -> int:
        return len(self.profiles) * self.rounds * len(self.candidates)


def order(candidates: Sequence[Candidate], number: int) -> list[Candidate]:
    """The turns of round `number`, counted from 0."""
    turned = number % len(candidates)
    rotated = [*candidates[turned:], *candidates[:turned]]
    return rotated[::-1] if number % 2 else rotated


def execute(plan: Plan, say: Callable[[str], None]) -> Run:
    """Run it all, and leave the result and its report in the plan's directory. Raises LodenError."""
    settings = Settings(
        candidates=[candidate.name for candidate in plan.candidates],
        ours=[candidate.name for candidate in plan.candidates if candidate.ours],
        workloads=[workload.name for workload in plan.workloads],
        rounds=plan.rounds,
        seconds=plan.timing.seconds,
        warmup=plan.timing.warmup,
        arguments=list(plan.arguments),
    )
    run = Run(machine=record.machine(), settings=settings, profiles=list(plan.profiles))
    began = time.monotonic()
    plan.directory.mkdir(parents=True, exist_ok=True)
    try:
        with raised(plan.name) as stand:
            _rounds(plan, stand, run, say)
        run.complete = True
    finally:
        run.seconds = time.monotonic() - began
        run.write(plan.directory)
        report.write(run, plan.directory)
    return run


def _rounds(plan: Plan, stand: Stand, run: Run, say: Callable[[str], None]) -> None:
    done, began = 0, time.monotonic()
    for profile in plan.profiles:
        stand.set_underlay(profile.ethtool, profile.mtu, loss=profile.loss, delay_ms=profile.delay_ms)
        run.features[profile.name] = stand.features("n1")
        _prove(plan, stand, run, profile, say)
        for number in range(plan.rounds):
            for candidate in order(plan.candidates, number):
                said = _turn(plan, stand, run, profile, number, candidate)
                done += 1
                left = (time.monotonic() - began) / done * (plan.steps - done)
                where = f"{profile.name} {number + 1}/{plan.rounds} {candidate.name:<12}"
                say(f"{int(left) // 60:3d}:{int(left) % 60:02d} left  {where} {said}")
            run.write(plan.directory)


def _prove(plan: Plan, stand: Stand, run: Run, profile: Profile, say: Callable[[str], None]) -> None:
    """What the generator gives without a tunnel, where no candidate shows it."""
    workloads = [one for one in plan.workloads if one.kind in _PROVEN and "@" not in one.name]
    if not workloads or any(isinstance(candidate, Raw) for candidate in plan.candidates):
        return
    with carrying(Raw(), stand) as ends:
        found = [_sample(plan, stand, ends, profile, 0, Raw.name, workload) for workload in workloads]
    run.proof += found
    words = "  ".join(report.in_short(workload, one.figures) for workload, one in zip(workloads, found, strict=True))
    say(f"the generator without a tunnel, {profile.name}: {words}")


def _turn(plan: Plan, stand: Stand, run: Run, profile: Profile, number: int, candidate: Candidate) -> str:
    """All workloads on one candidate, once; the words for it."""
    words, todo = [], list(plan.workloads)
    starts = run.starts.setdefault(candidate.name, [])
    try:
        with carrying(candidate, stand) as ends:
            starts.append(ends.starts)
            while todo:
                sample = _sample(plan, stand, ends, profile, number, candidate.name, todo[0])
                run.samples.append(sample)
                words.append(report.in_short(todo.pop(0), sample.figures))
    except ConfigError:  # no turn of any candidate could be better
        raise
    except LodenError as error:  # it did not come up, or down
        if len(todo) == len(plan.workloads):
            starts.append(0)
        failed = {"failed": str(error)}
        run.samples += [Sample(profile.name, number, candidate.name, one.name, failed, 0.0, 0.0) for one in todo]
        words.append(f"FAILED: {str(error).splitlines()[0]}")
    return "  ".join(words)


def _sample(
    plan: Plan, stand: Stand, ends: Ends, profile: Profile, number: int, candidate: str, workload: Workload
) -> Sample:
    waited, busy = record.wait_until_idle(min(plan.patience, 2 * plan.timing.seconds))
    try:
        figures = workload.run(stand, ends, plan.timing, profile.congestion)
    except LodenError as error:  # a path that carries nothing is a result; the others are still wanted
        figures = {"failed": str(error)}
    return Sample(profile.name, number, candidate, workload.name, figures, waited, busy)
