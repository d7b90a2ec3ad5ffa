"""What the end-to-end tests share: waiting, asking daemons, programs in namespaces, leases written by hand."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dataplane import options
from dataplane.lab import Lab, Node
from dataplane.parts import open_store

SUBNETS = "/coreos.com/network/subnets/"
both_stores = pytest.mark.parametrize("store", ["sqlite", pytest.param("etcd", marks=pytest.mark.etcd)])


def until(what: str, check: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Ask again until the answer is true; fails after a bound."""
    deadline = time.monotonic() + seconds
    while not (answer := check()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)
    return answer


def status_of(node: Node) -> dict[str, Any]:
    status = node.status()
    assert status is not None, f"{node.name} does not answer"
    return status


def reaches(lab: Lab, source: str, target: str) -> bool:
    return lab.ping(source, target, count=3).whole


def put_lease(lab: Lab, key: str, value: str) -> None:
    """Write a lease as an operator would, past every check, without a TTL."""
    if lab.settings.store == "etcd":
        lab.etcdctl("put", SUBNETS + key, stdin=value)
        return

    async def create() -> None:
        store = await open_store(options.parse(lab.store_flags, {}))
        try:
            assert await store.create(key, value.encode(), None)
        finally:
            await store.close()

    asyncio.run(create())


@contextmanager
def python_in(lab: Lab, member: str, code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program in a namespace, once it has printed `ready`."""
    with lab.open_process(member, [sys.executable, "-c", code, *arguments]) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
