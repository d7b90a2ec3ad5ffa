"""Owns a run of the fuzz targets: `python -m tests.fuzz.fuzzing DIRECTORY FIRST COUNT` executes in this process, where
a crash is a crash; `fuzz` does it in processes of its own and says which execution crashed.

Invariant: an execution is known by its number alone, so `FIRST 1` repeats it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from dataplane.debug import expression
from dataplane.errors import DropReason
from tests.fuzz.building import ROOT, build_fuzzer

ROUTE = struct.Struct("=16s16sIHBB6s2x")  # see dataplane._fib.Fib.updated
PEERS = 4
FILTER = (
    "not (tcp and src port 1 and greater 60000) and (drop or net 10.1.0.0/16 or ip6 net fd00::/16 or icmp or icmp6"
    " or peer 198.18.0.1 or peer fd00:198:18::1 or vni 1 or less 100 or udp portrange 1-40000)"
)
"""Asks all that a filter can ask."""


def routes() -> bytes:
    """10.1.N.0/24 and fd00::a01:N00/120 behind 198.18.0.N, and for VXLAN over IPv6 fd00::a01:N00/121 behind
    fd00:198:18::N; the last one's path takes less than ours."""
    found = []
    for n in range(1, PEERS + 1):
        v4, mapped = bytes((10, 1, n, 0)), bytes(10) + b"\xff\xff"
        v6, at = b"\xfd" + bytes(11) + v4, mapped + bytes((198, 18, 0, n))
        outer = bytes.fromhex("fd0001980018") + bytes(9) + bytes([n])
        mtu, mac = 300 if n == PEERS else 0, bytes((2, 0, 0, 0, 0, n))
        found.append(ROUTE.pack(mapped + v4, at, n, mtu, 96 + 24, 0, mac))
        found.append(ROUTE.pack(v6, at, n + PEERS, mtu, 120, 0, mac))
        found.append(ROUTE.pack(v6, outer, n + 2 * PEERS, mtu, 121, 0, mac))
    return b"".join(found)


def run_here(built: Path, first: int, count: int, position: Path) -> int:
    """Execute in this process and print what was reached as JSON; 1 if a property did not hold."""
    sys.path.insert(0, str(built.absolute()))
    import _fuzz  # type: ignore[import-not-found]  # compiled on demand

    from dataplane._fib import Fib
    from dataplane._tap import Tap, TapSet

    reasons = tuple(reason.name.encode() for reason in DropReason)
    chosen = expression.compile_filter(expression.parse(FILTER))
    taps = [Tap(chosen, 99, 1 << 20, reasons), Tap(b"", 65535, 1 << 20, reasons)]
    ends: Any = {"port": 1, "peers_port": 1, "ports": tuple(range(8)), "ttl": 64, "dont_fragment": True}
    of_packets = TapSet(taps, local=bytes((198, 18, 0, 9)), **ends)
    of_frames = TapSet(taps, local=b"\xfd" + bytes(14) + b"\x09", vni=1, skip=22, path=1, **ends)

    with position.open("r+b") as file, mmap.mmap(file.fileno(), mmap.PAGESIZE) as shared:
        words = memoryview(shared).cast("Q")
        sink = os.open(os.devnull, os.O_WRONLY)
        found = _fuzz.run(first, count, Fib(routes()), taps, of_packets, of_frames, sink, words)
        words.release()
    sys.stdout.write(json.dumps(found) + "\n")
    return 1 if found["failed"] else 0


def fuzz(
    built: Path,
    first: int,
    count: int,
    *,
    processes: int = 2,
    timeout: float = 600,
    environment: dict[str, str] | None = None,
    root: Path = ROOT,
) -> Counter[str]:
    """Execute `count` executions from `first` on, in processes side by side. Raises AssertionError for a crash, with
    the number of the execution, and for a property that did not hold."""
    share = -(-count // processes)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        running = []
        for i in range(processes):
            position = Path(scratch, str(i))
            position.write_bytes(bytes(mmap.PAGESIZE))
            command = [sys.executable, "-m", "tests.fuzz.fuzzing", str(built), str(first + i * share), str(share)]
            process = subprocess.Popen(
                [*command, "--position", str(position)],
                cwd=root,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            running.append((process, position))
        try:
            for process, position in running:
                out, err = process.communicate(timeout=timeout)
                (number,) = struct.unpack_from("Q", position.read_bytes())
                again = f"repeat with: python -m tests.fuzz.fuzzing {built} {number} 1"
                ended = f"ended with {process.returncode} in execution {number}"
                assert process.returncode == 0, f"{ended}; {again}\n{out}{err}"
                report = json.loads(out)
                del report["failed"]
                found.update(report)
        finally:
            for process, _ in running:
                process.kill()
                process.wait()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the packet path.")
    parser.add_argument("built", type=Path, help="directory of the compiled targets; compiled there if missing")
    parser.add_argument("first", type=int, help="number of the first execution")
    parser.add_argument("count", type=int)
    parser.add_argument("--position", type=Path, help="file for the number of the current execution; one process")
    parser.add_argument("--rebuild", action="store_true", help="compile even if something is there")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args()
    if chosen.rebuild or not list(chosen.built.glob("_fuzz*.so")):
        build_fuzzer(chosen.built.absolute())
    if chosen.position is not None:
        return run_here(chosen.built, chosen.first, chosen.count, chosen.position)
    began = time.monotonic()
    found = fuzz(chosen.built, chosen.first, chosen.count, processes=chosen.processes, timeout=7 * 86400)
    spent = time.monotonic() - began
    share = found["reached"] / found["executions"]
    sys.stdout.write(
        f"{found['executions']:,} executions from {chosen.first} on in {spent:.0f} s, none failed; "
        f"{share:.0%} cut or made a superframe\n{dict(found)}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
