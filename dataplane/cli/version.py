"""Owns `loden version`."""

from __future__ import annotations

import argparse

import dataplane


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verbs.add_parser("version", help="print the version").set_defaults(run=_version)


def _version(_arguments: argparse.Namespace) -> int:
    print(f"loden {dataplane.__version__}")
    return 0
