"""Owns `loden net-conf set`: checks a network config and writes it into the lease store.

Free of: the rules of a network config and of stores. Invariant: a text that no daemon would accept is not written.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dataplane import options
from dataplane.errors import ConfigError

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
    for name in _STORE_FLAGS:
        setter.add_argument(f"--{name}", metavar="VALUE", help=options.FLAGS[name].help)
    setter.set_defaults(run=_set)


def _set(arguments: argparse.Namespace) -> int:
    from dataplane import netconf, parts

    given = {name: getattr(arguments, name.replace("-", "_")) for name in _STORE_FLAGS}
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    chosen = options.parse(words, os.environ)
    options.check(chosen)
    text, origin = _read(arguments.file)
    config = netconf.parse(text, origin=origin)
    for warning in (*chosen.warnings, *config.warnings):
        print(f"loden: {warning}", file=sys.stderr)

    async def write() -> str:
        store = await parts.open_store(chosen)
        try:
            await store.write_config(text)
            return store.name
        finally:
            await store.close()

    import asyncio

    name = asyncio.run(write())
    print(f"network {' and '.join(map(str, config.networks))} is set in {name}")
    return 0


def _read(file: str) -> tuple[bytes, str]:
    """The text and what to call it in errors."""
    if file == "-":
        return sys.stdin.buffer.read(), "standard input"
    try:
        return Path(file).read_bytes(), file
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
