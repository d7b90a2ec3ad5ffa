"""Owns `loden extcap`: puts the capture interface and the dissectors where Wireshark finds them.

Free of: what Wireshark asks (dataplane.extcap). Invariant: installing twice changes nothing, and only our own files are
replaced or removed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dataplane.errors import ConfigError, KernelError

PROGRAM, DISSECTORS = "loden", "loden.lua"
_MARK = "loden extcap install"


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("extcap", help="capture from within Wireshark and tshark", allow_abbrev=False)
    subverbs = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, text in (
        ("install", _install, "make `loden` an interface of Wireshark, and teach it udp mode and VXLAN on 8472"),
        ("remove", _remove, "take both out again"),
    ):
        verb = subverbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        verb.add_argument("--extcap-dir", type=Path, metavar="DIR", help="default: ~/.config/wireshark/extcap")
        verb.add_argument("--plugin-dir", type=Path, metavar="DIR", help="default: ~/.local/lib/wireshark/plugins")
        verb.set_defaults(run=run)


def _files(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Where the program and the dissectors go: Wireshark's personal folders (`tshark -G folders`)."""
    home = Path.home()
    configuration = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    program = arguments.extcap_dir or configuration / "wireshark" / "extcap"
    dissectors = arguments.plugin_dir or home / ".local" / "lib" / "wireshark" / "plugins"
    return program / PROGRAM, dissectors / DISSECTORS


def _install(arguments: argparse.Namespace) -> int:
    import dataplane
    from dataplane import debug, extcap

    program, dissectors = _files(arguments)
    root = Path(dataplane.__file__).parent.parent
    _write(program, extcap.SCRIPT.format(python=sys.executable, root=str(root)), 0o755)
    _write(dissectors, (Path(debug.__path__[0]) / DISSECTORS).read_text(), 0o644)
    print(f"{program}\n{dissectors}\nnext: tshark -i loden")
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    for path in _files(arguments):
        if path.exists():
            _check_ours(path)
            path.unlink()
            print(f"removed {path}")
    return 0


def _check_ours(path: Path) -> None:
    if path.exists() and _MARK not in path.read_text(errors="replace"):
        raise ConfigError(f"{path} is not ours, and stays as it is; move it away first")


def _write(path: Path, text: str, mode: int) -> None:
    _check_ours(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
    except OSError as error:
        raise KernelError(f"cannot write {path}: {error.strerror}") from None
