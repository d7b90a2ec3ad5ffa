"""Owns the network config: the JSON that an operator writes for a whole network, its rules, and how faults are shown.

Free of: IO and the question where the text came from (`origin` is an argument). Invariant: any bytes give a
NetworkConfig or a ConfigError that shows the place, never another exception.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from dataplane.errors import ConfigError
from dataplane.path.capability import Capability

UDP_PORT = 8285
"""Where flannel's udp backend listens unless Backend.Port says otherwise."""

MAX_BYTES = 65_536
"""A longer text is no network config: a real one has a few hundred bytes."""

BACKEND_TYPES = ("alloc", "extension", "host-gw", "ipip", "ipsec", "tencent-vpc", "udp", "vxlan", "wireguard")
"""Every type that flannel knows (pkg/backend/manager.go)."""

_FIELDS = (
    *("EnableIPv4", "EnableIPv6", "EnableNFTables", "Backend"),
    *("Network", "SubnetLen", "SubnetMin", "SubnetMax"),
    *("IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax"),
)
_SWITCHES = {
    "UDPSegment": Capability.UDP_SEGMENT,
    "UDPGRO": Capability.UDP_GRO,
    "TunTSO": Capability.TUN_TSO,
    "TunUSO": Capability.TUN_USO,
}
_UDP_FIELDS = ("Type", "Port", *_SWITCHES)
_WIDTH = 100
"""Most characters of a faulty line that are shown."""

# The parts of a text that is known to be JSON: a string, a mark, or a number or word
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:,]|[^\s"{}\[\]:,]+')
_KINDS = {'"': "a string", "{": "an object", "[": "an array", "t": "a boolean", "f": "a boolean"}

_T = TypeVar("_T")
_Net = TypeVar("_Net", bound=IPv4Network | IPv6Network)
_Addr = TypeVar("_Addr", bound=IPv4Address | IPv6Address)


@dataclass(frozen=True, slots=True)
class UdpConfig:
    """Options of the udp backend. `switched_off`: capabilities that no node of this network uses (our own members
    `UDPSegment`, `UDPGRO`, `TunTSO`, `TunUSO`; flannel ignores them)."""

    type: ClassVar[str] = "udp"
    port: int = UDP_PORT
    switched_off: frozenset[Capability] = frozenset()


@dataclass(frozen=True, slots=True)
class ForeignConfig:
    """Another backend that flannel knows: its type in lower case, and the members of Backend as they stand."""

    type: str
    options: Mapping[str, Any]


BackendConfig = UdpConfig | ForeignConfig


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """One network. `subnet_min` and `subnet_max` are the first and last subnet that may be leased, both inclusive.

    Of a family that is off, the addresses are None and the length is 0. `warnings`: what flannel would ignore in
    silence, a sentence each.
    """

    enable_ipv4: bool
    enable_ipv6: bool
    enable_nftables: bool
    network: IPv4Network | None
    subnet_len: int
    subnet_min: IPv4Address | None
    subnet_max: IPv4Address | None
    ipv6_network: IPv6Network | None
    ipv6_subnet_len: int
    ipv6_subnet_min: IPv6Address | None
    ipv6_subnet_max: IPv6Address | None
    backend: BackendConfig
    warnings: tuple[str, ...] = ()


def parse(text: bytes, *, origin: str) -> NetworkConfig:
    """Read and check a network config; `origin` is the file or key that errors name. Raises ConfigError.

    Follows Go's decoder (names in any case, unknown ones ignored, null is unset) and flannel's rules with its
    texts, and demands Min <= Max besides (facts 2; pkg/subnet/config.go).
    """
    document = _Object(_Source.of(text, origin), 0, _FIELDS)
    enable_ipv4 = document.boolean("EnableIPv4", default=True)
    enable_ipv6 = document.boolean("EnableIPv6", default=False)
    enable_nftables = document.boolean("EnableNFTables", default=False)
    backend, warnings = _backend(document)
    v4 = _range(document, _V4, enable_ipv4)
    v6 = _range(document, _V6, enable_ipv6)
    if not enable_ipv4 and not enable_ipv6:
        raise document.fault("EnableIPv4", "none defined stack: EnableIPv4 and EnableIPv6 are both false")
    return NetworkConfig(
        enable_ipv4, enable_ipv6, enable_nftables, *v4, *v6, backend=backend, warnings=(*document.warnings, *warnings)
    )


def _backend(document: _Object) -> tuple[BackendConfig, list[str]]:
    place = document.object("Backend")
    if place is None:
        return UdpConfig(), []
    options = _Object(document.source, place, _UDP_FIELDS)
    word = options.string("Type") or ""
    kind = word.lower()
    if kind not in BACKEND_TYPES:
        hint = _did_you_mean(_nearest(kind, BACKEND_TYPES)) or f" (known: {', '.join(BACKEND_TYPES)})"
        raise options.fault("Type", f"unknown backend type: {word}{hint}")
    if kind != "udp":
        return ForeignConfig(kind, options.everything()), []
    port = options.whole_number("Port", default=UDP_PORT)
    if not 1 <= port <= 65535:
        raise options.fault("Port", f"Backend.Port {port} is no UDP port: use 1 to 65535")
    off = frozenset(what for name, what in _SWITCHES.items() if not options.boolean(name, default=True))
    return UdpConfig(port, off), options.warnings


@dataclass(frozen=True, slots=True)
class _Family(Generic[_Net, _Addr]):
    """What differs between the rules for IPv4 and IPv6. `usual_len`: flannel's subnet where the network is large."""

    prefix: str
    subject: str
    bits: int
    usual_len: int
    network: Callable[[tuple[str, int]], _Net]
    address: Callable[[str | int], _Addr]
    example: str

    def parse_network(self, text: str) -> _Net | None:
        """As Go's net.ParseCIDR, where Python would also take a bare address, a netmask or a zone."""
        match = re.fullmatch(r"([^/%]+)/(\d{1,3})", text, re.ASCII)
        return None if match is None else self.network((match[1], int(match[2])))


_V4 = _Family("", "network", 32, 24, lambda pair: IPv4Network(pair, strict=False), IPv4Address, "10.244.0.0/16")
_V6 = _Family("IPv6", "IPv6Network", 128, 64, lambda pair: IPv6Network(pair, strict=False), IPv6Address, "fd00::/48")


def _range(
    document: _Object, family: _Family[_Net, _Addr], enabled: bool
) -> tuple[_Net | None, int, _Addr | None, _Addr | None]:
    """One family's network, subnet length, first and last subnet, by CheckNetworkConfig in its order."""
    names = [family.prefix + name for name in ("Network", "SubnetLen", "SubnetMin", "SubnetMax")]
    network = document.parsed(names[0], family.parse_network, f"invalid CIDR address, use one such as {family.example}")
    length = document.whole_number(names[1], default=0)
    first, last = (document.parsed(name, _unscoped(family.address), "invalid IP address") for name in names[2:])
    if not enabled:
        return None, 0, None, None
    # flannel takes an all-zero value for one that was not given
    if network is None or (int(network.network_address) == 0 and network.prefixlen == 0):
        raise document.fault(names[0], f"please define a correct {names[0]} parameter in the flannel config")
    length = _subnet_len(document, family, names, network, length)
    size = 1 << (family.bits - length)
    if not first or int(first) == 0:
        # the first subnet holds the network's own address, so flannel never leases it unasked
        first = family.address(int(network.network_address) + size)
    if not last or int(last) == 0:
        last = family.address(int(network.broadcast_address) + 1 - size)
    for name, bound in zip(names[2:], (first, last), strict=True):
        if bound not in network:
            raise document.fault(name, f"{name} is not in the range of the {names[0]}")
    for name, bound in zip(names[2:], (first, last), strict=True):
        if int(bound) % size:
            raise document.fault(name, f"{name} is not on a SubnetLen boundary: {bound}")
    if int(first) > int(last):
        raise document.fault(names[2], f"{names[2]} {first} lies above {names[3]} {last}: no subnet is left")
    return network, length, first, last


def _subnet_len(
    document: _Object, family: _Family[_Net, _Addr], names: list[str], network: _Net, given: int
) -> int:
    if given > family.bits - 2:
        raise document.fault(names[1], f"SubnetLen must be less than /{family.bits - 1}")
    if given:
        if given < network.prefixlen + 2:
            raise document.fault(names[1], "network must be able to accommodate at least four subnets")
        return given
    if network.prefixlen > family.bits - 4:
        text = f"{family.subject} is too small. Minimum useful network prefix is /{family.bits - 4}"
        raise document.fault(names[0], text)
    return max(family.usual_len, network.prefixlen + 2)


def _unscoped(address: Callable[[str | int], _Addr]) -> Callable[[str], _Addr | None]:
    return lambda text: None if "%" in text else address(text)


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of an object, by offsets into the text: its key, and its value from start to end."""

    name: str
    key_at: int
    start: int
    end: int


class _Object:
    """One JSON object whose members are looked up as Go does, and which knows where each stands."""

    def __init__(self, source: _Source, start: int, known: Iterable[str]) -> None:
        self.source = source
        self.start, self.members = source.members(start)
        self.warnings: list[str] = []
        self._known: dict[str, _Member] = {}
        self._near_misses: dict[str, _Member] = {}
        folded = {name.casefold(): name for name in known}
        for member in self.members:
            name = folded.get(member.name.casefold())
            if name is None:
                near = _nearest(member.name, folded.values())
                if near is not None:
                    self._near_misses[near] = member
                self._warn(member, f"is no known key and is ignored{_did_you_mean(near)}")
                continue
            if name in self._known:
                self._warn(member, "stands here for the second time: the last one counts")
            if source.text[member.start : member.end] != "null":
                self._known[name] = member

    def _warn(self, member: _Member, message: str) -> None:
        self.warnings.append(f"{self.source.place(member.key_at)}: {_shown(member.name)} {message}")

    def fault(self, name: str, message: str) -> ConfigError:
        """An error at a member's value; where it is missing, at a key that looks like it or at the object."""
        if name in self._known:
            return self.source.fault(self._known[name].start, message)
        near = self._near_misses.get(name)
        if near is None:
            return self.source.fault(self.start, message)
        return self.source.fault(near.key_at, message + _did_you_mean(name))

    def boolean(self, name: str, *, default: bool) -> bool:
        value: bool | None = self._value(name, bool, "a boolean")
        return default if value is None else value

    def whole_number(self, name: str, *, default: int) -> int:
        value: int | None = self._value(name, int, "a whole number")
        if value is not None and value < 0:
            raise self.fault(name, f"{name} must not be negative")
        return default if value is None else value

    def string(self, name: str) -> str | None:
        value: str | None = self._value(name, str, "a string")
        return value

    def object(self, name: str) -> int | None:
        """The offset of a member that is an object."""
        member = self._known.get(name)
        if member is not None and self.source.text[member.start] != "{":
            kind = self.source.kind(member.start)
            raise self.fault(name, f"error decoding {name} property of config: it must be an object, not {kind}")
        return None if member is None else member.start

    def parsed(self, name: str, read: Callable[[str], _T | None], complaint: str) -> _T | None:
        """What `read` makes of a string; None or ValueError from it is a fault with this complaint."""
        text = self.string(name)
        if text is None:
            return None
        try:
            value = read(text)
        except ValueError:
            value = None
        if value is None:
            raise self.fault(name, f"{name} {_shown(text)}: {complaint}")
        return value

    def everything(self) -> dict[str, Any]:
        """Every member as it stands, for a backend that reads its own options."""
        return {member.name: self.source.decode(member.start, member.end) for member in self.members}

    def _value(self, name: str, kind: type[bool | int | str], wanted: str) -> Any:
        member = self._known.get(name)
        if member is None:
            return None
        try:
            return msgspec.json.decode(self.source.text[member.start : member.end], type=kind)
        except (msgspec.DecodeError, RecursionError):
            raise self.fault(name, f"{name} must be {wanted}, not {self.source.kind(member.start)}") from None


@dataclass(frozen=True, slots=True)
class _Source:
    """A text that is JSON, and how a place in it is shown. Offsets count characters."""

    text: str
    origin: str

    @classmethod
    def of(cls, raw: bytes, origin: str) -> _Source:
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"{origin}: this is no network config: {len(raw)} bytes, more than {MAX_BYTES}")
        source = cls(raw.decode(errors="replace"), origin)
        if raw.startswith(b"\xef\xbb\xbf"):
            raise source.fault(0, "a byte order mark stands before the JSON: save it as UTF-8 without one")
        try:
            raw.decode()
            msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        except UnicodeDecodeError as error:
            raise source.fault(len(raw[: error.start].decode()), "this is not UTF-8") from None
        except RecursionError:
            raise source.fault(0, "the JSON is nested too deeply") from None
        except msgspec.ValidationError:
            start = len(source.text) - len(source.text.lstrip())
            raise source.fault(start, f"a network config is a JSON object, not {source.kind(start)}") from None
        except msgspec.DecodeError as error:
            match = re.fullmatch(r"JSON is malformed: (.*) \(byte (\d+)\)", str(error))
            if match is None:
                raise source.fault(len(source.text.rstrip()), "the JSON ends too early") from None
            # msgspec counts one too far where the text goes on behind the document
            offset = int(match[2]) - (match[1] == "trailing characters")
            at = len(raw[:offset].decode(errors="ignore"))
            raise source.fault(at, f"this is not JSON: {match[1]}") from None
        return source

    def members(self, start: int) -> tuple[int, list[_Member]]:
        """The members of the object that opens at or behind `start`, and where it opens."""
        found: list[_Member] = []
        tokens = _TOKEN.finditer(self.text, start)
        opening = next(tokens).start()
        depth, key, begin, end = 1, None, -1, -1
        for token in tokens:
            mark = token[0]
            if depth == 1 and mark in ",}":
                if key is not None:
                    name: str = msgspec.json.decode(key[0], type=str)
                    found.append(_Member(name, key.start(), begin, end))
                key, begin = None, -1
            elif depth == 1 and key is None:
                key = token
            elif begin < 0 and mark != ":":
                begin = token.start()
            depth += (mark in "{[") - (mark in "}]")
            end = token.end()
            if depth == 0:
                break
        return opening, found

    def decode(self, start: int, end: int) -> Any:
        try:
            return msgspec.json.decode(self.text[start:end])
        except (msgspec.DecodeError, RecursionError) as error:
            raise self.fault(start, f"this value cannot be read: {error}") from None

    def kind(self, at: int) -> str:
        return _KINDS.get(self.text[at : at + 1], "null" if self.text.startswith("null", at) else "a number")

    def place(self, at: int) -> str:
        line, column = self.text.count("\n", 0, at) + 1, at - self.text.rfind("\n", 0, at)
        return f"{self.origin}, line {line}, column {column}"

    def fault(self, at: int, message: str) -> ConfigError:
        """The error for a place: where, what, then the line itself with a caret under the place."""
        begin = self.text.rfind("\n", 0, at) + 1
        end = self.text.find("\n", at)
        line = self.text[begin : len(self.text) if end < 0 else end]
        cut = max(0, at - begin - _WIDTH * 3 // 4)
        # one column a character, whatever it is, so that the caret stands right
        shown = "".join(c if c.isprintable() else " " for c in line[cut : cut + _WIDTH])
        return ConfigError(f"{self.place(at)}: {message}\n{shown}\n{' ' * (at - begin - cut)}^")


def _nearest(word: str, known: Iterable[str]) -> str | None:
    by_folded = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word[:_WIDTH].casefold(), by_folded, n=1, cutoff=0.7)
    return by_folded[near[0]] if near else None


def _did_you_mean(near: str | None) -> str:
    return "" if near is None else f'; did you mean "{near}"?'


def _shown(word: str) -> str:
    """A word from the text, quoted and cut to a sane length."""
    return f'"{word}"' if len(word) <= _WIDTH else f'"{word[:_WIDTH]}"...'
