"""What a daemon keeps on disk: exact bytes, whole at every moment, and one daemon at a time."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.errors import KernelError
from dataplane.kernel import subnetfile
from dataplane.kernel.subnetfile import (
    DaemonLock,
    DaemonState,
    Places,
    places,
    read_previous,
    read_state,
    render,
    write_state,
    write_subnet_file,
)
from dataplane.lease.model import NO_IPV4, LeaseKey
from dataplane.lease.store import Entry
from dataplane.netconf import NetworkConfig, parse

V4 = parse(b'{"Network": "10.42.0.0/16"}', origin="test")
DUAL = parse(
    b'{"Network": "10.42.0.0/16", "EnableIPv6": true, "IPv6Network": "2001:cafe:42::/56"}', origin="test"
)
V6 = parse(b'{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "2001:cafe:42::/56"}', origin="test")
KEY = LeaseKey(IPv4Network("10.42.7.0/24"))
DUAL_KEY = LeaseKey(IPv4Network("10.42.7.0/24"), IPv6Network("2001:cafe:42::/64"))
OWN = Entry("10.42.7.0-24", b'{"PublicIP":"192.0.2.11"}', 17, 18)
PEER = Entry("0.0.0.0-0&fd00::-64", b"\xff", 3, 4, reserved=True)
STATE = DaemonState("flannel0", "etcd x", b"{}", OWN, "b", 9.5, 1.7e9, 18, (PEER,))


@pytest.fixture
def narrow_umask() -> Iterator[None]:
    old = os.umask(0o077)
    yield
    os.umask(old)


def write(path: Path, config: NetworkConfig = V4, key: LeaseKey = KEY, mtu: int = 1472) -> None:
    write_subnet_file(str(path), config, key, mtu=mtu, ip_masq=False)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_places_follow_from_the_subnet_file() -> None:
    default = "/run/flannel/subnet.env"
    assert places(default) == Places(default, f"{default}.state", f"{default}.lock", "/run/flannel/loden.sock")
    assert places("/a/b") == Places("/a/b", "/a/b.state", "/a/b.lock", "/a/b.sock")
    assert places("/a/b", "/c").control_socket == "/c"
    assert places(default, "/c").control_socket == "/c"


def test_subnet_file_of_two_families_byte_for_byte() -> None:
    assert render(DUAL, DUAL_KEY, mtu=1450, ip_masq=True) == (
        b"FLANNEL_NETWORK=10.42.0.0/16\n"
        b"FLANNEL_SUBNET=10.42.7.1/24\n"
        b"FLANNEL_IPV6_NETWORK=2001:cafe:42::/56\n"
        b"FLANNEL_IPV6_SUBNET=2001:cafe:42::1/64\n"
        b"FLANNEL_MTU=1450\n"
        b"FLANNEL_IPMASQ=true\n"
    )


def test_subnet_file_of_ipv6_alone_has_no_line_of_ipv4() -> None:
    key = LeaseKey(NO_IPV4, DUAL_KEY.subnet_v6)
    assert render(V6, key, mtu=1430, ip_masq=False) == (
        b"FLANNEL_IPV6_NETWORK=2001:cafe:42::/56\n"
        b"FLANNEL_IPV6_SUBNET=2001:cafe:42::1/64\n"
        b"FLANNEL_MTU=1430\n"
        b"FLANNEL_IPMASQ=false\n"
    )


def test_subnet_file_of_ipv4_is_readable_by_all_whatever_the_umask(tmp_path: Path, narrow_umask: None) -> None:
    path = tmp_path / "new" / "deep" / "subnet.env"
    write(path)
    assert path.read_bytes() == (
        b"FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.7.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    )
    assert [mode(path), mode(path.parent), mode(path.parent.parent)] == [0o644, 0o755, 0o755]
    assert [entry.name for entry in path.parent.iterdir()] == ["subnet.env"]


def test_a_directory_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    write(tmp_path / "subnet.env")
    assert mode(tmp_path) == 0o700


@given(st.integers(0, 2**32 - 1), st.integers(8, 30), st.sampled_from(["v4", "dual", "v6"]))
def test_what_was_written_is_the_previous_subnet(
    tmp_path_factory: pytest.TempPathFactory, ip: int, bits: int, families: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"round-trip-{os.getpid()}.env"
    both = LeaseKey(IPv4Network((ip, bits), strict=False), IPv6Network("2001:cafe:42:7::/64"))
    key = both.within(ipv4=families != "v6", ipv6=families != "v4")
    write(path, {"v4": V4, "dual": DUAL, "v6": V6}[families], key)
    assert read_previous(str(path)) == key


@pytest.mark.parametrize(
    ("text", "subnet"),
    [
        (b"FLANNEL_SUBNET=10.1.2.3/24", "10.1.2.0-24"),
        (b"# comment\n\n export FLANNEL_SUBNET = \"10.1.2.1/24\"  # why\nX=1", "10.1.2.0-24"),
        (b"FLANNEL_SUBNET='10.1.2.1/24'", "10.1.2.0-24"),
        (b"FLANNEL_SUBNET: 10.1.2.1/24 # a comment", "10.1.2.0-24"),
        (b"FLANNEL_SUBNET=10.1.2.1/24\r\nFLANNEL_MTU=1\r\n", "10.1.2.0-24"),
        (b"FLANNEL_SUBNET=10.9.9.1/24\nFLANNEL_SUBNET=10.1.2.1/24", "10.1.2.0-24"),
        (b"FLANNEL_SUBNET=10.1.2.1/24,nonsense,10.1.2.3.4/24,10.0.0.0/33,fd00::/64", "10.1.2.0-24"),
        (b"FLANNEL_SUBNET=10.1.2.1/24,10.1.3.1/24", None),
        (b"FLANNEL_SUBNET=10.1.2.1/24\nFLANNEL_IPV6_SUBNET=fd00:5::1/64", "10.1.2.0-24&fd00:5::-64"),
        (b"FLANNEL_SUBNET=10.1.2.1/24\nFLANNEL_IPV6_SUBNET=FD00:5::1/64,bad", "10.1.2.0-24&fd00:5::-64"),
        (b"FLANNEL_SUBNET=10.1.2.1/24\nFLANNEL_IPV6_SUBNET=fd00::1/64,fd01::1/64", "10.1.2.0-24"),
        (b"FLANNEL_IPV6_SUBNET=fd00::1/64", "0.0.0.0-0&fd00::-64"),
        (b"FLANNEL_SUBNET=0.0.0.0/0", None),
        (b"FLANNEL_SUBNET=10.1.2.1", None),
        (b"FLANNEL_SUBNET=10.1.2.1/255.255.255.0", None),
        (b"FLANNEL_SUBNET=10.1.2.1/32", None),
        (b"FLANNEL_SUBNET=", None),
        (b"FLANNEL_SUBNET", None),
        (b"MY_FLANNEL_SUBNET=10.1.2.1/24", None),
        (b"#FLANNEL_SUBNET=10.1.2.1/24", None),
        (b"", None),
        (b"\xff\xfe\0garbage", None),
    ],
)
def test_previous_subnet(tmp_path: Path, text: bytes, subnet: str | None) -> None:
    path = tmp_path / "subnet.env"
    path.write_bytes(text)
    found = read_previous(str(path))
    assert (None if found is None else str(found)) == subnet


@given(st.binary(max_size=100))
def test_no_old_file_can_stop_a_start(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / f"old-{os.getpid()}"
    path.write_bytes(b"FLANNEL_SUBNET=" + text)
    assert isinstance(read_previous(str(path)), LeaseKey | None)
    assert read_state(str(path)) == DaemonState()


def test_a_missing_or_strange_file_is_no_previous_subnet(tmp_path: Path) -> None:
    assert read_previous(str(tmp_path / "none")) is None
    assert read_previous(str(tmp_path)) is None
    assert read_state(str(tmp_path / "none")) == DaemonState()
    assert read_state(str(tmp_path)) == DaemonState()


def test_state_round_trip_for_root_only(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env.state"
    path.write_text("old")
    path.chmod(0o666)
    for state in (STATE, DaemonState(), DaemonState(device='x"\n\u00e9\\')):
        write_state(str(path), state)
        assert read_state(str(path)) == state
    assert mode(path) == 0o600


def test_a_state_cut_at_any_byte_or_altered_in_any_byte_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(str(path), STATE)
    whole = path.read_bytes()
    body = whole.rstrip(b"\n")
    for end in range(len(body)):
        path.write_bytes(whole[:end])
        assert read_state(str(path)) == DaemonState(), end
    for at in range(len(body)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            assert read_state(str(path)) == DaemonState(), (at, bit)


def test_a_state_of_another_shape_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for text in (b"[]", b"{}", b'{"crc32":0,"state":""}', b"[" * 60_000):
        path.write_bytes(text)
        assert read_state(str(path)) == DaemonState()


def test_ten_thousand_peers_come_back_and_a_monstrous_number_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    value = b'{"PublicIP":"192.0.2.11","PublicIPv6":null,"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}'
    peers = tuple(Entry(f"10.{n >> 8}.{n & 255}.0-24", value, n, n) for n in range(10_000))
    large = dataclasses.replace(STATE, peers=peers)
    write_state(str(path), large)
    assert read_state(str(path)) == large
    assert path.stat().st_size < subnetfile.MAX_STATE_BYTES / 8
    monkeypatch.setattr(subnetfile, "MAX_STATE_BYTES", path.stat().st_size // 2)
    write_state(str(path), large)
    assert read_state(str(path)) == dataclasses.replace(STATE, peers=())


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path, stop = tmp_path / "subnet.env", threading.Event()
    allowed = {render(V4, KEY, mtu=mtu, ip_masq=False) for mtu in (1, 1472)}
    write(path)
    seen: set[bytes] = set()

    def watch() -> None:
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=watch)
    reader.start()
    try:
        for turn in range(300):
            write(path, mtu=1472 if turn % 2 else 1)
    finally:
        stop.set()
        reader.join()
    assert seen == allowed


def _write_for_ever(path: str) -> None:
    while True:
        write_state(path, STATE)
        write_state(path, DaemonState(device="other"))


def test_a_writer_killed_at_any_moment_leaves_a_whole_state(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(str(path), STATE)
    fork = multiprocessing.get_context("fork")
    for turn in range(15):
        writer = fork.Process(target=_write_for_ever, args=(str(path),))
        writer.start()
        writer.join(0.01 + 0.003 * turn)
        writer.kill()
        writer.join(10)
        assert writer.exitcode == -signal.SIGKILL
        assert read_state(str(path)) in (STATE, DaemonState(device="other"))
        assert len(list(tmp_path.iterdir())) <= 2
    write_state(str(path), STATE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


# Runs on a tmpfs of one page for each file, in a mount namespace that ends with it
DISK = """
import os, sys
from pathlib import Path
from dataplane.errors import KernelError
from dataplane.kernel.subnetfile import DaemonLock, DaemonState, read_state, write_state

top = Path(sys.argv[1])
old, state = DaemonState(device="old"), top / "state"
write_state(str(state), old)

def refused(what, *words):
    try:
        what()
    except KernelError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise SystemExit("not refused")
    assert read_state(str(state)) == old

(top / "filler").write_bytes(b"x" * 4096)
refused(lambda: write_state(str(state), DaemonState(device="new")), str(state), "No space left", "free some space")
assert sorted(os.listdir(top)) == ["filler", "state"]
os.system(f"mount -o remount,ro {top}")
refused(lambda: write_state(str(state), DaemonState(device="new")), str(state), "Read-only", "-subnet-file")
refused(lambda: DaemonLock(str(top / "lock")), str(top / "lock"), "Read-only")
"""


@pytest.mark.netns
def test_a_full_or_read_only_disk_is_an_error_and_the_old_file_stands(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=8k loden-test {tmp_path} && exec {sys.executable} -c \"$0\" {tmp_path}"
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, DISK],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_place_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelError, match=r"cannot write .*file/subnet.env: Not a directory; .*-subnet-file"):
        write(tmp_path / "file" / "subnet.env")
    (tmp_path / "dir").mkdir()
    with pytest.raises(KernelError, match=r"cannot write .*dir: Is a directory"):
        write(tmp_path / "dir")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dir", "file"]


HOLD = """
import sys
from dataplane.kernel.subnetfile import DaemonLock
held = DaemonLock(sys.argv[1])
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["ordered", "killed"])
def test_a_second_daemon_is_told_who_holds_the_lock(tmp_path: Path, how: str) -> None:
    path = str(tmp_path / "run" / "subnet.env.lock")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        with pytest.raises(KernelError, match=rf"another daemon \(pid {holder.pid}\) holds {path}"):
            DaemonLock(path)
        if how == "killed":
            holder.kill()
        else:
            holder.stdin.close()
        holder.wait(10)
    finally:
        holder.kill()
        holder.wait(10)
        for pipe in (holder.stdin, holder.stdout):
            if pipe is not None:
                pipe.close()
    with DaemonLock(path):
        assert Path(path).read_text() == f"{os.getpid()}\n"


def test_a_lock_is_free_after_close_and_its_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("a long text of some other program\n")
    first = DaemonLock(str(path))
    with pytest.raises(KernelError, match=rf"pid {os.getpid()}\)"):
        DaemonLock(str(path))
    first.close()
    first.close()
    DaemonLock(str(path)).close()
    assert path.read_text() == f"{os.getpid()}\n"


def test_a_lock_is_not_taken_through_a_symbolic_link(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "lock"
    victim.write_text("precious")
    path.symlink_to(victim)
    with pytest.raises(KernelError, match="cannot open the lock file"):
        DaemonLock(str(path))
    assert victim.read_text() == "precious"
