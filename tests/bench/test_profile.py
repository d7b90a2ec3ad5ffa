"""Underlay profiles: those that come with the package, and what a wrong file is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataplane.bench import profile
from dataplane.errors import ConfigError

TUNNEL = {"tx-udp_tnl-segmentation": False, "tx-udp_tnl-csum-segmentation": False, "gro": True}


def test_the_four_profiles() -> None:
    found = {name: profile.load(name) for name in ("P1", "p2", "p2x", "p3")}
    assert found["P1"].ethtool == {}
    assert found["p2"].ethtool == TUNNEL
    assert found["p2x"].ethtool == {**TUNNEL, "tx-udp-segmentation": False}
    assert found["p3"].ethtool == {**TUNNEL, "tx-udp-segmentation": False, "tso": False, "gso": False}
    assert {one.congestion for one in found.values()} == {"cubic"}
    assert {one.mtu for one in found.values()} == {1500}
    assert {(one.loss, one.delay_ms) for one in found.values()} == {(0.0, 0.0)}


def test_the_profiles_of_a_bad_or_large_underlay() -> None:
    assert profile.load("jumbo").mtu == 9000
    for name, loss in (("loss0.1", 0.001), ("loss1", 0.01)):
        found = profile.load(name)
        assert found.loss == loss
        assert not any(found.ethtool.values())
    assert profile.load("delay1").delay_ms == 1.0


def test_every_profile_of_the_package_is_whole() -> None:
    for name in profile.names():
        assert profile.load(name).title
        assert profile.load(name).description


def test_a_profile_of_the_users_is_one_file(tmp_path: Path) -> None:
    file = tmp_path / "jumbo.toml"
    file.write_text('title = "jumbo"\n[underlay]\nmtu = 9000\n[ethtool]\ngro = false\n')
    found = profile.load(str(file))
    assert (found.name, found.title, found.mtu, found.ethtool) == ("jumbo", "jumbo", 9000, {"gro": False})
    assert found.congestion == "cubic"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title = 1", "title must be text"),
        ("", "title must be text"),
        ('title = "x"\ntitel = "y"', "titel is not known"),
        ('title = "x"\n[underlay]\nmut = 1500', "underlay.mut is not known"),
        ('title = "x"\n[underlay]\nmtu = 100', "underlay.mtu"),
        ('title = "x"\n[ethtool]\ngro = "off"', "ethtool.gro must be true or false"),
        ('title = "x', "Unterminated string"),
        ('title = "x"\n[underlay]\nloss = 0.01', "underlay.loss needs tx-udp-segmentation = false, tso = false"),
        ('title = "x"\n[underlay]\nloss = 2', "underlay.loss must be a number from 0 to 0.5"),
        ('title = "x"\n[underlay]\ndelay_ms = true', "underlay.delay_ms must be a number"),
    ],
)
def test_a_wrong_profile_is_told_where(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        profile.parse("x", text, "/somewhere/x.toml")
    assert "/somewhere/x.toml" in str(error.value)


def test_an_unknown_profile_names_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="p2x"):
        profile.load("p9")
