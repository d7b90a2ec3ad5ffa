"""Owns the candidates: a path between the two nodes of a stand that is brought up, tells its ends, and is taken down.

All but `raw` carry between the same two pods at the same addresses; bridge and pods get the candidate's MTU. Free of:
traffic. Invariant: after `down` the nodes have the links, routes and neighbours that they had before `up`, also where
`up` failed half-way.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from dataplane.bench.stand import NETWORK, NODES, Stand
from dataplane.bench.workload import Ends
from dataplane.debug import control
from dataplane.errors import ConfigError, LodenError
from dataplane.lab import LabError, plan
from dataplane.lab.node import DAEMON

_BASELINE = Path(__file__).parent / "baselines" / "one_packet.c"
_PORT = 8285
_DEVICE = "flannel0"


class Candidate(Protocol):
    """A path that can be measured."""

    name: str

    def up(self, stand: Stand) -> Ends:
        """Bring the path up. Raises LodenError; `down` is called after that too."""

    def down(self, stand: Stand) -> None: ...


@contextmanager
def carrying(candidate: Candidate, stand: Stand) -> Iterator[Ends]:
    """The candidate's path for the length of the block, once its far end has answered."""
    try:
        ends = candidate.up(stand)
        stand.set_pod_mtu(ends.mtu)
        # The first packets go to address resolution; they are the warm-up of the path, not a part of what is counted.
        stand.run(ends.source, ["ping", "-q", "-n", "-i", "0.1", "-c", "3", "-W", "2", ends.address])
        yield ends
    finally:
        candidate.down(stand)


def _pod_to_pod(mtu: int) -> Ends:
    return Ends("n1-p1", "n2-p1", Stand.pod_address(2), mtu)


class Raw:
    """The underlay itself, node to node: no pods, no bridge, no tunnel. Nothing can be faster."""

    name = "raw"

    def up(self, stand: Stand) -> Ends:
        return Ends("n1", "n2", str(stand.address(2).ip), stand.underlay_mtu)

    def down(self, stand: Stand) -> None:
        """Nothing was made."""


class KernelVxlan:
    """The kernel's VXLAN device as flannel sets it up; no daemon is in the way."""

    name = "kernel-vxlan"
    _device = "flannel.1"

    def up(self, stand: Stand) -> Ends:
        mtu = stand.underlay_mtu - 50
        for node in NODES:
            self._make(stand, node, mtu)
        return _pod_to_pod(mtu)

    def _make(self, stand: Stand, node: int, mtu: int) -> None:
        peer = NODES[0] + NODES[1] - node
        own, other = stand.subnet(node).network_address, stand.subnet(peer).network_address
        device = self._device
        tunnel = f"id 1 dev eth0 local {stand.address(node).ip} dstport 8472 nolearning"
        stand.configure(
            f"n{node}",
            [
                f"link add {device} address {_mac(node)} mtu {mtu} type vxlan {tunnel}",
                f"addr add {own}/32 dev {device}",
                f"link set {device} up",
                f"neigh replace {other} lladdr {_mac(peer)} dev {device} nud permanent",
            ],
        )
        entry = ["fdb", "replace", _mac(peer), "dev", device, "dst", str(stand.address(peer).ip), "self", "permanent"]
        stand.run(f"n{node}", ["bridge", *entry])
        stand.configure(f"n{node}", [f"route replace {stand.subnet(peer)} via {other} dev {device} onlink"])

    def down(self, stand: Stand) -> None:
        for node in NODES:
            if f" {self._device}: " in stand.run(f"n{node}", ["ip", "-o", "link"]):
                stand.configure(f"n{node}", [f"link del {self._device}"])


class Daemon:
    """Our flanneld with the embedded store, and the flags that the user adds to its own."""

    name = "udp"

    def __init__(self, flags: Sequence[str] = ()) -> None:
        self._flags = flags

    def up(self, stand: Stand) -> Ends:
        store = f"sqlite://{stand.directory}/leases.db"
        backend = {"Type": "udp", "Port": _PORT}
        net_conf = json.dumps({"Network": str(NETWORK), "SubnetLen": 24, "Backend": backend})
        cli = [sys.executable, "-P", "-m", "dataplane.cli", "net-conf", "set", "-", f"--lease-store={store}"]
        stand.run("n1", cli, stdin=net_conf)
        for node in NODES:
            self._start(stand, node, store)
        for node in NODES:
            stand.wait_for("it knew its peer", f"n{node}", self.name, partial(self._ready, stand, node))
        network = plan.PodNetwork.parse(self._subnet_file(stand, 1).read_text(), str(self._subnet_file(stand, 1)))
        return _pod_to_pod(network.mtu)

    def _start(self, stand: Stand, node: int, store: str) -> None:
        # A daemon asks for the subnet that it finds in its file: so the pods keep their addresses.
        file = self._subnet_file(stand, node)
        file.write_text(f"FLANNEL_NETWORK={NETWORK}\nFLANNEL_SUBNET={stand.pods(node, 0).bridge}\n")
        flags = ["-iface=eth0", f"-subnet-file={file}", f"-lease-store={store}"]
        # Firewall rules would slow the candidates that come after.
        argv = [*DAEMON, *flags, "-iptables-forward-rules=false", *self._flags]
        stand.start(f"n{node}", self.name, argv)

    def _ready(self, stand: Stand, node: int) -> bool:
        file = self._subnet_file(stand, node)
        try:
            status = control.request(f"{file}.sock", "status")
        except LodenError:
            return False
        if not status["ready"] or "FLANNEL_MTU" not in file.read_text():
            return False
        if status["lease"]["subnet"] != str(stand.subnet(node)):
            raise LabError(f"n{node} was given {status['lease']['subnet']}, not {stand.subnet(node)}: leases of old?")
        return len(status["peers"]) == len(NODES) - 1

    @staticmethod
    def _subnet_file(stand: Stand, node: int) -> Path:
        return stand.directory / f"n{node}-subnet.env"

    def down(self, stand: Stand) -> None:
        for node in NODES:
            stand.stop(f"n{node}", self.name)


class Program:
    """A C program that makes a TUN device by itself; the harness compiles it and gives the device address and route."""

    def __init__(self, name: str, source: Path, compiler_flags: Sequence[str]) -> None:
        self.name = name
        self._source = source
        self._compiler_flags = compiler_flags

    def arguments(self, stand: Stand, node: int, peer: int) -> list[str]:
        """What follows the program's name on its command line."""
        raise NotImplementedError

    def up(self, stand: Stand) -> Ends:
        program = compiled(self._source, self._compiler_flags, stand.directory / self.name)
        mtu = stand.underlay_mtu - 28
        for node in NODES:
            peer = NODES[0] + NODES[1] - node
            stand.start(f"n{node}", self.name, [str(program), *self.arguments(stand, node, peer)])
        for node in NODES:
            stand.wait_for("its device was there", f"n{node}", self.name, partial(_has_device, stand, node))
            device = [
                f"link set {_DEVICE} mtu {mtu}",
                f"addr add {stand.subnet(node).network_address}/32 dev {_DEVICE}",
                f"link set {_DEVICE} up",
                f"route add {NETWORK} dev {_DEVICE}",
            ]
            stand.configure(f"n{node}", device)
        return _pod_to_pod(mtu)

    def down(self, stand: Stand) -> None:
        for node in NODES:
            stand.stop(f"n{node}", self.name)


class Baseline(Program):
    """baselines/one_packet.c: flannel's design, one packet with each system call."""

    def __init__(self) -> None:
        super().__init__("baseline", _BASELINE, ["-O2"])

    def arguments(self, stand: Stand, node: int, peer: int) -> list[str]:
        own = str(stand.subnet(node).network_address)
        return [
            _DEVICE,
            str(stand.address(node).ip),
            str(_PORT),
            own,
            str(stand.subnet(peer)),
            str(stand.address(peer).ip),
        ]


class Prototype(Program):
    """A C file of the user's: called as `PROGRAM DEVICE LOCAL REMOTE 0`, it sets its device up with MTU 1472 by itself
    and speaks flannel's udp wire."""

    def __init__(self, source: Path) -> None:
        if not source.is_file():
            raise ConfigError(f"--prototype={source}: there is no such file")
        super().__init__("prototype", source, ["-O3", "-march=native", "-fno-strict-aliasing", "-w"])

    def arguments(self, stand: Stand, node: int, peer: int) -> list[str]:
        return [_DEVICE, str(stand.address(node).ip), str(stand.address(peer).ip), "0"]


def compiled(source: Path, flags: Sequence[str], program: Path) -> Path:
    """The program, compiled unless it is newer than its source. Raises ConfigError with the compiler's words."""
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return program
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise ConfigError(f"{source.name} needs a C compiler: run `apt-get install gcc libc6-dev`")
    argv = [compiler, *flags, "-o", str(program), str(source), "-lpthread"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"`{' '.join(argv)}` failed:\n{done.stderr[-2000:]}")
    return program


def _has_device(stand: Stand, node: int) -> bool:
    return f" {_DEVICE}: " in stand.run(f"n{node}", ["ip", "-o", "link"])


def _mac(node: int) -> str:
    """Locally administered, as flannel's are; fixed, so that it need not be read back."""
    return f"0e:00:00:00:00:{node:02x}"
