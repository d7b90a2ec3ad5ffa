"""Processes of a lab are found by their mark, ended within a bound, and never mistaken for a stranger's."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.lab import members

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(300)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(300)",
]


@pytest.fixture
def lab() -> Iterator[str]:
    name = f"m{secrets.token_hex(4)}"
    yield name
    members.end(members.running(name), first=signal.SIGKILL)


def started(lab: str, role: str, argv: list[str], log: Path) -> subprocess.Popen[bytes]:
    process = members.start(lab, role, argv, log)
    deadline = time.monotonic() + 20
    while "up" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_a_process_is_found_by_lab_and_role_and_ended(lab: str, tmp_path: Path) -> None:
    process = started(lab, "n1/flanneld", SLEEP, tmp_path / "log")
    assert members.running(lab) == [members.Member(process.pid, lab, "n1/flanneld")]
    assert members.running(lab, "n2/flanneld") == []
    assert members.running(f"{lab}x") == []
    assert os.getsid(process.pid) == process.pid, "it outlives our terminal"
    assert members.end(members.running(lab)) == []
    assert process.wait(timeout=5) == -signal.SIGTERM
    assert members.running(lab) == []


def test_one_that_ignores_sigterm_is_killed(lab: str, tmp_path: Path) -> None:
    process = started(lab, "n1/flanneld", STUBBORN, tmp_path / "log")
    assert members.end(members.running(lab), patience=0.2) == []
    assert process.wait(timeout=5) == -signal.SIGKILL


def test_a_recycled_process_id_is_never_signalled(lab: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        try:
            # What would be found if the id of a member that has ended went to a stranger.
            members.end([members.Member(stranger.pid, lab, "n1/flanneld")], patience=0.2)
            assert stranger.poll() is None
        finally:
            stranger.communicate(b"\n")
    assert stranger.returncode == 0


def test_real_daemons_settings_do_not_reach_a_lab(lab: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLANNELD_ETCD_ENDPOINTS", "http://192.0.2.1:2379")
    environment = members.environment(lab, "n1/flanneld")
    assert not [name for name in environment if name.startswith("FLANNELD_")]
    assert environment["PATH"] == os.environ["PATH"]
