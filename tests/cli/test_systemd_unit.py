"""The shipped unit: what it starts, and that a daemon lives with the capabilities that it leaves."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.namespaces import open_namespace

LODEN = str(Path(sys.executable).with_name("loden"))
FLANNELD = str(Path(sys.executable).with_name("flanneld"))


def unit() -> str:
    return subprocess.run([LODEN, "systemd-unit"], capture_output=True, text=True, timeout=30, check=True).stdout


def setting(name: str) -> str:
    (value,) = re.findall(rf"^{name}=(.*)$", unit(), re.MULTILINE)
    return str(value)


def test_it_starts_the_flanneld_of_this_installation() -> None:
    assert setting("ExecStart") == f"{FLANNELD} $FLANNELD_OPTIONS"
    assert "@FLANNELD@" not in unit()


def test_every_line_is_a_section_a_setting_or_a_comment() -> None:
    assert [line for line in unit().splitlines() if not re.fullmatch(r"(\[\w+\]|#.*|[A-Z]\w+=.+|)", line)] == []


@pytest.mark.netns
def test_a_daemon_carries_tells_and_feeds_with_only_what_the_unit_leaves_it(tmp_path: Path) -> None:
    """As systemd starts it, but for the mounts and the system call filter."""
    store, subnet_file = f"--lease-store=sqlite://{tmp_path}/leases.db", tmp_path / "subnet.env"
    subprocess.run([LODEN, "net-conf", "set", store, "-"], input='{"Network":"10.5.0.0/16"}', text=True, check=True,
                   timeout=30, capture_output=True)  # fmt: skip
    kept = "".join(f",+{word.removeprefix('CAP_').lower()}" for word in setting("CapabilityBoundingSet").split())
    notify = tmp_path / "notify"
    with open_namespace() as node, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(notify))
        manager.settimeout(30)
        node.command("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0p")
        node.command("ip", "addr", "add", "198.18.0.1/24", "dev", "eth0")
        node.command("ip", "link", "set", "eth0", "up")
        environ = {**os.environ, "NOTIFY_SOCKET": str(notify), "WATCHDOG_USEC": "400000"}
        limits = ["setpriv", f"--bounding-set=-all{kept}", "--inh-caps=-all", "--no-new-privs"]
        flags = [store, f"--subnet-file={subnet_file}", "--iface=eth0", "--ip-masq", "--ip-blackhole-route"]
        daemon = node.spawn(*limits, FLANNELD, *flags, env=environ)
        told: list[str] = []
        while "READY=1" not in told or told[-1] != "WATCHDOG=1":
            told.append(manager.recv(4096).decode())
        assert subnet_file.exists()
        assert "FLANNEL-POSTRTG" in node.command("iptables", "-t", "nat", "-S").stdout
        daemon.terminate()
        assert daemon.wait(30) == 0, daemon.communicate()
        while told[-1] != "STOPPING=1":
            told.append(manager.recv(4096).decode())
