"""Ten thousand leases in a real etcd: a cold start, then thousands of changes a second, followed by one keeper.

What is asserted is that nothing is missing; times and memory are printed (`pytest -s`), for docs/operations.md. The
short form runs in CI. LODEN_SCALE_LEASES, LODEN_SCALE_SECONDS and LODEN_SCALE_RATE make it long.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from dataplane.lease import etcd_wire as wire
from dataplane.lease.etcd import EtcdStore
from tests.etcd_server import EtcdServer

pytestmark = [pytest.mark.etcd, pytest.mark.timeout(1200)]

LEASES = int(os.environ.get("LODEN_SCALE_LEASES", "2000"))
SECONDS = float(os.environ.get("LODEN_SCALE_SECONDS", "2"))
RATE = int(os.environ.get("LODEN_SCALE_RATE", "1000"))
PREFIX = "/scale"
PER_TRANSACTION = 5

# The keeper has a process of its own, as in a daemon: it is alone with its memory and its event loop.
FOLLOWER = """
import asyncio, json, re, sys, time
from ipaddress import IPv4Address
from random import Random
import uvloop
from dataplane import netconf
from dataplane.lease.etcd import EtcdStore
from dataplane.lease.keeper import LeaseKeeper
from dataplane.lease.model import LeaseAttrs

def rss():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

async def main(url, wanted):
    config = netconf.parse(b'{"Network":"10.0.0.0/8","SubnetLen":24,"SubnetMin":"10.255.0.0"}', origin="test")
    delays, complete = [], asyncio.Event()
    async def on_events(events):
        now = time.monotonic()
        for event in events:
            data = event.lease.attrs.backend_data
            if event.kind.value == "changed":
                delays.append(now - json.loads(data)["at"])
        if len(keeper.peers) >= wanted:
            complete.set()
    store = EtcdStore([url], "/scale")
    await store.read_config()
    before, began = rss(), time.monotonic()
    keeper = LeaseKeeper(store, config, LeaseAttrs(IPv4Address("198.18.0.1")), renew_margin=3600.0,
                         on_events=on_events, on_own=lambda *_: None, rng=Random(1))
    await keeper.acquire()
    run = asyncio.create_task(keeper.run())
    await complete.wait()
    start = {"seconds": time.monotonic() - began, "growth_mib": rss() - before}
    print(json.dumps(start), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    target = json.loads(input_line) if (input_line := sys.stdin.readline()) else 0
    while keeper.revision < target:
        await asyncio.sleep(0.01)
    cpu = time.process_time()
    delays.sort()
    at = lambda share: delays[min(len(delays) - 1, int(share * len(delays)))] if delays else None
    peers = {text: json.loads(lease.attrs.backend_data)["at"] for text, lease in keeper.peers.items()}
    print(json.dumps({"events": len(delays), "p50": at(0.5), "p99": at(0.99), "max": at(1), "cpu": cpu,
                      "growth_mib": rss() - before, "resyncs": keeper.counters.resyncs, "peers": peers}), flush=True)
    run.cancel()
    await asyncio.wait([run])
    await store.close()

uvloop.run(main(sys.argv[1], int(sys.argv[2])))
"""


@pytest.fixture
def server() -> Iterator[EtcdServer]:
    with EtcdServer() as running:
        yield running


def key_of(number: int) -> str:
    return f"10.{number >> 8}.{number & 255}.0-24"


def value_of(number: int) -> bytes:
    ip = f"198.19.{number >> 8 & 255}.{number & 255}"
    data = b'{"VNI":1,"VtepMAC":"02:00:00:00:00:01","at":%r}' % time.monotonic()
    return b'{"PublicIP":"%s","PublicIPv6":null,"BackendType":"vxlan","BackendData":%s}' % (ip.encode(), data)


async def put_many(store: EtcdStore, numbers: list[int]) -> dict[str, float]:
    """Several leases as one change of the store; the `at` of each."""
    values = {number: value_of(number) for number in numbers}
    puts = [wire.put_op(wire.put_request(store._full(key_of(n)), values[n])) for n in numbers]
    anything = wire.txn_request([], success=puts)
    assert (await store._txn(anything)).succeeded
    return {key_of(n): json.loads(value)["BackendData"]["at"] for n, value in values.items()}


async def change_for(store: EtcdStore, seconds: float, rate: int) -> dict[str, float]:
    """Change leases in turn at that rate; what was written last under each key. One call of each lease at a time."""
    last: dict[str, float] = {}
    running: set[asyncio.Task[dict[str, float]]] = set()
    began, done = time.monotonic(), 0
    while (passed := time.monotonic() - began) < seconds:
        while done < passed * rate:
            numbers = [(done + i) % LEASES for i in range(PER_TRANSACTION)]
            running.add(asyncio.create_task(put_many(store, numbers)))
            done += PER_TRANSACTION
        finished, running = await asyncio.wait(running, timeout=0.002) if running else (set(), running)
        for task in finished:
            last |= task.result()
    for task in running:
        last |= await task
    print(f"{done} changes in {time.monotonic() - began:.1f} s")  # noqa: T201 - the figures are the result
    return last


async def test_ten_thousand_leases_are_learnt_and_followed(server: EtcdServer) -> None:
    store = EtcdStore([server.url], PREFIX)
    written: dict[str, float] = {}
    numbers = iter(range(LEASES))
    while chunk := list(islice(numbers, 100)):
        written |= await put_many(store, chunk)
    with subprocess.Popen(  # noqa: ASYNC220 - it takes milliseconds, and nothing else runs yet
        [sys.executable, "-c", FOLLOWER, server.url, str(LEASES)], text=True, cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as follower:  # fmt: skip
        try:
            assert follower.stdin is not None
            assert follower.stdout is not None
            start = json.loads(await asyncio.to_thread(follower.stdout.readline))
            print("cold start:", start)  # noqa: T201
            written |= await change_for(store, SECONDS, RATE)
            revision = (await store.snapshot()).revision
            follower.stdin.write(f"\n{revision}\n")
            follower.stdin.flush()
            end = json.loads(await asyncio.to_thread(follower.stdout.readline))
        finally:
            follower.kill()
    await store.close()
    peers = end.pop("peers")
    print("changes:", end)  # noqa: T201
    assert peers == pytest.approx(written)
    assert end["resyncs"] == 1, "the watch kept up"
    assert end["events"] >= SECONDS * RATE * 0.5
