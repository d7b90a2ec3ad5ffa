"""Builds the compiled packet path. Everything else about the package stands in pyproject.toml.

`ext/dataplane` mirrors the package so that Cython finds the .pxd files; the generated C goes to
`build/cython`, never beside the sources.
"""

from __future__ import annotations

from Cython.Build import cythonize
from setuptools import Extension, setup

MODULES = ("_fib", "_segment", "_coalesce", "_tap", "_engine", "_rehearsal")

COMPILE_ARGS = [
    "-O3",
    "-fno-strict-aliasing",  # packet bytes are read through struct pointers
    "-fstack-protector-strong",
    "-D_FORTIFY_SOURCE=2",
    "-Wno-unreachable-code",
    "-Wno-sign-compare",  # Cython's own loops
]

LOAD_GENERATOR = Extension(
    "dataplane.bench._load",
    ["bench/_load.pyx", *(f"bench/generator/{name}.c" for name in ("clock", "connect", "echo", "tcp", "udp"))],
    include_dirs=["bench/generator"],
    depends=["bench/generator/load.h"],
    extra_compile_args=COMPILE_ARGS,
)

MICRO_BENCHMARKS = Extension(
    "dataplane.bench._micro",
    ["bench/_micro.pyx"],
    include_dirs=["ext/dataplane"],
    depends=["ext/dataplane/checksum.h"],
    extra_compile_args=COMPILE_ARGS,  # the packet path's own: the same functions are measured
)

setup(
    ext_modules=cythonize(  # type: ignore[no-untyped-call]  # Cython has no annotations
        [
            Extension(
                f"dataplane.{name}",
                [f"ext/dataplane/{name}.pyx"],
                include_dirs=["ext/dataplane"],
                depends=["ext/dataplane/checksum.h"],
                extra_compile_args=COMPILE_ARGS,
            )
            for name in MODULES
        ]
        + [LOAD_GENERATOR, MICRO_BENCHMARKS],
        include_path=["ext"],
        build_dir="build/cython",
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "embedsignature": True,
        },
    ),
)
