"""Owns keeping this process's pumps from running for a moment, so that a test can fill their queues: both directions
are then crowded for as long as it takes, on any machine.

Free of: what the pumps are part of. Invariant: after the block a pump's policy and our processors are what they were.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def on_our_processor() -> Iterator[list[int]]:
    """The pumps and this thread share one processor, the pumps for as long as they live; the pumps' thread numbers."""
    pumps = [each for each in threading.enumerate() if each.name.startswith(("loden-tx", "loden-rx"))]
    numbers = [each.native_id for each in pumps if each.native_id is not None]
    before = os.sched_getaffinity(0)
    for number in (0, *numbers):
        os.sched_setaffinity(number, {min(before)})
    try:
        yield numbers
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def held_back(pumps: Sequence[int]) -> Iterator[None]:
    """While the block computes on their processor, they do not run."""
    for number in pumps:
        os.sched_setscheduler(number, os.SCHED_IDLE, os.sched_param(0))
    try:
        yield
    finally:
        for number in pumps:
            os.sched_setscheduler(number, os.SCHED_OTHER, os.sched_param(0))
