"""Owns one machine of a lab: its daemon, its pods and its cable.

Free of: how the machine and the lab around it are built. Invariant: a node whose daemon was killed, cut off or moved
can be started again by the same calls.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataplane.debug import control
from dataplane.errors import LodenError
from dataplane.lab import members, netns, plan
from dataplane.lab.plan import LabError

if TYPE_CHECKING:
    from dataplane.lab import Lab

DAEMON = (sys.executable, "-P", "-m", "dataplane")
"""-P: the package that is installed, not a folder that happens to have its name where the command was typed."""


@dataclass(eq=False)
class Node:
    """One machine of the lab. Its daemon, pods and cable can be handled one by one."""

    lab: Lab
    number: int
    address: IPv4Interface
    program: Sequence[str] = field(default_factory=lambda: DAEMON)
    """What `start_daemon` starts; another flanneld takes the same flags, but for those that are ours alone."""
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return f"n{self.number}"

    @property
    def addresses(self) -> list[IPv4Interface | IPv6Interface]:
        """Of the underlay, by the IP versions of the lab."""
        both: dict[int, IPv4Interface | IPv6Interface] = {4: self.address, 6: plan.node_address_v6(self.number)}
        return [both[version] for version in self.lab.settings.versions]

    @property
    def directory(self) -> Path:
        return self.lab.directory / self.name

    @property
    def subnet_file(self) -> Path:
        return self.directory / "subnet.env"

    @property
    def log(self) -> Path:
        return self.directory / "flanneld.log"

    @property
    def pods(self) -> list[str]:
        return [f"{self.name}-p{number}" for number in range(1, self.lab.settings.pods + 1)]

    def daemon_argv(self, *flags: str) -> list[str]:
        """The command line of this node's daemon, with further flags."""
        dataplane = self.lab.settings.dataplane_of(self.number)
        chosen = [f"-vxlan-dataplane={dataplane}"] if dataplane else []
        where = ["-iface=eth0", f"-subnet-file={self.subnet_file}", *self.lab.store_flags]
        return [*self.program, *where, *chosen, *flags]

    def start_daemon(self, *flags: str) -> None:
        """Start flanneld on this node; returns at once, see `wait_ready`."""
        argv = netns.within(self.lab.namespace(self.name), self.daemon_argv(*flags))
        self._process = members.start(self.lab.name, self.role, argv, self.log)

    def stop_daemon(self, number: signal.Signals = signal.SIGTERM, patience: float = 10.0) -> int | None:
        """End the daemon. Returns its exit code where this process started it (negative: the signal)."""
        if left := members.end(members.running(self.lab.name, self.role), first=number, patience=patience):
            raise LabError(f"node {self.name}: flanneld, process {left[0].pid}, does not end, not even by SIGKILL")
        return None if self._process is None else self._process.wait(timeout=5)

    @property
    def role(self) -> str:
        return f"{self.name}/flanneld"

    @property
    def pids(self) -> list[int]:
        """The daemon's processes; one while it runs."""
        return [member.pid for member in members.running(self.lab.name, self.role)]

    def status(self) -> dict[str, Any] | None:
        """What the daemon answers to `status`; None where none answers."""
        try:
            status: dict[str, Any] = control.request(f"{self.subnet_file}.sock", "status")
        except LodenError:
            return None
        return status

    def wait_ready(self, timeout: float = 30.0) -> dict[str, Any]:
        """Until the daemon is ready and has written subnet.env. Raises LabError with the end of its log."""
        deadline = time.monotonic() + timeout
        while True:
            status = self.status()
            if status is not None and status["ready"] and self.subnet_file.exists():
                return status
            if self._process is not None and (code := self._process.poll()) is not None:
                raise LabError(f"node {self.name}: flanneld ended with code {code}{self.log_end()}")
            if time.monotonic() > deadline:
                raise LabError(f"node {self.name}: flanneld is not ready after {timeout:.0f} s{self.log_end()}")
            time.sleep(0.05)

    def log_end(self, lines: int = 12) -> str:
        """The last lines of the daemon's log, as the tail of an error text."""
        with suppress(FileNotFoundError):
            last = self.log.read_text(errors="replace").splitlines()[-lines:]
            return f"; the end of {self.log}:\n" + "\n".join(f"    {line}" for line in last)
        return f"; it has no log at {self.log}"

    def connect_pods(self) -> plan.PodNetwork:
        """Make `cni0` and the pods' interfaces by subnet.env, in place of those of an earlier subnet."""
        network = self.pod_network()
        where = self.lab.namespace(self.name)
        if self.lab.run(self.name, ["ip", "link", "show", "cni0"], check=False).returncode == 0:
            ports = [f"link del p{number}" for number in range(1, len(self.pods) + 1)]
            netns.configure(where, [*ports, "link del cni0"])
        netns.configure(where, plan.pod_bridge(network))
        for number, pod in enumerate(self.pods, start=1):
            netns.configure(where, plan.pod_port(self.lab.name, self.name, number, network))
            netns.configure(self.lab.namespace(pod), plan.pod_links(number, network))
        return network

    def pod_network(self) -> plan.PodNetwork:
        """What subnet.env says. Raises LodenError where the daemon has not written it."""
        try:
            text = self.subnet_file.read_text()
        except FileNotFoundError:
            raise LabError(f"node {self.name} has no subnet yet: its daemon was never ready{self.log_end()}") from None
        return plan.PodNetwork.parse(text, str(self.subnet_file))

    def cut(self) -> None:
        """Take the node's cable out, at the switch's end."""
        netns.configure(self.lab.namespace("switch"), [f"link set {self.name} down"])

    def heal(self) -> None:
        netns.configure(self.lab.namespace("switch"), [f"link set {self.name} up"])

    def readdress(self, address: IPv4Interface) -> None:
        """Give the node another underlay address; its daemon has to be restarted by the caller."""
        netns.configure(self.lab.namespace(self.name), ["addr flush dev eth0", f"addr add {address} dev eth0"])
        self.address = address
        self.lab.save()
