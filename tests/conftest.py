"""Owns the order of the tests, their patience, and that a missing privilege or tool is a failure and never a skip.

Fast tests come first, then those that start etcd, then those that build network namespaces, so that a plain mistake
shows in seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from hypothesis import settings

from dataplane.errors import ConfigError
from dataplane.lab.machine import check_machine, missing_packages
from tests.etcd_server import EtcdServer

# no example is judged by how long it took: a busy machine, or a sanitizer, is not a fault
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="module")
def server() -> Iterator[EtcdServer]:
    """An etcd that the tests of a file share."""
    with EtcdServer() as running:
        yield running


@functools.cache
def _lacks(mark: str) -> str:
    """What this machine or user lacks for tests with a mark; empty where nothing."""
    if mark == "etcd":
        packages = missing_packages(["etcd", "etcdctl"])
        return f"tools are missing: run `apt-get install {' '.join(packages)}`" if packages else ""
    try:
        check_machine("sqlite")
    except ConfigError as error:
        return str(error)
    return ""


def _weight(item: pytest.Item) -> int:
    return 2 if item.get_closest_marker("netns") else 1 if item.get_closest_marker("etcd") else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_weight)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in ("netns", "etcd"):
        if item.get_closest_marker(mark) and (reason := _lacks(mark)):
            pytest.fail(f"this test must run, and cannot: {reason}; `make setup` prepares a machine", pytrace=False)
