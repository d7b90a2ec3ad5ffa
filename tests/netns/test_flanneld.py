"""A real flanneld beside ours in one cluster: nodes are swapped one by one, and back, by the program's path alone.

Needs LODEN_FLANNELD=/path/to/flanneld (tried with v0.27.4; udp needs one that was built with cgo); skipped without it.
With `-s` it prints what each swap costs the pods' traffic: the table of docs/operations.md.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dataplane.lab import Lab, Node, measure
from tests.examples import documented, shape
from tests.netns.conftest import MakeLab
from tests.netns.observing import until
from tests.netns.real_flanneld import ABSENT, FLANNELD, Case, Cluster, log_of, program, subnet_values

pytestmark = [
    pytest.mark.netns,
    pytest.mark.etcd,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not FLANNELD, reason=ABSENT),
]

USERSPACE = {"Dataplane": "userspace"}
"""Flannel passes over members that it does not know."""
CASES = {
    "udp": Case("udp"),
    "vxlan": Case("vxlan"),
    "vxlan-userspace": Case("vxlan", backend=USERSPACE),
    "vxlan-dual": Case("vxlan", "46"),
    "vxlan-dual-userspace": Case("vxlan", "46", USERSPACE),
    "vxlan-nftables": Case("vxlan", "46", members={"EnableNFTables": True}),
    "host-gw": Case("host-gw"),
    "host-gw-dual": Case("host-gw", "46"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
TCP_BYTES = 2_000_000


def sizes_of(lab: Lab, case: Case, version: int) -> str:
    """Up to a whole packet, and then those that are fragmented. Flannel's MTU is 20 too large over IPv6 (docs/upstream-
    defects.md), so that there its pods lose what is longer than the device until they have learned."""
    mtu = min(int(subnet_values(node)["FLANNEL_MTU"]) for node in lab.nodes.values())
    if version == 6:
        overhead = 70 if case.type == "vxlan" else 0
        return f"1,17,64,512,{min(mtu, lab.settings.underlay_mtu - overhead) - 48}"
    return f"1,17,64,512,{mtu - 28},{mtu - 27},8000,20000"


def carry_both_ways(cluster: Cluster) -> None:
    """A TCP stream and numbered datagrams from n1 to n2 and back, by each IP version: all arrives, unaltered."""
    lab = cluster.lab
    cluster.wait_whole()
    for version in lab.settings.versions:
        for pods in (("n1-p1", "n2-p1"), ("n2-p1", "n1-p1")):
            with lab.traffic("tcp", *pods, f"--bytes={TCP_BYTES}", version=version) as run:
                result = measure.verdict(run, 120)
            assert result["equal"], (pods, version, result)
            flags = (f"--sizes={sizes_of(lab, cluster.case, version)}", "--count=16")
            with lab.traffic("udp", *pods, *flags, version=version) as run:
                result = measure.verdict(run, 120)
            faults = {name: result[name] for name in ("lost", "altered", "duplicated", "stalls")}
            assert faults == {"lost": 0, "altered": 0, "duplicated": 0, "stalls": []}, (pods, version, result)


@contextmanager
def beating(lab: Lab, title: str) -> Iterator[dict[str, Any]]:
    """A stream and a beat of 1,000 datagrams a second, each way, while the block runs; the stream must live."""
    pods = "n1-p1", "n2-p1"
    result: dict[str, Any] = {}
    with (
        lab.traffic("beat", *pods) as there,
        lab.traffic("beat", *reversed(pods)) as back,
        lab.traffic("tcp", *pods, "--bytes=1000000", "--until-eof") as stream,
    ):
        yield result
        verdicts = [measure.verdict(run, 60) for run in (there, back)]
        assert stream.poll() is None, "the stream did not live to see it"
        assert measure.verdict(stream, 120)["equal"]
    result |= {"lost": sum(v["lost"] for v in verdicts), "gap": max(v["gap"] for v in verdicts)}
    sys.stderr.write(f"\n{title}: longest gap {result['gap'] * 1000:.0f} ms, {result['lost']} datagrams lost\n")


@every_case
def test_nodes_are_swapped_one_by_one_and_back(
    make_lab: MakeLab, case: Case, request: pytest.FixtureRequest
) -> None:
    cluster = Cluster.of_flannels(make_lab, case)
    lab = cluster.lab
    n1, n2 = lab.nodes.values()
    carry_both_ways(cluster)
    keys, before = set(cluster.leases()), [subnet_values(node) for node in (n1, n2)]
    for node, ours in ((n2, True), (n1, True), (n2, False), (n1, False)):
        words = "flannel to ours" if ours else "ours to flannel"
        with beating(lab, f"{request.node.callspec.id}, {words}") as result:
            cluster.swap(node, ours=ours)
            cluster.wait_whole()
        if case.stays:
            assert result["lost"] == 0
        carry_both_ways(cluster)
        assert set(cluster.leases()) == keys, "no node got another subnet"
        for each, first in zip((n1, n2), before, strict=True):
            values = subnet_values(each)
            mtu = {name: value for name, value in values.items() if name != "FLANNEL_MTU"}
            assert mtu == {name: value for name, value in first.items() if name != "FLANNEL_MTU"}
    assert [subnet_values(node) for node in (n1, n2)] == before


def test_the_check_of_a_flannel_node_says_what_the_docs_do(make_lab: MakeLab) -> None:
    cluster = Cluster.of_flannels(make_lab, CASES["vxlan-nftables"])
    argv = [sys.executable, "-P", "-m", "dataplane.cli", "migrate", "check"]
    done = cluster.lab.run("n2", argv, check=False)
    assert done.returncode == 0, done.stdout
    assert shape(done.stdout) == shape(documented("migrate-check"))


# --- side by side -------------------------------------------------------------------------------------------------


def differences(one: dict[str, list[str]], other: dict[str, list[str]]) -> dict[str, tuple[list[str], list[str]]]:
    """By what was looked at: lines that only the first has, and those that only the second has."""
    found = {}
    for what in one:
        alone = [x for x in one[what] if x not in other[what]], [x for x in other[what] if x not in one[what]]
        if alone != ([], []):
            found[what] = alone
    return found


@every_case
def test_both_set_the_same_on_a_node(make_lab: MakeLab, case: Case) -> None:
    """Device, addresses, routes, neighbours, FDB, rules, lease, subnet.env; what differs stands here."""
    cluster = Cluster.of_flannels(make_lab, case)
    node = cluster.lab.node("n2")
    theirs, lease, values = cluster.kernel_state(node), cluster.leases(), subnet_values(node)
    cluster.swap(node, ours=True)
    cluster.wait_whole()
    found = differences(theirs, cluster.kernel_state(node))
    if case.userspace:
        for what in ("links", "routes", "IPv6 routes", "neighbours", "FDB"):
            found.pop(what, None)  # a TUN of ours, with one route for the network
    if case.members:
        masq = found.pop("nftables")
        assert [len(each) for each in masq] == [2, 2], masq  # the fourth rule, of each family
        assert all("!=" in line and line.endswith("return") for each in masq for line in each)
    assert found == {}
    assert cluster.leases() == lease
    assert case.type == "vxlan" or "BackendData" not in json.dumps(lease)
    if case.type == "vxlan" and 6 in cluster.lab.settings.versions:
        values["FLANNEL_MTU"] = str(int(values["FLANNEL_MTU"]) - 20)
    assert list(subnet_values(node).items()) == list(values.items()), "also in this order"
    mine = cluster.kernel_state(node)
    cluster.swap(node, ours=False)
    cluster.wait_whole()
    after = differences(theirs, cluster.kernel_state(node))
    if case.userspace and case.type == "vxlan":
        after = {what: lines for what, lines in after.items() if what not in ("links", "FDB")}  # its MAC is a new one
    assert after == {}, mine


KILLED = ("udp", "vxlan-dual", "vxlan-dual-userspace")


@pytest.mark.parametrize("case", [CASES[name] for name in KILLED], ids=KILLED)
def test_after_a_kill_cleanup_frees_the_way_back(make_lab: MakeLab, case: Case) -> None:
    cluster = Cluster.of_flannels(make_lab, case)
    node = cluster.lab.node("n2")
    keys, theirs = set(cluster.leases()), cluster.kernel_state(node)
    cluster.swap(node, ours=True)
    node.stop_daemon(signal.SIGKILL)
    clean = cluster.lab.run(node.name, node.daemon_argv("-cleanup"))
    assert "flannel" not in cluster.lab.run(node.name, ["ip", "link"]).stdout, clean.stderr
    left = {path.name for path in node.directory.glob("subnet.env*")}
    assert left == {"subnet.env", "subnet.env.lock"}, "flannel reads its former subnet there"
    cluster.start(node, ours=False)
    carry_both_ways(cluster)
    assert set(cluster.leases()) == keys
    now = differences(theirs, cluster.kernel_state(node))
    assert {what for what in now if what not in ("links", "FDB")} == set(), now  # the device has another MAC


# --- the command line ---------------------------------------------------------------------------------------------


def run(node: Node, ours: bool, *words: str) -> tuple[int, str]:
    """A command line that ends by itself: its exit code and what it says."""
    done = node.lab.run(node.name, [*program(ours=ours), *words], check=False)
    assert done.stdout == ""
    return done.returncode, done.stderr


def flags_of(usage: str) -> dict[str, str]:
    """By name: the default that the help shows."""
    found: dict[str, str] = {}
    name = ""
    for line in usage.splitlines():
        if line.startswith("  -"):
            name = line.split()[0].lstrip("-")
            found[name] = ""
        elif name and "(default " in line:
            found[name] = line.rpartition("(default ")[2].rstrip(")")
    return found


def test_the_command_line_and_the_codes_are_flannels(make_lab: MakeLab) -> None:
    node = Cluster(make_lab, CASES["udp"], nodes=1).lab.node("n1")
    (code, usage), (their_code, their_usage) = (run(node, ours, "-help") for ours in (True, False))
    assert code == their_code == 0
    ours, theirs = flags_of(usage), flags_of(their_usage)
    assert {name: ours.get(name) for name in theirs} == theirs
    for words in (["--version"], ["-h"], ["-version", "--nonsense"]):
        assert run(node, True, *words)[0] == run(node, False, *words)[0] == 0 or "--nonsense" in words
    for words in (["--nonsense"], ["--healthz-port=x"], ["-subnet-lease-renew-margin=0"], ["-iface"]):
        assert run(node, True, *words)[0] != 0, words  # flannel ends with 0 for most of these: docs/upstream-defects.md


@pytest.mark.parametrize("ours", [False, True], ids=["flannel", "ours"])
@pytest.mark.parametrize("trouble", ["no config", "no etcd", "none"])
def test_a_stop_is_code_0_in_every_state(make_lab: MakeLab, ours: bool, trouble: str) -> None:
    cluster = Cluster(make_lab, CASES["udp"], nodes=1)
    node = cluster.lab.node("n1")
    if trouble == "no config":
        cluster.lab.etcdctl("del", "/coreos.com/network/config")
    elif trouble == "no etcd":
        cluster.lab.run("switch", ["ip", "addr", "flush", "dev", "br0"])
    node.program = program(ours=ours)
    node.start_daemon()
    awaited = "Running backend." if trouble == "none" else "Couldn't fetch network config"
    if trouble == "no etcd" and not ours:
        awaited = "Installing signal handlers"  # and from then on it waits in silence
    until(f"it says `{awaited}`", lambda: awaited in log_of(node), 60)
    assert node.stop_daemon() == 0
    assert "Exiting cleanly" in log_of(node) or trouble != "none"
