"""Owns which pictures a run gives, and their words.

Free of: how a chart is drawn (charts.py). Invariant: a candidate has one colour in all pictures of all runs; a picture
shows medians over the rounds, and the least and greatest sample where a bar stands for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from dataplane.bench import statistic
from dataplane.bench.charts import Axis, Bar, Line, Panel, Range, bars, lines, ranges
from dataplane.bench.composite import LOST
from dataplane.bench.document import Picture
from dataplane.bench.profile import Profile
from dataplane.bench.record import Run
from dataplane.bench.svg import HUES, Scale, linear, number_text
from dataplane.bench.words import percent, plain
from dataplane.bench.workload import Workload

_KNOWN = ("raw", "host-gw", "kernel-vxlan", "vxlan", "udp", "baseline", "asyncio", "uvloop", "prototype")
_QUANTILES = ("p50_us", "p90_us", "p99_us", "p999_us")
_TRIPS = {"rtt-busy": "back to back", "rtt-idle": "100 a second", "rtt-load": "back to back beside a TCP flow"}
_NONE = "not measured"
_VISIBLE = 0.01
"""Of the whole: a part below that is none."""


def pictures(run: Run) -> list[Picture]:
    """Every picture that the run has samples for."""
    workloads = [Workload.parse(name) for name in run.settings.workloads]
    found = [_throughput(run, workload) for workload in workloads if workload.kind in ("tcp", "udp", "connect")]
    found += [_latency(run, profile) for profile in run.profiles if _trips(run)]
    found += [_cost(run, workload) for workload in workloads if workload.kind == "tcp"][:1]
    found += [_loss(run, workload) for workload in workloads if workload.kind == "sweep"]
    found += _growth_with_flows(run)
    found += _growth_with_peers(run)
    return [picture for picture in found if _shows(picture)]


def _shows(picture: Picture) -> bool:
    """Whether anything but rows without a value is in it."""
    return 'class="k' in picture.svg


def _hue(run: Run, candidate: str) -> int:
    if candidate in _KNOWN:
        return _KNOWN.index(candidate)
    others = [name for name in run.settings.candidates if name not in _KNOWN]
    return len(_KNOWN) + others.index(candidate) % (HUES - len(_KNOWN))


def _title(profile: Profile) -> str:
    return f"{profile.name.upper()}: {profile.title}"


def _throughput(run: Run, workload: Workload) -> Picture:
    key, figure = next(iter(workload.figures.items()))
    with_loss = "loss" in workload.figures

    def row(profile: Profile, candidate: str) -> Bar | None:
        values = run.values(profile.name, candidate, workload.name, key)
        if not values:
            return None
        found = statistic.summarize(values)
        lost = run.values(profile.name, candidate, workload.name, "loss") if with_loss else []
        note = f"{percent(statistic.summarize(lost).median)} lost" if lost else ""
        words, whisker = plain(found.median), (found.least, found.greatest)
        return Bar(candidate, _hue(run, candidate), found.median, whisker, words, note)

    title = f"{_called(workload)}: {figure.unit}"
    subtitle = "Counted by the receiver; medians, lines from the least to the greatest sample. More is better."
    return _bars(run, f"{workload.name.replace('@', '-at-')}.svg", title, subtitle, row)


def _called(workload: Workload) -> str:
    """A workload's name in words."""
    first, _, last = workload.detail.partition("-")
    if workload.kind == "tcp":
        ways = {"": "", "down": ", download", "both": " each way at once"}[last]
        return f"TCP, {first} flow{'' if first == '1' else 's'}{ways}"
    if workload.kind == "udp":
        size, _, rate = first.partition("@")
        load = f"{number_text(float(rate), 1)} a second offered" if rate else "at saturation"
        return f"UDP, {'payloads that fill the MTU' if size == 'mtu' else f'{size}-byte payloads'}, {load}"
    return "New TCP connections"


def _cost(run: Run, workload: Workload) -> Picture:
    """On a logarithmic scale: what is measured here differs by two orders of magnitude."""
    panels = []
    for profile in run.profiles:
        rows, empty = [], []
        for candidate in run.settings.candidates:
            values = run.values(profile.name, candidate, workload.name, "cpu_s_per_gb")
            if not values:
                empty.append((candidate, _NONE))
                continue
            whole = statistic.summarize(values).median
            own = run.values(profile.name, candidate, workload.name, "tunnel_cpu_s_per_gb")
            part = statistic.summarize(own).median if own else 0.0
            there = part >= _VISIBLE * whole
            note = f"{plain(part)} its own" if there else ""
            places = (whole, part) if there else (whole,)
            rows.append(Range(candidate, _hue(run, candidate), places, plain(whole), note))
        panels.append(Panel(_title(profile), rows, empty))
    title = f"Processor seconds per GB: {_called(workload)}"
    subtitle = "Dot: the whole machine, generator included; ring: the tunnel's own processes. Less is better."
    return Picture(f"cpu-{workload.name}.svg", title, ranges(title, subtitle, panels))


def _bars(run: Run, file: str, title: str, subtitle: str, row: Callable[[Profile, str], Bar | None]) -> Picture:
    panels = []
    for profile in run.profiles:
        rows = {candidate: row(profile, candidate) for candidate in run.settings.candidates}
        there = [bar for bar in rows.values() if bar is not None]
        empty = [(candidate, _NONE) for candidate, bar in rows.items() if bar is None]
        panels.append(Panel(_title(profile), there, empty))
    return Picture(file, title, bars(title, subtitle, panels))


def _trips(run: Run) -> list[str]:
    return [name for name in run.settings.workloads if name in _TRIPS]


def _latency(run: Run, profile: Profile) -> Picture:
    panels = []
    for name in _trips(run):
        rows, empty = [], []
        for candidate in run.settings.candidates:
            quantiles = [run.values(profile.name, candidate, name, key) for key in _QUANTILES]
            if not all(quantiles):
                empty.append((candidate, _NONE))
                continue
            medians = tuple(statistic.summarize(values).median for values in quantiles)
            words = " / ".join(plain(value) for value in medians)
            rows.append(Range(candidate, _hue(run, candidate), medians, words))
        panels.append(Panel(_TRIPS[name], rows, empty))
    title = f"Round trip, microseconds; {_title(profile)}"
    subtitle = "Dot: p50; strokes: p90, p99; ring: p99.9; numbers in this order. Medians. Less is better."
    return Picture(f"latency-{profile.name}.svg", title, ranges(title, subtitle, panels, wide=True))


_LOSSES = ((0.0001, "≤ 0.01 %"), (0.001, "0.1 %"), (0.01, "1 %"), (0.1, "10 %"), (1.0, "100 %"))


def _loss(run: Run, workload: Workload) -> Picture:
    """Of each candidate the round whose result is the median."""
    panels, greatest = [], 1.0
    for profile in run.profiles:
        rows = []
        for candidate in run.settings.candidates:
            points = _median_points(run, profile, candidate, workload)
            if points:
                greatest = max(greatest, *(offered for offered, _ in points))
                rows.append(Line(candidate, _hue(run, candidate), points))
        rows.sort(key=lambda row: -max((offered for offered, lost in row.points if lost < LOST), default=0.0))
        if rows:
            panels.append(Panel(_title(profile), rows))
    title = f"Loss against offered load: {_called(replace(workload, kind='udp'))}".replace(", at saturation", "")
    subtitle = "Samples of the round with the median result; dashed: the bound of 0.1 %. From the highest rate down."
    x = Axis("offered, thousand datagrams a second", lambda begin, end: linear(greatest, begin, end))
    y = Axis("lost", lambda begin, end: Scale(_LOSSES[0][0], 1.0, begin, end, _LOSSES, logarithmic=True), LOST)
    return Picture(f"{workload.name}.svg", title, lines(title, subtitle, panels, x, y, legend=True))


def _median_points(run: Run, profile: Profile, candidate: str, workload: Workload) -> tuple[tuple[float, float], ...]:
    found = [
        sample.figures
        for sample in run.samples
        if (sample.profile, sample.candidate, sample.workload) == (profile.name, candidate, workload.name)
        and "points" in sample.figures
    ]
    found.sort(key=lambda figures: float(figures["kpps"]))
    if not found:
        return ()
    return tuple((point["offered_kpps"], point["loss"]) for point in found[len(found) // 2]["points"])


def _growth_with_flows(run: Run) -> list[Picture]:
    flows = sorted(int(name[4:]) for name in run.settings.workloads if name[:4] == "tcp-" and name[4:].isdecimal())
    if len(flows) < 2:
        return []
    names = {float(number): f"tcp-{number}" for number in flows}
    title = "TCP throughput as flows are added: Gbit/s"
    panels = [
        Panel(_title(profile), _lines(run, profile, names, "gbit_s", range(len(flows)))) for profile in run.profiles
    ]
    return [_growth(title, "growth-flows.svg", "flows", "Gbit/s", panels, [str(number) for number in flows])]


def _growth_with_peers(run: Run) -> list[Picture]:
    counts = sorted(int(name[6:]) for name in run.settings.workloads if name.startswith("peers-"))
    if len(counts) < 2:
        return []
    names = {float(number): f"peers-{number}" for number in counts}
    panels = [
        Panel(f"{profile.name.upper()}, traffic to {whom}", _lines(run, profile, names, key, range(len(counts))))
        for profile in run.profiles
        for whom, key in (("one node", "kpps_one"), ("all nodes in turn", "kpps_all"))
    ]
    title = "Packet rate as leases are added: 64-byte payloads, kpps"
    words = [number_text(number, 1) for number in counts]
    return [_growth(title, "growth-peers.svg", "leases in the table", "kpps", panels, words)]


def _lines(run: Run, profile: Profile, names: dict[float, str], key: str, places: Iterable[int]) -> list[Line]:
    """One line for each candidate that was measured more than once on the way; x is the place in the row of steps."""
    found = []
    for candidate in run.settings.candidates:
        points = []
        for place, name in zip(places, names.values(), strict=True):
            values = run.values(profile.name, candidate, name, key)
            if values:
                points.append((float(place), statistic.summarize(values).median))
        if len(points) > 1:
            found.append(Line(candidate, _hue(run, candidate), tuple(points)))
    return found


def _growth(title: str, file: str, across: str, up: str, panels: Sequence[Panel], steps: Sequence[str]) -> Picture:
    shown = [panel for panel in panels if panel.rows]
    greatest = max(
        (y for panel in shown for row in panel.rows if isinstance(row, Line) for _, y in row.points), default=1
    )
    ticks = tuple((float(place), words) for place, words in enumerate(steps))
    x = Axis(across, lambda begin, end: Scale(0.0, len(steps) - 1.0, begin, end, ticks))
    y = Axis(up, lambda begin, end: linear(greatest, begin, end))
    subtitle = "Medians over the rounds. More is better."
    return Picture(file, title, lines(title, subtitle, shown, x, y))
