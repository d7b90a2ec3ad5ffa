"""dataplane/lease/config.py, and the rhythm of retry.py, over a simulated store."""

from __future__ import annotations

import asyncio
from functools import partial
from ipaddress import IPv4Network
from random import Random

import pytest

from dataplane import netconf
from dataplane.lease.config import fetch_config
from tests.lease.fake_store import SimulatedClient, SimulatedStore

pytestmark = pytest.mark.usefixtures("every_log_line")


async def test_the_config_is_waited_for_and_each_trouble_is_told(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    clock, client = store.clock, SimulatedClient(store, "me")
    client.offline = True
    parse = partial(netconf.parse, origin="here")
    fetch = asyncio.create_task(fetch_config(client, parse, rng=Random(1), clock=clock, sleep=clock.sleep))
    await clock.advance(3)
    client.offline = False
    await clock.advance(10)
    store.config = b'{"Network":"10.5.0.0/33"}'
    await clock.advance(10)
    store.config = b'{"EnableIPv4":false}'
    await clock.advance(10)
    assert not fetch.done()
    store.config = b'{"Network":"10.5.0.0/16"}'
    await clock.advance(6)
    assert (await fetch).network == IPv4Network("10.5.0.0/16")
    assert "Couldn't fetch network config: simulated: offline" in caplog.text
    assert "flannel config not found in etcd store. Did you create your config using etcdv3 API?" in caplog.text
    assert "10.5.0.0/33" in caplog.text
    assert "none defined stack: EnableIPv4 and EnableIPv6 are both false" in caplog.text


async def test_an_endless_trouble_is_told_each_second_first_and_rarely_later(
    store: SimulatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    clock, client = store.clock, SimulatedClient(store, "me")
    client.offline = True
    fetch = asyncio.create_task(fetch_config(client, bytes, rng=Random(1), clock=clock, sleep=clock.sleep))
    await clock.advance(4.5)
    assert 3 <= len(caplog.records) <= 5
    await clock.advance(600)
    caplog.clear()
    calls = client.calls
    await clock.advance(600)
    assert 15 <= len(caplog.records) <= 40
    assert 120 <= client.calls - calls <= 170
    fetch.cancel()
    await asyncio.wait([fetch])
