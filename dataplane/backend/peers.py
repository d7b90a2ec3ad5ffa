"""Owns what the other nodes' leases mean for a backend: who can be reached where, and who cannot, with the reason.

Free of: IO, and of how packets are carried. Invariant: where a MAC leads to one node only, as in the kernel's FDB, the
oldest of the leases that name it is obeyed, in whatever order they came; a lease that says nonsense is obeyed as it
last said something; whatever is not obeyed stands in `ignored`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from types import MappingProxyType

import msgspec

from dataplane.errors import LeaseForeign, LeaseInvalid
from dataplane.lease.model import Lease, LeaseEvent, LeaseEventKind

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

# what Go's net.ParseMAC takes for six bytes
_MAC = re.compile(
    r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}|(?:[0-9a-f]{2}-){5}[0-9a-f]{2}|(?:[0-9a-f]{4}\.){2}[0-9a-f]{4}",
    re.ASCII | re.IGNORECASE,
)

_DOCUMENT = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(frozen=True, slots=True)
class Peer:
    """A node that can be reached: its subnet, its outer address, and the MAC of its vxlan device (else empty)."""

    subnet: IPNetwork
    address: IPAddress
    mac: bytes = b""


class Peers:
    """The peers of one IP version: lease events in, changes of what can be reached out.

    `mac_of` gives the MAC that a lease names (empty for backends without) and raises LeaseInvalid, with the reason,
    for a lease that cannot be obeyed, LeaseForeign where nothing is wrong with it.
    """

    def __init__(
        self, version: int, mac_of: Callable[[Lease], bytes], *, outer: int = 0, shared_macs: bool = False
    ) -> None:
        """`outer`: the IP version of the underlay, where it is not that of the subnets. `shared_macs`: several nodes
        may have one MAC, as clones of a machine do: they are told apart by their subnets and addresses."""
        self._version = version
        self._outer = outer or version
        self._shared_macs = shared_macs
        self._mac_of = mac_of
        self._leases: dict[IPNetwork, tuple[Lease, bytes]] = {}
        self._claims: dict[bytes, set[IPNetwork]] = {}
        self._obeyed: dict[IPNetwork, Peer] = {}
        self._ignored: dict[IPNetwork, str] = {}
        self._kept: set[IPNetwork] = set()

    @property
    def obeyed(self) -> Mapping[IPNetwork, Peer]:
        """By subnet."""
        return MappingProxyType(self._obeyed)

    @property
    def ignored(self) -> Mapping[IPNetwork, str]:
        """Why a lease is not obeyed, by subnet."""
        return MappingProxyType(self._ignored)

    def follow(self, events: Iterable[LeaseEvent]) -> dict[IPNetwork, Peer | None]:
        """What changed, by subnet: the peer as it is now, or None where nobody is reached any more."""
        touched: set[IPNetwork] = set()
        for event in events:
            for subnet in event.lease.key.subnets:
                if subnet.version == self._version:
                    touched.add(subnet)
                    former = self._forget(subnet, touched)
                    if event.kind is not LeaseEventKind.REMOVED:
                        self._admit(subnet, event.lease, former, touched)
        changed: dict[IPNetwork, Peer | None] = {}
        for subnet in touched:
            peer = self._judge(subnet)
            if peer != self._obeyed.get(subnet):
                changed[subnet] = peer
                if peer is None:
                    del self._obeyed[subnet]
                else:
                    self._obeyed[subnet] = peer
        return changed

    def _forget(self, subnet: IPNetwork, touched: set[IPNetwork]) -> tuple[Lease, bytes] | None:
        """What was obeyed, or would be. Those who may gain by it are `touched`."""
        if self._kept:
            self._kept.discard(subnet)
        self._heed(subnet)
        former = self._leases.pop(subnet, None)
        if former is not None and (claimants := self._claims.get(former[1])) is not None:
            claimants.discard(subnet)
            touched |= claimants
            if not claimants:
                del self._claims[former[1]]
        return former

    def _admit(
        self, subnet: IPNetwork, lease: Lease, former: tuple[Lease, bytes] | None, touched: set[IPNetwork]
    ) -> None:
        """Those who may lose by it are `touched`."""
        try:
            mac = self._mac_of(lease)
            if _address(lease, self._outer) is None:
                raise LeaseForeign(f"it has a subnet {subnet} and no public IPv{self._outer} address")
        except LeaseInvalid as error:
            self._ignored[subnet] = str(error)
            if former is None or isinstance(error, LeaseForeign) or former[0].create_revision != lease.create_revision:
                return
            self._ignored[subnet] += "; what it said before stands"
            self._kept.add(subnet)
            lease, mac = former
        self._leases[subnet] = lease, mac
        if mac and not self._shared_macs:
            claimants = self._claims.setdefault(mac, set())
            claimants.add(subnet)
            touched |= claimants

    def _judge(self, subnet: IPNetwork) -> Peer | None:
        lease, mac = self._leases.get(subnet, (None, b""))
        address = None if lease is None else _address(lease, self._outer)
        if address is None:
            return None
        claimants = self._claims.get(mac)
        if claimants is not None and len(claimants) > 1:
            winner = min(claimants, key=self._age)
            if winner != subnet:
                self._kept.discard(subnet)
                self._ignored[subnet] = f"its VtepMAC {mac.hex(':')} is that of {winner}, which is the older lease"
                return None
        self._heed(subnet)
        return Peer(subnet, address, mac)

    def _heed(self, subnet: IPNetwork) -> None:
        # as a rule nobody is ignored: a subnet's hash is made anew each time, of which a storm makes many
        if self._ignored and subnet not in self._kept:
            self._ignored.pop(subnet, None)

    def _age(self, subnet: IPNetwork) -> tuple[int, str]:
        return self._leases[subnet][0].create_revision, str(subnet)


def _address(lease: Lease, version: int) -> IPAddress | None:
    """The outer address for that IP version; a node without IPv4 says 0.0.0.0."""
    if version == 6:
        return lease.attrs.public_ipv6
    return lease.attrs.public_ip if int(lease.attrs.public_ip) else None


def check_type(lease: Lease, *types: str) -> None:
    """Raises LeaseForeign where the lease's node carries by another backend than `types`, whose last is ours."""
    kind = lease.attrs.backend_type
    if kind not in types:
        raise LeaseForeign(f"its node uses backend {kind[:20] or 'udp or alloc'!r}, this one {types[-1]}")


def encode_vtep(vni: int, mac: bytes) -> bytes:
    """BackendData of a vxlan lease, as flannel writes it (facts 3.2)."""
    return msgspec.json.encode({"VNI": vni, "VtepMAC": mac.hex(":")})


def decode_vtep(data: bytes, vni: int, own_mac: bytes) -> bytes:
    """The MAC that BackendData names. Raises LeaseInvalid where it cannot be obeyed, also for another VNI than ours;
    flannel of old wrote none."""
    try:
        document = _DOCUMENT.decode(data)
        fields = {name.casefold(): msgspec.json.decode(value) for name, value in document.items()}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise LeaseInvalid("its BackendData is missing or no JSON object") from None
    theirs, text = fields.get("vni"), fields.get("vtepmac")
    if theirs is not None and theirs != vni:
        raise LeaseForeign(f"its VNI is {str(theirs)[:20]}, ours {vni}")
    if not isinstance(text, str) or _MAC.fullmatch(text) is None:
        raise LeaseInvalid("its BackendData has no VtepMAC, or one that is no MAC")
    mac = bytes.fromhex(re.sub("[-:.]", "", text))
    if not any(mac):
        raise LeaseInvalid("its VtepMAC is all zero")
    if mac[0] & 1:
        raise LeaseInvalid(f"its VtepMAC {mac.hex(':')} is a group address")
    if mac == own_mac:
        raise LeaseInvalid(f"its VtepMAC {mac.hex(':')} is that of this node's own device")
    return mac
