"""Owns the candidates that are daemons: our own flanneld by backend, and any other flanneld binary.

Free of: traffic. Invariant: a daemon asks for the subnet that it finds in its file, so that the pods keep their
addresses; one that takes another is an error, not another measurement.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dataplane.bench import far
from dataplane.bench.candidate import pod_to_pod
from dataplane.bench.disturbing import Disturbance
from dataplane.bench.ends import Ends
from dataplane.bench.etcd import Etcd, EtcdLeases
from dataplane.bench.stand import NETWORK, NODES, Stand
from dataplane.debug import control
from dataplane.errors import ConfigError, LodenError
from dataplane.lab import LabError, plan
from dataplane.lab.node import DAEMON

_DISTURBED = (sys.executable, "-P", "-m", "dataplane.bench.disturbing")
_HOST_GW = "host-gw"
_NO_FAR_HOST_GW = "many next hops on one segment need as many neighbours, more than the kernel keeps for a namespace"
_ATTEMPTS = 3
_CARRIES = 10.0
"""Seconds in which a foreign pair of daemons must have found each other."""


def net_conf(backend: Mapping[str, Any]) -> str:
    return json.dumps({"Network": str(NETWORK), "SubnetLen": 24, "Backend": dict(backend)})


def _subnet_file(stand: Stand, node: int) -> Path:
    return stand.directory / f"n{node}-subnet.env"


def _ask_for_subnet(stand: Stand, node: int) -> list[str]:
    """Write what a former daemon would have left; the flags that every flanneld is given."""
    file = _subnet_file(stand, node)
    file.write_text(f"FLANNEL_NETWORK={NETWORK}\nFLANNEL_SUBNET={stand.pods(node, 0).bridge}\n")
    # Firewall rules would slow the candidates that come after.
    return ["-iface=eth0", f"-subnet-file={file}", "-iptables-forward-rules=false"]


def _network(stand: Stand, node: int) -> plan.PodNetwork | None:
    """What a daemon has written, None before it has. Raises LabError for another subnet than the stand's."""
    text = _subnet_file(stand, node).read_text()
    if "FLANNEL_MTU" not in text:
        return None
    network = plan.PodNetwork.parse(text, str(_subnet_file(stand, node)))
    subnet = network.bridge.network if network.bridge else None
    if subnet != stand.subnet(node):
        raise LabError(f"n{node} was given {subnet}, not {stand.subnet(node)}, which its subnet file asked for")
    return network


class Daemon:
    """Our flanneld, with the flags that the user adds to its own.

    `with_leases`: its leases are in etcd, where the harness can put thousands at once; else in the embedded store.
    `holding`: it can be made to hold its GIL.
    """

    ours = True

    def __init__(
        self,
        name: str = "udp",
        backend: Mapping[str, Any] | None = None,
        flags: Sequence[str] = (),
        *,
        with_leases: bool = False,
        disturbed: bool = False,
    ) -> None:
        self.name = name
        self._backend = backend or {"Type": "udp"}
        self._flags = flags
        self._with_leases = with_leases
        self._disturbed = disturbed

    def up(self, stand: Stand) -> Ends:
        etcd = Etcd(stand) if self._with_leases else None
        if etcd is not None:
            etcd.up(net_conf(self._backend))
            store = f"-etcd-endpoints={etcd.endpoint}"
        else:
            store = f"-lease-store=sqlite://{stand.directory}/leases.db"
            cli = [sys.executable, "-P", "-m", "dataplane.cli", "net-conf", "set", "-", f"-{store}"]
            stand.run("n1", cli, stdin=net_conf(self._backend))
        for node in NODES:
            program = [*_DISTURBED, str(self._socket(stand, node))] if self._disturbed else DAEMON
            stand.start(f"n{node}", self.name, [*program, *_ask_for_subnet(stand, node), store, *self._flags])
        for node in NODES:
            stand.wait_for("it knew its peer", f"n{node}", self.name, partial(self._ready, stand, node))
        network = _network(stand, 1)
        if network is None:
            raise LabError(f"{self.name} on n1 is ready and has not written its subnet file")
        ends = replace(
            pod_to_pod(stand, network.mtu),
            processes=stand.processes(self.name),
            why_no_leases="its leases are in its embedded store",
            disturbed=Disturbance(self._socket(stand, 1)) if self._disturbed else None,
            control="" if self._backend["Type"] == _HOST_GW else f"{_subnet_file(stand, 1)}.sock",
        )
        if self._backend["Type"] == _HOST_GW:
            return replace(ends, why_no_leases=_NO_FAR_HOST_GW)
        if etcd is None:
            return ends
        return replace(ends, leases=EtcdLeases(stand, etcd, one_mac=not far.kernel_tunnels(stand)))

    @staticmethod
    def _socket(stand: Stand, node: int) -> Path:
        return stand.directory / f"n{node}-disturb.sock"

    def _ready(self, stand: Stand, node: int) -> bool:
        try:
            status = control.request(f"{_subnet_file(stand, node)}.sock", "status")
        except LodenError:
            return False
        if not status["ready"] or _network(stand, node) is None:
            return False
        return len(status["peers"]) == len(NODES) - 1

    def down(self, stand: Stand) -> None:
        for node in NODES:
            stand.stop(f"n{node}", self.name)
        Etcd(stand).down()


class Foreign:
    """Another flanneld binary with one backend, on the same etcd. Its two daemons are started one after the other,
    since some lose a peer whose lease comes in the same instant; a start after which nothing is carried is repeated."""

    ours = False

    def __init__(self, name: str, program: Path, backend: str) -> None:
        if not program.is_file() or not os.access(program, os.X_OK):
            raise ConfigError(f"--flanneld: {program} is no program that can be started")
        self.name = name
        self._program = program.resolve()  # a bare name would be looked for on the PATH
        self._backend = backend

    def up(self, stand: Stand) -> Ends:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return replace(self._start(stand), starts=attempt)
            except LabError as error:
                if attempt == _ATTEMPTS:
                    raise LabError(f"{_ATTEMPTS} starts have failed; the last: {error}") from None
                self.down(stand)
        raise AssertionError("the last attempt returns or raises")

    def _start(self, stand: Stand) -> Ends:
        etcd, mtu = Etcd(stand), []
        etcd.up(net_conf({"Type": self._backend}))
        for node in NODES:
            argv = [str(self._program), f"-etcd-endpoints={etcd.endpoint}", *_ask_for_subnet(stand, node)]
            stand.start(f"n{node}", self.name, argv)
            ready = partial(_network, stand, node)
            stand.wait_for("it wrote its subnet file", f"n{node}", self.name, lambda ready=ready: ready() is not None)  # type: ignore[misc]
            mtu.append(network.mtu if (network := ready()) else 0)
        ends = pod_to_pod(stand, min(mtu))
        deadline = time.monotonic() + _CARRIES
        while not stand.attempt(ends.source, ["ping", "-q", "-n", "-c", "1", "-W", "1", ends.address]):
            if time.monotonic() > deadline:
                raise LabError(f"{self.name} carries nothing {_CARRIES:.0f} s after its start")
        return replace(ends, processes=stand.processes(self.name), leases=EtcdLeases(stand, etcd))

    def down(self, stand: Stand) -> None:
        for node in NODES:
            stand.stop(f"n{node}", self.name)
        Etcd(stand).down()
