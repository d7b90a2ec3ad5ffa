"""Owns the words of a run: Markdown tables of medians and of ratios.

Free of: measuring. Invariant: a packet rate stands beside its loss, a ratio beside its interval, and what was too noisy
to be believed is marked where it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dataplane.bench import record, statistic
from dataplane.bench.profile import Profile
from dataplane.bench.record import Run
from dataplane.bench.workload import Figure, Workload

_NOISE_MARK = "~"


def markdown(run: Run, subject: str) -> str:
    """The report of a run. `subject` is the candidate whose ratios to all others are shown."""
    parts = [_heading(run)]
    for profile in run.profiles:
        if any(sample.profile == profile.name for sample in run.samples):
            parts += [_profile(run, profile), _medians(run, profile), _ratios(run, profile, subject)]
    parts.append(_notes(run))
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(run: Run) -> str:
    machine, settings = run.machine, run.settings
    load = " ".join(f"{value:.2f}" for value in machine["load_before"])
    where = f"{machine['system']}, {machine['processors']} x {machine['processor']}"
    how = f"{settings['rounds']} rounds of {settings['seconds']:g} s after {settings['warmup']:g} s of warm-up"
    return (
        f"# Benchmark of {machine['time']}{'' if run.complete else ' (broken off)'}\n\n"
        f"Loden {machine['loden']}, kernel {machine['kernel']}, {where}; load before: {load}. {how}, candidates "
        "interleaved."
    )


def _profile(run: Run, profile: Profile) -> str:
    congestion = ", ".join(_congestion(run, profile)) or profile.congestion
    return (
        f"## {profile.name.upper()}: {profile.title}\n\n{profile.description} Underlay MTU {profile.mtu}, TCP "
        f"congestion control {congestion}."
    )


def _congestion(run: Run, profile: Profile) -> list[str]:
    """As the sockets said."""
    chosen = [sample.figures for sample in run.samples if sample.profile == profile.name]
    return sorted({figures["congestion"] for figures in chosen if "congestion" in figures})


def _lines(run: Run) -> Iterator[tuple[Workload, str, Figure]]:
    for name in run.settings["workloads"]:
        workload = Workload.parse(name)
        for key, figure in workload.figures.items():
            yield workload, key, figure


def _medians(run: Run, profile: Profile) -> str:
    candidates: list[str] = run.settings["candidates"]
    rows = []
    for workload, key, figure in _lines(run):
        values = [run.values(profile.name, candidate, workload.name, key) for candidate in candidates]
        rows.append([f"{workload.name} {figure.unit}", *(_median(found, key) for found in values)])
    return "Median (least to greatest):\n\n" + table(["", *candidates], rows)


def _median(values: Sequence[float], key: str) -> str:
    if not values:
        return "-"
    found = statistic.summarize(values)
    if key == "loss":
        return f"{found.median:.2%} ({found.least:.2%} to {found.greatest:.2%})"
    noise = f" {_NOISE_MARK}" if found.noisy and key != "retransmits" else ""
    return f"**{_number(found.median)}** ({_number(found.least)} to {_number(found.greatest)}){noise}"


def _number(value: float) -> str:
    """Three significant digits, never an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratios(run: Run, profile: Profile, subject: str) -> str:
    candidates: list[str] = run.settings["candidates"]
    others = [candidate for candidate in candidates if candidate != subject]
    if subject not in candidates or not others:
        return ""
    rows = []
    for workload, key, figure in _lines(run):
        if figure.compared:
            own = run.values(profile.name, subject, workload.name, key)
            cells = [_ratio(own, run.values(profile.name, other, workload.name, key)) for other in others]
            rows.append(
                [f"{workload.name} {figure.unit} ({'more' if figure.more_is_better else 'less'} is better)", *cells]
            )
    title = f"Ratio of medians ({statistic.CONFIDENCE:.0%} bootstrap interval over rounds):\n\n"
    return title + table(["", *(f"{subject} / {other}" for other in others)], rows)


def _ratio(above: Sequence[float], below: Sequence[float]) -> str:
    try:
        found = statistic.ratio(above, below)
    except ValueError:  # a round without a result on one side, or a denominator of 0
        return "-"
    return f"**{_number(found.ratio)}** ({_number(found.low)} to {_number(found.high)})"


def _notes(run: Run) -> str:
    counted = (
        "Rates are counted by the receiver, kpps and loss in one window; offered is what the sender's kernel took."
    )
    notes = [
        f"{counted} CPU is user, system, irq and softirq time of the whole machine, the load generator's included.",
        f"{_NOISE_MARK} after a median: its samples differ by more than {statistic.NOISY:.0%} of it.",
    ]
    for sample in run.samples:
        if "failed" in sample.figures:
            where = f"{sample.profile}, round {sample.round + 1}, {sample.candidate}, {sample.workload}"
            notes.append(f"**Failed**: {where}: {sample.figures['failed']}")
    busy = [sample for sample in run.samples if sample.idle_busy >= record.BUSY]
    if busy:
        worst = max(sample.idle_busy for sample in busy)
        how_often = f"before {len(busy)} of {len(run.samples)} samples"
        notes.append(f"**Noisy machine**: {how_often} other work went on, up to {worst:.2f} processors of it.")
    stolen = sum(float(sample.figures.get("stolen_s") or 0) for sample in run.samples)
    if stolen > 0.01 * run.seconds:
        notes.append(f"**Stolen time**: the hypervisor took {stolen:.1f} processor seconds during the samples.")
    return "\n\n".join(notes)


def in_short(workload: Workload, figures: Mapping[str, Any]) -> str:
    """A sample in a line of progress: its first figure, and the loss where there is one."""
    if "failed" in figures:
        return f"{workload.name} FAILED"
    key, figure = next(iter(workload.figures.items()))
    loss = f" ({figures['loss']:.1%} lost)" if figures.get("loss") else ""
    return f"{workload.name} {_number(figures[key])} {figure.unit}{loss}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is words, the others are numbers."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
