"""Owns building the fuzz targets, and the packet path itself with sanitizers or Cython's own checks, out of the way of
the checkout.

Free of running them. Invariant: nothing is written outside the directory that the caller names.
"""

from __future__ import annotations

import enum
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FUZZ = Path(__file__).parent
COPIED = ("pyproject.toml", "dataplane", "ext", "tests")

COMMON = ["-fno-strict-aliasing", "-Wno-unreachable-code"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class Flavour(enum.Enum):
    """How something is compiled."""

    SHIPPED = "as setup.py does it"
    SANITIZED = "with the sanitizers of addresses and of undefined behaviour"
    CHECKED = "with Cython's checks of indices and of memoryviews"


ARGUMENTS = {
    Flavour.SHIPPED: COMMON,
    Flavour.SANITIZED: ["-g1", "-fno-omit-frame-pointer", *COMMON, *SANITIZE],
    Flavour.CHECKED: COMMON,
}
UNUSED = "_rehearsal"
"""The pumps' ways once more, and so much to compile; the packet tests go through the pumps."""


def optimization(flavour: Flavour, name: str) -> str:
    """Millions of executions are worth compiling well; below a Python test that takes longer than it gives back."""
    if flavour is Flavour.SHIPPED:
        return "-O3"
    return "-O1" if name == "_fuzz" else "-O0"


def build_fuzzer(into: Path, flavour: Flavour = Flavour.SHIPPED) -> None:
    """Compile the fuzz targets alone, so that `_fuzz` can be imported with `into` in front of sys.path."""
    _build(into, flavour, {"_fuzz": FUZZ / "_fuzz.pyx"}, ROOT)


def build_tree(into: Path, flavour: Flavour, *, fuzz: bool) -> None:
    """A copy of the checkout in which the packet path, with `fuzz` also the fuzz targets, is compiled that way, to run
    tests/path in."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, into / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, into / name)
    sources = [source for source in sorted((into / "ext/dataplane").glob("*.pyx")) if source.stem != UNUSED]
    modules = {"_fuzz": into / "tests/fuzz/_fuzz.pyx"} if fuzz else {}
    _build(into, flavour, modules | {f"dataplane.{source.stem}": source for source in sources}, into)


def sanitizer_environment() -> dict[str, str]:
    """What a Python that is not sanitized itself needs to load sanitized extensions."""
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:malloc_context_size=1:quarantine_size_mb=16",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _build(into: Path, flavour: Flavour, modules: dict[str, Path], sources: Path) -> None:
    """In a process of its own: distutils keeps state, and two modules compile at a time."""
    command = [sys.executable, __file__, str(into), flavour.name, str(sources)]
    command += [f"{name}={source}" for name, source in modules.items()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=sources)
    if done.returncode != 0:
        raise AssertionError(f"the compiler failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def _compile(into: Path, flavour: Flavour, sources: Path, modules: dict[str, str]) -> None:
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    checks = flavour is Flavour.CHECKED
    extensions = [
        Extension(
            name,
            [path],
            include_dirs=[str(sources / "ext/dataplane")],
            extra_compile_args=[*ARGUMENTS[flavour], optimization(flavour, name)],
            extra_link_args=SANITIZE if flavour is Flavour.SANITIZED else [],
        )
        for name, path in modules.items()
    ]
    directives = {
        "language_level": 3,
        "boundscheck": checks,
        "initializedcheck": checks,
        "wraparound": False,
        "cdivision": True,
        "embedsignature": True,
    }
    made = cythonize(  # type: ignore[no-untyped-call]  # Cython has no annotations
        extensions,
        include_path=[str(sources / "ext"), str(sources / "tests/fuzz")],
        build_dir=str(into / "c"),
        compiler_directives=directives,
        quiet=True,
    )
    command = build_ext(Distribution({"ext_modules": made}))
    command.build_lib, command.build_temp, command.parallel = str(into), str(into / "o"), 2
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    named = (argument.partition("=") for argument in sys.argv[4:])
    _compile(Path(sys.argv[1]), Flavour[sys.argv[2]], Path(sys.argv[3]), {name: source for name, _, source in named})
