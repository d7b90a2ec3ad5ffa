"""The `loden` command: one line and an exit code for each error, and the net-conf that it writes."""

from __future__ import annotations

import asyncio
import io
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

import dataplane
from dataplane import options
from dataplane.cli import main
from dataplane.parts import open_store
from tests.examples import documented, shape

GOOD = b'{"Network": "10.5.0.0/16", "Backend": {"Type": "udp"}}'


def stored(url: str) -> bytes | None:
    """The net-conf as a daemon with the same flag reads it."""

    async def read() -> bytes | None:
        store = await open_store(options.parse([f"--lease-store={url}"], {}))
        try:
            return await store.read_config()
        finally:
            await store.close()

    return asyncio.run(read())


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite://{tmp_path}/leases.db"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    said = capsys.readouterr().out
    assert said == f"loden {dataplane.__version__}\n"
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == said


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from dataplane.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "net-conf" in done.stdout
    assert not {"grpc", "pyroute2", "uvloop", "msgspec", "asyncio"} & set(done.stdout.split())


def test_a_net_conf_is_checked_and_written(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net-conf.json"
    file.write_bytes(GOOD)
    assert main(["net-conf", "set", str(file), f"--lease-store={url}"]) == 0
    assert stored(url) == GOOD
    assert "10.5.0.0/16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "networks"),
    [
        (b'{"Network":"10.5.0.0/16", "EnableIPv6":true, "IPv6Network": "fd00:5::/48"}', "10.5.0.0/16 and fd00:5::/48"),
        (b'{"EnableIPv4":false, "EnableIPv6":true, "IPv6Network": "fd00:5::/48"}', "fd00:5::/48"),
    ],
)
def test_what_is_set_is_told_of_each_family(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes, networks: str
) -> None:
    file = tmp_path / "net-conf.json"
    file.write_bytes(text)
    assert main(["net-conf", "set", str(file), f"--lease-store={url}"]) == 0
    assert capsys.readouterr().out.startswith(f"network {networks} is set in lease database ")


def test_the_net_conf_that_is_there_is_printed_as_it_stands(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["net-conf", "get", f"--lease-store={url}"]) == 1
    assert "is not there yet" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert stored(url) is None
    assert main(["net-conf", "get", f"--lease-store={url}"]) == 1
    assert "flannel config not found" in capsys.readouterr().err
    file = tmp_path / "net-conf.json"
    file.write_bytes(GOOD)
    assert main(["net-conf", "set", str(file), f"--lease-store={url}"]) == 0
    capsys.readouterr()
    assert main(["net-conf", "get", f"--lease-store={url}"]) == 0
    assert capsys.readouterr().out.encode() == GOOD + b"\n"


def test_a_net_conf_comes_from_standard_input(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(GOOD)))
    assert main(["net-conf", "set", "-", f"--lease-store={url}"]) == 0
    assert stored(url) == GOOD


def test_the_environment_names_the_store_as_for_the_daemon(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLANNELD_LEASE_STORE", url)
    file = tmp_path / "net-conf.json"
    file.write_bytes(GOOD)
    assert main(["net-conf", "set", str(file)]) == 0
    assert stored(url) == GOOD


def test_a_bad_net_conf_is_shown_and_not_written(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "net-conf.json"
    file.write_bytes(GOOD)
    assert main(["net-conf", "set", str(file), f"--lease-store={url}"]) == 0
    file.write_text('{\n  "Network": "10.5.0.0/33"\n}\n')
    assert main(["net-conf", "set", str(file), f"--lease-store={url}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("loden: ")
    assert str(file) in said
    assert "^" in said
    assert stored(url) == GOOD


@pytest.mark.parametrize(
    "argv",
    [
        ["net-conf", "set", "/nowhere/net-conf.json", "--lease-store=sqlite:///tmp/x.db"],
        ["net-conf", "set", "/dev/null", "--lease-store=mysql://x"],
        ["lab", "ping", "--name=never-was"],
        ["lab", "up", "--backend=ipsec"],
        ["lab", "up", "--name=NO"],
        ["lab", "exec", "n1", "--"],
    ],
)
def test_errors_are_one_sentence_and_exit_code_1(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert said.startswith("loden: ")
    assert "Traceback" not in said


def test_down_of_a_lab_that_is_not_there_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "down", "--name=never-was"]) == 0
    assert "there is no lab 'never-was'; nothing to do" in capsys.readouterr().out


@pytest.mark.netns
def test_the_verbs_of_a_lab() -> None:
    def loden(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dataplane.cli", "lab", argv[0], "--name=cli-verbs", *argv[1:]]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    try:
        up = loden("up", "2")
        assert up.returncode == 0, up.stderr
        assert "n2" in up.stdout
        ping = loden("ping", "--count=3")
        assert ping.returncode == 0, ping.stdout
        assert ping.stdout.count("0%") == 2
        assert '"ready": true' in loden("status", "--json").stdout
        assert loden("status").stdout.count("ready") == 2
        assert loden("exec", "n1-p1", "--", "sh", "-c", "exit 7").returncode == 7
        assert "eth0" in loden("exec", "n1", "--", "ip", "link").stdout
        assert loden("cut", "n2").returncode == 0
        assert loden("ping", "--count=2").returncode == 1
        assert loden("heal", "n2").returncode == 0
    finally:
        down = loden("down")
    assert (down.returncode, down.stdout) == (0, "lab cli-verbs is gone\n")


@pytest.mark.netns
def test_the_demo_proves_a_network_and_leaves_nothing() -> None:
    command = [sys.executable, "-m", "dataplane.cli", "lab", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "all 6 pairs of pods, nothing lost" in done.stdout
    assert done.stdout.count("SHA-256 equal") == 3
    assert not Path("/run/loden/demo").exists()
    assert shape(done.stdout) == shape(documented("demo"))


@pytest.mark.netns
@pytest.mark.etcd
def test_the_mixed_lab_of_the_readme() -> None:
    name = f"mixed{secrets.token_hex(3)}"
    (command,) = [line for line in documented("lab-mixed").splitlines() if line.startswith("# loden ")]
    words = [*command.removeprefix("# loden ").split(), f"--name={name}"]
    argv = [sys.executable, "-m", "dataplane.cli"]
    try:
        done = subprocess.run([*argv, *words], capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        assert shape(done.stdout) == shape(documented("lab-mixed"))
    finally:
        subprocess.run([*argv, "lab", "down", f"--name={name}"], timeout=120, check=True)
