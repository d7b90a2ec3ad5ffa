"""etcd as it fails in life, below daemons that carry traffic: no failure of the store may cost a packet.

Each test runs numbered datagrams both ways between two nodes of a lab while a real etcd is killed, stopped, wiped,
compacted or robbed, and counts what was lost, altered, doubled or reordered: nothing. What the store itself does in
such hours without traffic is in tests/lease/test_etcd_failures.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dataplane.lab import Lab, Node, measure, members, netns, plan
from tests.netns.conftest import MakeLab
from tests.netns.observing import SUBNETS, put_lease, reaches, status_of, until

pytestmark = [pytest.mark.netns, pytest.mark.etcd, pytest.mark.timeout(300)]

FLOW = ("--sizes=16,64,512,1400", "--count=4", "--pause=0.01", "--until-eof")
HAND_MADE = "10.244.210.0-24"
FAULTS = ("lost", "altered", "duplicated", "reordered", "stalls")


@contextmanager
def unharmed(lab: Lab, one: str = "n1-p1", other: str = "n2-p1") -> Iterator[None]:
    """Traffic both ways while the block runs, of which nothing may be missing."""
    with lab.traffic("udp", one, other, *FLOW) as there, lab.traffic("udp", other, one, *FLOW) as back:
        time.sleep(0.3)
        yield
        for run in (there, back):
            assert run.poll() is None
            result = measure.verdict(run, 60)
            assert {name: result[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0) | {"stalls": []}, result
            assert result["received"] == result["sent"] > 20


@dataclass
class Server:
    """One etcd process of a lab."""

    lab: Lab
    role: str = "etcd"

    @property
    def pid(self) -> int:
        (member,) = members.running(self.lab.name, self.role)
        return member.pid

    def kill(self) -> list[str]:
        """End it as a crash does; the command line that it had."""
        pid = self.pid
        argv = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
        members.end(members.running(self.lab.name, self.role), first=signal.SIGKILL)
        return argv

    def start(self, argv: list[str]) -> None:
        where = netns.within(self.lab.namespace("switch"), argv)
        members.start(self.lab.name, self.role, where, self.lab.directory / f"{self.role}.log")

    @contextmanager
    def paused(self, seconds: float) -> Iterator[None]:
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
            time.sleep(seconds)
        finally:
            os.kill(self.pid, signal.SIGCONT)


def healthy(lab: Lab) -> bool:
    return lab.etcdctl("endpoint", "health", "--command-timeout=2s", check=False).returncode == 0


def calm(lab: Lab) -> bool:
    """Every daemon is ready, and nothing is wrong with the store for it."""
    statuses = [node.status() for node in lab.nodes.values()]
    return all(status and status["ready"] and not status["store_error"] for status in statuses)


def troubled(lab: Lab) -> bool:
    return all(status_of(node)["store_error"] for node in lab.nodes.values())


def own_key(node: Node) -> str:
    subnet: str = status_of(node)["lease"]["subnet"]
    return SUBNETS + subnet.replace("/", "-")


def stored(lab: Lab, key: str) -> dict[str, Any] | None:
    """A key as etcd has it; None where it is absent."""
    kvs = json.loads(lab.etcdctl("get", key, "-w", "json").stdout).get("kvs", [])
    return kvs[0] if kvs else None


def peer_at(node: Node, subnet: str) -> str | None:
    """The address at which a node sends to a subnet."""
    found = [peer["public_ip"] for peer in status_of(node)["peers"] if peer["subnet"] == subnet]
    return found[0] if found else None


def lease_text(ip: str) -> str:
    return f'{{"PublicIP":"{ip}","PublicIPv6":null}}'


def follows(lab: Lab, ip: str) -> bool:
    """Whether every node knows the lease that was put by hand, at this address."""
    return all(peer_at(node, "10.244.210.0/24") == ip for node in lab.nodes.values())


def test_the_server_is_killed_and_restarted(make_lab: MakeLab) -> None:
    lab = make_lab(2, store="etcd")
    server = Server(lab)
    with unharmed(lab):
        for _ in range(2):
            argv = server.kill()
            until("the daemons notice", lambda: troubled(lab))
            time.sleep(1)
            server.start(argv)
            until("etcd is back", lambda: healthy(lab))
            until("the daemons are calm", lambda: calm(lab))
        third = lab.join()
        assert reaches(lab, "n1-p1", f"{third.name}-p1")


def test_the_server_is_slow(make_lab: MakeLab) -> None:
    lab = make_lab(2, store="etcd")
    server = Server(lab)
    with unharmed(lab):
        for seconds in (1.5, 7.0, 1.5):  # in the second one every call fails by its deadline
            with server.paused(seconds):
                assert all(status_of(node)["ready"] for node in lab.nodes.values())
            put_lease(lab, HAND_MADE, lease_text(f"198.18.7.{int(seconds)}"))
            until("the daemons follow", lambda ip=f"198.18.7.{int(seconds)}": follows(lab, ip))  # type: ignore[misc]  # bound at once
        until("the daemons are calm", lambda: calm(lab))


class Cluster:
    """Three members of etcd in a lab: the lab's own and two that join it, each at ports of its own."""

    NAMES = ("lab", "two", "three")

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._clients = dict(zip(self.NAMES, (2379, 2381, 2383), strict=True))
        self.members = {name: Server(lab, "etcd" if name == "lab" else f"etcd-{name}") for name in self.NAMES}
        for name in self.NAMES[1:]:
            self._join(name)

    def url(self, name: str, *, of_peers: bool = False) -> str:
        return f"http://{plan.SWITCH_ADDRESS.ip}:{self._clients[name] + of_peers}"

    @property
    def endpoints(self) -> str:
        return ",".join(map(self.url, self.NAMES))

    def _join(self, name: str) -> None:
        client, peer = self.url(name), self.url(name, of_peers=True)
        added = ("member", "add", name, f"--peer-urls={peer}")
        until("the cluster takes a member", lambda: self._lab.etcdctl(*added, check=False).returncode == 0, 40)
        known = self.NAMES[: self.NAMES.index(name) + 1]
        self.members[name].start([
            *("etcd", f"--name={name}", f"--data-dir={self._lab.directory}/etcd-{name}", "--log-level=warn"),
            *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
            *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"),
            f"--initial-cluster={','.join(f'{each}={self.url(each, of_peers=True)}' for each in known)}",
            "--initial-cluster-state=existing",
        ])  # fmt: skip
        until("the member is there", lambda: healthy(self._lab), 40)

    def at(self, urls: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """etcdctl of these members alone."""
        argv = ["env", "ETCDCTL_API=3", "etcdctl", f"--endpoints={urls}", *arguments]
        return self._lab.run("switch", argv, stdin=stdin, check=False)

    def leader(self) -> str | None:
        """By name; None while the members do not agree on one."""
        done = self.at(self.endpoints, "endpoint", "status", "-w", "json")
        rows = json.loads(done.stdout) if done.returncode == 0 else []
        leading = [row["Endpoint"] for row in rows if row["Status"]["leader"] == row["Status"]["header"]["member_id"]]
        return next((name for name in self.NAMES if self.url(name) in leading), None)

    def move_leader(self) -> None:
        old = until("a leader", self.leader)
        rows = json.loads(self._lab.etcdctl("member", "list", "-w", "json").stdout)["members"]
        target = next(f"{row['ID']:x}" for row in rows if row["name"] != old)
        until("the leader moves", lambda: self.at(self.url(old), "move-leader", target).returncode == 0)

    def close(self) -> None:
        """End the members that joined; the lab ends its own."""
        for name in self.NAMES[1:]:
            self.members[name].kill()


def test_the_leader_moves_and_dies(make_lab: MakeLab) -> None:
    lab = make_lab(2, store="etcd")
    with closing(Cluster(lab)) as cluster:
        until("the members agree", cluster.leader)
        for node in lab.nodes.values():
            node.stop_daemon()
            node.start_daemon(f"-etcd-endpoints={cluster.endpoints}")
            node.wait_ready()
        lab.settle()
        until("the overlay works", lambda: reaches(lab, "n1-p1", "n2-p1"))
        with unharmed(lab):
            cluster.move_leader()
            put_lease(lab, HAND_MADE, lease_text("198.18.7.1"))
            until("the daemons follow the new leader", lambda: follows(lab, "198.18.7.1"))
            # the member that all daemons speak to dies, and it may be the leader
            cluster.members["lab"].kill()
            two = cluster.url("two")
            until("two members go on", lambda: cluster.at(two, "endpoint", "health").returncode == 0, 40)
            assert cluster.at(two, "put", SUBNETS + HAND_MADE, stdin=lease_text("198.18.7.2")).returncode == 0
            until("the daemons follow at another endpoint", lambda: follows(lab, "198.18.7.2"), 40)
            until("the daemons are calm", lambda: calm(lab))


@contextmanager
def cut_off_from_the_store(lab: Lab, node: str) -> Iterator[None]:
    """The node's packets to etcd and back vanish; everything else goes on."""
    rules = [("OUTPUT", "-p", "tcp", "--dport", "2379"), ("INPUT", "-p", "tcp", "--sport", "2379")]
    for rule in rules:
        lab.run(node, ["iptables", "-I", *rule, "-j", "DROP"])
    try:
        yield
    finally:
        for rule in rules:
            lab.run(node, ["iptables", "-D", *rule, "-j", "DROP"])


def test_the_history_is_compacted_and_grows_past_four_megabytes_while_a_node_is_cut_off(make_lab: MakeLab) -> None:
    lab = make_lab(2, store="etcd")
    put_lease(lab, HAND_MADE, lease_text("198.18.7.1"))
    put_lease(lab, "10.244.211.0-24", lease_text("198.18.7.8"))
    until("the daemons follow", lambda: follows(lab, "198.18.7.1"))
    cut = lab.node("n1")
    with unharmed(lab):
        with cut_off_from_the_store(lab, "n1"):
            put_lease(lab, HAND_MADE, lease_text("198.18.7.2"))
            lab.etcdctl("del", f"{SUBNETS}10.244.211.0-24")
            for number in range(6):
                lab.etcdctl("put", f"{SUBNETS}10.244.{220 + number}.0-24", stdin="x" * 1_000_000)
            until("the other node follows", lambda: peer_at(lab.node("n2"), "10.244.210.0/24") == "198.18.7.2")
            revision = json.loads(lab.etcdctl("get", "x", "-w", "json").stdout)["header"]["revision"]
            lab.etcdctl("compact", str(revision))
            until("the node notices", lambda: status_of(cut)["store_error"], 60)
            assert peer_at(cut, "10.244.210.0/24") == "198.18.7.1"
        until("the changed peer is changed", lambda: peer_at(cut, "10.244.210.0/24") == "198.18.7.2", 40)
        until("the removed peer is removed", lambda: peer_at(cut, "10.244.211.0/24") is None)
        assert all("more than 4096" in status_of(cut)["rejected"][f"10.244.{220 + n}.0-24"] for n in range(6))
        until("the daemons are calm", lambda: calm(lab))


def test_the_token_expires(make_lab: MakeLab) -> None:
    lab = make_lab(2, store="etcd")
    for arguments in (
        ("user", "add", "root:secret"), ("user", "grant-role", "root", "root"), ("role", "add", "flannel"),
        ("role", "grant-permission", "flannel", "--prefix=true", "readwrite", "/coreos.com/network/"),
        ("user", "add", "node:secret"), ("user", "grant-role", "node", "flannel"), ("auth", "enable"),
    ):  # fmt: skip
        lab.etcdctl(*arguments)
    server = Server(lab)
    server.start([*server.kill(), "--auth-token-ttl=1"])
    as_root = "--user=root:secret"
    until("etcd is back", lambda: lab.etcdctl(as_root, "endpoint", "health", check=False).returncode == 0)
    for node in lab.nodes.values():
        node.stop_daemon()
        node.start_daemon("-etcd-username=node", "-etcd-password=secret")
        node.wait_ready()
    lab.settle()
    until("the overlay works", lambda: reaches(lab, "n1-p1", "n2-p1"))
    with unharmed(lab):
        time.sleep(3)  # the tokens of both daemons are too old now
        key = own_key(lab.node("n1"))
        lab.etcdctl(as_root, "del", key)
        until("the lease is put back", lambda: "PublicIP" in lab.etcdctl(as_root, "get", key).stdout)
        lab.etcdctl(as_root, "put", SUBNETS + HAND_MADE, stdin=lease_text("198.18.7.1"))
        until("the daemons follow", lambda: follows(lab, "198.18.7.1"))
        until("the daemons are calm", lambda: calm(lab))


def test_the_data_are_wiped(make_lab: MakeLab) -> None:
    lab = make_lab(2, store="etcd")
    put_lease(lab, HAND_MADE, lease_text("198.18.7.1"))
    until("the daemons follow", lambda: follows(lab, "198.18.7.1"))
    server = Server(lab)
    keys = [own_key(node) for node in lab.nodes.values()]
    with unharmed(lab):
        argv = server.kill()
        shutil.rmtree(lab.directory / "etcd")
        server.start(argv)
        until("etcd is back", lambda: healthy(lab))
        until("both leases are put back", lambda: all(stored(lab, key) for key in keys))
        until("the daemons are calm", lambda: calm(lab))
        assert follows(lab, "198.18.7.1"), "a peer that did not come back stays for the grace period"
    assert all("peers are kept for 10m0s" in node.log.read_text() for node in lab.nodes.values())


@pytest.mark.parametrize("how", ["deleted", "expired"])
def test_our_own_lease_is_gone(make_lab: MakeLab, how: str) -> None:
    lab = make_lab(2, store="etcd")
    key = own_key(lab.node("n1"))
    before = stored(lab, key)
    assert before is not None
    with unharmed(lab):
        if how == "deleted":
            lab.etcdctl("del", key)
        else:
            lab.etcdctl("lease", "revoke", f"{before['lease']:x}")  # what etcd itself does when the TTL is over
        after = until("the lease is put back", lambda: stored(lab, key))
        assert after["create_revision"] > before["create_revision"]
        assert after["value"] == before["value"]
        time.sleep(4)  # longer than a peer keeps what is lost
    assert calm(lab)
    assert "is gone from etcd" in lab.node("n1").log.read_text()


def test_our_own_lease_is_taken_by_another_node(make_lab: MakeLab) -> None:
    lab = make_lab(2, store="etcd", pods=2)
    node = lab.node("n1")
    key = own_key(node)
    theirs = lease_text("198.18.7.66")
    with unharmed(lab, "n1-p1", "n1-p2"):
        lab.etcdctl("put", key, stdin=theirs)
        until("the node is fenced", lambda: status_of(node)["lease"]["fenced"])
        assert not status_of(node)["ready"]
        time.sleep(2)
        taken = stored(lab, key)
        assert taken is not None
        assert taken["version"] == 2, "written by the thief alone"
        assert "This node is fenced" in node.log.read_text()
        lab.etcdctl("del", key)
        until("the node has its lease again", lambda: calm(lab))
    until("the overlay works", lambda: reaches(lab, "n1-p1", "n2-p1"))


def test_a_daemon_that_is_killed_while_the_store_is_down_carries_packets_again_without_it(make_lab: MakeLab) -> None:
    lab = make_lab(2, store="etcd")
    node, server = lab.node("n1"), Server(lab)
    before = status_of(node)
    state = Path(f"{node.subnet_file}.state")
    until("the peers are in the state file", lambda: len(json.loads(state.read_text())["state"]["peers"]) == 1)
    argv = server.kill()
    node.stop_daemon(signal.SIGKILL)
    node.start_daemon()
    until("packets are carried", lambda: reaches(lab, "n1-p1", "n2-p1"))
    after = status_of(node)
    assert (after["ready"], after["lease"]["subnet"]) == (False, before["lease"]["subnet"])
    assert "Beginning without the lease store" in node.log.read_text()
    with unharmed(lab):
        server.start(argv)
        until("etcd is back", lambda: healthy(lab))
        until("the daemons are calm", lambda: calm(lab))
    assert status_of(node)["lease"]["subnet"] == before["lease"]["subnet"]


def test_a_daemon_that_began_without_the_store_takes_the_network_that_it_finds(make_lab: MakeLab) -> None:
    lab = make_lab(1, store="etcd")
    node, server = lab.node("n1"), Server(lab)
    state = Path(f"{node.subnet_file}.state")
    until("the lease is in the state file", lambda: json.loads(state.read_text())["state"]["own"])
    node.stop_daemon(signal.SIGKILL)
    lab.etcdctl("put", "/coreos.com/network/config", stdin='{"Network":"10.99.0.0/16"}')
    with server.paused(2.0):  # a store that hangs is waited for no longer than a moment
        node.start_daemon()
        until("packets are carried by the old config", lambda: (node.status() or {}).get("peers") == [])

    def taken() -> bool:
        """Not only ready: that it is with the old network, too, between finding the store and reading its config."""
        status = node.status() or {}
        return bool(status.get("ready")) and status["lease"]["subnet"].startswith("10.99.")

    until("the new network is taken", taken, 30)
    assert "FLANNEL_NETWORK=10.99.0.0/16" in node.subnet_file.read_text()
