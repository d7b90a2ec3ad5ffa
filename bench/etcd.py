"""Owns the etcd of a stand: started on the first node for a candidate that keeps its leases there, gone with it.

Free of: what a daemon makes of them, apart from flannel's keys. Invariant: each start begins with an empty store.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence

from dataplane.bench.ends import FarLease
from dataplane.bench.stand import Stand
from dataplane.lab import LabError, plan

_PREFIX = "/coreos.com/network"
_ELSEWHERE = "/elsewhere"
_AT_ONCE = 1000
"""Puts in one transaction; what plan.etcd allows."""
_ROLE = "etcd"


class Etcd:
    """Both nodes' store. The commands are run on the first node, where it listens."""

    def __init__(self, stand: Stand) -> None:
        self._stand = stand
        self._address = stand.address(1).ip
        self._directory = stand.directory / "etcd"

    @property
    def endpoint(self) -> str:
        return f"http://{self._address}:2379"

    def up(self, net_conf: str) -> None:
        """Start it with a network config. Raises LabError."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._stand.start("n1", _ROLE, plan.etcd(self._address, str(self._directory)))
        self._stand.wait_for(
            "it answered", "n1", _ROLE, lambda: self._stand.attempt("n1", self._ctl("endpoint", "health"))
        )
        self._run("put", f"{_PREFIX}/config", net_conf)

    def down(self) -> None:
        self._stand.stop("n1", _ROLE)
        shutil.rmtree(self._directory, ignore_errors=True)

    def lease(self, subnet: str) -> dict[str, object]:
        """The value under a subnet, `10.244.2.0-24`. Raises LabError."""
        text = self._run("get", "--print-value-only", f"{_PREFIX}/subnets/{subnet}")
        try:
            found: dict[str, object] = json.loads(text)
        except ValueError:
            raise LabError(f"etcd has no lease for {subnet}: {text!r}") from None
        return found

    def put(self, values: Mapping[str, str], prefix: str = _PREFIX) -> None:
        """Leases by their subnets, as few transactions as go. Raises LabError."""
        puts = [f"put {prefix}/subnets/{subnet} {json.dumps(value)}" for subnet, value in values.items()]
        self._transact(puts)

    def remove(self, subnets: Sequence[str]) -> None:
        self._transact([f"del {_PREFIX}/subnets/{subnet}" for subnet in subnets])

    def _transact(self, requests: Sequence[str]) -> None:
        for begin in range(0, len(requests), _AT_ONCE):
            lines = "\n".join(requests[begin : begin + _AT_ONCE])
            # No comparison, so the first list is carried out; then the empty second one.
            self._run("txn", stdin=f"\n{lines}\n\n\n")

    def _ctl(self, *arguments: str) -> list[str]:
        return plan.etcdctl(self._address, *arguments)

    def _run(self, *arguments: str, stdin: str = "") -> str:
        return self._stand.run("n1", self._ctl(*arguments), stdin=stdin)


class EtcdLeases:
    """Far leases, each a copy of the second node's own with another address, as a further node would write it; and with
    another VTEP's MAC, of which a kernel's FDB needs one for each (far.py lets them all in). `one_mac`: with that of
    the second node, since a VTEP in userspace takes no frame to another, and its table needs none for each."""

    def __init__(self, stand: Stand, etcd: Etcd, *, one_mac: bool = False) -> None:
        self._etcd = etcd
        self._one_mac = one_mac
        self._own = str(stand.subnet(2)).replace("/", "-")
        self._put: set[str] = set()

    def put(self, leases: Sequence[FarLease]) -> None:
        values = self._values(leases)
        self._put.update(values)
        self._etcd.put(values)

    def rehearse(self, leases: Sequence[FarLease]) -> None:
        self._etcd.put(self._values(leases), _ELSEWHERE)

    def _values(self, leases: Sequence[FarLease]) -> dict[str, str]:
        pattern = self._etcd.lease(self._own)
        return {str(lease.subnet).replace("/", "-"): self._value(pattern, lease) for lease in leases}

    def _value(self, pattern: Mapping[str, object], lease: FarLease) -> str:
        value = {**pattern, "PublicIP": str(lease.address)}
        data = value.get("BackendData")
        if isinstance(data, dict) and "VtepMAC" in data and not self._one_mac:
            value["BackendData"] = {**data, "VtepMAC": lease.mac}
        return json.dumps(value, separators=(",", ":"))

    def clear(self) -> None:
        self._etcd.remove(sorted(self._put))
        self._put.clear()
