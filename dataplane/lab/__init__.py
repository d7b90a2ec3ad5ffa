"""Owns a lab: nodes as network namespaces on this machine, each with a daemon, a `cni0` bridge and pods.

Free of: what the daemons do; they are started as an operator starts them and asked by their control sockets.
Invariant: whatever a lab made carries its name (namespaces), lies in its directory (files) or carries its mark
(processes), so `Lab.destroy` finds all of it without being told, also after a crash half-way through `Lab.create`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from ipaddress import IPv4Address, IPv4Interface, IPv6Address
from pathlib import Path
from typing import Any

from dataplane.errors import ConfigError, LodenError
from dataplane.lab import measure, members, netns, plan
from dataplane.lab.machine import check_machine
from dataplane.lab.measure import RoundTrips
from dataplane.lab.node import Node
from dataplane.lab.plan import LabError, Settings

ROOT = Path("/run/loden")
_CLI = (sys.executable, "-P", "-m", "dataplane.cli")


__all__ = ["ROOT", "Lab", "LabError", "Node", "Settings"]


def _silent(_text: str) -> None:
    """The progress of a lab that nobody watches."""


class Lab:
    """A lab that stands. Make one with `create`, find one with `open`, remove one with `destroy`."""

    def __init__(self, name: str, settings: Settings, progress: Callable[[str], None] = _silent) -> None:
        self.name = plan.check_lab_name(name)
        self.settings = settings
        self.nodes: dict[str, Node] = {}
        self._progress = progress

    # --- life -------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        name: str,
        nodes: int = 3,
        settings: Settings | None = None,
        progress: Callable[[str], None] = _silent,
        *,
        daemons: bool = True,
    ) -> Lab:
        """Build a lab and wait until every node knows every other. Raises LabError, and then nothing is left.

        `daemons`: False for machines without a daemon and with unconnected pods, on which the caller starts its own.
        """
        lab = cls(name, settings or Settings(), progress)
        if not 1 <= nodes <= plan.MAX_NODES:
            raise ConfigError(f"a lab has 1 to {plan.MAX_NODES} nodes, not {nodes}")
        lab.settings.check_count(nodes)
        check_machine(lab.settings.store)
        if lab.directory.exists() or lab.namespaces():
            raise LabError(f"a lab {name!r} is there already: `loden lab down --name={name}`, or take another --name")
        try:
            lab._build_switch()
            lab._start_store()
            for _ in range(nodes):
                lab.add_node(start=daemons)
            if daemons:
                for node in lab.nodes.values():
                    lab._bring_up(node)
                lab.settle()
        except BaseException:
            cls.destroy(name)
            raise
        return lab

    @classmethod
    def open(cls, name: str) -> Lab:
        """The lab that another command made. Raises LabError where it is not there."""
        path = ROOT / plan.check_lab_name(name) / "lab.json"
        try:
            stored = json.loads(path.read_text())
            lab = cls(name, Settings(**stored["settings"]))
            for number, address in stored["nodes"].items():
                lab.nodes[f"n{number}"] = Node(lab, int(number), IPv4Interface(address))
        except FileNotFoundError:
            there = ", ".join(cls.names()) or "none"
            raise LabError(f"there is no lab {name!r} (there are: {there}): make one with `loden lab up`") from None
        except (ValueError, KeyError, TypeError) as error:
            raise LabError(f"{path} cannot be read ({error}): `loden lab down --name={name}` removes the lab") from None
        return lab

    @staticmethod
    def names() -> list[str]:
        """Labs of which something is left on this machine."""
        in_namespaces = {lab for name in netns.listed() if (lab := plan.lab_of(name))}
        in_files = {entry.name for entry in ROOT.iterdir()} if ROOT.is_dir() else set()
        return sorted(in_namespaces | in_files)

    @staticmethod
    def destroy(name: str) -> bool:
        """Remove every trace of a lab, whole or half-made; False where there was none. Raises LabError."""
        lab = Lab(name, Settings())
        processes, namespaces = members.running(name), lab.namespaces()
        there = bool(processes or namespaces or lab.directory.exists())
        # The store goes last: daemons that stop in order may still want to speak to it.
        stores = [member for member in processes if member.role == "etcd"]
        left = members.end([member for member in processes if member not in stores]) + members.end(stores)
        netns.delete(namespaces)
        if lab.directory.exists():
            shutil.rmtree(lab.directory)
        with suppress(OSError):  # other labs live there
            ROOT.rmdir()
        if left:
            raise LabError(f"lab {name}: processes {[member.pid for member in left]} do not end, not even by SIGKILL")
        return there

    # --- where things are -------------------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        return ROOT / self.name

    @property
    def pods(self) -> list[str]:
        return [pod for node in self.nodes.values() for pod in node.pods]

    def node(self, name: str) -> Node:
        try:
            return self.nodes[name]
        except KeyError:
            raise LabError(f"lab {self.name} has no node {name!r}; it has {', '.join(self.nodes)}") from None

    def namespace(self, member: str) -> str:
        return plan.namespace(self.name, member)

    def namespaces(self) -> list[str]:
        return [name for name in netns.listed() if plan.member_of(self.name, name) is not None]

    @property
    def store_flags(self) -> list[str]:
        """The flags by which flanneld and loden reach this lab's store, from inside its namespaces."""
        if self.settings.store == "etcd":
            return [f"-etcd-endpoints={plan.etcd_url(self._etcd_address)}"]
        return [f"-lease-store=sqlite://{self.directory}/leases.db"]

    @property
    def _etcd_address(self) -> IPv4Address | IPv6Address:
        """Of the IP version that every node of this lab has."""
        return plan.SWITCH_ADDRESS.ip if 4 in self.settings.versions else plan.SWITCH_ADDRESS_V6.ip

    def address_of(self, pod: str, version: int = 0) -> str:
        """Overlay address of a pod, `n1-p1`: of that IP version, or of the first that the lab has."""
        node, _, number = pod.partition("-p")
        return str(self.node(node).pod_network().pod_address(int(number), version))

    # --- building ---------------------------------------------------------------------------------------------

    @contextmanager
    def _step(self, what: str) -> Iterator[None]:
        try:
            yield
        except LodenError as error:
            raise LabError(f"lab {self.name}, {what}: {error}") from error
        self._progress(what)

    def _build_switch(self) -> None:
        mtu = self.settings.underlay_mtu
        with self._step(f"switch: a bridge with {plan.SWITCH_ADDRESS}, MTU {mtu}"):
            self.directory.mkdir(parents=True, mode=0o755)
            self.save()
            switch = self.namespace("switch")
            netns.add([switch])
            netns.set_sysctls(switch, [*plan.SWITCH_SYSCTLS, *self._ipv6_sysctls])
            netns.configure(switch, plan.switch_links(mtu))
            if 6 in self.settings.versions:
                netns.configure(switch, plan.switch_links_v6())

    @property
    def _ipv6_sysctls(self) -> tuple[str, ...]:
        return plan.SPEAKING_IPV6 if 6 in self.settings.versions else plan.QUIET_IPV6

    def _start_store(self) -> None:
        with self._step(f"store: {self.settings.store}, network {self.settings.network}"):
            if self.settings.store == "etcd":
                self._start_etcd()
            set_conf = [*_CLI, "net-conf", "set", "-", *(flag.replace("-", "--", 1) for flag in self.store_flags)]
            self.run("switch", set_conf, stdin=self.settings.net_conf())

    def _start_etcd(self) -> None:
        log = self.directory / "etcd.log"
        argv = plan.etcd(self._etcd_address, f"{self.directory}/etcd")
        process = members.start(self.name, "etcd", netns.within(self.namespace("switch"), argv), log)
        deadline = time.monotonic() + 20
        while self.etcdctl("endpoint", "health", check=False).returncode != 0:
            if process.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"etcd does not answer; its log:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)

    def etcdctl(self, *arguments: str, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run Debian's etcdctl against this lab's etcd."""
        return self.run("switch", plan.etcdctl(self._etcd_address, *arguments), stdin=stdin, check=check)

    def add_node(self, *, start: bool = True) -> Node:
        """A further machine with its cable and unconnected pods; its daemon is started, not waited for."""
        number = max((node.number for node in self.nodes.values()), default=0) + 1
        node = Node(self, number, plan.node_address(number))
        with self._step(f"node {node.name}: {' and '.join(map(str, node.addresses))} and {self.settings.pods} pod(s)"):
            node.directory.mkdir(mode=0o755)
            self.nodes[node.name] = node
            self.save()
            netns.add([self.namespace(member) for member in (node.name, *node.pods)])
            routing = plan.ROUTING_IPV6 if 6 in self.settings.versions else ()
            netns.set_sysctls(self.namespace(node.name), [*plan.NODE_SYSCTLS, *self._ipv6_sysctls, *routing])
            for pod in node.pods:
                netns.set_sysctls(self.namespace(pod), self._ipv6_sysctls)
            port = plan.switch_port(self.name, node.name, self.settings.underlay_mtu)
            netns.configure(self.namespace("switch"), port)
            netns.configure(self.namespace(node.name), plan.node_links(*node.addresses))
            if start:
                node.start_daemon()
        return node

    def _bring_up(self, node: Node) -> None:
        with self._step(f"node {node.name}: daemon and pods"):
            node.wait_ready()
            node.connect_pods()

    def join(self) -> Node:
        """A further node, from the namespace to pods that all others reach."""
        node = self.add_node()
        self._bring_up(node)
        self.settle()
        return node

    def remove_node(self, name: str) -> None:
        """Stop a node's daemon in order and take the machine away; its lease stays until it expires."""
        node = self.node(name)
        node.stop_daemon()
        netns.delete([self.namespace(member) for member in (*node.pods, name)])
        shutil.rmtree(node.directory)
        del self.nodes[name]
        self.save()

    def settle(self, timeout: float = 20.0) -> None:
        """Until every running daemon lists every other one's lease, at its present public address."""
        with self._step("leases: every node knows every other"):
            deadline = time.monotonic() + timeout
            while missing := self._unknown():
                if time.monotonic() > deadline:
                    node, subnet = missing
                    raise LabError(
                        f"node {node.name} has not learned lease {subnet} in {timeout:.0f} s{node.log_end()}"
                    )
                time.sleep(0.05)

    def _unknown(self) -> tuple[Node, str] | None:
        statuses = {node: status for node in self.nodes.values() if (status := node.status()) and status.get("lease")}
        owned = {node: _owned(status["lease"], status["backend"]) for node, status in statuses.items()}
        held = set().union(*owned.values())
        for node, status in statuses.items():
            if status["dataplane"] == "none":
                continue  # alloc: nobody is carried anywhere
            known = {(peer["subnet"], peer["public_ip"]) for peer in status["peers"]} | owned[node]
            if held - known:
                return node, min(held - known)[0]
        return None

    def save(self) -> None:
        """Keep what `open` needs; written whole or not at all."""
        nodes = {node.number: str(node.address) for node in self.nodes.values()}
        temporary = self.directory / "lab.json.new"
        temporary.write_text(json.dumps({"settings": asdict(self.settings), "nodes": nodes}, indent=2) + "\n")
        temporary.replace(self.directory / "lab.json")

    # --- using ------------------------------------------------------------------------------------------------

    def run(
        self, member: str, argv: Sequence[str], *, stdin: str = "", timeout: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a node or pod to its end. Raises LabError on a non-zero exit if `check`, and on timeout."""
        command = netns.within(self.namespace(member), argv)
        environment = members.environment(self.name, f"{member}/run")
        try:
            done = subprocess.run(
                command, input=stdin, capture_output=True, text=True, timeout=timeout, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"{member}: `{' '.join(argv)}` has not ended after {timeout:.0f} s") from None
        if check and done.returncode != 0:
            raise LabError(f"{member}: `{' '.join(argv)}` ended with {done.returncode}: {done.stderr or done.stdout}")
        return done

    def open_process(self, member: str, argv: Sequence[str]) -> subprocess.Popen[str]:
        """Start a command in a node or pod with pipes; it ends with the lab at the latest."""
        return members.pipe(self.name, f"{member}/{Path(argv[0]).name}", netns.within(self.namespace(member), argv))

    def exec_argv(self, member: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` in a node or pod. Raises LabError for an unknown name."""
        if self.namespace(member) not in self.namespaces():
            there = ", ".join([*self.nodes, *self.pods, "switch"])
            raise LabError(f"lab {self.name} has no node or pod {member!r}; it has {there}")
        return netns.within(self.namespace(member), argv)

    def ping(self, source: str, target: str, count: int = 20, *, version: int = 0) -> RoundTrips:
        """Ping from pod to pod (`version`: see `address_of`); all is lost where the target's node has no subnet yet."""
        if not self.node(target.partition("-p")[0]).subnet_file.exists():
            return RoundTrips(source, target, 0, 0, None)
        address = self.address_of(target, version)
        argv = ["ping", "-n", "-c", str(count), "-i", "0.02", "-W", "1", address]
        return RoundTrips.parse(source, target, self.run(source, argv, check=False).stdout, address)

    def ping_all(self, count: int = 20) -> list[RoundTrips]:
        """Every pod to every other, both directions, by every IP version, a few pairs at a time."""
        pairs = [
            (source, target, version)
            for version in self.settings.versions
            for source in self.pods
            for target in self.pods
            if source != target
        ]
        with ThreadPoolExecutor(max_workers=4) as pool:
            return list(pool.map(lambda pair: self.ping(pair[0], pair[1], count, version=pair[2]), pairs))

    def traffic(
        self, kind: str, source: str, target: str, *flags: str, version: int = 0
    ) -> AbstractContextManager[subprocess.Popen[str]]:
        """A checked `tcp` or `udp` run from pod to pod, or a `beat`, started; its result is `measure.verdict`."""
        return measure.traffic(self.open_process, kind, source, target, self.address_of(target, version), flags)


def _owned(lease: dict[str, Any], backend: str) -> set[tuple[str, str]]:
    """Which subnets a lease holds, each with the outer address that carries it."""
    outer_v6 = lease["public_ip"] if backend == "udp" else lease["public_ipv6"]
    pairs = {(lease["subnet"], lease["public_ip"]), (lease["subnet_v6"], outer_v6)}
    return {(subnet, outer) for subnet, outer in pairs if subnet is not None}
