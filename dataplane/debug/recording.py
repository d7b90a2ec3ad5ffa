"""Owns what becomes of a capture on the client's side: a file, a ring of files, a pipe, or readable lines.

Free of: how a capture is asked for. Invariant: a file that this module leaves is whole, with a last block that ends,
also where the disk was full; it can be read by nobody but its owner.
"""

from __future__ import annotations

import io
import json
import os
import stat
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

from dataplane.debug import dissect, pcapng
from dataplane.debug.pcapng import Readable
from dataplane.errors import CaptureError

CHUNK = 1 << 18
FOOT = 4096
"""Bytes at the end of a capture in which its statistics are looked for."""

_HEAD_BLOCKS = (pcapng.SECTION, pcapng.INTERFACE, pcapng.NAMES)


def open_file(path: Path) -> BinaryIO:
    """A file of mode 0600 in place of what was there; a pipe or a device as it is. Raises CaptureError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY, 0o600)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, 0o600)
            os.ftruncate(descriptor, 0)
        return os.fdopen(descriptor, "wb", buffering=0)
    except OSError as error:
        raise CaptureError(f"cannot write {path}: {error.strerror}") from None


class Chunks(Protocol):
    def read1(self, size: int, /) -> bytes:
        """What there is, up to `size` bytes, as soon as there is something; empty at the end."""


def copy(stream: Chunks, target: BinaryIO, name: str) -> list[pcapng.Statistics]:
    """Write a whole capture to one file or pipe; returns its statistics. Raises CaptureError where the target takes no
    more, and BrokenPipeError where its reader is gone."""
    tail = b""
    try:
        while chunk := stream.read1(CHUNK):
            _write(target, chunk)
            tail = (tail + chunk)[-FOOT:]
    except BrokenPipeError:
        raise
    except OSError as error:
        kept = _cut_to_whole_blocks(target)
        raise CaptureError(f"cannot go on writing {name}: {error.strerror}{kept}") from None
    return _statistics(tail)


class Ring:
    """Files in turn, each a capture of its own: NAME_0001.pcapng and so on; the oldest goes where there are more than
    `keep`."""

    def __init__(self, path: Path, *, size: int, seconds: float, keep: int) -> None:
        """`size` in bytes, `seconds` of packets: what a file holds at most; 0 for no limit. `keep` 0: all."""
        self._path = path
        self._size = size
        self._ns = round(seconds * 1e9)
        self._keep = keep
        self._head = b""
        self._files: deque[Path] = deque()
        self._number = 0
        self._file: BinaryIO | None = None
        self._filled = 0
        self._began = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def take(self, stream: Readable) -> list[pcapng.Statistics]:
        """Write a whole capture. Raises CaptureError."""
        statistics: list[pcapng.Statistics] = []
        reader = pcapng.Reader(stream, "the daemon")
        for kind, body in pcapng.raw_blocks(stream, "the daemon", reader):
            block = reader.take(kind, body)
            if kind in _HEAD_BLOCKS:
                self._head += pcapng.block(kind, body)
                continue
            if isinstance(block, pcapng.Statistics):
                statistics.append(block)
            self._write(pcapng.block(kind, body), block.ns if isinstance(block, pcapng.Packet) else 0)
        return statistics

    def _write(self, data: bytes, ns: int) -> None:
        full = self._size and self._filled + len(data) > self._size and self._filled > len(self._head)
        late = self._ns and ns and self._began and ns - self._began >= self._ns
        if self._file is None or full or late:
            self._next()
        self._began = self._began or ns
        self._put(data)

    def _next(self) -> None:
        if self._file is not None:
            self._file.close()
        self._number += 1
        path = self._path.with_name(f"{self._path.stem}_{self._number:04d}{self._path.suffix or '.pcapng'}")
        self._file = open_file(path)
        self._files.append(path)
        if self._keep and len(self._files) > self._keep:
            self._files.popleft().unlink(missing_ok=True)
        self._filled = self._began = 0
        self._put(self._head)

    def _put(self, data: bytes) -> None:
        if self._file is None:
            raise RuntimeError("a file is opened before the first block is written")
        try:
            _write(self._file, data)
        except OSError as error:
            kept = _cut_to_whole_blocks(self._file)
            raise CaptureError(f"cannot go on writing {self._files[-1]}: {error.strerror}{kept}") from None
        self._filled += len(data)


def show(stream: Readable, put: Callable[[str], None], *, as_json: bool = False) -> list[pcapng.Statistics]:
    """A line for each packet, readable or an object of JSON: of the inner one, or of the outer one where that is all.
    Raises CaptureError."""
    statistics: list[pcapng.Statistics] = []
    for block in pcapng.Reader(stream, "the daemon"):
        if isinstance(block, pcapng.Statistics):
            statistics.append(block)
        elif isinstance(block, pcapng.Packet):
            if block.lost:
                lost = {"missing": block.lost}
                put(json.dumps(lost) if as_json else f"--- {block.lost} packets are missing here")
            if block.interface.name == "overlay" or " inner=" in block.comment:
                put(json.dumps(dissect.document(block)) if as_json else dissect.line(block))
    return statistics


def _write(target: BinaryIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[target.write(rest) or 0 :]


def _cut_to_whole_blocks(target: BinaryIO) -> str:
    """Take off a block that was begun and not finished; words about what is left."""
    if not stat.S_ISREG(os.fstat(target.fileno()).st_mode):
        return ""
    with open(f"/proc/self/fd/{target.fileno()}", "rb") as file:
        end, packets = 0, 0
        try:
            for kind, body in pcapng.raw_blocks(file, ""):
                end += len(body) + 12
                packets += kind == pcapng.PACKET
        except CaptureError:
            os.ftruncate(target.fileno(), end)
    return f"; what was written before is whole: {packets} blocks of packets"


def _statistics(tail: bytes) -> list[pcapng.Statistics]:
    """The statistics at the end of a capture, found from behind: each block ends with its length."""
    found: list[pcapng.Statistics] = []
    end = len(tail)
    interfaces = [pcapng.Interface(number, pcapng.LINKTYPE_RAW, 0) for number in range(2)]
    while end >= 12:
        length = int.from_bytes(tail[end - 4 : end], "little")
        block = tail[end - length : end] if 12 <= length <= end else b""
        if int.from_bytes(block[:4], "little") != pcapng.STATISTICS:
            break
        found.insert(0, pcapng.Reader(io.BytesIO(), "the daemon", interfaces).statistics(block[8:-4]))
        end -= length
    return found
