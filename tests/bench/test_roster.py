"""Who takes part in a benchmark, as its command line names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataplane.bench.roster import Brought, candidates
from dataplane.errors import ConfigError


def test_what_is_brought_by_a_relative_path_is_started_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    brought = candidates((), Brought(flannelds=["go=mine,udp,vxlan"], tunnels=["t=./mine"]), [])
    assert [each.name for each in brought] == ["go-udp", "go-vxlan", "t"]
    programs = [vars(each).get("_program") or vars(each).get("_script") for each in brought]
    assert programs == [mine, mine, mine]


@pytest.mark.parametrize(
    ("brought", "said"),
    [
        (Brought(flannelds=["go"]), r"--flanneld=go: it is NAME=PATH"),
        (Brought(flannelds=["go=/nowhere/flanneld"]), "/nowhere/flanneld is no program that can be started"),
        (Brought(tunnels=["=x"]), r"--tunnel==x: it is NAME=SCRIPT"),
        (Brought(ours=["k1=ipsec"]), r"--ours=k1=ipsec: it is NAME=BACKEND"),
    ],
)
def test_what_cannot_take_part_is_refused_in_a_sentence(brought: Brought, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        candidates((), brought, [])
