"""The generator counts what really came: against the kernel's counters, and against loss that a firewall injects."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from typing import Any

import pytest

from dataplane.bench import _load
from dataplane.bench.load import PORT, quantiles
from tests.namespaces import Namespace, open_namespaces

pytestmark = pytest.mark.netns

SOURCE, SINK = "198.18.7.1", "198.18.7.2"
LOAD = (sys.executable, "-P", "-m", "dataplane.bench.load")


@pytest.fixture
def pair() -> Iterator[tuple[Namespace, Namespace]]:
    with open_namespaces(2) as (source, sink):
        source.link_to(sink, "v0", "v0")
        source.command("ip", "addr", "add", f"{SOURCE}/30", "dev", "v0")
        sink.command("ip", "addr", "add", f"{SINK}/30", "dev", "v0")
        yield source, sink


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    found: dict[str, Any] = json.loads(output)
    return found


def exchange(
    pair: tuple[Namespace, Namespace], kind: str, sink_flags: list[str], source_flags: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    sink = pair[1].spawn(*LOAD, f"{kind}-sink", *sink_flags)
    assert sink.stdout is not None
    assert sink.stdout.readline() == "ready\n"
    host = f"--host={SINK}" if kind == "tcp" else SINK
    source = pair[0].spawn(*LOAD, f"{kind}-source", host, *source_flags)
    return result(sink), result(source)


def udp(pair: tuple[Namespace, Namespace], *source_flags: str) -> tuple[dict[str, Any], dict[str, Any]]:
    timing = ["--warmup=0.1", "--seconds=0.5", "--tag=77"]
    return exchange(pair, "udp", timing, [*timing, *source_flags])


def nft(namespace: Namespace, rules: str) -> None:
    chain = "add table netdev t; add chain netdev t in { type filter hook ingress device v0 priority 0; };"
    namespace.command("nft", f"{chain} {rules}")


def test_udp_without_loss_counts_every_datagram(pair: tuple[Namespace, Namespace]) -> None:
    nft(pair[1], "add rule netdev t in udp dport 5301 counter")
    seen, sent = udp(pair, "--rate=20000", "--size=64")
    counted = re.search(
        r"counter packets (\d+) bytes (\d+)", pair[1].command("nft", "list", "table", "netdev", "t").stdout
    )
    assert counted is not None
    assert seen["all_received"] == sent["sent"] == int(counted[1])
    assert int(counted[2]) == sent["sent"] * (64 + 28)
    assert seen["received"] == seen["expected"]
    assert seen["duplicated"] == seen["all_duplicated"] == seen["reordered"] == 0
    assert sent["sent"] == pytest.approx(20_000 * 0.7, rel=0.1)
    assert 0.5 <= seen["seconds"] < 0.6


@pytest.mark.parametrize(("rule", "loss"), [("numgen inc mod 100 < 1", 0.01), ("numgen inc mod 4 < 1", 0.25)])
def test_loss_is_what_was_injected(pair: tuple[Namespace, Namespace], rule: str, loss: float) -> None:
    nft(pair[1], f"add rule netdev t in udp dport 5301 {rule} drop")
    seen, sent = udp(pair, "--rate=40000")
    assert 1 - seen["received"] / seen["expected"] == pytest.approx(loss, rel=0.02)
    assert 1 - seen["all_received"] / sent["sent"] == pytest.approx(loss, rel=0.02)


NUMBERS = [0, 1, 1, 3, 2, 3, 70, 4, 4, 1 << 19, 70, 5, 3 << 20, 6, 3 << 20, (3 << 20) - 1, (3 << 20) - 1]
"""Duplicates, late ones, leaps within and beyond what the sink remembers; number 6 then comes too late to be told."""


def test_duplicates_and_late_ones_are_told_apart(pair: tuple[Namespace, Namespace]) -> None:
    sink = pair[1].spawn(*LOAD, "udp-sink", "--seconds=0.2", "--warmup=0", "--tag=9")
    assert sink.stdout is not None
    assert sink.stdout.readline() == "ready\n"

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outgoing:
            for number in [*NUMBERS, None]:
                datagram = b"short" if number is None else struct.pack("=QI", number, 9)
                outgoing.sendto(datagram, (SINK, PORT))

    pair[0].run(send)
    seen = result(sink)
    assert seen["all_received"] == len(set(NUMBERS) - {6})
    assert seen["all_duplicated"] == len(NUMBERS) - seen["all_received"]


def test_a_path_that_carries_nothing(pair: tuple[Namespace, Namespace]) -> None:
    nft(pair[1], "add rule netdev t in udp dport 5301 drop")
    seen, sent = udp(pair, "--rate=1000")
    assert sent["sent"] > 500
    assert (seen["received"], seen["expected"], seen["all_received"], seen["seconds"]) == (0, 0, 0, 0)


def test_datagrams_of_another_run_do_not_count(pair: tuple[Namespace, Namespace]) -> None:
    sink = pair[1].spawn(*LOAD, "udp-sink", "--seconds=0.2", "--warmup=0", "--tag=1")
    assert sink.stdout is not None
    assert sink.stdout.readline() == "ready\n"
    flags = ["--rate=1000", "--seconds=0.2", "--warmup=0"]
    former = result(pair[0].spawn(*LOAD, "udp-source", SINK, *flags, "--tag=2"))
    wanted = result(pair[0].spawn(*LOAD, "udp-source", SINK, *flags, "--tag=1"))
    assert former["sent"] > 0
    assert result(sink)["all_received"] == wanted["sent"]


@pytest.mark.parametrize("flows", [1, 4])
def test_tcp_counts_at_the_receiver(pair: tuple[Namespace, Namespace], flows: int) -> None:
    common = ["--warmup=0.1", "--seconds=0.4", f"--flows={flows}"]
    seen, sent = exchange(pair, "tcp", common, [*common, "--congestion=reno"])
    assert sent["congestion"] == "reno"
    assert 0.4 <= seen["seconds"] < 0.5
    assert 0 < seen["bytes"] < sent["sent"]  # the warm-up was sent as well, and is not counted
    assert 0 < seen["used"]["busy"] < 10


def test_a_rate_is_that_of_the_wire(pair: tuple[Namespace, Namespace]) -> None:
    """A token bucket of the kernel's own decides what TCP gets; the sink must find it."""
    pair[0].command(
        "tc", "qdisc", "add", "dev", "v0", "root", "tbf", "rate", "100mbit", "burst", "64kb", "latency", "20ms"
    )
    common = ["--warmup=0.5", "--seconds=1.5"]
    seen, _ = exchange(pair, "tcp", common, common)
    assert seen["bytes"] * 8 / seen["seconds"] == pytest.approx(100e6 * 1448 / 1514, rel=0.05)


def test_echo_knows_lost_answers(pair: tuple[Namespace, Namespace]) -> None:
    nft(pair[1], "add rule netdev t in icmp type echo-request numgen inc mod 5 < 1 drop")
    seen = result(pair[0].spawn(*LOAD, "echo", SINK, "--interval=0.01", "--warmup=0", "--seconds=2"))
    assert seen["received"] == seen["samples"]
    assert seen["sent"] - seen["received"] >= 1
    assert seen["sent"] / (seen["sent"] - seen["received"]) == pytest.approx(5, abs=4)


def test_echo_is_paced_and_ordered(pair: tuple[Namespace, Namespace]) -> None:
    paced = result(pair[0].spawn(*LOAD, "echo", SINK, "--interval=0.01", "--warmup=0.1", "--seconds=1"))
    assert 80 <= paced["sent"] <= 101
    assert paced["received"] == paced["sent"]
    assert 0 < paced["least"] <= paced["p50"] <= paced["p90"] <= paced["p99"] <= paced["p999"] <= paced["greatest"]


def test_quantiles_of_known_samples() -> None:
    found = quantiles(array("I", range(1000, 0, -1)))
    assert (found["least"], found["p50"], found["p90"], found["p99"], found["greatest"]) == (1, 501, 901, 991, 1000)
    assert quantiles(array("I")) == {}


def test_what_the_kernel_refuses_is_raised() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        _load.udp_flood(-1, 0, 64, 0.0, 0.1)
    with pytest.raises(OSError, match="Invalid argument"):
        _load.udp_flood(-1, 0, 11, 0.0, 0.1)
    with pytest.raises(OSError, match="Invalid argument"):
        _load.tcp_drain(array("i"), 0.0, 0.1)


def test_processor_time_is_the_machines() -> None:
    """A thread that burns half a second is in it, and it never exceeds what the processors have."""
    began, own = time.monotonic(), time.process_time()
    busy, stolen = _load.processor_time()
    while time.process_time() < own + 0.5:
        pass
    now = _load.processor_time()
    took = time.monotonic() - began
    assert 0.45 <= now[0] - busy <= took * (os.cpu_count() or 1) + 0.1
    assert 0 <= now[1] - stolen <= took * (os.cpu_count() or 1)


def test_a_watched_process_has_its_own_clock(pair: tuple[Namespace, Namespace]) -> None:
    burning = pair[1].spawn(sys.executable, "-c", "while True: pass")
    resting = pair[1].spawn("sleep", "60")
    common = ["--warmup=0.1", "--seconds=0.5", "--tag=7"]
    for watched, bounds in ((burning, (0.1, 0.8)), (resting, (0.0, 0.01))):
        sink = [*common, f"--watch={watched.pid}"]
        seen, _ = exchange(pair, "udp", sink, [*common, "--rate=1000"])
        assert bounds[0] <= seen["used"]["watched"] <= bounds[1]


def test_connections_are_counted_where_they_are_accepted(pair: tuple[Namespace, Namespace]) -> None:
    timing = ["--warmup=0.1", "--seconds=0.4"]
    seen, made = exchange(pair, "connect", timing, timing)
    assert 0.4 <= seen["seconds"] < 0.6
    assert 0 < seen["accepted"] <= made["made"]
    assert made["failed"] == 0


def test_data_can_come_towards_the_one_who_connects(pair: tuple[Namespace, Namespace]) -> None:
    common = ["--warmup=0.1", "--seconds=0.3", "--flows=2", "--congestion=reno"]
    source = pair[1].spawn(*LOAD, "tcp-source", *common)
    assert source.stdout is not None
    assert source.stdout.readline() == "ready\n"
    seen = result(pair[0].spawn(*LOAD, "tcp-sink", *common, f"--host={SINK}"))
    sent = result(source)
    assert 0 < seen["bytes"] < sent["sent"]
    assert sent["congestion"] == "reno"


def test_a_spread_reaches_every_subnet(pair: tuple[Namespace, Namespace]) -> None:
    pair[1].command("ip", "route", "add", "local", "10.192.0.0/16", "dev", "lo")
    pair[0].command("ip", "route", "add", "10.192.0.0/16", "via", SINK)
    sets = "add set netdev t seen { type ipv4_addr; flags dynamic; size 1000; };"
    nft(pair[1], f"{sets} add rule netdev t in udp dport 5301 add @seen {{ ip daddr }}")
    sink = pair[1].spawn(*LOAD, "udp-sink", "--seconds=0.3", "--warmup=0", "--tag=5")
    assert sink.stdout is not None
    assert sink.stdout.readline() == "ready\n"
    flags = ["--rate=5000", "--seconds=0.3", "--warmup=0", "--tag=5", "--spread=200"]
    sent = result(pair[0].spawn(*LOAD, "udp-source", "10.192.0.2", *flags))
    assert result(sink)["all_received"] == sent["sent"]
    listing = json.loads(pair[1].command("nft", "-j", "list", "set", "netdev", "t", "seen").stdout)
    reached = next(item["set"]["elem"] for item in listing["nftables"] if "set" in item)
    assert set(reached) == {f"10.192.{number}.2" for number in range(200)}


def test_the_timeline_has_the_gap_in_its_place(pair: tuple[Namespace, Namespace]) -> None:
    """The source is stopped for a fifth of a second: that silence is seen, once, and nowhere else."""
    sink = pair[1].spawn(*LOAD, "udp-sink", "--seconds=1.5", "--warmup=0.1", "--tag=5", "--slice=0.01")
    assert sink.stdout is not None
    assert sink.stdout.readline() == "ready\n"
    source = pair[0].spawn(*LOAD, "udp-source", SINK, "--rate=5000", "--seconds=1.5", "--warmup=0.1", "--tag=5")
    time.sleep(0.9)
    source.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    time.sleep(0.2)
    source.send_signal(signal.SIGCONT)
    seen = result(sink)
    assert seen["longest_gap"] >= 0.15
    assert sum(count for count, _ in seen["timeline"]) == seen["received"]
    longest = max(range(len(seen["timeline"])), key=lambda number: seen["timeline"][number][1])
    ended = seen["started"] + (longest + 1) * 0.01
    assert stopped + 0.15 <= ended <= stopped + 0.4
    empty = [number for number, (count, _) in enumerate(seen["timeline"]) if count == 0]
    assert len([number for number in empty if longest - 25 <= number < longest]) >= 10
