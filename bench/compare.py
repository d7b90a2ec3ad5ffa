"""Owns the comparison of two runs: which ratios have changed by more than the noise, and which of these are
regressions.

Two sessions on one machine differ by 15 % for reasons of their own, so what is compared is a candidate's ratio to a
reference that both runs have measured, and only without such a one its figures. Free of: where runs are kept.
Invariant: a change counts only if its whole 99 % interval lies on one side of 1, and the change itself is beyond the
tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dataplane.bench import statistic
from dataplane.bench.document import Block, Heading, Table, Text
from dataplane.bench.record import Run
from dataplane.bench.statistic import Ratio
from dataplane.bench.words import percent, plain
from dataplane.bench.workload import Figure, Workload
from dataplane.errors import ConfigError

REFERENCES = ("kernel-vxlan", "baseline", "raw")
"""In this order of preference: paths that a change of ours does not touch."""
TOLERANCE = 0.1
MORE_LOST = 0.01
"""A loss that has grown by more than this share of the datagrams, in every round, is a regression as well."""


@dataclass(frozen=True, slots=True)
class Change:
    """Of one figure of one candidate. `verdict`: worse, better, or empty within the noise. `regression`: it is ours."""

    profile: str
    candidate: str
    what: str
    old: str
    new: str
    ratio: Ratio | None
    verdict: str
    regression: bool


def reference_of(old: Run, new: Run) -> str | None:
    both = set(old.settings.candidates) & set(new.settings.candidates)
    ours = {*old.settings.ours, *new.settings.ours}
    return next((name for name in REFERENCES if name in both and both & ours), None)


def compare(old: Run, new: Run, tolerance: float = TOLERANCE) -> list[Change]:
    """Every figure that both runs have. Raises ConfigError where there is none."""
    reference = reference_of(old, new)
    found = [
        change
        for profile in [one.name for one in old.profiles if one.name in [other.name for other in new.profiles]]
        for name in old.settings.workloads
        if name in new.settings.workloads
        for candidate in old.settings.candidates
        if candidate in new.settings.candidates and candidate != reference
        for change in _changes(old, new, profile, Workload.parse(name), candidate, reference, tolerance)
    ]
    if not found:
        raise ConfigError("the two runs have no profile, workload and candidate in common")
    return found


def _changes(
    old: Run, new: Run, profile: str, workload: Workload, candidate: str, reference: str | None, tolerance: float
) -> Iterator[Change]:
    ours = candidate in new.settings.ours
    for key, figure in workload.figures.items():
        if figure.compared:
            before, after = (_pairs(run, profile, workload, candidate, reference, key) for run in (old, new))
            try:
                found = statistic.change(before, after)
            except ValueError:  # not measured in one of them, or 0
                continue
            verdict = _verdict(found, figure, tolerance)
            then, now = (plain(statistic.of_medians(pairs)) for pairs in (before, after))
            what = f"{workload.name} {figure.unit}"
            yield Change(profile, candidate, what, then, now, found, verdict, ours and verdict == "worse")
        elif key == "loss":
            losses = [run.values(profile, candidate, workload.name, key) for run in (old, new)]
            if all(losses) and min(losses[1]) > max(losses[0]) + MORE_LOST:
                then, now = (percent(statistic.summarize(one).median) for one in losses)
                yield Change(profile, candidate, f"{workload.name} loss", then, now, None, "worse", ours)


def _pairs(
    run: Run, profile: str, workload: Workload, candidate: str, reference: str | None, key: str
) -> list[tuple[float, float]]:
    """By round: the candidate's figure, and the reference's or 1."""
    above = run.by_round(profile, candidate, workload.name, key)
    if reference is None:
        return [(value, 1.0) for value in above.values()]
    below = run.by_round(profile, reference, workload.name, key)
    return [(above[number], below[number]) for number in above if number in below]


def _verdict(found: Ratio, figure: Figure, tolerance: float) -> str:
    if found.low <= 1 <= found.high or 1 / (1 + tolerance) <= found.ratio <= 1 + tolerance:
        return ""
    return "better" if (found.ratio > 1) == figure.more_is_better else "worse"


def blocks(old: Run, new: Run, changes: list[Change]) -> list[Block]:
    """The comparison in words: what has changed, and a count of what has not."""
    reference = reference_of(old, new)
    of = f"Figures are ratios to `{reference}` of the same round." if reference else "Figures are compared as they are."
    found: list[Block] = [
        Heading(1, f"{old.machine['time']} → {new.machine['time']}"),
        Text(f"{of} Within the noise: {sum(not one.verdict for one in changes)} of {len(changes)}."),
    ]
    found += [
        Text(f"**Another machine**: {key} was {old.machine[key]}, is {new.machine[key]}.")
        for key in ("processor", "processors", "kernel")
        if old.machine[key] != new.machine[key]
    ]
    rows = [
        [
            f"{one.profile} {one.candidate} {one.what}",
            one.old,
            one.new,
            f"{plain(one.ratio.ratio)} ({plain(one.ratio.low)} to {plain(one.ratio.high)})" if one.ratio else "-",
            f"**{one.verdict}**" if one.regression else one.verdict,
        ]
        for one in changes
        if one.verdict
    ]
    if rows:
        found.append(Table("", ["", "old", "new", "change (99 % interval)", ""], rows))
    return found
