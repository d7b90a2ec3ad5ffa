"""What a daemon answers with very many peers. Keeper and tunnel are stand-ins; what counts is a real path with a route
to each, which needs no node of its own."""

from __future__ import annotations

import asyncio
import os
from ipaddress import IPv4Address, IPv4Network
from types import SimpleNamespace
from typing import Any

from dataplane.backend.base import BackendStatus, Queues
from dataplane.backend.userspace import tunnels_status
from dataplane.debug.answers import Answers
from dataplane.path.datapath import Datapath
from dataplane.path.facts import Outer, SourceCheck

PEERS = 10_000


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
