"""Daemons that start in the same moment, on a real etcd: each ends up with every other as its peer.

Every daemon is a process of its own, in a network namespace of its own, and is asked by its control socket. They are
forked from one process that has loaded the daemon already, wait at one gate, and begin within ten milliseconds of each
other: started one by one, their interpreters alone would part them by more. A few rounds run in CI; LODEN_RACE_ROUNDS
says how many, and the long form (`make races`) is 200.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from random import Random

import pytest

from dataplane.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.observing import python_in, until

pytestmark = [pytest.mark.netns, pytest.mark.etcd, pytest.mark.timeout(7200)]

ROUNDS = int(os.environ.get("LODEN_RACE_ROUNDS", "0"))
WITHIN = 0.01
"""Seconds between the first start and the last."""

# An order is a line of JSON, [namespace, log, delay, command line] for each daemon. The answer, "started", comes when
# the gate opens; the next line ends them, and their exit codes are the last answer.
WARM = """
import ctypes, json, os, signal, sys, time
from dataplane import daemon
from dataplane.backend import host_gw
from dataplane.kernel import netlink
from dataplane.lease import etcd
import uvloop

def live(namespace, log, delay, argv, gate, here):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.write(here, b".")
    os.read(gate, 1)  # ends when the gate has no writer any more
    time.sleep(delay)
    return daemon.main(argv)

def start(orders):
    (gate, keeper), (arrivals, here) = os.pipe(), os.pipe()
    pids = []
    for order in orders:
        if not (pid := os.fork()):
            code = 99
            try:
                os.close(keeper)
                code = live(*order, gate, here)
            finally:
                os._exit(code)
        pids.append(pid)
    for _ in pids:
        os.read(arrivals, 1)
    for end in (gate, keeper, arrivals, here):
        os.close(end)
    return pids

print("ready", flush=True)
while line := sys.stdin.readline():
    pids = start(json.loads(line))
    print("started", flush=True)
    sys.stdin.readline()
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


class Daemons:
    """Those of every node of the lab, started together by `warm`, once for each round, in a network of its own."""

    def __init__(self, lab: Lab, warm: subprocess.Popen[str], turn: int) -> None:
        self._lab = lab
        self._warm = warm
        self._turn = turn

    def start(self, rng: Random) -> None:
        prefix = f"/race/{self._turn}"
        self._lab.etcdctl("put", f"{prefix}/config", self._lab.settings.net_conf())
        orders = []
        for node in self._lab.nodes.values():
            for left in node.directory.iterdir():  # nothing is remembered of the round before
                left.unlink()
            argv = node.daemon_argv(f"-etcd-prefix={prefix}")[len(node.program) :]
            orders.append([self._lab.namespace(node.name), str(node.log), rng.uniform(0.0, WITHIN), argv])
        assert self._ask(json.dumps(orders)) == "started"

    def stop(self) -> None:
        assert set(json.loads(self._ask(""))) == {0}, "each has ended in order"

    def _ask(self, line: str) -> str:
        assert self._warm.stdin is not None
        assert self._warm.stdout is not None
        self._warm.stdin.write(f"{line}\n")
        self._warm.stdin.flush()
        return self._warm.stdout.readline().rstrip("\n")

    def all_known(self) -> bool:
        statuses = [node.status() or {} for node in self._lab.nodes.values()]
        if not all(status.get("ready") for status in statuses):
            return False
        owned = {status["lease"]["subnet"] for status in statuses}
        assert len(owned) == len(statuses), "each has a subnet of its own"
        known = [{peer["subnet"] for peer in status["peers"]} | {status["lease"]["subnet"]} for status in statuses]
        return all(subnets == owned for subnets in known)

    def lost_races(self) -> int:
        logs = (node.log.read_text() for node in self._lab.nodes.values())
        return sum(log.count("Another node was faster with lease") for log in logs)


@pytest.mark.parametrize(("count", "rounds"), [(2, 5), (20, 2)])
def test_daemons_that_start_together_all_know_each_other(make_lab: MakeLab, count: int, rounds: int) -> None:
    """flannel v0.20 lost a peer in 4 of 32 such starts."""
    lab = make_lab(count, store="etcd", backend="host-gw", pods=0, daemons=False)
    rng, latest, races = Random(count), 0.0, 0
    with python_in(lab, "switch", WARM) as warm:
        for turn in range(ROUNDS or rounds):
            daemons = Daemons(lab, warm, turn)
            daemons.start(rng)
            began = time.monotonic()
            until(f"all know all, in round {turn}", daemons.all_known, 60)
            latest = max(latest, time.monotonic() - began)
            daemons.stop()
            races += daemons.lost_races()
    sys.stdout.write(f"{ROUNDS or rounds} rounds of {count}: {races} races lost, the latest complete {latest:.2f} s\n")
