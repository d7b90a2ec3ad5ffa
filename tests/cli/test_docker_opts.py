"""mk-docker-opts against the outputs that flannel's own test expects of its script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples import documented
from tests.namespaces import open_namespaces

SCRIPTS = [str(Path(sys.executable).with_name(name)) for name in ("mk-docker-opts", "mk-docker-opts.sh")]
SUBNET_ENV = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
BIP, MASQ, MTU = "--bip=10.1.74.1/24", "--ip-masq=true", "--mtu=1472"
ALONE = f'DOCKER_OPT_BIP="{BIP}"\nDOCKER_OPT_IPMASQ="{MASQ}"\nDOCKER_OPT_MTU="{MTU}"\n'
TOGETHER = f'DOCKER_OPTS=" {BIP} {MASQ} {MTU}"\n'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "subnet.env").write_text(SUBNET_ENV)
    return tmp_path


def run(place: Path, *words: str, script: str = SCRIPTS[0], **environ: str) -> subprocess.CompletedProcess[str]:
    argv = [script, "-f", str(place / "subnet.env"), "-d", str(place / "out"), *words]
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environ}
    )


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), ALONE + TOGETHER),
        (("-i",), ALONE),
        (("-c",), TOGETHER),
        (("-i", "-c"), ALONE + TOGETHER),
        (("-k", "CUSTOM_KEY"), ALONE + TOGETHER.replace("DOCKER_OPTS", "CUSTOM_KEY")),
        (("-m",), f'DOCKER_OPT_BIP="{BIP}"\nDOCKER_OPT_MTU="{MTU}"\nDOCKER_OPTS=" {BIP} {MTU}"\n'),
    ],
)
def test_the_outputs_that_flannels_test_expects(
    place: Path, script: str, words: tuple[str, ...], expected: str
) -> None:
    done = run(place, *words, script=script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (place / "out").read_text() == expected
    assert (place / "out").stat().st_mode & 0o777 == 0o644


def test_the_example_of_the_docs(place: Path) -> None:
    lines = documented("docker-opts").splitlines(keepends=True)
    (place / "subnet.env").write_text(SUBNET_ENV.replace("10.1.74.1", "10.244.22.1"))
    assert run(place).returncode == 0
    assert (place / "out").read_text() == "".join(lines[1:])


def test_who_masquerades_keeps_docker_from_it(place: Path) -> None:
    (place / "subnet.env").write_text(SUBNET_ENV.replace("false", "true"))
    assert run(place, "-c").returncode == 0
    assert "--ip-masq=false" in (place / "out").read_text()


def test_options_that_stand_in_the_environment_come_first(place: Path) -> None:
    assert run(place, "-c", DOCKER_OPTS="-H fd://").returncode == 0
    assert (place / "out").read_text() == f'DOCKER_OPTS="-H fd://  {BIP} {MASQ} {MTU}"\n'


def test_single_options_of_the_environment_are_written_too_but_for_those_that_we_know(place: Path) -> None:
    environ = {"DOCKER_OPT_DEBUG": "--debug", "DOCKER_OPT_MTU": "--mtu=9"}
    assert run(place, "-m", **environ).returncode == 0
    lines = [f'DOCKER_OPT_BIP="{BIP}"', 'DOCKER_OPT_DEBUG="--debug"', f'DOCKER_OPT_MTU="{MTU}"']
    assert (place / "out").read_text().splitlines() == [*lines, f'DOCKER_OPTS=" {BIP} --debug {MTU}"']


@pytest.mark.parametrize("words", [("-h",), ("-?",), ("-x",), ("-k",), ("-k", "a b"), ("word",)])
def test_the_usage_ends_with_1(place: Path, words: tuple[str, ...]) -> None:
    done = run(place, *words)
    assert done.returncode == 1
    assert "[-f FLANNEL-ENV-FILE]" in done.stderr
    assert not (place / "out").exists()


@pytest.mark.parametrize("text", ["", "FLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_IPMASQ=maybe\n"])
def test_nothing_is_written_where_something_is_wrong(place: Path, text: str) -> None:
    (place / "subnet.env").write_text(text)
    (place / "out").write_text("old")
    done = run(place)
    assert done.returncode == 1
    assert "mk-docker-opts: " in done.stderr
    assert "Traceback" not in done.stderr
    assert (place / "out").read_text() == "old"


@pytest.mark.netns
def test_a_route_to_the_subnet_through_a_gateway_is_refused(place: Path) -> None:
    with open_namespaces(2) as (node, other):
        node.link_to(other, "eth0", "eth0")
        node.command("ip", "addr", "add", "198.18.0.1/24", "dev", "eth0")
        argv = [SCRIPTS[0], "-f", str(place / "subnet.env"), "-d", str(place / "out")]
        node.command("ip", "route", "add", "10.1.0.0/16", "via", "198.18.0.2")
        node.command(*argv)
        node.command("ip", "route", "add", "10.1.74.0/24", "via", "198.18.0.2")
        done = node.command(*argv, check=False)
        assert done.returncode == 1
        assert "a route to 10.1.74.0/24 through a gateway stands on eth0" in done.stderr
