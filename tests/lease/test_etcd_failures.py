"""Connections to a real etcd that are cut at the worst moment: what a watch or a snapshot must still deliver.

With traffic and whole daemons: tests/netns/test_store_failures.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from dataplane.errors import StoreUnavailable
from dataplane.lease import etcd as etcd_module
from dataplane.lease.etcd import EtcdStore
from dataplane.lease.store import Deleted, Entry
from tests.etcd_server import EtcdServer
from tests.lease.test_store_conformance import SOON, make, watching

pytestmark = pytest.mark.etcd


class Cutter:
    """A TCP relay to etcd that ends each connection once the server has said `limit` bytes on it."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()
        self.limit = float("inf")
        self.cuts = 0
        self.port = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Cutter]:
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listener.close()
            for task in self._tasks:
                task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        up = asyncio.create_task(self._pump(reader, back, float("inf")))
        self._tasks.add(up)
        await self._pump(there, writer, self.limit)
        up.cancel()
        for end in (back, writer):
            end.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, limit: float) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(4096):
                part = data[: int(min(limit, len(data)))]
                limit -= len(data)
                sink.write(part)
                await sink.drain()
                if limit <= 0:
                    self.cuts += 1
                    return


async def test_a_connection_cut_between_a_watchs_creation_and_its_catch_up_loses_nothing(server: EtcdServer) -> None:
    """The cut comes after each possible number of bytes: within the handshake, after the watch was confirmed and before
    its first event, within an event. Changes go on all the time; each must arrive exactly once, in order."""
    direct = EtcdStore([server.url], "/cut")
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(120):
        stack.push_async_callback(direct.close)
        cutter = await stack.enter_async_context(Cutter(server.port).running())
        base = (await direct.snapshot()).revision
        expected: list[Entry | Deleted] = []
        seen: list[Entry | Deleted] = []
        after, limit, quiet = base, 20, 0
        while limit < 1500 or quiet < 3:
            entry = await make(direct, f"10.{limit >> 8}.{limit & 255}.0-24")
            expected.append(entry)
            cutter.limit = limit if limit < 1500 else float("inf")
            store = EtcdStore([f"http://127.0.0.1:{cutter.port}"], "/cut")
            try:
                async with watching(store, after) as batches:
                    # the watch stands, or is about to, when these are made
                    adding = asyncio.create_task(make(direct, f"11.{limit >> 8}.{limit & 255}.0-24"))
                    with contextlib.suppress(StoreUnavailable, TimeoutError):
                        async with asyncio.timeout(SOON):
                            while len(seen) < len(expected) + 1:
                                batch = await anext(batches)
                                assert batch.revision > after
                                after = batch.revision
                                seen += batch.changes
                    expected.append(await adding)
            finally:
                await store.close()
            quiet += limit >= 1500
            limit += 37
        assert cutter.cuts > 30
        assert seen == expected


async def test_a_compaction_between_two_pages_of_a_snapshot_costs_a_second_look(
    server: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_module, "PAGE", 10)
    store, other = EtcdStore([server.url], "/pages"), EtcdStore([server.url], "/pages")
    made = [await make(store, f"10.5.{number}.0-24") for number in range(100, 125)]
    plain = store._cluster.call
    pages = 0

    async def call(method: str, request: bytes, *, repeatable: bool = True) -> bytes:
        nonlocal pages
        answer = await plain(method, request, repeatable=repeatable)
        if method == "KV/Range":
            pages += 1
            if pages == 1:
                made.append(await make(other, "10.5.125.0-24"))
                await other.compact(made[-1].mod_revision)
        return answer

    monkeypatch.setattr(store._cluster, "call", call)
    try:
        snapshot = await store.snapshot()
        assert snapshot.entries == tuple(made)
        assert pages == 1 + 3, "the first page, and after a refusal three of the new revision"
    finally:
        await store.close()
        await other.close()
