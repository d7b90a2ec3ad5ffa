"""Owns what the tests over a simulated store share: the store, and every line of the log."""

from __future__ import annotations

import logging

import pytest

from tests.lease.fake_store import ManualClock, SimulatedStore


@pytest.fixture
def store() -> SimulatedStore:
    return SimulatedStore(ManualClock())


@pytest.fixture
def every_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
