"""dataplane/memory.py: what a next start finds, and that writing it never costs a daemon more than a log line."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from dataplane import memory
from dataplane.kernel import subnetfile
from dataplane.lease.allocate import Claim
from dataplane.lease.model import Lease, LeaseAttrs, LeaseKey
from dataplane.lease.store import Entry, Snapshot
from dataplane.memory import Memory, Past

STORE, CONFIG = "etcd http://198.18.0.1:2379 prefix /coreos.com/network/", b'{"Network":"10.5.0.0/16"}'
ATTRS = LeaseAttrs(IPv4Address("192.0.2.1"), IPv6Address("fd00:198:18::1"))
OWN = Entry("10.5.1.7-24", ATTRS.encode(), 5, 9)


def peer(number: int) -> Lease:
    key = LeaseKey.parse(f"10.5.{number}.0-24")
    return Lease(key, LeaseAttrs(IPv4Address(f"192.0.2.{number}")), number, number)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "subnet.env.state")


def lived(path: str, own: Entry = OWN, left: float | None = 1000.0) -> Memory:
    """A daemon that had a lease."""
    former = Memory(path)
    former.keep_device("flannel0")
    former.keep_network(STORE, CONFIG)
    former.keep_lease(own, left)
    return former


def test_nothing_is_remembered_of_nothing(path: str) -> None:
    fresh = Memory(path)
    assert (fresh.device, fresh.claim(), fresh.past(STORE)) == ("", None, None)


def test_a_lease_is_remembered_with_what_is_left_of_its_ttl(path: str) -> None:
    lived(path)
    later = Memory(path)
    assert later.device == "flannel0"
    assert later.claim() == Claim(OWN.key, 5, ATTRS.public_ip, ATTRS.public_ipv6)
    past = later.past(STORE)
    assert past is not None
    assert past.left is not None
    assert 900 < past.left <= 1000
    assert past == Past(CONFIG, OWN, past.left, Snapshot(0, (OWN,)))


def test_a_lease_that_has_expired_or_is_of_another_store_or_config_is_no_past(path: str) -> None:
    lived(path, left=-1.0)
    assert Memory(path).past(STORE) is None
    lived(path)
    assert Memory(path).past("etcd http://198.18.0.1:2379 prefix /other/") is None
    Memory(path).keep_network(STORE, CONFIG)
    assert Memory(path).past(STORE) is not None, "the same network again"
    Memory(path).keep_network(STORE, b'{"Network":"10.6.0.0/16"}')
    assert Memory(path).past(STORE) is None
    assert Memory(path).claim() is None


def test_after_a_reboot_the_wall_clock_counts_and_a_reservation_never_ends(path: str) -> None:
    lived(path)
    state = replace(subnetfile.read_state(path), boot_id="another")
    for expires, found in ((time.time() + 500, True), (time.time() - 1, False)):
        subnetfile.write_state(path, replace(state, expires=expires))
        past = Memory(path).past(STORE)
        assert (past is not None) == found
        assert past is None or (past.left is not None and 400 < past.left <= 500)
    lived(path, replace(OWN, reserved=True), None)
    past = Memory(path).past(STORE)
    assert past is not None
    assert past.left is None


async def test_peers_are_written_at_once_after_a_quiet_time_and_then_gathered(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = subnetfile.write_state

    def counted(where: str, state: subnetfile.DaemonState) -> None:
        write(where, state)
        written.append(len(state.peers))

    keeping = lived(path)
    monkeypatch.setattr(subnetfile, "write_state", counted)
    monkeypatch.setattr(memory, "PEERS_INTERVAL", 1.0)
    peers: dict[str, Lease] = {}
    for number in range(2, 22):
        peers[f"10.5.{number}.0-24"] = peer(number)
        keeping.keep_peers(lambda: (30 + len(peers), peers))
        await asyncio.sleep(0.02)
    async with asyncio.timeout(20):
        while not written or written[-1] < 20:  # noqa: ASYNC110 - a thread writes, and nobody is told
            await asyncio.sleep(0.02)
    count = len(written)
    assert 2 <= count <= 5, "twenty changes, in a few writes"
    past = Memory(path).past(STORE)
    assert past is not None
    assert past.snapshot.revision == 50
    assert {entry.key for entry in past.snapshot.entries} == {*peers, OWN.key}
    assert past.snapshot.entries[0] == Entry("10.5.2.0-24", peer(2).attrs.encode(), 2, 2)
    keeping.keep_peers(lambda: (99, {}))
    await keeping.close()
    assert len(written) == count


async def test_what_changes_during_a_write_is_in_the_next_one_and_only_one_waits(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping = lived(path)
    monkeypatch.setattr(memory, "PEERS_INTERVAL", 0.2)
    monkeypatch.setattr(memory, "_SLICE", 1)
    peers = {f"10.5.{number}.0-24": peer(number) for number in range(2, 12)}
    asked: list[int] = []

    def known() -> tuple[int, dict[str, Lease]]:
        asked.append(len(peers))
        return len(peers), peers

    keeping.keep_peers(known)
    async with asyncio.timeout(20):
        while not asked:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.001)
        for number in range(12, 15):
            peers[f"10.5.{number}.0-24"] = peer(number)
            keeping.keep_peers(known)
        revisions = set()
        while 13 not in revisions:
            revisions.add(subnetfile.read_state(path).revision)
            await asyncio.sleep(0.01)
    assert asked == [10, 13]
    assert revisions <= {0, 10, 13}, "a write holds what was true at one moment"
    assert len(subnetfile.read_state(path).peers) == 13


async def test_many_peers_are_written_less_often(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keeping = lived(path)
    monkeypatch.setattr(memory, "PEERS_INTERVAL", 0.0)
    monkeypatch.setattr(memory, "PEERS_A_SECOND", 1)
    peers = {f"10.5.{number}.0-24": peer(number) for number in range(2, 102)}
    asked: list[int] = []

    def known() -> tuple[int, dict[str, Lease]]:
        asked.append(len(asked))
        return len(asked), peers

    for _ in range(50):
        keeping.keep_peers(known)
        await asyncio.sleep(0.02)
    assert asked == [0]
    await keeping.close()


def test_a_disk_that_cannot_be_written_is_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.ERROR):
        lived(str(tmp_path / "file" / "state")).keep_device("flannel1")
    assert "Cannot keep the state for the next start: cannot write" in caplog.text
