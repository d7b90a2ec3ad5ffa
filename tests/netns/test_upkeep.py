"""What a running daemon keeps on its node: firewall rules and blackhole route, and what --cleanup takes away again."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from dataplane.lab import Lab, Node
from tests.netns.conftest import MakeLab
from tests.netns.observing import status_of, until

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600)]

LODEN = str(Path(sys.executable).with_name("loden"))
CONFIG: dict[str, object] = {"Network": "10.244.0.0/16", "Backend": {"Type": "udp"}}
NFTABLES: dict[str, object] = {**CONFIG, "EnableNFTables": True}


def restarted(lab: Lab, *flags: str, config: dict[str, object] | None = None) -> Node:
    node = lab.node("n1")
    node.stop_daemon()
    if config is not None:
        store = [f"-{flag}" for flag in lab.store_flags]
        lab.run("n1", [LODEN, "net-conf", "set", *store, "-"], stdin=json.dumps(config))
    node.start_daemon("-iptables-resync=1", *flags)
    node.wait_ready()
    return node


def rules(lab: Lab) -> str:
    """Every rule of either engine and family that is flannel's or ours."""
    listed = [lab.run("n1", [tool, "-t", table, "-S"]).stdout for tool in ("iptables", "ip6tables") for table in
              ("nat", "filter")]  # fmt: skip
    listed.append(lab.run("n1", ["nft", "list", "ruleset"]).stdout.partition("table ip flannel-ipv4")[2])
    return "\n".join(line for text in listed for line in text.splitlines() if "10.244" in line)


def test_defect_10_flushed_rules_come_back_in_either_engine(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    for config, words in ((CONFIG, "MASQUERADE --random-fully"), (NFTABLES, "masquerade fully-random")):
        node = restarted(lab, "-ip-masq", config=config)
        good = rules(lab)
        assert words in good
        lab.run("n1", ["nft", "flush", "ruleset"])
        until("the rules are back", lambda good=good: rules(lab) == good)  # type: ignore[misc]  # bound early
        until("and it is told", lambda node=node: "rules are missing; deleting" in node.log.read_text())  # type: ignore[misc]  # the same


def test_switching_the_engine_removes_the_rules_of_the_other(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    for config, mine, other in ((NFTABLES, "masquerade", "MASQUERADE"), (CONFIG, "MASQUERADE", "masquerade")):
        restarted(lab, "-ip-masq", config=CONFIG if config is NFTABLES else NFTABLES)
        assert other in rules(lab)
        restarted(lab, "-ip-masq", config=config)
        assert mine in rules(lab)
        assert other not in rules(lab)


def test_another_network_takes_the_rules_of_the_old_one_away(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    restarted(lab, "-ip-masq")
    assert "10.244" in rules(lab)
    restarted(lab, "-ip-masq", config={**CONFIG, "Network": "10.99.0.0/16"})
    assert rules(lab) == ""
    assert "10.99.0.0/16" in lab.run("n1", ["iptables", "-t", "nat", "-S"]).stdout


def test_the_blackhole_route_stands_and_comes_back(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    node = restarted(lab, "-ip-blackhole-route")
    subnet = status_of(node)["lease"]["subnet"]
    assert f"cannot add route blackhole {subnet}: device cni0 holds that destination" in node.log.read_text()
    lab.run("n1", ["ip", "link", "del", "cni0"])
    blackholes = ["ip", "route", "show", "type", "blackhole"]
    until("it is set", lambda: subnet in lab.run("n1", blackholes).stdout)
    assert lab.run("n1", blackholes).stdout.split() == ["blackhole", subnet]
    lab.run("n1", ["ip", "route", "del", "blackhole", subnet])
    until("it is back", lambda: subnet in lab.run("n1", blackholes).stdout)


@pytest.mark.parametrize("config", [CONFIG, NFTABLES], ids=["iptables", "nftables"])
def test_defect_10_cleanup_takes_everything_away(make_lab: MakeLab, config: dict[str, object]) -> None:
    lab = make_lab(1)
    lab.run("n1", ["ip", "link", "del", "cni0"])
    node = restarted(lab, "-ip-masq", "-ip-blackhole-route", config=config)
    node.stop_daemon(signal.SIGKILL)
    assert "blackhole 10.244" in lab.run("n1", ["ip", "route"]).stdout
    assert "10.244" in rules(lab)
    lab.run("n1", [*node.daemon_argv(), "-cleanup"])
    assert rules(lab) == ""
    assert "flannel" not in lab.run("n1", ["nft", "list", "ruleset"]).stdout.lower()
    assert "10.244" not in lab.run("n1", ["ip", "route"]).stdout
    assert lab.run("n1", ["ip", "link", "show", "flannel0"], check=False).returncode != 0


def test_defect_10_nftables_need_no_iptables(make_lab: MakeLab, tmp_path: Path) -> None:
    """Upstream's clean-up of the other engine ends a start where its programs are missing: facts 14 number 10."""
    lab = make_lab(1)
    node = restarted(lab, config=NFTABLES)
    node.stop_daemon()
    (tmp_path / "nft").symlink_to("/usr/sbin/nft")
    with lab.open_process("n1", ["env", f"PATH={tmp_path}", *node.daemon_argv("-ip-masq")]) as daemon:
        until("it is ready", lambda: (node.status() or {}).get("ready"))
        assert "masquerade fully-random" in rules(lab)
        daemon.terminate()
        assert daemon.wait(30) == 0


def test_without_the_tool_masquerading_ends_the_start_and_forwarding_does_not(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    node = lab.node("n1")
    node.stop_daemon()
    hidden = ["env", "PATH=/nowhere", *node.daemon_argv("-ip-masq")]
    done = lab.run("n1", hidden, check=False, timeout=60)
    assert done.returncode == 1
    assert "there is no iptables on the PATH; install it: apt install iptables" in done.stderr
    with lab.open_process("n1", ["env", "PATH=/nowhere", *node.daemon_argv()]) as daemon:
        until("it is ready", lambda: (node.status() or {}).get("ready"))
        daemon.terminate()
        assert daemon.wait(30) == 0
