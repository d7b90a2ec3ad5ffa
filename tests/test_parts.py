"""Which backend stands for a net-conf and the flags. Who has vxlan is a fake here: this kernel has it."""

from __future__ import annotations

import asyncio
import json
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from dataplane import netconf, options, parts
from dataplane.backend.base import Underlay
from dataplane.errors import ConfigError
from dataplane.memory import Memory
from dataplane.path import datapath

FACING = Underlay("eth0", 2, IPv4Address("198.18.0.1"), IPv4Address("198.18.0.1"), 1500)


@pytest.fixture(autouse=True)
def gave_way(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled where the process would have lowered its priority, which a test cannot raise again."""
    calls: list[bool] = []
    monkeypatch.setattr(datapath, "give_way_to_pumps", lambda: calls.append(True))
    return calls


class Kernel:
    """In place of Netlink: a kernel that has vxlan devices, or has none."""

    def __init__(self, *, vxlan: bool) -> None:
        self._vxlan = vxlan

    async def has_vxlan(self) -> bool:
        return self._vxlan


def choose(tmp_path: Path, backend: dict[str, Any], *flags: str, vxlan: bool = True, start: bool = False) -> str:
    text = json.dumps({"Network": "10.5.0.0/16", "Backend": backend}).encode()
    memory = Memory(str(tmp_path / "state"))
    making = parts.make_backend(
        options.parse(flags, {}),
        netconf.parse(text, origin="test"),
        FACING,
        Kernel(vxlan=vxlan),  # type: ignore[arg-type]  # the one method that is asked
        memory,
    )
    chosen = asyncio.run(making)
    if start:
        parts.give_way(chosen)
    return type(chosen).__name__


@pytest.mark.parametrize(
    ("backend", "flags", "name"),
    [
        ({"Type": "vxlan"}, [], "KernelVxlanBackend"),
        ({"Type": "vxlan", "Dataplane": "auto"}, [], "KernelVxlanBackend"),
        ({"Type": "vxlan", "Dataplane": "userspace"}, ["-vxlan-dataplane=kernel"], "KernelVxlanBackend"),
        ({"Type": "vxlan", "Dataplane": "userspace"}, [], "VxlanBackend"),
        ({"Type": "vxlan", "Dataplane": "kernel"}, ["-vxlan-dataplane=userspace"], "VxlanBackend"),
        ({"Type": "host-gw"}, [], "HostGwBackend"),
        ({"Type": "alloc"}, ["-vxlan-dataplane=userspace"], "AllocBackend"),
        ({"Type": "udp"}, [], "UdpBackend"),
    ],
)
def test_the_flag_wins_then_the_net_conf(tmp_path: Path, backend: dict[str, Any], flags: list[str], name: str) -> None:
    assert choose(tmp_path, backend, *flags) == name


@pytest.mark.parametrize(
    ("dataplane", "flags"), [("auto", []), ("kernel", ["-vxlan-dataplane=auto"]), ("userspace", [])]
)
def test_a_kernel_without_vxlan_leaves_it_to_userspace(tmp_path: Path, dataplane: str, flags: list[str]) -> None:
    assert choose(tmp_path, {"Type": "vxlan", "Dataplane": dataplane}, *flags, vxlan=False) == "VxlanBackend"


def test_only_who_has_pumps_gives_way_to_them(tmp_path: Path, gave_way: list[bool]) -> None:
    choose(tmp_path, {"Type": "vxlan"}, start=True)
    choose(tmp_path, {"Type": "host-gw"}, start=True)
    choose(tmp_path, {"Type": "udp"})  # as `loden migrate check` does, which starts nothing
    assert not gave_way
    choose(tmp_path, {"Type": "udp"}, start=True)
    assert gave_way


def test_a_kernel_without_vxlan_is_told_with_the_way_out(tmp_path: Path) -> None:
    for backend in ({"Type": "vxlan"}, {"Type": "vxlan", "Dataplane": "kernel"}):
        with pytest.raises(ConfigError, match=r"no vxlan devices .*: use -vxlan-dataplane=userspace, or auto"):
            choose(tmp_path, backend, vxlan=False)


@pytest.mark.parametrize("kind", ["extension", "ipip", "ipsec", "tencent-vpc", "wireguard"])
def test_what_is_not_carried_is_told_in_one_sentence_with_what_to_use(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"^Backend\.Type '{kind}' is not carried by Loden: .*vxlan") as caught:
        choose(tmp_path, {"Type": kind})
    assert "\n" not in str(caught.value)


def test_a_dataplane_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match='invalid -vxlan-dataplane "kernal": use one of kernel, userspace, auto'):
        options.check(options.parse(["-vxlan-dataplane=kernal"], {}))
