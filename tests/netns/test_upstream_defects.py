"""The defects of flannel's data planes that this daemon must not have, one test each at least, by the numbers of
docs/upstream-defects.md: whole daemons, real kernels, real packets. Those of leases: tests/test_upstream_defects.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from dataplane.lab import Lab, Node
from tests.netns.conftest import MakeLab
from tests.netns.observing import SUBNETS, put_lease, python_in, reaches, status_of, until
from tests.netns.test_overlay_wire import inner_udp

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

DEVICES = {4: "flannel.1", 6: "flannel-v6.1"}
FOREIGN = "10.244.210.0-24"
on_etcd = pytest.mark.etcd


def reaches_both(lab: Lab) -> bool:
    return all(lab.ping("n1-p1", "n2-p1", count=3, version=version).whole for version in (4, 6))


def shown(lab: Lab, *argv: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(lab.run("n1", argv).stdout or "[]")
    return found


def fdb(lab: Lab) -> dict[str, str]:
    return {entry["mac"]: entry["dst"] for entry in shown(lab, "bridge", "-j", "fdb", "show", "dev", DEVICES[4])}


def neighbours(lab: Lab) -> dict[str, str]:
    return {entry["dst"]: entry["lladdr"] for entry in shown(lab, "ip", "-j", "neigh", "show", "dev", DEVICES[4])}


def vxlan_lease(mac: str, ip: str = "198.18.7.1") -> str:
    data = {"VNI": 1, "VtepMAC": mac}
    return json.dumps({"PublicIP": ip, "PublicIPv6": None, "BackendType": "vxlan", "BackendData": data})


def own_value(lab: Lab, node: Node) -> dict[str, Any]:
    """Our lease as etcd has it."""
    listed = lab.etcdctl("get", "--prefix", SUBNETS, "--print-value-only").stdout.splitlines()
    values = [json.loads(line) for line in listed if line]
    (found,) = [value for value in values if value["PublicIP"] == str(node.address.ip)]
    return dict(found)


@on_etcd
def test_defect_07_a_device_made_again_has_all_its_entries_and_the_mac_of_the_lease(make_lab: MakeLab) -> None:
    """Upstream makes IPv4's device again, empty and with a MAC that etcd does not know; that of IPv6 it lets go."""
    lab = make_lab(2, backend="vxlan", dataplane="kernel", families="46", store="etcd")
    until("pods reach each other", lambda: reaches_both(lab))
    for name in DEVICES.values():
        lab.run("n1", ["ip", "link", "del", name])
        until(f"pods reach each other without the first {name}", lambda: reaches_both(lab))
    said = own_value(lab, lab.node("n1"))
    for version, data in ((4, said["BackendData"]), (6, said["BackendV6Data"])):
        (link,) = shown(lab, "ip", "-j", "link", "show", DEVICES[version])
        assert data["VtepMAC"] == link["address"]


@on_etcd
def test_defect_08_what_a_peer_leaves_behind_goes(make_lab: MakeLab) -> None:
    """Upstream keeps the FDB entry of a former MAC and the peers that left while it was down, and stands for 51 s
    where an entry is missing already."""
    lab = make_lab(1, backend="vxlan", dataplane="kernel", store="etcd")
    node = lab.node("n1")
    put_lease(lab, FOREIGN, vxlan_lease("02:00:00:00:00:0a"))
    until("the peer is in the kernel", lambda: fdb(lab) == {"02:00:00:00:00:0a": "198.18.7.1"})
    put_lease(lab, FOREIGN, vxlan_lease("02:00:00:00:00:0b"))
    until("its MAC is the new one, and only that", lambda: fdb(lab) == {"02:00:00:00:00:0b": "198.18.7.1"})
    assert neighbours(lab) == {"10.244.210.0": "02:00:00:00:00:0b"}

    node.stop_daemon()
    assert fdb(lab), "an ordered stop leaves the kernel's entries, as upstream's does"
    lab.etcdctl("del", SUBNETS + FOREIGN)
    put_lease(lab, "10.244.211.0-24", vxlan_lease("02:00:00:00:00:0c"))
    node.start_daemon()
    node.wait_ready()
    until("who left meanwhile is gone", lambda: fdb(lab) == {"02:00:00:00:00:0c": "198.18.7.1"})
    assert neighbours(lab).keys() == {"10.244.211.0"}

    for _ in range(3):
        put_lease(lab, FOREIGN, vxlan_lease("02:00:00:00:00:0d"))
        until("the peer is there again", lambda: "10.244.210.0" in neighbours(lab))
        # both in one moment, so that the entry is sometimes missing when the daemon wants to take it away
        lab.run("n1", ["bridge", "fdb", "del", "02:00:00:00:00:0d", "dev", DEVICES[4], "dst", "198.18.7.1"])
        lab.etcdctl("del", SUBNETS + FOREIGN)
        put_lease(lab, "10.244.212.0-24", vxlan_lease("02:00:00:00:00:0e"))
        until("the next peer is not kept waiting", lambda: "10.244.212.0" in neighbours(lab), 20)
        lab.etcdctl("del", f"{SUBNETS}10.244.212.0-24")
        until("both are gone", lambda: neighbours(lab).keys() == {"10.244.211.0"}, 20)
    assert fdb(lab) == {"02:00:00:00:00:0c": "198.18.7.1"}


@pytest.mark.parametrize("dataplane", ["kernel", "userspace"])
def test_defect_09_the_mtu_that_pods_are_given_fits_whichever_way_they_send(make_lab: MakeLab, dataplane: str) -> None:
    """Upstream says 1450 also where IPv6 takes 70 bytes of the underlay's 1500."""
    lab = make_lab(2, backend="vxlan", dataplane=dataplane, families="46")
    assert lab.node("n1").pod_network().mtu == 1430
    assert "FLANNEL_MTU=1430" in lab.node("n1").subnet_file.read_text()
    until("pods reach each other", lambda: reaches_both(lab))
    for version, headers in ((4, 28), (6, 48)):
        to = lab.address_of("n2-p1", version)
        whole = ["ping", "-n", "-c", "3", "-i", "0.1", "-M", "do", "-s", str(1430 - headers), to]
        assert " 0% packet loss" in lab.run("n1-p1", whole, check=False).stdout, f"IPv{version} at the full MTU"


def test_defect_12_udp_obeys_one_lease_for_an_address_and_errors_come_back(make_lab: MakeLab) -> None:
    """Upstream takes the first lease that fits, and no pod hears of a packet that is too old or too long."""
    lab = make_lab(2)
    far = lab.address_of("n2-p1")
    until("pods reach each other", lambda: reaches(lab, "n1-p1", "n2-p1"))
    for hops, said in ((1, "Time to live exceeded"), (2, "Time to live exceeded"), (3, "1 received")):
        once = ["ping", "-n", "-c", "1", "-W", "5", "-t", str(hops), far]
        assert said in lab.run("n1-p1", once, check=False).stdout, f"with a TTL of {hops}"
    # the pod's own device takes more, so that the overlay's has to say it
    lab.run("n1-p1", ["ip", "link", "set", "eth0", "mtu", "1500"])
    for member in ("cni0", "p1"):
        lab.run("n1", ["ip", "link", "set", member, "mtu", "1500"])
    long = ["ping", "-n", "-c", "2", "-i", "0.2", "-W", "5", "-M", "do", "-s", "1472", far]
    said_long = lab.run("n1-p1", long, check=False)
    assert "mtu = 1472" in said_long.stdout or "mtu=1472" in said_long.stdout + said_long.stderr, said_long.stdout
    # a narrower lease within the far node's subnet, and elsewhere: the older one is obeyed
    subnet = status_of(lab.node("n2"))["lease"]["subnet"]
    put_lease(lab, subnet.replace(".0/24", ".128-25"), '{"PublicIP":"198.18.7.1","PublicIPv6":null}')
    until("the overlap is refused", lambda: status_of(lab.node("n1"))["rejected"])
    assert reaches(lab, "n1-p1", "n2-p1")


def test_defect_12_udp_asks_who_sends_and_by_which_backend_and_counts(make_lab: MakeLab) -> None:
    """Upstream takes a datagram from anybody, sends udp to nodes of another backend, and counts nothing."""
    lab = make_lab(2)
    node, far = lab.node("n1"), lab.node("n2")
    until("pods reach each other", lambda: reaches(lab, "n1-p1", "n2-p1"))

    def packets() -> tuple[int, int]:
        (peer,) = [p for p in status_of(node)["peers"] if p["public_ip"] == str(far.address.ip)]
        return peer["tx_packets"], peer["rx_packets"]

    before = packets()
    lab.ping("n1-p1", "n2-p1", count=10)
    after = packets()
    assert (after[0] - before[0], after[1] - before[1]) == (10, 10)

    put_lease(lab, FOREIGN, vxlan_lease("02:00:00:00:00:0a", str(far.address.ip)))
    until("the lease of another backend is refused", lambda: "10.244.210.0/24" in status_of(node)["ignored"])
    assert all(peer["subnet"] != "10.244.210.0/24" for peer in status_of(node)["peers"])

    stranger = lab.add_node(start=False)
    packet = inner_udp(lab.address_of("n2-p1"), lab.address_of("n1-p1"), b"of nobody")
    forge = (
        "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((sys.argv[1], 8285));"
        "print('ready', flush=True); s.sendto(bytes.fromhex(sys.argv[3]), (sys.argv[2], 8285))"
    )
    drops = status_of(node)["drops"]
    sources = (str(stranger.address.ip), str(node.address.ip))
    with python_in(lab, stranger.name, forge, *sources, packet.hex()) as sender:
        assert sender.wait(20) == 0
    until("it is dropped and named", lambda: sources[0] in json.dumps(status_of(node)["unknown_sources"]))
    assert status_of(node)["drops"] != drops


def test_defect_12_udp_carries_on_while_its_table_changes_and_through_unequal_mtus(make_lab: MakeLab) -> None:
    """Upstream's proxy hears of no change while packets come, and cuts off what is longer than its own MTU."""
    lab = make_lab(2)
    flood = (
        "import socket, sys\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nprint('ready', flush=True)\n"
        "while True: s.sendto(b'x' * 64, (sys.argv[1], 9))"
    )
    with python_in(lab, "n1-p1", flood, lab.address_of("n2-p1")) as sender:
        try:
            for number in range(20):
                value = f'{{"PublicIP":"198.18.7.{number + 1}","PublicIPv6":null}}'
                put_lease(lab, f"10.244.{200 + number}.0-24", value)
            until("every change came through", lambda: len(status_of(lab.node("n1"))["peers"]) == 21)
        finally:
            sender.kill()
    # n1's device takes 1372 bytes from here on, and n2 still sends 1472: whole, not cut
    lab.run("n1", ["ip", "link", "set", "flannel0", "mtu", "1372"])
    whole = ["ping", "-n", "-c", "3", "-i", "0.2", "-W", "5", "-s", "1444", lab.address_of("n1-p1")]
    until("a long packet arrives", lambda: " 0% packet loss" in lab.run("n2-p1", whole, check=False).stdout)
