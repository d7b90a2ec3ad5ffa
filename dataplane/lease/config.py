"""Owns what the lease side wants from the network config: waiting for it, and which subnets it lets nodes lease.

Free of: its rules and texts (`netconf`). Invariant: a store that is away or a config that is wrong is waited out and
told, never an end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from random import Random
from typing import TypeVar

from dataplane.errors import ConfigError, StoreError
from dataplane.lease import texts
from dataplane.lease.allocate import SubnetRange
from dataplane.lease.retry import Backoff, LogGate
from dataplane.lease.store import LeaseStore
from dataplane.netconf import NetworkConfig

log = logging.getLogger(__name__)

T = TypeVar("T")
Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


async def fetch_config(
    store: LeaseStore,
    parse: Callable[[bytes], T],
    *,
    rng: Random,
    clock: Clock = time.monotonic,
    sleep: Sleep = asyncio.sleep,
) -> T:
    """The network's config as `parse` reads it (which raises ConfigError). Tries for ever, and says why."""
    backoff = Backoff(1.0, 5.0, rng, growth=1.1)
    gate = LogGate()
    while True:
        try:
            text = await store.read_config()
            if text is not None:
                return parse(text)
            trouble = texts.config_missing(store.name)
        except (StoreError, ConfigError) as error:
            trouble = str(error)
        if gate.passes(trouble, clock()):
            log.error("Couldn't fetch network config: %s", trouble)
        await sleep(backoff.next())


def range_v4(config: NetworkConfig) -> SubnetRange | None:
    """The IPv4 subnets of the network; None where it has none."""
    network, first, last = config.network, config.subnet_min, config.subnet_max
    if network is None or first is None or last is None:
        return None
    return SubnetRange(network, config.subnet_len, first, last)


def range_v6(config: NetworkConfig) -> SubnetRange | None:
    """The IPv6 subnets of the network; None where it has none."""
    network, first, last = config.ipv6_network, config.ipv6_subnet_min, config.ipv6_subnet_max
    if network is None or first is None or last is None:
        return None
    return SubnetRange(network, config.ipv6_subnet_len, first, last)
