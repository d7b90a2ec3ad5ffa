#!/usr/bin/env python3
"""A daemon with flannel's flags, etcd keys and files that shares no code with ours: it stands in for a foreign
flanneld.

udp: a TUN and one packet for each system call; vxlan: the kernel's device. One peer. With STAND_IN_FAILURES=FILE in its
environment it ends at once as often as the number in that file says, and counts it down: a start that has to be
repeated."""

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from fcntl import ioctl
from pathlib import Path
from typing import Any

flags = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
PREFIX = "/coreos.com/network"


def etcdctl(*words: str) -> str:
    argv = ["etcdctl", f"--endpoints={flags['etcd-endpoints']}", *words]
    environment = {**os.environ, "ETCDCTL_API": "3"}
    return subprocess.run(argv, check=True, capture_output=True, text=True, env=environment).stdout


def ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True)


def shown(what: str, device: str) -> Any:
    argv = ["ip", "-j", what, "show", "dev", device]
    return json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)[0]


def fail_if_told() -> None:
    if name := os.environ.get("STAND_IN_FAILURES"):
        left = int(Path(name).read_text())
        if left:
            Path(name).write_text(str(left - 1))
            sys.exit("told to fail")


def peer_of(own: str) -> tuple[str, Any]:
    while True:
        lines = etcdctl("get", "--prefix", f"{PREFIX}/subnets/").splitlines()
        for key, value in zip(lines[::2], lines[1::2]):  # noqa: B905 - keys and values by turns
            subnet = key.rpartition("/")[2].replace("-", "/")
            if subnet != own:
                return subnet, json.loads(value)
        time.sleep(0.1)


def carry(tun: int, udp: socket.socket, remote: str) -> None:
    while True:
        readable, _, _ = select.select([tun, udp.fileno()], [], [])
        if tun in readable:
            udp.sendto(os.read(tun, 65535), (remote, 8285))
        if udp.fileno() in readable:
            os.write(tun, udp.recv(65535))


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    fail_if_told()
    network = json.loads(etcdctl("get", "--print-value-only", f"{PREFIX}/config"))
    kind = network["Backend"]["Type"]
    device = shown("addr", flags["iface"])
    own, mtu = device["addr_info"][0]["local"], device["mtu"] - (28 if kind == "udp" else 50)
    former = dict(text.split("=", 1) for text in Path(flags["subnet-file"]).read_text().splitlines())
    address, length = former["FLANNEL_SUBNET"].split("/")
    first = address.rpartition(".")[0] + ".0"
    subprocess.run(["nft", "add", "table", "ip", "stand_in"], check=True)  # rules of its own, which it leaves behind
    lease = {"PublicIP": own, "BackendType": kind}
    tun = None
    if kind == "udp":
        tun = os.open("/dev/net/tun", os.O_RDWR)
        ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"flannel0", 0x1001))
        ip(f"link set flannel0 mtu {mtu} up")
    else:
        ip(f"link add flannel.1 mtu {mtu} type vxlan id 1 dev eth0 local {own} dstport 8472 nolearning")
        ip(f"addr add {first}/32 dev flannel.1")
        ip("link set flannel.1 up")
        lease["BackendData"] = {"VNI": 1, "VtepMAC": shown("link", "flannel.1")["address"]}
    etcdctl("put", f"{PREFIX}/subnets/{first}-{length}", json.dumps(lease))
    text = f"FLANNEL_NETWORK={network['Network']}\nFLANNEL_SUBNET={address}/{length}\nFLANNEL_MTU={mtu}\n"
    Path(flags["subnet-file"]).write_text(text + "FLANNEL_IPMASQ=false\n")
    subnet, peer = peer_of(f"{first}/{length}")
    if tun is not None:
        ip(f"route add {network['Network']} dev flannel0 src {own}")
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind((own, 8285))
        carry(tun, udp, peer["PublicIP"])
    gateway, there = subnet.partition("/")[0], peer["BackendData"]["VtepMAC"]
    ip(f"neigh replace {gateway} lladdr {there} dev flannel.1 nud permanent")
    subprocess.run(["bridge", "fdb", "replace", there, "dev", "flannel.1", "dst", peer["PublicIP"]], check=True)
    ip(f"route replace {subnet} via {gateway} dev flannel.1 onlink")
    while True:
        signal.pause()  # and leaves its device behind, as flannel's does


if __name__ == "__main__":
    main()
