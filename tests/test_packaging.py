"""Wheel, sdist to wheel and editable installs; the build's switches; an extension that is absent or broken."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from filelock import FileLock  # torch depends on it

ROOT = Path(__file__).parent.parent
SHIPPED = (
    *("bbfast", "csrc", "triton_kernels", "benchmarks", "setup.py", "pyproject.toml", "MANIFEST.in", "constraints.txt"),
    *("README.md", "CONTRIBUTING.md", "LICENSE"),
)
IMPORT_ALL = """
import bbfast, bbfast.triton_kernels.activation
from bbfast import extension
print(bbfast.__file__)
print(bbfast.triton_kernels.__file__)
print(extension.load().__file__)
print(extension.load().build_info()["cuda_reason"])
"""
needs_build_tools = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pip", "build", "ninja", "wheel")),
    reason="needs pip, build, ninja and wheel",
)


def run(*command, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command with a GPU-less build and without what would lead it to this source tree."""
    base = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TORCH_CUDA_ARCH_LIST")}
    environment = {**base, "BBFAST_CUDA": "0", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)


def run_python(code: str, cwd: Path, *first: Path) -> subprocess.CompletedProcess:
    """Runs code with the folders of `first` before the site-packages that hold torch.

    -S leaves out what .pth files bring: an editable install of this source tree would answer for what is missing.
    """
    outer = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return run(sys.executable, "-S", "-c", code, cwd=cwd, PYTHONPATH=os.pathsep.join(map(str, (*first, *outer))))


def succeed(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, f"{result.args}\n{result.stdout}\n{result.stderr}"
    return result.stdout


# ---- what is built ---------------------------------------------------------------------------------------


def copy_source_tree(target: Path) -> Path:
    target.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def build_wheel(tree: Path, target: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", target, "."]
    succeed(run(*command, cwd=tree, **environment))
    (wheel,) = target.glob("bbfast-*.whl")
    return wheel


def unpack(wheel: Path, target: Path) -> Path:
    """Installs a wheel into a folder of its own."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel]
    succeed(run(*command, cwd=wheel.parent))
    return target


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Path:
    """A folder with an unpacked sdist `source`, a compiler `c++`, and the wheel that was built of both.

    The compiler leaves its optimiser out, which takes half of the time and changes nothing that is tested here: the
    installation under test was compiled from the same sources with setup.py's own options. Whichever worker of
    pytest-xdist comes first builds for all.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "packaging"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not list(folder.glob("bbfast-*.whl")):
            unpack_sdist(copy_source_tree(folder / "tree"), folder)
            write_hasty_compiler(folder / "c++")
            build_wheel(folder / "source", folder, CXX=str(folder / "c++"))
    return folder


def unpack_sdist(tree: Path, folder: Path) -> None:
    """Builds a sdist of `tree` and unpacks it as `source`: only what it ships is there to build from."""
    succeed(run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, tree, cwd=folder))
    (sdist,) = folder.glob("bbfast-*.tar.gz")
    shutil.unpack_archive(sdist, folder)
    (folder / sdist.name.removesuffix(".tar.gz")).rename(folder / "source")


def write_hasty_compiler(script: Path) -> None:
    script.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    script.chmod(0o755)


@pytest.fixture(scope="session")
def sdist_tree(workshop) -> Path:
    return workshop / "source"


@pytest.fixture(scope="session")
def hasty_compiler(workshop) -> str:
    return str(workshop / "c++")


@pytest.fixture(scope="session")
def wheel_from_sdist(workshop) -> Path:
    (wheel,) = workshop.glob("bbfast-*.whl")
    return wheel


@pytest.fixture(scope="session")
def installation(wheel_from_sdist, tmp_path_factory) -> Path:
    return unpack(wheel_from_sdist, tmp_path_factory.mktemp("installation") / "site")


@pytest.fixture
def installed(installation, tmp_path) -> Path:
    """A folder with the wheel's packages, free to be damaged."""
    return shutil.copytree(installation, tmp_path / "site")


def check_imports(folder: Path, cwd: Path) -> None:
    package, kernels, compiled, reason = succeed(run_python(IMPORT_ALL, cwd, folder)).split("\n")[:4]
    assert Path(package).is_relative_to(folder)
    assert Path(kernels).is_relative_to(folder)
    assert Path(compiled).is_relative_to(folder)
    assert reason == "BBFAST_CUDA=0"


@needs_build_tools
@pytest.mark.thorough
def test_sdist_to_wheel_installs_and_imports(installed, tmp_path):
    check_imports(installed, tmp_path)


@needs_build_tools
@pytest.mark.thorough
def test_wheel_holds_packages_and_nothing_else(wheel_from_sdist):
    names = zipfile.ZipFile(wheel_from_sdist).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"bbfast"}
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    missing = {path.name for path in (ROOT / "triton_kernels").glob("*.py")} - {
        Path(name).name for name in names if name.startswith("bbfast/triton_kernels/")
    }
    assert not missing


@needs_build_tools
@pytest.mark.slow
def test_wheel_from_the_source_tree(tmp_path):
    wheel = build_wheel(copy_source_tree(tmp_path / "tree"), tmp_path)
    check_imports(unpack(wheel, tmp_path / "site"), tmp_path)


@needs_build_tools
@pytest.mark.thorough
def test_editable_install(wheel_from_sdist, sdist_tree, hasty_compiler, tmp_path):
    tree = sdist_tree  # the wheel left its objects there, so nothing is compiled again
    options = ["--no-build-isolation", "--no-deps", "--ignore-installed", "--prefix", tmp_path]
    command = [sys.executable, "-m", "pip", "install", *options, "--editable", tree]
    succeed(run(*command, cwd=tmp_path, CXX=hasty_compiler))
    (finder,) = tmp_path.glob("**/__editable__*.pth")
    # First on the path: an outer editable install has a finder module of the same name.
    code = f"import site; site.addsitedir({str(finder.parent)!r}){IMPORT_ALL}"
    lines = succeed(run_python(code, tmp_path, finder.parent)).split("\n")
    assert lines[0] == str(tree / "bbfast" / "__init__.py")
    assert lines[1] == str(tree / "triton_kernels" / "__init__.py")
    assert Path(lines[2]).parent == tree / "bbfast"


def test_top_level_import_of_the_kernels_says_what_to_do():
    result = run_python("import triton_kernels", ROOT)
    assert result.returncode != 0
    assert "import bbfast.triton_kernels instead" in result.stderr


# ---- absent and broken -----------------------------------------------------------------------------------

ASK = "from bbfast import extension; print(extension.load(), '|', extension.unavailable_reason())"


@needs_build_tools
@pytest.mark.thorough
def test_absent_extension_is_a_reason(installed, tmp_path):
    (compiled,) = (installed / "bbfast").glob("_C.*.so")
    compiled.unlink()
    output = succeed(run_python(ASK, tmp_path, installed))
    assert output.startswith("None | bbfast._C was not built")


@needs_build_tools
@pytest.mark.parametrize("damage", ["damaged", "other Python", "other torch"])
@pytest.mark.thorough
def test_broken_extension_is_an_error(installed, tmp_path, damage):
    (compiled,) = (installed / "bbfast").glob("_C.*.so")
    ask = ASK
    if damage == "damaged":
        compiled.write_bytes(b"not a library")
        message = "is present but does not load"
    elif damage == "other Python":
        compiled.rename(compiled.with_name("_C.cpython-36m-x86_64-linux-gnu.so"))
        message = "was built for another Python"
    else:
        ask = f"import torch; torch.__version__ = '1.0.0'; {ASK}"
        message = "was built with torch"
    result = run_python(ask, tmp_path, installed)
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("bbfast.extension.BrokenExtensionError: bbfast._C")
    assert message in last_line
    assert "pip install" in last_line


# ---- the build's switches --------------------------------------------------------------------------------


@pytest.fixture
def choose_cuda(monkeypatch, tmp_path):
    """Runs setup.py up to its choice, with an nvcc of the given release (None: no toolkit) and environment."""

    def choose(release: str | None, archs=("compute_80", "compute_90"), **environment: str):
        home = tmp_path / "cuda"
        (home / "bin").mkdir(parents=True)
        if release is not None:
            nvcc = home / "bin" / "nvcc"
            listing = "\n".join(archs)
            nvcc.write_text(
                f'#!/bin/sh\nif [ "$1" = --version ]; then echo "release {release}, V{release}.1"; '
                f'else echo "{listing}"; fi\n'
            )
            nvcc.chmod(0o755)
        for name in ("BBFAST_CUDA", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"CUDA_HOME": str(home), **environment}.items():
            monkeypatch.setenv(name, value)
        import torch.utils.cpp_extension as cpp_extension

        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
        monkeypatch.setattr(setuptools, "setup", lambda **_: None)
        monkeypatch.chdir(ROOT)
        return runpy.run_path(str(ROOT / "setup.py"))["CUDA"]

    return choose


@pytest.fixture
def torch_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_archs_are_what_nvcc_can(choose_cuda, torch_with_cuda):
    cuda = choose_cuda("13.0")
    assert cuda.build
    assert cuda.archs == ("8.0", "9.0+PTX")


def test_arch_list_is_respected(choose_cuda, torch_with_cuda):
    assert choose_cuda("13.0", TORCH_CUDA_ARCH_LIST="8.6;9.0a").archs == ("8.6", "9.0a")


def test_cuda_can_be_left_out(choose_cuda, torch_with_cuda):
    cuda = choose_cuda("13.0", BBFAST_CUDA="0")
    assert not cuda.build
    assert cuda.reason == "BBFAST_CUDA=0"


def test_other_major_version_of_nvcc(choose_cuda, torch_with_cuda):
    cuda = choose_cuda("12.8")
    assert not cuda.build
    assert "is version 12.8 but torch" in cuda.reason
    assert "the major versions must agree" in cuda.reason


def test_torch_without_cuda(choose_cuda, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    cuda = choose_cuda("13.0")
    assert not cuda.build
    assert "is built without CUDA" in cuda.reason


@pytest.mark.parametrize("release", [None, "12.8"])
def test_forcing_cuda_where_it_cannot_be_built(choose_cuda, torch_with_cuda, release):
    message = "has no bin/nvcc" if release is None else "the major versions must agree"
    with pytest.raises(SystemExit, match=f"^bbfast: BBFAST_CUDA=1 but the CUDA half cannot be built: .*{message}"):
        choose_cuda(release, BBFAST_CUDA="1")


def test_unknown_value(choose_cuda, torch_with_cuda):
    with pytest.raises(SystemExit, match=r"^bbfast: BBFAST_CUDA='2' is not allowed; use auto, 0 or 1"):
        choose_cuda("13.0", BBFAST_CUDA="2")


def test_errors_reach_the_terminal(tmp_path):
    result = run(sys.executable, ROOT / "setup.py", "--version", cwd=ROOT, BBFAST_CUDA="yes")
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1] == "bbfast: BBFAST_CUDA='yes' is not allowed; use auto, 0 or 1"
