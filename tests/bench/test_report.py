"""What a run leaves: the JSON file that can be read again, and the tables."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dataplane.bench import profile, pytest_json, record, report
from dataplane.bench.candidate import Candidate, KernelVxlan, Raw
from dataplane.bench.flanneld import Daemon
from dataplane.bench.program import Baseline
from dataplane.bench.record import Run, Sample, Settings
from dataplane.bench.run import order
from dataplane.bench.workload import Workload
from dataplane.errors import ConfigError

FIGURES: dict[str, dict[str, Any]] = {
    "tcp-1": {"gbit_s": 8.0, "cpu_s_per_gb": 2.0, "retransmits": 0, "congestion": "cubic", "stolen_s": 0.0},
    "udp-64": {"kpps": 100.0, "loss": 0.25, "offered_kpps": 133.0, "cpu_s_per_mpkt": 5.0},
}


def a_run(rounds: int = 3) -> Run:
    settings = Settings(["udp", "baseline"], ["udp"], ["tcp-1", "udp-64"], rounds, 1.0, 0.2, ["bench", "--quick"])
    run = Run(machine=record.machine(), settings=settings, profiles=[profile.load("p1")], complete=True, seconds=60)
    for number in range(rounds):
        for workload, figures in FIGURES.items():
            half = {key: value / 2 if isinstance(value, float) else value for key, value in figures.items()}
            run.samples.append(Sample("p1", number, "udp", workload, figures, 0.2, 0.0))
            run.samples.append(Sample("p1", number, "baseline", workload, half, 0.2, 0.0))
    return run


def line_of(text: str, begin: str, under: str) -> list[str]:
    """The cells of the line that begins so, in the first table behind `under`."""
    found = next(line for line in text.partition(under)[2].splitlines() if line.startswith(f"| {begin}"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_a_run_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    run = a_run()
    assert Run.read(run.write(tmp_path)) == run


@pytest.mark.parametrize("text", ["", "{}", '{"schema": "loden-bench/1"}', '{"schema": "loden-bench/2"}', "[]"])
def test_a_strange_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no loden-bench/2 file"):
        Run.read(path)


MEDIANS, RATIOS = "Median (least", "ratio of medians"


def test_the_tables() -> None:
    text = report.markdown(a_run())
    assert line_of(text, "tcp-1 Gbit/s", MEDIANS)[1:] == ["**8.00** (8.00 to 8.00)", "**4.00** (4.00 to 4.00)"]
    assert line_of(text, "udp-64 loss", MEDIANS)[1:] == ["25 % (25 % to 25 %)", "12 % (12 % to 12 %)"]
    assert line_of(text, "tcp-1 Gbit/s", RATIOS)[1] == "**2.00** (2.00 to 2.00)"
    assert line_of(text, "tcp-1 Gbit/s", "### udp / baseline")[1] == "**2.00** (2.00 to 2.00)"
    assert "congestion control cubic" in text
    assert "`loden bench --quick`" in text
    assert "broken off" not in text
    assert "Noisy" not in text


def test_noise_is_said() -> None:
    run = a_run()
    run.samples.append(Sample("p1", 3, "udp", "tcp-1", {**FIGURES["tcp-1"], "gbit_s": 2.0}, 5.0, 0.8))
    run.complete = False
    text = report.markdown(run)
    assert "broken off" in text
    assert re.search(r"before 1 of \d+ samples other work went on, up to 0.80", text)
    assert line_of(text, "tcp-1 Gbit/s", MEDIANS)[1].endswith("~")
    assert line_of(text, "tcp-1 Gbit/s", RATIOS)[1] == "**2.00** (2.00 to 2.00)"  # over the rounds that have both
    assert "**Noisy figures**: of 12 %" in text


def test_a_failure_is_named_and_not_a_number() -> None:
    run = a_run()
    run.samples = [
        Sample(s.profile, s.round, s.candidate, s.workload, {"failed": "no byte arrived"}, 0, 0)
        if (s.candidate, s.workload) == ("udp", "tcp-1")
        else s
        for s in run.samples
    ]
    run.starts = {"udp": [1, 2, 0], "baseline": [1, 1, 1]}
    text = report.markdown(run)
    assert line_of(text, "tcp-1 Gbit/s", MEDIANS)[1] == "-"
    assert "p1, round 2, udp, tcp-1: no byte arrived" in text
    assert (
        "**Starts**: udp carried at the first start in 1 of 3 turns, in 1 after more than one, in 1 not at all" in text
    )
    assert "Starts**: baseline" not in text


def test_what_a_candidate_has_no_means_for_is_said_once() -> None:
    run = a_run()
    run.settings.workloads.append("gil")
    run.samples += [Sample("p1", n, "baseline", "gil", {"skipped": "it is no daemon"}, 0, 0) for n in range(3)]
    text = report.markdown(run)
    assert text.count("baseline has no gil: it is no daemon.") == 1


def test_a_generator_that_may_be_the_limit_is_named() -> None:
    run = a_run()
    bare = {**FIGURES["udp-64"], "kpps": 110.0}
    run.proof = [
        Sample("p1", 0, "raw", "udp-64", bare, 0, 0),
        Sample("p1", 0, "raw", "tcp-1", {"gbit_s": 30.0}, 0, 0),
    ]
    text = report.markdown(run)
    assert "P1: tcp-1 30.0 Gbit/s; udp-64 110 kpps, **which may limit udp**." in text


def test_the_files_of_a_report(tmp_path: Path) -> None:
    written = {path.name for path in report.write_all([a_run(), a_run()], tmp_path)}
    assert {"report.md", "report.html", "tcp-1.svg", "run2-tcp-1.svg", "udp-64.svg", "pytest-benchmark.json"} <= written
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == page.count("</svg>") >= 4
    assert not re.search(r"(?:src|href)=|@import|url\(", page), "the page needs another file"
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "report.md").read_text()):
        assert (tmp_path / picture).is_file()


def test_a_page_gets_the_short_form_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(f"above\n{report._MARKS[0]}\nold\n{report._MARKS[1]}\nbelow\n")
    for _ in range(2):
        report.into([a_run(), a_run()], page)
        text = page.read_text()
        assert text.startswith("above\n")
        assert text.endswith("\nbelow\n")
        assert "old" not in text
        assert "udp / baseline" in text
        shown = re.findall(r"\]\((.*?)\)", text)
        assert {"benchmarks/tcp-1.svg", "benchmarks/run2-tcp-1.svg", "benchmarks/report.md"} <= set(shown)
        assert all((tmp_path / file).is_file() for file in shown)
    page.write_text("no place\n")
    with pytest.raises(ConfigError, match="has no place for a report"):
        report.into([a_run()], page)


def test_pytest_benchmark_reads_a_run(tmp_path: Path) -> None:
    """The rate of 8 Gbit/s is a GB in a second, half of it in two; that is what its table must show."""
    old, new = tmp_path / "0001_old.json", tmp_path / "0002_new.json"
    for path in (old, new):
        path.write_text(pytest_json.benchmarks(a_run()))
    program = Path(sys.executable).parent / "pytest-benchmark"
    argv = [str(program), "compare", str(old), str(new), "--columns=median,rounds"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "p1 tcp-1: seconds for a GB" in done.stdout
    assert re.search(r"tcp-1\[p1-udp\] \(\S+\)\s+1\.0+ ", done.stdout)
    assert re.search(r"tcp-1\[p1-baseline\] \(\S+\)\s+2\.0+ ", done.stdout)


def test_the_schema_names_every_member_of_a_run(tmp_path: Path) -> None:
    document = json.loads(a_run().write(tmp_path).read_text())
    schema = record.schema()
    described = schema["$defs"]["Run"]
    assert set(document) == set(described["properties"])
    assert set(described["required"]) <= set(document)
    for name in ("Sample", "Profile", "Settings"):
        assert schema["$defs"][name]["properties"]
    assert described["properties"]["schema"] == {"const": document["schema"]}


def test_a_member_of_a_wrong_kind_is_refused(tmp_path: Path) -> None:
    path = a_run().write(tmp_path)
    path.write_text(path.read_text().replace('"rounds": 3', '"rounds": "three"'))
    with pytest.raises(ConfigError, match="rounds"):
        Run.read(tmp_path)


def test_turns_are_rotated_and_reversed() -> None:
    candidates: list[Candidate] = [Raw(), KernelVxlan(), Daemon(), Baseline()]
    names = [[one.name for one in order(candidates, number)] for number in range(4)]
    assert names[0] == ["raw", "kernel-vxlan", "udp", "baseline"]
    assert names[1] == ["raw", "baseline", "udp", "kernel-vxlan"]
    assert names[2] == ["udp", "baseline", "raw", "kernel-vxlan"]
    assert all(sorted(turn) == sorted(names[0]) for turn in names)


NAMES = [
    *("tcp-1", "tcp-16", "tcp-4-down", "tcp-1-both", "udp-64", "udp-mtu", "udp-64@20000", "sweep-64", "sweep-mtu"),
    *("rtt-busy", "rtt-idle", "rtt-load", "connect", "peers-1", "peers-10000", "publish", "table", "gil", "capture"),
]
WRONG = [
    *("", "tcp", "tcp-0", "tcp-257", "tcp-1-up", "udp-11", "udp-65508", "udp-64@", "sweep-", "rtt-1", "sctp-1"),
    *("peers-0", "peers-10001", "gil-1", "table-1", "capture-1"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_workload_has_its_name_back(name: str) -> None:
    workload = Workload.parse(name)
    assert workload.name == name
    assert workload.figures


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_workload(name: str) -> None:
    with pytest.raises(ConfigError, match="is no workload"):
        Workload.parse(name)
