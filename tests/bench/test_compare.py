"""What two runs have in common, what has changed between them, and what of that is a regression."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from dataplane.bench import compare, document, profile, record
from dataplane.bench.record import Run, Sample, Settings
from dataplane.cli import main
from dataplane.errors import ConfigError


def a_run(seed: int, *, slower: float = 1.0, loss: float = 0.0, session: float = 1.0, reference: bool = True) -> Run:
    """udp beside kernel-vxlan, 8 rounds with 5 % of noise. `session`: how fast the machine is that day."""
    generator = random.Random(seed)
    names = ["udp", "kernel-vxlan"] if reference else ["udp"]
    settings = Settings(names, ["udp"], ["tcp-1", "udp-64", "rtt-busy"], 8, 1.0, 0.2)
    run = Run(machine=record.machine(), settings=settings, profiles=[profile.load("p1")], complete=True)
    for number in range(8):
        for name in names:
            factor = session * generator.uniform(0.95, 1.05) / (slower if name == "udp" else 1.0)
            figures: dict[str, dict[str, Any]] = {
                "tcp-1": {"gbit_s": 10 * factor, "cpu_s_per_gb": 2 / factor},
                "udp-64": {"kpps": 200 * factor, "cpu_s_per_mpkt": 5 / factor, "loss": loss if name == "udp" else 0.0},
                "rtt-busy": {"p50_us": 50 / factor, "p99_us": 90 / factor},
            }
            for workload, values in figures.items():
                run.samples.append(Sample("p1", number, name, workload, values, 0.2, 0.0))
    return run


def verdicts(old: Run, new: Run) -> set[str]:
    return {change.verdict for change in compare.compare(old, new)}


def test_a_slower_machine_is_no_regression() -> None:
    """All of it is 30 % slower that day, the reference too."""
    assert verdicts(a_run(1), a_run(2, session=0.7)) == {""}


def test_noise_is_no_change() -> None:
    for seed in range(20):
        assert verdicts(a_run(2 * seed), a_run(2 * seed + 1)) == {""}


def test_a_regression_is_seen_in_every_figure_and_the_other_way_round() -> None:
    changes = compare.compare(a_run(1), a_run(2, slower=1.3))
    assert {change.verdict for change in changes} == {"worse"}
    assert all(change.regression for change in changes)
    better = compare.compare(a_run(1, slower=1.3), a_run(2))
    assert {change.verdict for change in better} == {"better"}
    assert not any(change.regression for change in better)
    (tcp,) = (change for change in changes if change.what == "tcp-1 Gbit/s")
    assert tcp.ratio is not None
    assert tcp.ratio.low <= 1 / 1.3 <= tcp.ratio.high


def test_a_change_below_the_tolerance_is_none() -> None:
    old, new = a_run(1), a_run(2, slower=1.3)
    assert {change.verdict for change in compare.compare(old, new, tolerance=0.5)} == {""}


def test_without_a_reference_figures_are_compared_as_they_are() -> None:
    old, new = a_run(1, reference=False), a_run(2, reference=False, session=0.7)
    assert compare.reference_of(old, new) is None
    assert verdicts(old, new) == {"worse"}


def test_loss_that_has_grown_is_a_regression() -> None:
    (change,) = (one for one in compare.compare(a_run(1), a_run(2, loss=0.05)) if one.verdict)
    assert (change.what, change.new, change.regression) == ("udp-64 loss", "5.00 %", True)


def test_runs_that_have_nothing_in_common() -> None:
    other = a_run(1)
    other.settings.workloads[:] = ["tcp-4"]
    with pytest.raises(ConfigError, match="in common"):
        compare.compare(a_run(1), other)


def test_another_machine_is_said() -> None:
    old, new = a_run(1), a_run(2)
    new.machine["kernel"] = "9.9.9"
    assert "9.9.9" in document.markdown(compare.blocks(old, new, compare.compare(old, new)))


def test_the_command_fails_on_a_regression_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, run in (("old", a_run(1)), ("same", a_run(2)), ("slow", a_run(3, slower=1.5))):
        (tmp_path / name).mkdir()
        run.write(tmp_path / name)
    assert main(["bench", "compare", str(tmp_path / "old"), str(tmp_path / "same")]) == 0
    assert "Within the noise: 6 of 6" in capsys.readouterr().out
    assert main(["bench", "compare", str(tmp_path / "old"), str(tmp_path / "slow" / "run.json")]) == 3
    assert "**worse**" in capsys.readouterr().out
    assert main(["bench", "compare", str(tmp_path / "old"), str(tmp_path / "nowhere")]) == 1
