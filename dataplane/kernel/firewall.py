"""Owns the masquerade and forward rules in the kernel, through iptables or nftables.

Free of: the texts of the rules and what is missing of them (kernel.rules). Invariant: a change of one engine is one
transaction, `nft -f -` or `iptables-restore --noflush`; only our chains, and our jumps to them, are ever touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from dataplane.errors import KernelError
from dataplane.kernel.rules import CHAINS, Chain, Change, Rules, nft_table, plan, texts

LOCK_SECONDS = 30
"""How long iptables may wait for the lock that its legacy back end shares with everybody."""



def families() -> tuple[int, ...]:
    """The versions of IP that this kernel has."""
    return (4, 6) if Path("/proc/sys/net/ipv6").exists() else (4,)


async def ensure(rules: Rules, former: Sequence[Rules] = (), *, nftables: bool) -> bool:
    """Make one family's rules what `rules` says, in one engine; True if something had to be changed.

    `former`: rules of earlier daemons at this place, which go. Raises KernelError: the tool is missing or refuses.
    """
    return await (_ensure_nftables if nftables else _ensure_iptables)(rules, former)


async def remove(version: int, *, nftables: bool) -> bool:
    """Take both chains away from one engine in one family; True if there was one. Without its tool there is none.

    A chain that somebody else's rule jumps to is emptied and stays, and so does a table with more in it than ours.
    """
    try:
        return await (_remove_nftables if nftables else _remove_iptables)(version)
    except ToolMissingError:
        return False


# --- iptables -------------------------------------------------------------------------------------------------


async def _ensure_iptables(rules: Rules, former: Sequence[Rules]) -> bool:
    payload: list[str] = []
    for chain in CHAINS:
        hook = await _listed(rules.version, chain.table, chain.hook)
        present = await _chain_rules(rules.version, chain)
        wanted = texts(rules, former, chain, nftables=False)
        change = plan(present, wanted)
        if change is not None and change.whole:
            steps = _removal(chain, await _listed(rules.version, chain.table))
        else:
            new = [f":{chain.name} - [0:0]"] if present is None and wanted.own else []
            steps = new + _iptables_steps(chain, change, hook.count(chain.jump) if wanted.own else None)
        payload += _payload(chain, steps)
    await _restore(rules.version, payload)
    return bool(payload)


async def _chain_rules(version: int, chain: Chain) -> list[str] | None:
    """The rules of our chain as iptables prints them; None where there is no such chain."""
    try:
        listing = await _listed(version, chain.table, chain.name)
    except ToolKilledError:
        raise
    except KernelError:
        # the table itself was listed just before: what is missing is the chain
        return None
    return [line for line in listing if line.startswith("-A ")]


def _iptables_steps(chain: Chain, change: Change | None, jumps: int | None) -> list[str]:
    """Lines for iptables-restore. `jumps`: how many lead to the chain now, where one should; None: leave them."""
    steps: list[str] = []
    if change is not None:
        steps += [_with("-D", rule) for rule in change.drop]
        steps += [_with("-I", rule) for rule in reversed(change.insert)]
        steps += change.append
    if jumps is not None:
        # a jump that stands keeps its place
        steps += [chain.jump] * (jumps == 0) + [_with("-D", chain.jump)] * (jumps - 1)
    return steps


async def _remove_iptables(version: int) -> bool:
    payload: list[str] = []
    for chain in CHAINS:
        payload += _payload(chain, _removal(chain, await _listed(version, chain.table)))
    await _restore(version, payload)
    return bool(payload)


def _removal(chain: Chain, table: Sequence[str]) -> list[str]:
    """Lines that take jumps and chain out of the whole table `table`."""
    jumps = [line for line in table if line == chain.jump]
    foreign = [line for line in table if line.endswith(f" -j {chain.name}") and line != chain.jump]
    filled = any(line.startswith(f"-A {chain.name} ") for line in table)
    steps = [_with("-D", jump) for jump in jumps]
    if f"-N {chain.name}" in table and (filled or not foreign):
        steps += [f"-F {chain.name}", *[f"-X {chain.name}"] * (not foreign)]
    return steps


def _payload(chain: Chain, steps: Sequence[str]) -> list[str]:
    if not steps:
        return []
    # naming a chain would empty it, and other overlays of this machine have rules there: only a new one is named
    return [f"*{chain.table}", *steps, "COMMIT"]


def _with(command: str, rule: str) -> str:
    return rule.replace("-A ", f"{command} ", 1)


async def _listed(version: int, table: str, chain: str = "") -> list[str]:
    """A table, or one chain of it, as `iptables -S` prints it."""
    tool = "iptables" if version == 4 else "ip6tables"
    return (await _run(tool, "-w", str(LOCK_SECONDS), "-t", table, "-S", *[chain] * bool(chain))).splitlines()


async def _restore(version: int, payload: Sequence[str]) -> None:
    if payload:
        tool = "iptables-restore" if version == 4 else "ip6tables-restore"
        await _run(tool, "--noflush", "-w", str(LOCK_SECONDS), stdin="\n".join([*payload, ""]))


# --- nftables -------------------------------------------------------------------------------------------------


async def _ensure_nftables(rules: Rules, former: Sequence[Rules]) -> bool:
    table = await _Table.read(rules.version)
    steps: list[str] = []
    for chain in CHAINS:
        listed = table.chains.get(chain.nft_name)
        present = None if listed is None else [text for text, _ in listed]
        change = plan(present, texts(rules, former, chain, nftables=True))
        if change is not None:
            steps += _nftables_steps(table.name, chain, change, listed)
    if steps and not table.exists:
        steps = [f'add table {table.name} {{ comment "rules for {nft_table(rules.version)[1]}"; }}', *steps]
    await _apply(steps)
    return bool(steps)


def _nftables_steps(
    table: str, chain: Chain, change: Change, listed: Sequence[tuple[str, str]] | None
) -> Iterator[str]:
    """Lines for `nft -f`. `listed`: the chain's rules and their handles, None where there is no chain."""
    place = f"{table} {chain.nft_name}"
    foreign = any(text not in change.drop for text, _ in listed or ())
    if listed is not None and (change.whole or not foreign):
        # a chain that is ours alone is made anew: its hook and policy are right then, too
        yield f"delete chain {place}"
        listed = None
    if listed is None and change.append:
        yield f"add chain {place} {{ {chain.nft_head} }}"
    yield from (f"delete rule {place} handle {handle}" for text, handle in listed or () if text in change.drop)
    yield from (f"insert rule {place} {text}" for text in reversed(change.insert))
    yield from (f"add rule {place} {text}" for text in change.append)


async def _remove_nftables(version: int) -> bool:
    table = await _Table.read(version)
    ours = [chain.nft_name for chain in CHAINS if chain.nft_name in table.chains]
    if table.exists and not table.others:
        await _apply([f"delete table {table.name}"])
        return True
    await _apply([f"delete chain {table.name} {name}" for name in ours])
    return bool(ours)


class _Table:
    """Our nftables table of one family as it stands: of each chain the rules with their handles."""

    def __init__(self, name: str, listing: Sequence[str]) -> None:
        self.name = name
        self.exists = bool(listing)
        self.chains: dict[str, list[tuple[str, str]]] = {}
        self.others = False
        """Whether anything stands in it that is not ours."""
        chain: list[tuple[str, str]] | None = None
        for line in listing:
            text, mark, handle = line.strip().rpartition(" # handle ")
            if line.startswith("\t\t"):
                if chain is not None and mark:
                    chain.append((text, handle))
            elif line.startswith("\t") and text.endswith("{"):
                kind, name = text.split()[:2]
                ours = kind == "chain" and name in {each.nft_name for each in CHAINS}
                self.others |= not ours
                chain = self.chains.setdefault(name, []) if ours else None

    @classmethod
    async def read(cls, version: int) -> _Table:
        name = " ".join(nft_table(version))
        tables = (await _run("nft", "list", "tables", name.split()[0])).splitlines()
        there = f"table {name}" in tables
        return cls(name, (await _run("nft", "-a", "list", "table", *name.split())).splitlines() if there else [])


async def _apply(steps: Sequence[str]) -> None:
    if steps:
        await _run("nft", "-f", "-", stdin="\n".join([*steps, ""]))


# --- the kernel's own count of changes ------------------------------------------------------------------------

_NETLINK_NETFILTER = 12
_GET_GENERATION = (10 << 8) | 16  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN (linux/netfilter/nf_tables.h)
_NEW_GENERATION = (10 << 8) | 15


def generation() -> int | None:
    """How often nf_tables of this namespace was changed, by nft or by today's iptables; None where nobody counts.

    Asking costs microseconds where listing the rules costs two processes.
    """
    request = struct.pack("=IHHIIBBH", 20, _GET_GENERATION, 1, 0, 0, 0, 0, 0)
    with contextlib.suppress(OSError), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as kernel:
        kernel.settimeout(1.0)
        kernel.send(request)
        answer = kernel.recv(4096)
        # header, then nfgenmsg, then the first attribute: NFTA_GEN_ID, whose value is in network order
        if len(answer) >= 28 and struct.unpack_from("=H", answer, 4)[0] == _NEW_GENERATION:
            number: int = struct.unpack_from("!I", answer, 24)[0]
            return number
    return None


async def counts_iptables() -> bool:
    """Whether `generation` sees what iptables changes: its legacy back end has tables of its own."""
    return "nf_tables" in await _run("iptables", "--version")


# --- running the tools ----------------------------------------------------------------------------------------


class ToolMissingError(KernelError):
    """The program is not installed."""


class ToolKilledError(KernelError):
    """The program was ended before it could answer, which says nothing about the rules."""


async def _run(tool: str, *arguments: str, stdin: str = "") -> str:
    """Standard output of a program that succeeded. Raises KernelError with what it said."""
    command = " ".join([tool, *arguments])
    pipe = asyncio.subprocess.PIPE
    try:
        with _file_of(stdin) as rules:
            process = await asyncio.create_subprocess_exec(tool, *arguments, stdin=rules, stdout=pipe, stderr=pipe)
    except FileNotFoundError as error:
        package = "nftables" if tool == "nft" else "iptables"
        raise ToolMissingError(
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
    if process.returncode is not None and process.returncode < 0:
        raise ToolKilledError(
            f"cannot read or change the firewall: `{command}` was ended by signal {-process.returncode}"
        )
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
