"""The steady beat: what it counts on a whole way, and what of one that is cut for a while."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.namespaces import Namespace, open_namespaces

pytestmark = pytest.mark.netns

BEAT = (sys.executable, "-m", "dataplane.lab.beat")


@pytest.fixture
def pair() -> Iterator[list[Namespace]]:
    with open_namespaces(2) as made:
        made[0].link_to(made[1], "left", "right")
        for namespace, name, number in ((made[0], "left", 1), (made[1], "right", 2)):
            namespace.command("ip", "addr", "add", f"198.18.0.{number}/24", "dev", name)
            namespace.command("ip", "addr", "add", f"fd00:198:18::{number}/64", "dev", name, "nodad")
        yield made


def start(pair: list[Namespace], host: str) -> subprocess.Popen[str]:
    sink = pair[1].spawn(*BEAT, "beat-sink", host)
    assert sink.stdout is not None
    assert sink.stdout.readline() == "ready\n"
    source = pair[0].spawn(*BEAT, "beat-source", host, "--rate=200", stdin=subprocess.PIPE)
    assert source.stdout is not None
    assert source.stdout.readline() == "ready\n"
    return source


@pytest.mark.parametrize("host", ["198.18.0.2", "fd00:198:18::2"])
def test_a_whole_way_loses_nothing(pair: list[Namespace], host: str) -> None:
    source = start(pair, host)
    time.sleep(0.5)
    result = json.loads(source.communicate(timeout=60)[0])
    assert source.returncode == 0, result
    assert result["sent"] == result["received"] > 0
    assert (result["lost"], result["duplicated"]) == (0, 0)


def test_a_cut_shows_as_loss_and_as_a_gap(pair: list[Namespace]) -> None:
    source = start(pair, "198.18.0.2")
    time.sleep(0.5)
    pair[0].command("ip", "link", "set", "left", "down")
    time.sleep(1.0)
    pair[0].command("ip", "link", "set", "left", "up")
    time.sleep(0.5)
    result = json.loads(source.communicate(timeout=60)[0])
    assert source.returncode == 1, result
    assert result["sent"] == result["received"] + result["lost"]
    assert result["lost"] > 0
    assert result["gap"] >= 1.0
