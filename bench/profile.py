"""Owns the underlay profiles: one TOML file each, `profiles/NAME.toml` or a file of the user's.

Free of: how a profile is applied. Invariant: a key that is not known is an error, so a misspelt feature is not measured
as if it had been set.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataplane.errors import ConfigError

_MERGING = ("tx-udp-segmentation", "tso", "gso", "gro")
"""What makes one frame of the underlay stand for many packets."""

DIRECTORY = Path(__file__).parent / "profiles"


@dataclass(frozen=True, slots=True)
class Profile:
    """`ethtool`: feature names of `ethtool -K` for both ends of the underlay, on top of the device's own defaults.
    `loss`: share of the frames that is lost each way; `delay_ms`: how long each way takes besides, where the kernel can
    do it."""

    name: str
    title: str
    description: str
    congestion: str
    mtu: int
    ethtool: Mapping[str, bool]
    loss: float = 0.0
    delay_ms: float = 0.0


def names() -> list[str]:
    """The profiles that come with the package."""
    return sorted(file.stem for file in DIRECTORY.glob("*.toml"))


def load(name: str) -> Profile:
    """A profile by its name or by the path of its file. Raises ConfigError."""
    path = Path(name) if name.endswith(".toml") else DIRECTORY / f"{name.lower()}.toml"
    try:
        text = path.read_text()
    except OSError as error:
        what = f"{name!r} is no profile ({error.strerror})"
        raise ConfigError(f"{what}: take one of {', '.join(names())}, or the path of a .toml file") from None
    return parse(path.stem, text, str(path))


def parse(name: str, text: str, origin: str) -> Profile:
    """Read a profile's text. Raises ConfigError naming `origin`."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: {error}") from None
    try:
        return _checked(name, document)
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None


def _checked(name: str, document: dict[str, Any]) -> Profile:
    _only(document, "", ("title", "description", "congestion", "underlay", "ethtool"))
    underlay, ethtool = document.get("underlay", {}), document.get("ethtool", {})
    _only(underlay, "underlay.", ("mtu", "loss", "delay_ms"))
    for feature, state in ethtool.items():
        if not isinstance(state, bool):
            raise ValueError(f"ethtool.{feature} must be true or false, not {state!r}")
    words: dict[str, str] = {}
    for key, default in (("title", None), ("description", ""), ("congestion", "cubic")):
        value = document.get(key, default)
        if not isinstance(value, str):
            raise ValueError(f"{key} must be text, not {value!r}")
        words[key] = value
    mtu = underlay.get("mtu", 1500)
    if not isinstance(mtu, int) or not 576 <= mtu <= 65_535:
        raise ValueError(f"underlay.mtu must be from 576 to 65535, not {mtu!r}")
    loss, delay_ms = (_number(underlay, key, most) for key, most in (("loss", 0.5), ("delay_ms", 1000.0)))
    if loss and not all(ethtool.get(feature) is False for feature in _MERGING):
        off = ", ".join(f"{feature} = false" for feature in _MERGING)
        raise ValueError(f"underlay.loss needs {off} in [ethtool]: else whole superframes would be lost at once")
    return Profile(name=name, mtu=mtu, ethtool=ethtool, loss=loss, delay_ms=delay_ms, **words)


def _number(underlay: dict[str, Any], key: str, most: float) -> float:
    value = underlay.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise ValueError(f"underlay.{key} must be a number from 0 to {most:g}, not {value!r}")
    return float(value)


def _only(table: dict[str, Any], prefix: str, known: tuple[str, ...]) -> None:
    if unknown := [key for key in table if key not in known]:
        raise ValueError(f"{prefix}{unknown[0]} is not known; what there is: {', '.join(known)}")
