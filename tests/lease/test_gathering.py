"""What a watch brings while its follower is busy: in portions, in order, and its end last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from dataplane.errors import HistoryGone
from dataplane.lease import gathering
from dataplane.lease.gathering import in_portions
from dataplane.lease.store import Batch, Deleted


def batch(revision: int, changes: int = 1) -> Batch:
    return Batch(revision, tuple(Deleted(f"{revision}.{number}", revision) for number in range(changes)))


async def watch(batches: Sequence[Batch], taken: list[int]) -> AsyncGenerator[Batch, None]:
    for each in batches:
        await asyncio.sleep(0)
        taken.append(each.revision)
        yield each
    raise HistoryGone(7)


async def follow(batches: Sequence[Batch], busy: int, taken: list[int], size: int = 1000) -> list[Batch]:
    """What a follower gets that needs `busy` turns of the loop for each; at last comes the watch's own error."""
    found: list[Batch] = []

    async def to_the_end() -> None:
        async with aclosing(watch(batches, taken)) as stream, aclosing(in_portions(stream, 0, size)) as rounds:
            async for each in rounds:
                found.append(each)
                for _ in range(busy):
                    await asyncio.sleep(0)

    with pytest.raises(HistoryGone):
        await to_the_end()
    return found


async def test_a_follower_with_time_gets_every_batch_as_it_is() -> None:
    batches = [batch(1), Batch(2, ()), batch(3, 4)]

    async def slowly() -> AsyncGenerator[Batch, None]:
        for each in batches:
            yield each
            for _ in range(10):
                await asyncio.sleep(0)

    async with aclosing(slowly()) as stream:
        assert [each async for each in in_portions(stream, 0, 4)] == batches


async def test_a_busy_follower_gets_everything_in_a_few_rounds_and_then_the_end() -> None:
    batches = [batch(revision, changes=revision % 3) for revision in range(1, 101)]
    found = await follow(batches, 60, [])
    assert len(found) <= 4
    assert [change for each in found for change in each.changes] == [c for each in batches for c in each.changes]
    assert [each.revision for each in found] == sorted(each.revision for each in found)
    assert found[-1].revision == 100


@pytest.mark.parametrize("size", [1, 2, 3, 5, 50])
async def test_a_portion_has_no_more_than_was_asked_for_and_the_revision_that_is_known_by_then(size: int) -> None:
    batches = [batch(revision, changes=revision * 7 % 13) for revision in range(1, 41)]
    found = await follow(batches, 60, [], size)
    assert [change for each in found for change in each.changes] == [c for each in batches for c in each.changes]
    assert max(len(each.changes) for each in found) == size, "full, where so many wait"
    revisions = {each.revision: [c for known in batches[: each.revision] for c in known.changes] for each in batches}
    got: list[object] = []
    for each in found:
        got += each.changes
        if each.revision:
            assert got[: len(revisions[each.revision])] == revisions[each.revision], "all of it has come"
        later = revisions.get(each.revision + 1)
        assert later is None or len(got) < len(later) or later == revisions[each.revision]
    assert found[-1].revision == 40


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "MOST_CHANGES", 10)
    taken: list[int] = []
    found = await follow([batch(revision, changes=5) for revision in range(1, 31)], 200, taken)
    assert all(len(each.changes) <= 10 for each in found)
    assert taken == list(range(1, 31))


async def test_a_follower_that_leaves_ends_the_reading() -> None:
    async def forever() -> AsyncGenerator[Batch, None]:
        yield batch(1)
        await asyncio.Event().wait()

    before = asyncio.all_tasks()
    async with aclosing(forever()) as stream, aclosing(in_portions(stream, 0, 4)) as rounds:
        assert await anext(rounds) == batch(1)
    assert asyncio.all_tasks() == before
