"""Owns what a capture costs the packets that it looks at: one path without a capture, with one that sees nothing, and
with one that records everything.

Free of: how a sample is taken (exchange.py). Invariant: the ways take turns below one stream of datagrams that never
stops, so that their ratios are those of neighbours and not of two starts; a rate under a capture stands beside the
share that was recorded.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
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
_TURNS = 4
_SLICE = 0.01
_SETTLES = 0.2
"""Seconds after a change that do not count."""
_CHANGE = 1.0
"""Seconds that a capture takes to begin and to end, beside the datagrams."""
_STARTS = 10.0
"""Seconds in which a capture must have begun, or ended."""
_WAYS: dict[str, tuple[str, ...]] = {"off": (), "nothing": (NOTHING,), "all": ("-s", str(SNAPLEN))}

_Window = tuple[float, float]
"""Begin and end by CLOCK_MONOTONIC."""


def capture(stand: Stand, ends: Ends, timing: Timing) -> dict[str, Any]:
    """Datagrams at saturation: before any tap was armed, then in turns with none, with a capture whose filter matches
    nothing, and with one of everything into a file."""
    if not ends.control:
        return {"skipped": "it is no daemon that captures"}
    one = timing.seconds + _SETTLES + _CHANGE
    length = replace(timing, seconds=one * (1 + _TURNS * len(_WAYS)) + _CHANGE)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(partial(exchange.udp, stand, ends, length, _SIZE, timeline=_SLICE))
        time.sleep(length.warmup + _CHANGE)
        until = time.monotonic() + length.seconds - _CHANGE
        windows, recorded = _take_turns(stand, ends.control, timing.seconds, until)
        figures = stream.result()
    kpps = {way: [_rate(figures, each) for each in windows[way]] for way in windows}
    rates = {way: statistics.mean(each) for way, each in kpps.items()}
    return {
        **{f"{way}_kpps": rate for way, rate in rates.items()},
        "loss": figures["loss"],
        "off_share": rates["off"] / rates["never"],
        **{f"{way}_share": _share(kpps[way], kpps["off"]) for way in ("nothing", "all")},
        "recorded": min(recorded),
        "stolen_s": figures["stolen_s"],
    }


def _take_turns(
    stand: Stand, socket: str, seconds: float, until: float
) -> tuple[dict[str, list[_Window]], list[float]]:
    """When each way was on, and the shares that the captures of everything recorded; turns that would not end before
    `until` are left out, for a capture that has fallen behind takes its time to end."""
    windows: dict[str, list[_Window]] = {"never": [_window(seconds)], **{way: [] for way in _WAYS}}
    recorded: list[float] = []
    with _running(stand, socket, "-c", "1", NOTHING):
        pass  # from here on a tap has been armed once
    longest = 0.0
    for turn in range(_TURNS):
        began = time.monotonic()
        if began + longest > until:
            break
        for way in list(_WAYS) if turn % 2 == 0 else list(_WAYS)[::-1]:
            if way == "off":
                windows[way].append(_window(seconds))
                continue
            with _running(stand, socket, *_WAYS[way]) as said:
                windows[way].append(_window(seconds))
            if way == "all":
                recorded.append(said.share)
        longest = max(longest, time.monotonic() - began)
    return windows, recorded


def _window(seconds: float) -> _Window:
    time.sleep(_SETTLES)
    began = time.monotonic()
    time.sleep(seconds)
    return began, time.monotonic()


def _rate(figures: dict[str, Any], window: _Window) -> float:
    """Thousand datagrams a second in the slices that lie wholly within a window. Raises LabError."""
    began, ended = ((at - figures["started"]) / _SLICE for at in window)
    counts = [count for count, _ in figures["timeline"][int(began) + 1 : int(ended)]]
    if len(counts) < int(ended) - int(began) - 1 or not sum(counts):
        raise LabError("the datagrams ended before the captures did")
    return float(statistics.mean(counts)) / _SLICE / 1e3


def _share(rates: list[float], beside: list[float]) -> float:
    """The median of what was left of the rate without a capture, in each turn."""
    return statistics.median(rate / other for rate, other in zip(rates, beside, strict=True))


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
