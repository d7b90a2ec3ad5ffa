"""Leases that change hands thousands of times a second, under a daemon that carries packets to them.

No packet may go to a node whose replacement the daemon knows for more than 50 ms. When the daemon came to know is not
seen from outside, so the time counts from a moment that is earlier: when etcd had confirmed the write to its writer.
What is asserted is a bound that no load of the machine reaches; the figures are printed (`pytest -s`). The short form
runs in CI; LODEN_SCALE_LEASES, LODEN_SCALE_SECONDS and LODEN_SCALE_RATE make it long.
"""

from __future__ import annotations

import json
import os
import sys
from bisect import bisect_right
from collections import defaultdict

import pytest

from tests.netns.conftest import MakeLab
from tests.netns.observing import python_in, status_of, until

pytestmark = [pytest.mark.netns, pytest.mark.etcd, pytest.mark.timeout(1200)]

LEASES = int(os.environ.get("LODEN_SCALE_LEASES", "500"))
SECONDS = float(os.environ.get("LODEN_SCALE_SECONDS", "3"))
RATE = int(os.environ.get("LODEN_SCALE_RATE", "500"))
OWNERS = [f"198.18.250.{number}" for number in (1, 2, 3, 4)]
WATCHED = 40
"""So many of the subnets get packets. They begin at 10.65.0.0/24; the node's own is among the first of 10.64.0.0/10."""
PROMISE, BOUND = 0.05, 10.0

WRITER = """
import asyncio, json, sys, time
from dataplane.lease import etcd_wire as wire
from dataplane.lease.etcd import EtcdStore
url, leases, seconds, rate, watched, *owners = sys.argv[1:]
leases, seconds, rate, watched = int(leases), float(seconds), int(rate), int(watched)
turns, log = {}, []

async def put(store, numbers):
    ops, puts = [], []
    for n in numbers:
        turns[n] = turns.get(n, n) + 1
        owner = owners[turns[n] % len(owners)]
        key = f"/coreos.com/network/subnets/10.{65 + (n >> 8)}.{n & 255}.0-24".encode()
        value = ('{"PublicIP":"%s","PublicIPv6":null}' % owner).encode()
        ops.append(wire.put_op(wire.put_request(key, value)))
        puts.append((n, owner))
    began = time.monotonic()
    await store._txn(wire.txn_request([], success=ops))
    ended = time.monotonic()
    log.extend((n, owner, began, ended) for n, owner in puts if n < watched)

async def main():
    store = EtcdStore([url], "/coreos.com/network")
    for first in range(0, leases, 100):
        await put(store, range(first, min(leases, first + 100)))
    print("ready", flush=True)
    sys.stdin.readline()
    began, done, running = time.monotonic(), 0, set()
    busy = set()
    while (passed := time.monotonic() - began) < seconds:
        while done < passed * rate:
            numbers = [(done + i) % leases for i in range(5)]
            done += 5
            if busy.isdisjoint(numbers):
                busy.update(numbers)
                task = asyncio.create_task(put(store, numbers))
                task.add_done_callback(lambda _, numbers=numbers: busy.difference_update(numbers))
                running.add(task)
                task.add_done_callback(running.discard)
        await asyncio.sleep(0.002)
    await asyncio.gather(*running)
    print(json.dumps({"changes": done, "seconds": time.monotonic() - began, "log": log}), flush=True)

asyncio.run(main())
"""

SENDER = """
import select, socket, sys, time
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
print("ready", flush=True)
number, began = 0, time.monotonic()
while not select.select([sys.stdin], [], [], 0)[0]:
    while number < (time.monotonic() - began) * 2000:
        out.sendto(b"x" * 32, (f"10.65.{number % int(sys.argv[1])}.1", 9))
        number += 1
    time.sleep(0.001)
"""

SNIFFER = """
import json, select, socket, struct, sys, time
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
raw.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
raw.setsockopt(socket.SOL_SOCKET, 35, 1)  # SO_TIMESTAMPNS: realtime; turned to monotonic below
raw.bind(("eth0", 0))
raw.setblocking(False)
shift = time.monotonic() - time.time()
print("ready", flush=True)
seen = []
while True:
    readable, _, _ = select.select([raw, sys.stdin], [], [], 1)
    if sys.stdin in readable:
        break
    for _ in range(200):
        try:
            frame, extra, _, address = raw.recvmsg(65536, 64)
        except BlockingIOError:
            break
        if address[2] != 4 or frame[23] != 17 or frame[36:38] != b"\\x20\\x5d":  # outgoing, UDP, to 8285
            continue
        seconds, nanoseconds = struct.unpack("qq", extra[0][2][:16])
        at, owner, inner = seconds + nanoseconds / 1e9 + shift, socket.inet_ntoa(frame[30:34]), frame[42:]
        # a run of segments counts as often as it has packets
        size = struct.unpack("!H", inner[2:4])[0] if len(inner) >= 4 else 0
        while size and len(inner) >= 20:
            if inner[16] == 10 and inner[17] == 65:
                seen.append((at, inner[18], owner))
            inner = inner[size:]
            size = struct.unpack("!H", inner[2:4])[0] if len(inner) >= 4 else 0
print(json.dumps(seen), flush=True)
"""


def outdated(seen: list[tuple[float, int, str]], log: list[tuple[int, str, float, float]]) -> list[float]:
    """For each packet that went to another owner than the last confirmed one, since when that was confirmed."""
    writes = defaultdict(list)
    for number, owner, began, ended in log:
        writes[number].append((ended, began, owner))
    for entries in writes.values():
        entries.sort()
    late = []
    for at, number, owner in seen:
        entries = writes[number]
        confirmed = bisect_right(entries, (at, float("inf"), ""))
        # what is being written at that moment may be known already; what was replaced was replaced by the next write
        newer = [entry for entry in entries[confirmed:] if entry[1] <= at and entry[2] == owner]
        if newer or confirmed == 0 or entries[confirmed - 1][2] == owner:
            continue
        index = max((i for i in range(confirmed) if entries[i][2] == owner), default=-1)
        late.append(at - entries[index + 1][0])
    return late


def test_no_packet_goes_to_an_owner_that_was_replaced(make_lab: MakeLab) -> None:
    lab = make_lab(1, store="etcd", network="10.64.0.0/10")
    node = lab.node("n1")
    for number, owner in enumerate(OWNERS):
        mac = f"02:00:00:00:00:0{number}"
        lab.run("n1", ["ip", "neigh", "add", owner, "lladdr", mac, "nud", "permanent", "dev", "eth0"])
    url = "http://198.18.0.1:2379"
    writing = (url, str(LEASES), str(SECONDS), str(RATE), str(WATCHED), *OWNERS)
    with python_in(lab, "switch", WRITER, *writing) as writer:
        until("the daemon knows every lease", lambda: len(status_of(node)["peers"]) == LEASES, 60)
        with python_in(lab, "n1", SNIFFER) as sniffer, python_in(lab, "n1-p1", SENDER, str(WATCHED)) as sender:
            assert writer.stdin is not None
            writer.stdin.write("\n")
            writer.stdin.flush()
            assert writer.stdout is not None
            wrote = json.loads(writer.stdout.readline())
            sender.communicate("\n", timeout=60)
            seen = json.loads(sniffer.communicate("\n", timeout=60)[0])
    log = [tuple(entry) for entry in wrote["log"]]
    late = outdated([tuple(entry) for entry in seen], log)
    broken = [seconds for seconds in late if seconds > PROMISE]
    figures = {
        "changes": wrote["changes"], "seconds": round(wrote["seconds"], 1), "packets": len(seen),
        "to a replaced owner": len(late), "after more than 50 ms": len(broken),
        "latest": round(max(late, default=0.0), 4),
    }  # fmt: skip
    sys.stdout.write(f"{figures}\n")
    assert len(seen) > SECONDS * 500
    assert len({owner for _, _, owner in seen}) == len(OWNERS)
    assert max(late, default=0.0) < BOUND
    assert status_of(node)["ready"]
