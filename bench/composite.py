"""Owns the workloads that are several samples: a sweep over offered loads, many peers, a change of all leases, a new
table, a held GIL.

Free of: how a sample is taken (exchange.py). Invariant: what a candidate has no means for is said as skipped with the
reason, never as a figure; a disturbance is compared with an undisturbed sample of the same length beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from dataplane.bench import exchange, far
from dataplane.bench.ends import MOST_FAR, Ends, FarLease, Timing, far_leases
from dataplane.bench.stand import Stand
from dataplane.lab import LabError

T = TypeVar("T")

LOST = 0.001
"""Of the offered datagrams: the bound of a sweep."""
_STEPS = 7
_SLICE = 0.01
_SIZE = 64
_SETTLED = 30.0
"""Seconds in which a candidate must have taken all far leases."""
_SHARE = 0.5
"""Of its saturation: the load during a change, so that what is lost is the change's and not the load's."""
HELD = 1.0
_NO_DAEMON = "it is no daemon in Python that this harness has started"


def sweep(stand: Stand, ends: Ends, timing: Timing, size: int) -> dict[str, Any]:
    """The highest offered rate of which less than LOST is lost, by halving the interval in which it lies."""
    short = replace(timing, seconds=max(0.3, timing.seconds / 2))
    first = exchange.udp(stand, ends, short, size)
    points = [_point(first)]
    low, high, best = 0.0, first["offered_kpps"], first if first["loss"] < LOST else None
    rate = first["kpps"]
    while best is not first and len(points) < _STEPS and rate > 0.1:
        found = exchange.udp(stand, ends, short, size, rate=rate * 1e3)
        points.append(_point(found))
        if found["loss"] < LOST:
            low = rate
            best = found if best is None or found["kpps"] > best["kpps"] else best
        else:
            high = rate
        rate = (low + high) / 2
    points.sort(key=lambda point: point["offered_kpps"])
    chosen = best if best is not None else {"kpps": 0.0, "loss": points[0]["loss"], "offered_kpps": 0.0}
    return {**{name: chosen[name] for name in ("kpps", "loss", "offered_kpps")}, "payload": size, "points": points}


def _point(figures: dict[str, Any]) -> dict[str, float]:
    return {name: figures[name] for name in ("offered_kpps", "kpps", "loss")}


def peers(stand: Stand, ends: Ends, timing: Timing, count: int) -> dict[str, Any]:
    """With `count` leases in the table: datagrams at saturation to one node, and to all of them in turn."""
    if ends.leases is None:
        return {"skipped": ends.why_no_leases}
    leases = far_leases(count)
    with far.roads(stand):
        try:
            ends.leases.put(leases)
            took = settle(stand, ends, leases)
            one = exchange.udp(stand, ends, timing, _SIZE)
            all_of_them = exchange.udp(stand, _to(ends, leases), timing, _SIZE, spread=count)
        finally:
            ends.leases.clear()
    names = ("kpps", "loss", "cpu_s_per_mpkt")
    return {
        **{f"{name}_one": one[name] for name in names},
        **{f"{name}_all": all_of_them[name] for name in names},
        "settled_s": took,
        "stolen_s": one["stolen_s"] + all_of_them["stolen_s"],
    }


def _to(ends: Ends, leases: list[FarLease]) -> Ends:
    """The same path with the first far pod for its address."""
    return replace(ends, address=str(leases[0].subnet.network_address + 2))


def settle(stand: Stand, ends: Ends, leases: list[FarLease]) -> float:
    """Until a slow round over all leases arrives whole: the seconds that it took. Raises LabError."""
    began = time.monotonic()
    while True:
        rate = 20_000
        found = exchange.udp(
            stand, _to(ends, leases), Timing(0, max(0.1, len(leases) / rate)), _SIZE, rate, len(leases)
        )
        took = time.monotonic() - began
        if found["whole_run_loss"] < 0.01:
            return took
        if took > _SETTLED:
            lost = f"{found['whole_run_loss']:.1%} of what is sent to {len(leases)} leases does not arrive"
            raise LabError(f"{lost} {_SETTLED:.0f} s after they were put")


def publish(stand: Stand, ends: Ends, timing: Timing, count: int = MOST_FAR, least: float = 8.0) -> dict[str, Any]:
    """Under load to all of `count` leases, each of these moves to another node at once. Beside it the same with a store
    that is written as much where no daemon looks, so that what is seen is the daemon's part. Both samples take `least`
    seconds at least: so long a change may take."""
    if ends.leases is None:
        return {"skipped": ends.why_no_leases}
    leases, moved = far_leases(count), far_leases(count, generation=1)
    to, length = _to(ends, leases), replace(timing, seconds=max(timing.seconds, least))
    with far.roads(stand):
        try:
            ends.leases.put(leases)
            settle(stand, ends, leases)
            most = exchange.udp(stand, to, timing, _SIZE, spread=count)["kpps"]
            rate = _SHARE * most * 1e3
            sample = partial(exchange.udp, stand, to, length, _SIZE, rate, count)
            quiet, _ = _during(partial(ends.leases.rehearse, moved), length.warmup + 0.5, sample)
            disturbed, took = _during(
                partial(_seconds, partial(ends.leases.put, moved)), length.warmup + 0.5, sample
            )
            _taken(stand, ends, leases, length)
        finally:
            ends.leases.clear()
    return {**_beside(disturbed, quiet), "changed_s": took}


def _taken(stand: Stand, ends: Ends, leases: list[FarLease], length: Timing) -> None:
    """Raises LabError unless the change was over by the end of the sample: nothing goes to the old addresses since."""
    before, moved = far.arrived(stand)
    settle(stand, ends, leases)
    after, _ = far.arrived(stand)
    if not moved or after > before:
        raise LabError(f"{len(leases)} leases are not changed in the {length.seconds:.0f} s of a sample")


def _during(work: Callable[[], T], delay: float, sample: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], T]:
    """What `sample` finds with `work` done `delay` seconds after its begin, and what that gave. Raises what they do."""
    with ThreadPoolExecutor(1, thread_name_prefix="disturbance") as pool:
        done = pool.submit(_after, delay, work)
        return sample(), done.result()


def _after(delay: float, work: Callable[[], T]) -> T:
    time.sleep(delay)
    return work()


def _seconds(work: Callable[[], None]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _beside(disturbed: dict[str, Any], quiet: dict[str, Any]) -> dict[str, Any]:
    return {
        "gap_ms": disturbed["longest_gap_ms"],
        "quiet_gap_ms": quiet["longest_gap_ms"],
        "loss": disturbed["loss"],
        "quiet_loss": quiet["loss"],
        "kpps": disturbed["kpps"],
        "stolen_s": quiet["stolen_s"] + disturbed["stolen_s"],
    }


def table(stand: Stand, ends: Ends, timing: Timing, count: int = MOST_FAR) -> dict[str, Any]:
    """Datagrams at saturation to the other node while the sending daemon publishes that `count` other routes lead to
    another peer each: what a new table costs, beside all that it takes to learn of the leases in it."""
    if ends.disturbed is None:
        return {"skipped": _NO_DAEMON}
    move = ends.disturbed.move
    if move(count) is None:
        return {"skipped": "the kernel carries its packets"}
    length = replace(timing, seconds=max(timing.seconds, 2.0))
    sample = partial(exchange.udp, stand, ends, length, _SIZE, timeline=_SLICE)
    quiet = sample()
    disturbed, moved = _during(partial(move, count), length.warmup + length.seconds / 2, sample)
    began, ended = moved or (0.0, 0.0)
    if not disturbed["started"] < began < ended < disturbed["started"] + disturbed["seconds"]:
        raise LabError("the table was not replaced inside the window that is counted")
    return {**_beside(disturbed, quiet), "quiet_kpps": quiet["kpps"], "published_ms": (ended - began) * 1e3}


def gil(stand: Stand, ends: Ends, timing: Timing) -> dict[str, Any]:
    """Datagrams at saturation while a Python thread of the sending daemon holds the GIL for a second."""
    if ends.disturbed is None:
        return {"skipped": _NO_DAEMON}
    length = replace(timing, seconds=max(timing.seconds, HELD + 1.0))
    sample = partial(exchange.udp, stand, ends, length, _SIZE, timeline=_SLICE)
    quiet = sample()
    disturbed, held = _during(partial(ends.disturbed.hold, HELD), length.warmup + 0.7, sample)
    if held.ended - held.began < 0.9 * HELD:
        raise LabError("the daemon has not held the GIL")
    inside = _slices(disturbed, *held)
    if len(inside) < 0.5 * HELD / _SLICE:
        raise LabError("the GIL was held outside of the window that is counted")
    return {
        "held_kpps": sum(count for count, _ in inside) / len(inside) / _SLICE / 1e3,
        "quiet_kpps": quiet["kpps"],
        "held_gap_ms": max(gap for _, gap in inside) / 1e3,
        "quiet_gap_ms": quiet["longest_gap_ms"],
        "empty_slices": sum(count == 0 for count, _ in inside),
        "slice_ms": _SLICE * 1e3,
        "loss": disturbed["loss"],
        "stolen_s": quiet["stolen_s"] + disturbed["stolen_s"],
    }


def _slices(figures: dict[str, Any], begin: float, end: float) -> list[tuple[int, int]]:
    """The slices that lie wholly between two times of CLOCK_MONOTONIC."""
    chosen = []
    for number, (count, gap) in enumerate(figures["timeline"]):
        at = figures["started"] + number * _SLICE
        if begin <= at and at + _SLICE <= min(end, figures["started"] + figures["seconds"]):
            chosen.append((count, gap))
    return chosen
