"""Many nodes that want a lease in the same moment, on a real etcd: all get one, all know all.

Here they are keepers in one process, which meet in the store more closely than daemons do; whole daemons race in
tests/netns/test_together.py. LODEN_RACE_ROUNDS repeats each race that often; the long form (`make races`) is 200.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from random import Random

import pytest

from dataplane import netconf
from dataplane.lease.model import LeaseKey
from tests.etcd_server import EtcdServer
from tests.lease.real_keepers import LiveKeeper, all_known, attrs_of, living, until

pytestmark = [pytest.mark.etcd, pytest.mark.timeout(3600)]

ROUNDS = int(os.environ.get("LODEN_RACE_ROUNDS", "0"))
WIDE = netconf.parse(b'{"Network":"10.5.0.0/16"}', origin="this test")
JUST_64 = netconf.parse(b'{"Network":"10.5.0.0/16","SubnetMax":"10.5.64.0"}', origin="this test")

_prefixes = (f"/race/{number}" for number in itertools.count())


def nodes_of(server: EtcdServer, count: int, config: netconf.NetworkConfig, seed: int) -> list[LiveKeeper]:
    prefix = next(_prefixes)
    return [LiveKeeper(server.url, prefix, config, attrs_of(number), seed + number) for number in range(1, count + 1)]


async def test_64_acquirers_of_64_subnets_end_with_one_each(server: EtcdServer) -> None:
    for turn in range(max(1, ROUNDS // 10)):
        nodes = nodes_of(server, 64, JUST_64, 1000 * turn)
        acquired = await asyncio.gather(*(node.keeper.acquire() for node in nodes))
        for one, two in itertools.combinations(acquired, 2):
            assert not one.key.overlaps(two.key)
        snapshot = await nodes[0].store.snapshot()
        assert {LeaseKey.parse(entry.key) for entry in snapshot.entries} == {lease.key for lease in acquired}
        assert sum(node.keeper.counters.lost_races for node in nodes) > 0, "there was no race"
        await asyncio.gather(*(node.store.close() for node in nodes))


@pytest.mark.parametrize(("count", "rounds"), [(2, 20), (20, 5)])
async def test_nodes_that_start_within_ten_milliseconds_all_know_each_other(
    server: EtcdServer, count: int, rounds: int
) -> None:
    """flannel v0.20 lost a peer in 4 of 32 such starts."""
    rng = Random(count)
    for turn in range(ROUNDS or rounds):
        nodes = nodes_of(server, count, WIDE, 1000 * turn)
        async with living(*nodes, within=0.01, rng=rng):
            await until(f"all know all, in round {turn}", lambda nodes=nodes: all_known(nodes))  # type: ignore[misc]  # bound at once
            assert all(node.keeper.counters.resyncs == 1 for node in nodes), "nobody had to look twice"
