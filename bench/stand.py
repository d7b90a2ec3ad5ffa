"""Owns the test stand: two nodes joined by one veth pair, a bridge `cni0` and one pod on each, all in namespaces.

A lab (dataplane.lab) has a switch between its nodes; here nothing may stand in the way, and the underlay's offloads are
set on both its ends. Names, addresses and processes are the lab's, so `loden lab down --name=...` removes a stand whose
process was killed. Free of: what is measured. Invariant: nothing is left when the block of `raised` ends, however it
ends; between two profiles both ends have again what the kernel gave them.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path

from dataplane.errors import ConfigError
from dataplane.lab import ROOT, Lab, LabError, members, netns, plan
from dataplane.lab.machine import check_machine

NETWORK = IPv4Network("10.192.0.0/10")
"""Room for more than 10,000 subnets."""
SUBNETS = IPv4Network("10.244.0.0/16")
"""Where those of the nodes are."""
NODES = (1, 2)
_DELETE_TABLE = ("table", ["nft", "delete", "table"])
_LOSS_TABLE = "loden_loss"

_FEATURE = re.compile(r"^\s*([\w-]+): (on|off)(?: \[(.*)\])?$", re.MULTILINE)
_LONG_NAMES = {
    "tso": "tcp-segmentation-offload",
    "gso": "generic-segmentation-offload",
    "gro": "generic-receive-offload",
}
"""`ethtool -K` takes the short name, `ethtool -k` prints the long one."""


@dataclass(eq=False)
class Stand:
    """A stand that is up. `node` is 1 or 2; a member is `n1`, `n2`, `n1-p1` or `n2-p1`."""

    name: str
    underlay_mtu: int = 1500
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _features: dict[str, dict[str, bool]] = field(default_factory=dict)

    # --- where things are -------------------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        return ROOT / self.name

    @staticmethod
    def address(node: int) -> IPv4Interface:
        """Underlay address."""
        return plan.node_address(node)

    @staticmethod
    def subnet(node: int) -> IPv4Network:
        """The node's subnet, the same for every candidate."""
        return list(SUBNETS.subnets(new_prefix=24))[node]

    @staticmethod
    def pods(node: int, mtu: int) -> plan.PodNetwork:
        subnet = Stand.subnet(node)
        return plan.PodNetwork(IPv4Interface((subnet.network_address + 1, subnet.prefixlen)), mtu)

    @staticmethod
    def pod_address(node: int) -> str:
        return str(Stand.pods(node, 0).pod_address(1))

    def namespace(self, member: str) -> str:
        return plan.namespace(self.name, member)

    # --- life -------------------------------------------------------------------------------------------------

    def _raise(self) -> None:
        self.directory.mkdir(parents=True, mode=0o755)
        netns.add([self.namespace(member) for node in NODES for member in (f"n{node}", f"n{node}-p1")])
        for node in NODES:
            netns.set_sysctls(self.namespace(f"n{node}"), plan.NODE_SYSCTLS)
            netns.set_sysctls(self.namespace(f"n{node}-p1"), plan.QUIET_IPV6)
        mtu = self.underlay_mtu
        cable = f"link add eth0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {self.namespace('n2')}"
        netns.configure(self.namespace("n1"), [cable])
        for node in NODES:
            where, network = self.namespace(f"n{node}"), self.pods(node, mtu)
            netns.configure(where, plan.node_links(self.address(node)))
            netns.configure(where, plan.pod_bridge(network))
            netns.configure(where, plan.pod_port(self.name, f"n{node}", 1, network))
            netns.configure(self.namespace(f"n{node}-p1"), plan.pod_links(1, network))
            self._features[f"n{node}"] = self.features(f"n{node}")

    # --- settings ---------------------------------------------------------------------------------------------

    def configure(self, member: str, commands: Sequence[str]) -> None:
        """`ip` commands inside a member."""
        netns.configure(self.namespace(member), commands)

    def set_pod_mtu(self, mtu: int) -> None:
        for node in NODES:
            self.configure(f"n{node}", [f"link set cni0 mtu {mtu}", f"link set p1 mtu {mtu}"])
            self.configure(f"n{node}-p1", [f"link set eth0 mtu {mtu}"])

    def inventory(self, member: str) -> dict[str, set[str]]:
        """The member's links, routes and nftables, by the words that `ip` and `nft` take to delete them."""
        links = {link["ifname"] for link in json.loads(self.run(member, ["ip", "-j", "link"]))}
        routes = {line.strip() for line in self.run(member, ["ip", "route"]).splitlines()}
        tables = {line.removeprefix("table ") for line in self.run(member, ["nft", "list", "tables"]).splitlines()}
        return {"link": links, "route": routes, "table": tables}

    def sweep(self, member: str, before: Mapping[str, set[str]]) -> None:
        """Delete what was not there `before`: what others leave behind is not the next one's. Routes come after the
        links that take theirs along."""
        for kind, delete in (("link", ["ip", "link", "del"]), ("route", ["ip", "route", "del"]), _DELETE_TABLE):
            for name in self.inventory(member)[kind] - before[kind]:
                words = name.replace(" linkdown", "").split()
                self.attempt(member, [*delete, *words])

    def features(self, member: str, device: str = "eth0") -> dict[str, bool]:
        """Offload features of a device that can be changed, by the names that `ethtool -k` prints."""
        found = _FEATURE.findall(self.run(member, ["ethtool", "-k", device]))
        return {name: state == "on" for name, state, note in found if "fixed" not in note}

    def set_underlay(
        self, ethtool: Mapping[str, bool], mtu: int = 1500, *, loss: float = 0.0, delay_ms: float = 0.0
    ) -> None:
        """Make both ends of the underlay what a profile says, from their own defaults on. `loss`: share of the frames
        that each end throws away as they come; `delay_ms`: how long each holds those that go. Raises ConfigError for a
        feature that the device does not take, or a delay that the kernel cannot give."""
        for node in NODES:
            member = f"n{node}"
            self.configure(member, [f"link set eth0 mtu {mtu}"])
            self._ethtool(member, self._features[member])
            self._ethtool(member, ethtool)
            now = self.features(member)
            for name, state in ethtool.items():
                if now.get(_LONG_NAMES.get(name, name), state) != state:
                    raise ConfigError(f"{member}: eth0 does not take {name} {'on' if state else 'off'}")
            self._lose(member, loss)
            self._delay(member, delay_ms)
        self.underlay_mtu = mtu

    def _lose(self, member: str, share: float) -> None:
        """At random, not every n-th: a flow whose packets come in bursts of n would lose all or nothing."""
        self.attempt(member, ["nft", "delete", "table", "netdev", _LOSS_TABLE])
        if share:
            rule = f"numgen random mod 1000000 < {round(share * 1e6)} counter drop"
            chain = f'chain in {{ type filter hook ingress device "eth0" priority 0;\n{rule}\n}}'
            self.run(member, ["nft", "-f", "-"], stdin=f"table netdev {_LOSS_TABLE} {{\n{chain}\n}}\n")

    def _delay(self, member: str, milliseconds: float) -> None:
        self.attempt(member, ["tc", "qdisc", "del", "dev", "eth0", "root"])
        if milliseconds:
            netem = ["netem", "delay", f"{milliseconds}ms", "limit", "100000"]
            try:
                self.run(member, ["tc", "qdisc", "add", "dev", "eth0", "root", *netem])
            except LabError as error:
                why = "only the netem queue can delay, and this kernel has none (CONFIG_NET_SCH_NETEM)"
                raise ConfigError(f"this machine cannot delay the underlay: {why}. {error}") from None

    def _ethtool(self, member: str, wanted: Mapping[str, bool]) -> None:
        now = self.features(member)
        changes = [
            word
            for name, state in wanted.items()
            if now.get(_LONG_NAMES.get(name, name)) != state
            for word in (name, "on" if state else "off")
        ]
        if changes:
            self.run(member, ["ethtool", "-K", "eth0", *changes])

    # --- processes --------------------------------------------------------------------------------------------

    def run(self, member: str, argv: Sequence[str], *, stdin: str = "", timeout: float = 30.0) -> str:
        """Run a command inside to its end; its output. Raises LabError."""
        try:
            done = subprocess.run(
                netns.within(self.namespace(member), argv),
                input=stdin,
                capture_output=True,
                text=True,
                timeout=timeout,
                env=members.environment(self.name, f"{member}/run"),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"{member}: `{' '.join(argv)}` has not ended after {timeout:.0f} s") from None
        if done.returncode != 0:
            raise LabError(f"{member}: `{' '.join(argv)}` ended with {done.returncode}: {done.stderr or done.stdout}")
        return done.stdout

    def attempt(self, member: str, argv: Sequence[str]) -> bool:
        """Run a command that may fail, since what it undoes may never have been done."""
        try:
            self.run(member, argv)
        except LabError:
            return False
        return True

    def open_process(self, member: str, argv: Sequence[str]) -> subprocess.Popen[str]:
        """Start a command inside with pipes; it ends with the stand at the latest."""
        return members.pipe(self.name, f"{member}/load", netns.within(self.namespace(member), argv))

    def start(self, member: str, role: str, argv: Sequence[str]) -> None:
        """Start a candidate's process inside a member; `stop` ends it. Its output goes to a log."""
        argv = netns.within(self.namespace(member), argv)
        self._processes[f"{member}/{role}"] = members.start(self.name, f"{member}/{role}", argv, self.log(member, role))

    def run_script(self, member: str, role: str, argv: Sequence[str], environment: Mapping[str, str]) -> str:
        """Run a script of the user's to its end; its standard output. What it leaves running is of this `role`, so it
        may keep the output open: that goes to files. Raises LabError."""
        log = self.log(member, role)
        marked = {**members.environment(self.name, f"{member}/{role}"), **environment}
        with log.open("ab") as said, tempfile.TemporaryFile("w+") as output:
            try:
                done = subprocess.run(
                    netns.within(self.namespace(member), argv),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=said,
                    env=marked,
                    timeout=60,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise LabError(f"{member}: `{' '.join(argv)}` has not ended after 60 s") from None
            output.seek(0)
            text = output.read()
        if done.returncode != 0:
            end = log.read_text(errors="replace")[-2000:]
            raise LabError(f"{member}: `{' '.join(argv)}` ended with {done.returncode}:\n{text}{end}")
        return text

    def processes(self, role: str) -> tuple[int, ...]:
        """What runs of this role, on both nodes."""
        return tuple(one.pid for node in NODES for one in members.running(self.name, f"n{node}/{role}"))

    def stop(self, member: str, role: str) -> None:
        """End what `start` or a script started, if it did; returns when its devices are gone with it."""
        members.end(members.running(self.name, f"{member}/{role}"))
        if process := self._processes.pop(f"{member}/{role}", None):
            process.wait(timeout=10)

    def log(self, member: str, role: str) -> Path:
        return self.directory / f"{member}-{role}.log"

    def wait_for(self, what: str, member: str, role: str, ready: Callable[[], bool], seconds: float = 20.0) -> None:
        """Until `ready` while the process of `role` lives. Raises LabError with the end of its log."""
        deadline = time.monotonic() + seconds
        while not ready():
            ended = self._processes[f"{member}/{role}"].poll() is not None
            if ended or time.monotonic() > deadline:
                log = self.log(member, role).read_text(errors="replace")[-2000:]
                how = "ended" if ended else f"took more than {seconds:.0f} s"
                raise LabError(f"{role} on {member} {how} before {what}; the end of its log:\n{log}")
            time.sleep(0.05)


@contextmanager
def raised(name: str) -> Iterator[Stand]:
    """A stand for the length of the block. Raises ConfigError where this machine cannot have one, LabError where one
    of this name is there already."""
    check_machine("sqlite")
    stand = Stand(plan.check_lab_name(name))
    if name in Lab.names():
        raise LabError(f"a stand or lab {name!r} is there already: `loden lab down --name={name}`, or wait for its end")
    try:
        stand._raise()
        yield stand
    finally:
        Lab.destroy(name)
