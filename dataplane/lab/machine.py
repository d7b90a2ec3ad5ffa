"""Owns the question whether this machine, and this user, can have a lab.

Free of: labs. Invariant: what is missing is named together with the command that brings it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

from dataplane.errors import ConfigError

_PACKAGES = {
    "ip": "iproute2",
    "ping": "iputils-ping",
    "sysctl": "procps",
    "etcd": "etcd-server",
    "etcdctl": "etcd-client",
}


def missing_packages(tools: Iterable[str]) -> list[str]:
    """Debian packages that bring those of `tools` which are not on the PATH."""
    return sorted(_PACKAGES[tool] for tool in tools if shutil.which(tool) is None)


def check_machine(store: str) -> None:
    """Raise ConfigError, in one sentence, if this machine or user cannot have a lab."""
    if os.geteuid() != 0:
        raise ConfigError("a lab makes network namespaces and TUN devices, which only root may: run it with sudo")
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        why = error.strerror
        raise ConfigError(f"/dev/net/tun cannot be opened ({why}): load the module with `modprobe tun`") from None
    tools = ["ip", "ping", "sysctl", *(["etcd", "etcdctl"] if store == "etcd" else [])]
    if missing := missing_packages(tools):
        raise ConfigError(f"tools are missing: run `apt-get install {' '.join(missing)}`")
