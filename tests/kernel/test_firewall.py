"""The firewall rules against the real iptables and nft, beside rules of others, and with real packets."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import TypeVar

import pytest
import uvloop

from dataplane.errors import KernelError
from dataplane.kernel import firewall
from dataplane.kernel.rules import Rules
from tests.namespaces import Namespace, open_namespace, open_namespaces

pytestmark = pytest.mark.netns

T = TypeVar("T")

V4 = Rules(IPv4Network("10.5.0.0/16"), IPv4Network("10.5.1.0/24"), masquerade=True, forward=True)
V6 = Rules(IPv6Network("fd00:5::/48"), IPv6Network("fd00:5:0:1::/64"), masquerade=True, forward=True)
FAMILY = {4: V4, 6: V6}
both_engines = pytest.mark.parametrize("nftables", [False, True], ids=["iptables", "nftables"])
both_families = pytest.mark.parametrize("version", [4, 6])

FORWARD_RULES = """\
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s {N} -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d {N} -m comment --comment "flanneld forward" -j ACCEPT
"""
MASQUERADE_RULES = """\
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s {P} -d {N} -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s {N} -d {P} -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s {N} -d {P} -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s {N} ! -d {M} -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s {N} -d {N} -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
"""
NFT_TABLE = """\
table {T} {{
	comment "rules for {table}"
	chain postrtg {{
		comment "chain to manage traffic masquerading by flannel"
		type nat hook postrouting priority srcnat; policy accept;
		meta mark 0x00004000 return
		{ip} saddr {P} {ip} daddr {N} return
		{ip} saddr {N} {ip} daddr {P} return
		{ip} saddr != {N} {ip} daddr {P} return
		{ip} saddr {N} {ip} daddr != {M} masquerade fully-random
		{ip} saddr != {N} {ip} daddr {N} masquerade fully-random
	}}

	chain forward {{
		comment "chain to accept flannel traffic"
		type filter hook forward priority filter; policy accept;
		{ip} saddr {N} accept
		{ip} daddr {N} accept
	}}
}}
"""


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with open_namespace() as namespace:
        yield namespace


def ensure(ns: Namespace, rules: Rules, nftables: bool, former: Sequence[Rules] = ()) -> bool:
    return do(ns, lambda: firewall.ensure(rules, former, nftables=nftables))


def remove(ns: Namespace, version: int, nftables: bool) -> bool:
    return do(ns, lambda: firewall.remove(version, nftables=nftables))


def do(ns: Namespace, work: Callable[[], Awaitable[T]]) -> T:
    async def main() -> T:
        return await work()

    return ns.run(uvloop.run, main())


def filled(text: str, rules: Rules) -> str:
    family = {4: ("ip", "224.0.0.0/4"), 6: ("ip6", "ff00::/8")}[rules.version]
    table = f"flannel-ipv{rules.version}"
    words = {"ip": family[0], "M": family[1], "table": table, "T": f"{family[0]} {table}"}
    return text.format(N=rules.network, P=rules.subnet, **words)


def listing(ns: Namespace, version: int, table: str) -> list[str]:
    tool = "iptables" if version == 4 else "ip6tables"
    return ns.command(tool, "-t", table, "-S").stdout.splitlines()


def ours(ns: Namespace, version: int) -> str:
    """Every line of iptables that has to do with our chains."""
    lines = [*listing(ns, version, "nat"), *listing(ns, version, "filter")]
    return "".join(f"{line}\n" for line in lines if "FLANNEL" in line and not line.startswith("-N "))


def ruleset(ns: Namespace) -> str:
    return ns.command("nft", "list", "ruleset").stdout


# --- the texts ------------------------------------------------------------------------------------------------


@both_families
def test_iptables_rules_are_flannels_to_the_letter(ns: Namespace, version: int) -> None:
    untouched = [listing(ns, version, table) for table in ("nat", "filter")]
    rules = FAMILY[version]
    assert ensure(ns, rules, nftables=False)
    assert ours(ns, version) == filled(MASQUERADE_RULES + FORWARD_RULES, rules)
    assert not ensure(ns, rules, nftables=False)
    assert ours(ns, version) == filled(MASQUERADE_RULES + FORWARD_RULES, rules)
    assert remove(ns, version, nftables=False)
    assert [listing(ns, version, table) for table in ("nat", "filter")] == untouched
    assert not remove(ns, version, nftables=False)


@both_families
def test_defect_10_nftables_rules_are_flannels_but_for_the_fourth(ns: Namespace, version: int) -> None:
    """Upstream's fourth rule takes what the last one is for; see test_the_host_reaches_pods_of_other_nodes."""
    rules = FAMILY[version]
    assert ensure(ns, rules, nftables=True)
    now = ns.command("nft", "list", "table", *filled("{T}", rules).split()).stdout
    assert now.replace("\n\n\tchain postrtg", "\n\tchain postrtg") == filled(NFT_TABLE, rules)
    first = ns.command("nft", "-a", "list", "ruleset").stdout
    assert not ensure(ns, rules, nftables=True)
    assert ns.command("nft", "-a", "list", "ruleset").stdout == first  # the very same rules, by their handles
    assert remove(ns, version, nftables=True)
    assert ruleset(ns) == ""
    assert not remove(ns, version, nftables=True)


@both_engines
def test_each_half_is_set_alone_and_goes_alone(ns: Namespace, nftables: bool) -> None:
    def has() -> tuple[bool, bool]:
        text = ruleset(ns) if nftables else ours(ns, 4)
        return "masq" in text, "accept" in text.replace("policy accept", "").lower()

    for masquerade, forward in ((True, False), (False, True), (True, True), (False, False)):
        ensure(ns, replace(V4, masquerade=masquerade, forward=forward), nftables)
        assert has() == (masquerade, forward)


@both_engines
def test_random_ports_can_be_switched_off(ns: Namespace, nftables: bool) -> None:
    ensure(ns, V4, nftables)
    assert ensure(ns, replace(V4, fully_random=False), nftables)
    now = ruleset(ns)
    assert "random" not in now
    assert now.lower().count("masquerade") == 2


def test_the_legacy_back_end_prints_and_takes_the_same(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for tool in ("iptables", "iptables-restore"):
        (tmp_path / tool).symlink_to(f"/usr/sbin/{tool.replace('iptables', 'iptables-legacy')}")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert ensure(ns, V4, nftables=False)
    assert not ensure(ns, V4, nftables=False)
    assert ours(ns, 4) == filled(MASQUERADE_RULES + FORWARD_RULES, V4)
    assert do(ns, firewall.counts_iptables) is False
    assert remove(ns, 4, nftables=False)
    assert ours(ns, 4) == ""


# --- drift, leftovers, others ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoiled",
    [
        "*filter\n-D FLANNEL-FWD 1",
        "*filter\n-D FLANNEL-FWD 1\n-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT",
        "*filter\n-D FORWARD 1",
        "*filter\n-D FORWARD 1\n-F FLANNEL-FWD\n-X FLANNEL-FWD",
        "*filter\n-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD",
        "*nat\n-F FLANNEL-POSTRTG",
        "*nat\n-D FLANNEL-POSTRTG 1",
        "*nat\n-D FLANNEL-POSTRTG 4",
        "*nat\n-F POSTROUTING",
    ],
)
def test_spoiled_iptables_rules_are_put_right(ns: Namespace, spoiled: str) -> None:
    ensure(ns, V4, nftables=False)
    good = ours(ns, 4)
    ns.command("iptables-restore", "--noflush", stdin=f"{spoiled}\nCOMMIT\n")
    assert ours(ns, 4) != good
    assert ensure(ns, V4, nftables=False)
    assert ours(ns, 4) == good
    assert not ensure(ns, V4, nftables=False)


@pytest.mark.parametrize(
    "spoiled",
    [
        "flush ruleset",
        "flush chain ip flannel-ipv4 postrtg",
        "delete chain ip flannel-ipv4 forward",
        "add rule ip flannel-ipv4 forward ip saddr 10.5.0.0/16 accept",
        "insert rule ip flannel-ipv4 postrtg ip saddr 10.5.0.0/16 ip daddr 10.5.1.0/24 return",
        "flush chain ip flannel-ipv4 forward\nadd chain ip flannel-ipv4 forward { policy drop; }",
    ],
)
def test_spoiled_nftables_rules_are_put_right(ns: Namespace, spoiled: str) -> None:
    """Upstream sets its nftables rules once and never looks again: facts 14 number 10."""
    ensure(ns, V4, nftables=True)
    good = sorted(ruleset(ns).splitlines())
    ns.command("nft", "-f", "-", stdin=spoiled + "\n")
    assert sorted(ruleset(ns).splitlines()) != good
    assert ensure(ns, V4, nftables=True)
    assert sorted(ruleset(ns).splitlines()) == good
    assert not ensure(ns, V4, nftables=True)


@both_engines
def test_rules_of_a_former_network_are_recycled(ns: Namespace, nftables: bool) -> None:
    former = replace(V4, network=IPv4Network("10.99.0.0/16"), subnet=IPv4Network("10.99.7.0/24"), fully_random=False)
    ensure(ns, former, nftables)
    assert ensure(ns, V4, nftables, [replace(former, fully_random=True)])
    assert "10.99" not in ruleset(ns)
    if not nftables:
        assert ours(ns, 4) == filled(MASQUERADE_RULES + FORWARD_RULES, V4)


@both_families
def test_flannels_fourth_nftables_rule_goes_where_flannel_ran_before(ns: Namespace, version: int) -> None:
    """It would stand before ours and take the host's packets; seen when a real flanneld was swapped for this one."""
    rules = FAMILY[version]
    fourth = "{ip} saddr != {N} {ip} daddr {P} return", "{ip} saddr != {P} {ip} daddr {N} return"
    ns.command("nft", "-f", "-", stdin=filled(NFT_TABLE.replace(*fourth), rules))
    assert filled(fourth[1], rules) in ruleset(ns)
    assert ensure(ns, rules, nftables=True)
    now, wanted = (text.replace("\n\n", "\n").splitlines() for text in (ruleset(ns), filled(NFT_TABLE, rules)))
    chain = slice(*(wanted.index(f"\tchain {name} {{") for name in ("postrtg", "forward")))
    begin = now.index("\tchain postrtg {")
    assert now[begin : begin + chain.stop - chain.start] == wanted[chain]  # in this order
    assert sorted(now) == sorted(wanted)
    assert not ensure(ns, rules, nftables=True)


@both_engines
def test_two_overlays_of_one_machine_share_the_chains_in_peace(ns: Namespace, nftables: bool) -> None:
    """As with flannel, whose functional tests run two daemons on a host; neither may undo the other's rules."""
    other = replace(V4, network=IPv4Network("10.6.0.0/16"), subnet=IPv4Network("10.6.1.0/24"))
    assert ensure(ns, V4, nftables)
    assert ensure(ns, other, nftables)
    first = ruleset(ns)
    assert not ensure(ns, V4, nftables)
    assert not ensure(ns, other, nftables)
    assert ensure(ns, replace(V4, masquerade=False, forward=False), nftables)
    assert "10.5" not in ruleset(ns)
    assert not ensure(ns, other, nftables)
    assert ensure(ns, V4, nftables)
    assert not ensure(ns, other, nftables)
    assert sorted(ruleset(ns).splitlines()) == sorted(first.splitlines())


def test_rules_of_others_stay_and_stand_before_ours(ns: Namespace) -> None:
    foreign = [
        "-A FORWARD -j KUBE-FORWARD",
        '-A FORWARD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j DROP',
        '-A INPUT -m comment --comment "flanneld forward" -j ACCEPT',
        "-A KUBE-FORWARD -d 10.5.0.0/16 -j ACCEPT",
    ]
    ns.command("iptables", "-N", "KUBE-FORWARD")
    ns.command("iptables", "-P", "FORWARD", "DROP")
    ns.command("iptables-restore", "--noflush", stdin="\n".join(["*filter", *foreign, "COMMIT", ""]))
    ns.command("iptables", "-t", "nat", "-A", "POSTROUTING", "-s", "10.5.0.0/16", "-j", "MASQUERADE")
    ns.command("nft", "add", "table", "ip", "other")
    ns.command("nft", "add", "chain", "ip", "other", "forward", "{ type filter hook forward priority 5; }")
    before = ruleset(ns)
    for nftables in (False, True):
        assert ensure(ns, V4, nftables)
    assert ns.command("iptables", "-S", "FORWARD").stdout.splitlines() == [
        "-P FORWARD DROP",
        *foreign[:2],
        '-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD',
    ]
    for nftables in (False, True):
        assert remove(ns, 4, nftables)
    assert ruleset(ns) == before


def test_a_rule_of_others_that_jumps_to_our_chain_keeps_the_chain_but_nothing_in_it(ns: Namespace) -> None:
    """Upstream cannot delete a chain that is jumped to, and looks for it in the wrong table: facts 14 number 10."""
    ensure(ns, V4, nftables=False)
    ns.command("iptables", "-I", "FORWARD", "-s", "198.18.0.0/15", "-j", "FLANNEL-FWD")
    assert remove(ns, 4, nftables=False)
    assert [line for line in listing(ns, 4, "filter") if "FLANNEL" in line] == [
        "-N FLANNEL-FWD",
        "-A FORWARD -s 198.18.0.0/15 -j FLANNEL-FWD",
    ]
    assert not remove(ns, 4, nftables=False)


def test_what_others_keep_in_our_table_stays(ns: Namespace) -> None:
    ns.command("nft", "add", "table", "ip", "flannel-ipv4")
    ns.command("nft", "add", "set", "ip", "flannel-ipv4", "theirs", "{ type ipv4_addr; }")
    before = ruleset(ns)
    assert ensure(ns, V4, nftables=True)
    assert remove(ns, 4, nftables=True)
    assert ruleset(ns) == before


def test_the_kernel_counts_every_change_of_either_tool(ns: Namespace) -> None:
    counts = [ns.run(firewall.generation)]
    for nftables in (False, True):
        ensure(ns, V4, nftables)
        counts.append(ns.run(firewall.generation))
    ensure(ns, V4, nftables=True)
    assert ns.run(firewall.generation) == counts[-1], "a look is no change"
    ns.command("nft", "flush", "ruleset")
    counts.append(ns.run(firewall.generation))
    assert len(set(counts)) == len(counts)
    assert None not in counts
    assert do(ns, firewall.counts_iptables) is True


# --- packets --------------------------------------------------------------------------------------------------


class Stand:
    """A node between a peer node (whose pods are 10.5.2.0/24) and the outside, with a pod of its own."""

    def __init__(self, pod: Namespace, node: Namespace, peer: Namespace, outside: Namespace, version: int) -> None:
        self.pod, self.node, self.peer, self.outside, self.version = pod, node, peer, outside, version
        pod.link_to(node, "eth0", "pod0")
        peer.link_to(node, "eth0", "overlay0")
        outside.link_to(node, "eth0", "out0")
        for inside in (pod, node, peer, outside):
            settings = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", "net.ipv4.conf.all.rp_filter=0")
            inside.command("sysctl", "-qw", *settings)
        self._address(pod, "eth0", self.of("pod"))
        self._address(node, "pod0", self.of("gateway"))
        self._address(node, "overlay0", self.of("node, overlay"))
        self._address(peer, "eth0", self.of("peer, overlay"))
        self._address(peer, "lo", self.of("pod of peer"), host=True)
        self._address(node, "out0", self.of("node"))
        self._address(outside, "eth0", self.of("outside"))
        self._route(pod, "default", self.of("gateway"))
        self._route(node, str(V4.network if version == 4 else V6.network), self.of("peer, overlay"))
        # answers to whatever address reaches them, so that a wrong source is seen and not lost
        self._route(peer, "default", self.of("node, overlay"))
        self._route(outside, "default", self.of("node"))

    def of(self, who: str) -> str:
        v4 = {
            "pod": "10.5.1.2", "gateway": "10.5.1.1", "node, overlay": "198.19.0.1", "peer, overlay": "198.19.0.2",
            "pod of peer": "10.5.2.2", "node": "198.18.0.1", "outside": "198.18.0.2",
        }  # fmt: skip
        v6 = {
            "pod": "fd00:5:0:1::2", "gateway": "fd00:5:0:1::1", "node, overlay": "fd00:198:19::1",
            "peer, overlay": "fd00:198:19::2", "pod of peer": "fd00:5:0:2::2", "node": "fd00:198:18::1",
            "outside": "fd00:198:18::2",
        }  # fmt: skip
        return (v4 if self.version == 4 else v6)[who]

    def seen(self, source: Namespace, at: Namespace, target: str) -> str:
        """The source address that a TCP server at `target` sees of a client in `source`."""
        server = at.spawn_python(SERVER, self.of(target))
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        source.command(sys.executable, "-c", CLIENT, self.of(target), port)
        out, err = server.communicate(timeout=30)
        assert server.returncode == 0, err
        return out.strip()

    def _address(self, where: Namespace, device: str, address: str, *, host: bool = False) -> None:
        length = {4: 24, 6: 64}[self.version] if not host else {4: 32, 6: 128}[self.version]
        flags = [] if self.version == 4 else ["nodad"]
        where.command("ip", "addr", "add", f"{address}/{length}", "dev", device, *flags)

    def _route(self, where: Namespace, target: str, via: str) -> None:
        where.command("ip", f"-{self.version}", "route", "add", target, "via", via)


SERVER = """
import socket, sys
server = socket.create_server((sys.argv[1], 0), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
server.settimeout(30)
print(server.getsockname()[1], flush=True)
print(server.accept()[1][0])
"""
ECHO = """
import socket, sys
server = socket.create_server((sys.argv[1], 0), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print(server.getsockname()[1], flush=True)
stream = server.accept()[0]
while data := stream.recv(1):
    stream.send(data)
"""
CLIENT = """
import socket, sys
socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20).close()
"""


@pytest.fixture(params=[4, 6], ids=["IPv4", "IPv6"])
def stand(request: pytest.FixtureRequest) -> Iterator[Stand]:
    with open_namespaces(4) as (pod, node, peer, outside):
        yield Stand(pod, node, peer, outside, request.param)


@both_engines
def test_each_packet_keeps_or_changes_its_source_as_it_should(stand: Stand, nftables: bool) -> None:
    """Without rules everybody sees the sender's own address; with them only the two cases that need it change."""
    stand.outside.command("ip", f"-{stand.version}", "route", "add", str(FAMILY[stand.version].network), "via",
                          stand.of("node"))  # fmt: skip
    cases = {
        "pod to outside": (stand.pod, stand.outside, "outside", "pod", "node"),
        "host to a pod of its own": (stand.node, stand.pod, "pod", "gateway", "gateway"),
        "pod to a pod of another node": (stand.pod, stand.peer, "pod of peer", "pod", "pod"),
        "pod of another node to a pod": (stand.peer, stand.pod, "pod", "peer, overlay", "peer, overlay"),
        "outside to a pod": (stand.outside, stand.pod, "pod", "outside", "outside"),
        "outside to a pod of another node": (stand.outside, stand.peer, "pod of peer", "outside", "node, overlay"),
    }
    for name, (source, at, target, before, _) in cases.items():
        assert stand.seen(source, at, target) == stand.of(before), name
    ensure(stand.node, FAMILY[stand.version], nftables)
    for name, (source, at, target, _, after) in cases.items():
        assert stand.seen(source, at, target) == stand.of(after), name


@both_engines
def test_the_host_reaches_pods_of_other_nodes(stand: Stand, nftables: bool) -> None:
    """Upstream's nftables rules leave the host's own address on such packets, to which the other node has no way
    back through the overlay (facts 14 number 10). Here the host sends from the address of its outside, as for a
    NodePort."""
    route = [str(FAMILY[stand.version].network), "via", stand.of("peer, overlay"), "src", stand.of("node")]
    stand.node.command("ip", f"-{stand.version}", "route", "replace", *route)
    assert stand.seen(stand.node, stand.peer, "pod of peer") == stand.of("node")
    ensure(stand.node, FAMILY[stand.version], nftables)
    assert stand.seen(stand.node, stand.peer, "pod of peer") == stand.of("node, overlay")


@both_engines
def test_a_stream_goes_on_while_its_rules_are_put_back(stand: Stand, nftables: bool) -> None:
    """A repair replaces chains; connections that are masqueraded already keep their address."""
    rules = FAMILY[stand.version]
    ensure(stand.node, rules, nftables)
    server = stand.outside.spawn_python(ECHO, stand.of("outside"))
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    code = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 20); s.settimeout(20)\n"
    code += "for line in sys.stdin: s.send(b'x'); s.recv(1); print('ok', flush=True)"
    client = stand.pod.spawn_python(code, stand.of("outside"), port, stdin=subprocess.PIPE)
    assert client.stdin is not None
    assert client.stdout is not None

    def echoes() -> bool:
        client.stdin.write("\n")  # type: ignore[union-attr]  # asserted above
        client.stdin.flush()  # type: ignore[union-attr]  # asserted above
        return client.stdout.readline() == "ok\n"  # type: ignore[union-attr]  # asserted above

    assert echoes()
    if nftables:
        stand.node.command("nft", "flush", "ruleset")
    else:
        tool = "iptables" if stand.version == 4 else "ip6tables"
        stand.node.command(tool, "-t", "nat", "-F")
    assert ensure(stand.node, rules, nftables)
    assert echoes()


@pytest.mark.parametrize("nftables", [False, True])
def test_forwarded_packets_pass_a_policy_that_drops(nftables: bool) -> None:
    """Seen from outside: with iptables the accepts win over FORWARD's own policy; with nftables they do not (9.5)."""
    with open_namespaces(3) as (left, router, right):
        left.link_to(router, "eth0", "l0")
        right.link_to(router, "eth0", "r0")
        router.command("sysctl", "-qw", "net.ipv4.ip_forward=1")
        for outer, device, subnet in ((left, "l0", "10.5.1"), (right, "r0", "10.5.2")):
            router.command("ip", "addr", "add", f"{subnet}.1/24", "dev", device)
            outer.command("ip", "addr", "add", f"{subnet}.2/24", "dev", "eth0")
            outer.command("ip", "route", "add", "default", "via", f"{subnet}.1")
        router.command("iptables", "-P", "FORWARD", "DROP")

        def reaches() -> bool:
            return left.command("ping", "-c1", "-W1", "10.5.2.2", check=False).returncode == 0

        assert not reaches()
        ensure(router, V4, nftables)
        assert reaches() != nftables
        remove(router, 4, nftables)
        assert not reaches()


@pytest.mark.parametrize(
    ("nftables", "tool", "package"), [(False, "iptables", "iptables"), (True, "nft", "nftables")]
)
def test_a_missing_tool_is_named_with_its_package(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nftables: bool, tool: str, package: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match=rf"there is no {tool} on the PATH; install it: apt install {package}"):
        ensure(ns, V4, nftables)
    assert not remove(ns, 4, nftables)


@pytest.mark.parametrize("nftables", [False, True])
def test_a_refusal_comes_with_what_the_tool_said(ns: Namespace, nftables: bool) -> None:
    process = ns.spawn_python(
        "import asyncio, sys; from tests.kernel.test_firewall import V4, firewall\n"
        "asyncio.run(firewall.ensure(V4, nftables=bool(int(sys.argv[1]))))",
        str(int(nftables)),
        dropped=("net_admin",),
    )
    _, stderr = process.communicate(timeout=60)
    assert "KernelError: cannot read or change the firewall: `" in stderr
    assert "ermi" in stderr.rpartition("KernelError")[2]  # Permission denied, Operation not permitted
    assert ruleset(ns) == ""


def test_a_tool_that_is_killed_is_no_missing_chain(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else the chain would be made anew, without what others keep there."""
    ensure(ns, V4, nftables=False)
    ns.command("iptables", "-t", "nat", "-A", "FLANNEL-POSTRTG", "-s", "10.77.0.0/16", "-j", "RETURN")
    before = listing(ns, 4, "nat")
    real = shutil.which("iptables")
    dies = 'case "$*" in *"-S FLANNEL-POSTRTG"*) kill -SEGV $$ ;; esac'
    (tmp_path / "iptables").write_text(f'#!/bin/sh\n{dies}\nexec {real} "$@"\n')
    (tmp_path / "iptables").chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(KernelError, match=r"`iptables -w 30 -t nat -S FLANNEL-POSTRTG` was ended by signal 11"):
            ensure(ns, V4, nftables=False)
    assert listing(ns, 4, "nat") == before


def test_a_cancelled_change_leaves_no_process(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "iptables").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec /bin/sleep 600\n")
    (tmp_path / "iptables").chmod(0o755)
    os.mkfifo(tmp_path / "pid")
    monkeypatch.setenv("PATH", str(tmp_path))

    async def main() -> int:
        change = asyncio.create_task(firewall.ensure(V4, nftables=False))
        pid = int(await asyncio.to_thread((tmp_path / "pid").read_text))
        os.kill(pid, 0)
        change.cancel()
        with pytest.raises(asyncio.CancelledError):
            await change
        return pid

    pid = ns.run(uvloop.run, main())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
