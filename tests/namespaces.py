"""Owns the network namespaces of the tests: made under unique names, entered, and removed with what runs in them.

Free of: pytest. Invariant: nothing is ever made in the machine's own namespace but the name under /run/netns, and
`Namespace.close` ends the processes that `spawn` started before it removes that name.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """One network namespace with its loopback up. Make it with `open_namespace` or `open_namespaces`."""

    def __init__(self) -> None:
        self.name = f"loden-t-{secrets.token_hex(5)}"
        self._spawned: list[subprocess.Popen[str]] = []
        _must("ip", "netns", "add", self.name)
        self.command("ip", "link", "set", "lo", "up")

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function of this process inside the namespace; what it returns or raises comes back.

        It runs in a thread of its own, since a namespace is a property of a thread; threads and processes that it
        starts are inside as well. A coroutine function goes in as `run(asyncio.run, main())`. Beware that
        /proc/self/net shows the main thread's namespace; /proc/thread-self/net and /proc/sys/net show this one.
        """
        outcome: list[R] = []
        failure: list[BaseException] = []

        def inside() -> None:
            try:
                self._enter()
                outcome.append(function(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, whatever it is
                failure.append(error)

        thread = threading.Thread(target=inside, name=self.name)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return outcome[0]

    def command(
        self, *argv: str, check: bool = True, stdin: str = "", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside and wait for it; with `check`, a failure raises and shows what it printed."""
        return _must(*self.argv(*argv), check=check, stdin=stdin, timeout=timeout)

    def spawn(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command inside, text on pipes; `pid` is the command's own. `close` kills it if it still runs."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process: subprocess.Popen[str] = subprocess.Popen(self.argv(*argv), text=True, **{**pipes, **options})
        self._spawned.append(process)
        return process

    def spawn_python(
        self,
        code: str,
        *args: str,
        dropped: Sequence[str] = (),
        hidden: Sequence[str] = (),
        read_only: Sequence[str] = (),
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start this interpreter on `code` inside, able to import the project; see `spawn`.

        `dropped`: capabilities that it shall lack (`net_admin`). Directories that shall look empty to it (`hidden`)
        or be read-only for it; the rest of the machine does not see that.
        """
        options.setdefault("cwd", str(Path(__file__).parent.parent))
        prefix: list[str] = []
        mounts = [f"mount -t tmpfs none {directory}" for directory in hidden]
        mounts += [f"mount -o bind,ro {directory} {directory}" for directory in read_only]
        if mounts:
            prefix += ["unshare", "--mount", "sh", "-c", f'{" && ".join(mounts)} && exec "$0" "$@"']
        if dropped:
            without = ",".join(f"-{capability}" for capability in dropped)
            prefix += ["setpriv", f"--bounding-set={without}", f"--inh-caps={without}"]
        return self.spawn(*prefix, sys.executable, "-c", code, *args, **options)

    def argv(self, *argv: str) -> Sequence[str]:
        """The command line that runs `argv` inside; it becomes `argv` by exec, so its process id stays."""
        return ("ip", "netns", "exec", self.name, *argv)

    def link_to(self, other: Namespace, name: str, other_name: str) -> None:
        """Join two namespaces by a veth pair, both ends up."""
        self.command("ip", "link", "add", name, "type", "veth", "peer", "name", other_name, "netns", other.name)
        self.command("ip", "link", "set", name, "up")
        other.command("ip", "link", "set", other_name, "up")

    def close(self) -> None:
        """Kill what `spawn` started and remove the namespace. Safe to call twice."""
        for process in self._spawned:
            if process.poll() is None:
                process.kill()
            process.communicate()
        self._spawned.clear()
        if Path("/run/netns", self.name).exists():
            _must("ip", "netns", "del", self.name)

    def _enter(self) -> None:
        descriptor = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(descriptor, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter network namespace {self.name}")
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def open_namespaces(count: int) -> Iterator[list[Namespace]]:
    """`count` namespaces, removed at the end of the block whatever happens in it."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            namespace = Namespace()
            stack.callback(namespace.close)
            made.append(namespace)
        yield made


@contextlib.contextmanager
def open_namespace() -> Iterator[Namespace]:
    """One namespace, removed at the end of the block whatever happens in it."""
    with open_namespaces(1) as (namespace,):
        yield namespace


def _must(*argv: str, check: bool = True, stdin: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done
