"""What a daemon answers with very many peers. Keeper and tunnel are stand-ins; what counts is a real path with a route
to each, which needs no node of its own."""

from __future__ import annotations

import asyncio
import os
import re
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dataplane.backend.base import BackendStatus, Queues
from dataplane.backend.userspace import tunnels_status
from dataplane.debug.answers import Answers
from dataplane.lease.model import Lease, LeaseAttrs, LeaseKey
from dataplane.path.datapath import Datapath
from dataplane.path.facts import Outer, SourceCheck

PEERS = 10_000
DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


class ManyPeers:
    """A backend with a route to each of them."""

    def __init__(self, device: int) -> None:
        path = Datapath(device, Outer(-1, 8285), mtu=1472, source_check=SourceCheck.NODE, on_event=lambda _event: None)
        for number in range(PEERS):
            path.set_route(IPv4Network((0x0A000000 + (number << 8), 24)), IPv4Address(0xC6120000 + number))
        path.publish()
        self._tunnel: Any = SimpleNamespace(
            statistics=path.statistics,
            device="flannel0",
            unknown_sources={},
            ignored={},
            state_of=lambda _capability: "on",
            repairs=0,
            queues=Queues(1, 1),
        )

    def status(self) -> BackendStatus:
        return tunnels_status("udp", 1472, [self._tunnel])


async def test_the_loop_goes_on_while_ten_thousand_peers_are_written_down() -> None:
    device = os.memfd_create("device")
    stand_in: Any = SimpleNamespace(own=None, fenced=False, store_error="", rejected={})
    backend: Any = ManyPeers(device)
    answers, turns = Answers(lambda: True), 0
    answers.know(stand_in, backend, lambda: stand_in, stand_in)

    async def go_on() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    going_on = asyncio.create_task(go_on())
    document = await answers.status()
    assert turns > 10
    assert len(document["peers"]) == PEERS
    assert document["peers"][-1]["subnet"] == "10.39.15.0/24"
    before, page = turns, await answers.metrics()
    assert turns > before + 10
    assert 'loden_peer_tx_packets_total{subnet="10.39.15.0/24",public_ip="198.18.39.15"} 0' in page
    going_on.cancel()
    os.close(device)


async def test_the_docs_list_every_member_of_the_status_document() -> None:
    device = os.memfd_create("device")
    own = Lease(LeaseKey(IPv4Network("10.39.255.0/24")), LeaseAttrs(IPv4Address("198.18.0.1")), 1, 1)
    stand_in: Any = SimpleNamespace(own=own, fenced=False, store_error="", rejected={})
    backend: Any = ManyPeers(device)
    answers = Answers(lambda: True)
    answers.know(stand_in, backend, lambda: stand_in, stand_in)
    document = await answers.status()
    os.close(device)

    section = DOCS.read_text().partition("\n## The status document\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", section, re.MULTILINE)
    listed = {name: set(re.findall(r"`(\w+)`", text)) for names, text in rows for name in re.findall(r"`(\w+)`", names)}
    assert listed.keys() == document.keys()
    inner = {name: document[name] for name in ("lease", "queues", "udp_errors")} | {"peers": document["peers"][0]}
    for name, members in (inner | {"pumps": document["pumps"]["tx"]}).items():
        assert members.keys() <= listed[name], name
