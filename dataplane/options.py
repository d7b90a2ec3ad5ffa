"""Owns every flag: one table that is also the record of their values, Go's flag syntax, FLANNELD_* variables, help.

Free of: IO, the process environment (it is an argument), printing and exiting. Invariant: a flag stands once, as a
field of `Options`; its name, kind, default, help, group and whether it is built yet all come from that field.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from dataplane.errors import ConfigError
from dataplane.path.capability import Capability
from dataplane.patterns import compile_go

FLANNEL = "flannel's flags"
OWN = "Loden's own"
DEFAULT_SUBNET_FILE = "/run/flannel/subnet.env"
SOURCE_CHECKS = ("strict", "node", "off")
LOG_FORMATS = ("text", "json")
VXLAN_DATAPLANES = ("", "kernel", "userspace", "auto")

# strconv.ParseInt with base 0: a leading 0 means octal, and "_" stands only between digits or behind a base prefix
_GO_INT = re.compile(
    r"([+-]?)(?:0[xX]((?:_?[0-9a-fA-F])+)|0[bB]((?:_?[01])+)|0[oO]((?:_?[0-7])+)|(0(?:_?[0-7])*)|([1-9](?:_?[0-9])*))"
)
_GO_BOOL = {
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}


def _flag(
    default: object, text: str, *, name: str = "", group: str = FLANNEL, built: bool = True, commas: bool = False
) -> Any:  # Any: the same trick as dataclasses.field, whose result stands in for a value of the field's type
    """A field of Options. `commas`: one string that is split, where other tuples are repeatable flags.

    `built=False`: of Kubernetes, so only the default and "switched off" are accepted so far.
    """
    metadata = {"help": text, "name": name, "group": group, "built": built, "commas": commas}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Options:
    """The value of every flag (flannel's main.go at v0.28; facts 1.2), and what parsing had to say.

    `help`: -h or -help was met, where parsing stops. `warnings`: environment variables that were refused.
    """

    etcd_endpoints: tuple[str, ...] = _flag(
        ("http://127.0.0.1:4001", "http://127.0.0.1:2379"), "etcd endpoints, separated by commas", commas=True
    )
    etcd_prefix: str = _flag("/coreos.com/network", "prefix of all keys in etcd; one for each network")
    etcd_keyfile: str = _flag("", "private key for TLS to etcd")
    etcd_certfile: str = _flag("", "client certificate for TLS to etcd")
    etcd_cafile: str = _flag("", "certificate authority that etcd's certificate must come from")
    etcd_username: str = _flag("", "user name at etcd")
    etcd_password: str = _flag("", "password at etcd; FLANNELD_ETCD_PASSWORD keeps it out of the process list")
    iface: tuple[str, ...] = _flag((), "underlay interface, by name or address; repeatable, the first hit wins")
    iface_regex: tuple[str, ...] = _flag((), "pattern (RE2) for the underlay interface's address or name; repeatable")
    iface_can_reach: str = _flag("", "use the interface from which this address is reached")
    subnet_file: str = _flag(DEFAULT_SUBNET_FILE, "file for this node's subnet; other files go beside it")
    public_ip: str = _flag("", "IPv4 address at which other nodes reach this one (default: the interface's)")
    public_ipv6: str = _flag("", "IPv6 address at which other nodes reach this one")
    subnet_lease_renew_margin: int = _flag(60, "minutes before its end at which the lease is renewed, 1 to 1439")
    ip_masq: bool = _flag(False, "masquerade traffic that leaves the overlay")
    ip_masq_fully_random_disable: bool = _flag(False, "masquerade without random source ports")
    kube_subnet_mgr: bool = _flag(False, "take leases from Kubernetes instead of etcd", built=False)
    kube_api_url: str = _flag("", "Kubernetes API server", built=False)
    kube_annotation_prefix: str = _flag("flannel.alpha.coreos.com", "prefix of node annotations", built=False)
    kubeconfig_file: str = _flag("", "kubeconfig for the Kubernetes API server", built=False)
    version: bool = _flag(False, "print the version and exit")
    healthz_ip: str = _flag("0.0.0.0", "address of the health server")
    healthz_port: int = _flag(0, "port of the health server, 0 for none")
    iptables_resync: int = _flag(5, "seconds between two looks at the firewall rules")
    iptables_forward_rules: bool = _flag(True, "accept forwarded traffic from and to the overlay in the firewall")
    ip_blackhole_route: bool = _flag(False, "keep a blackhole route for this node's subnet")
    net_config_path: str = _flag("/etc/kube-flannel/net-conf.json", "network config in Kubernetes mode", built=False)
    set_node_network_unavailable: bool = _flag(True, "report the node's network to Kubernetes when ready", built=False)
    v: int = _flag(0, "verbosity of the log; 1 and above show debug lines")
    vmodule: str = _flag("", "verbosity by source file, as in keeper=1,kernel*=1")
    log_backtrace_at: str = _flag("", "log a stack trace at file:line", name="log_backtrace_at")

    lease_store: str = _flag("", "where leases live: sqlite:///absolute/path, or empty for etcd", group=OWN)
    control_socket: str = _flag("", "Unix socket for the loden command; empty: beside the subnet file", group=OWN)
    metrics_port: int = _flag(0, "port for Prometheus' /metrics; 0: with the health pages", group=OWN)
    source_check: str = _flag(
        "node", "inner sources a peer may use: strict (its subnet), node (its own address too), off", group=OWN
    )
    udp_segment: bool = _flag(True, "let the kernel cut runs of datagrams (UDP_SEGMENT)", group=OWN)
    udp_gro: bool = _flag(True, "let the kernel hand over several datagrams as one (UDP_GRO)", group=OWN)
    tun_tso: bool = _flag(True, "pass TCP superframes through the TUN", group=OWN)
    tun_uso: bool = _flag(True, "pass UDP superframes through the TUN", group=OWN)
    spin: int = _flag(200, "microseconds for which a pump looks again before it sleeps, 0 to 10000", group=OWN)
    moderation: int = _flag(
        150, "microseconds for which a busy pump lets packets gather once it has none left, 0 to 1000", group=OWN
    )
    queues: int = _flag(1, "queues of a userspace device, each with two pumps and a socket, 1 to 16", group=OWN)
    vxlan_dataplane: str = _flag(
        "",
        "who carries vxlan: kernel, userspace (this daemon), auto (userspace where the kernel has no vxlan); default:"
        " what Backend.Dataplane of the net-conf says, else kernel",
        group=OWN,
    )
    log_format: str = _flag("text", "how log lines look: text (klog's) or json", group=OWN)
    vxlan_source_ports: int = _flag(8, "UDP ports by which a node's VXLAN flows leave, 1 to 64", group=OWN)
    cleanup: bool = _flag(False, "remove what a former daemon left on this node, then exit", group=OWN)

    help: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def switched_off(self) -> frozenset[Capability]:
        """The capabilities that flags forbid; the net-conf may forbid more."""
        return frozenset(capability for capability in Capability if not getattr(self, capability.name.lower()))


@dataclass(frozen=True, slots=True)
class Flag:
    """One row of the table, derived from a field of Options."""

    name: str
    attribute: str
    default: Any
    help: str
    group: str
    built: bool
    commas: bool

    @classmethod
    def of(cls, row: Field[Any]) -> Flag:
        meta = row.metadata
        name = meta["name"] or row.name.replace("_", "-")
        return cls(name, row.name, row.default, meta["help"], meta["group"], meta["built"], meta["commas"])

    @property
    def boolean(self) -> bool:
        return isinstance(self.default, bool)

    @property
    def repeatable(self) -> bool:
        return isinstance(self.default, tuple) and not self.commas

    @property
    def variable(self) -> str:
        """Its name in the environment (coreos/pkg flagutil)."""
        return "FLANNELD_" + re.sub("[-.]", "_", self.name).upper()

    def read(self, word: str) -> Any:
        """The value that a word stands for; one item of a repeatable flag. Raises ValueError with Go's reason."""
        if self.commas:
            return tuple(word.split(","))
        if self.boolean:
            if word not in _GO_BOOL:
                raise ValueError("parse error")
            return _GO_BOOL[word]
        return _go_int(word) if isinstance(self.default, int) else word


FLAGS: Mapping[str, Flag] = {flag.name: flag for flag in (Flag.of(row) for row in fields(Options) if row.metadata)}
"""The table by flag name, in the order of Options."""


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """Read the words after the program's name, then the environment, by Go's `flag` rules (facts 1.1, 1.3).

    Raises ConfigError with Go's texts. A word that is no flag is an error here: Go would end parsing there, and
    every flag behind it would be ignored in silence.
    """
    values: dict[str, Any] = {}
    rest = list(argv)
    while rest and len(rest[0]) > 1 and rest[0].startswith("-"):
        word = rest.pop(0)
        if word == "--":
            break
        name, given = _split(word)
        if name in ("h", "help"):
            return Options(**values, help=True)
        flag = FLAGS.get(name)
        if flag is None:
            raise ConfigError(f"flag provided but not defined: -{name}{_did_you_mean(name)}")
        if given is None:
            if not flag.boolean and not rest:
                raise ConfigError(f"flag needs an argument: -{name}")
            given = "true" if flag.boolean else rest.pop(0)
        _take_word(flag, given, values)
    if rest:
        raise ConfigError(
            f"unexpected word {_quoted(rest[0])}: only flags are understood, and whatever follows a word would be"
            " ignored; a boolean flag takes its value with =, as in -ip-masq=false"
        )
    if values.get("version"):
        return Options(**values)
    warnings = _read_environment(environ, values)
    return Options(**values, warnings=tuple(warnings))


def _split(word: str) -> tuple[str, str | None]:
    """A flag's word as name, and the value if one stands in it."""
    body = word[2:] if word.startswith("--") else word[1:]
    if not body or body[0] in "-=":
        raise ConfigError(f"bad flag syntax: {word}")
    name, equals, given = body.partition("=")
    return name, given if equals else None


def _take_word(flag: Flag, word: str, values: dict[str, Any]) -> None:
    try:
        _take(flag, word, values)
    except ValueError as error:
        # Go's two texts differ in more than the kind
        place = f"boolean value {_quoted(word)} for" if flag.boolean else f"value {_quoted(word)} for flag"
        raise ConfigError(f"invalid {place} -{flag.name}: {error}") from None


def _take(flag: Flag, word: str, values: dict[str, Any]) -> None:
    value = flag.read(word)
    values[flag.attribute] = (*values.get(flag.attribute, ()), value) if flag.repeatable else value


def _read_environment(environ: Mapping[str, str], values: dict[str, Any]) -> list[str]:
    """Fill in what the command line left open. Flannel goes on after a bad variable, so it is only a warning."""
    warnings = []
    for flag in FLAGS.values():
        word = environ.get(flag.variable, "")
        # flannel has looked at -version before it reads the environment
        if not word or flag.attribute in values or flag.name == "version":
            continue
        try:
            _take(flag, word, values)
        except ValueError as error:
            warnings.append(
                f"Failed to set flag FLANNELD from env: invalid value {_quoted(word)} for {flag.variable}: {error}"
            )
    return warnings


def _go_int(word: str) -> int:
    match = _GO_INT.fullmatch(word)
    if match is None:
        raise ValueError("parse error")
    sign, *digits = match.groups()
    bases = (16, 2, 8, 8, 10)
    # Python limits how many digits int() reads; 64 bits have 64 at most, and leading zeros count for nothing
    text, base = next((d.replace("_", "").lstrip("0"), b) for d, b in zip(digits, bases, strict=True) if d is not None)
    number = int(text or "0", base) if len(text) <= 64 else 1 << 64
    number = -number if sign == "-" else number
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError("value out of range")
    return number


def _quoted(word: str) -> str:
    return json.dumps(word, ensure_ascii=False)


def _did_you_mean(name: str) -> str:
    near = difflib.get_close_matches(name, [*FLAGS, "help"], n=1, cutoff=0.7)
    return f"; did you mean -{near[0]}?" if near else ""


def usage(program: str) -> str:
    """The help text: every flag with its kind and default as Go prints them, ours in a group at the end."""
    lines = [f"Usage: {program} [OPTION]...", "", "One dash or two; or by environment: FLANNELD_V=1."]
    for group in (FLANNEL, OWN):
        lines += ["", f"{group}:"]
        for flag in sorted(FLAGS.values(), key=lambda flag: flag.name):
            if flag.group == group:
                lines += _usage_of(flag)
    return "\n".join(lines) + "\n"


def _usage_of(flag: Flag) -> list[str]:
    kind = " int" if isinstance(flag.default, int) else " list" if flag.repeatable else " string"
    text = flag.help if flag.built else f"{flag.help} [not built yet]"
    default = ",".join(flag.default) if flag.commas else flag.default
    if default:  # Go leaves a zero value out
        shown = str(default).lower() if flag.boolean else _quoted(default) if isinstance(default, str) else default
        text += f" (default {shown})"
    return [f"  -{flag.name}{'' if flag.boolean else kind}", f"    \t{text}"]


def check(options: Options) -> None:
    """Refuse values that cannot work, then whatever asks for a part that is not built yet. Raises ConfigError."""
    if not 1 <= options.subnet_lease_renew_margin <= 1439:
        raise ConfigError(
            f"invalid -subnet-lease-renew-margin {options.subnet_lease_renew_margin}: it is in minutes, from 1 to 1439,"
            " since a lease lasts 24 hours"
        )
    if not 0 <= options.healthz_port <= 65535:
        raise ConfigError(f"invalid -healthz-port {options.healthz_port}: a port is 1 to 65535, and 0 switches it off")
    if not 0 <= options.metrics_port <= 65535:
        raise ConfigError(f"invalid -metrics-port {options.metrics_port}: a port is 1 to 65535, and 0 is no own one")
    if not options.subnet_file or options.subnet_file.endswith("/"):
        word = _quoted(options.subnet_file)
        raise ConfigError(f"invalid -subnet-file {word}: name a file, such as {DEFAULT_SUBNET_FILE}")
    if options.source_check not in SOURCE_CHECKS:
        word = _quoted(options.source_check)
        raise ConfigError(f"invalid -source-check {word}: use one of {', '.join(SOURCE_CHECKS)}")
    if options.vxlan_dataplane not in VXLAN_DATAPLANES:
        word = _quoted(options.vxlan_dataplane)
        raise ConfigError(f"invalid -vxlan-dataplane {word}: use one of {', '.join(VXLAN_DATAPLANES[1:])}")
    if not 0 <= options.spin <= 10_000:
        raise ConfigError(f"invalid -spin {options.spin}: it is in microseconds, from 0 to 10000")
    if not 0 <= options.moderation <= 1_000:
        raise ConfigError(f"invalid -moderation {options.moderation}: it is in microseconds, from 0 to 1000")
    if not 1 <= options.queues <= 16:
        raise ConfigError(f"invalid -queues {options.queues}: use 1 to 16")
    if not 1 <= options.vxlan_source_ports <= 64:
        raise ConfigError(f"invalid -vxlan-source-ports {options.vxlan_source_ports}: use 1 to 64")
    if options.log_format not in LOG_FORMATS:
        raise ConfigError(f"invalid -log-format {_quoted(options.log_format)}: use text or json")
    if options.iptables_resync < 1:
        raise ConfigError(f"invalid -iptables-resync {options.iptables_resync}: it is in seconds, from 1 up")
    _check_addresses(options)
    for pattern in options.iface_regex:
        try:
            compile_go(pattern)
        except ValueError as error:
            raise ConfigError(
                f"invalid -iface-regex {_quoted(pattern)}: could not compile the IP address regex: {error}"
            ) from None
    read_vmodule(options.vmodule)
    if options.lease_store and not re.fullmatch(r"sqlite://(/[^/\0]+)+", options.lease_store):
        word = _quoted(options.lease_store)
        raise ConfigError(
            f"invalid -lease-store {word}: use sqlite:///absolute/path/of/a/file, or leave it out for etcd"
        )
    for flag in FLAGS.values():
        value = getattr(options, flag.attribute)
        if not flag.built and value is not False and value != flag.default:
            raise ConfigError(
                f"-{flag.name} is not built yet in this version: it reads leases from etcd or an embedded store, not"
                " from Kubernetes; leave the flag out, and use -etcd-endpoints"
            )


_ADDRESSES: Mapping[str, tuple[Callable[[str], object], str]] = {
    "public-ip": (IPv4Address, "an IPv4 address such as 192.0.2.11"),
    "public-ipv6": (IPv6Address, "an IPv6 address such as 2001:db8::11"),
    "iface-can-reach": (ip_address, "an address such as 192.0.2.1"),
}


def _check_addresses(options: Options) -> None:
    for name, (read, example) in _ADDRESSES.items():
        word = getattr(options, FLAGS[name].attribute)
        if not word:
            continue
        try:
            read(word)
            reason = f"a zone is not allowed in {_quoted(word)}" if "%" in word else ""
        except ValueError as error:
            reason = str(error)
        if reason:
            raise ConfigError(f"invalid -{name}: {reason}; use {example}")


def read_vmodule(text: str) -> dict[str, int]:
    """Verbosity by pattern of file names, as klog's -vmodule has it. Raises ConfigError."""
    levels = {}
    for item in filter(None, text.split(",")):
        pattern, equals, level = item.rpartition("=")
        if not equals or not pattern or not level.isascii() or not level.isdigit():
            raise ConfigError(f"invalid -vmodule {_quoted(text)}: use file=N separated by commas, as in keeper=1")
        levels[pattern] = int(level)
    return levels


def describe(options: Options) -> str:
    """All values as one line for the log, without the password."""
    shown = []
    for flag in FLAGS.values():
        value = getattr(options, flag.attribute)
        if flag.name == "etcd-password" and value:
            value = "***"
        if isinstance(value, tuple):
            value = f"[{' '.join(value)}]"
        shown.append(f"{flag.name}:{str(value).lower() if flag.boolean else value}")
    return f"CLI flags config: {{{' '.join(shown)}}}"
