"""The connection to etcd is cut between a watch's creation and its catch-up, below daemons that carry traffic.

A relay stands before the real server. Once the daemon has asked for its watch, it lets a few more bytes of the answer
through and ends the connection: before the watch is confirmed, in the middle of that, after it, in the first events.
Every such place without traffic: tests/lease/test_etcd_failures.py.
"""

from __future__ import annotations

import json

import pytest

from dataplane.lab import plan
from tests.netns.conftest import MakeLab
from tests.netns.observing import put_lease, python_in, status_of, until
from tests.netns.test_store_failures import HAND_MADE, calm, follows, lease_text, unharmed

pytestmark = [pytest.mark.netns, pytest.mark.etcd, pytest.mark.timeout(300)]

PORT = 2390
BYTES = (0, 20, 40, 60, 90, 130)

RELAY = """
import asyncio, sys
host, port, wanted, *limits = sys.argv[1:]
wanted, limits, cuts = wanted.encode(), [int(limit) for limit in limits], 0

async def pump(source, sink, said):
    try:
        while data := await source.read(4096):
            await said(data)
            await sink.drain()
    except (OSError, ConnectionError):
        pass

async def serve(reader, writer):
    there, back = await asyncio.open_connection(host, 2379)
    asked, left = asyncio.Event(), limits.pop(0) if limits else None

    async def client_says(data):
        if wanted in data:
            asked.set()
        back.write(data)

    async def server_says(data):
        nonlocal left
        if left is None or not asked.is_set():
            writer.write(data)
            return
        writer.write(data[:left])
        left -= len(data)
        if left <= 0:
            global cuts
            cuts += 1
            print("cut", cuts, flush=True)
            await writer.drain()
            raise OSError

    up = asyncio.create_task(pump(reader, back, client_says))
    await pump(there, writer, server_says)
    up.cancel()
    for end in (back, writer):
        end.transport.abort()

async def main():
    server = await asyncio.start_server(serve, host, int(port))
    print("ready", flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


def test_the_connection_is_cut_between_the_watchs_creation_and_its_catch_up(make_lab: MakeLab) -> None:
    lab = make_lab(2, store="etcd")
    node, host = lab.node("n1"), str(plan.SWITCH_ADDRESS.ip)
    put_lease(lab, HAND_MADE, lease_text("198.18.7.200"))
    arguments = (host, str(PORT), "etcdserverpb.Watch/Watch", *map(str, BYTES))
    with python_in(lab, "switch", RELAY, *arguments) as relay:
        node.stop_daemon()
        node.start_daemon(f"-etcd-endpoints=http://{host}:{PORT}")
        assert relay.stdout is not None
        with_peers = until("the daemon runs, cut off or not", lambda: (node.status() or {}).get("peers"))
        assert with_peers
        lab.settle()
        with unharmed(lab):
            for number in range(2, len(BYTES) + 1):
                # while the node is cut off, so that there is something to catch up with
                put_lease(lab, HAND_MADE, lease_text(f"198.18.7.{number}"))
                put_lease(lab, f"10.244.{210 + number}.0-24", lease_text(f"198.18.7.{100 + number}"))
            said = [relay.stdout.readline() for _ in BYTES]
            assert said[-1] == f"cut {len(BYTES)}\n"
            put_lease(lab, HAND_MADE, lease_text("198.18.7.99"))
            until("both nodes follow", lambda: follows(lab, "198.18.7.99"), 40)
            until("the daemons are calm", lambda: calm(lab))
    found = {peer["subnet"]: peer["public_ip"] for peer in status_of(node)["peers"]}
    wanted = {f"10.244.{210 + number}.0/24": f"198.18.7.{100 + number}" for number in range(2, len(BYTES) + 1)}
    assert wanted.items() <= found.items(), json.dumps(found)
