"""When cyclic garbage is collected: what is new at every look, all of it in a quiet moment, and at last in any case."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from itertools import count

import pytest

from dataplane import collecting


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The generations that were collected, in order."""
    collected: list[int] = []
    for name, seconds in (("YOUNG", 0.01), ("BUSY", 0.01), ("DUE", 0.1), ("QUIET", 0.05), ("LATEST", 0.5)):
        monkeypatch.setattr(collecting, f"{name}_SECONDS", seconds)

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            collected.append(info["generation"])

    gc.disable()
    gc.callbacks.append(note)
    yield collected
    gc.callbacks.remove(note)
    gc.enable()


async def first_full(looks: list[int], task: asyncio.Task[None]) -> float:
    """Seconds until all objects were looked at for the first time."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.timeout(20):
        while 2 not in looks:  # noqa: ASYNC110 - a collection tells nobody
            await asyncio.sleep(0.005)
    task.cancel()
    return loop.time() - began


async def test_in_calm_all_is_collected_soon(looks: list[int]) -> None:
    task = asyncio.create_task(collecting.run(lambda: 7))
    assert await first_full(looks, task) >= 0.1
    assert looks[0] == 0, "what is new comes first"


async def test_in_a_storm_only_what_is_new_is_collected_until_it_is_too_late(looks: list[int]) -> None:
    events = count()
    task = asyncio.create_task(collecting.run(lambda: next(events)))
    assert await first_full(looks, task) >= 0.5
    assert looks.count(0) > 5
