"""Builds bbfast: Python packages, triton_kernels/ and benchmarks/ within bbfast, and the extension bbfast._C.

The extension takes every csrc/*.cpp and, with CUDA, every csrc/*.cu and csrc/*_cuda.cpp: a new file needs no
change here. BBFAST_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST, CUDA_HOME and MAX_JOBS steer the build (see README.md).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from setuptools import find_packages, setup


def find_toolkit() -> str | None:
    """The CUDA toolkit: CUDA_HOME, or the one that nvcc on PATH belongs to, be it a link or a wrapper."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return home
    if shutil.which("nvcc") is not None:
        dry_run = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        if found := re.search(r"^#\$ TOP=(.+)$", dry_run.stdout + dry_run.stderr, re.MULTILINE):
            return str(Path(found[1].strip()).resolve())
    return None


# torch takes the folder above `which nvcc`, which a wrapper script misleads; so it is told before it looks.
if toolkit := find_toolkit():
    os.environ["CUDA_HOME"] = toolkit
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402

ROOT = Path(__file__).parent.resolve()
CONFIG_DIR = ROOT / "build" / "config"
DEFAULT_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# torch's own CUDA headers include these; where a trimmed toolkit lacks them, torch's wheels may bring them.
HEADERS_TORCH_NEEDS = ("cublas_v2.h", "cusparse.h", "cusolverDn.h")


class BuildError(SystemExit):
    """Ends the build with one clear line."""

    def __init__(self, message: str):
        super().__init__(f"bbfast: {message}")


@dataclass(frozen=True)
class Cuda:
    """Whether the CUDA half is built, why (not), and for which architectures."""

    build: bool
    reason: str
    archs: tuple[str, ...] = ()


# ---- choosing ----------------------------------------------------------------------------------------------


def choose_cuda() -> Cuda:
    """Reads BBFAST_CUDA and looks at the compiler and at torch. A GPU need not be there."""
    wanted = os.environ.get("BBFAST_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise BuildError(f"BBFAST_CUDA={wanted!r} is not allowed; use auto, 0 or 1")
    if wanted == "0":
        return Cuda(False, "BBFAST_CUDA=0")
    obstacle = cuda_obstacle()
    if obstacle is None:
        return Cuda(True, f"nvcc {nvcc_version()} in {CUDA_HOME}", choose_archs())
    if wanted == "1":
        raise BuildError(f"BBFAST_CUDA=1 but the CUDA half cannot be built: {obstacle}")
    return Cuda(False, obstacle)


def cuda_obstacle() -> str | None:
    """Why CUDA sources cannot be compiled for this torch, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None:
        return "no CUDA toolkit found (set CUDA_HOME, or put nvcc on PATH)"
    if not nvcc().is_file():
        return f"CUDA_HOME={CUDA_HOME} has no bin/nvcc"
    if nvcc_version().split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"nvcc in {CUDA_HOME} is version {nvcc_version()} but torch {torch.__version__} has CUDA "
            f"{torch.version.cuda}; the major versions must agree (set CUDA_HOME to a matching toolkit)"
        )
    return None


def nvcc() -> Path:
    return Path(CUDA_HOME) / "bin" / "nvcc"


def nvcc_version() -> str:
    output = subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", output)
    if found is None:
        raise BuildError(f"{nvcc()} --version does not tell its release:\n{output}")
    return found[1]


def choose_archs() -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST, or the default list as far as this nvcc goes, with PTX for what comes after."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        return tuple(given.replace(";", " ").split())
    output = subprocess.run([nvcc(), "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    supported = [arch for arch in DEFAULT_ARCHS if f"compute_{arch.replace('.', '')}" in output.split()]
    if not supported:
        raise BuildError(f"{nvcc()} supports none of {', '.join(DEFAULT_ARCHS)}; set TORCH_CUDA_ARCH_LIST")
    return (*supported[:-1], f"{supported[-1]}+PTX")


# ---- building ----------------------------------------------------------------------------------------------


class BuildExt(BuildExtension):
    """torch's ninja build, told which architectures to build for and what to write into `_C.build_info()`."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Editable installs would compile in a folder that is thrown away; in this one ninja finds what is up to date.
        self.build_temp = str(ROOT / "build" / f"objects-{sys.implementation.cache_tag}")

    def run(self) -> None:
        half = f"with CUDA for {' '.join(CUDA.archs)}" if CUDA.build else "for the CPU only"
        print(f"bbfast: building bbfast._C {half} ({CUDA.reason})", file=sys.stderr)
        # By itself ninja starts two more compilers than there are cores.
        os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
        if CUDA.build:
            os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(CUDA.archs)
        write_build_config()
        super().run()


def write_build_config() -> None:
    """Writes build_config.h, only when it changes, so that ninja recompiles bindings.cpp only then."""

    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'

    header = (
        "// Written by setup.py.\n#pragma once\n"
        f"#define BBFAST_CUDA_ARCHS {quoted(' '.join(CUDA.archs))}\n"
        f"#define BBFAST_CUDA_REASON {quoted(CUDA.reason)}\n"
    )
    path = CONFIG_DIR / "build_config.h"
    if not path.is_file() or path.read_text() != header:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header)


def extension():
    """bbfast._C, with or without its CUDA half."""
    # gcc notes on every compile that vector types have no stable ABI below AVX; none crosses a function here.
    cxx = ["-O2", "-g0", "-fopenmp", "-Wall", "-Wno-psabi"]
    cpp_sources = sources("*.cpp")
    if not CUDA.build:
        host_only = [source for source in cpp_sources if not source.endswith("_cuda.cpp")]
        return CppExtension(
            "bbfast._C",
            host_only,
            include_dirs=[str(CONFIG_DIR)],
            extra_compile_args={"cxx": cxx},
            extra_link_args=["-fopenmp"],
        )
    # After all other folders, so that the toolkit's own headers win wherever it has them.
    spare = [argument for folder in spare_cuda_includes() for argument in ("-idirafter", folder)]
    return CUDAExtension(
        "bbfast._C",
        [*cpp_sources, *sources("*.cu")],
        include_dirs=[str(CONFIG_DIR)],
        define_macros=[("BBFAST_WITH_CUDA", None)],
        extra_compile_args={"cxx": [*cxx, *spare], "nvcc": ["-O3", "-lineinfo", "--threads=2"]},
        extra_link_args=["-fopenmp"],
    )


def sources(pattern: str) -> list[str]:
    # Relative to the root, as setuptools wants them for the sdist.
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def spare_cuda_includes() -> list[str]:
    """The CUDA headers that came with torch's wheels, where the toolkit lacks some that torch needs."""
    toolkit = Path(CUDA_HOME) / "include"
    if all((toolkit / header).is_file() for header in HEADERS_TORCH_NEEDS):
        return []
    package = importlib.util.find_spec("nvidia")
    roots = [] if package is None else [Path(root) for root in package.submodule_search_locations]
    return [str(folder) for root in roots for folder in sorted(root.glob("*/include"))]


CUDA = choose_cuda()

setup(
    packages=[*find_packages(include=["bbfast", "bbfast.*"]), "bbfast.triton_kernels", "bbfast.benchmarks"],
    package_dir={"bbfast.triton_kernels": "triton_kernels", "bbfast.benchmarks": "benchmarks"},
    package_data={"bbfast.triton_kernels": ["*.json"], "bbfast.swap": ["sources/*.json"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExt},
)
