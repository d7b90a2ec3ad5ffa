"""The control socket, asked as the `loden` command asks it and as somebody who means no good does."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dataplane.debug import control
from dataplane.debug.control import ControlServer, request
from dataplane.errors import KernelError, LodenError


def refuse(arguments: dict[str, Any]) -> dict[str, Any]:
    raise LodenError(f"cannot do {arguments['what']}")


VERBS = {"echo": lambda arguments: {"got": arguments}, "refuse": refuse}


@pytest.fixture
async def path(tmp_path: Path) -> AsyncIterator[Path]:
    place = tmp_path / "deep" / "loden.sock"
    server = await ControlServer.start(place, VERBS)
    yield place
    await server.close()
    assert not place.exists()


async def ask(path: Path, verb: str, **arguments: Any) -> dict[str, Any]:
    return await asyncio.to_thread(request, str(path), verb, **arguments)


async def raw(path: Path, line: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(line)
    writer.write_eof()
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    return answer


async def test_a_verb_gets_its_arguments_and_answers(path: Path) -> None:
    assert await ask(path, "echo", a=1, b=["x"]) == {"got": {"a": 1, "b": ["x"]}}


async def test_only_the_owner_may_open_it(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_refusal_is_the_callers_error(path: Path) -> None:
    with pytest.raises(LodenError, match="refuses refuse: cannot do harm"):
        await ask(path, "refuse", what="harm")


async def test_an_unknown_verb_names_the_known_ones(path: Path) -> None:
    with pytest.raises(LodenError, match="known: echo, refuse"):
        await ask(path, "dance")


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b"[1]\n", b"\xff\xfe\n", b'{"verb": 1}\n', b"[" * 5000 + b"\n"])
async def test_garbage_is_answered_with_an_error_and_harms_nobody(path: Path, line: bytes) -> None:
    assert b'"error"' in await raw(path, line)
    assert await ask(path, "echo") == {"got": {}}


async def test_an_endless_line_ends_only_its_own_connection(path: Path) -> None:
    assert await raw(path, b"x" * (control.MAX_LINE * 2)) == b""
    assert await ask(path, "echo") == {"got": {}}


async def test_another_user_gets_no_answer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulation: the kernel is made to say that the caller is user 12345."""
    monkeypatch.setattr(control, "_peer_uid", lambda _writer: 12345)
    with pytest.raises(LodenError, match="only root and its own user"):
        await ask(path, "echo")


async def test_the_kernel_says_who_calls(path: Path) -> None:
    seen = []
    real = control._peer_uid

    def noting(writer: asyncio.StreamWriter) -> int:
        seen.append(real(writer))
        return seen[-1]

    control._peer_uid = noting
    try:
        await ask(path, "echo")
    finally:
        control._peer_uid = real
    assert seen == [os.geteuid()]


async def test_a_socket_that_a_killed_daemon_left_is_replaced(tmp_path: Path) -> None:
    place = tmp_path / "loden.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(place))
    left.close()
    server = await ControlServer.start(place, VERBS)
    assert await ask(place, "echo") == {"got": {}}
    await server.close()


async def test_a_file_in_the_place_is_not_touched(tmp_path: Path) -> None:
    place = tmp_path / "loden.sock"
    place.write_text("precious")
    with pytest.raises(KernelError, match="no socket is there already"):
        await ControlServer.start(place, VERBS)
    assert place.read_text() == "precious"


def test_nobody_there_says_what_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(LodenError, match="is flanneld running"):
        request(str(tmp_path / "none.sock"), "status")
