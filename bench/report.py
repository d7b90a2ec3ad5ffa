"""Owns the report of a run: what it says, in which order, and the files that it is written to.

Free of: measuring, drawing and markup. Invariant: a packet rate stands beside its loss, a ratio beside its interval,
and what was too noisy to be believed is marked where it stands."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataplane.bench import document, record, statistic
from dataplane.bench.document import Block, Heading, Picture, Table, Text
from dataplane.bench.pictures import pictures
from dataplane.bench.profile import Profile
from dataplane.bench.pytest_json import benchmarks
from dataplane.bench.record import Run
from dataplane.bench.words import percent, plain
from dataplane.bench.workload import Figure, Workload
from dataplane.errors import ConfigError

_NOISE_MARK = "~"
_NEAR = 0.8
"""Of the generator's own rate: a candidate above that may be limited by it."""
_COUNTED = ("retransmits", "failed_connections", "empty_slices")
"""Figures that are counts of rare events, whose spread says nothing."""
_MARKS = "<!-- begin of what `loden bench report --into` writes -->", "<!-- end of it -->"
_GLANCE = ("kernel-vxlan", "baseline")
"""What everybody compares with: flannel's default, and flannel's udp."""


def write(run: Run, directory: Path) -> list[Path]:
    """report.md with its pictures, report.html that has all in one, and the file for pytest-benchmark."""
    return write_all([run], directory)


def write_all(runs: Sequence[Run], directory: Path) -> list[Path]:
    """Several runs one after the other in one report; the pictures of the second and later ones get its number."""
    directory.mkdir(parents=True, exist_ok=True)
    written, blocks = [], list[Block]()
    for number, run in enumerate(runs):
        for block in blocks_of(run):
            if isinstance(block, Picture):
                block = replace(block, file=_file(block, number))
                written.append(_written(directory / block.file, block.svg))
            blocks.append(block)
        export = f"pytest-benchmark{'' if number == 0 else f'-{number + 1}'}.json"
        written.append(_written(directory / export, benchmarks(run)))
    title = f"Loden benchmark, {runs[0].machine['time']}"
    written.append(_written(directory / "report.md", document.markdown(blocks)))
    written.append(_written(directory / "report.html", document.html(title, blocks)))
    return written


def into(runs: Sequence[Run], page: Path) -> list[Path]:
    """Put what is seen first of the runs, their command lines, ratios and pictures, between two marks of a Markdown
    file, and everything into the folder beside it that has its name. Raises ConfigError where the marks are not
    there."""
    begin, end = _MARKS
    try:
        before, found, rest = page.read_text().partition(begin)
    except OSError as error:
        raise ConfigError(f"{page}: {error.strerror}") from None
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ConfigError(f"{page} has no place for a report: it goes between the lines {begin} and {end}")
    folder = page.with_suffix("")
    written = write_all(runs, folder)
    shown: list[Block] = []
    for number, run in enumerate(runs):
        heading, *said = _heading(run)
        shown += [Heading(3, heading.words) if isinstance(heading, Heading) else heading, *said]
        for block in _glance(run):
            shown.append(Heading(block.level + 2, block.words) if isinstance(block, Heading) else block)
        shown += [replace(one, file=f"{folder.name}/{_file(one, number)}") for one in pictures(run)]
    shown.append(Text(f"Every median, ratio and note: [{folder.name}/report.md]({folder.name}/report.md)."))
    page.write_text(f"{before}{begin}\n\n{document.markdown(shown)}\n{end}{after}")
    return [page, *written]


def _file(picture: Picture, number: int) -> str:
    return picture.file if number == 0 else f"run{number + 1}-{picture.file}"


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def markdown(run: Run) -> str:
    return document.markdown(blocks_of(run))


def blocks_of(run: Run) -> list[Block]:
    """The whole report of one run."""
    blocks: list[Block] = [*_heading(run), *_glance(run)]
    if shown := pictures(run):
        blocks += [Heading(2, "Pictures"), *shown]
    for profile in run.profiles:
        if any(sample.profile == profile.name for sample in run.samples):
            blocks += [*_profile(run, profile), *_medians(run, profile), *_ratios(run, profile)]
    return [*blocks, Heading(2, "Notes"), *(Text(note) for note in _notes(run))]


def _heading(run: Run) -> list[Block]:
    machine, settings = run.machine, run.settings
    load = " ".join(f"{value:.2f}" for value in machine["load_before"])
    where = f"{machine['system']}, {machine['processors']} x {machine['processor']}"
    how = f"{settings.rounds} rounds of {settings.seconds:g} s after {settings.warmup:g} s of warm-up"
    found: list[Block] = [
        Heading(1, f"Benchmark of {machine['time']}{'' if run.complete else ' (broken off)'}"),
        Text(
            f"Loden {machine['loden']}, kernel {machine['kernel']}, {where}; load before: {load}. {how}, candidates "
            f"interleaved; {run.seconds / 60:.1f} minutes in all."
        ),
    ]
    if settings.arguments:
        found.append(Text(f"`loden {shlex.join(settings.arguments)}`"))
    return found


def _glance(run: Run) -> list[Block]:
    """The ratios of ours to what everybody compares with, all profiles side by side."""
    found: list[Block] = []
    for own in run.settings.ours:
        for other in _GLANCE:
            if other not in run.settings.candidates:
                continue
            rows = []
            for workload, key, figure in _lines(run):
                if figure.compared:
                    cells = [_ratio(run, profile, own, other, workload, key) for profile in run.profiles]
                    if any(cell != "-" for cell in cells):
                        rows.append([_named(workload, figure), *cells])
            if rows:
                header = ["", *(profile.name.upper() for profile in run.profiles)]
                found += [Heading(3, f"{own} / {other}"), Table("", header, rows)]
    return [Heading(2, "At a glance"), *found] if found else []


def _profile(run: Run, profile: Profile) -> list[Block]:
    congestion = ", ".join(_congestion(run, profile)) or profile.congestion
    bad = f", {percent(profile.loss)} of the frames lost each way" if profile.loss else ""
    slow = f", {profile.delay_ms:g} ms of delay each way" if profile.delay_ms else ""
    return [
        Heading(2, f"{profile.name.upper()}: {profile.title}"),
        Text(f"{profile.description} Underlay MTU {profile.mtu}{bad}{slow}, TCP congestion control {congestion}."),
    ]


def _congestion(run: Run, profile: Profile) -> list[str]:
    """As the sockets said."""
    chosen = [sample.figures for sample in run.samples if sample.profile == profile.name]
    return sorted({figures["congestion"] for figures in chosen if "congestion" in figures})


def _lines(run: Run) -> Iterator[tuple[Workload, str, Figure]]:
    for name in run.settings.workloads:
        workload = Workload.parse(name)
        for key, figure in workload.figures.items():
            yield workload, key, figure


def _named(workload: Workload, figure: Figure) -> str:
    return f"{workload.name} {figure.unit} ({'more' if figure.more_is_better else 'less'} is better)"


def _medians(run: Run, profile: Profile) -> list[Block]:
    candidates = run.settings.candidates
    rows = []
    for workload, key, figure in _lines(run):
        cells = [_median(run.values(profile.name, candidate, workload.name, key), key) for candidate in candidates]
        if any(cell != "-" for cell in cells):
            rows.append([f"{workload.name} {figure.unit}", *cells])
    return [Table("Median (least to greatest):", ["", *candidates], rows)]


def _median(values: Sequence[float], key: str) -> str:
    if not values:
        return "-"
    found = statistic.summarize(values)
    if "loss" in key:
        return f"{percent(found.median)} ({percent(found.least)} to {percent(found.greatest)})"
    if key in _COUNTED:
        return f"{found.median:.0f} ({found.least:.0f} to {found.greatest:.0f})"
    noise = f" {_NOISE_MARK}" if found.noisy else ""
    return f"**{plain(found.median)}** ({plain(found.least)} to {plain(found.greatest)}){noise}"


def _ratios(run: Run, profile: Profile) -> list[Block]:
    """A table for each of ours, beside all others."""
    found: list[Block] = []
    for own in run.settings.ours:
        others = [candidate for candidate in run.settings.candidates if candidate != own]
        rows = []
        for workload, key, figure in _lines(run):
            if figure.compared:
                cells = [_ratio(run, profile, own, other, workload, key) for other in others]
                if any(cell != "-" for cell in cells):
                    rows.append([_named(workload, figure), *cells])
        if rows:
            title = f"`{own}`: ratio of medians ({statistic.CONFIDENCE * 100:.0f} % bootstrap interval over rounds):"
            found.append(Table(title, ["", *(f"{own} / {other}" for other in others)], rows))
    return found


def _ratio(run: Run, profile: Profile, own: str, other: str, workload: Workload, key: str) -> str:
    above, below = (run.by_round(profile.name, name, workload.name, key) for name in (own, other))
    rounds = above.keys() & below.keys()
    try:
        found = statistic.ratio([above[number] for number in rounds], [below[number] for number in rounds])
    except ValueError:  # no round has both, or a denominator is 0
        return "-"
    return f"**{plain(found.ratio)}** ({plain(found.low)} to {plain(found.high)})"


def _notes(run: Run) -> Iterator[str]:
    yield (
        "Rates are counted by the receiver, kpps and loss in one window; offered is what the sender's kernel took. "
        "CPU is the time in which processors of the whole machine were not idle, the load generator's included; that "
        "of the tunnel's processes is by the scheduler's clock, with what interrupts did on top of them."
    )
    yield f"{_NOISE_MARK} after a median: its samples differ by more than {statistic.NOISY * 100:.0f} % of it."
    yield from _on_generator(run)
    yield from _on_failures(run)
    busy = [sample for sample in run.samples if sample.idle_busy >= record.BUSY]
    if busy:
        worst = max(sample.idle_busy for sample in busy)
        how_often = f"before {len(busy)} of {len(run.samples)} samples"
        yield f"**Noisy machine**: {how_often} other work went on, up to {worst:.2f} processors of it."
    noisy = _spread(run)
    if noisy:
        bound = f"{statistic.NOISY * 100:.0f} %"
        yield f"**Noisy figures**: of {noisy * 100:.0f} % of the medians the samples differ by more than {bound}."
    stolen = sum(float(sample.figures.get("stolen_s") or 0) for sample in run.samples)
    if stolen > 0.01 * run.seconds:
        yield f"**Stolen time**: the hypervisor took {stolen:.1f} processor seconds during the samples."


def _spread(run: Run) -> float:
    """Share of the compared figures that are too noisy; 0 where it is a tenth or less."""
    found = []
    for profile in run.profiles:
        for workload, key, figure in _lines(run):
            if figure.compared:
                values = (run.values(profile.name, name, workload.name, key) for name in run.settings.candidates)
                found += [statistic.summarize(one).noisy for one in values if one]
    share = sum(found) / len(found) if found else 0.0
    return share if share > 0.1 else 0.0


def _on_generator(run: Run) -> Iterator[str]:
    """Whether the generator could have been the limit: its rate without a tunnel beside the fastest path's."""
    for profile in run.profiles:
        words = []
        for name in run.settings.workloads:
            workload = Workload.parse(name)
            key, figure = next(iter(workload.figures.items()))
            bare = [
                float(one.figures[key])
                for one in (*run.proof, *run.samples)
                if (one.profile, one.candidate, one.workload) == (profile.name, "raw", name) and key in one.figures
            ]
            if workload.kind not in ("tcp", "udp") or "@" in name or not bare:
                continue
            best = statistic.summarize(bare).median
            medians = {
                candidate: statistic.summarize(values).median
                for candidate in run.settings.candidates
                if candidate != "raw" and (values := run.values(profile.name, candidate, name, key))
            }
            near = [candidate for candidate, median in medians.items() if median > _NEAR * best]
            doubt = f", **which may limit {' and '.join(near)}**" if near else ""
            words.append(f"{name} {plain(best)} {figure.unit}{doubt}")
        if words:
            yield f"The generator without a tunnel, {profile.name.upper()}: {'; '.join(words)}."


def _on_failures(run: Run) -> Iterator[str]:
    for candidate, starts in run.starts.items():
        again = sum(number != 1 for number in starts)
        if again:
            never = sum(number == 0 for number in starts)
            words = (
                f"**Starts**: {candidate} carried at the first start in {len(starts) - again} of {len(starts)} turns"
            )
            yield f"{words}, in {again - never} after more than one, in {never} not at all."
    said = set()
    for sample in run.samples:
        if "failed" in sample.figures:
            where = f"{sample.profile}, round {sample.round + 1}, {sample.candidate}, {sample.workload}"
            yield f"**Failed**: {where}: {sample.figures['failed']}"
        what = sample.candidate, sample.workload
        if "skipped" in sample.figures and what not in said:
            said.add(what)
            yield f"{sample.candidate} has no {sample.workload}: {sample.figures['skipped']}."


def in_short(workload: Workload, figures: Mapping[str, Any]) -> str:
    """A sample in a line of progress: its first figure, and the loss where there is one."""
    for state in ("failed", "skipped"):
        if state in figures:
            return f"{workload.name} {state.upper() if state == 'failed' else state}"
    key, figure = next(iter(workload.figures.items()))
    loss = f" ({percent(figures['loss'])} lost)" if figures.get("loss") else ""
    return f"{workload.name} {plain(figures[key])} {figure.unit}{loss}"
