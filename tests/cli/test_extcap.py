"""`loden extcap install`, and what Wireshark's own tshark makes of it: interfaces, options, filters, a live capture."""

from __future__ import annotations

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


@pytest.mark.parametrize(("text", "good"), [("tcp port 80", True), ("hots 10.1.1.1", False), ("", True)])
def test_a_capture_filter_is_checked_before_a_capture(home: dict[str, str], text: str, good: bool) -> None:
    done = ask(home, "--extcap-interface", "loden", "--extcap-capture-filter", text)
    assert (done.returncode == 0) is good
    assert ("did you mean" in done.stderr) is not good


def test_by_hand_it_says_who_starts_it(home: dict[str, str]) -> None:
    done = ask(home)
    assert done.returncode == 1
    assert "started by Wireshark" in done.stderr


def test_a_capture_becomes_loden_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that takes its place is looked at, not started."""
    argv: list[str] = []
    monkeypatch.setattr(os, "execv", lambda _path, words: argv.extend(words))
    words = "--capture --extcap-interface loden --fifo /tmp/f --drops true --direction rx --snaplen 128 --pod=10.1.1.1"
    extcap.main([*words.split(), "--extcap-capture-filter", "tcp port 80"])
    said = " ".join(argv[4:])
    assert said == ("capture --quiet -w /tmp/f --control-socket= --pod=10.1.1.1 -s 128 --drops --rx -- tcp port 80")


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
def test_tshark_captures_live(home: dict[str, str], make_lab: MakeLab) -> None:
    lab = make_lab(2)
    argv = ["tshark", "-l", "-i", f"loden-{lab.name}-n1", "-f", "icmp", "-c", "4"]
    argv += ["-T", "fields", "-e", "frame.interface_name", "-e", "frame.comment"]
    with subprocess.Popen(argv, env=home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        until("the capture runs", lambda: status_of(lab.node("n1"))["captures"], seconds=60)
        lab.ping("n1-p1", "n2-p1", count=2)
        output, _ = run.communicate(timeout=60)
    assert [line.split("\t")[0] for line in output.splitlines()] == ["overlay", "underlay", "underlay", "overlay"]
    end = time.monotonic() + 20
    while status_of(lab.node("n1"))["captures"]:
        assert time.monotonic() < end, "the capture ends with tshark"
        time.sleep(0.1)
