"""What is checked once at the start; the rest is in tests/netns/test_upkeep.py."""

from __future__ import annotations

import asyncio
import logging
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from dataplane import netconf, upkeep
from dataplane.lease.model import LeaseKey
from dataplane.options import Options
from tests.namespaces import open_namespace

CONFIG = b'{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","EnableNFTables":%s}'
KEY = LeaseKey(IPv4Network("10.5.1.0/24"), IPv6Network("fd00:5:0:1::/64"))


class NoRoutes:
    async def ensure_blackhole(self, destination: IPv4Network | IPv6Network) -> bool:
        raise AssertionError(destination)


@pytest.mark.netns
@pytest.mark.parametrize(
    ("nftables", "there", "missing"),
    [
        (b"false", (), ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables")),
        (b"false", ("bridge-nf-call-iptables",), ("bridge-nf-call-ip6tables",)),
        (b"true", (), ()),
    ],
)
def test_a_missing_br_netfilter_is_a_warning_and_no_end(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    nftables: bytes,
    there: tuple[str, ...],
    missing: tuple[str, ...],
) -> None:
    """Upstream ends here, for every backend (facts 1.4, step 7)."""
    for name in there:
        (tmp_path / name).touch()
    monkeypatch.setattr(upkeep, "BRIDGE_SETTINGS", tmp_path)
    config = netconf.parse(CONFIG % nftables, origin="test")
    kept = upkeep.Upkeep(Options(), config, KEY, (), NoRoutes())

    async def start() -> None:
        await kept.start()

    with open_namespace() as node, caplog.at_level(logging.WARNING):
        node.run(asyncio.run, start())
    warned = [r.getMessage() for r in caplog.records if "Failed to check br_netfilter" in r.getMessage()]
    assert len(warned) == len(missing)
    assert all(any(f"{tmp_path}/{name} does not exist" in text for text in warned) for name in missing)
