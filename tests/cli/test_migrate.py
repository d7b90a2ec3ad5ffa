"""`loden migrate check`: what it finds, and that it changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataplane.cli.found_flanneld import Found, of_unit
from tests.etcd_server import EtcdServer
from tests.namespaces import Namespace, open_namespace

LODEN = str(Path(sys.executable).with_name("loden"))
CONFIG = '{"Network": "10.5.0.0/16", "Backend": {"Type": "udp"}}'
HOLD_PORT = """
import os, socket, sys
held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
held.bind(("198.18.0.1", 8285))
held.set_inheritable(True)
print("ready", flush=True)
os.execv(sys.argv[1], sys.argv[1:])
"""
LEASE = '{"PublicIP":"198.18.0.1","PublicIPv6":null,"BackendType":"udp"}'


# --- how flanneld is started ----------------------------------------------------------------------------------


def test_a_unit_with_an_environment_file_is_read_as_systemd_does(tmp_path: Path) -> None:
    (tmp_path / "default").write_text(
        "# a comment\nFLANNEL_OPTIONS=--ip-masq --iface=eth1\nFLANNELD_V=4\nETCD=\"http://a:1 x\"\n"
    )
    unit = tmp_path / "flanneld.service"
    unit.write_text(
        f"[Service]\nEnvironmentFile=-{tmp_path}/default\nEnvironmentFile=-/nowhere/else\nEnvironment='A=b c' D=e\n"
        "ExecStartPre=/bin/true flanneld\n"
        "ExecStart=-/usr/bin/flanneld -etcd-endpoints=${ETCD} \\\n  $FLANNEL_OPTIONS -v=${D}\n"
    )
    found = of_unit(unit)
    assert found is not None
    assert found.words == ("-etcd-endpoints=http://a:1 x", "--ip-masq", "--iface=eth1", "-v=e")
    assert found.environ == {"FLANNELD_V": "4"}
    assert (found.pid, found.ours) == (0, False)


def test_ours_is_told_from_flannels(tmp_path: Path) -> None:
    unit = tmp_path / "flanneld.service"
    for command, ours in (("/opt/bin/flanneld -v=1", False), ("/usr/bin/python3 -m dataplane -v=1", True)):
        unit.write_text(f"[Service]\nExecStart={command}\n")
        assert of_unit(unit) == Found(f"unit {unit}", ("-v=1",), {}, ours=ours)
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    assert of_unit(unit) is None


# --- the check ------------------------------------------------------------------------------------------------


@pytest.fixture
def node() -> Iterator[Namespace]:
    with open_namespace() as namespace:
        # an IPv6 address that is still being asked about changes by itself
        namespace.command("sysctl", "-qw", *(f"net.ipv6.conf.{where}.accept_dad=0" for where in ("all", "default")))
        namespace.command("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0p")
        for device in ("eth0", "eth0p"):
            namespace.command("ip", "link", "set", device, "up")
        namespace.command("ip", "addr", "add", "198.18.0.1/24", "dev", "eth0")
        yield namespace


@pytest.fixture
def etcd(node: Namespace) -> Iterator[EtcdServer]:
    with EtcdServer(netns=node.name) as server:
        yield server


def check(node: Namespace, *flags: str) -> tuple[int, dict[str, list[str]]]:
    """The exit code, and by area the findings as `level: text`."""
    argv = node.argv(LODEN, "migrate", "check", "--json", *(("--", *flags) if flags else ()))
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["swappable"] == (done.returncode == 0)
    found: dict[str, list[str]] = {}
    for row in document["findings"]:
        found.setdefault(row["area"], []).append(f"{row['level']}: {row['text']}")
    return done.returncode, found


def everything(node: Namespace, etcd: EtcdServer, place: Path) -> list[str]:
    """Whatever a check could have changed."""
    routes = [["ip", family, "route", "show", "table", "all"] for family in ("-4", "-6")]
    others = ("ip -d addr", "ip rule", "ip neigh", "bridge fdb", "nft list ruleset")
    looks = [*routes, *(line.split() for line in others)]
    listed = [node.command(*argv).stdout for argv in looks]
    return [*listed, etcd.etcdctl("get", "--prefix", "", "-w", "json"), *sorted(map(str, place.rglob("*")))]


@pytest.mark.netns
@pytest.mark.etcd
def test_a_node_of_flannels_can_be_swapped_and_is_left_as_it_is(
    node: Namespace, etcd: EtcdServer, tmp_path: Path
) -> None:
    etcd.etcdctl("put", "/coreos.com/network/config", CONFIG)
    etcd.etcdctl("put", "/coreos.com/network/subnets/10.5.7.0-24", LEASE)
    etcd.etcdctl("put", "/coreos.com/network/subnets/10.5.8.0-24", LEASE.replace("198.18.0.1", "198.18.0.2"))
    (tmp_path / "subnet.env").write_text("FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.7.1/24\nFLANNEL_MTU=1472\n")
    # stands in for flannel's program: only its name, arguments, variables and socket are looked at
    fake = tmp_path / "flanneld"
    fake.symlink_to("/bin/bash")
    flags = ("--ip-masq", "--iface=eth0", f"-etcd-endpoints={etcd.url}", f"-subnet-file={tmp_path}/subnet.env")
    argv = [str(fake), "-c", "read", *flags]
    process = node.spawn_python(HOLD_PORT, *argv, stdin=subprocess.PIPE, env={**os.environ, "FLANNELD_V": "1"})
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    before = everything(node, etcd, tmp_path)
    code_, found = check(node, *flags)
    assert code_ == 0, found
    assert everything(node, etcd, tmp_path) == before
    assert "ok: 10.5.7.0-24 is this node's, by its public IP, and is kept" in found["lease"]
    assert found["peers"] == ["ok: 1 other node with backend udp"]
    assert "FLANNEL_SUBNET=10.5.7.1/24" in found["subnet file"][0]
    assert f"pid {process.pid}) has UDP 8285 now: stop flanneld" in found["port"][0]
    assert found["underlay"] == ["ok: eth0, 198.18.0.1, public IP 198.18.0.1, MTU 1500"]
    assert found["backend"] == ["ok: udp in userspace"]
    assert "ok: /dev/net/tun can be opened" in found["kernel"]
    assert found["MTU"] == ["ok: 1472, as in the subnet file"]
    assert found["rules"] == ["ok: by iptables, whose rules of flannel are taken over"]
    _, seen = check(node)
    assert seen["command"][0].startswith(f"ok: process {process.pid}: flanneld -c read --ip-masq")
    assert "FLANNELD_V=1" in seen["command"][1]


@pytest.mark.netns
@pytest.mark.etcd
@pytest.mark.parametrize(
    ("config", "flags", "area", "text"),
    [
        (CONFIG.replace("udp", "ipsec"), ["--iface=eth0"], "backend", "'ipsec' is not carried by Loden"),
        (CONFIG.replace("udp", "host-gw"), ["--iface=eth0", "--public-ip=198.18.9.9"], "backend", "198.18.9.9"),
        ("{", ["--iface=eth0"], "net-conf", "JSON"),
        (None, ["--iface=eth0"], "net-conf", "has no network config"),
        (CONFIG, ["--iface=eth7"], "underlay", "error looking up interface eth7"),
        (CONFIG, ["--kube-subnet-mgr"], "flags", "not from Kubernetes"),
        (CONFIG, ["--ipmasq"], "flags", "did you mean -ip-masq?"),
    ],
)
def test_what_keeps_a_node_from_being_swapped(
    node: Namespace, etcd: EtcdServer, tmp_path: Path, config: str | None, flags: list[str], area: str, text: str
) -> None:
    if config is not None:
        etcd.etcdctl("put", "/coreos.com/network/config", config)
    code, found = check(node, f"-etcd-endpoints={etcd.url}", f"-subnet-file={tmp_path}/subnet.env", *flags)
    assert code == 1
    assert any(line.startswith("blocked: ") and text in line for line in found[area]), found


@pytest.mark.netns
@pytest.mark.etcd
def test_what_becomes_of_flannels_vxlan_device_is_told_by_who_will_carry(
    node: Namespace, etcd: EtcdServer, tmp_path: Path
) -> None:
    etcd.etcdctl("put", "/coreos.com/network/config", CONFIG.replace("udp", "vxlan"))
    kind = ("vxlan", "id", "1", "local", "198.18.0.1", "dev", "eth0", "dstport", "8472", "nolearning")
    node.command("ip", "link", "add", "flannel.1", "mtu", "1450", "type", *kind)
    (tmp_path / "subnet.env").write_text("FLANNEL_SUBNET=10.5.7.1/24\nFLANNEL_MTU=1400\n")
    flags = [f"-etcd-endpoints={etcd.url}", f"-subnet-file={tmp_path}/subnet.env", "--iface=eth0"]
    before = everything(node, etcd, tmp_path)
    code, found = check(node, *flags)
    assert code == 0, found
    assert found["backend"] == ["ok: vxlan in the kernel"]
    assert "ok: flannel.1 is taken over with its MAC and entries: packets go on" in found["device"]
    assert found["MTU"][0].startswith("differs: 1450, and the subnet file says 1400")
    code, found = check(node, *flags, "--vxlan-dataplane=userspace")
    assert code == 0, found
    assert found["backend"] == ["ok: vxlan in userspace"]
    assert any(line.startswith("differs: flannel.1 gives way to a TUN") for line in found["device"])
    assert everything(node, etcd, tmp_path) == before


@pytest.mark.netns
def test_no_password_is_shown(node: Namespace, tmp_path: Path) -> None:
    for password in (["--etcd-password=hunter2"], ["-etcd-password", "hunter2"]):
        _, found = check(node, *password, "-kube-subnet-mgr", f"-subnet-file={tmp_path}/s.env")
        assert "-etcd-password" in found["command"][0]
        assert "hunter2" not in str(found)


@pytest.mark.netns
def test_a_store_that_is_out_of_reach_blocks_and_is_named(node: Namespace, tmp_path: Path) -> None:
    code, found = check(node, "-etcd-endpoints=http://127.0.0.1:1", f"-subnet-file={tmp_path}/s.env", "--iface=eth0")
    assert code == 1
    assert found["store"][0].startswith("blocked: ")
    assert "127.0.0.1:1" in found["store"][0]


@pytest.mark.netns
def test_the_table_says_the_same_in_words(node: Namespace, tmp_path: Path) -> None:
    store = f"--lease-store=sqlite://{tmp_path}/leases.db"
    argv = [LODEN, "migrate", "check", "--", store, f"-subnet-file={tmp_path}/s.env", "--iface=eth0"]
    done = node.command(*argv)
    assert done.stdout.endswith("\nThis node can be swapped.\n")
    assert list(tmp_path.iterdir()) == []
