"""Owns `loden net-conf`: checks a network config and writes it into the lease store, or prints the one that is there.

Free of: the rules of a network config and of stores. Invariant: a text that no daemon would accept is not written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dataplane import options
from dataplane.errors import ConfigError

if TYPE_CHECKING:
    from dataplane.lease.store import LeaseStore

T = TypeVar("T")

_STORE_FLAGS = [name for name in options.FLAGS if name.startswith("etcd-") or name == "lease-store"]


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("net-conf", help="the network config, which every node reads from the lease store")
    subverbs = parser.add_subparsers(metavar="COMMAND", required=True)
    setter = subverbs.add_parser(
        "set",
        help="check a config and write it",
        description="Check a network config and write it. The flags are flanneld's; FLANNELD_* variables count too.",
        allow_abbrev=False,
    )
    setter.add_argument("file", metavar="FILE", help="JSON, or - for standard input")
    setter.set_defaults(run=_set)
    getter = subverbs.add_parser(
        "get",
        help="print the config that is there",
        description="Print the network config as it stands in the store. The flags are those of `set`.",
        allow_abbrev=False,
    )
    getter.set_defaults(run=_get)
    for each in (setter, getter):
        for name in _STORE_FLAGS:
            each.add_argument(f"--{name}", metavar="VALUE", help=options.FLAGS[name].help)


def _set(arguments: argparse.Namespace) -> int:
    from dataplane import netconf

    chosen = _chosen(arguments)
    text, origin = _read(arguments.file)
    config = netconf.parse(text, origin=origin)
    for warning in config.warnings:
        print(f"loden: {warning}", file=sys.stderr)

    async def write(store: LeaseStore) -> str:
        await store.write_config(text)
        return store.name

    name = _with_store(chosen, write)
    print(f"network {' and '.join(map(str, config.networks))} is set in {name}")
    return 0


def _get(arguments: argparse.Namespace) -> int:
    from dataplane.lease import texts

    async def read(store: LeaseStore) -> tuple[str, bytes | None]:
        return store.name, await store.read_config()

    chosen = _chosen(arguments)
    if chosen.lease_store and not Path(chosen.lease_store.removeprefix("sqlite://")).exists():
        raise ConfigError(f"{chosen.lease_store} is not there yet: `loden net-conf set FILE` makes it")
    name, text = _with_store(chosen, read)
    if text is None:
        raise ConfigError(texts.config_missing(name))
    sys.stdout.write(text.decode(errors="backslashreplace").rstrip("\n") + "\n")
    return 0


def _chosen(arguments: argparse.Namespace) -> options.Options:
    """The store's flags, from the command line and the environment."""
    given = {name: getattr(arguments, name.replace("-", "_")) for name in _STORE_FLAGS}
    chosen = options.parse([f"--{name}={value}" for name, value in given.items() if value is not None], os.environ)
    options.check(chosen)
    for warning in chosen.warnings:
        print(f"loden: {warning}", file=sys.stderr)
    return chosen


def _with_store(chosen: options.Options, work: Callable[[LeaseStore], Awaitable[T]]) -> T:
    import asyncio

    from dataplane import parts

    async def run() -> T:
        store = await parts.open_store(chosen)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def _read(file: str) -> tuple[bytes, str]:
    """The text and what to call it in errors."""
    if file == "-":
        return sys.stdin.buffer.read(), "standard input"
    try:
        return Path(file).read_bytes(), file
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
