"""Owns `loden systemd-unit`: prints the unit that starts this installation's flanneld.

Free of: installing it; where a unit goes, and when it is enabled, is the operator's to say.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib import resources
from pathlib import Path

from dataplane.errors import ConfigError


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verbs.add_parser(
        "systemd-unit",
        help="print a hardened systemd unit for flanneld",
        description="Print a unit for this flanneld: loden systemd-unit > /etc/systemd/system/flanneld.service",
    ).set_defaults(run=_print)


def _print(_arguments: argparse.Namespace) -> int:
    sys.stdout.write(render(_flanneld()))
    return 0


def render(flanneld: str) -> str:
    """The unit's text for the program at that path."""
    return resources.files("dataplane.cli").joinpath("flanneld.service").read_text().replace("@FLANNELD@", flanneld)


def _flanneld() -> str:
    """The flanneld beside this `loden`; another on the PATH may be flannel's."""
    beside = Path(sys.argv[0]).absolute().with_name("flanneld")
    found = shutil.which(str(beside)) or shutil.which(str(Path(sys.executable).with_name("flanneld")))
    if found is None:
        raise ConfigError(f"there is no flanneld beside {sys.argv[0]}: was this program installed by pip?")
    return found
