"""Owns the questions of `loden migrate check`: can this node's flanneld be replaced by ours, and what would differ.

Free of: how the answers are shown. Invariant: everything is read, nothing is changed: no lease, rule, device or file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING

from dataplane import netconf, options, parts
from dataplane.backend.base import Underlay
from dataplane.cli.found_flanneld import Found
from dataplane.errors import ConfigError, LeaseInvalid, LodenError
from dataplane.following import Surveyor
from dataplane.kernel import subnetfile, underlay
from dataplane.kernel.facts import Link
from dataplane.lease.model import LeaseAttrs
from dataplane.lease.store import LeaseStore, Snapshot
from dataplane.memory import Memory
from dataplane.netconf import NetworkConfig
from dataplane.options import Options

if TYPE_CHECKING:
    from dataplane.kernel.netlink import Netlink

STORE_SECONDS = 10.0

OK = "ok"
DIFFERS = "differs"
"""Works, but not as with flannel, or not without a thought."""
BLOCKED = "blocked"
"""Until this is changed the node cannot be swapped."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer. `area`: what was looked at. `level`: OK, DIFFERS or BLOCKED."""

    area: str
    level: str
    text: str


async def check(found: Found | None) -> list[Finding]:
    """Every finding, in the order in which a start would meet it. `found`: how flanneld is started here."""
    findings = list(_of_command(found))
    try:
        chosen = options.parse(found.words if found else (), found.environ if found else {})
        options.check(chosen)
    except ConfigError as error:
        return [*findings, Finding("flags", BLOCKED, str(error))]
    findings += [Finding("flags", DIFFERS, warning) for warning in chosen.warnings]
    findings.append(Finding("flags", OK, "every flag and variable is understood"))
    findings += _of_subnet_file(chosen)
    findings += _of_machine()
    findings += [finding async for finding in _of_store(chosen, found)]
    return findings


def _of_command(found: Found | None) -> Iterator[Finding]:
    if found is None:
        yield Finding("command", DIFFERS, "no flanneld runs here and no unit starts one: checked with default flags")
        return
    # the output goes into tickets, which a password shall not
    line = re.sub(r"(-etcd-password[= ])\S+", r"\1***", " ".join(["flanneld", *found.words]))
    yield Finding("command", DIFFERS if found.ours else OK, f"{found.where}{' (Loden)' * found.ours}: {line}")
    for name, value in sorted(found.environ.items()):
        shown = "***" if "PASSWORD" in name else value
        yield Finding("command", OK, f"{found.where}: {name}={shown}")


def _of_subnet_file(chosen: Options) -> Iterator[Finding]:
    places = subnetfile.places(chosen.subnet_file, chosen.control_socket)
    values = subnetfile.read_values(places.subnet_file)
    if values:
        shown = " ".join(f"{name}={value}" for name, value in values.items() if name.startswith("FLANNEL_"))
        yield Finding("subnet file", OK, f"{places.subnet_file}: {shown}")
    else:
        yield Finding("subnet file", DIFFERS, f"{places.subnet_file} is not there yet")
    directory = Path(places.subnet_file).parent
    there = next(parent for parent in (directory, *directory.parents) if parent.is_dir())
    if not os.access(there, os.W_OK):
        yield Finding("subnet file", BLOCKED, f"{there} cannot be written by this user")
    new = f"{places.state}, {places.lock}, {places.control_socket}"
    yield Finding("subnet file", DIFFERS, f"new files beside it: {new}")


def _of_machine() -> Iterator[Finding]:
    yield Finding("kernel", OK, f"Linux {platform.release()}, {os.cpu_count()} CPUs")
    if os.geteuid() != 0:
        yield Finding("kernel", DIFFERS, "this check does not run as root: some holders and variables stay unseen")


async def _of_store(chosen: Options, found: Found | None) -> AsyncIterator[Finding]:
    if chosen.lease_store and not Path(chosen.lease_store.removeprefix("sqlite://")).exists():
        text = f"{chosen.lease_store} is not there yet: write a config with loden net-conf set"
        yield Finding("store", DIFFERS, text)
        return
    try:
        async with contextlib.AsyncExitStack() as stack:
            store = await parts.open_store(chosen)
            stack.push_async_callback(store.close)
            async with asyncio.timeout(STORE_SECONDS):
                conf, snapshot = await _read(store)
    except TimeoutError:
        where = chosen.lease_store or ", ".join(chosen.etcd_endpoints)
        yield Finding("store", BLOCKED, f"no answer within {STORE_SECONDS:.0f} s from {where}")
        return
    except LodenError as error:
        yield Finding("store", BLOCKED, str(error))
        return
    yield Finding("store", OK, f"{store.name}: {len(snapshot.entries)} leases")
    if conf is None:
        yield Finding("net-conf", BLOCKED, f"{store.name} has no network config")
        return
    try:
        network = netconf.parse(conf, origin=f"{store.name} net-conf")
    except ConfigError as error:
        yield Finding("net-conf", BLOCKED, str(error))
        return
    for finding in _of_network(chosen, network):
        yield finding
    async for finding in _of_node(chosen, network, snapshot, found):
        yield finding


async def _read(store: LeaseStore) -> tuple[bytes | None, Snapshot]:
    return await store.read_config(), await store.snapshot()


def _of_network(chosen: Options, network: NetworkConfig) -> Iterator[Finding]:
    yield from (Finding("net-conf", DIFFERS, warning) for warning in network.warnings)
    networks = " and ".join(map(str, network.networks))
    yield Finding("net-conf", OK, f"backend {network.backend.type}, network {networks}")
    tools = ["iptables"] * network.enable_ipv4 + ["ip6tables"] * network.enable_ipv6
    if network.enable_nftables:
        tools = ["nft"]
    for tool in tools:
        if not (chosen.ip_masq or chosen.iptables_forward_rules):
            yield Finding("rules", OK, "no firewall rules are asked for")
        elif shutil.which(tool):
            yield Finding("rules", OK, f"by {tool}, whose rules of flannel are taken over")
        else:
            level = BLOCKED if chosen.ip_masq else DIFFERS
            yield Finding("rules", level, f"there is no {tool} on the PATH, which the net-conf's engine needs")
    if network.enable_nftables and chosen.ip_masq:
        yield Finding("rules", DIFFERS, "the host's packets to pods of other nodes are masqueraded; flannel's nftables"
                      " rules never reach that rule")  # fmt: skip


async def _of_node(
    chosen: Options, network: NetworkConfig, snapshot: Snapshot, found: Found | None
) -> AsyncIterator[Finding]:
    from dataplane.kernel.netlink import Netlink

    netlink = await Netlink.open()
    try:
        links = await netlink.links()
        for finding in _of_port(network, links, found):
            yield finding
        if isinstance(network.backend, netconf.ForeignConfig):
            yield Finding("backend", BLOCKED, parts.refusal(network.backend.type))
        try:
            facing = await Surveyor(chosen, network, netlink).first()
        except ConfigError as error:
            yield Finding("underlay", BLOCKED, str(error))
            return
        yield Finding("underlay", OK, _shown(facing, network))
        for finding in _of_leases(chosen, network, snapshot, facing):
            yield finding
        async for finding in _of_backend(chosen, network, facing, netlink, links):
            yield finding
        async for finding in _of_devices(network, netlink, links):
            yield finding
    finally:
        await netlink.close()


def _shown(facing: Underlay, network: NetworkConfig) -> str:
    v4 = [f"{facing.address}, public IP {facing.public_ip}"] * network.enable_ipv4
    v6 = [f"{facing.address_v6}, public IPv6 {facing.public_ipv6}"] * network.enable_ipv6
    return ", ".join([facing.name, *v4, *v6, f"MTU {facing.mtu}"])


def _of_port(network: NetworkConfig, links: Sequence[Link], found: Found | None) -> Iterator[Finding]:
    port = getattr(network.backend, "port", 0)
    if not port:
        return
    holder = underlay.port_holder(port, links)
    if not holder:
        yield Finding("port", OK, f"UDP {port} is free")
    elif (found is not None and found.pid and f"pid {found.pid})" in holder) or "flannel" in holder:
        yield Finding("port", OK, f"{holder} has UDP {port} now: stop flanneld before ours starts")
    else:
        yield Finding("port", BLOCKED, f"{holder} has UDP {port}")


def _of_leases(chosen: Options, network: NetworkConfig, snapshot: Snapshot, facing: Underlay) -> Iterator[Finding]:
    kinds: Counter[str] = Counter()
    mine, unread = "", 0
    for entry in snapshot.entries:
        try:
            attrs = LeaseAttrs.decode(entry.value)
        except LeaseInvalid:
            unread += 1
            continue
        if (attrs.public_ip, attrs.public_ipv6) == (facing.public_ip, facing.public_ipv6) or (
            attrs.public_ip == facing.public_ip != IPv4Address(0)
        ):
            mine = entry.key
        else:
            kinds[attrs.backend_type or "udp"] += 1
    previous = subnetfile.read_previous(chosen.subnet_file)
    if mine:
        yield Finding("lease", OK, f"{mine} is this node's, by its public IP, and is kept")
    elif previous is not None:
        yield Finding("lease", DIFFERS, f"none is this node's: {previous} of the subnet file is asked for again")
    else:
        yield Finding("lease", DIFFERS, "none is this node's: a free subnet is taken")
    if unread:
        yield Finding("lease", DIFFERS, f"{unread} values cannot be read as leases; they are left alone")
    for kind, count in sorted(kinds.items()):
        same = kind == network.backend.type
        text = f"{count} other node{'s' * (count != 1)} with backend {kind}"
        yield Finding("peers", OK if same else DIFFERS, text if same else f"{text}: not reached from a node with ours")


async def _of_backend(
    chosen: Options, network: NetworkConfig, facing: Underlay, netlink: Netlink, links: Sequence[Link]
) -> AsyncIterator[Finding]:
    """What the daemon would choose, by the same way; making a backend's object changes nothing, starting it would."""
    if isinstance(network.backend, netconf.ForeignConfig):
        return
    carrier = "userspace" if isinstance(network.backend, netconf.UdpConfig) else "kernel"
    places = subnetfile.places(chosen.subnet_file, chosen.control_socket)
    try:
        if isinstance(network.backend, netconf.VxlanConfig):
            carrier = await parts.vxlan_dataplane(chosen, network.backend, netlink)
        backend = await parts.make_backend(chosen, network, facing, netlink, Memory(places.state))
    except LodenError as error:
        yield Finding("backend", BLOCKED, str(error))
        return
    yield Finding("backend", OK, f"{network.backend.type} in {'userspace' if carrier == 'userspace' else 'the kernel'}")
    if carrier == "userspace":
        for finding in _of_tun():
            yield finding
    former = subnetfile.read_values(places.subnet_file).get("FLANNEL_MTU", str(backend.mtu))
    if former == str(backend.mtu):
        yield Finding("MTU", OK, f"{backend.mtu}, as in the subnet file")
    else:
        text = f"{backend.mtu}, and the subnet file says {former}: pods that are there keep theirs, new ones get this"
        yield Finding("MTU", DIFFERS, text)
    if isinstance(network.backend, netconf.VxlanConfig):
        ours = (f"flannel.{network.backend.vni}", f"flannel-v6.{network.backend.vni}")
        for link in links:
            if link.name in ours and link.kind == "vxlan":
                yield _of_vxlan_device(link.name, carrier)


def _of_vxlan_device(name: str, carrier: str) -> Finding:
    if carrier == "kernel":
        return Finding("device", OK, f"{name} is taken over with its MAC and entries: packets go on")
    return Finding("device", DIFFERS, f"{name} gives way to a TUN with its MAC: packets stop for that moment")


def _of_tun() -> Iterator[Finding]:
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
        yield Finding("kernel", OK, "/dev/net/tun can be opened")
    except OSError as error:
        text = f"/dev/net/tun: {error.strerror}; a userspace dataplane needs it: modprobe tun"
        yield Finding("kernel", BLOCKED, text)


async def _of_devices(network: NetworkConfig, netlink: Netlink, links: Sequence[Link]) -> AsyncIterator[Finding]:
    networks = [each for each in (network.network, network.ipv6_network) if each is not None]
    addresses = await netlink.addresses()
    names = {link.index: link.name for link in links}
    for link in links:
        if link.name.startswith("flannel"):
            yield Finding("device", OK, f"{link.name} ({link.kind or 'device'}), MTU {link.mtu}")
    for address in addresses:
        name = names.get(address.index, "")
        if any(address.interface.ip in each for each in networks) and name and not name.startswith("flannel"):
            yield Finding("device", OK, f"{name} has {address.interface}: a bridge or pod device, which is left alone")
