"""The harness in namespaces: the stand, each candidate up and down, a whole short run, and Ctrl-C in one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataplane.bench import profile, stand
from dataplane.bench.candidate import Baseline, Candidate, Daemon, KernelVxlan, Prototype, Raw, carrying
from dataplane.bench.record import Run
from dataplane.bench.stand import Stand
from dataplane.errors import ConfigError
from dataplane.lab import Lab, LabError, netns

pytestmark = [pytest.mark.netns, pytest.mark.timeout(240)]

BASELINE = Path(stand.__file__).parent / "baselines" / "one_packet.c"

# In the prototype's calling convention: makes its device, carries nothing.
IDLE_TUN = """
#include <fcntl.h>
#include <string.h>
#include <unistd.h>
#include <sys/ioctl.h>
#include <net/if.h>
#include <linux/if_tun.h>
int main(int count, char **words) {
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    int tun = open("/dev/net/tun", O_RDWR);
    strncpy(request.ifr_name, words[1], IFNAMSIZ - 1);
    if (count != 5 || ioctl(tun, TUNSETIFF, &request)) return 1;
    for (;;) pause();
}
"""


@pytest.fixture
def name() -> str:
    return f"bench-t{os.getpid()}"


@pytest.fixture
def up(name: str) -> Iterator[Stand]:
    with stand.raised(name) as raised:
        yield raised
    assert name not in Lab.names()


def state(stand: Stand) -> dict[str, Any]:
    """What a candidate could leave behind in the nodes."""
    found: dict[str, Any] = {}
    for node in ("n1", "n2"):
        devices = json.loads(stand.run(node, ["ip", "-j", "addr"]))
        found[f"{node} devices"] = [(d["ifname"], d["mtu"], [a["local"] for a in d["addr_info"]]) for d in devices]
        found[f"{node} routes"] = stand.run(node, ["ip", "route"])
        found[f"{node} neighbours"] = stand.run(node, ["ip", "neigh", "show", "nud", "permanent"])
        found[f"{node} FDB"] = stand.run(node, ["bridge", "fdb", "show", "dynamic"]).count("flannel")
        found[f"{node} rules"] = stand.run(node, ["nft", "list", "ruleset"])
    return found


@pytest.mark.parametrize("candidate", [Raw(), KernelVxlan(), Daemon(), Baseline()], ids=lambda one: one.name)
def test_a_candidate_carries_and_leaves_nothing(up: Stand, candidate: Candidate) -> None:
    up.set_pod_mtu(1450)
    before = state(up)
    for _ in range(2):
        with carrying(candidate, up) as ends:
            full = ["ping", "-q", "-M", "do", "-s", str(ends.mtu - 28), "-c", "1", "-W", "2", ends.address]
            up.run(ends.source, full)
            with pytest.raises(LabError, match="ended with 1"):
                up.run(ends.source, [*full[:5], str(ends.mtu - 27), *full[6:]])
        up.set_pod_mtu(1450)
        assert state(up) == before


def test_what_comes_up_half_way_is_taken_down(up: Stand, tmp_path: Path) -> None:
    source = tmp_path / "deaf.c"
    source.write_text(IDLE_TUN)
    before = state(up)
    with pytest.raises(LabError, match="ping"), carrying(Prototype(source), up):
        pytest.fail("nothing answers there")
    up.set_pod_mtu(1500)
    assert state(up) == before


def test_a_program_that_ends_at_once_is_named_with_its_words(up: Stand, tmp_path: Path) -> None:
    source = tmp_path / "broken.c"
    source.write_text('#include <stdio.h>\nint main(void) { puts("no such luck"); return 3; }\n')
    with (
        pytest.raises(LabError, match=r"(?s)prototype on n1 ended before .*no such luck"),
        carrying(Prototype(source), up),
    ):
        pytest.fail("it cannot carry")


def test_a_program_that_does_not_compile(up: Stand, tmp_path: Path) -> None:
    source = tmp_path / "wrong.c"
    source.write_text("int main(void) { return nothing; }\n")
    with pytest.raises(ConfigError, match="nothing"), carrying(Prototype(source), up):
        pytest.fail("it cannot carry")


def test_the_baseline_ages_packets_and_answers_what_has_no_route(up: Stand) -> None:
    """Each proxy takes one TTL besides the nodes' own forwarding; a subnet without a node is unreachable."""
    with carrying(Baseline(), up) as ends:
        # n1 forwards (1), n1's proxy (1), n2's proxy (1), n2 forwards (1): 5 arrive, 4 do not.
        up.run(ends.source, ["ping", "-q", "-t", "5", "-c", "1", "-W", "2", ends.address])
        with pytest.raises(LabError):
            up.run(ends.source, ["ping", "-q", "-t", "4", "-c", "1", "-W", "1", ends.address])
        counter = ["cat", "/sys/class/net/flannel0/statistics/rx_packets"]
        before = int(up.run("n1", counter))
        send = "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'?', ('10.244.9.9', 9))"
        up.run(ends.source, [sys.executable, "-c", send])
        deadline = time.monotonic() + 5
        while int(up.run("n1", counter)) == before:
            assert time.monotonic() < deadline, "no answer came out of the TUN"


def test_profiles_are_applied_to_both_ends_and_taken_back(up: Stand) -> None:
    default = {node: up.features(node) for node in ("n1", "n2")}
    p3 = profile.load("p3")
    up.set_offloads(p3.ethtool)
    for node in default:
        now = up.features(node)
        assert not now["tcp-segmentation-offload"]
        assert not now["generic-segmentation-offload"]
        assert now["generic-receive-offload"]
        assert not any(now[name] for name in p3.ethtool if name.startswith("tx-"))
    up.set_offloads(profile.load("p1").ethtool)
    assert {node: up.features(node) for node in default} == default
    up.set_offloads({}, 9000)
    assert "mtu 9000" in up.run("n2", ["ip", "link", "show", "eth0"])


def test_an_offload_that_the_device_does_not_take_is_an_error(up: Stand) -> None:
    with pytest.raises((ConfigError, LabError), match="no-such-thing"):
        up.set_offloads({"no-such-thing": True})


def test_two_stands_of_one_name_do_not_meet(up: Stand) -> None:
    with pytest.raises(LabError, match="is there already"), stand.raised(up.name):
        pytest.fail("there is one")
    assert up.run("n1", ["ip", "link", "show", "eth0"])


def loden(name: str, out: Path, *argv: str) -> list[str]:
    command = [sys.executable, "-P", "-m", "dataplane.cli", "bench", f"--name={name}", f"--out={out}", *argv]
    return [*command, "--candidates=raw,kernel-vxlan,udp,baseline,prototype"]


def test_a_run_over_all_candidates(name: str, tmp_path: Path) -> None:
    """The baseline speaks flannel's wire, and stands in for a prototype: an adapter gives it that command line."""
    adapter = tmp_path / "adapter.c"
    text = BASELINE.read_text().replace(
        "int main(int count, char **words)", "static int proxy(int count, char **words)"
    )
    adapter.write_text(
        f"{text}\nint main(int count, char **words) {{ (void)count;\n"
        'char all[] = "10.244.0.0/16";\n'
        'char *line[] = {words[0], words[1], words[2], "8285", "10.244.0.0", all, words[3]};\n'
        "return proxy(7, line); }\n"
    )
    quick = ["--quick", "--rounds=1", "--seconds=0.3", f"--prototype={adapter}"]
    done = subprocess.run(
        loden(name, tmp_path / "out", *quick), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" left  p1 1/1 ") == 5
    run = Run.read(tmp_path / "out" / "run.json")
    assert run.complete
    assert json.loads((tmp_path / "out" / "run.json").read_text())["schema"] == "loden-bench/1"
    for candidate in ("raw", "kernel-vxlan", "udp", "baseline", "prototype"):
        assert run.values("p1", candidate, "tcp-1", "gbit_s")[0] > 0.01
        assert run.values("p1", candidate, "udp-64", "kpps")[0] > 1
        assert 0 <= run.values("p1", candidate, "udp-64", "loss")[0] < 1
        assert run.values("p1", candidate, "rtt-busy", "p50_us")[0] > 1
        assert run.values("p1", candidate, "rtt-idle", "loss") == [0.0]
    assert done.stdout == (tmp_path / "out" / "report.md").read_text()
    assert "udp / kernel-vxlan" in done.stdout
    assert name not in Lab.names()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_broken_off_leaves_nothing_but_its_samples(
    name: str, tmp_path: Path, number: signal.Signals
) -> None:
    argv = [*loden(name, tmp_path, "--rounds=9", "--seconds=0.3", "--workloads=tcp-1")[:-1], "--candidates=raw,udp"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "raw" in process.stderr.readline()
    time.sleep(1.5)  # in the middle of the daemons' start or their first sample
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    assert name not in Lab.names()
    assert not [one for one in netns.listed() if name in one]
    run = Run.read(tmp_path / "run.json")
    assert not run.complete
    assert run.values("p1", "raw", "tcp-1", "gbit_s")
    assert "broken off" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--candidates=carrier-pigeon"], "is no candidate"),
        (["--candidates=prototype"], "--prototype"),
        (["--prototype=/nowhere.c"], "no such file"),
        (["--profiles=p9"], "is no profile"),
        (["--workloads=sctp-1"], "is no workload"),
        (["--rounds=0"], "--rounds"),
        (["--seconds=0.01"], "--seconds"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataplane.cli import main

    assert main(["bench", f"--out={tmp_path}/out", *argv]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
