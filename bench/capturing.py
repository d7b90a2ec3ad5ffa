"""Owns what a capture costs the packets that it looks at: one path without a capture, with one that sees nothing, and
with one that records everything.

Free of: how a sample is taken (exchange.py). Invariant: the four ways take turns within one life of one daemon, so that
their ratios are not those of two starts; a rate under a capture stands beside the share that was recorded.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dataplane.bench import exchange
from dataplane.bench.ends import Ends, Timing
from dataplane.bench.stand import Stand
from dataplane.debug import control
from dataplane.lab import LabError

SNAPLEN = 128
NOTHING = "host 192.0.2.1"
"""No packet of a stand (RFC 5737)."""

_SIZE = 64
_TURNS = 2
_STARTS = 10.0
"""Seconds in which a capture begins, or ends."""
_WAYS: dict[str, tuple[str, ...]] = {"off": (), "nothing": (NOTHING,), "all": ("-s", str(SNAPLEN))}


def capture(stand: Stand, ends: Ends, timing: Timing) -> dict[str, Any]:
    """Datagrams at saturation: before any tap was armed, then in turns with none, with a capture whose filter matches
    nothing, and with one of everything into a file."""
    if not ends.control:
        return {"skipped": "it is no daemon that captures"}
    never = exchange.udp(stand, ends, timing, _SIZE)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in _WAYS}
    recorded: list[float] = []
    with _running(stand, ends.control, "-c", "1", NOTHING):
        pass  # from here on a tap has been armed once
    for turn in range(_TURNS):
        ways = list(_WAYS) if turn % 2 == 0 else list(_WAYS)[::-1]
        for way in ways:
            if way == "off":
                found[way].append(exchange.udp(stand, ends, timing, _SIZE))
                continue
            with _running(stand, ends.control, *_WAYS[way]) as said:
                found[way].append(exchange.udp(stand, ends, timing, _SIZE))
            if way == "all":
                recorded.append(said.share)
    rates = {way: statistics.mean(one["kpps"] for one in samples) for way, samples in found.items()}
    return {
        "never_kpps": never["kpps"],
        "never_loss": never["loss"],
        **{f"{way}_kpps": rate for way, rate in rates.items()},
        **{f"{way}_loss": statistics.mean(one["loss"] for one in samples) for way, samples in found.items()},
        "off_share": rates["off"] / never["kpps"],
        "nothing_share": rates["nothing"] / rates["off"],
        "all_share": rates["all"] / rates["off"],
        "recorded": min(recorded),
        "stolen_s": sum(one["stolen_s"] for samples in found.values() for one in samples),
    }


class _Said:
    """What a capture said before its end: `share` of what its filter let through that found room in its rings."""

    share = 0.0


@contextmanager
def _running(stand: Stand, socket: str, *words: str) -> Iterator[_Said]:
    """`loden capture` on the first node, for the length of the block. Raises LabError."""
    path, said = stand.directory / "bench.pcapng", _Said()
    command = [sys.executable, "-P", "-m", "dataplane.cli", "capture", f"--control-socket={socket}", "-q"]
    with stand.open_process("n1", [*command, "-w", str(path), *words]) as process:
        try:
            _until_it_runs(process, socket)
            yield said
            running = control.request(socket, "status")["captures"]
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=_STARTS)
        except subprocess.TimeoutExpired:
            raise LabError(f"`loden capture` on n1 does not end within {_STARTS:.0f} s") from None
        finally:
            process.kill()
            Path(path).unlink(missing_ok=True)
    if len(running) != 1:
        raise LabError("`loden capture` on n1 has ended before it was to")
    matched, missing = running[0]["matched"], running[0]["missing"]
    said.share = 1 - missing / matched if matched else 0.0


def _until_it_runs(process: subprocess.Popen[str], socket: str) -> None:
    deadline = time.monotonic() + _STARTS
    while not control.request(socket, "status")["captures"]:
        if process.poll() is not None or time.monotonic() > deadline:
            raise LabError(f"`loden capture` on n1 does not begin within {_STARTS:.0f} s")
        time.sleep(0.05)
