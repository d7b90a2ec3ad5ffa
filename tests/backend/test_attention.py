"""When a backend looks after its part of the kernel, and that it stops when it is told to."""

from __future__ import annotations

import asyncio

import pytest

from dataplane.backend import attention
from dataplane.backend.attention import Attention, rest_after
from dataplane.errors import KernelError


async def test_an_alarm_is_a_look_also_one_from_before_the_start() -> None:
    looked = asyncio.Semaphore(0)

    async def look() -> None:
        looked.release()

    attention = Attention(look)
    attention.alarm()
    attention.start()
    async with asyncio.timeout(10):
        await looked.acquire()
        attention.alarm()
        await looked.acquire()
        await attention.close()


async def test_without_an_alarm_there_is_a_look_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "AUDIT_SECONDS", 0.01)
    looked = asyncio.Semaphore(0)

    async def look() -> None:
        looked.release()

    looking = Attention(look)
    looking.start()
    async with asyncio.timeout(10):
        for _ in range(3):
            await looked.acquire()
        await looking.close()


async def test_a_look_that_failed_is_tried_again() -> None:
    tries: list[int] = []
    done = asyncio.Event()

    async def look() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise KernelError("the kernel refuses")
        done.set()

    attention = Attention(look)
    attention.start()
    attention.alarm()
    async with asyncio.timeout(10):
        await done.wait()
        await attention.close()


@pytest.mark.parametrize(("took", "rest"), [(0.0, 0.01), (0.1, 0.2), (1.6, 0.5)])
def test_a_rest_is_longer_after_a_longer_look_up_to_a_limit(took: float, rest: float) -> None:
    assert rest_after(took) == rest


@pytest.mark.parametrize("turns", range(4))
async def test_an_alarm_in_the_moment_of_the_close_does_not_keep_it_open(turns: int) -> None:
    async def look() -> None: ...

    attention = Attention(look)
    attention.start()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    attention.alarm()
    for _ in range(turns):
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await attention.close()
        await attention.close()
