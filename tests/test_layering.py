"""The house's import rules (docs/architecture.md): arrows go down only, and low floors do no IO."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dataplane"

FLOORS = {
    0: [
        "errors",
        "json_text",
        "patterns",
        "kernel.facts",
        "lease.model",
        "lease.store",
        "lease.overlap",
        "path.capability",
        "path.facts",
        "path.wire",
        "path.superframe",
    ],
    1: [
        "netconf",
        "options",
        "lease.table",
        "lease.allocate",
        "lease.ownership",
        "lease.retry",
        "lease.loss",
        "lease.texts",
        "lease.etcd_wire",
        "backend.base",
        "backend.peers",
        "kernel.pyroute",
        "kernel.rtnetlink",
        "kernel.rules",
        "kernel.steering",
        "kernel.packet_filter",
        "path.routes",
        "debug.expression",
        "debug.pcapng",
        "debug.fields",
        "debug.peers",
        "debug.scene",
        "debug.source",
    ],
    2: [
        "backend.attention",
        *("lease.sqlite_database", "lease.etcd_endpoint", "lease.config", "lease.gathering"),
        *("lease.acquire", "lease.journal"),
        *("kernel.*", "path.datapath"),
        *("debug.dissect", "debug.layers", "debug.metrics"),
    ],
    3: [
        *("backend.device", "backend.sockets", "backend.reports", "backend.entries"),
        *("lease.sqlite", "lease.etcd", "lease.keeper"),
        *("debug.reading", "debug.verdict", "debug.comparison", "debug.cutting", "debug.pairing"),
        "path.rehearsal",
    ],
    4: [
        "backend.*",  # but for those on 5, with the tunnel that they are made of
        "debug.status",
        "debug.capture",
        "debug.control",
        "debug.explain",
        "debug.recording",
        "debug.rehearsing",
        "debug.wiretap",
    ],
    5: ["backend.udp", "backend.vxlan", "debug.answers", "debug.replay"],
    6: ["daemon", "parts", "memory", "cleanup", "upkeep", "following", "collecting", "klog", "health", "systemd"],
    7: ["lab.*"],
    8: ["bench.*", "extcap"],
    9: ["cli.*"],
}
SANS_IO = (0, 1)
IO_MODULES = {"asyncio", "socket", "logging", "os", "time", "random", "subprocess", "threading", "signal", "secrets"}
GROUND = ("errors", "path.wire")
"""Imported by everything, importing nothing of the house."""

# a folder whose files gather their own siblings: the package is the unit there
GATHERING = ("bench", "cli", "lab")

# these two compose: they stand above the files that are on their floor only because nothing else may use them
COMPOSITION_ROOT = ("daemon", "parts")

EXT_FLOORS = {
    "abi": 0,
    "headers": 1,
    "_fib_table": 2,
    "_segment": 2,
    "_coalesce": 2,
    "_tap": 2,
    "_tunio": 2,
    "_udpio": 2,
    "_fib_build": 3,
    "_pump": 3,
    "_fib": 4,
    "_tx": 4,
    "_deliver": 4,
    "_rx": 5,
    "_duty": 6,
    "_engine": 7,
    "_rehearsal": 8,
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted([*PACKAGE.rglob("*.py"), *(PACKAGE / "bench").rglob("*.py")]):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        if name not in ("__init__", "__main__"):
            found[name] = path
    return found


def floor_of(module: str) -> int:
    for floor, names in FLOORS.items():
        if module in names:
            return floor
    for floor, names in FLOORS.items():
        if f"{module.split('.')[0]}.*" in names:
            return floor
    raise AssertionError(f"dataplane.{module} has no floor: give it one in docs/architecture.md and here")


def absolute_imports(path: Path) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def house_imports(path: Path) -> set[str]:
    known = modules()
    names = {name.removeprefix("dataplane.") for name in absolute_imports(path) if name.startswith("dataplane.")}
    return {name for name in names if name in known}


def is_package_init(path: Path) -> bool:
    return path.name == "__init__.py"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module: str) -> None:
    path = modules()[module]
    if is_package_init(path) and not path.read_text().strip():
        return
    mine = floor_of(module)
    folder = module.split(".")[0]
    for name in house_imports(path):
        if is_package_init(modules()[name]) and not modules()[name].read_text().strip():
            continue
        same_gathering = folder in GATHERING and name.split(".")[0] == folder
        allowed = floor_of(name) < mine or same_gathering or module in COMPOSITION_ROOT or name in GROUND
        assert allowed, f"dataplane.{module} (floor {mine}) imports dataplane.{name} (floor {floor_of(name)})"


@pytest.mark.parametrize("module", sorted(m for m in modules() if "." in m and m.split(".")[0] not in GATHERING))
def test_siblings_do_not_import_each_other(module: str) -> None:
    """Within a folder only types of a lower floor are shared."""
    folder = module.split(".")[0]
    for name in house_imports(modules()[module]):
        if name.startswith(f"{folder}.") and name not in (module, *GROUND):
            assert floor_of(name) < floor_of(module), f"dataplane.{module} imports its sibling dataplane.{name}"


@pytest.mark.parametrize("module", [module for floor in SANS_IO for module in FLOORS[floor]])
def test_low_floors_do_no_io(module: str) -> None:
    imports = absolute_imports(modules()[module])
    used = {name.split(".")[0] for name in imports}
    if {name for name in imports if name.startswith("random")} == {"random", "random.Random"}:
        used.discard("random")  # the type of an argument; the generator itself comes from the caller
    assert not used & IO_MODULES, f"dataplane.{module} is sans-IO but imports {sorted(used & IO_MODULES)}"


def test_only_the_datapath_imports_the_engine() -> None:
    compiled = {f"dataplane.{path.stem}" for path in (ROOT / "ext" / "dataplane").glob("*.pyx")}
    assert "dataplane._engine" in compiled
    users = {m for m, p in modules().items() if compiled & absolute_imports(p)}
    assert users == {"path.datapath", "path.rehearsal", "bench.micro"}, (
        "the path, the path without its threads, and bench.micro, which measures the compiled modules by themselves"
    )


def test_compiled_imports_go_down() -> None:
    for path in sorted((ROOT / "ext" / "dataplane").glob("*.p[xy][dx]")):
        if path.stem == "__init__":
            continue
        imported = re.findall(r"^from dataplane\.(\w+) cimport", path.read_text(), re.MULTILINE)
        for name in imported:
            assert EXT_FLOORS[name] < EXT_FLOORS[path.stem], f"{path.name} cimports {name}"


def test_the_rules_see_an_arrow_that_goes_up(tmp_path: Path) -> None:
    """The checks above can fail: an import of the daemon from floor 0 would be seen."""
    culprit = tmp_path / "model.py"
    culprit.write_text("from dataplane.daemon import main\n")
    assert house_imports(culprit) == {"daemon"}
    assert floor_of("daemon") > floor_of("lease.model")
