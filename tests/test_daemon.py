"""The `flanneld` command as a process: its ways out, and what each leaves. Packets are in tests/netns."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataplane.debug.control import request
from dataplane.errors import LodenError
from tests.certificates import make_certificates
from tests.etcd_server import EtcdServer

FLANNELD = str(Path(sys.executable).with_name("flanneld"))


def flanneld(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("FLANNELD_")} | environment
    return subprocess.run([FLANNELD, *arguments], capture_output=True, text=True, timeout=30, env=environ, check=False)


def test_version_goes_to_stderr_with_exit_0() -> None:
    done = flanneld("-version")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("Loden ")


@pytest.mark.parametrize("word", ["-help", "--help", "-h"])
def test_help_exits_0_and_lists_our_own_flags_apart(word: str) -> None:
    done = flanneld(word)
    assert done.returncode == 0
    theirs, _, ours = done.stderr.partition("Loden's own")
    assert "-etcd-endpoints" in theirs
    assert "-lease-store" in ours


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-bogus"], "flag provided but not defined: -bogus"),
        (["-healthz-prot=1"], "healthz-port"),
        (["-v=x"], 'invalid value "x" for flag -v'),
        (["-subnet-lease-renew-margin=1440"], "1439"),
        (["-iface-regex=("], "could not compile the IP address regex"),
        (["--kube-subnet-mgr"], "-kube-subnet-mgr is not built yet"),
        (["-source-check=lax"], "strict"),
        (["-lease-store=mysql://x"], "sqlite:///"),
        (["stray"], "stray"),
    ],
)
def test_a_flag_that_cannot_be_ends_with_exit_2_and_names_it(arguments: list[str], text: str) -> None:
    done = flanneld(*arguments)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_switched_off_is_accepted(tmp_path: Path) -> None:
    """The start goes on to the store, which is a directory here: exit 1, not 2."""
    done = flanneld("-ip-masq=false", f"--lease-store=sqlite://{tmp_path}", f"--subnet-file={tmp_path}/s.env")
    assert done.returncode == 1
    assert f"] Failed to create SubnetManager: lease database {tmp_path} " in done.stderr, "flannel's own words"
    assert "Traceback" not in done.stderr


def test_a_bad_environment_variable_is_a_warning(tmp_path: Path) -> None:
    done = flanneld(f"--lease-store=sqlite://{tmp_path}", f"--subnet-file={tmp_path}/s.env", FLANNELD_V="loud")
    assert done.returncode == 1
    assert "FLANNELD_V" in done.stderr


def test_python_dash_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dataplane", "-version"], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, flanneld("-version").stderr)


class Waiting:
    """A daemon that waits for a net-conf, which nobody writes."""

    def __init__(self, place: Path, *flags: str) -> None:
        """`flags`: in place of a store of its own."""
        self.subnet_file = place / "subnet.env"
        self.socket = f"{self.subnet_file}.sock"
        self.log = place / "log"
        store = flags or (f"--lease-store=sqlite://{place}/leases.db",)
        with self.log.open("w") as log:
            self.process = subprocess.Popen([FLANNELD, *store, f"--subnet-file={self.subnet_file}"], stderr=log)

    def until_it_answers(self) -> dict[str, object]:
        for _ in range(200):
            try:
                return request(self.socket, "status")
            except LodenError:
                time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def until_logged(self, text: str) -> None:
        for _ in range(600):
            if text in self.log.read_text():
                return
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_waits_for_a_config_is_an_ordered_stop(tmp_path: Path, number: signal.Signals) -> None:
    daemon = Waiting(tmp_path)
    status = daemon.until_it_answers()
    assert status["ready"] is False
    assert status["pid"] == daemon.process.pid
    daemon.until_logged("Couldn't fetch network config")
    daemon.process.send_signal(number)
    assert daemon.process.wait(10) == 0
    assert "Exiting cleanly..." in daemon.log.read_text()
    assert not Path(daemon.socket).exists()
    assert not daemon.subnet_file.exists()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_stop_that_takes_long(
    tmp_path: Path, first: signal.Signals, second: signal.Signals
) -> None:
    """Who makes a lease database locks what is beside it; a daemon that comes meanwhile waits, also to stop."""
    with (tmp_path / "leases.db-notify").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        daemon = Waiting(tmp_path)
        daemon.until_it_answers()
        daemon.process.send_signal(first)
        daemon.until_logged("Waiting for all goroutines to exit")
        assert daemon.process.poll() is None
        daemon.process.send_signal(second)
        assert daemon.process.wait(10) == -second
    assert "Exiting cleanly..." not in daemon.log.read_text()
    after = Waiting(tmp_path)
    assert after.until_it_answers()["pid"] == after.process.pid, "what was left behind is in nobody's way"
    after.process.terminate()
    assert after.process.wait(10) == 0


def test_a_second_daemon_at_the_same_place_names_the_first(tmp_path: Path) -> None:
    daemon = Waiting(tmp_path)
    daemon.until_it_answers()
    done = flanneld(f"--lease-store=sqlite://{tmp_path}/leases.db", f"--subnet-file={daemon.subnet_file}")
    assert done.returncode == 1
    assert f"pid {daemon.process.pid}" in done.stderr
    assert daemon.until_it_answers()["pid"] == daemon.process.pid
    daemon.process.terminate()
    assert daemon.process.wait(10) == 0


def test_after_a_kill_the_next_start_succeeds_in_the_same_place(tmp_path: Path) -> None:
    first = Waiting(tmp_path)
    first.until_it_answers()
    first.process.kill()
    first.process.wait()
    second = Waiting(tmp_path)
    assert second.until_it_answers()["pid"] == second.process.pid
    second.process.terminate()
    assert second.process.wait(10) == 0


# --- the command lines that guides and scripts use ------------------------------------------------------------


def understood(*arguments: str, **environment: str) -> bool:
    """Whether a command line gets as far as asking for the control socket: every flag was read by then."""
    done = flanneld(*arguments, "--subnet-file=/proc/no/place/subnet.env", **environment)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1, done.stderr
    return "CLI flags config: {" in done.stderr and "/proc/no/place" in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        # each as it stands in a guide, a unit or a manifest; the places are examples' own
        "-etcd-endpoints=http://192.0.2.1:2379 -etcd-prefix=/coreos.com/network",
        "--etcd-endpoints=http://192.0.2.1:4001,http://192.0.2.2:4001 --etcd-prefix=/docker_overlay/network",
        "-etcd-endpoints https://192.0.2.1:2379 -etcd-cafile=/ca.pem -etcd-certfile=/c.pem -etcd-keyfile=/k -ip-masq",
        "--ip-masq --iface=eth1",
        "--ip-masq=true --iface=192.0.2.5 --public-ip=198.51.100.7",
        "-ip-masq -iface=eth0 -iface=eth1 -iface-regex=^192\\.168\\. -iface-can-reach=192.0.2.1",
        "--ip-masq --iptables-forward-rules=false --iptables-resync=10",
        "--subnet-lease-renew-margin=120 --healthz-ip=127.0.0.1 --healthz-port=8471",
        "--etcd-username=root --etcd-password=secret --v=10",
        "-v 4 -vmodule=keeper=2 -log_backtrace_at=keeper.py:1",
        "--public-ipv6=2001:db8::7 --ip-blackhole-route --ip-masq-fully-random-disable",
        "-kube-subnet-mgr=false -set-node-network-unavailable=false",
    ],
)
def test_a_command_line_of_flannels_is_swapped_by_path_alone(line: str) -> None:
    assert understood(*line.split())
    one, two = line.replace("--", "-"), line.replace("--", "-").replace(" -", " --").replace("-", "--", 1)
    assert understood(*one.split())
    assert understood(*two.split())


def test_a_units_variables_are_understood_as_flannels() -> None:
    variables = {
        "FLANNELD_ETCD_ENDPOINTS": "http://192.0.2.1:2379",
        "FLANNELD_ETCD_PREFIX": "/coreos.com/network",
        "FLANNELD_IP_MASQ": "true",
        "FLANNELD_IFACE": "eth1",
        "FLANNELD_V": "2",
    }
    assert understood(**variables)


PREFIX, USER, SECRET = "/other/network", "node", "correct horse"


def make_guarded(server: EtcdServer, net_conf: str) -> None:
    """Users, of whom one may touch our prefix, where there is a net-conf that no daemon can begin with."""
    server.etcdctl("put", f"{PREFIX}/config", text=net_conf)
    for arguments in (
        ("user", "add", f"root:{SECRET}"), ("user", "grant-role", "root", "root"), ("role", "add", "flannel"),
        ("role", "grant-permission", "flannel", "--prefix=true", "readwrite", f"{PREFIX}/"),
        ("user", "add", f"{USER}:{SECRET}"), ("user", "grant-role", USER, "flannel"), ("auth", "enable"),
    ):  # fmt: skip
        server.etcdctl(*arguments)


@pytest.mark.etcd
def test_every_flag_of_etcds_together_and_the_next_endpoint_where_one_dies(tmp_path: Path) -> None:
    """TLS both ways, a user, a prefix and three endpoints, of which the first was never there and the second dies."""
    tls = make_certificates(tmp_path)
    with EtcdServer(tls=tls) as second, EtcdServer(tls=tls) as third:
        make_guarded(second, '{"Network":"the second\'s"}')
        make_guarded(third, '{"Network":"the third\'s"}')
        daemon = Waiting(
            tmp_path, f"-etcd-endpoints=https://127.0.0.1:1,{second.url},{third.url}", f"-etcd-prefix={PREFIX}",
            f"-etcd-cafile={tls.ca}", f"-etcd-certfile={tls.client_cert}", f"-etcd-keyfile={tls.client_key}",
            f"-etcd-username={USER}", f"-etcd-password={SECRET}",
        )  # fmt: skip
        daemon.until_logged("the second's")
        second.kill()
        daemon.until_logged("the third's")
        daemon.process.terminate()
        assert daemon.process.wait(10) == 0
    assert SECRET not in daemon.log.read_text()


def test_a_stack_trace_is_logged_where_the_flag_asks_for_one(tmp_path: Path) -> None:
    place = (f"--lease-store=sqlite://{tmp_path}", f"--subnet-file={tmp_path}/s.env")
    quiet, stack = flanneld(*place).stderr, "  File "
    line = next(line for line in quiet.splitlines() if "Installing signal handlers" in line)
    at = line.partition("]")[0].split()[-1]
    assert stack not in quiet
    assert stack in flanneld(*place, f"-log_backtrace_at={at}").stderr


def test_the_password_is_not_logged() -> None:
    done = flanneld("--etcd-password=hunter2", "--subnet-file=/proc/no/place/subnet.env")
    assert "CLI flags config" in done.stderr
    assert "hunter2" not in done.stderr


def test_json_lines_are_json_from_the_first_to_the_last(tmp_path: Path) -> None:
    done = flanneld("--log-format=json", f"--lease-store=sqlite://{tmp_path}", f"--subnet-file={tmp_path}/s.env")
    assert done.returncode == 1
    messages = [json.loads(line)["msg"] for line in done.stderr.splitlines()]
    assert messages[0].startswith("CLI flags config")


def test_upstream_ends_with_0_on_a_wrong_flag_and_we_do_not() -> None:
    """Its supervisors see success: facts 1.1, and 14 number 6."""
    assert flanneld("-etcd-endpiont=http://192.0.2.1:2379").returncode == 2
