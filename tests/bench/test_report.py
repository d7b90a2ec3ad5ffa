"""What a run leaves: the JSON file that can be read again, and the tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dataplane.bench import profile, record, report
from dataplane.bench.candidate import Baseline, Candidate, Daemon, KernelVxlan, Raw
from dataplane.bench.record import Run, Sample
from dataplane.bench.run import order
from dataplane.bench.workload import Workload
from dataplane.errors import ConfigError

FIGURES: dict[str, dict[str, Any]] = {
    "tcp-1": {"gbit_s": 8.0, "cpu_s_per_gb": 2.0, "retransmits": 0, "congestion": "cubic", "stolen_s": 0.0},
    "udp-64": {"kpps": 100.0, "loss": 0.25, "offered_kpps": 133.0, "cpu_s_per_mpkt": 5.0},
}


def a_run(rounds: int = 3) -> Run:
    settings = {
        "candidates": ["udp", "baseline"],
        "workloads": ["tcp-1", "udp-64"],
        "rounds": rounds,
        "seconds": 1.0,
        "warmup": 0.2,
    }
    run = Run(machine=record.machine(), settings=settings, profiles=[profile.load("p1")], complete=True, seconds=60)
    for number in range(rounds):
        for workload, figures in FIGURES.items():
            half = {key: value / 2 if isinstance(value, float) else value for key, value in figures.items()}
            run.samples.append(Sample("p1", number, "udp", workload, figures, 0.2, 0.0))
            run.samples.append(Sample("p1", number, "baseline", workload, half, 0.2, 0.0))
    return run


def line_of(text: str, begin: str, nth: int = 0) -> list[str]:
    found = [line for line in text.splitlines() if line.startswith(f"| {begin}")][nth]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_a_run_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    run = a_run()
    assert Run.read(run.write(tmp_path)) == run


@pytest.mark.parametrize("text", ["", "{}", '{"schema": "loden-bench/0"}', '{"schema": "loden-bench/1"}', "[]"])
def test_a_strange_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no loden-bench/1 file"):
        Run.read(path)


def test_the_tables() -> None:
    text = report.markdown(a_run(), "udp")
    assert line_of(text, "tcp-1 Gbit/s") == ["tcp-1 Gbit/s", "**8.00** (8.00 to 8.00)", "**4.00** (4.00 to 4.00)"]
    assert line_of(text, "udp-64 loss") == ["udp-64 loss", "25.00% (25.00% to 25.00%)", "12.50% (12.50% to 12.50%)"]
    assert line_of(text, "tcp-1 Gbit/s", 1)[1] == "**2.00** (2.00 to 2.00)"
    assert "congestion control cubic" in text
    assert "broken off" not in text
    assert "Noisy" not in text


def test_noise_is_said() -> None:
    run = a_run()
    run.samples.append(Sample("p1", 3, "udp", "tcp-1", {**FIGURES["tcp-1"], "gbit_s": 2.0}, 5.0, 0.8))
    run.complete = False
    text = report.markdown(run, "udp")
    assert "broken off" in text
    assert re.search(r"before 1 of \d+ samples other work went on, up to 0.80", text)
    assert line_of(text, "tcp-1 Gbit/s")[1].endswith("~")
    assert line_of(text, "tcp-1 Gbit/s", 1)[1] == "-"  # rounds that have no counterpart give no ratio


def test_a_failure_is_named_and_not_a_number() -> None:
    run = a_run()
    run.samples = [
        Sample(s.profile, s.round, s.candidate, s.workload, {"failed": "no byte arrived"}, 0, 0)
        if (s.candidate, s.workload) == ("udp", "tcp-1")
        else s
        for s in run.samples
    ]
    text = report.markdown(run, "udp")
    assert line_of(text, "tcp-1 Gbit/s")[1] == "-"
    assert "p1, round 2, udp, tcp-1: no byte arrived" in text


def test_turns_are_rotated_and_reversed() -> None:
    candidates: list[Candidate] = [Raw(), KernelVxlan(), Daemon(), Baseline()]
    names = [[one.name for one in order(candidates, number)] for number in range(4)]
    assert names[0] == ["raw", "kernel-vxlan", "udp", "baseline"]
    assert names[1] == ["raw", "baseline", "udp", "kernel-vxlan"]
    assert names[2] == ["udp", "baseline", "raw", "kernel-vxlan"]
    assert all(sorted(turn) == sorted(names[0]) for turn in names)


@pytest.mark.parametrize("name", ["tcp-1", "tcp-16", "udp-64", "udp-mtu", "rtt-busy", "rtt-idle"])
def test_a_workload_has_its_name_back(name: str) -> None:
    assert Workload.parse(name).name == name


@pytest.mark.parametrize("name", ["", "tcp", "tcp-0", "tcp-257", "udp-11", "udp-65508", "rtt-1", "sctp-1"])
def test_what_is_no_workload(name: str) -> None:
    with pytest.raises(ConfigError, match="is no workload"):
        Workload.parse(name)
