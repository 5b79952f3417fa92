"""The build ladder: what the backend asks for, and what setup.py says where a rung is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parent.parent


def setup_py(**env: str) -> subprocess.CompletedProcess[str]:
    """`setup.py --name`: it decides what to build and builds nothing."""
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**os.environ, "BOMKERN_BUILD_CUDA": "", **env},
        capture_output=True,
        text=True,
    )


def test_no_compiler_is_a_pure_python_install(tmp_path: Path) -> None:
    done = setup_py(PATH=str(tmp_path), CXX="nowhere")
    assert done.returncode == 0 and "no C++ compiler was found" in done.stdout and "bomkern" in done.stdout


def test_no_compiler_is_fatal_where_cuda_is_demanded(tmp_path: Path) -> None:
    done = setup_py(PATH=str(tmp_path), CXX="nowhere", BOMKERN_BUILD_CUDA="1")
    assert done.returncode != 0 and "install g++" in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_demanded_of_a_torch_without_it_is_fatal() -> None:
    done = setup_py(BOMKERN_BUILD_CUDA="1")
    assert done.returncode != 0 and "install a CUDA build of torch first" in done.stderr
    assert "Traceback" not in done.stderr


def test_cuda_refused() -> None:
    done = setup_py(BOMKERN_BUILD_CUDA="0")
    assert done.returncode == 0 and "unset it to build the CUDA kernels" in done.stdout


@pytest.mark.parametrize("wish", ["yes", "2"])
def test_a_wish_that_is_neither_is_refused(wish: str) -> None:
    done = setup_py(BOMKERN_BUILD_CUDA=wish)
    assert done.returncode != 0 and "BOMKERN_BUILD_CUDA must be 0, 1 or unset" in done.stderr


def test_a_sanitizer_that_is_none_is_refused() -> None:
    done = setup_py(BOMKERN_SANITIZE="memory")
    assert done.returncode != 0 and "BOMKERN_SANITIZE must be 'address,undefined', 'thread' or unset" in done.stderr


def test_a_wish_for_debug_lines_that_is_neither_is_refused() -> None:
    done = setup_py(BOMKERN_DEBUG="yes")
    assert done.returncode != 0 and "BOMKERN_DEBUG must be 0, 1 or unset" in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(
    ("env", "lines"), [({}, False), ({"BOMKERN_DEBUG": "1"}, True), ({"BOMKERN_SANITIZE": "thread"}, True)]
)
def test_debug_lines_are_in_the_library_only_where_asked_for(env: dict[str, str], lines: bool, tmp_path: Path) -> None:
    """By a compiler that is given the flags of setup.py behind Python's own, which ask for them."""
    code = (
        "import json, runpy, setuptools\n"
        "setuptools.setup = lambda **given: print(json.dumps(given['ext_modules'][0].extra_compile_args['cxx']))\n"
        "runpy.run_path('setup.py')"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BOMKERN_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**clean, "BOMKERN_BUILD_CUDA": "0", **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    flags = json.loads(done.stdout.splitlines()[-1])
    source, to = tmp_path / "one.cpp", tmp_path / "one.o"
    source.write_text("int one() { return 1; }")
    subprocess.run(["g++", "-g", *flags, "-c", str(source), "-o", str(to)], check=True)
    assert (b".debug_info" in to.read_bytes()) == lines


def ask_backend(purelib: Path, setuptools_only: Path, kind: str = "editable") -> str:
    """What the backend requires in an isolated build whose target keeps its packages in ``purelib``."""
    code = (
        f"import sys, sysconfig; sys.path[:0] = [{str(ROOT / 'tools')!r}, {str(setuptools_only)!r}]\n"
        f"sysconfig.get_paths = lambda: dict(purelib={str(purelib)!r}, platlib={str(purelib)!r})\n"
        f"import build_backend; print(build_backend.get_requires_for_build_{kind}())"
    )
    return subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_backend_asks_for_torch_only_where_there_is_none(tmp_path: Path) -> None:
    packages = Path(setuptools.__file__).parent.parent
    isolated = tmp_path / "isolated"
    isolated.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (isolated / name).symlink_to(packages / name)
    (tmp_path / "empty").mkdir()
    assert ask_backend(tmp_path / "empty", isolated) == "['torch>=2.11,<2.14']"
    assert ask_backend(Path(torch.__file__).parent.parent, isolated) == "[]"


def test_backend_asks_for_no_torch_where_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = Path(setuptools.__file__).parent.parent
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / name).symlink_to(packages / name)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert ask_backend(tmp_path / "empty", tmp_path) == "[]"
    monkeypatch.setenv("CXX", sys.executable)  # anything that can be run
    assert ask_backend(tmp_path / "empty", tmp_path) == "['torch>=2.11,<2.14']"
    assert ask_backend(tmp_path / "empty", tmp_path, "sdist") == "[]"


@pytest.mark.parametrize("command", ["setup.py --name", "tools/build_backend.py"])
def test_what_an_open_build_lacks_is_told_in_one_line(command: str, tmp_path: Path) -> None:
    """Without setuptools the backend says so; with it, and a compiler, but no torch, setup.py does."""
    packages = Path(setuptools.__file__).parent.parent
    if command.startswith("setup.py"):
        for name in ("setuptools", "_distutils_hack"):
            (tmp_path / name).symlink_to(packages / name)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'tools'}"}
    done = subprocess.run(
        [sys.executable, "-S", *command.split(" ")],
        cwd=ROOT,
        env={**environment, "CXX": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode and "Traceback" not in done.stderr and "leave --no-build-isolation out" in done.stderr


def test_archives_hold_what_they_should_and_are_the_same_when_built_again() -> None:
    """As without a compiler, in seconds; `make dist-check` does it with one."""
    command = [sys.executable, "tools/check_dist.py", "--no-compiler"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_package_is_installed(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "build_py", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "BOMKERN_BUILD_CUDA": "", "PATH": str(tmp_path), "CXX": "nowhere"},
        check=True,
        capture_output=True,
    )
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "bomkern").rglob("*.py")}
    assert there and there <= {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")}
