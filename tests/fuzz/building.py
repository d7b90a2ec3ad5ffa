"""Owns building the fuzz targets, and whatever is compiled with sanitizers or with checks of bounds, out of the way of
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
LEFT_OUT = (".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", ".hypothesis")

COMMON = ["-fno-strict-aliasing", "-Wno-unreachable-code"]
TOLD = ["-g1", "-fno-omit-frame-pointer", *COMMON]  # with file, line and callers in a report


class Flavour(enum.Enum):
    """How something is compiled."""

    SHIPPED = "as setup.py does it"
    SANITIZED = "with the sanitizers of addresses and of undefined behaviour"
    CHECKED = "with Cython's checks of indices, gcc's of arrays and of undefined behaviour, glibc's of lengths"
    THREADS = "with the sanitizer of data races"


SANITIZE = {
    Flavour.SHIPPED: [],
    Flavour.SANITIZED: ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    Flavour.CHECKED: ["-fsanitize=undefined", "-fno-sanitize-recover=all"],
    Flavour.THREADS: ["-fsanitize=thread"],
}
ARGUMENTS = {
    Flavour.SHIPPED: COMMON,
    Flavour.SANITIZED: TOLD,
    Flavour.CHECKED: [*TOLD, "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=3"],
    Flavour.THREADS: TOLD,
}
UNUSED = "_rehearsal"
"""The pumps' ways once more, and so much to compile; the packet tests go through the pumps."""


def optimization(flavour: Flavour, name: str) -> str:
    """Millions of executions are worth compiling well; below a Python test that takes longer than it gives back. glibc
    checks nothing in what was not optimized."""
    if flavour is Flavour.SHIPPED:
        return "-O3"
    return "-O0" if flavour is Flavour.SANITIZED and name != "_fuzz" else "-O1"


def build_fuzzer(into: Path, flavour: Flavour = Flavour.SHIPPED) -> None:
    """Compile the fuzz targets alone, so that `_fuzz` can be imported with `into` in front of sys.path."""
    _build(into, flavour, {"_fuzz": FUZZ / "_fuzz.pyx"}, ROOT)


def build_tree(into: Path, flavour: Flavour, *, fuzz: bool = False, whole: bool = False) -> None:
    """A copy of the checkout in which the packet path is compiled that way, with `fuzz` also the fuzz targets, and with
    `whole` everything that setup.py compiles."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(ROOT, into, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    path = [source for source in sorted((into / "ext/dataplane").glob("*.pyx")) if whole or source.stem != UNUSED]
    modules = {f"dataplane.{source.stem}": source for source in path}
    if whole:
        modules |= {f"dataplane.bench.{source.stem}": source for source in sorted((into / "bench").glob("*.pyx"))}
    if fuzz:
        modules["_fuzz"] = into / "tests/fuzz/_fuzz.pyx"
    _build(into, flavour, modules, into)


def environment(flavour: Flavour, tree: Path, reports: Path | None = None) -> dict[str, str]:
    """What a Python that is not sanitized itself needs to load what was compiled so in `tree`, itself and in every
    process that it starts. What the sanitizer of data races says goes into files whose names begin with `reports`."""
    found = {**os.environ, "PYTHONPATH": str(tree), "PYTHONFAULTHANDLER": "1"}
    found["UBSAN_OPTIONS"] = "print_stacktrace=1:abort_on_error=1"
    if flavour is Flavour.SANITIZED:
        found["LD_PRELOAD"] = _runtime("libasan.so")
        found["PYTHONMALLOC"] = "malloc"
        found["ASAN_OPTIONS"] = "detect_leaks=0:abort_on_error=1:malloc_context_size=1:quarantine_size_mb=16"
    if flavour is Flavour.THREADS:
        found["LD_PRELOAD"] = _runtime("libtsan.so")
        # what Python itself does below its GIL is not seen, and so what it copies must not be judged
        found["TSAN_OPTIONS"] = f"ignore_noninstrumented_modules=1:log_path={reports}"
    return found


def _runtime(name: str) -> str:
    done = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_absolute(), f"gcc was installed without {name}"
    return done.stdout.strip()


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
    generator = sources / "bench/generator"
    further = {"dataplane.bench._load": [*map(str, sorted(generator.glob("*.c")))]}
    extensions = [
        Extension(
            name,
            [path, *further.get(name, [])],
            include_dirs=[str(sources / "ext/dataplane"), str(generator)],
            extra_compile_args=[*ARGUMENTS[flavour], *SANITIZE[flavour], optimization(flavour, name)],
            extra_link_args=SANITIZE[flavour],
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
