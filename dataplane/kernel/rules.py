"""Owns the texts of the firewall rules, and which of them must go or come for a chain to be as it should be.

Free of: IO. Invariant: the rules are flannel's, word for word (facts 9.1, 9.2, 9.4), so either daemon takes over the
other's; only rules that are provably ours, by their text, are ever changed, since several daemons of one machine (each
with a network of its own) share these chains.

One text differs from flannel's, the fourth of nftables' masquerading. Flannel has `saddr != P daddr N return`
there (P: this node's subnet, N: the network): it takes everything that the last rule is for, so packets from the host
to pods of other nodes keep an address that those nodes cannot answer to. Ours is what flannel's own iptables say.
Flannel's is known as ours, so that it goes where flannel ran before: it would stand in front, and take the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network

Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Rules:
    """What one family's firewall shall hold for one overlay: `network` is everybody's, `subnet` this node's."""

    network: Network
    subnet: Network
    masquerade: bool
    forward: bool
    fully_random: bool = True

    @property
    def version(self) -> int:
        return self.network.version

    def variants(self) -> tuple[Rules, Rules]:
        """Everything that any daemon with this network and subnet can have set."""
        everything = replace(self, masquerade=True, forward=True)
        return replace(everything, fully_random=True), replace(everything, fully_random=False)


@dataclass(frozen=True, slots=True)
class Chain:
    """One of our two chains, as both engines call it."""

    masquerades: bool
    table: str
    hook: str
    name: str
    comment: str
    nft_name: str
    nft_head: str

    @property
    def jump(self) -> str:
        """The iptables rule that leads into the chain."""
        return f'-A {self.hook} -m comment --comment "{self.comment}" -j {self.name}'


MASQUERADE = Chain(
    masquerades=True,
    table="nat",
    hook="POSTROUTING",
    name="FLANNEL-POSTRTG",
    comment="flanneld masq",
    nft_name="postrtg",
    nft_head="type nat hook postrouting priority srcnat; policy accept;"
    ' comment "chain to manage traffic masquerading by flannel";',
)
FORWARD = Chain(
    masquerades=False,
    table="filter",
    hook="FORWARD",
    name="FLANNEL-FWD",
    comment="flanneld forward",
    nft_name="forward",
    nft_head="type filter hook forward priority filter; policy accept;"
    ' comment "chain to accept flannel traffic";',
)
CHAINS = (MASQUERADE, FORWARD)


@dataclass(frozen=True, slots=True)
class Texts:
    """Rules as an engine prints them: `shared` stands at the chain's head and serves every overlay of the machine,
    `own` is ours alone; `known` is what we, or a former daemon of this place, can have set there at any time."""

    shared: tuple[str, ...]
    own: tuple[str, ...]
    known: frozenset[str]


@dataclass(frozen=True, slots=True)
class Change:
    """What has to be done to a chain: rules that go, then rules for its head and its end; or the whole chain goes."""

    drop: tuple[str, ...] = ()
    insert: tuple[str, ...] = ()
    append: tuple[str, ...] = ()
    whole: bool = False


def texts(rules: Rules, former: Sequence[Rules], chain: Chain, *, nftables: bool) -> Texts:
    """The rules of one chain. `former`: what earlier daemons at this place may have left, to be recycled."""
    render = _nftables if nftables else _iptables
    wanted = rules.masquerade if chain.masquerades else rules.forward
    shared, own = render(rules, chain)
    known = {text for each in (rules, *former) for variant in each.variants() for text in render(variant, chain)[1]}
    if nftables and chain.masquerades:
        known.update(_flannels_fourth(each) for each in (rules, *former))
    return Texts(shared, own if wanted else (), frozenset(known))


def plan(present: Sequence[str] | None, wanted: Texts) -> Change | None:
    """What turns the rules of a chain (None: there is no such chain) into those wanted; None where nothing has to."""
    rules = present or ()
    ours = tuple(rule for rule in rules if rule in wanted.known)
    others = [rule for rule in rules if rule not in wanted.known and rule not in wanted.shared]
    if not wanted.own:
        if others:
            return Change(drop=ours) if ours else None
        return None if present is None else Change(whole=True)
    heads = tuple(rule for rule in rules if rule in wanted.shared)
    if ours == wanted.own and heads == tuple(rules[: len(wanted.shared)]) == wanted.shared:
        return None
    return Change(drop=heads + ours, insert=wanted.shared, append=wanted.own)


def nft_table(version: int) -> tuple[str, str]:
    """Family and name of our nftables table."""
    return ("ip", "flannel-ipv4") if version == 4 else ("ip6", "flannel-ipv6")


def _multicast(version: int) -> str:
    return "224.0.0.0/4" if version == 4 else "ff00::/8"


def _iptables(rules: Rules, chain: Chain) -> tuple[tuple[str, ...], tuple[str, ...]]:
    network, subnet = rules.network, rules.subnet

    def rule(match: str, target: str) -> str:
        return f'-A {chain.name} {match} -m comment --comment "{chain.comment}" -j {target}'

    if not chain.masquerades:
        return (), (rule(f"-s {network}", "ACCEPT"), rule(f"-d {network}", "ACCEPT"))
    masquerade = f"MASQUERADE{' --random-fully' * rules.fully_random}"
    # what kube-proxy has marked, it masquerades itself
    return (rule("-m mark --mark 0x4000/0x4000", "RETURN"),), (
        rule(f"-s {subnet} -d {network}", "RETURN"),
        rule(f"-s {network} -d {subnet}", "RETURN"),
        rule(f"! -s {network} -d {subnet}", "RETURN"),  # pods see the addresses of their clients
        rule(f"-s {network} ! -d {_multicast(rules.version)}", masquerade),
        rule(f"! -s {network} -d {network}", masquerade),  # the host to pods of other nodes
    )


def _nft_fields(version: int) -> tuple[str, str]:
    return ("ip saddr", "ip daddr") if version == 4 else ("ip6 saddr", "ip6 daddr")


def _flannels_fourth(rules: Rules) -> str:
    source, target = _nft_fields(rules.version)
    return f"{source} != {rules.subnet} {target} {rules.network} return"


def _nftables(rules: Rules, chain: Chain) -> tuple[tuple[str, ...], tuple[str, ...]]:
    network, subnet = rules.network, rules.subnet
    source, target = _nft_fields(rules.version)
    if not chain.masquerades:
        return (), (f"{source} {network} accept", f"{target} {network} accept")
    masquerade = f"masquerade{' fully-random' * rules.fully_random}"
    return ("meta mark 0x00004000 return",), (
        f"{source} {subnet} {target} {network} return",
        f"{source} {network} {target} {subnet} return",
        f"{source} != {network} {target} {subnet} return",  # see the top of this file
        f"{source} {network} {target} != {_multicast(rules.version)} {masquerade}",
        f"{source} != {network} {target} {network} {masquerade}",
    )
