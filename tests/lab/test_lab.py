"""Labs on this machine: they stand, stand side by side, and go without a trace, however they were left."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.errors import ConfigError
from dataplane.lab import ROOT, Lab, LabError, Settings, members, netns, node

pytestmark = pytest.mark.netns


def traces(name: str) -> list[str]:
    """Whatever is left of a lab: namespaces, processes, files."""
    found = [namespace for namespace in netns.listed() if namespace.startswith(f"loden-{name}-")]
    found += [str(member) for member in members.running(name)]
    return found + [str(path) for path in [ROOT / name] if path.exists()]


@pytest.fixture
def name() -> Iterator[str]:
    name = f"l{secrets.token_hex(4)}"
    yield name
    Lab.destroy(name)
    assert traces(name) == []


def test_a_lab_stands_and_goes_without_a_trace(name: str) -> None:
    steps: list[str] = []
    lab = Lab.create(name, 2, Settings(pods=2), steps.append)
    assert lab.pods == ["n1-p1", "n1-p2", "n2-p1", "n2-p2"]
    pings = lab.ping_all(count=3)
    assert len(pings) == 12
    assert all(pair.whole for pair in pings)
    assert any("n2" in step for step in steps)
    again = Lab.open(name)
    assert again.settings == lab.settings
    assert again.address_of("n2-p2") == lab.address_of("n2-p2")
    assert Lab.destroy(name) is True
    assert traces(name) == []
    assert Lab.destroy(name) is False


def test_nothing_appears_in_the_machines_own_namespace(name: str) -> None:
    def state() -> tuple[set[str], str]:
        links = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, text=True, check=True).stdout)
        routes = subprocess.run(["ip", "route", "show", "table", "all"], capture_output=True, text=True, check=True)
        return {link["ifname"] for link in links} & {"br0", "cni0", "n1", "n2", "p1", "flannel0"}, routes.stdout

    before = state()
    Lab.create(name, 2)
    assert state() == before


def test_pods_have_what_a_cni_plugin_gives_them(name: str) -> None:
    lab = Lab.create(name, 1, Settings(underlay_mtu=9000))
    environment = dict(line.split("=", 1) for line in lab.node("n1").subnet_file.read_text().split())
    (bridge,) = json.loads(lab.run("n1", ["ip", "-j", "addr", "show", "cni0"]).stdout)
    address = bridge["addr_info"][0]
    assert f"{address['local']}/{address['prefixlen']}" == environment["FLANNEL_SUBNET"]
    (link,) = json.loads(lab.run("n1-p1", ["ip", "-j", "link", "show", "eth0"]).stdout)
    assert link["mtu"] == bridge["mtu"] == int(environment["FLANNEL_MTU"]) == 9000 - 28
    (default,) = json.loads(lab.run("n1-p1", ["ip", "-j", "route", "show", "default"]).stdout)
    assert default["gateway"] == address["local"]


def test_a_second_lab_of_the_same_name_is_refused_and_the_first_lives(name: str) -> None:
    lab = Lab.create(name, 1)
    with pytest.raises(LabError, match="is there already"):
        Lab.create(name, 1)
    assert lab.node("n1").status() is not None


def test_a_lab_can_be_removed_after_its_files_are_lost(name: str) -> None:
    Lab.create(name, 2)
    (ROOT / name / "lab.json").unlink()
    with pytest.raises(LabError, match="there is no lab"):
        Lab.open(name)
    assert Lab.destroy(name) is True
    assert traces(name) == []


def test_a_lab_can_be_removed_after_its_namespaces_are_lost(name: str) -> None:
    lab = Lab.create(name, 2)
    netns.delete(lab.namespaces())
    assert members.running(name), "the daemons live on in namespaces without a name"
    Lab.destroy(name)
    assert traces(name) == []


def test_killed_and_stubborn_daemons_do_not_hinder_removal(name: str) -> None:
    lab = Lab.create(name, 2)
    lab.node("n1").stop_daemon(signal.SIGKILL)
    (frozen,) = members.running(name, "n2/flanneld")
    members.end([frozen], first=signal.SIGSTOP, patience=0)
    Lab.destroy(name)
    assert traces(name) == []


def test_a_creator_that_is_killed_half_way_leaves_a_lab_that_can_be_removed(name: str) -> None:
    argv = [sys.executable, "-m", "dataplane.cli", "lab", "up", "9", f"--name={name}"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as creator:
        assert creator.stdout is not None
        for line in creator.stdout:
            if "node n2" in line:
                creator.kill()
                break
    assert traces(name)
    Lab.destroy(name)
    assert traces(name) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_creator_that_is_interrupted_takes_its_lab_down(name: str, number: signal.Signals) -> None:
    argv = [sys.executable, "-m", "dataplane.cli", "lab", "up", "5", f"--name={name}"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as creator:
        assert creator.stdout is not None
        creator.stdout.readline()
        creator.send_signal(number)
        creator.communicate(timeout=60)
    assert creator.returncode == 128 + number
    assert traces(name) == []


def test_a_daemon_that_does_not_start_is_told_with_its_log(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "DAEMON", ("sh", "-c", "echo no luck today; exit 3"))
    with pytest.raises(LabError, match=r"node n1: flanneld ended with code 3(.|\n)*no luck today"):
        Lab.create(name, 2)
    assert traces(name) == []


def test_processes_of_others_in_a_labs_namespace_are_not_ended(name: str) -> None:
    lab = Lab.create(name, 1)
    argv = lab.exec_argv("n1", [sys.executable, "-c", "print('up', flush=True); input()"])
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as visitor:
        assert visitor.stdout is not None
        assert visitor.stdout.readline() == "up\n"
        Lab.destroy(name)
        assert visitor.poll() is None
        visitor.communicate("\n")
    assert visitor.returncode == 0


def test_a_cut_cable_carries_nothing_and_a_healed_one_everything(name: str) -> None:
    lab = Lab.create(name, 2)
    lab.node("n2").cut()
    assert lab.ping("n1-p1", "n2-p1", count=5).received == 0
    lab.node("n2").heal()
    deadline = time.monotonic() + 20
    while not lab.ping("n1-p1", "n2-p1", count=3).whole:
        assert time.monotonic() < deadline, "the path does not come back"


def test_unknown_members_are_named(name: str) -> None:
    lab = Lab.create(name, 1)
    with pytest.raises(LabError, match="no node or pod 'n7'; it has n1, n1-p1, switch"):
        lab.exec_argv("n7", ["true"])
    with pytest.raises(LabError, match="no node 'n7'; it has n1"):
        lab.node("n7")


def test_too_many_nodes_are_refused_before_anything_is_made(name: str) -> None:
    with pytest.raises(ConfigError, match="1 to 250"):
        Lab.create(name, 1000)
    assert not Path(ROOT / name).exists()
