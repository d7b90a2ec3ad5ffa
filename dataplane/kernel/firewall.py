"""Owns the two rules that let the overlay's packets be forwarded, in iptables or in nftables.

Free of: masquerading. Invariant: the rules are flannel's, word for word (facts 9.2, 9.4), so either daemon takes over
the other's; every change is one transaction, and only our chains, and our jump to one, are ever touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from ipaddress import IPv4Network
from typing import IO

from dataplane.errors import KernelError

FILTER_CHAIN = "FLANNEL-FWD"
JUMP = f'-A FORWARD -m comment --comment "flanneld forward" -j {FILTER_CHAIN}'

NFT_TABLE = "flannel-ipv4"
NFT_CHAIN = "forward"

LOCK_SECONDS = 30
"""How long iptables may wait for the lock that its legacy back end shares with everybody."""


async def ensure_forward(network: IPv4Network, *, nftables: bool) -> bool:
    """Accept forwarded packets from and to `network`; True if rules had to be set.

    Raises KernelError: the tool is missing or refuses. The rules of the other engine stay as they are.
    """
    return await (_ensure_nftables(network) if nftables else _ensure_iptables(network))


async def remove_forward() -> bool:
    """Remove our rules from both engines; True if there were any. An engine whose tool is missing has none.

    A chain that somebody else's rule jumps to is emptied and stays, and so does a table with more in it than ours.
    """
    return any([await _remove_iptables(), await _remove_nftables()])


async def _ensure_iptables(network: IPv4Network) -> bool:
    chain = [
        f'-A {FILTER_CHAIN} -s {network} -m comment --comment "flanneld forward" -j ACCEPT',
        f'-A {FILTER_CHAIN} -d {network} -m comment --comment "flanneld forward" -j ACCEPT',
    ]
    present = await _filter_rules()
    jumps = present.count(JUMP)
    if jumps == 1 and _of_chain(present) == chain:
        return False
    # naming the chain makes it, or empties the one that is there; a jump that stands keeps its place
    await _restore(f":{FILTER_CHAIN} - [0:0]", *[JUMP] * (jumps == 0), *[_delete(JUMP)] * (jumps - 1), *chain)
    return True


async def _remove_iptables() -> bool:
    try:
        present = await _filter_rules()
    except _ToolMissingError:
        return False
    jumps = [line for line in present if line == JUMP]
    foreign = [line for line in present if line.endswith(f" -j {FILTER_CHAIN}") and line != JUMP]
    steps = [_delete(jump) for jump in jumps]
    if f"-N {FILTER_CHAIN}" in present and (_of_chain(present) or not foreign):
        steps += [f":{FILTER_CHAIN} - [0:0]", *[f"-X {FILTER_CHAIN}"] * (not foreign)]
    if steps:
        await _restore(*steps)
    return bool(steps)


async def _filter_rules() -> list[str]:
    """The filter table as `iptables -S` prints it."""
    return (await _run("iptables", "-w", str(LOCK_SECONDS), "-S")).splitlines()


def _of_chain(rules: list[str]) -> list[str]:
    return [line for line in rules if line.startswith(f"-A {FILTER_CHAIN} ")]


def _delete(rule: str) -> str:
    return rule.replace("-A ", "-D ", 1)


async def _restore(*steps: str) -> None:
    payload = "\n".join(["*filter", *steps, "COMMIT", ""])
    await _run("iptables-restore", "--noflush", "-w", str(LOCK_SECONDS), stdin=payload)


async def _ensure_nftables(network: IPv4Network) -> bool:
    rules = [f"ip saddr {network} accept", f"ip daddr {network} accept"]
    head = [
        'comment "chain to accept flannel traffic"',
        "type filter hook forward priority filter; policy accept;",
    ]
    if await _nftables_chain() == head + rules:
        return False
    payload = [
        f'add table ip {NFT_TABLE} {{ comment "rules for {NFT_TABLE}"; }}',
        # makes the deletion valid where there is no chain yet
        f"add chain ip {NFT_TABLE} {NFT_CHAIN}",
        f"delete chain ip {NFT_TABLE} {NFT_CHAIN}",
        f"table ip {NFT_TABLE} {{",
        f"chain {NFT_CHAIN} {{",
        *head,
        *rules,
        # nft 1.0.6 wants each on a line of its own
        "}",
        "}",
        "",
    ]
    await _run("nft", "-f", "-", stdin="\n".join(payload))
    return True


async def _nftables_chain() -> list[str]:
    """The lines of our chain as nft prints them, empty where there is none."""
    if not any("chain" in item and item["chain"]["name"] == NFT_CHAIN for item in await _nftables_items()):
        return []
    listing = await _run("nft", "list", "chain", "ip", NFT_TABLE, NFT_CHAIN)
    lines = [line.strip() for line in listing.splitlines()]
    return [line for line in lines if line and line != "}" and not line.endswith("{")]


async def _remove_nftables() -> bool:
    try:
        items = await _nftables_items()
    except _ToolMissingError:
        return False
    ours = [item for item in items if item.get("chain", {}).get("name") == NFT_CHAIN]
    others = [i for i in items if "table" not in i and i not in ours and i.get("rule", {}).get("chain") != NFT_CHAIN]
    if not items or (others and not ours):
        return False
    await _run("nft", "delete", *(["chain", "ip", NFT_TABLE, NFT_CHAIN] if others else ["table", "ip", NFT_TABLE]))
    return True


async def _nftables_items() -> list[dict[str, dict[str, str]]]:
    """The table, and everything in it, as nft's JSON objects; empty where there is no such table."""
    tables = json.loads(await _run("nft", "-j", "list", "tables", "ip"))["nftables"]
    if not any(item.get("table", {}).get("name") == NFT_TABLE for item in tables):
        return []
    items = json.loads(await _run("nft", "-j", "list", "table", "ip", NFT_TABLE))["nftables"]
    return [item for item in items if "metainfo" not in item]


class _ToolMissingError(KernelError):
    """The program is not installed."""


async def _run(tool: str, *arguments: str, stdin: str = "") -> str:
    """Standard output of a program that succeeded. Raises KernelError with what it said."""
    command = " ".join([tool, *arguments])
    pipe = asyncio.subprocess.PIPE
    try:
        with _file_of(stdin) as rules:
            process = await asyncio.create_subprocess_exec(tool, *arguments, stdin=rules, stdout=pipe, stderr=pipe)
    except FileNotFoundError as error:
        package = "nftables" if tool == "nft" else "iptables"
        raise _ToolMissingError(
            f"cannot run `{command}`: there is no {tool} on the PATH; install it: apt install {package}"
        ) from error
    except OSError as error:
        raise KernelError(f"cannot run `{command}`: {error.strerror}") from error
    try:
        output, complaint = await process.communicate()
    except asyncio.CancelledError:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    if process.returncode != 0:
        reason = complaint.decode(errors="replace").strip() or f"exit status {process.returncode}"
        raise KernelError(f"cannot read or change the firewall: `{command}`: {reason}")
    return output.decode()


@contextlib.contextmanager
def _file_of(text: str) -> Iterator[IO[str]]:
    """Not a pipe: a program that ends before it has read a pipe makes uvloop raise, and its reason is lost."""
    with open(os.memfd_create("firewall-rules"), "w+", encoding="utf-8") as file:
        file.write(text)
        file.seek(0)
        yield file
