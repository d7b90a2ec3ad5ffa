"""Owns what a daemon keeps on disk: subnet.env for the CNI plugin, its own state, and the lock that keeps a second out.

Free of: what the values mean. Invariant: a file is whole, old or new, at every moment and after every crash; only the
holder of the lock writes. Every place derives from -subnet-file, so several daemons share one filesystem.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import zlib
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from dataplane.errors import KernelError, LeaseInvalid
from dataplane.lease.model import NO_IPV4, LeaseKey
from dataplane.lease.store import Entry
from dataplane.netconf import NetworkConfig
from dataplane.options import DEFAULT_SUBNET_FILE

_MAX_BYTES = 65_536
"""Most of an old subnet.env that is read: ours have a few hundred bytes."""

MAX_STATE_BYTES = 32 << 20
"""Most of a state file; 10,000 peers take about 3 MiB."""

# A line as flannel's dotenv reader takes it; quotes and comments are looked at afterwards
_ASSIGNMENT = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_.]*)\s*[=:]\s*(.*?)\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Places:
    """Where one daemon keeps its files."""

    subnet_file: str
    state: str
    lock: str
    control_socket: str


def places(subnet_file: str, control_socket: str = "") -> Places:
    """Every path that follows from -subnet-file; -control-socket overrides the one of the socket."""
    beside = "/run/flannel/loden.sock" if subnet_file == DEFAULT_SUBNET_FILE else f"{subnet_file}.sock"
    return Places(subnet_file, f"{subnet_file}.state", f"{subnet_file}.lock", control_socket or beside)


def render(config: NetworkConfig, key: LeaseKey, *, mtu: int, ip_masq: bool) -> bytes:
    """subnet.env byte for byte as flannel writes it; a subnet stands as its first address (facts 5.1)."""
    lines = []
    if config.enable_ipv4 and key.subnet != NO_IPV4:
        subnet = key.subnet
        lines += [f"FLANNEL_NETWORK={config.network}", f"FLANNEL_SUBNET={subnet[1]}/{subnet.prefixlen}"]
    if config.enable_ipv6 and key.subnet_v6 is not None:
        subnet_v6 = key.subnet_v6
        lines += [
            f"FLANNEL_IPV6_NETWORK={config.ipv6_network}",
            f"FLANNEL_IPV6_SUBNET={subnet_v6[1]}/{subnet_v6.prefixlen}",
        ]
    lines += [f"FLANNEL_MTU={mtu}", f"FLANNEL_IPMASQ={str(ip_masq).lower()}"]
    return "".join(f"{line}\n" for line in lines).encode()


def write_subnet_file(path: str, config: NetworkConfig, key: LeaseKey, *, mtu: int, ip_masq: bool) -> None:
    """Put subnet.env in place in one step, readable by all. Raises KernelError; the old file then still stands."""
    _replace(path, render(config, key, mtu=mtu, ip_masq=ip_masq), 0o644)


def write_text(path: str, text: str) -> None:
    """Put a file for others in place in one step, readable by all. Raises KernelError; an old one then still stands."""
    _replace(path, text.encode(), 0o644)


def read_values(path: str) -> dict[str, str]:
    """The variables of a subnet.env, ours or flannel's; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_BYTES).decode()
    except (OSError, ValueError):
        return {}
    matches = map(_ASSIGNMENT.fullmatch, text.splitlines())
    return {match[1]: _unquoted(match[2]) for match in matches if match is not None}


def read_previous(path: str) -> LeaseKey | None:
    """The subnet that an earlier daemon, ours or flannel's, wrote to subnet.env; None where there is no clear one."""
    values = read_values(path)
    subnet = _only_one(values.get("FLANNEL_SUBNET", ""), IPv4Network)
    subnet_v6 = _only_one(values.get("FLANNEL_IPV6_SUBNET", ""), IPv6Network)
    try:
        # by way of its text: what no store could hold as a key is no previous subnet either
        key = LeaseKey.parse(str(LeaseKey(subnet or NO_IPV4, subnet_v6)))
    except LeaseInvalid:
        return None
    return key if key.subnets else None


def read_networks(path: str) -> list[tuple[IPv4Network, IPv4Network] | tuple[IPv6Network, IPv6Network]]:
    """The (network, subnet) of each family that an earlier daemon wrote to subnet.env."""
    values = read_values(path)
    v4 = (
        _only_one(values.get("FLANNEL_NETWORK", ""), IPv4Network),
        _only_one(values.get("FLANNEL_SUBNET", ""), IPv4Network),
    )
    v6 = (
        _only_one(values.get("FLANNEL_IPV6_NETWORK", ""), IPv6Network),
        _only_one(values.get("FLANNEL_IPV6_SUBNET", ""), IPv6Network),
    )
    found: list[tuple[IPv4Network, IPv4Network] | tuple[IPv6Network, IPv6Network]] = []
    if v4[0] is not None and v4[1] is not None:
        found.append((v4[0], v4[1]))
    if v6[0] is not None and v6[1] is not None:
        found.append((v6[0], v6[1]))
    return found


def _unquoted(value: str) -> str:
    if value[:1] in ("'", '"'):
        return value[1:].partition(value[0])[0]
    return re.split(r"(?:^|\s)#", value, maxsplit=1)[0].rstrip()


_Net = TypeVar("_Net", IPv4Network, IPv6Network)


def _only_one(value: str, network: type[_Net]) -> _Net | None:
    """flannel skips the bad parts of a comma list, and takes more than one good part for none."""
    found = []
    for part in value.split(","):
        if re.fullmatch(r"[^/%]+/\d{1,3}", part, re.ASCII):
            with contextlib.suppress(ValueError):
                found.append(network(part, strict=False))
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class DaemonState:
    """What the next start must know of this one. Empty where there was none.

    `store` names the lease store of which the rest is true: `config` is its net-conf, `own` our entry, which expires at
    `expires_boot` of CLOCK_BOOTTIME in the boot `boot_id`, and at `expires` by the wall clock (both 0 for a
    reservation); `peers` are the entries that were obeyed at `revision`.
    """

    device: str = ""
    """Parted by blanks, where there are two."""
    store: str = ""
    config: bytes = b""
    own: Entry | None = None
    boot_id: str = ""
    expires_boot: float = 0.0
    expires: float = 0.0
    revision: int = 0
    peers: tuple[Entry, ...] = ()
    mac: str = ""
    mac_v6: str = ""
    """Of our VTEPs for inner IPv4 and IPv6, in hexadecimal digits."""


class _StateFile(msgspec.Struct):
    """The file's JSON: the record as its exact bytes, and their CRC-32."""

    crc32: int
    state: msgspec.Raw


def write_state(path: str, state: DaemonState) -> None:
    """Put the state in place in one step, for root only. Peers that would make it too large to be read are left out.
    Raises KernelError; the old file then still stands."""
    record = msgspec.json.encode(state)
    if len(record) > MAX_STATE_BYTES - 100:
        record = msgspec.json.encode(replace(state, peers=()))
    _replace(path, msgspec.json.encode(_StateFile(zlib.crc32(record), msgspec.Raw(record))) + b"\n", 0o600)


def read_state(path: str) -> DaemonState:
    """What `write_state` wrote last; an empty state if the file is missing, cut short or altered."""
    try:
        with open(path, "rb") as file:
            document = msgspec.json.decode(file.read(MAX_STATE_BYTES), type=_StateFile)
        if zlib.crc32(document.state) != document.crc32:
            return DaemonState()
        return msgspec.json.decode(document.state, type=DaemonState)
    except (OSError, ValueError, RecursionError):
        return DaemonState()


class DaemonLock:
    """Held by the one daemon that may use a set of places, from start to end; the kernel releases it with the process.

    The file stays behind. Removing it would race: a second daemon may have opened it already and would then hold a
    lock on a file that a third no longer finds.
    """

    def __init__(self, path: str) -> None:
        """Take the lock or raise KernelError, which names the daemon that holds it."""
        try:
            _make_directory(Path(path).parent)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise _refused("open the lock file", path, error) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(self._fd, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise KernelError(
                f"another daemon (pid {holder}) holds {path}: stop it, or give this one a -subnet-file of its own"
            ) from None
        except OSError as error:
            os.close(self._fd)
            raise _refused("write the lock file", path, error) from error

    def close(self) -> None:
        """Release the lock. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _replace(path: str, data: bytes, mode: int) -> None:
    """Write beside `path` and rename over it. One fixed name for the new file, so that crashes leave at most one."""
    directory, new = Path(path).parent, Path(f"{path}.new")
    try:
        _make_directory(directory)
        new.unlink(missing_ok=True)
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                os.fchmod(fd, mode)  # open()'s mode would be cut by the umask
                file.write(data)
                file.flush()
                os.fsync(fd)
            new.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise
        _sync_directory(directory)
    except OSError as error:
        raise _refused("write", path, error) from error


def _make_directory(path: Path) -> None:
    """`path` and what it lies in, 0755 whatever the umask; what exists is left as it is."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
        return  # another daemon on this filesystem was quicker
    path.chmod(0o755)


def _sync_directory(path: Path) -> None:
    """Without this the rename itself may be lost with the power (rename(2) orders nothing on disk)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_ADVICE = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
    errno.EROFS: "mount it writable, or choose another place with -subnet-file",
    errno.EACCES: "run as root, or choose another place with -subnet-file",
    errno.EPERM: "run as root, or choose another place with -subnet-file",
}


def _refused(action: str, path: str, error: OSError) -> KernelError:
    advice = _ADVICE.get(error.errno or 0, "check the path, or choose another with -subnet-file")
    return KernelError(f"cannot {action} {path}: {error.strerror}; {advice}")
