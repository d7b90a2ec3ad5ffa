"""The harness in namespaces: the stand, each candidate up and down, a whole short run, and Ctrl-C in one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataplane.bench import composite, far, profile, stand
from dataplane.bench.candidate import Candidate, KernelVxlan, Raw, carrying
from dataplane.bench.ends import Timing, far_leases
from dataplane.bench.flanneld import Daemon, Foreign
from dataplane.bench.program import Baseline, Prototype, PythonProxy, Tunnel
from dataplane.bench.record import Run
from dataplane.bench.roster import BACKENDS
from dataplane.bench.stand import Stand
from dataplane.bench.workload import Workload
from dataplane.debug import control
from dataplane.errors import ConfigError
from dataplane.lab import Lab, LabError, netns
from tests.examples import documented, shape

pytestmark = [pytest.mark.netns, pytest.mark.timeout(240)]

BASELINE = Path(stand.__file__).parent / "baselines" / "one_packet.c"
STAND_IN = Path(__file__).parent / "stand_in_flanneld.py"

# A tunnel of the kernel's, and a process left behind that holds the script's output open.
TUNNEL = """#!/bin/sh
set -e
if [ "$1" = up ]; then
    ip link add gre7 mtu 1400 type vxlan id 7 remote "$REMOTE" local "$LOCAL" dev eth0 dstport 7777
    ip link set gre7 up
    ip addr add 192.0.2.$NODE/24 dev gre7
    ip route add "$PEER_SUBNET" via 192.0.2.$((3 - NODE)) dev gre7
    sleep 1000 &
    echo "up on node $NODE, for $SUBNET"
    echo 1400
fi
"""

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


@pytest.fixture
def tunnel(tmp_path: Path) -> Path:
    script = tmp_path / "tunnel.sh"
    script.write_text(TUNNEL)
    script.chmod(0o755)
    return script


CANDIDATES: list[Candidate] = [
    *(Raw(), KernelVxlan(), Baseline(), PythonProxy("asyncio"), PythonProxy("uvloop")),
    *(Daemon(name, backend) for name, backend in BACKENDS.items()),
    Daemon("etcd", with_leases=True),
    *(Foreign("go-udp", STAND_IN, "udp"), Foreign("go-vxlan", STAND_IN, "vxlan")),
]


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda one: one.name)
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


def test_a_tunnel_of_the_users_carries_and_leaves_nothing(up: Stand, tunnel: Path) -> None:
    up.set_pod_mtu(1450)
    before = state(up)
    candidate = Tunnel("mine", tunnel)
    with carrying(candidate, up) as ends:
        assert ends.mtu == 1400
        assert len(ends.processes) == 2  # what its scripts have left running
        assert all(Path(f"/proc/{process}").exists() for process in ends.processes)
    up.set_pod_mtu(1450)
    assert state(up) == before
    assert not up.processes("mine")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "ended with 3"),
        ("echo never mind", "printed no MTU"),
        ("ip link add x7 type dummy; exit 1", "ended with 1"),
    ],
)
def test_a_tunnel_that_does_not_come_up(up: Stand, tmp_path: Path, script: str, said: str) -> None:
    file = tmp_path / "bad.sh"
    file.write_text(f"#!/bin/sh\n[ $1 = up ] || exit 9\n{script}\n")
    file.chmod(0o755)
    before = state(up)
    with pytest.raises(LabError, match=said), carrying(Tunnel("bad", file), up):
        pytest.fail("it cannot carry")
    assert state(up) == before


def test_a_foreign_start_that_fails_is_repeated(up: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = tmp_path / "failures"
    failures.write_text("2")
    monkeypatch.setenv("STAND_IN_FAILURES", str(failures))
    with carrying(Foreign("go", STAND_IN, "udp"), up) as ends:
        assert ends.starts == 3
    failures.write_text("9")
    with (
        pytest.raises(LabError, match=r"(?s)3 starts have failed.*told to fail"),
        carrying(Foreign("go", STAND_IN, "udp"), up),
    ):
        pytest.fail("it never starts")


@pytest.mark.parametrize(
    "candidate",
    [
        KernelVxlan(),
        Daemon("udp", with_leases=True),
        Daemon("vxlan", BACKENDS["vxlan"], with_leases=True),
        Daemon("kernel", BACKENDS["vxlan"], ["--vxlan-dataplane=kernel"], with_leases=True),
    ],
    ids=lambda one: one.name,
)
def test_far_leases_are_taken_moved_and_removed(up: Stand, candidate: Candidate) -> None:
    up.set_pod_mtu(1450)
    before = state(up)
    with carrying(candidate, up) as ends:
        timing = Timing(0.1, 0.3)
        found = Workload.parse("peers-30").run(up, ends, timing, "cubic")
        assert found["kpps_one"] > 1
        assert found["kpps_all"] > 1
        assert found["loss_all"] < 1
        assert ends.leases is not None
        with far.roads(up):
            ends.leases.put(far_leases(30))
            composite.settle(up, ends, far_leases(30))
            ends.leases.put(far_leases(30, generation=1))
            composite.settle(up, ends, far_leases(30))
            assert far.arrived(up)[1] >= 30
            ends.leases.clear()
    up.set_pod_mtu(1450)
    assert state(up) == before
    for member in ("n2-p1", "n2", "n1"):
        assert "10.192" not in up.run(member, ["ip", "route", "show", "table", "all"])


@pytest.mark.parametrize("backend", ["udp", "vxlan"])
def test_a_change_of_all_leases_under_load(up: Stand, backend: str) -> None:
    """Few leases and a short sample: what is tested is the measurement, not the path's speed."""
    with carrying(Daemon(backend, BACKENDS[backend], with_leases=True), up) as ends:
        found = composite.publish(up, ends, Timing(0.2, 0.5), count=50, least=1.5)
        assert found["quiet_gap_ms"] > 0
        assert found["gap_ms"] > 0
        assert found["kpps"] > 1
        assert 0 <= found["loss"] < 1


def test_a_held_gil_stops_no_packet(up: Stand) -> None:
    with carrying(Daemon("udp", disturbed=True), up) as ends:
        found = composite.gil(up, ends, Timing(0.2, 0.5))
        assert found["held_kpps"] > 1
        assert found["held_gap_ms"] < 900, "the path has waited for the GIL"


@pytest.mark.parametrize("backend", ["udp", "vxlan"])
def test_a_new_table_under_load(up: Stand, backend: str) -> None:
    with carrying(Daemon(backend, BACKENDS[backend], disturbed=True), up) as ends:
        found = composite.table(up, ends, Timing(0.2, 0.5), count=300)
        assert min(found["kpps"], found["quiet_kpps"]) > 1
        assert found["published_ms"] > 0
        routes = control.request(ends.control, "status")["peers"]
        assert sum(peer["subnet"].startswith("10.19") for peer in routes) == 300


def test_a_path_in_the_kernel_has_no_table_to_replace(up: Stand) -> None:
    kernel = {"Type": "vxlan", "Dataplane": "kernel"}
    with carrying(Daemon("kernel", kernel, disturbed=True), up) as ends:
        assert "kernel" in composite.table(up, ends, Timing(0.2, 0.5), count=300)["skipped"]


def test_what_a_capture_costs_is_told_with_what_it_recorded(up: Stand) -> None:
    with carrying(Daemon("vxlan", BACKENDS["vxlan"]), up) as ends:
        found = Workload.parse("capture").run(up, ends, Timing(0.1, 0.3), "cubic")
        assert min(found[f"{way}_kpps"] for way in ("never", "off", "nothing", "all")) > 1
        assert 0 < found["recorded"] <= 1
        assert found["off_share"] == pytest.approx(found["off_kpps"] / found["never_kpps"])
        assert min(found["nothing_share"], found["all_share"]) > 0
        assert not list(up.directory.glob("*.pcapng"))
        assert control.request(ends.control, "status")["captures"] == []


@pytest.mark.parametrize(
    "candidate",
    [Baseline(), Daemon("vxlan", BACKENDS["vxlan"]), Daemon("host-gw", BACKENDS["host-gw"], with_leases=True)],
    ids=lambda one: one.name,
)
def test_what_a_candidate_cannot_do_is_skipped_with_the_reason(up: Stand, candidate: Candidate) -> None:
    with carrying(candidate, up) as ends:
        for name in ("peers-10", "publish", "table", "gil"):
            assert " " in Workload.parse(name).run(up, ends, Timing(0.1, 0.2), "cubic")["skipped"]
        if not ends.control:
            assert " " in Workload.parse("capture").run(up, ends, Timing(0.1, 0.2), "cubic")["skipped"]


def test_a_sweep_finds_the_rate_of_a_bucket(up: Stand) -> None:
    """A token bucket lets 100 Mbit/s through: that many datagrams of 1,000 bytes, and no more, arrive whole."""
    with carrying(Raw(), up) as ends:
        bucket = ["tbf", "rate", "100mbit", "burst", "32kb", "latency", "5ms"]
        up.run("n1", ["tc", "qdisc", "add", "dev", "eth0", "root", *bucket])
        found = Workload.parse("sweep-1000").run(up, ends, Timing(0.1, 0.6), "cubic")
        up.run("n1", ["tc", "qdisc", "del", "dev", "eth0", "root"])
    assert found["loss"] < 0.001
    most = 100e3 / 8 / 1042  # kpps
    assert 0.75 * most <= found["kpps"] <= 1.02 * most
    assert any(point["loss"] > 0.1 for point in found["points"])


@pytest.mark.parametrize("loss", [0.0, 0.05])
def test_loss_of_the_underlay_is_what_the_profile_says(up: Stand, loss: float) -> None:
    features = dict(profile.load("loss1").ethtool)
    up.set_underlay(features, loss=loss)
    with carrying(Raw(), up) as ends:
        found = Workload.parse("udp-64@20000").run(up, ends, Timing(0.1, 1.0), "cubic")
    assert found["loss"] == pytest.approx(loss, rel=0.2, abs=1e-9)  # 20,000 at 5 %: a deviation is 3 %
    up.set_underlay({})
    assert "loden_loss" not in up.run("n2", ["nft", "list", "ruleset"])


def test_delay_of_the_underlay_or_why_there_is_none(up: Stand) -> None:
    """Where the kernel has netem a round trip takes as long as it must; where not, the error names what is missing."""
    if up.attempt("n1", ["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]):
        up.set_underlay({}, delay_ms=5.0)
        with carrying(Raw(), up) as ends:
            found = Workload.parse("rtt-idle").run(up, ends, Timing(0.1, 0.5), "cubic")
        assert found["p50_us"] >= 10_000
    else:
        with pytest.raises(ConfigError, match="CONFIG_NET_SCH_NETEM"):
            up.set_underlay({}, delay_ms=5.0)


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
    up.set_underlay(p3.ethtool)
    for node in default:
        now = up.features(node)
        assert not now["tcp-segmentation-offload"]
        assert not now["generic-segmentation-offload"]
        assert now["generic-receive-offload"]
        assert not any(now[name] for name in p3.ethtool if name.startswith("tx-"))
    up.set_underlay(profile.load("p1").ethtool)
    assert {node: up.features(node) for node in default} == default
    up.set_underlay({}, 9000)
    assert "mtu 9000" in up.run("n2", ["ip", "link", "show", "eth0"])


def test_an_offload_that_the_device_does_not_take_is_an_error(up: Stand) -> None:
    with pytest.raises((ConfigError, LabError), match="no-such-thing"):
        up.set_underlay({"no-such-thing": True})


def test_two_stands_of_one_name_do_not_meet(up: Stand) -> None:
    with pytest.raises(LabError, match="is there already"), stand.raised(up.name):
        pytest.fail("there is one")
    assert up.run("n1", ["ip", "link", "show", "eth0"])


def loden(name: str, out: Path, *argv: str) -> list[str]:
    command = [sys.executable, "-P", "-m", "dataplane.cli", "bench", f"--name={name}", f"--out={out}", *argv]
    return [*command, "--candidates=raw,kernel-vxlan,udp,baseline"]


def test_a_run_over_all_candidates(name: str, tmp_path: Path, tunnel: Path) -> None:
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
    brought = [f"--prototype={adapter}", f"--tunnel=mine={tunnel}", f"--flanneld=go={STAND_IN},udp,vxlan"]
    quick = ["--quick", "--rounds=1", "--seconds=0.3", *brought]
    done = subprocess.run(
        loden(name, tmp_path / "out", *quick), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" left  p1 1/1 ") == 8
    run = Run.read(tmp_path / "out" / "run.json")
    assert run.complete
    assert json.loads((tmp_path / "out" / "run.json").read_text())["schema"] == "loden-bench/2"
    for candidate in ("raw", "kernel-vxlan", "udp", "baseline", "prototype", "go-udp", "go-vxlan", "mine"):
        assert run.values("p1", candidate, "tcp-1", "gbit_s")[0] > 0.01
        assert run.values("p1", candidate, "udp-64", "kpps")[0] > 1
        assert 0 <= run.values("p1", candidate, "udp-64", "loss")[0] < 1
        assert run.values("p1", candidate, "rtt-busy", "p50_us")[0] > 1
        assert run.values("p1", candidate, "rtt-busy", "loss") == [0.0]
        assert run.values("p1", candidate, "tcp-1", "cpu_s_per_gb")[0] > 0
        own = run.values("p1", candidate, "tcp-1", "tunnel_cpu_s_per_gb")[0]
        assert (own > 0) == (candidate in ("udp", "baseline", "prototype", "go-udp")), "whose work is in processes"
        assert run.starts[candidate] == [1]
    assert done.stdout == (tmp_path / "out" / "report.md").read_text()
    assert "udp / kernel-vxlan" in done.stdout
    assert "The generator without a tunnel" in done.stdout
    for file in ("report.html", "tcp-1.svg", "udp-64.svg", "latency-p1.svg", "cpu-tcp-1.svg", "pytest-benchmark.json"):
        assert (tmp_path / "out" / file).stat().st_size > 1000
    again = ["bench", "report", f"{tmp_path}/out", f"--to={tmp_path}/again"]
    subprocess.run([sys.executable, "-P", "-m", "dataplane.cli", *again], check=True, capture_output=True, timeout=60)
    assert (tmp_path / "again" / "report.html").read_text() == (tmp_path / "out" / "report.html").read_text()
    assert name not in Lab.names()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", ["udp", "go"])
def test_a_run_that_is_broken_off_leaves_nothing_but_its_samples(
    name: str, tmp_path: Path, second: str, number: signal.Signals
) -> None:
    argv = loden(name, tmp_path, "--rounds=9", "--seconds=0.3", "--workloads=tcp-1")[:-1]
    foreign = ["--candidates=raw", f"--flanneld=go={STAND_IN},udp"]
    argv += foreign if second == "go" else ["--candidates=raw,udp"]
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


def test_a_candidate_that_never_carries_is_a_result_and_an_exit_code(name: str, tmp_path: Path) -> None:
    argv = [*loden(name, tmp_path, "--rounds=1", "--seconds=0.2", "--workloads=tcp-1", "--profiles=p1")[:-1]]
    argv += ["--candidates=raw", "--flanneld=dead=/bin/false,udp"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "nothing could be measured of: dead-udp" in done.stderr
    assert "3 starts have failed" in done.stdout
    run = Run.read(tmp_path)
    assert run.complete
    assert run.values("p1", "raw", "tcp-1", "gbit_s")
    assert run.starts == {"raw": [1], "dead-udp": [0]}
    assert name not in Lab.names()


def test_injected_faults_come_back(name: str, tmp_path: Path) -> None:
    """The harness against itself: half the rate, and a hundredth lost. Buckets and counters decide, not the machine."""
    argv = [sys.executable, "-P", "-m", "dataplane.cli", "bench", f"--name={name}", "selftest", f"--keep={tmp_path}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"slowdown of TCP: injected 2, measured (1\.[89]|2\.[012])\d*: found", done.stdout)
    assert re.search(r"loss of datagrams, %: injected 1, measured (0\.9|1\.0)\d*: found", done.stdout)
    assert shape(documented("selftest")) == [line for line in shape(done.stdout) if "injected" in line]
    assert name not in Lab.names()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--candidates=carrier-pigeon"], "is no candidate"),
        (["--candidates=prototype"], "--prototype"),
        (["--prototype=/nowhere.c"], "no such file"),
        (["--profiles=p9"], "is no profile"),
        (["--workloads=sctp-1"], "is no workload"),
        (["--flanneld=go"], "NAME=PATH"),
        (["--flanneld=go=/nowhere/flanneld"], "is no program"),
        (["--ours=k1"], "NAME=BACKEND"),
        (["--ours=k1=ipip"], "backends: host-gw, vxlan, udp"),
        (["--ours=k1=vxlan,k=1"], "NAME=BACKEND[,FLAG...]"),
        (["--candidates=vxlan", "--ours=vxlan=udp"], "two candidates are called 'vxlan'"),
        (["--tunnel=mine"], "NAME=SCRIPT"),
        (["--tunnel=mine=/nowhere.sh"], "no such file"),
        (["--flanneld=a=/bin/true,udp", "--flanneld=a=/bin/false,udp"], "two candidates are called 'a-udp'"),
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
