"""The generator counts what really came: against the kernel's counters, and against loss that a firewall injects."""

from __future__ import annotations

import json
import re
import socket
import struct
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
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
    source = pair[0].spawn(*LOAD, f"{kind}-source", SINK, *source_flags)
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
    fields = Path("/proc/stat").read_text().split()[1:]
    busy, stolen = _load.processor_time()
    user, nice, system, _, _, irq, softirq, steal = (int(value) / 100 for value in fields[:8])
    assert busy == pytest.approx(user + nice + system + irq + softirq, abs=2)
    assert stolen == pytest.approx(steal, abs=1)
