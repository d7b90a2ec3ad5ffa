"""`loden extcap install`, and what Wireshark's own tshark makes of it: interfaces, options, filters, a live capture."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from dataplane import extcap
from dataplane.cli import capture
from dataplane.debug import pcapng
from tests.netns.conftest import MakeLab, make_lab
from tests.netns.observing import status_of, until

__all__ = ["make_lab"]

LODEN = (sys.executable, "-P", "-m", "dataplane.cli")


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment whose Wireshark has ours installed, and nothing else."""
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("XDG_CONFIG_HOME", None)
    done = subprocess.run([*LODEN, "extcap", "install"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("next: tshark -i loden\n")
    return environment


def program(home: dict[str, str]) -> str:
    return f"{home['HOME']}/.config/wireshark/extcap/loden"


def ask(home: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program(home), *words], env=home, capture_output=True, text=True, check=False)


def tshark(home: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["tshark", *words], env=home, capture_output=True, text=True, check=False)


def test_tshark_lists_the_interface(home: dict[str, str]) -> None:
    done = tshark(home, "-D")
    assert "loden (Loden overlay of this node)" in done.stdout
    assert "Error" not in done.stderr, "the dissectors load"


def test_what_wireshark_asks_at_its_start(home: dict[str, str]) -> None:
    first, interface, *_ = ask(home, "--extcap-interfaces", "--extcap-version=4.0").stdout.splitlines()
    assert first.startswith("extcap {version=")
    assert interface == "interface {value=loden}{display=Loden overlay of this node}"
    assert "{number=101}" in ask(home, "--extcap-interface", "loden", "--extcap-dlts").stdout
    options = ask(home, "--extcap-interface", "loden", "--extcap-config").stdout
    assert "{call=--peer}" in options
    assert "{value=tx}" in options


def test_the_answer_needs_no_package(home: dict[str, str]) -> None:
    """Wireshark waits for it at each start: nothing but the standard library is imported, and little of that."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(extcap.__file__).parents[1])!r}); from dataplane.extcap import main;"
        "main(['--extcap-interfaces']); print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-ISc", code], capture_output=True, text=True, check=True)
    heavy = {"asyncio", "argparse", "ipaddress", "socket", "msgspec", "dataclasses", "pathlib", "subprocess"}
    assert not heavy & set(done.stderr.split())


@pytest.mark.parametrize(
    ("text", "said"), [("tcp port 80", ""), ("hots 10.1.1.1", "did you mean `host`?"), ("", ""), ("peer node-b", "")]
)
@pytest.mark.parametrize("joined", [True, False])
def test_a_capture_filter_is_checked_before_a_capture(home: dict[str, str], text: str, said: str, joined: bool) -> None:
    """As Wireshark's extcap.c reads it: code 0, nothing printed if the filter is good, else what is wrong in a line."""
    words = [f"--extcap-capture-filter={text}"] if joined else ["--extcap-capture-filter", text]
    done = ask(home, "--extcap-interface", "loden", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert said in done.stdout.partition("\n")[0]
    assert bool(done.stdout) is bool(said)


def test_by_hand_it_says_who_starts_it(home: dict[str, str]) -> None:
    done = ask(home)
    assert done.returncode == 1
    assert "started by Wireshark" in done.stderr


def test_a_capture_becomes_loden_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that takes its place is looked at, not started."""
    argv: list[str] = []

    def become(_path: str, words: list[str]) -> None:
        argv.extend(words)
        raise SystemExit

    monkeypatch.setattr(os, "execv", become)
    words = "--capture --extcap-interface loden --fifo /tmp/f --drops true --direction rx --snaplen 128 --pod=10.1.1.1"
    with pytest.raises(SystemExit):
        extcap.main([*words.split(), "--outer", "wire", "--extcap-capture-filter", "tcp port 80"])
    said = " ".join(argv[4:])
    wanted = (
        "capture --quiet -w /tmp/f --control-socket= --pod=10.1.1.1 -s 128 --drops --rx --outer=wire -- tcp port 80"
    )
    assert said == wanted


NOT_ASKED = {"--help", "-w", "-c", "--for", "--rotate-size", "--rotate-time", "--keep", "--json", "--quiet", "--check"}
"""Of `loden capture`: what Wireshark does itself (files, counts, times), or what is for a terminal."""
OTHERWISE = {"--tx": "--direction", "--rx": "--direction", "-s": "--snaplen", "--subnet-file": "--control-socket"}


def test_the_dialogue_has_every_option_of_the_command_line() -> None:
    verbs = argparse.ArgumentParser().add_subparsers()
    capture.add(verbs)
    options = {action.option_strings[-1] for action in verbs.choices["capture"]._actions if action.option_strings}
    dialogue = {call for call, *_ in extcap.ARGUMENTS}
    assert {OTHERWISE.get(option, option) for option in options - NOT_ASKED} == dialogue
    for call in dialogue:
        changed = extcap.words_of({call: "wire" if call == "--outer" else "rx"})
        assert changed != extcap.words_of({}), f"{call} does nothing"


def test_installing_twice_changes_nothing_and_strangers_files_stay(home: dict[str, str]) -> None:
    before = Path(program(home)).read_text()
    subprocess.run([*LODEN, "extcap", "install"], env=home, capture_output=True, check=True)
    assert Path(program(home)).read_text() == before
    done = subprocess.run([*LODEN, "extcap", "remove"], env=home, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 2
    assert not Path(program(home)).exists()
    Path(program(home)).write_text("#!/bin/sh\n# somebody else's\n")
    for verb in ("install", "remove"):
        done = subprocess.run([*LODEN, "extcap", verb], env=home, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "is not ours" in done.stderr


OUTER = IP(src="198.18.1.1", dst="198.18.1.2")
INNER = IP(src="10.244.1.2", dst="10.244.2.7") / UDP(sport=1, dport=2) / b"x"


@pytest.mark.parametrize(
    ("datagram", "seen"),
    [
        (UDP(sport=8285, dport=8285) / Raw(bytes(INNER)), "10.244.2.7"),
        (UDP(sport=8285, dport=8285) / Raw(bytes(IPv6(src="fd00::1", dst="fd00::2") / UDP())), "fd00::2"),
        (UDP(sport=40000, dport=8472) / VXLAN(vni=1) / Ether() / INNER, "10.244.2.7"),
        (UDP(sport=8285, dport=8285) / Raw(b"neither"), ""),
    ],
)
def test_the_dissectors_see_through_our_datagrams(
    home: dict[str, str], tmp_path: Path, datagram: Packet, seen: str
) -> None:
    path, data = tmp_path / "a.pcapng", bytes(OUTER / datagram)
    head = pcapng.section("test") + pcapng.interface(pcapng.LINKTYPE_RAW, 0, name="underlay")
    path.write_bytes(head + pcapng.packet(0, 0, data, len(data)))
    done = tshark(home, "-r", str(path), "-T", "fields", "-e", "ip.dst", "-e", "ipv6.dst")
    found = done.stdout.strip("\n").replace("\t", ",").split(",")
    assert [address for address in found if address] == ["198.18.1.2", *([seen] if seen else [])]


@pytest.mark.netns
def test_a_capture_that_cannot_be_ends_tshark_with_the_reason(home: dict[str, str], make_lab: MakeLab) -> None:
    """It waits at the pipe that it made until somebody has opened that."""
    interface = f"loden-{make_lab(1).name}-n1"
    for text, said in (("hots 10.1.1.1", "unknown word 'hots'"), ("peer node-b", "no other node is called 'node-b'")):
        done = tshark(home, "-i", interface, "-f", text, "-c", "1")
        assert done.returncode != 0
        assert said in done.stderr


@pytest.mark.netns
@pytest.mark.parametrize("wire", [False, True])
def test_tshark_captures_live(home: dict[str, str], make_lab: MakeLab, wire: bool) -> None:
    lab = make_lab(2)
    argv = ["tshark", "-l", "-i", f"loden-{lab.name}-n1", "-f", "icmp", "-c", "4"]
    argv += ["-o", f"extcap.loden_{lab.name}_n1.outer:wire"] if wire else []
    argv += ["-T", "fields", "-e", "frame.interface_name", "-e", "frame.protocols"]
    with subprocess.Popen(argv, env=home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        until("the capture runs", lambda: status_of(lab.node("n1"))["captures"], seconds=60)
        lab.ping("n1-p1", "n2-p1", count=2)
        output, _ = run.communicate(timeout=60)
    assert [line.split("\t")[0] for line in output.splitlines()] == ["overlay", "underlay", "underlay", "overlay"]
    assert output.count("eth:ethertype") == (2 if wire else 0)
    end = time.monotonic() + 20
    while status_of(lab.node("n1"))["captures"]:
        assert time.monotonic() < end, "the capture ends with tshark"
        time.sleep(0.1)
