"""Owns the candidates that are programs and scripts: one-packet proxies, a prototype of the user's, any other tunnel.

Free of: traffic. Invariant: a program is compiled once for a stand; whatever a script leaves running ends with it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from dataplane.bench.candidate import pod_to_pod
from dataplane.bench.ends import Ends
from dataplane.bench.stand import NETWORK, NODES, Stand
from dataplane.errors import ConfigError
from dataplane.lab import LabError

_HERE = Path(__file__).parent / "baselines"
_PORT = 8285
_DEVICE = "flannel0"
_LEAST_MTU = 68


class Program:
    """A program that makes a TUN device by itself; the harness gives the device its address and route."""

    ours = False

    def __init__(self, name: str) -> None:
        self.name = name

    def command(self, stand: Stand, node: int, peer: int) -> list[str]:
        """The command line on a node."""
        raise NotImplementedError

    def up(self, stand: Stand) -> Ends:
        mtu = stand.underlay_mtu - 28
        for node in NODES:
            peer = NODES[0] + NODES[1] - node
            stand.start(f"n{node}", self.name, self.command(stand, node, peer))
        for node in NODES:
            stand.wait_for("its device was there", f"n{node}", self.name, partial(_has_device, stand, node))
            device = [
                f"link set {_DEVICE} mtu {mtu}",
                f"addr add {stand.subnet(node).network_address}/32 dev {_DEVICE}",
                f"link set {_DEVICE} up",
                f"route add {NETWORK} dev {_DEVICE}",
            ]
            stand.configure(f"n{node}", device)
        return replace(pod_to_pod(stand, mtu), processes=stand.processes(self.name))

    def down(self, stand: Stand) -> None:
        for node in NODES:
            stand.stop(f"n{node}", self.name)


class Baseline(Program):
    """baselines/one_packet.c: flannel's design, one packet with each system call."""

    def __init__(self) -> None:
        super().__init__("baseline")

    def command(self, stand: Stand, node: int, peer: int) -> list[str]:
        program = compiled(_HERE / "one_packet.c", ["-O2"], stand.directory / self.name)
        own = str(stand.subnet(node).network_address)
        there = [str(stand.subnet(peer)), str(stand.address(peer).ip)]
        return [str(program), _DEVICE, str(stand.address(node).ip), str(_PORT), own, *there]


class PythonProxy(Program):
    """baselines/asyncio_proxy.py on one of two event loops, `asyncio` or `uvloop`."""

    def command(self, stand: Stand, node: int, peer: int) -> list[str]:
        ends = [str(stand.address(node).ip), str(stand.address(peer).ip)]
        return [sys.executable, "-P", str(_HERE / "asyncio_proxy.py"), _DEVICE, *ends, self.name]


class Prototype(Program):
    """A C file of the user's: called as `PROGRAM DEVICE LOCAL REMOTE 0`, it sets its device up with MTU 1472 by itself
    and speaks flannel's udp wire."""

    def __init__(self, source: Path) -> None:
        if not source.is_file():
            raise ConfigError(f"--prototype={source}: there is no such file")
        super().__init__("prototype")
        self._source = source

    def command(self, stand: Stand, node: int, peer: int) -> list[str]:
        flags = ["-O3", "-march=native", "-fno-strict-aliasing", "-w"]
        program = compiled(self._source, flags, stand.directory / self.name)
        return [str(program), _DEVICE, str(stand.address(node).ip), str(stand.address(peer).ip), "0"]


class Tunnel:
    """Any tunnel, by a script that is called as `SCRIPT up|down` on each node, with NODE, LOCAL, REMOTE, SUBNET and
    PEER_SUBNET in its environment; `up` prints the MTU as its last word."""

    ours = False

    def __init__(self, name: str, script: Path) -> None:
        if not script.is_file():
            raise ConfigError(f"--tunnel={name}={script}: there is no such file")
        self.name = name
        self._script = script.resolve()

    def up(self, stand: Stand) -> Ends:
        mtu = min(self._mtu(self._call(stand, node, "up")) for node in NODES)
        return replace(pod_to_pod(stand, mtu), processes=stand.processes(self.name))

    def _call(self, stand: Stand, node: int, verb: str) -> str:
        peer = NODES[0] + NODES[1] - node
        environment = {
            "NODE": str(node),
            "LOCAL": str(stand.address(node).ip),
            "REMOTE": str(stand.address(peer).ip),
            "SUBNET": str(stand.subnet(node)),
            "PEER_SUBNET": str(stand.subnet(peer)),
        }
        return stand.run_script(f"n{node}", self.name, [str(self._script), verb], environment)

    def _mtu(self, said: str) -> int:
        last = said.split()[-1:] or [""]
        if not last[0].isdecimal() or not _LEAST_MTU <= int(last[0]) <= 65_535:
            raise LabError(f"{self._script} up printed no MTU: {said!r}")
        return int(last[0])

    def down(self, stand: Stand) -> None:
        failures = []
        for node in NODES:
            try:
                self._call(stand, node, "down")
            except LabError as error:  # the other node's turn comes all the same
                failures.append(error)
            stand.stop(f"n{node}", self.name)
        if failures:
            raise failures[0]


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
    return _DEVICE in stand.inventory(f"n{node}")["link"]
