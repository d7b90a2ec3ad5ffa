"""Owns what this daemon remembers for its next start, while it runs: its device, and the lease it held.

Free of: the file's format (kernel.subnetfile). Invariant: the file says what was last told here, or an older whole
truth; that it cannot be written is logged and never ends a daemon.
"""

from __future__ import annotations

import dataclasses
import logging
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from dataplane.errors import KernelError
from dataplane.kernel import subnetfile
from dataplane.lease.allocate import Claim
from dataplane.lease.model import Lease

log = logging.getLogger(__name__)


class Memory:
    """What the former daemon at this place left word of, then what this one adds to it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._state = subnetfile.read_state(path)

    @property
    def device(self) -> str:
        """The device that is ours, empty for none."""
        return self._state.device

    def claim(self) -> Claim | None:
        """The lease that is provably ours, whatever this node's address is now."""
        state = self._state
        if not state.key:
            return None
        public_ipv6 = IPv6Address(state.public_ipv6) if state.public_ipv6 else None
        return Claim(state.key, state.create_revision, IPv4Address(state.public_ip), public_ipv6)

    def keep_device(self, name: str) -> None:
        self._keep(device=name)

    def keep_lease(self, lease: Lease) -> None:
        self._keep(
            key=str(lease.key),
            create_revision=lease.create_revision,
            public_ip=str(lease.attrs.public_ip),
            public_ipv6=str(lease.attrs.public_ipv6 or ""),
        )

    def _keep(self, **changes: Any) -> None:
        state = dataclasses.replace(self._state, **changes)
        if state == self._state:
            return
        try:
            subnetfile.write_state(self._path, state)
        except KernelError as error:
            log.error("Cannot keep the state for the next start: %s", error)
        self._state = state
