"""Owns what a lease is: its key, its value byte for byte as flannel writes it, and the events about it.

Free of: IO, clocks, stores. Invariant: `LeaseKey.parse(str(key)) == key`, and
`LeaseAttrs.decode(attrs.encode()) == attrs`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network

import msgspec

from dataplane.errors import LeaseInvalid

LEASE_TTL = 86_400
"""Seconds for which flannel asks a lease (pkg/subnet/etcd/local_manager.go)."""

MAX_VALUE_BYTES = 4096
"""A lease value longer than this is hostile or broken; flannel's are under 300 bytes."""

NO_IPV4 = IPv4Network("0.0.0.0/0")
"""What a key has for IPv4 where a node leases IPv6 alone: flannel's key begins with an IPv4 subnet in any case."""

_KEY = re.compile(r"(\d{1,3}(?:\.\d{1,3}){3})-(\d{1,2})(?:&([0-9a-f:.]+)-(\d{1,3}))?", re.ASCII)
_FIELDS = ("PublicIP", "PublicIPv6", "BackendType", "BackendData", "BackendV6Data")
_BY_FOLDED_NAME = {name.casefold(): name for name in _FIELDS}
_PROPER_NAMES = frozenset(_FIELDS)
_DOCUMENT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TEXT: msgspec.json.Decoder[str | None] = msgspec.json.Decoder(str | None)


@dataclass(frozen=True, slots=True)
class LeaseKey:
    """The subnet that a lease is about; its text is the last part of flannel's key.

    `10.5.52.0-24`, or `10.5.52.0-24&fd00:5:52::-64` for two families (pkg/subnet/subnet.go), or
    `0.0.0.0-0&fd00:5:52::-64` for IPv6 alone.
    """

    subnet: IPv4Network
    subnet_v6: IPv6Network | None = None

    def __str__(self) -> str:
        text = str(self.subnet).replace("/", "-")
        return text if self.subnet_v6 is None else f"{text}&{str(self.subnet_v6).replace('/', '-')}"

    @classmethod
    @lru_cache(maxsize=16_384)  # a start reads every key twice: to choose a subnet, and to follow the others
    def parse(cls, text: str) -> LeaseKey:
        """Read the last part of a key; host bits are cut off. Raises LeaseInvalid."""
        match = _KEY.fullmatch(text)
        if match is None:
            raise LeaseInvalid(f"key {_short(text)} is not of the form 10.5.52.0-24")
        v4, v4_len, v6, v6_len = match.groups()
        try:
            # flannel's own limits: 5 bits for the IPv4 length, 7 for the IPv6 length
            if int(v4_len) > 31 or (v6_len is not None and int(v6_len) > 127):
                raise ValueError("prefix length out of range")
            subnet = IPv4Network((v4, int(v4_len)), strict=False)
            subnet_v6 = None if v6 is None else IPv6Network((v6, int(v6_len)), strict=False)
        except ValueError as error:
            raise LeaseInvalid(f"key {_short(text)}: {error}") from None
        return cls(subnet, subnet_v6)

    @property
    def subnets(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """What the key really leases: an IPv4 subnet, an IPv6 one, or both; NO_IPV4 is no subnet."""
        v4 = (self.subnet,) if self.subnet.prefixlen else ()
        return v4 if self.subnet_v6 is None else (*v4, self.subnet_v6)

    def overlaps(self, other: LeaseKey) -> bool:
        """Whether some address belongs to both."""
        return any(_overlap(one, two) for one in self.subnets for two in other.subnets if one.version == two.version)

    def within(self, *, ipv4: bool, ipv6: bool) -> LeaseKey:
        """The same without the families that are off."""
        if ipv4 and (ipv6 or self.subnet_v6 is None):
            return self
        return LeaseKey(self.subnet if ipv4 else NO_IPV4, self.subnet_v6 if ipv6 else None)


@dataclass(frozen=True, slots=True)
class LeaseAttrs:
    """What a node says of itself in its lease: where it is reached and by which backend.

    `backend_data` and `backend_v6_data` are raw JSON, empty where there is none. A node without an IPv4 address has
    0.0.0.0 as its `public_ip`.
    """

    public_ip: IPv4Address
    public_ipv6: IPv6Address | None = None
    backend_type: str = ""
    backend_data: bytes = b""
    backend_v6_data: bytes = b""

    @property
    def node(self) -> IPv4Address | IPv6Address:
        """The address by which a node is told from others, and named in logs."""
        if self.public_ip.is_unspecified and self.public_ipv6 is not None:
            return self.public_ipv6
        return self.public_ip

    def is_at(self, public_ip: IPv4Address, public_ipv6: IPv6Address | None) -> bool:
        """Whether the node has these addresses. IPv4 decides, as with flannel, and IPv6 where either side has none:
        else every node without IPv4 would be the same one (facts 3.8)."""
        if not self.public_ip.is_unspecified and not public_ip.is_unspecified:
            return self.public_ip == public_ip
        return self.public_ipv6 is not None and self.public_ipv6 == public_ipv6

    def encode(self) -> bytes:
        """The value as flannel writes it: its order of fields, no blanks, empty ones left out (facts 3.2)."""
        fields: dict[str, object] = {
            "PublicIP": str(self.public_ip),
            "PublicIPv6": None if self.public_ipv6 is None else str(self.public_ipv6),
        }
        if self.backend_type:
            fields["BackendType"] = self.backend_type
        if self.backend_data:
            fields["BackendData"] = msgspec.Raw(self.backend_data)
        if self.backend_v6_data:
            fields["BackendV6Data"] = msgspec.Raw(self.backend_v6_data)
        return msgspec.json.encode(fields)

    @classmethod
    def decode(cls, value: bytes) -> LeaseAttrs:
        """Read a value as Go's decoder would: names in any case, unknown ones ignored. Raises LeaseInvalid."""
        if len(value) > MAX_VALUE_BYTES:
            raise LeaseInvalid(f"value has {len(value)} bytes, more than {MAX_VALUE_BYTES}")
        try:
            fields = _fields(value)
            public_ip = _text(fields, "PublicIP")
            public_ipv6 = _text(fields, "PublicIPv6")
            backend_type = _text(fields, "BackendType")
            if public_ip is None:
                raise LeaseInvalid("value has no PublicIP")
            return cls(
                public_ip=IPv4Address(public_ip),
                public_ipv6=_ipv6(public_ipv6) if public_ipv6 else None,
                backend_type=backend_type or "",
                backend_data=_raw(fields, "BackendData"),
                backend_v6_data=_raw(fields, "BackendV6Data"),
            )
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise LeaseInvalid(f"value is not the JSON of a lease: {error}") from None
        except AddressValueError as error:
            raise LeaseInvalid(f"value has a bad address: {error}") from None


def _fields(value: bytes) -> dict[str, msgspec.Raw]:
    """Our fields by their proper names. Of two spellings of one name the later in the text counts, as in Go."""
    document = _DOCUMENT.decode(value)
    if document.keys() <= _PROPER_NAMES:
        return document
    spellings = [name for name in document if name.casefold() in _BY_FOLDED_NAME]
    if len({name.casefold() for name in spellings}) < len(spellings):
        # a dict keeps a repeated name at its first place, so the text's own order has to be read again
        pairs: list[tuple[str, object]] = json.loads(value, object_pairs_hook=list)
        spellings = [name for name, _ in pairs if name.casefold() in _BY_FOLDED_NAME]
    return {_BY_FOLDED_NAME[name.casefold()]: document[name] for name in spellings}


def _overlap(one: IPv4Network | IPv6Network, two: IPv4Network | IPv6Network) -> bool:
    """Of two blocks that share an address one holds the other's first. (`overlaps` of ipaddress makes and keeps the
    last address of each, of which ten thousand leases have as many.)"""
    return one.network_address in two or two.network_address in one


def _ipv6(text: str) -> IPv6Address:
    address = IPv6Address(text)
    if address.scope_id is not None:
        raise AddressValueError(f"a zone is not allowed in {text!r}")
    return address


def _short(text: str) -> str:
    """A key as an error may show it: one line, and no longer than a line, whatever is in the store."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _text(fields: dict[str, msgspec.Raw], name: str) -> str | None:
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return _TEXT.decode(raw)
    except msgspec.DecodeError as error:
        raise LeaseInvalid(f"value has a bad {name}: {error}") from None


def _raw(fields: dict[str, msgspec.Raw], name: str) -> bytes:
    raw = bytes(fields.get(name, b""))
    return b"" if raw == b"null" else raw


@dataclass(frozen=True, slots=True)
class Lease:
    """One subnet held by one node. `reserved`: it has no TTL, so it never expires (facts 3.6)."""

    key: LeaseKey
    attrs: LeaseAttrs
    create_revision: int
    mod_revision: int
    reserved: bool = False


class LeaseEventKind(Enum):
    ADDED = "added"
    CHANGED = "changed"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class LeaseEvent:
    """A peer's lease appeared, changed in content, or is gone. `previous` stands for CHANGED only."""

    kind: LeaseEventKind
    lease: Lease
    previous: Lease | None = None
