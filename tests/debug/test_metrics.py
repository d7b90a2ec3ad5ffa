"""Prometheus' page, read by Prometheus' own client, and whether the dashboard asks only for what the page has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dataplane.debug import metrics
from dataplane.health import HealthServer

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"

EARLY: dict[str, Any] = {"version": "0.1.0", "pid": 1, "ready": False, "store": "", "udp_errors": {}}
PEER = {
    "subnet": "10.244.2.0/24",
    "public_ip": "198.18.1.2",
    "tx_packets": 7,
    "tx_bytes": 588,
    "rx_packets": 2**53,
    "rx_bytes": 0,
    "idle": 1.25,
}
FULL = EARLY | {
    "ready": True,
    "store": 'etcd "x"\\\nprefix',
    "lease": {"subnet": "10.244.1.0/24", "public_ip": "198.18.1.1", "reserved": False, "fenced": False},
    "store_error": None,
    "rejected": {"10.244.9.0-24": "overlaps"},
    "ignored": {},
    "backend": "udp",
    "device": "flannel0",
    "mtu": 1472,
    "peers": [PEER, PEER | {"subnet": "10.244.3.0/24", "idle": None}],
    "drops": {"NO_ROUTE": 3, "LENGTH": 0},
    "unknown_sources": {"198.18.1.9": 12},
    "capabilities": {"udp-segment": "on", "tun-uso": "off: switched off"},
    "udp_errors": {"InCsumErrors": 5},
    "pumps": {
        direction: dict.fromkeys(("packets", "superframes", "messages", "calls", "wakeups", "wrong_checksums"), count)
        for direction, count in (("tx", 11), ("rx", 22))
    },
}


def read(document: dict[str, Any]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Samples by name and labels; the client checks the form."""
    families = list(text_string_to_metric_families(metrics.page(document)))
    assert len({family.name for family in families}) == len(families)
    assert all(family.documentation and family.type in ("counter", "gauge") for family in families)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def labels(**words: str) -> frozenset[tuple[str, str]]:
    return frozenset(words.items())


def test_a_daemon_without_a_network_says_what_there_is() -> None:
    samples = read(EARLY)
    assert samples[("loden_ready", labels())] == 0
    assert samples[("loden_lease_held", labels())] == 0
    assert ("loden_mtu_bytes", labels()) not in samples


def test_every_number_is_there_under_its_name() -> None:
    samples = read(FULL)
    peer = labels(subnet="10.244.2.0/24", public_ip="198.18.1.2")
    assert samples[("loden_info", labels(version="0.1.0", backend="udp", store='etcd "x"\\\nprefix'))] == 1
    assert samples[("loden_peer_tx_packets_total", peer)] == 7
    assert samples[("loden_peer_rx_packets_total", peer)] == 2**53
    assert samples[("loden_peer_idle_seconds", peer)] == 1.25
    assert sum(name == "loden_peer_idle_seconds" for name, _ in samples) == 1
    assert samples[("loden_peers", labels())] == 2
    assert samples[("loden_drops_total", labels(reason="NO_ROUTE"))] == 3
    assert samples[("loden_drops_total", labels(reason="LENGTH"))] == 0
    assert samples[("loden_unknown_source_datagrams_total", labels(source="198.18.1.9"))] == 12
    assert samples[("loden_udp_errors_total", labels(error="InCsumErrors"))] == 5
    assert samples[("loden_capability", labels(capability="tun-uso"))] == 0
    assert samples[("loden_store_reached", labels())] == 1
    assert samples[("loden_leases_rejected", labels())] == 1
    assert samples[("loden_mtu_bytes", labels())] == 1472
    assert samples[("loden_pump_messages_total", labels(direction="tx"))] == 11
    assert samples[("loden_pump_wrong_checksums_total", labels(direction="rx"))] == 22


def test_a_fenced_lease_is_not_held() -> None:
    fenced = FULL | {"lease": FULL["lease"] | {"fenced": True}, "store_error": "down"}
    samples = read(fenced)
    assert samples[("loden_lease_held", labels())] == 0
    assert samples[("loden_store_reached", labels())] == 0


def test_the_dashboard_asks_for_nothing_else() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    text = json.dumps([target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())])
    assert set(re.findall(r"loden_\w+", text)) <= {name for name, _ in read(FULL)}
    assert len(dashboard["panels"]) >= 6


async def fetch(port: int, target: str) -> tuple[str, str]:
    import asyncio

    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return head, body


@pytest.mark.parametrize("measured", [True, False])
async def test_the_page_is_served_where_it_is_wanted(measured: bool) -> None:
    page = metrics.page(FULL | {"store": "größe"})

    async def measure() -> str:
        return page

    health = await HealthServer.start("127.0.0.1", 0, lambda: True, measure if measured else None)
    head, body = await fetch(health.port, "/metrics")
    if measured:
        assert "200 OK" in head
        assert "version=0.0.4" in head
        assert body == page
    else:
        assert "404" in head
    assert (await fetch(health.port, "/readyz"))[1] == "flanneld is ready"
    await health.close()
