"""Forward rules against the real iptables and nft, beside rules of others that must stay."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest
import uvloop

from dataplane.errors import KernelError
from dataplane.kernel.firewall import ensure_forward, remove_forward
from tests.namespaces import Namespace, open_namespace, open_namespaces

pytestmark = pytest.mark.netns

NETWORK = IPv4Network("10.5.0.0/16")
IPTABLES_RULES = [
    '-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD',
    '-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
    '-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
]
NFT_CHAIN = """\
table ip flannel-ipv4 {
	chain forward {
		comment "chain to accept flannel traffic"
		type filter hook forward priority filter; policy accept;
		ip saddr 10.5.0.0/16 accept
		ip daddr 10.5.0.0/16 accept
	}
}
"""


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with open_namespace() as namespace:
        yield namespace


def ensure(ns: Namespace, nftables: bool, network: IPv4Network = NETWORK) -> bool:
    return do(ns, lambda: ensure_forward(network, nftables=nftables))


def remove(ns: Namespace) -> bool:
    return do(ns, remove_forward)


def do(ns: Namespace, work: Callable[[], Awaitable[bool]]) -> bool:
    async def main() -> bool:
        return await work()

    return ns.run(uvloop.run, main())


def iptables(ns: Namespace) -> list[str]:
    return ns.command("iptables", "-S").stdout.splitlines()


def ruleset(ns: Namespace) -> str:
    return ns.command("nft", "list", "ruleset").stdout


def test_iptables_rules_are_flannels_to_the_letter(ns: Namespace) -> None:
    untouched = iptables(ns)
    assert ensure(ns, nftables=False)
    first = iptables(ns)
    assert first == [*untouched, "-N FLANNEL-FWD", *IPTABLES_RULES]
    assert ns.command("iptables", "-S", "FLANNEL-FWD").stdout.splitlines() == ["-N FLANNEL-FWD", *IPTABLES_RULES[1:]]
    assert not ensure(ns, nftables=False)
    assert iptables(ns) == first
    assert remove(ns)
    assert iptables(ns) == untouched
    assert not remove(ns)
    assert iptables(ns) == untouched


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
        assert ensure(ns, nftables)
    assert ns.command("iptables", "-S", "FORWARD").stdout.splitlines() == [
        "-P FORWARD DROP",
        *foreign[:2],
        IPTABLES_RULES[0],
    ]
    assert remove(ns)
    assert ruleset(ns) == before


@pytest.mark.parametrize(
    "spoiled",
    [
        ["-F FLANNEL-FWD"],
        ["-D FLANNEL-FWD 1"],
        ["-A FLANNEL-FWD -j RETURN"],
        ["-D FLANNEL-FWD 1", "-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment flanneld -j ACCEPT"],
        ["-D FORWARD 1"],
        ["-D FORWARD 1", "-X FLANNEL-FWD"],
        [IPTABLES_RULES[0], IPTABLES_RULES[0]],
    ],
)
def test_spoiled_iptables_rules_are_put_right(ns: Namespace, spoiled: list[str]) -> None:
    ensure(ns, nftables=False)
    good = iptables(ns)
    if spoiled[-1] == "-X FLANNEL-FWD":
        spoiled = [spoiled[0], "-F FLANNEL-FWD", spoiled[1]]
    ns.command("iptables-restore", "--noflush", stdin="\n".join(["*filter", *spoiled, "COMMIT", ""]))
    assert iptables(ns) != good
    assert ensure(ns, nftables=False)
    assert sorted(iptables(ns)) == sorted(good)
    assert not ensure(ns, nftables=False)
    assert remove(ns)
    assert not any("FLANNEL" in line for line in iptables(ns))


def test_another_network_takes_the_place_of_the_old_one(ns: Namespace) -> None:
    for nftables in (False, True):
        ensure(ns, nftables)
        assert ensure(ns, nftables, IPv4Network("10.99.0.0/16"))
    now = ruleset(ns)
    assert "10.5.0.0/16" not in now
    assert now.count("10.99.0.0/16") == 4
    assert remove(ns)


def test_a_rule_of_others_that_jumps_to_our_chain_keeps_the_chain_but_nothing_in_it(ns: Namespace) -> None:
    ensure(ns, nftables=False)
    ns.command("iptables", "-I", "FORWARD", "-s", "198.18.0.0/15", "-j", "FLANNEL-FWD")
    assert remove(ns)
    assert [line for line in iptables(ns) if "FLANNEL" in line] == [
        "-N FLANNEL-FWD",
        "-A FORWARD -s 198.18.0.0/15 -j FLANNEL-FWD",
    ]
    assert not remove(ns)


def test_nftables_chain_is_flannels_to_the_letter(ns: Namespace) -> None:
    assert ensure(ns, nftables=True)
    assert ns.command("nft", "list", "chain", "ip", "flannel-ipv4", "forward").stdout == NFT_CHAIN
    assert 'comment "rules for flannel-ipv4"' in ruleset(ns)
    first = ns.command("nft", "-a", "list", "ruleset").stdout
    assert not ensure(ns, nftables=True)
    assert ns.command("nft", "-a", "list", "ruleset").stdout == first  # the very same rules, by their handles
    assert remove(ns)
    assert ruleset(ns) == ""
    assert not remove(ns)


def test_the_rest_of_flannels_table_stays(ns: Namespace) -> None:
    table = """\
table ip flannel-ipv4 {
    chain postrtg {
        type nat hook postrouting priority srcnat; policy accept;
        meta mark 0x00004000 return
    }
    chain forward {
        type filter hook forward priority 7; policy accept;
        drop
    }
}
"""
    ns.command("nft", "-f", "-", stdin=table)
    postrtg = ns.command("nft", "-a", "list", "chain", "ip", "flannel-ipv4", "postrtg").stdout
    assert ensure(ns, nftables=True)
    assert ns.command("nft", "list", "chain", "ip", "flannel-ipv4", "forward").stdout == NFT_CHAIN
    for _ in range(2):
        assert ns.command("nft", "-a", "list", "chain", "ip", "flannel-ipv4", "postrtg").stdout == postrtg
        remove(ns)
    assert "forward" not in ruleset(ns)
    ns.command("nft", "flush", "ruleset")
    assert ensure(ns, nftables=True)


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
        ensure(router, nftables)
        assert reaches() != nftables
        remove(router)
        assert not reaches()


@pytest.mark.parametrize(
    ("nftables", "tool", "package"), [(False, "iptables", "iptables"), (True, "nft", "nftables")]
)
def test_a_missing_tool_is_named_with_its_package(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nftables: bool, tool: str, package: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match=rf"there is no {tool} on the PATH; install it: apt install {package}"):
        ensure(ns, nftables)
    assert not remove(ns)


@pytest.mark.parametrize("nftables", [False, True])
def test_a_refusal_comes_with_what_the_tool_said(ns: Namespace, nftables: bool) -> None:
    process = ns.spawn_python(
        "import asyncio, sys; from ipaddress import IPv4Network\n"
        "from dataplane.kernel.firewall import ensure_forward\n"
        "asyncio.run(ensure_forward(IPv4Network('10.5.0.0/16'), nftables=bool(int(sys.argv[1]))))",
        str(int(nftables)),
        dropped=("net_admin",),
    )
    _, stderr = process.communicate(timeout=60)
    assert "KernelError: cannot read or change the firewall: `" in stderr
    assert "ermi" in stderr.rpartition("KernelError")[2]  # Permission denied, Operation not permitted
    assert ruleset(ns) == ""


def test_a_cancelled_change_leaves_no_process(
    ns: Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "iptables").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec /bin/sleep 600\n")
    (tmp_path / "iptables").chmod(0o755)
    os.mkfifo(tmp_path / "pid")
    monkeypatch.setenv("PATH", str(tmp_path))

    async def main() -> int:
        change = asyncio.create_task(ensure_forward(NETWORK, nftables=False))
        pid = int(await asyncio.to_thread((tmp_path / "pid").read_text))
        os.kill(pid, 0)
        change.cancel()
        with pytest.raises(asyncio.CancelledError):
            await change
        return pid

    pid = ns.run(uvloop.run, main())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
